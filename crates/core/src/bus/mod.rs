//! The entry point: one connection, what is known about types, and the channels that are used over it.

mod builder;
mod identity;

pub use builder::BusBuilder;
pub use identity::{Identity, SENDER_CLIENT, SENDER_COMPONENT, SENDER_VERSION};

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use polymq_serializers::{Accept, Limits, Serializers};
use serde::Serialize;

use crate::{
    Address, Capabilities, Channel, ChannelKind, Connection, Error, ErrorKind, Health, HealthWatch, Kinds, Result,
    layer::Layers,
    request::{Answering, Reply, Requests},
};

/// Chooses the backend by name.
pub const BACKEND_VARIABLE: &str = "POLYMQ_BACKEND";
/// Chooses the address, and by its scheme the backend when no name is given.
pub const URL_VARIABLE: &str = "POLYMQ_URL";
/// The serializer for bodies that carry no content type, such as those of bare clients.
pub const UNLABELLED_VARIABLE: &str = "POLYMQ_UNLABELLED";
/// Stands before the name of every channel, with a separator between.
pub const PREFIX_VARIABLE: &str = "POLYMQ_PREFIX";

/// What the handles of one bus share.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) connection: Arc<dyn Connection>,
    pub(crate) capabilities: Capabilities,
    pub(crate) serializers: Serializers,
    pub(crate) accept: Accept,
    pub(crate) limits: Limits,
    pub(crate) kinds: Kinds,
    pub(crate) layers: Layers,
    pub(crate) identity: Option<Identity>,
    pub(crate) requests: Requests,
    /// Kinds by name, where the backend cannot keep a queue and a topic of one name apart.
    kinds_in_use: Mutex<HashMap<Arc<str>, ChannelKind>>,
}

impl Parts {
    /// Checks that the backend can carry the address and keeps it apart from the others in use.
    pub(crate) fn check_address(&self, address: &Address) -> Result<()> {
        address.check().and_then(|()| self.connection.check_address(address))?;
        // Without topics, asking for one is refused for that.
        if self.capabilities.kinds_apart || !self.capabilities.topics {
            return Ok(());
        }
        let mut in_use = self.kinds_in_use.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = *in_use.entry(address.shared_name()).or_insert(address.kind());
        if kind == address.kind() {
            return Ok(());
        }
        let sentence = format!("used as a {kind} already, and this backend delivers the messages of both to both");
        Err(Error::new(ErrorKind::Conflict, sentence)
            .with_backend(self.connection.backend())
            .with_channel(address.name())
            .with_hint("give the queue and the topic different names"))
    }
}

/// A connection to one backend. Cheap to clone; clones share the connection and its producers.
#[derive(Clone)]
pub struct Bus {
    parts: Arc<Parts>,
    channels: Arc<Mutex<HashMap<Address, Channel>>>,
    answering: Answering,
}

impl Bus {
    /// Connects to what the environment chooses: `POLYMQ_BACKEND`, `POLYMQ_URL` and the backend's own variables;
    /// the embedded default when nothing is chosen.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownBackend`], [`ErrorKind::NotCompiledIn`] and [`ErrorKind::Config`] before any connection
    /// is tried; then those of connecting.
    pub async fn from_env() -> Result<Self> {
        Self::builder().connect().await
    }

    /// Connects to the backend that the URL's scheme names. The environment still feeds what the URL leaves open.
    ///
    /// # Errors
    /// As [`from_env`](Self::from_env).
    pub async fn connect(url: &str) -> Result<Self> {
        Self::builder().url(url).connect().await
    }

    /// Everything that can be chosen.
    pub fn builder() -> BusBuilder {
        BusBuilder::default()
    }

    /// A queue: each message goes to one consumer.
    #[must_use]
    pub fn queue(&self, name: impl Into<Arc<str>>) -> Channel {
        self.channel(Address::queue(name))
    }

    /// A topic: each message goes to every group.
    #[must_use]
    pub fn topic(&self, name: impl Into<Arc<str>>) -> Channel {
        self.channel(Address::topic(name))
    }

    /// A queue or topic. Calls with the same address share one producer.
    #[must_use]
    pub fn channel(&self, address: Address) -> Channel {
        let make = || Channel::new(Arc::clone(&self.parts), address.clone());
        self.known_channels().entry(address.clone()).or_insert_with(make).clone()
    }

    /// Asks a queue: [`Channel::request`], which can also be given another time-out.
    ///
    /// # Errors
    /// As [`Channel::request`].
    pub async fn request<T: Serialize + 'static>(&self, queue: impl Into<Arc<str>>, value: &T) -> Result<Reply> {
        self.queue(queue).request(value).await
    }

    /// How many replies came when nobody waited for them any more; they are dropped.
    #[must_use]
    pub fn late_replies(&self) -> u64 {
        self.parts.requests.late()
    }

    /// The backend's name.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        self.parts.connection.backend()
    }

    /// What the backend can do over this connection.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.parts.capabilities
    }

    /// The connection itself, for backend authors and tests.
    #[must_use]
    pub fn connection(&self) -> &Arc<dyn Connection> {
        &self.parts.connection
    }

    /// The state of the connection.
    #[must_use]
    pub fn health(&self) -> Health {
        self.parts.connection.health().now()
    }

    /// Follows the state of the connection.
    #[must_use]
    pub fn watch_health(&self) -> HealthWatch {
        self.parts.connection.health()
    }

    /// A round trip to the broker.
    ///
    /// # Errors
    /// [`ErrorKind::Disconnected`], [`ErrorKind::Timeout`].
    pub async fn ping(&self) -> Result<()> {
        self.parts.connection.ping().await
    }

    /// Waits until everything sent before has been answered.
    ///
    /// # Errors
    /// The first one met; the others are flushed all the same.
    pub async fn flush(&self) -> Result<()> {
        let channels: Vec<Channel> = self.known_channels().values().cloned().collect();
        let mut outcome = Ok(());
        for channel in channels {
            outcome = outcome.and(channel.flush().await);
        }
        outcome
    }

    /// Flushes every channel, then closes the connection. A second call does nothing; what is used afterwards
    /// answers [`ErrorKind::Closed`].
    ///
    /// # Errors
    /// The first one met; closing goes on all the same.
    pub async fn close(&self) -> Result<()> {
        let channels: Vec<Channel> = self.known_channels().values().cloned().collect();
        let mut outcome = Ok(());
        self.parts.requests.close(&self.parts).await;
        for channel in channels {
            outcome = outcome.and(channel.close().await);
        }
        outcome.and(self.parts.connection.close().await)
    }

    /// Makes `bus` what [`Bus::current`] gives, or nothing. For programs that cannot hand a bus around, and their tests.
    pub fn set_current(bus: Option<Self>) {
        *CURRENT.write().unwrap_or_else(PoisonError::into_inner) = bus;
    }

    /// The process-wide default bus.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when none was set.
    pub fn current() -> Result<Self> {
        let current = CURRENT.read().unwrap_or_else(PoisonError::into_inner).clone();
        current.ok_or_else(|| {
            Error::new(ErrorKind::Config, "there is no default bus in this process")
                .with_hint("call Bus::set_current first, or hand the bus around")
        })
    }

    pub(crate) fn answering(&self) -> &Answering {
        &self.answering
    }

    pub(crate) fn parts(&self) -> &Arc<Parts> {
        &self.parts
    }

    fn known_channels(&self) -> MutexGuard<'_, HashMap<Address, Channel>> {
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

static CURRENT: RwLock<Option<Bus>> = RwLock::new(None);

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus").field("backend", &self.backend()).field("health", &self.health().state).finish()
    }
}
