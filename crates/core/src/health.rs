//! What a connection is doing, told truthfully.

use std::{fmt, sync::Arc};

use serde::Serialize;
use tokio::{sync::watch, time::Instant};

/// State of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthState {
    /// Connected.
    Up,
    /// Connected again, for less than half a minute.
    Degraded,
    /// Not connected; the backend keeps trying.
    Down,
    /// Closed by us, or given up after the configured number of attempts. Final.
    Closed,
}

/// State, reason and history of a connection.
#[derive(Debug, Clone)]
pub struct Health {
    /// The state; [`HealthWatch::now`] turns `Up` into `Degraded` while it is recent after a loss.
    pub state: HealthState,
    /// Why it is not up, or why it was lost last.
    pub reason: Option<Arc<str>>,
    /// Since when.
    pub since: Instant,
    /// How often the connection was lost and made again.
    pub reconnects: u64,
    connected_before: bool,
    losses: u64,
    /// Why and when it was lost last.
    lost: Option<(Arc<str>, Instant)>,
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            HealthState::Up => "up",
            HealthState::Degraded => "degraded",
            HealthState::Down => "down",
            HealthState::Closed => "closed",
        };
        match &self.reason {
            Some(reason) if self.state != HealthState::Up => write!(f, "{state}: {reason}"),
            _ => f.write_str(state),
        }
    }
}

/// How long a connection counts as degraded after it was made again.
pub const DEGRADED_FOR: std::time::Duration = std::time::Duration::from_secs(30);

/// The reading end: ask for the present state or wait for changes.
#[derive(Debug, Clone)]
pub struct HealthWatch {
    states: watch::Receiver<Health>,
    /// How often it had been lost when [`changed`](Self::changed) told of it last.
    told: u64,
    /// A loss was told, and not yet that it is over.
    owes: bool,
}

impl HealthWatch {
    fn new(states: watch::Receiver<Health>) -> Self {
        let told = states.borrow().losses;
        Self { states, told, owes: false }
    }

    /// The present state.
    #[must_use]
    pub fn now(&self) -> Health {
        seen(&self.states.borrow())
    }

    /// Waits for the next change; `None` when the connection is gone for good. A loss is told even when the connection is
    /// made again before anybody has looked: first that it was down, and with the next call what it is now. Several of
    /// them between two calls are told as one. Cancelling it loses nothing.
    pub async fn changed(&mut self) -> Option<Health> {
        if !std::mem::take(&mut self.owes) {
            self.states.changed().await.ok()?;
        }
        let mut now = seen(&self.states.borrow_and_update());
        if now.losses > std::mem::replace(&mut self.told, now.losses) && now.state != HealthState::Down {
            self.owes = true;
            now.state = HealthState::Down;
            if let Some((reason, since)) = now.lost.take() {
                (now.reason, now.since) = (Some(reason), since);
            }
        }
        Some(now)
    }
}

fn seen(health: &Health) -> Health {
    let mut health = health.clone();
    if health.state == HealthState::Up && health.reconnects > 0 && health.since.elapsed() < DEGRADED_FOR {
        health.state = HealthState::Degraded;
    }
    health
}

/// The backend's end.
#[derive(Debug)]
pub struct HealthReporter(watch::Sender<Health>);

impl HealthReporter {
    /// A connection that is down until told otherwise.
    #[must_use]
    pub fn new() -> Self {
        Self(watch::Sender::new(Health {
            state: HealthState::Down,
            reason: Some("not connected yet".into()),
            since: Instant::now(),
            reconnects: 0,
            connected_before: false,
            losses: 0,
            lost: None,
        }))
    }

    /// A reading end.
    #[must_use]
    pub fn watch(&self) -> HealthWatch {
        HealthWatch::new(self.0.subscribe())
    }

    /// The connection is up. Counts a reconnect when it was lost before.
    pub fn up(&self) {
        self.0.send_if_modified(|health| {
            if matches!(health.state, HealthState::Up | HealthState::Closed) {
                return false;
            }
            health.state = HealthState::Up;
            health.since = Instant::now();
            if health.connected_before {
                health.reconnects += 1
            } else {
                health.reason = None
            }
            health.connected_before = true;
            true
        });
    }

    /// The connection was lost, or an attempt to make it failed. Reasons never hold secrets.
    pub fn down(&self, reason: impl fmt::Display) {
        self.0.send_if_modified(|health| {
            if health.state == HealthState::Closed {
                return false;
            }
            if health.state != HealthState::Down {
                health.since = Instant::now();
                health.losses += 1;
            }
            health.state = HealthState::Down;
            let reason: Arc<str> = reason.to_string().into();
            health.reason = Some(Arc::clone(&reason));
            health.lost = Some((reason, health.since));
            true
        });
    }

    /// Closed for good.
    pub fn closed(&self, reason: impl fmt::Display) {
        self.0.send_if_modified(|health| {
            if health.state == HealthState::Closed {
                return false;
            }
            health.state = HealthState::Closed;
            health.since = Instant::now();
            health.reason = Some(reason.to_string().into());
            true
        });
    }
}

impl Default for HealthReporter {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loss_that_is_over_before_anybody_looked_is_told() {
        let reporter = HealthReporter::new();
        reporter.up();
        let mut watch = reporter.watch();
        for reason in ["the first", "the second"] {
            reporter.down(reason);
            reporter.up();
            let told = watch.changed().await.expect("a loss");
            assert_eq!((told.state, told.reason.as_deref()), (HealthState::Down, Some(reason)));
            assert_eq!(watch.changed().await.map(|now| now.state), Some(HealthState::Degraded));
        }
        reporter.down("the third");
        assert_eq!(watch.changed().await.map(|now| now.state), Some(HealthState::Down));
        reporter.up();
        assert_eq!(watch.changed().await.map(|now| now.state), Some(HealthState::Degraded), "it was told once already");
        reporter.down("told");
        assert_eq!(watch.changed().await.map(|now| now.state), Some(HealthState::Down));
        for state in [HealthState::Down, HealthState::Down, HealthState::Degraded] {
            // Again before anybody has heard that it was up, and while that is owed.
            if state == HealthState::Down {
                reporter.up();
                reporter.down("again");
                reporter.up();
            }
            assert_eq!(watch.changed().await.map(|now| now.state), Some(state));
        }
        reporter.down("the last");
        reporter.up();
        reporter.closed("by us");
        let told = watch.changed().await.expect("a loss");
        assert_eq!((told.state, told.reason.as_deref()), (HealthState::Down, Some("the last")));
        reporter.closed("by somebody else");
        assert_eq!(watch.changed().await.map(|now| now.state), Some(HealthState::Closed));
        drop(reporter);
        assert!(watch.changed().await.is_none());
    }
}
