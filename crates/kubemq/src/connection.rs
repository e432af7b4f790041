//! What a connection does: makes producers and consumers, declares, deletes and closes.

use std::{
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures_util::future::join_all;
use polymq_core::{
    Address, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, Error, HealthWatch, Listed, Message,
    ProduceOptions, Producer, Result, Settings,
};
use polymq_kubemq_proto::PingResult;
use tokio::{sync::OnceCell, time::timeout};

use crate::{
    NAME,
    admin::Admin,
    backend::capabilities,
    config::{Declare, KubeMqConfig, Topics},
    connect::Target,
    consumer::{ConsumerHandle, KubeMqConsumer},
    error,
    group::{self, Mover},
    link::{Link, LinkHandle},
    listener::{Heard, Listener, Reading},
    names,
    outbox::{Outbox, ToQueues, ToTopics},
    producer::{CLOSE_TIMEOUT, KubeMqProducer, Sink},
    shared::Shared,
    topology,
    transport::InProcess,
};

/// A connection to a broker.
pub struct KubeMqConnection {
    /// The backend's.
    name: &'static str,
    link: LinkHandle,
    client_id: Arc<str>,
    capabilities: Capabilities,
    queues: OnceLock<Arc<Outbox<ToQueues>>>,
    stored: OnceLock<Arc<Outbox<ToTopics<true>>>>,
    plain: OnceLock<Arc<Outbox<ToTopics<false>>>>,
    readers: Mutex<Readers>,
    /// Whether everything was answered when it was closed.
    closed: OnceCell<bool>,
    /// Whether the first one who closed has heard so.
    told: AtomicBool,
}

/// What is consumed.
#[derive(Debug, Clone, Default)]
struct Readers {
    consumers: Vec<ConsumerHandle>,
    listeners: Vec<Weak<Heard>>,
    movers: Vec<Weak<Mover>>,
    /// Those who close have seen all there are: none is added.
    closed: bool,
}

impl KubeMqConnection {
    /// Connects, as [`Backend::connect`](polymq_core::Backend::connect) does, and keeps the type.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](polymq_core::ErrorKind::Config) for settings that are not valid,
    /// [`ErrorKind::Unauthenticated`](polymq_core::ErrorKind::Unauthenticated) for a token that was refused,
    /// [`ErrorKind::Disconnected`](polymq_core::ErrorKind::Disconnected) when nobody answers in time.
    pub async fn connect(settings: &Settings) -> Result<Self> {
        Self::open(NAME, KubeMqConfig::parse(settings)?, Target::Network).await
    }

    /// A connection to a broker in this process, without any socket, for a backend of this name. `service` answers the
    /// protocol's gRPC calls; settings that say where a broker is have no effect.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](polymq_core::ErrorKind::Config) for settings that are not valid, and what the broker
    /// answers.
    pub async fn in_process(name: &'static str, config: KubeMqConfig, service: InProcess) -> Result<Self> {
        config.check()?;
        Self::open(name, config, Target::InProcess(service)).await
    }

    async fn open(name: &'static str, config: KubeMqConfig, target: Target) -> Result<Self> {
        let network = matches!(target, Target::Network);
        let known = capabilities(&config);
        let capabilities = Capabilities { tls: known.tls && network, mutual_tls: known.mutual_tls && network, ..known };
        let link = Link::start(Arc::new(config), target).await?;
        Ok(Self {
            name,
            client_id: link.client_id.as_str().into(),
            link,
            capabilities,
            queues: OnceLock::new(),
            stored: OnceLock::new(),
            plain: OnceLock::new(),
            readers: Mutex::default(),
            closed: OnceCell::new(),
            told: AtomicBool::new(false),
        })
    }

    /// A round trip, and what the server says about itself.
    ///
    /// # Errors
    /// [`ErrorKind::Disconnected`](polymq_core::ErrorKind::Disconnected) when nobody answers in time,
    /// [`ErrorKind::Unauthenticated`](polymq_core::ErrorKind::Unauthenticated) when the token is not good any more.
    pub async fn server_info(&self) -> Result<ServerInfo> {
        self.link.ping().await.map(ServerInfo::from)
    }

    fn config(&self) -> &KubeMqConfig {
        &self.link.config
    }

    /// The stream of all messages to queues, which one begins with the first of them.
    fn queues(&self) -> &Arc<Outbox<ToQueues>> {
        self.queues.get_or_init(|| Outbox::start(self.link.link()))
    }

    fn admin(&self) -> Admin<'_> {
        Admin { link: &self.link, topics: self.config().topics }
    }

    fn may_declare(&self, wanted: bool) -> bool {
        wanted && self.config().declare == Declare::Auto
    }

    fn readers(&self) -> MutexGuard<'_, Readers> {
        self.readers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn consume_queue(
        &self,
        queue: Arc<str>,
        mover: Option<Mover>,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        let shared = Shared::new(queue, Arc::clone(&self.client_id), Arc::clone(self.queues()), options);
        let mut consumer = KubeMqConsumer::start(self.link.link(), shared, mover.map(Arc::new));
        let closed = {
            let mut readers = self.readers();
            readers.consumers.retain(|consumer| !consumer.is_gone());
            readers.movers.retain(|mover| mover.strong_count() > 0);
            if !readers.closed {
                readers.consumers.push(consumer.handle());
                readers.movers.extend(consumer.mover().map(Arc::downgrade));
            }
            readers.closed
        };
        if closed {
            consumer.close().await?;
            return Err(error::closed("consume"));
        }
        Ok(Box::new(consumer))
    }

    async fn listen(&self, topic: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        let store = self.config().topics == Topics::Store;
        let group = options.group.clone().filter(|_| !store).unwrap_or_default();
        let reading =
            Reading { topic: topic.shared_name(), group, store, start: options.start, prefetch: options.prefetch };
        let (listener, heard) = Listener::start(self.link.link(), reading, self.config().connect_timeout).await?;
        let mut readers = self.readers();
        if readers.closed {
            return Err(error::closed("consume"));
        }
        readers.listeners.retain(|listener| listener.strong_count() > 0);
        readers.listeners.push(Arc::downgrade(&heard));
        Ok(Box::new(listener))
    }

    /// Returns what is held and flushes what was handed over; whether all of it was answered. Whoever does it again, because
    /// the first one was given up, waits for the same.
    async fn wind_up(&self) -> bool {
        let Readers { consumers, listeners, movers, .. } = {
            let mut readers = self.readers();
            readers.closed = true;
            readers.clone()
        };
        join_all(consumers.into_iter().map(ConsumerHandle::close)).await;
        listeners.iter().filter_map(Weak::upgrade).for_each(|heard| heard.abandon());
        let movers: Vec<_> = movers.iter().filter_map(Weak::upgrade).collect();
        join_all(movers.iter().map(|mover| mover.close())).await;
        // Bounded for a broker that does not answer: what it has not answered is answered with "unknown outcome".
        let flushing = timeout(CLOSE_TIMEOUT, async {
            if let Some(queues) = self.queues.get() {
                queues.close();
                queues.flush().await;
            }
            if let Some(stored) = self.stored.get() {
                stored.close();
                stored.flush().await;
            }
            if let Some(plain) = self.plain.get() {
                plain.close();
                plain.flush().await;
            }
        });
        let flushed = flushing.await.is_ok();
        self.link.close("closed by this program");
        flushed
    }
}

#[async_trait]
impl Connection for KubeMqConnection {
    fn backend(&self) -> &'static str {
        self.name
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.link.health()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        names::check(address, self.config().topics)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        no_extra(&options.extra)?;
        // Events have patterns, but nothing is sent to one.
        names::check(address, Topics::Store)?;
        // While the first connection is still being made, the first message makes what is to be made. A queue where
        // somebody awaits a reply is that one's to make.
        if !options.temporary && (self.link.is_up() || !self.config().connect_retry) {
            let declare = self.may_declare(options.declare);
            let made = match address.kind() {
                ChannelKind::Queue => self.admin().ensure_queue("declare", address.name(), declare).await,
                ChannelKind::Topic => self.admin().ensure_topic("declare", address.name(), declare).await,
            };
            made.map_err(|error| error.with_channel(address.name()))?;
        }
        let sink = match (address.kind(), self.config().topics) {
            (ChannelKind::Queue, _) => Sink::Queue(Arc::clone(self.queues())),
            (ChannelKind::Topic, Topics::Store) => {
                Sink::Stored(Arc::clone(self.stored.get_or_init(|| Outbox::start(self.link.link()))))
            }
            (ChannelKind::Topic, Topics::Events) => {
                Sink::Plain(Arc::clone(self.plain.get_or_init(|| Outbox::start(self.link.link()))))
            }
        };
        Ok(Box::new(KubeMqProducer::new(sink, address.shared_name(), Arc::clone(&self.client_id))))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        self.declare(address, options).await.map_err(|error| error.with_operation("consume"))?;
        let topic = address.name();
        match (address.kind(), &options.group, self.config().topics) {
            (ChannelKind::Queue, ..) => self.consume_queue(address.shared_name(), None, options).await,
            (ChannelKind::Topic, Some(group), Topics::Store) => {
                let mover = Mover::start(self.link.link(), Arc::clone(self.queues()), topic, group);
                let queue = names::of_group(topic, group).into();
                self.consume_queue(queue, Some(mover), options).await
            }
            (ChannelKind::Topic, ..) => self.listen(address, options).await.map_err(|error| error.with_channel(topic)),
        }
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        no_extra(&options.extra)?;
        let declare = self.may_declare(options.declare);
        let located = |error: Error| error.with_channel(address.name());
        match (address.kind(), &options.group) {
            (ChannelKind::Queue, _) => {
                self.admin().ensure_queue("declare", address.name(), declare).await.map_err(located)?
            }
            (ChannelKind::Topic, group) => {
                group.as_deref().map_or(Ok(()), names::check_group).map_err(located)?;
                self.admin().ensure_topic("declare", address.name(), declare).await.map_err(located)?;
                if let (Some(group), Topics::Store) = (group, self.config().topics) {
                    let live = self.link.live_soon("declare").await?;
                    let position = names::of_position(address.name(), group);
                    if declare {
                        let names = (address.name(), group.as_str());
                        group::make(&self.link, &live, self.queues(), names, options.start).await.map_err(located)?;
                    } else if !topology::queue_exists(&self.link, &live, &position).await.map_err(located)? {
                        return Err(located(error::not_found("declare", format_args!("the group {group:?}"))));
                    }
                }
            }
        }
        if let Some(letters) = options.dead_letters.as_ref().filter(|_| declare) {
            self.admin().ensure_queue("declare", letters.name(), true).await.map_err(located)?;
        }
        Ok(())
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.admin().delete(address, group).await.map_err(|error| error.with_channel(address.name()))
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        self.admin().exists(address, group).await.map_err(|error| error.with_channel(address.name()))
    }

    async fn list(&self) -> Result<Vec<Listed>> {
        self.admin().list().await
    }

    async fn peek(&self, address: &Address, group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        self.admin().peek(address, group, max).await.map_err(|error| error.with_channel(address.name()))
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        self.admin().purge(address.name()).await.map_err(|error| error.with_channel(address.name()))
    }

    async fn ping(&self) -> Result<()> {
        self.link.ping().await.map(drop)
    }

    async fn close(&self) -> Result<()> {
        // Who closes at the same time waits for the same end.
        let flushed = *self.closed.get_or_init(|| self.wind_up()).await;
        if flushed || self.told.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        Err(error::not_in_time("close", CLOSE_TIMEOUT))
    }
}

/// What a server says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerInfo {
    /// Its name.
    pub host: String,
    /// Its version; another one than 2.x is warned of when a connection is made.
    pub version: String,
    /// When it was started.
    pub started: SystemTime,
    /// How long ago that was, by its own clock.
    pub up: Duration,
}

impl From<PingResult> for ServerInfo {
    fn from(about: PingResult) -> Self {
        Self {
            host: about.host,
            version: about.version,
            started: SystemTime::UNIX_EPOCH + Duration::from_secs(about.server_start_time.max(0).unsigned_abs()),
            up: Duration::from_secs(about.server_up_time_seconds.max(0).unsigned_abs()),
        }
    }
}

/// There are no options that only this backend knows.
fn no_extra(extra: &[(String, String)]) -> Result<()> {
    match extra.first() {
        Some((name, _)) => Err(error::config(format!("unknown option {name:?}: this backend has none"))),
        None => Ok(()),
    }
}

impl fmt::Debug for KubeMqConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubeMqConnection").field("config", self.config()).finish_non_exhaustive()
    }
}
