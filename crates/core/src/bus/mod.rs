//! The entry point: one connection, what is known about types, and the channels that are used over it.

mod builder;
mod identity;

pub use builder::BusBuilder;
pub use identity::{Identity, SENDER_CLIENT, SENDER_COMPONENT, SENDER_VERSION};

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use futures_util::future::join_all;
use polymq_serializers::{Accept, Limits, Serializers};
use serde::Serialize;

use crate::{
    Address, Capabilities, Channel, ChannelKind, Connection, Error, ErrorKind, Health, HealthWatch, Kinds, Result,
    SendStats,
    channel::{Opened, Sent},
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
    pub(crate) sent: Sent,
    pub(crate) opened: Opened,
    /// What came of closing, until somebody was told; held while it goes on.
    closed: Arc<tokio::sync::Mutex<Option<Result<()>>>>,
    /// Kinds by name, where the backend cannot keep a queue and a topic of one name apart.
    kinds_in_use: Mutex<HashMap<Arc<str>, ChannelKind>>,
}

impl Parts {
    /// Checks that the backend can carry the address and keeps it apart from the others in use.
    pub(crate) fn check_address(&self, address: &Address) -> Result<()> {
        address.check()?;
        let fits = self.connection.check_address(address);
        fits.map_err(|error| error.with_backend(self.connection.backend()))?;
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

    /// The same for the queue of a channel's dead letters: found when it is used first, the message that cannot go there would
    /// come again and again.
    pub(crate) fn check_dead_letters(&self, channel: &Address, letters: &Address) -> Result<()> {
        self.check_address(letters).map_err(|error| {
            let sentence = format!("its dead letters cannot be kept in {:?}: {}", letters.name(), error.message());
            Error::new(error.kind(), sentence)
                .with_backend(self.connection.backend())
                .with_operation("consume")
                .with_channel(channel.name())
                .with_hint("shorten the names of channel and group, or name another dead-letter queue")
        })
    }
}

/// From so many channels on, those that nobody has a handle of are forgotten: a program may use a name for each of its
/// customers. One that is used again is opened again.
const FORGET_FROM: usize = 1000;

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

    /// Whether it is a clone of that one.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.parts, &other.parts)
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
        let mut known = self.known_channels();
        if let Some(channel) = known.get(&address) {
            return channel.clone();
        }
        if known.len() >= FORGET_FROM && known.len() == known.capacity() {
            known.retain(|_, channel| channel.is_used());
        }
        let channel = Channel::new(Arc::clone(&self.parts), address.clone());
        known.insert(address, channel.clone());
        channel
    }

    /// Asks a queue: [`Channel::request`], which can also be given another time-out.
    ///
    /// # Errors
    /// As [`Channel::request`].
    pub async fn request<T: Serialize + 'static>(&self, queue: impl Into<Arc<str>>, value: &T) -> Result<Reply> {
        self.queue(queue).request(value).await
    }

    /// What became of the messages that were sent, for each channel that something was sent to. Replies are one entry,
    /// `polymq-replies`, and a program that sends to more than 1000 channels has the rest of them in `polymq-others`.
    #[must_use]
    pub fn sent(&self) -> BTreeMap<Address, SendStats> {
        self.parts.sent.all()
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
        self.parts.connection.ping().await.map_err(|error| error.with_backend(self.backend()))
    }

    /// Waits until everything sent before has been answered, over every handle: [`Channel::flush`] of all at once.
    ///
    /// # Errors
    /// The first one met; the others are flushed all the same.
    pub async fn flush(&self) -> Result<()> {
        let channels = self.parts.opened.all();
        join_all(channels.iter().map(Channel::flush)).await.into_iter().collect()
    }

    /// Flushes every channel, then closes the connection. It goes on when the future is dropped; a second call waits for the
    /// same end and does nothing else. What is used afterwards answers [`ErrorKind::Closed`].
    ///
    /// # Errors
    /// The first one met; closing goes on all the same. Only one caller is told.
    pub async fn close(&self) -> Result<()> {
        let mut closed = Arc::clone(&self.parts.closed).lock_owned().await;
        if closed.is_none() {
            let bus = self.clone();
            let closing = tokio::spawn(async move { *closed = Some(bus.wind_up().await) });
            closing.await.map_err(|error| Error::new(ErrorKind::Other, "closing broke off").with_source(error))?;
            closed = Arc::clone(&self.parts.closed).lock_owned().await;
        }
        closed.as_mut().map_or(Ok(()), |outcome| std::mem::replace(outcome, Ok(())))
    }

    async fn wind_up(&self) -> Result<()> {
        self.parts.requests.close(&self.parts).await;
        let channels = self.parts.opened.all();
        let flushed = join_all(channels.iter().map(Channel::close)).await;
        let closed = self.parts.connection.close().await;
        flushed.into_iter().collect::<Result<()>>().and(closed.map_err(|error| error.with_backend(self.backend())))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Environment, Message};

    /// Nobody would delete the reply queue of a request that is made while the bus closes.
    #[tokio::test]
    async fn no_reply_queue_is_opened_while_the_bus_closes() {
        let builder = Bus::builder().url("memory://asks-late").environment(Environment::default());
        let bus = builder.connect().await.expect("connects");
        bus.queue("questions").declare(crate::ConsumeOptions::default()).await.expect("declared");
        bus.parts.requests.close(&bus.parts).await;
        let error = bus.queue("questions").request_message(Message::new("?")).await.expect_err("closing");
        assert_eq!(error.kind(), ErrorKind::Closed);
        assert!(bus.list().await.expect("lists").iter().all(|channel| !channel.address.name().contains("reply")));
    }

    #[tokio::test]
    async fn names_without_end_do_not_make_channels_without_end() {
        let builder = Bus::builder().url("memory://names-without-end").environment(Environment::default());
        let bus = builder.connect().await.expect("connects");
        let kept = bus.queue("kept");
        for n in 0..10 * FORGET_FROM {
            bus.queue(format!("of-customer-{n}")).send_message(Message::new("x")).await.expect("sent");
        }
        let (known, opened) = (bus.known_channels().len(), bus.parts.opened.all().len());
        assert!(known < 4 * FORGET_FROM && opened < 4 * FORGET_FROM, "{known} and {opened}");
        assert!(bus.known_channels().contains_key(kept.address()), "somebody has it");
    }
}
