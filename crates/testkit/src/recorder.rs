//! What was sent, for tests to look at.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Address, Bus, Error, ErrorKind, Layer, Message, NextSend, Receipt, Result};
use tokio::sync::watch;

use crate::cx::lock;

/// A message that was sent.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    /// Where to.
    pub address: Address,
    /// The message, with the id and time that sending gave it.
    pub message: Message,
}

/// A layer that remembers every message that was accepted. Clones share what they remember.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> polymq_core::Result<()> {
/// use polymq_core::Bus;
/// use polymq_testkit::Recorder;
///
/// let recorder = Recorder::new();
/// let bus = Bus::builder().url("memory://recorded").layer(recorder.clone()).connect().await?;
/// bus.queue("orders").send(&"one").await?;
/// assert_eq!(recorder.to("orders").len(), 1);
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Recorder {
    sent: watch::Sender<Vec<Sent>>,
    refuse: Arc<Mutex<Vec<ErrorKind>>>,
    swallow: bool,
}

impl Recorder {
    /// Remembers, and passes every message on.
    #[must_use]
    pub fn new() -> Self {
        Self { sent: watch::Sender::default(), refuse: Arc::default(), swallow: false }
    }

    /// Remembers, and passes nothing on: the bus says that it was sent.
    #[must_use]
    pub fn instead_of_sending() -> Self {
        Self { swallow: true, ..Self::new() }
    }

    /// The next send fails with an error of this kind; calls add up.
    pub fn refuse_next(&self, kind: ErrorKind) {
        lock(&self.refuse).push(kind);
    }

    /// Everything so far, in the order of acceptance.
    #[must_use]
    pub fn sent(&self) -> Vec<Sent> {
        self.sent.borrow().clone()
    }

    /// What was sent to the queue or topic of this name.
    #[must_use]
    pub fn to(&self, channel: &str) -> Vec<Message> {
        self.sent().into_iter().filter(|sent| sent.address.name() == channel).map(|sent| sent.message).collect()
    }

    /// Waits until `count` messages were sent to this queue or topic, and gives them.
    ///
    /// # Panics
    /// When that does not happen within `within`, with what was sent.
    pub async fn reaches(&self, channel: &str, count: usize, within: Duration) -> Vec<Message> {
        let mut watch = self.sent.subscribe();
        let enough = |sent: &Vec<Sent>| sent.iter().filter(|sent| sent.address.name() == channel).count() >= count;
        if tokio::time::timeout(within, watch.wait_for(enough)).await.is_err() {
            panic!(
                "{} of {count} messages to {channel:?} within {within:?}; sent: {:?}",
                self.to(channel).len(),
                self.sent()
            );
        }
        self.to(channel)
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.sent.send_modify(Vec::clear);
    }
}

impl Default for Recorder {
    fn default() -> Self {
        Self::new()
    }
}

#[async_trait]
impl Layer for Recorder {
    async fn send(&self, message: Message, next: NextSend<'_>) -> Result<Receipt> {
        let refused = lock(&self.refuse).pop();
        if let Some(kind) = refused {
            return Err(Error::new(kind, "refused by the recorder, as the test wants"));
        }
        let sent = Sent { address: next.address().clone(), message: message.clone() };
        let receipt = if self.swallow {
            Receipt { id: message.id().cloned().unwrap_or_default(), broker_id: None }
        } else {
            next.send(message).await?
        };
        self.sent.send_modify(|all| all.push(sent));
        Ok(receipt)
    }
}

/// A bus in memory that shares nothing with any other, and remembers what was sent.
#[derive(Debug, Clone)]
pub struct TestBus {
    bus: Bus,
    recorder: Recorder,
}

impl TestBus {
    /// A fresh one.
    ///
    /// # Panics
    /// Never: memory is always there.
    pub async fn new() -> Self {
        Self::with(|builder| builder).await.expect("a bus in memory needs nothing")
    }

    /// A fresh one with more of its own: layers, kinds, serializers.
    ///
    /// # Errors
    /// Those of [`BusBuilder::connect`](polymq_core::BusBuilder::connect).
    pub async fn with(build: impl FnOnce(polymq_core::BusBuilder) -> polymq_core::BusBuilder) -> Result<Self> {
        let recorder = Recorder::new();
        let builder = Bus::builder()
            .url(format!("memory://test-{:032x}", fastrand::u128(..)))
            .environment(polymq_core::Environment::default())
            .layer(recorder.clone());
        Ok(Self { bus: build(builder).connect().await?, recorder })
    }

    /// What was sent over it.
    #[must_use]
    pub fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    /// Takes the dead letters of a queue.
    ///
    /// # Panics
    /// When the queue has none and never will: it was not consumed.
    pub async fn take_dead_letters(&self, queue: &str) -> Vec<Message> {
        let letters = self.bus.channel(Address::queue(queue).dead_letters(None));
        let mut subscription = letters.subscribe(polymq_core::ConsumeOptions::default()).await.expect("subscribe");
        let mut taken = Vec::new();
        loop {
            let batch = subscription.receive(100, Duration::from_millis(20)).await.expect("receive");
            if batch.is_empty() {
                break;
            }
            for delivery in batch {
                taken.push(delivery.message().clone());
                delivery.ack().await.expect("ack");
            }
        }
        subscription.close().await.expect("close");
        taken
    }
}

impl std::ops::Deref for TestBus {
    type Target = Bus;

    fn deref(&self) -> &Bus {
        &self.bus
    }
}
