//! Faults inside the process, on command: sends that are lost, late, doubled or out of order, and a line that is cut.
//!
//! They sit between a bus and its backend, so that they work on any backend and need no network; for faults of the network
//! itself stand a [`Proxy`](crate::Proxy) before the broker. Chance comes from a seed, so that a run can be repeated.

use std::{
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Backend, Completer, Completion, Connection, Consumer, Error, ErrorKind, Incoming, Message, Producer, Receipt,
    Result, Settings,
};
use tokio::sync::watch;

use crate::{
    cx::lock,
    twist::{Receiving, Sending, Twist, Twisted},
};

/// How long a message that waits to be overtaken waits at most.
const OVERTAKEN_WITHIN: Duration = Duration::from_millis(100);

/// Faults between a bus and its backend. Clones are the same faults; nothing is wrong before something is asked for.
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() -> polymq_core::Result<()> {
/// use std::sync::Arc;
/// use polymq_core::{Bus, Environment, Registry, memory::MemoryBackend};
/// use polymq_testkit::faulty::Faults;
///
/// let faults = Faults::new(7);
/// let mut registry = Registry::new();
/// registry.add(faults.around(Arc::new(MemoryBackend)))?;
/// let builder = Bus::builder().registry(registry).environment(Environment::default()).url("memory://faulty");
/// let bus = builder.connect().await?;
/// faults.duplicate(1.0);
/// bus.queue("orders").send(&1).await?;
/// assert_eq!(bus.queue("orders").stats(None).await?.ready, 2);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Faults(Arc<Inner>);

struct Inner {
    plan: Mutex<Plan>,
    chance: Mutex<fastrand::Rng>,
    counts: Mutex<FaultCounts>,
    cut: watch::Sender<bool>,
    overtaken: Mutex<Option<Held>>,
}

#[derive(Clone, Copy, Default)]
struct Plan {
    drop: f64,
    duplicate: f64,
    reorder: f64,
    delay: Duration,
}

struct Held {
    producer: Arc<dyn Producer>,
    message: Message,
    completer: Completer<Receipt>,
}

/// How often each fault has happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FaultCounts {
    /// Messages whose sender was told that they were accepted, and that were lost.
    pub dropped: u64,
    /// Messages that were sent twice.
    pub duplicated: u64,
    /// Messages that were sent after the one behind them.
    pub reordered: u64,
    /// Messages that were sent late.
    pub delayed: u64,
    /// Sends and connections that were refused because the line was cut.
    pub cut: u64,
}

impl Faults {
    /// No faults yet; the same seed makes the same choices.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(Arc::new(Inner {
            plan: Mutex::default(),
            chance: Mutex::new(fastrand::Rng::with_seed(seed)),
            counts: Mutex::default(),
            cut: watch::Sender::new(false),
            overtaken: Mutex::default(),
        }))
    }

    /// The backend with these faults; name, schemes and settings stay.
    #[must_use]
    pub fn around(&self, backend: Arc<dyn Backend>) -> Arc<dyn Backend> {
        Twisted::around(backend, Arc::new(self.clone()))
    }

    /// Loses this share of what is sent, and says that it was accepted: what a transport without acknowledgements does.
    pub fn drop(&self, share: f64) {
        lock(&self.0.plan).drop = share;
    }

    /// Sends this share twice.
    pub fn duplicate(&self, share: f64) {
        lock(&self.0.plan).duplicate = share;
    }

    /// Sends this share after the message behind it; after a tenth of a second when there is none.
    pub fn reorder(&self, share: f64) {
        lock(&self.0.plan).reorder = share;
    }

    /// Sends everything so much later.
    pub fn delay(&self, by: Duration) {
        lock(&self.0.plan).delay = by;
    }

    /// Until [`mend`](Self::mend): a send has certainly not been made, nothing is received, nobody can connect.
    pub fn cut(&self) {
        self.0.cut.send_replace(true);
    }

    /// Ends a [`cut`](Self::cut).
    pub fn mend(&self) {
        self.0.cut.send_replace(false);
    }

    /// Nothing is wrong any more.
    pub fn heal(&self) {
        *lock(&self.0.plan) = Plan::default();
        self.mend();
        self.let_pass();
    }

    /// How often each fault has happened.
    #[must_use]
    pub fn counts(&self) -> FaultCounts {
        *lock(&self.0.counts)
    }

    fn count(&self, fault: impl FnOnce(&mut FaultCounts) -> &mut u64) {
        *fault(&mut lock(&self.0.counts)) += 1;
    }

    fn happens(&self, share: f64) -> bool {
        // Without chance there is none to be used up: other faults of the same seed stay the same.
        share > 0.0 && lock(&self.0.chance).f64() < share
    }

    fn refused(&self) -> Option<Error> {
        self.0.cut.borrow().then(|| {
            self.count(|counts| &mut counts.cut);
            Error::new(ErrorKind::Disconnected, "the line is cut, as the test wants")
        })
    }

    /// Sends what waited to be overtaken.
    fn let_pass(&self) {
        let held = lock(&self.0.overtaken).take();
        if let Some(Held { producer, message, completer }) = held
            && completer.hand_over()
        {
            let sent = producer.send(message);
            tokio::spawn(async move { completer.complete(sent.await) });
        }
    }

    fn hold_back(&self, producer: Arc<dyn Producer>, message: Message) -> Completion<Receipt> {
        let (completer, completion) = Completion::queued();
        *lock(&self.0.overtaken) = Some(Held { producer, message, completer });
        self.count(|counts| &mut counts.reordered);
        let faults = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(OVERTAKEN_WITHIN).await;
            faults.let_pass();
        });
        completion
    }

    fn send_late(&self, producer: Arc<dyn Producer>, message: Message, by: Duration) -> Completion<Receipt> {
        let (completer, completion) = Completion::queued();
        self.count(|counts| &mut counts.delayed);
        tokio::spawn(async move {
            tokio::time::sleep(by).await;
            if completer.hand_over() {
                completer.complete(producer.send(message).await);
            }
        });
        completion
    }
}

#[async_trait]
impl Twist for Faults {
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        match self.refused() {
            Some(error) => Err(error),
            None => backend.connect(settings).await,
        }
    }

    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if let Some(error) = self.refused() {
            return Completion::ready(Err(error));
        }
        let plan = *lock(&self.0.plan);
        if self.happens(plan.drop) {
            self.count(|counts| &mut counts.dropped);
            let id = message.id().cloned().unwrap_or_default();
            return Completion::ready(Ok(Receipt { id, broker_id: None }));
        }
        if self.happens(plan.duplicate) {
            self.count(|counts| &mut counts.duplicated);
            // What becomes of the copy is nobody's affair.
            std::mem::drop(at.producer.send(message.clone()));
        }
        if !plan.delay.is_zero() {
            return self.send_late(Arc::clone(&at.producer), message, plan.delay);
        }
        if self.happens(plan.reorder) && lock(&self.0.overtaken).is_none() {
            return self.hold_back(Arc::clone(&at.producer), message);
        }
        let sent = at.producer.send(message);
        self.let_pass();
        sent
    }

    async fn receive(
        &self,
        _: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let mut cut = self.0.cut.subscribe();
        loop {
            // The sender lives as long as this.
            let _ = cut.wait_for(|cut| !cut).await;
            tokio::select! {
                biased;
                _ = cut.wait_for(|cut| *cut) => {}
                received = consumer.receive(max, into) => return received,
            }
            if !into.is_empty() {
                return Ok(());
            }
        }
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faults").field("counts", &self.counts()).finish_non_exhaustive()
    }
}
