//! Handler pairs: a consumer and a producer of one queue, which may be on different backends.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::future::join_all;
use tokio::sync::OnceCell;

use crate::{
    Attempt, Bus, Channel, ConsumerFactory, ConsumerRunner, Environment, Error, ErrorKind, Failure, Handler, Message,
    Outcome, QueueTable, Registry, Result, Retry, RetryMode, State, config::nearest, message::Stamp,
};

/// Makes the pairs of a [`QueueTable`]. Backends are connected when a pair needs them, once each.
#[derive(Debug)]
pub struct HandlerFactory {
    sides: Arc<Sides>,
}

impl HandlerFactory {
    /// Reads the table of a file and checks it against the linked backends. Nothing is connected.
    ///
    /// # Errors
    /// [`ErrorKind::Config`], [`ErrorKind::UnknownBackend`] and [`ErrorKind::NotCompiledIn`], naming queue and backend.
    pub fn from_config(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::of(QueueTable::read(path)?, path.display().to_string(), Registry::linked(), Environment::process())
    }

    /// Pairs of this table, with these backends and this environment.
    ///
    /// # Errors
    /// As [`from_config`](Self::from_config).
    pub fn new(table: QueueTable, registry: Registry, environment: Environment) -> Result<Self> {
        Self::of(table, "the queue table".into(), registry, environment)
    }

    fn of(table: QueueTable, file: String, registry: Registry, environment: Environment) -> Result<Self> {
        table.check(&registry)?;
        let table = table.with_own_names(&registry)?;
        Ok(Self { sides: Arc::new(Sides { table, file, registry, environment, buses: Mutex::default() }) })
    }

    /// The names of the queues.
    pub fn queues(&self) -> impl Iterator<Item = &str> {
        self.sides.table.queues.keys().map(String::as_str)
    }

    /// The pair of a queue. Nothing is connected: each side is when it is used first.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] naming the queues there are.
    pub fn queue(&self, queue: &str) -> Result<HandlerPair> {
        let Some(entry) = self.sides.table.queues.get(queue) else {
            let known = self.queues().collect::<Vec<_>>().join(", ");
            let error = Error::new(ErrorKind::NotFound, format!("the queue table has no {queue:?}; it has: {known}"));
            return Err(match nearest(queue, self.queues()) {
                Some(near) => error.with_hint(format!("did you mean {near:?}?")),
                None => error,
            });
        };
        let side = |backend: &str| -> Result<Side> {
            Ok(Side::Backend(self.sides.registry.backend(backend)?.name(), Arc::clone(&self.sides)))
        };
        let name = entry.name.clone().unwrap_or_else(|| queue.to_owned());
        Ok(HandlerPair { name, consumer: side(&entry.consumer)?, producer: side(&entry.producer)? })
    }

    /// Closes every connection that was made, all at once; its pairs connect nothing any more. It goes on when the future is
    /// dropped; a second call waits for the same end.
    ///
    /// # Errors
    /// The first one met; only one caller is told.
    pub async fn close(&self) -> Result<()> {
        let made: Vec<_> = {
            let mut buses = self.sides.buses();
            buses.closed = true;
            buses.made.values().cloned().collect()
        };
        join_all(made.iter().filter_map(|bus| bus.get()).map(Bus::close)).await.into_iter().collect()
    }
}

/// The backends of a table, and the connections that its pairs share.
#[derive(Debug)]
struct Sides {
    table: QueueTable,
    file: String,
    registry: Registry,
    environment: Environment,
    buses: Mutex<Buses>,
}

#[derive(Debug, Default)]
struct Buses {
    made: BTreeMap<&'static str, Arc<OnceCell<Bus>>>,
    closed: bool,
}

impl Sides {
    fn buses(&self) -> MutexGuard<'_, Buses> {
        self.buses.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn bus(&self, name: &'static str) -> Result<Bus> {
        let closed = || Error::closed("connect").with_backend(name);
        let bus = {
            let mut buses = self.buses();
            if buses.closed {
                return Err(closed());
            }
            Arc::clone(buses.made.entry(name).or_default())
        };
        let bus = bus.get_or_try_init(|| self.connect(name)).await?;
        if self.buses().closed {
            // Closed while it connected: whoever closes may not have seen it.
            bus.close().await?;
            return Err(closed());
        }
        Ok(bus.clone())
    }

    async fn connect(&self, name: &'static str) -> Result<Bus> {
        // The process's URL belongs to the backend that the process has chosen, not to every one of the table.
        let mut builder = Bus::builder()
            .backend(name)
            .registry(self.registry.clone())
            .environment(self.environment.clone())
            .settings(&self.table.settings(name, &self.file)?);
        let chosen = self.environment.get(crate::BACKEND_VARIABLE).map(|chosen| self.registry.backend(chosen));
        if let Some(Ok(chosen)) = chosen
            && chosen.name() == name
            && let Some(url) = self.environment.get(crate::URL_VARIABLE)
        {
            builder = builder.url(url);
        }
        builder.connect().await
    }
}

/// One side of a pair.
#[derive(Debug, Clone)]
enum Side {
    /// A bus of the caller's.
    Bus(Bus),
    /// A backend of a table.
    Backend(&'static str, Arc<Sides>),
}

impl Side {
    async fn bus(&self) -> Result<Bus> {
        match self {
            Self::Bus(bus) => Ok(bus.clone()),
            Self::Backend(name, sides) => sides.bus(name).await,
        }
    }
}

/// The consumer and the producer of one queue.
#[derive(Debug, Clone)]
pub struct HandlerPair {
    name: String,
    consumer: Side,
    producer: Side,
}

impl HandlerPair {
    /// A pair on buses of your own.
    #[must_use]
    pub fn new(queue: impl Into<String>, consumer: &Bus, producer: &Bus) -> Self {
        Self { name: queue.into(), consumer: Side::Bus(consumer.clone()), producer: Side::Bus(producer.clone()) }
    }

    /// The queue's name on the brokers.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bus that the queue is consumed from.
    ///
    /// # Errors
    /// Those of connecting, the first time.
    pub async fn consumer(&self) -> Result<Bus> {
        self.consumer.bus().await
    }

    /// The queue where it is produced to.
    ///
    /// # Errors
    /// Those of connecting, the first time.
    pub async fn producer(&self) -> Result<Channel> {
        Ok(self.producer.bus().await?.queue(self.name.as_str()))
    }

    /// A runner with this handler on the queue.
    ///
    /// # Errors
    /// Those of connecting, the first time.
    pub async fn handle<Args: 'static>(&self, handler: impl Handler<Args>) -> Result<ConsumerRunner> {
        let mut consumers = ConsumerFactory::new(&self.consumer().await?);
        consumers.route(self.name.as_str(), handler);
        Ok(ConsumerRunner::new(consumers))
    }

    /// A runner that moves every message from the consumer's backend to the producer's. Id, headers, body and other
    /// attributes stay; a message is acknowledged at its source only when the target has accepted it.
    ///
    /// While the target is down, messages wait at the source: the retries of moving have no end. Where the source is a sender
    /// that keeps them itself (HTTP), it is told to come again. What the target never takes is a dead letter of the source.
    ///
    /// # Errors
    /// Those of connecting, the first time; [`ErrorKind::Config`] when both are the same queue of the same connection:
    /// it would go round for ever.
    pub async fn bridge(&self) -> Result<ConsumerRunner> {
        let (source, target) = (self.consumer().await?, self.producer.bus().await?);
        if std::ptr::eq(source.connection().as_ref(), target.connection().as_ref()) {
            return Err(Error::new(ErrorKind::Config, "the queue would be moved to itself")
                .with_operation("bridge")
                .with_channel(self.name.clone())
                .with_hint("choose another backend for the producer"));
        }
        let mut consumers = ConsumerFactory::new(&source);
        consumers.state(target.queue(self.name.as_str())).state(Waiting::default());
        consumers.route(self.name.as_str(), forward).policy(crate::FailurePolicy {
            max_attempts: u32::MAX,
            // A sender that keeps the message itself is told to come again, and does not wait for long.
            mode: if source.capabilities().direct { RetryMode::Redeliver } else { RetryMode::InPlace },
            backoff: crate::Backoff { max: std::time::Duration::from_secs(10), ..crate::Backoff::default() },
            ..crate::FailurePolicy::default()
        });
        Ok(ConsumerRunner::new(consumers).onto(&target))
    }
}

/// The message that the target did not take at its last attempt, as it came without an id and as it was sent with one: it must not
/// be another message at each attempt.
#[derive(Default)]
struct Waiting(Mutex<Option<(Message, Message)>>);

impl Waiting {
    fn slot(&self) -> MutexGuard<'_, Option<(Message, Message)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn forward(mut message: Message, attempt: Attempt, target: State<Channel>, waiting: State<Waiting>) -> Outcome {
    use crate::ErrorKind::{Conflict, Decode, Encode, Handler, InvalidInput, Other, Refused, TooLarge, Unsupported};
    message.clear_system_headers();
    let without_id = message.id().is_none().then(|| {
        let came = message.clone();
        match waiting.slot().take() {
            Some((last, sent)) if attempt.0 > 1 && last == came => message = sent,
            _ => message.stamp(Stamp::now),
        }
        (came, message.clone())
    });
    let error = match target.pass_over(message).await {
        Ok(_) => return Outcome::Ack,
        Err(error) => error,
    };
    if without_id.is_some() {
        *waiting.slot() = without_id;
    }
    let after = match (error.retry(), error.kind()) {
        // The target can never carry this message, or never takes it; the dead letters of the source keep it.
        (_, InvalidInput | TooLarge | Unsupported)
        | (Retry::Never, Conflict | Refused | Handler | Encode | Decode | Other) => {
            return Outcome::reject(error.to_string());
        }
        (Retry::After(least), _) => Some(least),
        _ => None,
    };
    Outcome::Retry { after, error: Failure::new(error.to_string()) }
}
