//! One subscription from its first consumer to its end: opened again when it ends with an error.

use std::{
    any::Any,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{sync::Semaphore, task::AbortHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use super::{Control, Env, Stop, Worker, running::CANCEL_GRACE, tried::panic_text};
use crate::{Bus, Consumer, Error, ErrorKind, HealthState, Result, delivery::Origin, factory::Plan, subscription};

/// A subscription that lived for so long starts with the shortest pause when it has to be opened again.
const LIVED: Duration = Duration::from_secs(60);

/// What a subscription is made from, and made again after an error.
pub(super) struct Opening {
    bus: Bus,
    plan: Plan,
    pub(super) control: Arc<Control>,
    retries: Option<Arc<Semaphore>>,
    stop: Stop,
    cancelled: CancellationToken,
    /// Told when it has ended with an error that opening it again cannot help.
    failed: CancellationToken,
}

impl Opening {
    /// Opens a consumer for the handlers of a plan.
    pub(super) async fn open(
        bus: Bus,
        mut plan: Plan,
        stop: Stop,
        cancelled: CancellationToken,
        failed: CancellationToken,
    ) -> Result<(Self, Box<dyn Consumer>, Arc<Origin>)> {
        plan.options.dead_letters = plan.dead_letters(&bus);
        let (consumer, origin) = subscription::open(bus.parts(), plan.address.clone(), &plan.options).await?;
        let control = Arc::new(Control::new(plan.concurrency, plan.options.prefetch));
        let retries = plan.policy.max_concurrent_retries.map(|limit| Arc::new(Semaphore::new(limit)));
        Ok((Self { bus, plan, control, retries, stop, cancelled, failed }, consumer, origin))
    }

    /// Runs the subscription; opens it again when it ends with an error, so that it never dies in silence.
    pub(super) async fn supervise(self, consumer: Box<dyn Consumer>, origin: Arc<Origin>) -> Result<()> {
        let options = &self.plan.options;
        let mut worker = Worker::new(Arc::new(self.env(origin)), consumer, options.ordered_by_key, options.prefetch);
        let outcome = AssertUnwindSafe(self.serve(&mut worker)).catch_unwind().await;
        let outcome = outcome.unwrap_or_else(|panic| Err(broke_off(panic.as_ref())));
        if outcome.is_err() {
            // Before its handlers have ended, which may take long.
            self.failed.cancel();
        }
        self.closed(worker.end().await.inspect_err(|error| self.tell(error)));
        outcome
    }

    /// `Ok`: it was stopped.
    async fn serve(&self, worker: &mut Worker) -> Result<()> {
        let channel = self.plan.address.name();
        let mut failures = 0;
        loop {
            let started = Instant::now();
            let served = AssertUnwindSafe(worker.serve()).catch_unwind().await;
            let Err(mut error) = served.unwrap_or_else(|panic| Err(broke_off(panic.as_ref()))) else { return Ok(()) };
            if started.elapsed() > LIVED {
                failures = 0;
            }
            let mut is_first = true;
            let (consumer, origin) = loop {
                // A backend that is built on another one has errors of the other's name.
                error = error.with_backend(self.bus.backend());
                self.control.set_consuming(false);
                self.tell(&error);
                if self.stop.is_said() {
                    tracing::warn!(channel, %error, "the subscription was stopped while it failed");
                    return Ok(());
                }
                // A connection that was given up does not come back.
                if is_final(&error) || self.bus.health().state == HealthState::Closed {
                    return Err(error);
                }
                tracing::error!(channel, %error, "the subscription ended; opening it again");
                if std::mem::take(&mut is_first) {
                    self.closed(worker.close().await);
                }
                // Handlers that end meanwhile are still heard.
                tokio::select! {
                    () = self.stop.said() => return Ok(()),
                    () = tokio::time::sleep(reopen_after(failures)) => {}
                }
                self.closed(worker.end_consumer().await);
                failures += 1;
                match subscription::open(self.bus.parts(), self.plan.address.clone(), &self.plan.options).await {
                    Ok(opened) => break opened,
                    Err(next) => error = next,
                }
            };
            worker.reopened(Arc::new(self.env(origin)), consumer);
            self.control.set_consuming(true);
        }
    }

    /// Whatever was not settled is back with the broker, or comes back when the connection ends.
    fn closed(&self, closed: Result<()>) {
        if let Err(error) = closed {
            tracing::warn!(channel = self.plan.address.name(), %error, "the consumer was not closed in order");
        }
    }

    fn tell(&self, error: &Error) {
        self.plan.callbacks.transport_error(&self.plan.address, error);
    }

    pub(super) fn env(&self, origin: Arc<Origin>) -> Env {
        let plan = &self.plan;
        Env {
            bus: self.bus.clone(),
            entries: plan.entries.iter().map(crate::factory::Entry::share).collect(),
            policy: plan.policy.clone(),
            ack_mode: plan.ack_mode,
            timed: plan.entries.iter().any(|entry| entry.timeout.is_some()),
            lease: self.bus.capabilities().leases.then_some((plan.options.lease, plan.options.max_lease)),
            states: plan.states.clone(),
            accept: plan.accept.clone(),
            callbacks: plan.callbacks.clone(),
            control: Arc::clone(&self.control),
            retries: self.retries.clone(),
            stop: self.stop.clone(),
            cancelled: self.cancelled.clone(),
            origin,
        }
    }
}

/// The pause before a consumer is opened again after an error.
fn reopen_after(failures: u32) -> Duration {
    Duration::from_millis(500).saturating_mul(1 << failures.min(6))
}

/// Whether opening the consumer again cannot help.
fn is_final(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Closed | ErrorKind::Unsupported | ErrorKind::Config)
}

/// A panic that no handler made.
pub(super) fn broke_off(panic: &(dyn Any + Send)) -> Error {
    Error::new(ErrorKind::Other, format!("the subscription broke off: {}", panic_text(panic)))
}

/// A subscription's task. Clones are the same one; any number may wait for its end, and give that up again.
#[derive(Clone)]
pub(super) struct Task {
    ended: CancellationToken,
    /// What it has ended with, for the first who asks.
    outcome: Arc<Mutex<Option<Result<()>>>>,
    abort: AbortHandle,
}

impl Task {
    pub(super) fn spawn(work: impl Future<Output = Result<()>> + Send + 'static) -> Self {
        let (ended, outcome) = (CancellationToken::new(), Arc::<Mutex<_>>::default());
        // Also when it is aborted.
        let (told, kept) = (ended.clone().drop_guard(), Arc::clone(&outcome));
        let task = tokio::spawn(async move {
            let ended = AssertUnwindSafe(work).catch_unwind().await;
            let ended = ended.unwrap_or_else(|panic| Err(broke_off(panic.as_ref())));
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
            drop(told);
        });
        Self { ended, outcome, abort: task.abort_handle() }
    }

    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.outcome, &other.outcome)
    }

    pub(super) fn is_over(&self) -> bool {
        self.ended.is_cancelled()
    }

    /// Waits for its end; cancels its handlers when the deadline has passed.
    pub(super) async fn ends(&self, deadline: Instant, cancelled: &CancellationToken) -> Result<()> {
        let over = async {
            tokio::select! {
                () = tokio::time::sleep_until(deadline) => {
                    tracing::warn!("the drain time-out has passed; cancelling the handlers that run");
                }
                // Forced: a consumer that does not close gets no more time than the handlers.
                () = cancelled.cancelled() => {}
            }
        };
        tokio::select! {
            biased;
            () = self.ended.cancelled() => {}
            () = over => {
                cancelled.cancel();
                if tokio::time::timeout(CANCEL_GRACE, self.ended.cancelled()).await.is_err() {
                    self.abort.abort();
                    return Err(Error::new(ErrorKind::Timeout, "a consumer did not close in time").with_operation("stop"));
                }
            }
        }
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or(Ok(()))
    }
}
