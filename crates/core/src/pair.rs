//! Handler pairs: a consumer and a producer of one queue, which may be on different backends.

use std::{collections::BTreeMap, path::Path};

use tokio::sync::Mutex;

use crate::{
    Bus, Channel, ConsumerFactory, ConsumerRunner, Environment, Error, ErrorKind, Failure, Handler, Message, Outcome,
    QueueTable, Registry, Result, State, config::nearest,
};

/// Makes the pairs of a [`QueueTable`]. Backends are connected when the first pair needs them, once each.
#[derive(Debug)]
pub struct HandlerFactory {
    table: QueueTable,
    file: String,
    registry: Registry,
    environment: Environment,
    buses: Mutex<BTreeMap<&'static str, Bus>>,
}

impl HandlerFactory {
    /// Reads the table of a file and checks it against the linked backends. Nothing is connected.
    ///
    /// # Errors
    /// [`ErrorKind::Config`], [`ErrorKind::UnknownBackend`] and [`ErrorKind::NotCompiledIn`], naming queue and backend.
    pub fn from_config(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let table = QueueTable::read(path)?;
        let mut factory = Self::new(table, Registry::linked()?, Environment::process())?;
        factory.file = path.display().to_string();
        Ok(factory)
    }

    /// Pairs of this table, with these backends and this environment.
    ///
    /// # Errors
    /// As [`from_config`](Self::from_config).
    pub fn new(table: QueueTable, registry: Registry, environment: Environment) -> Result<Self> {
        table.check(&registry)?;
        Ok(Self { table, file: "the queue table".into(), registry, environment, buses: Mutex::default() })
    }

    /// The names of the queues.
    pub fn queues(&self) -> impl Iterator<Item = &str> {
        self.table.queues.keys().map(String::as_str)
    }

    /// The pair of a queue; connects what is not connected yet.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] naming the queues there are; then those of connecting.
    pub async fn queue(&self, queue: &str) -> Result<HandlerPair> {
        let Some(entry) = self.table.queues.get(queue) else {
            let known = self.queues().collect::<Vec<_>>().join(", ");
            let error = Error::new(ErrorKind::NotFound, format!("the queue table has no {queue:?}; it has: {known}"));
            return Err(match nearest(queue, self.queues()) {
                Some(near) => error.with_hint(format!("did you mean {near:?}?")),
                None => error,
            });
        };
        let name = entry.name.clone().unwrap_or_else(|| queue.to_owned());
        Ok(HandlerPair { name, consumer: self.bus(&entry.consumer).await?, producer: self.bus(&entry.producer).await? })
    }

    async fn bus(&self, backend: &str) -> Result<Bus> {
        let name = self.registry.backend(backend)?.name();
        let mut buses = self.buses.lock().await;
        if let Some(bus) = buses.get(name) {
            return Ok(bus.clone());
        }
        // The process's URL belongs to the backend that the process has chosen, not to every one of the table.
        let mut builder = Bus::builder()
            .backend(name)
            .registry(self.registry.clone())
            .environment(self.environment.clone())
            .settings(&self.table.settings(name, &self.file)?);
        if self.environment.get(crate::BACKEND_VARIABLE) == Some(name)
            && let Some(url) = self.environment.get(crate::URL_VARIABLE)
        {
            builder = builder.url(url);
        }
        let bus = builder.connect().await?;
        buses.insert(name, bus.clone());
        Ok(bus)
    }

    /// Closes every connection that was made.
    ///
    /// # Errors
    /// The first one met.
    pub async fn close(&self) -> Result<()> {
        let mut outcome = Ok(());
        for bus in std::mem::take(&mut *self.buses.lock().await).into_values() {
            outcome = outcome.and(bus.close().await);
        }
        outcome
    }
}

/// The consumer and the producer of one queue.
#[derive(Debug, Clone)]
pub struct HandlerPair {
    name: String,
    consumer: Bus,
    producer: Bus,
}

impl HandlerPair {
    /// A pair on buses of your own.
    #[must_use]
    pub fn new(queue: impl Into<String>, consumer: &Bus, producer: &Bus) -> Self {
        Self { name: queue.into(), consumer: consumer.clone(), producer: producer.clone() }
    }

    /// The queue's name on the brokers.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bus that the queue is consumed from.
    #[must_use]
    pub fn consumer(&self) -> &Bus {
        &self.consumer
    }

    /// The queue where it is produced to.
    #[must_use]
    pub fn producer(&self) -> Channel {
        self.producer.queue(self.name.as_str())
    }

    /// A runner with this handler on the queue.
    #[must_use]
    pub fn handle<Args: 'static>(&self, handler: impl Handler<Args>) -> ConsumerRunner {
        let mut consumers = ConsumerFactory::new(&self.consumer);
        consumers.route(self.name.as_str(), handler);
        ConsumerRunner::new(consumers)
    }

    /// A runner that moves every message from the consumer's backend to the producer's. Id, headers, body and other
    /// attributes stay; a message is acknowledged at its source only when the target has accepted it.
    ///
    /// While the target is down, messages wait at the source: the retries of moving have no end.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when both are the same queue of the same connection: it would go round for ever.
    pub fn bridge(&self) -> Result<ConsumerRunner> {
        if std::ptr::eq(self.consumer.connection().as_ref(), self.producer.connection().as_ref()) {
            return Err(Error::new(ErrorKind::Config, "the queue would be moved to itself")
                .with_operation("bridge")
                .with_channel(self.name.clone())
                .with_hint("choose another backend for the producer"));
        }
        let mut consumers = ConsumerFactory::new(&self.consumer);
        consumers.state(self.producer());
        consumers.route(self.name.as_str(), forward).policy(crate::FailurePolicy {
            max_attempts: u32::MAX,
            mode: crate::RetryMode::InPlace,
            backoff: crate::Backoff { max: std::time::Duration::from_secs(10), ..crate::Backoff::default() },
            ..crate::FailurePolicy::default()
        });
        Ok(ConsumerRunner::new(consumers))
    }
}

async fn forward(mut message: Message, target: State<Channel>) -> Outcome {
    use crate::ErrorKind::{InvalidInput, TooLarge, Unsupported};
    message.clear_system_headers();
    match target.send_message(message).await {
        Ok(_) => Outcome::Ack,
        // The target can never carry this message; the dead letters of the source keep it.
        Err(error) if matches!(error.kind(), InvalidInput | TooLarge | Unsupported) => {
            Outcome::reject(error.to_string())
        }
        Err(error) => Outcome::Retry { after: None, error: Failure::new(error.to_string()) },
    }
}
