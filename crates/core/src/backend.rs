//! What a backend is: a name that makes connections, and connections that make producers and consumers.

use std::{fmt, sync::Arc};

use async_trait::async_trait;

use crate::{
    Address, Capabilities, ConsumeOptions, Consumer, Error, HealthWatch, Message, ProduceOptions, Producer, Result,
    Settings,
};

/// A protocol that messages can travel over; made known with [`register_backend!`](crate::register_backend).
#[async_trait]
pub trait Backend: Send + Sync + fmt::Debug + 'static {
    /// The name that `POLYMQ_BACKEND` selects: lower case, one word.
    fn name(&self) -> &'static str;

    /// Other names that select it.
    fn aliases(&self) -> &'static [&'static str] {
        &[]
    }

    /// URL schemes that select it (`amqp`, `amqps`).
    fn schemes(&self) -> &'static [&'static str];

    /// Environment variables of the ecosystem that it honours, each with the setting that it feeds
    /// (`("RMQ_HOST", "host")`). Weaker than polymq's own variables.
    fn foreign_variables(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// The settings it knows, with their defaults and one line each.
    fn keys(&self) -> &'static [Key];

    /// What it can do, before a connection is made.
    fn capabilities(&self) -> Capabilities;

    /// Refuses addresses that the broker cannot carry, as a connection with the default settings does.
    ///
    /// # Errors
    /// As [`Connection::check_address`].
    fn check_address(&self, address: &Address) -> Result<()> {
        let _ = address;
        Ok(())
    }

    /// Checks settings without any connection.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) naming the key, the value, what was expected and where it came from.
    fn check(&self, settings: &Settings) -> Result<()>;

    /// Connects; bounded by the settings' own connect time-out. Whether a first connection that fails is an
    /// error or is tried for ever is a setting (`connect_retry`, default: an error).
    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>>;
}

/// One documented setting of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Key {
    /// Its name, in URLs (`?prefetch=50`), files, code, and upper case in `POLYMQ_<BACKEND>_<KEY>`.
    pub name: &'static str,
    /// Its default, as it would be written.
    pub default: &'static str,
    /// What it does.
    pub help: &'static str,
}

/// A live connection. It reconnects by itself, declares topology again and resumes its consumers; its
/// [health](Connection::health) tells.
#[async_trait]
pub trait Connection: Send + Sync + fmt::Debug + 'static {
    /// The backend's name.
    fn backend(&self) -> &'static str;

    /// What can be done over this connection, after its settings.
    fn capabilities(&self) -> &Capabilities;

    /// The state of the connection.
    fn health(&self) -> HealthWatch;

    /// Refuses addresses that the broker cannot carry; the common rules are checked before. No connection is used.
    fn check_address(&self, address: &Address) -> Result<()> {
        let _ = address;
        Ok(())
    }

    /// The address as the broker knows it.
    fn real_address(&self, address: &Address) -> Address {
        address.clone()
    }

    /// Makes a producer. With `declare`, the channel exists afterwards.
    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>>;

    /// Makes a consumer. With `declare`, the channel and its dead-letter queue exist afterwards.
    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>>;

    /// Makes sure that the channel, the group's share of it and the dead-letter queue exist. Harmless when they do.
    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()>;

    /// Deletes the channel and what it holds; harmless when it does not exist.
    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()>;

    /// Whether the channel, or the group's share of it, exists; looks and creates nothing, where the capabilities say so
    /// (`lookup`). An error is never a "no": who may not look is told so.
    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        let _ = (address, group);
        Err(Error::unsupported(self.backend(), "looking whether a channel exists"))
    }

    /// Every channel that the broker has, where the capabilities say so; what polymq makes for itself beside a channel (queues
    /// for delays, for replies) is left out.
    async fn list(&self) -> Result<Vec<Listed>> {
        Err(Error::unsupported(self.backend(), "listing channels").with_hint("name the channels"))
    }

    /// The queue gets the messages of this topic from now on, beside all others that it gets, where the capabilities say
    /// so (`bindings`). Both exist afterwards. Harmless when it does already.
    async fn bind(&self, queue: &Address, topic: &Address) -> Result<()> {
        let _ = (queue, topic);
        Err(Error::unsupported(self.backend(), "binding a queue to a topic").with_hint(BRIDGE))
    }

    /// The queue gets no more messages of this topic; what it has it keeps. Harmless when it got none.
    async fn unbind(&self, queue: &Address, topic: &Address) -> Result<()> {
        let _ = (queue, topic);
        Err(Error::unsupported(self.backend(), "binding a queue to a topic").with_hint(BRIDGE))
    }

    /// Up to `max` of the messages that wait, oldest first, without taking them, where the capabilities say so.
    async fn peek(&self, address: &Address, group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        let _ = (address, group, max);
        Err(Error::unsupported(self.backend(), "looking at messages without taking them")
            .with_hint("receive and release them"))
    }

    /// Counts of a channel, where the capabilities say so.
    async fn stats(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        let _ = (address, group);
        Err(Error::unsupported(self.backend(), "counting the messages of a channel"))
    }

    /// Empties a queue and says how many messages are gone, where the capabilities say so.
    async fn purge(&self, address: &Address) -> Result<u64> {
        let _ = address;
        Err(Error::unsupported(self.backend(), "emptying a queue"))
    }

    /// A round trip to the broker.
    async fn ping(&self) -> Result<()>;

    /// Closes consumers and producers that are still open, flushing them, then the connection. A second call does nothing but
    /// wait for the end of the first, for as long as that one's future exists.
    async fn close(&self) -> Result<()>;
}

const BRIDGE: &str = "consume the topic with a group, or bridge it to the queue";

/// A channel that the broker has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Kind and name.
    pub address: Address,
    /// The group, where this is a group's share of a topic.
    pub group: Option<String>,
    /// Its counts, where the backend counts.
    pub stats: Option<Stats>,
}

/// Counts of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Stats {
    /// Messages that wait.
    pub ready: u64,
    /// Messages delivered and not settled, where the broker tells.
    pub unsettled: Option<u64>,
    /// Consumers.
    pub consumers: u64,
}
