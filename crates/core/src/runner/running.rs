//! A service that runs: what can be asked of it and how it stops.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{sync::Semaphore, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use super::{Control, Env, RouteStats, Stop, Worker, worker};
use crate::{Bus, Consumer, ConsumerFactory, DeadLetters, Error, ErrorKind, Result, factory::Plan, subscription};

/// How long handlers that were cancelled get to end, and consumers to close.
const CANCEL_GRACE: Duration = Duration::from_secs(5);

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
    /// Held while it is being stopped.
    stopping: tokio::sync::Mutex<()>,
}

struct Subscribed {
    bus: Bus,
    control: Arc<Control>,
    stop: Stop,
    cancelled: CancellationToken,
    task: Option<JoinHandle<Result<()>>>,
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
            stopping: tokio::sync::Mutex::default(),
        }))
    }

    /// Adds the handlers of a factory while the service runs.
    ///
    /// # Errors
    /// As [`ConsumerRunner::start`](crate::ConsumerRunner::start); [`ErrorKind::Conflict`] when a channel is consumed already.
    pub async fn attach(&self, factory: ConsumerFactory) -> Result<()> {
        for plan in factory.plans()? {
            self.attach_plan(factory.bus().clone(), plan).await?;
        }
        Ok(())
    }

    pub(super) async fn attach_plan(&self, bus: Bus, plan: Plan) -> Result<()> {
        let name = self.name_for(&bus, &plan);
        if self.0.stop.is_said() {
            return Err(Error::closed("attach").with_channel(name));
        }
        if self.subscribed().contains_key(&name) {
            return Err(Error::new(ErrorKind::Conflict, "is consumed by this service already")
                .with_operation("attach")
                .with_channel(name)
                .with_hint("detach it first"));
        }
        let (stop, cancelled) = (self.0.stop.child(), self.0.cancelled.child_token());
        let consumed = bus.clone();
        let (opening, consumer, origin) = Opening::open(bus, plan, stop.clone(), cancelled.clone()).await?;
        let control = Arc::clone(&opening.control);
        let failed = self.0.failed.clone();
        let task = tokio::spawn(async move {
            let outcome = opening.supervise(consumer, origin).await;
            if outcome.is_err() {
                failed.cancel();
            }
            outcome
        });
        self.subscribed().insert(name, Subscribed { bus: consumed, control, stop, cancelled, task: Some(task) });
        Ok(())
    }

    /// `queue` or `topic@group`; with the backend before it (`amqp:queue`) when the service consumes a channel of
    /// that name over another connection too.
    fn name_for(&self, bus: &Bus, plan: &Plan) -> String {
        let name = plan.name();
        let same = |known: &Bus| std::ptr::eq(known.connection().as_ref(), bus.connection().as_ref());
        match self.subscribed().get(&name) {
            Some(taken) if !same(&taken.bus) => format!("{}:{name}", bus.backend()),
            _ => name,
        }
    }

    /// Stops one subscription (`queue`, or `topic@group`) as [`stop`](Self::stop) does; the others go on.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] naming the subscriptions there are; otherwise that of closing the consumer.
    pub async fn detach(&self, name: &str) -> Result<()> {
        let found = self.subscribed().remove(name);
        let mut subscribed = found.ok_or_else(|| self.unknown(name))?;
        subscribed.stop.stop();
        let task = subscribed.task.take();
        let limit = tokio::time::sleep(self.0.drain_timeout);
        wait(task, limit, &subscribed.cancelled).await
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

    /// Changes how many handlers of this subscription may run at a time. Those that run are not interrupted.
    ///
    /// # Errors
    /// As [`pause`](Self::pause).
    pub fn set_concurrency(&self, name: &str, limit: usize) -> Result<()> {
        self.control(name).map(|control| control.set_concurrency(limit))
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

    /// The buses it runs on.
    #[must_use]
    pub fn buses(&self) -> &[Bus] {
        &self.0.buses
    }

    /// Every subscription that it was started with is live.
    pub(super) fn started(&self) {
        self.0.started.store(true, Ordering::Release);
    }

    /// Whether it takes work: every subscription was started, every connection is up and it is not being stopped.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        use crate::HealthState::{Degraded, Up};
        let works = self.0.started.load(Ordering::Acquire) && !self.0.stop.is_said();
        works && self.0.buses.iter().all(|bus| matches!(bus.health().state, Up | Degraded))
    }

    /// Stops: no further message is fetched, handlers that run may end within the drain time-out, then they are
    /// cancelled; what was not handled is back with the broker and producers are flushed when this returns. A second
    /// call waits for the same.
    ///
    /// # Errors
    /// The first one met; stopping goes on all the same.
    pub async fn stop(&self) -> Result<()> {
        self.0.stop.stop();
        let _first = self.0.stopping.lock().await;
        let deadline = tokio::time::Instant::now() + self.0.drain_timeout;
        let tasks: Vec<_> = self.subscribed().values_mut().map(|subscribed| subscribed.task.take()).collect();
        let mut outcome = Ok(());
        for task in tasks {
            let ended = wait(task, tokio::time::sleep_until(deadline), &self.0.cancelled).await;
            outcome = outcome.and(ended);
        }
        for bus in &self.0.buses {
            outcome = outcome.and(bus.flush().await);
        }
        outcome
    }

    /// Cancels handlers that run, now. To be used beside [`stop`](Self::stop), which then returns soon.
    pub fn force(&self) {
        self.0.stop.stop();
        self.0.cancelled.cancel();
    }

    /// Runs until SIGINT or SIGTERM, or until a subscription has ended for good, and stops; a second signal forces.
    ///
    /// # Errors
    /// Those of stopping, or the one that ended a subscription: a service that consumes less than it should does not stay.
    pub async fn until_signal(self) -> Result<()> {
        self.until(Signals::new()?).await
    }

    pub(crate) async fn until(self, mut signals: Signals) -> Result<()> {
        tokio::select! {
            () = signals.next() => tracing::info!("stopping; a second signal forces"),
            () = self.0.failed.cancelled() => tracing::error!("a subscription has ended for good; stopping"),
        }
        let stopping = self.stop();
        tokio::pin!(stopping);
        tokio::select! {
            outcome = &mut stopping => outcome,
            () = signals.next() => {
                tracing::warn!("second signal: cancelling the handlers that run");
                self.force();
                stopping.await
            }
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

/// Waits for a subscription to end; cancels its handlers when the limit has passed.
async fn wait(
    task: Option<JoinHandle<Result<()>>>,
    limit: tokio::time::Sleep,
    cancelled: &CancellationToken,
) -> Result<()> {
    let Some(mut task) = task else { return Ok(()) };
    let over = async {
        tokio::select! {
            () = limit => tracing::warn!("the drain time-out has passed; cancelling the handlers that run"),
            // Forced: a consumer that does not close gets no more time than the handlers.
            () = cancelled.cancelled() => {}
        }
    };
    let ended = tokio::select! {
        biased;
        ended = &mut task => ended,
        () = over => {
            cancelled.cancel();
            match tokio::time::timeout(CANCEL_GRACE, &mut task).await {
                Ok(ended) => ended,
                Err(_) => {
                    task.abort();
                    return Err(Error::new(ErrorKind::Timeout, "a consumer did not close in time").with_operation("stop"));
                }
            }
        }
    };
    ended.unwrap_or_else(|error| Err(Error::new(ErrorKind::Other, "a subscription broke off").with_source(error)))
}

/// What a subscription is made from, and made again after a final error.
pub(super) struct Opening {
    bus: Bus,
    plan: Arc<Plan>,
    control: Arc<Control>,
    stop: Stop,
    cancelled: CancellationToken,
}

impl Opening {
    /// Opens a consumer for the handlers of a plan.
    pub(super) async fn open(
        bus: Bus,
        mut plan: Plan,
        stop: Stop,
        cancelled: CancellationToken,
    ) -> Result<(Self, Box<dyn Consumer>, Arc<crate::delivery::Origin>)> {
        let group = plan.options.group.as_deref();
        let told_to_sender = bus.capabilities().direct && plan.policy.dead_letters == DeadLetters::Own;
        plan.options.dead_letters = (!told_to_sender).then(|| plan.policy.dead_letter_address(&plan.address, group));
        let (consumer, origin) = subscription::open(bus.parts(), plan.address.clone(), &plan.options).await?;
        let control = Arc::new(Control::new(plan.concurrency));
        Ok((Self { bus, plan: Arc::new(plan), control, stop, cancelled }, consumer, origin))
    }

    /// Runs the subscription; opens it again when it ends with an error, so that it never dies in silence.
    async fn supervise(self, mut consumer: Box<dyn Consumer>, mut origin: Arc<crate::delivery::Origin>) -> Result<()> {
        let mut failures = 0;
        loop {
            let started = tokio::time::Instant::now();
            let env = Arc::new(self.env(Arc::clone(&origin)));
            let worker = Worker::new(env, consumer, self.plan.options.ordered_by_key, self.plan.options.prefetch);
            let Err(error) = worker.run().await else { return Ok(()) };
            if started.elapsed() > Duration::from_secs(60) {
                failures = 0;
            }
            let mut error = error;
            (consumer, origin) = loop {
                self.plan.callbacks.transport_error(&self.plan.address, &error);
                let channel = self.plan.address.name();
                if self.stop.is_said() {
                    // Whatever was not settled is back with the broker, or comes back when the connection ends.
                    tracing::warn!(channel, %error, "the subscription was stopped while it failed");
                    return Ok(());
                }
                if worker::is_final(&error) {
                    return Err(error);
                }
                tracing::error!(channel, %error, "the subscription ended; opening it again");
                tokio::select! {
                    () = self.stop.said() => return Ok(()),
                    () = tokio::time::sleep(worker::reopen_after(failures)) => {}
                }
                failures += 1;
                match subscription::open(self.bus.parts(), self.plan.address.clone(), &self.plan.options).await {
                    Ok(opened) => break opened,
                    Err(next) => error = next,
                }
            };
        }
    }

    pub(super) fn env(&self, origin: Arc<crate::delivery::Origin>) -> Env {
        let plan = &self.plan;
        Env {
            bus: self.bus.clone(),
            entries: plan.entries.iter().map(crate::factory::Entry::share).collect(),
            policy: plan.policy.clone(),
            ack_mode: plan.ack_mode,
            timeout: plan.timeout,
            lease: self.bus.capabilities().leases.then_some((plan.options.lease, plan.options.max_lease)),
            states: plan.states.clone(),
            accept: plan.accept.clone(),
            callbacks: plan.callbacks.clone(),
            control: Arc::clone(&self.control),
            retries: plan.policy.max_concurrent_retries.map(|limit| Arc::new(Semaphore::new(limit))),
            stop: self.stop.clone(),
            cancelled: self.cancelled.clone(),
            origin,
        }
    }
}

/// SIGINT and SIGTERM, remembered from the moment this is made: before any handler starts, or a signal in between
/// would end the process without a drain.
pub(crate) struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    pub(crate) fn new() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let problem = |error| Error::new(ErrorKind::Other, "signals cannot be received").with_source(error);
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(problem)?,
            interrupt: signal(SignalKind::interrupt()).map_err(problem)?,
        })
    }

    #[cfg(unix)]
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    #[cfg(not(unix))]
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {})
    }

    #[cfg(not(unix))]
    async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    }
}
