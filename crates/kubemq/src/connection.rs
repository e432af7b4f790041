//! What a connection does: makes producers and consumers, declares, deletes and closes.

use std::{
    fmt,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use polymq_core::{
    Address, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, Error, HealthWatch, Listed, Message,
    ProduceOptions, Producer, Result, Settings,
};
use tokio::{sync::OnceCell, time::timeout};

use crate::{
    NAME,
    backend::capabilities,
    config::{Declare, KubeMqConfig},
    connect::Target,
    consumer::{ConsumerHandle, KubeMqConsumer},
    error,
    link::{Link, LinkHandle},
    names,
    outbox::{Outbox, ToQueues},
    producer::{CLOSE_TIMEOUT, KubeMqProducer, Sink},
    shared::Shared,
    topology::{self, Pattern},
};

/// A connection to a broker.
pub struct KubeMqConnection {
    link: LinkHandle,
    client_id: Arc<str>,
    capabilities: Capabilities,
    queues: OnceLock<Arc<Outbox<ToQueues>>>,
    consumers: Mutex<Vec<ConsumerHandle>>,
    /// Whether everything was answered when it was closed.
    closed: OnceCell<bool>,
    /// Whether the first one who closed has heard so.
    told: AtomicBool,
}

impl KubeMqConnection {
    /// Connects, as [`Backend::connect`](polymq_core::Backend::connect) does, and keeps the type.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](polymq_core::ErrorKind::Config) for settings that are not valid,
    /// [`ErrorKind::Unauthenticated`](polymq_core::ErrorKind::Unauthenticated) for a token that was refused,
    /// [`ErrorKind::Disconnected`](polymq_core::ErrorKind::Disconnected) when nobody answers in time.
    pub async fn connect(settings: &Settings) -> Result<Self> {
        Self::open(KubeMqConfig::parse(settings)?, Target::Network).await
    }

    async fn open(config: KubeMqConfig, target: Target) -> Result<Self> {
        let capabilities = capabilities(&config);
        let link = Link::start(Arc::new(config), target).await?;
        Ok(Self {
            client_id: link.client_id.as_str().into(),
            link,
            capabilities,
            queues: OnceLock::new(),
            consumers: Mutex::default(),
            closed: OnceCell::new(),
            told: AtomicBool::new(false),
        })
    }

    fn config(&self) -> &KubeMqConfig {
        &self.link.config
    }

    /// The stream of all messages to queues, which one begins with the first of them.
    fn queues(&self) -> &Arc<Outbox<ToQueues>> {
        self.queues.get_or_init(|| Outbox::start(self.link.link()))
    }

    fn may_declare(&self, wanted: bool) -> bool {
        wanted && self.config().declare == Declare::Auto
    }

    /// Makes a queue, or sees that it is there.
    async fn ensure_queue(&self, operation: &'static str, queue: &str, declare: bool) -> Result<()> {
        let link: &Link = &self.link;
        let live = link.live_soon(operation).await?;
        if topology::queue_exists(link, &live, queue).await? {
            return Ok(());
        }
        if !declare {
            return Err(error::not_found(operation, format_args!("the queue {queue:?}")));
        }
        match topology::create(link, &live, Pattern::Queues, queue).await {
            // It is made when it is used.
            Err(error) if error.kind() == polymq_core::ErrorKind::Unsupported => Ok(()),
            made => made,
        }
    }

    fn unsupported_topic(address: &Address) -> Error {
        Error::unsupported(NAME, format_args!("the {address}"))
    }

    /// Returns what is held and flushes what was handed over; whether all of it was answered.
    async fn wind_up(&self) -> bool {
        let consumers = std::mem::take(&mut *self.consumers.lock().unwrap_or_else(PoisonError::into_inner));
        futures_util::future::join_all(consumers.into_iter().map(ConsumerHandle::close)).await;
        let mut flushed = true;
        if let Some(queues) = self.queues.get() {
            queues.close();
            // Bounded for a broker that does not answer: what it has not answered is answered with "unknown outcome".
            flushed &= timeout(CLOSE_TIMEOUT, queues.flush()).await.is_ok();
        }
        self.link.close("closed by this program");
        flushed
    }
}

#[async_trait]
impl Connection for KubeMqConnection {
    fn backend(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.link.health.watch()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        names::check(address, self.config().topics)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        no_extra(&options.extra)?;
        let sink = match address.kind() {
            ChannelKind::Queue => {
                // While the first connection is still being made, the first message makes what is to be made. A queue where
                // somebody awaits a reply is that one's to make.
                if !options.temporary && (self.link.is_up() || !self.config().connect_retry) {
                    let declare = self.may_declare(options.declare);
                    self.ensure_queue("declare", address.name(), declare)
                        .await
                        .map_err(|error| error.with_channel(address.name()))?;
                }
                Sink::Queue(Arc::clone(self.queues()))
            }
            ChannelKind::Topic => return Err(Self::unsupported_topic(address)),
        };
        Ok(Box::new(KubeMqProducer::new(sink, address.shared_name(), Arc::clone(&self.client_id))))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        self.declare(address, options).await.map_err(|error| error.with_operation("consume"))?;
        let queue = address.shared_name();
        let shared = Shared::new(queue, Arc::clone(&self.client_id), Arc::clone(self.queues()), options.prefetch);
        let consumer = KubeMqConsumer::start(self.link.link(), shared);
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        consumers.retain(|consumer| !consumer.is_gone());
        consumers.push(consumer.handle());
        Ok(Box::new(consumer))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        no_extra(&options.extra)?;
        if address.kind() == ChannelKind::Topic {
            return Err(Self::unsupported_topic(address));
        }
        let declare = self.may_declare(options.declare);
        let located = |error: Error| error.with_channel(address.name());
        self.ensure_queue("declare", address.name(), declare).await.map_err(located)?;
        if let Some(letters) = options.dead_letters.as_ref().filter(|_| declare) {
            self.ensure_queue("declare", letters.name(), true).await.map_err(located)?;
        }
        Ok(())
    }

    async fn delete(&self, address: &Address, _group: Option<&str>) -> Result<()> {
        let live = self.link.live_soon("delete").await?;
        let deleted = topology::delete(&self.link, &live, Pattern::Queues, address.name()).await;
        deleted.map_err(|error| error.with_channel(address.name()))
    }

    async fn exists(&self, address: &Address, _group: Option<&str>) -> Result<bool> {
        let live = self.link.live_soon("exists").await?;
        topology::queue_exists(&self.link, &live, address.name())
            .await
            .map_err(|error| error.with_channel(address.name()))
    }

    async fn list(&self) -> Result<Vec<Listed>> {
        let live = self.link.live_soon("list").await?;
        let mut listed = Vec::new();
        for queue in topology::list(&self.link, &live, Pattern::Queues, "").await? {
            if let Some((address, group)) = names::of_queue(&queue.name) {
                listed.push(Listed { address, group, stats: None });
            }
        }
        Ok(listed)
    }

    async fn peek(&self, address: &Address, _group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        let located = |error: Error| error.with_channel(address.name());
        self.ensure_queue("peek", address.name(), false).await.map_err(located)?;
        let live = self.link.live_soon("peek").await?;
        topology::peek(&self.link, &live, address.name(), max).await.map_err(located)
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        let located = |error: Error| error.with_channel(address.name());
        self.ensure_queue("purge", address.name(), false).await.map_err(located)?;
        let live = self.link.live_soon("purge").await?;
        topology::purge(&self.link, &live, address.name()).await.map_err(located)
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
