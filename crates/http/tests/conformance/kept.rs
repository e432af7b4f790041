//! Senders that keep their messages, as every sender over HTTP must: in a queue of this process, until the consumer's
//! answer says what becomes of them.
//!
//! Each consumer listens at a port of its own. A task of the sender takes messages from the queue, posts them there, and
//! settles them by the answer: 2xx is the acknowledgement; a 503 that counts an attempt is a retry, after the time that it
//! names and with the headers that it brings; any other failure gives the message back.
//!
//! Requests overtake each other on their way, and the suite's cases count on messages in the order in which they were
//! sent: the sender numbers them, and the consumer gives them on by number. HTTP itself promises no order.

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error as _,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    ATTEMPT, Address, Backend, Capabilities, Connection, ConsumeOptions, Consumer, DeliveryCount, HealthWatch,
    Incoming, Key, Message, ProduceOptions, Producer, Result, Settings, Settler, memory::MemoryBackend,
};
use polymq_http::{HttpBackend, HttpConfig, HttpConnection, Refusal};
use tokio::sync::Notify;
use tokio_util::{
    sync::{CancellationToken, DropGuard},
    task::TaskTracker,
};

polymq_core::register_backend!(KeptBackend);

const NAME: &str = "kept";
/// The number of a message on its way.
const NUMBER: &str = "polymq-test-number";

/// [`HttpBackend`] behind senders that keep what was not taken.
#[derive(Debug, Default)]
pub(crate) struct KeptBackend;

fn capabilities() -> Capabilities {
    Capabilities {
        // What the queue of the sender adds.
        direct: false,
        creates_channels: true,
        delivery_count: DeliveryCount::Header,
        ..HttpBackend.capabilities()
    }
}

#[async_trait]
impl Backend for KeptBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schemes(&self) -> &'static [&'static str] {
        &[NAME]
    }

    fn keys(&self) -> &'static [Key] {
        HttpBackend.keys()
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        // Where it sends is its own affair.
        let mut own = Settings::new();
        for key in HttpBackend.keys().iter().filter(|key| key.name != "url") {
            if let Some(value) = settings.get(key.name) {
                own = own.with(key.name, value);
            }
        }
        HttpConfig::parse(&own).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        self.check(settings)?;
        let queues = MemoryBackend.connect(&Settings::from_url("memory://kept")?).await?;
        Ok(Arc::new(Kept {
            queues,
            capabilities: capabilities(),
            listening: Mutex::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }))
    }
}

#[derive(Debug)]
struct Kept {
    queues: Arc<dyn Connection>,
    capabilities: Capabilities,
    listening: Mutex<Vec<Arc<HttpConnection>>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Kept {
    fn listening(&self) -> Vec<Arc<HttpConnection>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[async_trait]
impl Connection for Kept {
    fn backend(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.queues.health()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        // That of HTTP needs no connection.
        HttpConnection::connect(&Settings::new())?.check_address(address)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        self.queues.producer(address, options).await
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        let queue = self.queues.consumer(address, options).await?;
        let here = Settings::new().with("listen", "127.0.0.1:0").with("busy_retry", "10ms");
        let http = Arc::new(HttpConnection::connect(&here)?);
        let consumer = http.consumer(address, options).await?;
        let url = format!("http://{}", http.local_address().await.expect("it listens"));
        self.listening.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&http));
        let sending = HttpConnection::connect(&Settings::from_url(&url)?)?;
        let producer =
            sending.producer(address, &ProduceOptions { timeout: FOR_EVER, ..ProduceOptions::default() }).await?;
        let stop = self.stop.child_token();
        let missing = Arc::new(Missing::default());
        let way = Way { producer: producer.into(), settler: queue.settler(), missing: Arc::clone(&missing) };
        self.tasks.spawn(run(queue, Arc::new(way), self.tasks.clone(), stop.clone()));
        Ok(Box::new(Fed { consumer, arrived: BTreeMap::new(), next: 0, missing, _stop: stop.drop_guard(), http }))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.queues.declare(address, options).await
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.queues.delete(address, group).await
    }

    async fn ping(&self) -> Result<()> {
        self.queues.ping().await
    }

    async fn close(&self) -> Result<()> {
        self.stop.cancel();
        for http in self.listening() {
            http.close().await?;
        }
        // What was answered is settled with the queue before that is closed.
        self.tasks.close();
        self.tasks.wait().await;
        self.queues.close().await
    }
}

/// Longer than any case: how long a handler may take is the case's affair.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// From the queue of the sender to the consumer.
struct Way {
    producer: Arc<dyn Producer>,
    settler: Arc<dyn Settler>,
    missing: Arc<Missing>,
}

async fn run(mut queue: Box<dyn Consumer>, way: Arc<Way>, tasks: TaskTracker, stop: CancellationToken) {
    let (mut fetched, mut number) = (Vec::new(), 0);
    loop {
        let received = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            received = queue.receive(64, &mut fetched) => received,
        };
        for incoming in fetched.drain(..) {
            let way = Arc::clone(&way);
            tasks.spawn(async move { way.forward(incoming, number).await });
            number += 1;
        }
        if received.is_err() {
            break;
        }
    }
    fetched.into_iter().for_each(|incoming| way.settler.release(incoming.token, incoming.message));
    queue.close().await.expect("closing a queue of this process");
}

impl Way {
    async fn forward(&self, incoming: Incoming, number: u64) {
        let (attempt, token, message) = (incoming.attempt(), incoming.token, incoming.message);
        let mut sent = message.clone();
        if attempt > 1 {
            sent.set_system_header(ATTEMPT, attempt.to_string());
        }
        sent.set_system_header(NUMBER, number.to_string());
        let Err(error) = self.producer.send(sent).await else {
            // It fails only when the queue is gone, and nobody misses the message then.
            return drop(self.settler.ack(token).await);
        };
        let refusal = error.source().and_then(|source| source.downcast_ref::<Refusal>());
        match refusal.and_then(Refusal::next_attempt) {
            Some(attempt) => {
                let after = refusal.and_then(Refusal::retry_after).unwrap_or_default();
                let returned = with_headers_of(refusal, message);
                drop(self.settler.retry(token, &returned, attempt, after).await);
            }
            None => {
                self.missing.add(number);
                self.settler.release(token, message);
            }
        }
    }
}

/// The numbers of messages that perhaps did not arrive.
#[derive(Debug, Default)]
struct Missing {
    numbers: Mutex<BTreeSet<u64>>,
    changed: Notify,
}

impl Missing {
    fn numbers(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, number: u64) {
        self.numbers().insert(number);
        self.changed.notify_one();
    }
}

fn with_headers_of(refusal: Option<&Refusal>, mut message: Message) -> Message {
    for (name, value) in refusal.into_iter().flat_map(|refusal| refusal.system_headers().iter()) {
        if name != ATTEMPT {
            message.add_wire_header(name.to_owned(), value.to_owned());
        }
    }
    message
}

/// The consumer over HTTP, and the sender that feeds it.
struct Fed {
    consumer: Box<dyn Consumer>,
    arrived: BTreeMap<u64, Incoming>,
    next: u64,
    missing: Arc<Missing>,
    _stop: DropGuard,
    http: Arc<HttpConnection>,
}

impl Fed {
    /// Moves what is next in order.
    fn give(&mut self, max: usize, into: &mut Vec<Incoming>) -> bool {
        let before = into.len();
        while into.len() - before < max {
            match self.arrived.remove(&self.next) {
                Some(incoming) => into.push(incoming),
                None if self.missing.numbers().remove(&self.next) => {}
                None => break,
            }
            self.next += 1;
        }
        into.len() > before
    }

    fn release(&mut self) {
        let settler = self.consumer.settler();
        std::mem::take(&mut self.arrived).into_values().for_each(|late| settler.release(late.token, late.message));
    }
}

#[async_trait]
impl Consumer for Fed {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        while !self.give(max, into) {
            let mut received = Vec::new();
            tokio::select! {
                outcome = self.consumer.receive(max, &mut received) => outcome?,
                () = self.missing.changed.notified() => {}
            }
            for mut incoming in received {
                let number = incoming.message.system_headers().get(NUMBER).and_then(|text| text.parse().ok());
                incoming.message = without_number(incoming.message);
                self.arrived.insert(number.expect("the sender numbers them"), incoming);
            }
        }
        Ok(())
    }

    fn settler(&self) -> Arc<dyn Settler> {
        self.consumer.settler()
    }

    async fn close(&mut self) -> Result<()> {
        self.release();
        self.consumer.close().await
    }
}

impl Drop for Fed {
    fn drop(&mut self) {
        self.release();
    }
}

fn without_number(mut message: Message) -> Message {
    let others: Vec<_> =
        message.system_headers().iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    message.clear_system_headers();
    for (name, value) in others.into_iter().filter(|(name, _)| name != NUMBER) {
        message.add_wire_header(name, value);
    }
    message
}

impl fmt::Debug for Fed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fed").field("consumer", &self.consumer).field("http", &self.http).finish_non_exhaustive()
    }
}
