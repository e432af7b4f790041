//! Starts every subscription of a service and stops it in order.

use std::{net::SocketAddr, time::Duration};

use super::{Running, Signals, signals::Listening};
use crate::{Bus, ConsumerFactory, Error, ErrorKind, Result, factory::Plan};

/// Runs the handlers of one or more factories.
#[derive(Debug)]
pub struct ConsumerRunner {
    factories: Vec<ConsumerFactory>,
    bind: Option<String>,
    drain_timeout: Duration,
    /// Where handlers send what they received, over another connection.
    target: Option<Bus>,
}

impl ConsumerRunner {
    /// Runs the handlers of this factory.
    #[must_use]
    pub fn new(factory: ConsumerFactory) -> Self {
        Self { factories: vec![factory], bind: None, drain_timeout: Duration::from_secs(30), target: None }
    }

    /// Its handlers are of no use without this bus: it counts for readiness, is flushed at a stop, and ends the service when it is
    /// given up.
    pub(crate) fn onto(mut self, target: &Bus) -> Self {
        self.target = Some(target.clone());
        self
    }

    /// Runs those of another factory too, which may use another bus.
    #[must_use]
    pub fn and(mut self, factory: ConsumerFactory) -> Self {
        self.factories.push(factory);
        self
    }

    /// Serves `/health`, `/ready` and `/metrics` on this address while it runs; needs the feature `ops`. With port 0 it chooses a
    /// free one, which [`Running::bound`] tells.
    #[must_use]
    pub fn bind(mut self, address: impl Into<String>) -> Self {
        self.bind = Some(address.into());
        self
    }

    /// How long handlers that run may go on after a stop; 30 seconds without it.
    #[must_use]
    pub fn drain_timeout(mut self, limit: Duration) -> Self {
        self.drain_timeout = limit;
        self
    }

    /// Starts every subscription and returns when all of them are live. Dropping the future stops what was started.
    ///
    /// # Errors
    /// Those of [`ConsumerFactory::check`] before the broker is asked for anything; then those of subscribing. What
    /// was started is stopped again.
    pub async fn start(self) -> Result<Running> {
        let plans = self.plans()?;
        let address = match &self.bind {
            Some(text) => Some(resolve(text)?),
            None => None,
        };
        let mut buses: Vec<Bus> = Vec::new();
        for factory in &self.factories {
            if !buses.iter().any(|bus| bus.is(factory.bus())) {
                buses.push(factory.bus().clone());
            }
        }
        buses.extend(
            self.target.iter().filter(|target| !buses.iter().any(|bus| bus.is(target))).cloned().collect::<Vec<_>>(),
        );
        let starting = Unheld::new(Running::new(buses, self.drain_timeout));
        let running = starting.running();
        // Before a message is fetched: an address that is taken is found first, and who asks meanwhile is told "not yet".
        #[cfg(feature = "ops")]
        if let Some(address) = address {
            running.is_bound(super::ops::serve(running, address).await?);
        }
        #[cfg(not(feature = "ops"))]
        let _ = address;
        for (bus, plan) in plans {
            if let Err(error) = running.attach_plan(bus, plan).await {
                if let Err(stopping) = running.stop().await {
                    tracing::warn!(error = %stopping, "what was started was not stopped in order");
                }
                return Err(error);
            }
        }
        if let Some(target) = &self.target {
            running.ends_with(target);
        }
        running.started();
        Ok(starting.held())
    }

    /// Every subscription that is to be made, checked.
    pub(super) fn plans(&self) -> Result<Vec<(Bus, Plan)>> {
        let mut plans = Vec::new();
        for factory in &self.factories {
            plans.extend(factory.plans()?.into_iter().map(|plan| (factory.bus().clone(), plan)));
        }
        if plans.is_empty() {
            return Err(Error::new(ErrorKind::Config, "there is no handler to run")
                .with_operation("start")
                .with_hint("mark a function with #[consumer(\"queue\")] or call ConsumerFactory::route"));
        }
        Ok(plans)
    }

    /// Runs until SIGINT or SIGTERM, then drains: no further message is fetched, handlers that run may end within
    /// the drain time-out, the rest is cancelled and returns to the broker, producers are flushed. A second signal
    /// cancels at once, and so does dropping the future. A signal that comes while it starts ends that.
    ///
    /// # Errors
    /// As [`start`](Self::start), and the first one met while stopping.
    pub async fn run(self) -> Result<()> {
        let (mut while_it_starts, signals) = (Signals::new()?, Signals::new()?);
        let _listening = Listening::begin();
        let running = tokio::select! {
            biased;
            started = self.start() => Unheld::new(started?),
            () = while_it_starts.next() => {
                tracing::info!("stopped while it was starting");
                return Ok(());
            }
        };
        running.running().clone().until(signals).await
    }
}

/// A service of which nobody else has a handle: when this is dropped, its handlers are cancelled and what they had returns to the
/// broker. One that was stopped takes no harm.
pub(crate) struct Unheld {
    running: Running,
    held: bool,
}

impl Unheld {
    pub(crate) fn new(running: Running) -> Self {
        Self { running, held: false }
    }

    pub(crate) fn running(&self) -> &Running {
        &self.running
    }

    fn held(mut self) -> Running {
        self.held = true;
        self.running.clone()
    }
}

impl Drop for Unheld {
    fn drop(&mut self) {
        if !self.held {
            self.running.force();
        }
    }
}

fn resolve(text: &str) -> Result<SocketAddr> {
    let problem = |error: &dyn std::fmt::Display| {
        Error::new(ErrorKind::Config, format!("{text:?} is no address to serve health and metrics on: {error}"))
            .with_operation("start")
            .with_hint("write it as ip:port, such as 0.0.0.0:9000")
    };
    if !cfg!(feature = "ops") {
        return Err(Error::new(ErrorKind::NotCompiledIn, "health and metrics over HTTP are not compiled in")
            .with_operation("start")
            .with_hint("add the feature \"ops\""));
    }
    text.parse().map_err(|error: std::net::AddrParseError| problem(&error))
}
