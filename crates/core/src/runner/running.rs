//! A service that runs: what can be asked of it and how it stops.

use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Control, RouteStats, Signals, Stop,
    signals::Listening,
    supervise::{Opening, Task},
};
use crate::{Bus, ChannelKind, ConsumerFactory, Error, ErrorKind, HealthState, Result, clock, factory::Plan};

/// How long handlers that were cancelled get to end, and consumers to close.
pub(crate) const CANCEL_GRACE: Duration = Duration::from_secs(5);

/// A running service. Clones are the same service; dropping them does not stop it.
#[derive(Clone)]
pub struct Running(Arc<Inner>);

struct Inner {
    buses: Vec<Bus>,
    drain_timeout: Duration,
    subscribed: Mutex<BTreeMap<String, Subscribed>>,
    stop: Stop,
    cancelled: CancellationToken,
    /// A subscription has ended with an error that opening it again cannot help.
    failed: CancellationToken,
    started: AtomicBool,
    bound: OnceLock<SocketAddr>,
}

struct Subscribed {
    bus: Bus,
    kind: ChannelKind,
    control: Arc<Control>,
    stop: Stop,
    cancelled: CancellationToken,
    task: Task,
}

impl Running {
    pub(super) fn new(buses: Vec<Bus>, drain_timeout: Duration) -> Self {
        Self(Arc::new(Inner {
            buses,
            drain_timeout,
            subscribed: Mutex::default(),
            stop: Stop::default(),
            cancelled: CancellationToken::new(),
            failed: CancellationToken::new(),
            started: AtomicBool::new(false),
            bound: OnceLock::new(),
        }))
    }

    #[cfg(feature = "ops")]
    pub(super) fn is_bound(&self, address: SocketAddr) {
        let _ = self.0.bound.set(address);
    }

    /// Where health and metrics are served, if they are ([`ConsumerRunner::bind`](crate::ConsumerRunner::bind)).
    #[must_use]
    pub fn bound(&self) -> Option<SocketAddr> {
        self.0.bound.get().copied()
    }

    /// Adds the handlers of a factory while the service runs: all of them, or none when it fails.
    ///
    /// # Errors
    /// As [`ConsumerRunner::start`](crate::ConsumerRunner::start); [`ErrorKind::Conflict`] when a channel is consumed already.
    pub async fn attach(&self, factory: ConsumerFactory) -> Result<()> {
        let mut attached = Vec::new();
        for plan in factory.plans()? {
            match self.attach_plan(factory.bus().clone(), plan).await {
                Ok(name) => attached.push(name),
                Err(error) => {
                    for detached in join_all(attached.iter().map(|name| self.detach(name))).await {
                        if let Err(error) = detached {
                            tracing::warn!(%error, "what was attached was not detached in order");
                        }
                    }
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Says under which name.
    pub(super) async fn attach_plan(&self, bus: Bus, plan: Plan) -> Result<String> {
        let name = self.name_for(&bus, &plan);
        self.may_attach(&self.subscribed(), &name)?;
        let kind = plan.address.kind();
        let (stop, cancelled) = (self.0.stop.child(), self.0.cancelled.child_token());
        let (opening, mut consumer, origin) =
            Opening::open(bus.clone(), plan, stop.clone(), cancelled.clone(), self.0.failed.clone()).await?;
        let refused = {
            let mut subscribed = self.subscribed();
            // Once more: it may have been stopped meanwhile, or the same attached.
            match self.may_attach(&subscribed, &name) {
                Ok(()) => {
                    let control = Arc::clone(&opening.control);
                    let task = Task::spawn(opening.supervise(consumer, origin));
                    subscribed.insert(name.clone(), Subscribed { bus, kind, control, stop, cancelled, task });
                    return Ok(name);
                }
                Err(refused) => refused,
            }
        };
        if let Err(error) = consumer.close().await {
            tracing::warn!(channel = origin.address.name(), %error, "a consumer that is not used was not closed");
        }
        Err(refused)
    }

    fn may_attach(&self, subscribed: &BTreeMap<String, Subscribed>, name: &str) -> Result<()> {
        if self.0.stop.is_said() {
            return Err(Error::closed("attach").with_channel(name));
        }
        if subscribed.contains_key(name) {
            return Err(Error::new(ErrorKind::Conflict, "is consumed by this service already")
                .with_operation("attach")
                .with_channel(name)
                .with_hint("detach it first"));
        }
        Ok(())
    }

    /// `queue` or `topic@group`; with the backend before it (`amqp:queue`) when the service consumes a channel of
    /// that name over another connection too, and with its kind (`topic orders`) when it consumes one of the other kind.
    fn name_for(&self, bus: &Bus, plan: &Plan) -> String {
        let name = plan.name();
        let same = |known: &Bus| std::ptr::eq(known.connection().as_ref(), bus.connection().as_ref());
        match self.subscribed().get(&name) {
            Some(taken) if !same(&taken.bus) => format!("{}:{name}", bus.backend()),
            Some(taken) if taken.kind != plan.address.kind() => format!("{} {name}", plan.address.kind()),
            _ => name,
        }
    }

    /// Stops one subscription (`queue`, or `topic@group`; `topic orders` beside a queue of that name) as
    /// [`stop`](Self::stop) does; the others go on.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] naming the subscriptions there are; otherwise that of closing the consumer.
    pub async fn detach(&self, name: &str) -> Result<()> {
        let found = self.subscribed().get(name).map(|subscribed| {
            subscribed.stop.stop();
            (subscribed.task.clone(), subscribed.cancelled.clone())
        });
        let (task, cancelled) = found.ok_or_else(|| self.unknown(name))?;
        let outcome = task.ends(clock::instant_in(self.0.drain_timeout), &cancelled).await;
        let mut subscribed = self.subscribed();
        // Another call may have been faster, and the channel been attached anew.
        if subscribed.get(name).is_some_and(|found| found.task.is(&task)) {
            subscribed.remove(name);
        }
        outcome
    }

    /// Fetches nothing more for this subscription until it is resumed; handlers that run end as usual.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] naming the subscriptions there are.
    pub fn pause(&self, name: &str) -> Result<()> {
        self.control(name).map(|control| control.set_paused(true))
    }

    /// Goes on after [`pause`](Self::pause), or after too many failures in a row, with the same message.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn resume(&self, name: &str) -> Result<()> {
        self.control(name).map(|control| control.set_paused(false))
    }

    /// Changes how many handlers of this subscription may run at a time. Those that run are not interrupted. No more run than
    /// the [`prefetch`](crate::Route::prefetch) that it was started with, which stays as it is.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn set_concurrency(&self, name: &str, limit: usize) -> Result<()> {
        let control = self.control(name)?;
        let prefetch = control.prefetch();
        if limit > prefetch {
            tracing::warn!(subscription = name, limit, prefetch, "no more handlers can run than messages are fetched");
        }
        control.set_concurrency(limit);
        Ok(())
    }

    /// Counters of a subscription.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn stats(&self, name: &str) -> Result<RouteStats> {
        self.control(name).map(|control| control.stats())
    }

    /// Counters of all subscriptions, by name.
    #[must_use]
    pub fn all_stats(&self) -> BTreeMap<String, RouteStats> {
        self.subscribed().iter().map(|(name, subscribed)| (name.clone(), subscribed.control.stats())).collect()
    }

    /// The buses it runs on: those it was started with, and those of handlers that were attached.
    #[must_use]
    pub fn buses(&self) -> Vec<Bus> {
        let mut buses = self.0.buses.clone();
        for Subscribed { bus, .. } in self.subscribed().values() {
            if !buses.iter().any(|known| known.is(bus)) {
                buses.push(bus.clone());
            }
        }
        buses
    }

    /// Ends when this bus is given up, or closed.
    pub(super) fn ends_with(&self, bus: &Bus) {
        let (mut health, stop, failed) = (bus.watch_health(), self.0.stop.clone(), self.0.failed.clone());
        tokio::spawn(async move {
            let closed =
                async { while health.now().state != HealthState::Closed && health.changed().await.is_some() {} };
            tokio::select! {
                () = closed => failed.cancel(),
                () = stop.said() => {}
            }
        });
    }

    /// Every subscription that it was started with is live.
    pub(super) fn started(&self) {
        self.0.started.store(true, Ordering::Release);
    }

    /// Whether it takes work: every subscription was started and none has ended or is being opened again after an error, every
    /// connection is up and it is not being stopped.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        use HealthState::{Degraded, Up};
        let works = self.0.started.load(Ordering::Acquire) && !self.0.stop.is_said();
        // One that is being detached is not missed.
        let consumes = |subscribed: &Subscribed| {
            subscribed.stop.is_said() || (!subscribed.task.is_over() && subscribed.control.is_consuming())
        };
        let works = works && self.subscribed().values().all(consumes);
        works && self.buses().iter().all(|bus| matches!(bus.health().state, Up | Degraded))
    }

    /// Stops: no further message is fetched, handlers that run may end within the drain time-out, then they are
    /// cancelled; what was not handled is back with the broker and producers are flushed when this returns. A second
    /// call waits for the same. Dropping the future does not undo the stop.
    ///
    /// # Errors
    /// The first one met; stopping goes on all the same. [`ErrorKind::Timeout`] when a broker does not take what was sent
    /// before within the drain time-out and 5 seconds more.
    pub async fn stop(&self) -> Result<()> {
        self.stop_soon();
        let deadline = clock::instant_in(self.0.drain_timeout);
        let tasks: Vec<_> = self.subscribed().values().map(|subscribed| subscribed.task.clone()).collect();
        let ended = join_all(tasks.iter().map(|task| task.ends(deadline, &self.0.cancelled))).await;
        let outcome: Result<()> = ended.into_iter().collect();
        outcome.and(self.flush(deadline).await)
    }

    /// Says that it is to stop, and waits for nothing.
    pub(crate) fn stop_soon(&self) {
        self.0.stop.stop();
    }

    /// What was sent is with its broker, unless that does not answer in time.
    async fn flush(&self, deadline: Instant) -> Result<()> {
        let buses = self.buses();
        // One that is closed has answered everything.
        let open = buses.iter().filter(|bus| bus.health().state != HealthState::Closed);
        let flushing = join_all(open.map(Bus::flush));
        let over = async {
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => {}
                () = self.0.cancelled.cancelled() => {}
            }
            tokio::time::sleep(CANCEL_GRACE).await;
        };
        tokio::select! {
            biased;
            flushed = flushing => flushed.into_iter().collect(),
            () = over => Err(Error::new(ErrorKind::Timeout, "a broker did not answer in time for what was sent before")
                .with_operation("stop")
                .with_hint("what was not answered may or may not have arrived")),
        }
    }

    /// Cancels handlers that run, now. To be used beside [`stop`](Self::stop), which then returns soon.
    pub fn force(&self) {
        self.stop_soon();
        self.0.cancelled.cancel();
    }

    /// Runs until SIGINT or SIGTERM, until it is stopped otherwise, or until a subscription has ended for good, and stops; a
    /// second signal forces.
    ///
    /// # Errors
    /// Those of stopping, or the one that ended a subscription: a service that consumes less than it should does not stay.
    /// [`ErrorKind::Disconnected`] when the target of a bridge was given up.
    pub async fn until_signal(self) -> Result<()> {
        let signals = Signals::new()?;
        let _listening = Listening::begin();
        self.until(signals).await
    }

    pub(crate) async fn until(self, mut signals: Signals) -> Result<()> {
        let mut heard = false;
        let failed = tokio::select! {
            () = signals.next() => {
                tracing::info!("stopping; a second signal forces");
                heard = true;
                false
            }
            () = self.0.failed.cancelled() => {
                tracing::error!("a subscription, or a connection that it needs, has ended for good; stopping");
                true
            }
            () = self.0.stop.said() => false,
        };
        let stopping = async {
            match self.stop().await {
                Ok(()) if failed => {
                    Err(Error::new(ErrorKind::Disconnected, "what the service needs has ended for good")
                        .with_operation("run")
                        .with_hint("see the log for the connection that was given up or closed"))
                }
                outcome => outcome,
            }
        };
        tokio::pin!(stopping);
        loop {
            tokio::select! {
                outcome = &mut stopping => return outcome,
                () = signals.next() => {}
            }
            if heard {
                tracing::warn!("second signal: cancelling the handlers that run");
                self.force();
                return stopping.await;
            }
            // It stops for another reason, of which whoever sends this knows nothing.
            tracing::info!("stopping already; a second signal forces");
            heard = true;
        }
    }

    fn control(&self, name: &str) -> Result<Arc<Control>> {
        let found = self.subscribed().get(name).map(|subscribed| Arc::clone(&subscribed.control));
        found.ok_or_else(|| self.unknown(name))
    }

    #[cold]
    fn unknown(&self, name: &str) -> Error {
        let known = self.subscribed().keys().cloned().collect::<Vec<_>>().join(", ");
        Error::new(ErrorKind::NotFound, format!("this service does not consume {name:?}; it consumes: {known}"))
    }

    fn subscribed(&self) -> MutexGuard<'_, BTreeMap<String, Subscribed>> {
        self.0.subscribed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(feature = "ops")]
    pub(super) fn signal(&self) -> &Stop {
        &self.0.stop
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.subscribed().keys()).finish()
    }
}
