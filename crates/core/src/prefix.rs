//! A prefix for the names of channels, so that several environments share one broker.
//!
//! It stands between the bus and the backend: everything above uses the names of the program, everything below those of the
//! broker. Messages cross it untouched.

use std::{fmt, sync::Arc};

use async_trait::async_trait;

use crate::{
    Address, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, HealthWatch, Incoming, Listed, Message,
    ProduceOptions, Producer, Result, Stats, request::REPLY_QUEUE, sieve::Sieve,
};

/// Between the prefix and the name, where the broker has no separator of its own for levels of names.
const SEPARATOR: &str = ".";

/// A connection whose channels have a prefix.
pub(crate) struct Prefixed {
    connection: Arc<dyn Connection>,
    /// With its separator.
    prefix: Arc<str>,
}

impl Prefixed {
    /// The connection itself for an empty prefix.
    pub(crate) fn around(connection: Arc<dyn Connection>, prefix: &str) -> Arc<dyn Connection> {
        let separator = connection.capabilities().wildcards.map_or(SEPARATOR, |wildcards| wildcards.separator);
        let prefix = prefix.trim_end_matches(separator);
        if prefix.is_empty() {
            return connection;
        }
        let prefix = format!("{prefix}{separator}").into();
        Arc::new(Self { connection, prefix })
    }

    fn real(&self, address: &Address) -> Address {
        // Its name is unique, and travels with requests.
        if address.name().starts_with(REPLY_QUEUE) {
            return address.clone();
        }
        let name = format!("{}{}", self.prefix, address.name());
        match address.kind() {
            ChannelKind::Queue => Address::queue(name),
            ChannelKind::Topic => Address::topic(name),
        }
    }

    fn consume(&self, options: &ConsumeOptions) -> ConsumeOptions {
        let dead_letters = options.dead_letters.as_ref().map(|queue| self.real(queue));
        ConsumeOptions { dead_letters, ..options.clone() }
    }
}

#[async_trait]
impl Connection for Prefixed {
    fn backend(&self) -> &'static str {
        self.connection.backend()
    }

    fn capabilities(&self) -> &Capabilities {
        self.connection.capabilities()
    }

    fn health(&self) -> HealthWatch {
        self.connection.health()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        let real = self.real(address);
        real.check().and_then(|()| self.connection.check_address(&real))
    }

    fn real_address(&self, address: &Address) -> Address {
        self.real(address)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        // Whoever awaits a reply has written the name of the queue as the broker has it.
        if options.temporary {
            return self.connection.producer(address, options).await;
        }
        self.connection.producer(&self.real(address), options).await
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        if options.temporary {
            return self.connection.consumer(address, options).await;
        }
        let consumer = self.connection.consumer(&self.real(address), &self.consume(options)).await?;
        Ok(match address.kind() {
            ChannelKind::Queue => consumer,
            ChannelKind::Topic => {
                let prefix = Arc::clone(&self.prefix);
                Box::new(Sieve::new(consumer, move |incoming| Some(strip(incoming, &prefix))))
            }
        })
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.connection.declare(&self.real(address), &self.consume(options)).await
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.connection.delete(&self.real(address), group).await
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        self.connection.exists(&self.real(address), group).await
    }

    async fn list(&self) -> Result<Vec<Listed>> {
        let listed = self.connection.list().await?;
        let ours = listed.into_iter().filter_map(|listed| {
            let name = listed.address.name().strip_prefix(&*self.prefix)?;
            let address = match listed.address.kind() {
                ChannelKind::Queue => Address::queue(name),
                ChannelKind::Topic => Address::topic(name),
            };
            Some(Listed { address, ..listed })
        });
        Ok(ours.collect())
    }

    async fn bind(&self, queue: &Address, topic: &Address) -> Result<()> {
        self.connection.bind(&self.real(queue), &self.real(topic)).await
    }

    async fn unbind(&self, queue: &Address, topic: &Address) -> Result<()> {
        self.connection.unbind(&self.real(queue), &self.real(topic)).await
    }

    async fn peek(&self, address: &Address, group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        self.connection.peek(&self.real(address), group, max).await
    }

    async fn stats(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        self.connection.stats(&self.real(address), group).await
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        self.connection.purge(&self.real(address)).await
    }

    async fn ping(&self) -> Result<()> {
        self.connection.ping().await
    }

    async fn close(&self) -> Result<()> {
        self.connection.close().await
    }
}

impl fmt::Debug for Prefixed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prefixed").field("connection", &self.connection).field("prefix", &self.prefix).finish()
    }
}

/// The concrete name of a topic (wildcards) as the program knows it.
fn strip(mut incoming: Incoming, prefix: &str) -> Incoming {
    if let Some(details) = &mut incoming.details
        && let Some(name) = &details.channel
    {
        details.channel = name.strip_prefix(prefix).map(Arc::from);
    }
    incoming
}
