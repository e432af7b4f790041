//! A backend as a third party would write it, in its own crate and without touching polymq: queues in this process,
//! and nothing else. What it cannot do it leaves at the default of `Capabilities`, which is "no".

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Address, Backend, Capabilities, Completion, Connection, ConsumeOptions, Consumer, Delay, DeliveryCount, Error,
    ErrorKind, HealthReporter, HealthWatch, Incoming, Key, Message, ProduceOptions, Producer, Receipt, Result,
    Settings, Settler, Support, Token,
};
use tokio::{sync::Notify, time::Instant};

const NAME: &str = "toy";

polymq_core::register_backend!(ToyBackend);

#[derive(Debug, Default)]
pub(crate) struct ToyBackend;

#[derive(Debug, Default)]
struct Shop {
    queues: Mutex<HashMap<String, Queue>>,
}

/// Whoever waits is told by queue, not all at once: a wake-up that another test's thread has begun and not ended would
/// let this test's paused clock run ahead.
#[derive(Debug, Default)]
struct Queue {
    entries: VecDeque<Entry>,
    changed: Arc<Notify>,
}

#[derive(Debug)]
struct Entry {
    message: Message,
    attempt: u32,
    due: Instant,
}

/// The one broker of the process.
static SHOP: LazyLock<Arc<Shop>> = LazyLock::new(Arc::default);

impl Shop {
    fn queues(&self) -> MutexGuard<'_, HashMap<String, Queue>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn declare(&self, name: &str) {
        self.queues().entry(name.to_owned()).or_default();
    }

    fn exists(&self, name: &str) -> Result<()> {
        match self.queues().contains_key(name) {
            true => Ok(()),
            false => Err(Error::new(ErrorKind::NotFound, "there is no such queue")),
        }
    }

    /// `false` when the queue is gone.
    fn put(&self, name: &str, message: Message, attempt: u32, after: Duration, front: bool) -> bool {
        let due = Instant::now() + after + message.deliver_at().map_or(Duration::ZERO, polymq_core::until);
        let entry = Entry { message: message.without_deliver_at(), attempt, due };
        let mut queues = self.queues();
        let Some(queue) = queues.get_mut(name) else { return false };
        if front {
            queue.entries.push_front(entry)
        } else {
            queue.entries.push_back(entry)
        }
        queue.changed.notify_waiters();
        true
    }

    fn changed(&self, name: &str) -> Option<Arc<Notify>> {
        self.queues().get(name).map(|queue| Arc::clone(&queue.changed))
    }
}

#[async_trait]
impl Backend for ToyBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schemes(&self) -> &'static [&'static str] {
        &[NAME]
    }

    fn keys(&self) -> &'static [Key] {
        &[Key { name: "url", default: "toy://", help: "the one there is" }]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            queues: true,
            requeue: Support::Native,
            delayed_retry: Delay { support: Support::Native, max: Some(Duration::from_secs(7200)) },
            delayed_send: Delay { support: Support::Native, max: None },
            delivery_count: DeliveryCount::Native,
            confirms: true,
            expiry: Support::Emulated,
            ..Capabilities::default()
        }
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Config {
            #[serde(default)]
            #[allow(dead_code)] // only that it is the one key
            url: String,
        }
        settings.parse::<Config>(NAME).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        self.check(settings)?;
        let health = HealthReporter::new();
        health.up();
        Ok(Arc::new(Toy {
            capabilities: self.capabilities(),
            line: Arc::new(Line { closed: AtomicBool::new(false), ended: Notify::new(), health }),
        }))
    }
}

#[derive(Debug)]
struct Line {
    closed: AtomicBool,
    ended: Notify,
    health: HealthReporter,
}

impl Line {
    fn check(&self, operation: &'static str) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) { Err(Error::closed(operation)) } else { Ok(()) }
    }
}

#[derive(Debug)]
struct Toy {
    capabilities: Capabilities,
    line: Arc<Line>,
}

#[async_trait]
impl Connection for Toy {
    fn backend(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.line.health.watch()
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        self.line.check("producer")?;
        if options.declare {
            SHOP.declare(address.name());
        }
        SHOP.exists(address.name())?;
        let name = address.name().to_owned();
        Ok(Box::new(ToyProducer { name, line: Arc::clone(&self.line), closed: AtomicBool::new(false) }))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        self.line.check("consumer")?;
        if options.declare {
            self.declare(address, options).await?;
        }
        SHOP.exists(address.name())?;
        let hand = Hand {
            name: address.name().to_owned(),
            line: Arc::clone(&self.line),
            held: AtomicU64::new(0),
            prefetch: options.prefetch as u64,
        };
        Ok(Box::new(ToyConsumer { hand: Arc::new(hand), closed: false }))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.line.check("declare")?;
        SHOP.declare(address.name());
        if let Some(letters) = &options.dead_letters {
            SHOP.declare(letters.name());
        }
        Ok(())
    }

    async fn delete(&self, address: &Address, _: Option<&str>) -> Result<()> {
        self.line.check("delete")?;
        if let Some(queue) = SHOP.queues().remove(address.name()) {
            queue.changed.notify_waiters();
        }
        Ok(())
    }

    async fn ping(&self) -> Result<()> {
        self.line.check("ping")
    }

    async fn close(&self) -> Result<()> {
        self.line.closed.store(true, Ordering::SeqCst);
        self.line.health.closed("closed by the program");
        self.line.ended.notify_waiters();
        Ok(())
    }
}

#[derive(Debug)]
struct ToyProducer {
    name: String,
    line: Arc<Line>,
    closed: AtomicBool,
}

#[async_trait]
impl Producer for ToyProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        if self.closed.load(Ordering::SeqCst) || self.line.check("send").is_err() {
            return Completion::ready(Err(Error::closed("send")));
        }
        let id = message.id().cloned().unwrap_or_default();
        match SHOP.put(&self.name, message, 1, Duration::ZERO, false) {
            true => Completion::ready(Ok(Receipt { id, broker_id: None })),
            false => Completion::ready(Err(Error::new(ErrorKind::Unroutable, "the queue was deleted"))),
        }
    }

    async fn flush(&self) -> Result<()> {
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[derive(Debug)]
struct ToyConsumer {
    hand: Arc<Hand>,
    closed: bool,
}

/// What settles deliveries. The token is the attempt: that is all there is to know.
#[derive(Debug)]
struct Hand {
    name: String,
    line: Arc<Line>,
    held: AtomicU64,
    prefetch: u64,
}

impl Hand {
    /// What is there now; otherwise, when something will be.
    fn take(&self, max: usize, into: &mut Vec<Incoming>) -> Result<Option<Instant>> {
        self.line.check("receive")?;
        let mut queues = SHOP.queues();
        let Some(queue) = queues.get_mut(&self.name) else {
            return Err(Error::new(ErrorKind::NotFound, "the queue was deleted"));
        };
        let now = Instant::now();
        let room = self.prefetch.saturating_sub(self.held.load(Ordering::SeqCst)) as usize;
        for _ in 0..max.max(1).min(room) {
            let Some(at) = queue.entries.iter().position(|entry| entry.due <= now) else { break };
            let Some(entry) = queue.entries.remove(at) else { break };
            self.held.fetch_add(1, Ordering::SeqCst);
            let mut incoming = Incoming::new(entry.message, Token(entry.attempt.into()));
            incoming.details_mut().attempt = Some(entry.attempt);
            into.push(incoming);
        }
        Ok(queue.entries.iter().map(|entry| entry.due).filter(|due| *due > now).min())
    }

    fn free(&self) {
        self.held.fetch_sub(1, Ordering::SeqCst);
        if let Some(changed) = SHOP.changed(&self.name) {
            changed.notify_waiters();
        }
    }
}

#[async_trait]
impl Consumer for ToyConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        let before = into.len();
        loop {
            if self.closed {
                return Err(Error::closed("receive"));
            }
            // A queue that is gone is found by `take`.
            let queue = SHOP.changed(&self.hand.name).unwrap_or_default();
            let line = Arc::clone(&self.hand.line);
            let (mut changed, mut ended) = (std::pin::pin!(queue.notified()), std::pin::pin!(line.ended.notified()));
            changed.as_mut().enable();
            ended.as_mut().enable();
            let changed = futures_util::future::select(changed, ended);
            let due = self.hand.take(max, into)?;
            if into.len() > before {
                return Ok(());
            }
            match due {
                Some(due) => {
                    let _ = tokio::time::timeout_at(due, changed).await;
                }
                None => {
                    let _ = changed.await;
                }
            }
        }
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.hand) as Arc<dyn Settler>
    }

    async fn close(&mut self) -> Result<()> {
        self.closed = true;
        Ok(())
    }
}

impl Settler for Hand {
    fn ack(&self, _: Token) -> Completion<()> {
        if let Err(error) = self.line.check("settle") {
            return Completion::ready(Err(error));
        }
        self.free();
        Completion::ready(Ok(()))
    }

    fn release(&self, token: Token, message: Message) {
        SHOP.put(&self.name, message, token.0 as u32, Duration::ZERO, true);
        self.free();
    }

    fn retry(&self, _: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if let Err(error) = self.line.check("settle") {
            return Completion::ready(Err(error));
        }
        SHOP.put(&self.name, message.clone(), attempt, after, false);
        self.free();
        Completion::ready(Ok(()))
    }
}
