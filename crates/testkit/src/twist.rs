//! Something around a backend that changes what passes: how faults are injected inside the process, and how
//! [mutants](crate::mutant) are made.
//!
//! Implement the one method of [`Twist`] that is to behave otherwise; all others pass through.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Address, Backend, Capabilities, Completion, Connection, ConsumeOptions, Consumer, HealthWatch, Incoming, Key,
    Listed, Message, ProduceOptions, Producer, Receipt, Result, Settings, Settler, Stats, Token,
};

/// One deviation. Every method has the behaviour of "no deviation".
#[async_trait]
pub trait Twist: Send + Sync + fmt::Debug + 'static {
    /// What is declared, by the backend and by its connections.
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        own
    }

    /// What is declared by connections alone.
    fn connection_capabilities(&self, own: Capabilities) -> Capabilities {
        own
    }

    /// Checks settings.
    fn check(&self, backend: &dyn Backend, settings: &Settings) -> Result<()> {
        backend.check(settings)
    }

    /// Connects.
    async fn connect(&self, backend: &dyn Backend, settings: &Settings) -> Result<Arc<dyn Connection>> {
        backend.connect(settings).await
    }

    /// The address that is really used.
    fn address(&self, address: &Address) -> Address {
        address.clone()
    }

    /// Checks an address.
    fn check_address(&self, connection: &dyn Connection, address: &Address) -> Result<()> {
        connection.check_address(address)
    }

    /// Tells the state of the connection.
    fn health(&self, own: HealthWatch) -> HealthWatch {
        own
    }

    /// Makes a producer.
    async fn producer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ProduceOptions,
    ) -> Result<Box<dyn Producer>> {
        connection.producer(address, options).await
    }

    /// Makes a consumer.
    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        connection.consumer(address, options).await
    }

    /// Makes sure that a channel exists.
    async fn declare(&self, connection: &dyn Connection, address: &Address, options: &ConsumeOptions) -> Result<()> {
        connection.declare(address, options).await
    }

    /// Deletes a channel.
    async fn delete(&self, connection: &dyn Connection, address: &Address, group: Option<&str>) -> Result<()> {
        connection.delete(address, group).await
    }

    /// Looks whether a channel exists.
    async fn exists(&self, connection: &dyn Connection, address: &Address, group: Option<&str>) -> Result<bool> {
        connection.exists(address, group).await
    }

    /// Lists channels.
    async fn list(&self, connection: &dyn Connection) -> Result<Vec<Listed>> {
        connection.list().await
    }

    /// Binds a queue to a topic.
    async fn bind(&self, connection: &dyn Connection, queue: &Address, topic: &Address) -> Result<()> {
        connection.bind(queue, topic).await
    }

    /// Ends a binding.
    async fn unbind(&self, connection: &dyn Connection, queue: &Address, topic: &Address) -> Result<()> {
        connection.unbind(queue, topic).await
    }

    /// Looks at messages.
    async fn peek(
        &self,
        connection: &dyn Connection,
        address: &Address,
        group: Option<&str>,
        max: usize,
    ) -> Result<Vec<Message>> {
        connection.peek(address, group, max).await
    }

    /// Counts.
    async fn stats(&self, connection: &dyn Connection, address: &Address, group: Option<&str>) -> Result<Stats> {
        connection.stats(address, group).await
    }

    /// Empties a queue.
    async fn purge(&self, connection: &dyn Connection, address: &Address) -> Result<u64> {
        connection.purge(address).await
    }

    /// Closes the connection.
    async fn close(&self, connection: &dyn Connection) -> Result<()> {
        connection.close().await
    }

    /// Sends.
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        at.producer.send(message)
    }

    /// Flushes a producer.
    async fn flush(&self, at: &Sending) -> Result<()> {
        at.producer.flush().await
    }

    /// Receives.
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let _ = at;
        consumer.receive(max, into).await
    }

    /// Closes a consumer.
    async fn close_consumer(&self, at: &Receiving, consumer: &mut dyn Consumer) -> Result<()> {
        let _ = at;
        consumer.close().await
    }

    /// Acknowledges.
    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        at.settler.ack(token)
    }

    /// Returns a message.
    fn release(&self, at: &Receiving, token: Token, message: Message) {
        at.settler.release(token, message);
    }

    /// Returns a message for another attempt.
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        at.settler.retry(token, message, attempt, after)
    }

    /// Extends a loan.
    fn extend(&self, at: &Receiving, token: Token, by: Duration) -> Completion<()> {
        at.settler.extend(token, by)
    }
}

/// A producer below a twist.
#[derive(Debug)]
pub struct Sending {
    /// Where it sends to.
    pub address: Address,
    /// The producer itself.
    pub producer: Arc<dyn Producer>,
    /// The connection below.
    pub connection: Arc<dyn Connection>,
}

/// A consumer below a twist. Clones are the same consumer.
#[derive(Debug, Clone)]
pub struct Receiving {
    /// A number of its own: tokens of two consumers may be equal.
    pub id: u64,
    /// What it consumes.
    pub address: Address,
    /// What settles its deliveries.
    pub settler: Arc<dyn Settler>,
    /// The connection below.
    pub connection: Arc<dyn Connection>,
}

/// A backend with a twist.
#[derive(Debug)]
pub struct Twisted {
    backend: Arc<dyn Backend>,
    twist: Arc<dyn Twist>,
}

impl Twisted {
    /// Puts `twist` around `backend`; name, schemes and keys stay.
    #[must_use]
    pub fn around(backend: Arc<dyn Backend>, twist: Arc<dyn Twist>) -> Arc<dyn Backend> {
        Arc::new(Self { backend, twist })
    }
}

#[async_trait]
impl Backend for Twisted {
    fn name(&self) -> &'static str {
        self.backend.name()
    }

    fn aliases(&self) -> &'static [&'static str] {
        self.backend.aliases()
    }

    fn schemes(&self) -> &'static [&'static str] {
        self.backend.schemes()
    }

    fn foreign_variables(&self) -> &'static [(&'static str, &'static str)] {
        self.backend.foreign_variables()
    }

    fn keys(&self) -> &'static [Key] {
        self.backend.keys()
    }

    fn capabilities(&self) -> Capabilities {
        self.twist.capabilities(self.backend.capabilities())
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        self.backend.check_address(address)
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        self.twist.check(self.backend.as_ref(), settings)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        let connection = self.twist.connect(self.backend.as_ref(), settings).await?;
        let declared = self.twist.capabilities(connection.capabilities().clone());
        let capabilities = self.twist.connection_capabilities(declared);
        Ok(Arc::new(TwistedConnection { connection, capabilities, twist: Arc::clone(&self.twist) }))
    }
}

#[derive(Debug)]
struct TwistedConnection {
    connection: Arc<dyn Connection>,
    capabilities: Capabilities,
    twist: Arc<dyn Twist>,
}

#[async_trait]
impl Connection for TwistedConnection {
    fn backend(&self) -> &'static str {
        self.connection.backend()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.twist.health(self.connection.health())
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        self.twist.check_address(self.connection.as_ref(), address)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        let address = self.twist.address(address);
        let producer = self.twist.producer(self.connection.as_ref(), &address, options).await?;
        let sending = Sending { address, producer: Arc::from(producer), connection: Arc::clone(&self.connection) };
        Ok(Box::new(TwistedProducer { sending, twist: Arc::clone(&self.twist) }))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let address = self.twist.address(address);
        let consumer = self.twist.consumer(self.connection.as_ref(), &address, options).await?;
        let receiving = Receiving {
            id: IDS.fetch_add(1, Ordering::Relaxed),
            address,
            settler: consumer.settler(),
            connection: Arc::clone(&self.connection),
        };
        Ok(Box::new(TwistedConsumer { consumer, receiving, twist: Arc::clone(&self.twist) }))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.twist.declare(self.connection.as_ref(), &self.twist.address(address), options).await
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.twist.delete(self.connection.as_ref(), &self.twist.address(address), group).await
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        self.twist.exists(self.connection.as_ref(), &self.twist.address(address), group).await
    }

    async fn list(&self) -> Result<Vec<Listed>> {
        self.twist.list(self.connection.as_ref()).await
    }

    async fn bind(&self, queue: &Address, topic: &Address) -> Result<()> {
        let (queue, topic) = (self.twist.address(queue), self.twist.address(topic));
        self.twist.bind(self.connection.as_ref(), &queue, &topic).await
    }

    async fn unbind(&self, queue: &Address, topic: &Address) -> Result<()> {
        let (queue, topic) = (self.twist.address(queue), self.twist.address(topic));
        self.twist.unbind(self.connection.as_ref(), &queue, &topic).await
    }

    async fn peek(&self, address: &Address, group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        self.twist.peek(self.connection.as_ref(), &self.twist.address(address), group, max).await
    }

    async fn stats(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        self.twist.stats(self.connection.as_ref(), &self.twist.address(address), group).await
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        self.twist.purge(self.connection.as_ref(), &self.twist.address(address)).await
    }

    async fn ping(&self) -> Result<()> {
        self.connection.ping().await
    }

    async fn close(&self) -> Result<()> {
        self.twist.close(self.connection.as_ref()).await
    }
}

#[derive(Debug)]
struct TwistedProducer {
    sending: Sending,
    twist: Arc<dyn Twist>,
}

#[async_trait]
impl Producer for TwistedProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        self.twist.send(&self.sending, message)
    }

    fn request(&self, message: Message) -> Completion<Message> {
        self.sending.producer.request(message)
    }

    async fn flush(&self) -> Result<()> {
        self.twist.flush(&self.sending).await
    }

    async fn close(&self) -> Result<()> {
        self.twist.flush(&self.sending).await?;
        self.sending.producer.close().await
    }
}

#[derive(Debug)]
struct TwistedConsumer {
    consumer: Box<dyn Consumer>,
    receiving: Receiving,
    twist: Arc<dyn Twist>,
}

#[async_trait]
impl Consumer for TwistedConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        self.twist.receive(&self.receiving, self.consumer.as_mut(), max, into).await
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::new(TwistedSettler { receiving: self.receiving.clone(), twist: Arc::clone(&self.twist) })
    }

    async fn close(&mut self) -> Result<()> {
        self.twist.close_consumer(&self.receiving, self.consumer.as_mut()).await
    }
}

#[derive(Debug)]
struct TwistedSettler {
    receiving: Receiving,
    twist: Arc<dyn Twist>,
}

impl Settler for TwistedSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        self.twist.ack(&self.receiving, token)
    }

    fn release(&self, token: Token, message: Message) {
        self.twist.release(&self.receiving, token, message);
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        self.twist.retry(&self.receiving, token, message, attempt, after)
    }

    fn reject(&self, token: Token, reason: &str) -> Completion<()> {
        self.receiving.settler.reject(token, reason)
    }

    fn answer(&self, token: Token, answer: &Message) -> Option<Completion<()>> {
        self.receiving.settler.answer(token, answer)
    }

    fn extend(&self, token: Token, by: Duration) -> Completion<()> {
        self.twist.extend(&self.receiving, token, by)
    }
}
