//! What a connection does: makes producers and consumers, declares, counts, deletes and closes.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use async_trait::async_trait;
use polymq_core::{
    Address, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, Error, ErrorKind, HealthWatch,
    ProduceOptions, Producer, Result, Settings, Stats,
};
use tokio::{sync::OnceCell, time::timeout};

use crate::{
    NAME, admin,
    backend::capabilities,
    config::{AmqpConfig, Declare},
    consumer::{AmqpConsumer, ConsumerHandle, Subscription},
    error,
    health::HealthBoard,
    link::{CLOSE_TIMEOUT, Link, LinkHandle, Live, Role},
    options::Extra,
    pool::{Publishers, Route},
    producer::AmqpProducer,
    topology::{self, Binding, QueuePlan},
};

/// A connection to a RabbitMQ broker: in fact up to two, one that publishes and one that consumes.
pub struct AmqpConnection {
    config: Arc<AmqpConfig>,
    capabilities: Capabilities,
    health: Arc<HealthBoard>,
    publish: Arc<LinkHandle>,
    consume: OnceCell<Arc<LinkHandle>>,
    publishers: Arc<Publishers>,
    consumers: Mutex<Vec<ConsumerHandle>>,
    /// Whether everything was answered when it was closed.
    closed: OnceCell<bool>,
    /// Whether the first one who closed has heard so.
    told: AtomicBool,
}

impl AmqpConnection {
    /// Connects, as [`Backend::connect`](polymq_core::Backend::connect) does, and keeps the type, for [`native`](Self::native).
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for settings that are not valid, [`ErrorKind::Unauthenticated`] for a login that was
    /// refused, [`ErrorKind::PermissionDenied`] for a virtual host that does not exist or is not allowed,
    /// [`ErrorKind::Disconnected`] when nobody answers in time.
    pub async fn connect(settings: &Settings) -> Result<Self> {
        let config = Arc::new(AmqpConfig::parse(settings)?);
        let health = Arc::new(HealthBoard::default());
        let publish = start(Role::Publish, &config, &health).await?;
        Ok(Self {
            capabilities: capabilities(&config),
            publishers: Publishers::new(Arc::clone(&publish), Arc::clone(&config)),
            config,
            health,
            publish,
            consume: OnceCell::new(),
            consumers: Mutex::default(),
            closed: OnceCell::new(),
            told: AtomicBool::new(false),
        })
    }

    /// The client library's own connection, the one that publishes, for what polymq does not do. It ends when it is
    /// lost: ask again then.
    ///
    /// # Errors
    /// [`ErrorKind::Disconnected`] while there is none.
    pub async fn native(&self) -> Result<Arc<lapin::Connection>> {
        Ok(self.publish.live_soon("connect").await?.connection)
    }

    /// Runs an operation on the publishing connection, bounded.
    async fn bounded<T, F>(&self, operation: &'static str, run: impl FnOnce(Live) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let live = self.publish.live_soon(operation).await?;
        if let Some(reason) = &live.blocked {
            // Nothing is written on this connection until the broker has room again.
            return Err(Error::new(ErrorKind::Busy, format!("the broker takes nothing at present: {reason}"))
                .with_backend(NAME)
                .with_operation(operation));
        }
        let requests = self.publish.unless_lost(&live, operation, run(live.clone()));
        match timeout(self.config.connect_timeout, requests).await {
            Ok(result) => result.map_err(|error| error.with_operation(operation)),
            Err(_) => Err(error::timeout(operation)),
        }
    }

    /// The same for what changes something. It may be done though nobody was told: then nobody must take it for not done.
    async fn changing<T, F>(&self, operation: &'static str, run: impl FnOnce(Live) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let asked = AtomicBool::new(false);
        let run = |live| {
            asked.store(true, Ordering::Relaxed);
            run(live)
        };
        let changed = self.bounded(operation, run).await;
        changed.map_err(|error| match error.kind() {
            ErrorKind::Timeout | ErrorKind::Disconnected if asked.load(Ordering::Relaxed) => {
                error::unknown(operation, error.message())
            }
            _ => error,
        })
    }

    /// The connection that consumes, made for the first consumer; none for who comes after [`close`](Connection::close),
    /// which would not end it any more.
    async fn consume_link(&self) -> Result<Arc<LinkHandle>> {
        if self.publish.is_closed() {
            return Err(self.publish.ended("consume"));
        }
        let start = || async {
            let (config, health) = (Arc::clone(&self.config), Arc::clone(&self.health));
            let started = self.publish.spawn(async move { start(Role::Consume, &config, &health).await });
            started.await.unwrap_or_else(|_| Err(error::closed("consume")))
        };
        let link = Arc::clone(self.consume.get_or_try_init(start).await?);
        if self.publish.is_closed() {
            // Who closed meanwhile has not seen it.
            link.close().await;
            return Err(self.publish.ended("consume"));
        }
        Ok(link)
    }

    /// The queue behind an address, its binding and its dead-letter queue.
    fn plan(
        &self,
        address: &Address,
        group: Option<&str>,
        dead_letters: Option<&Address>,
        extra: &Extra,
    ) -> Result<QueuePlan> {
        let name = topology::queue_name(address, group)?;
        let exclusive = name.is_none();
        let name = name.unwrap_or_else(|| address.name().to_owned());
        let binding = (address.kind() == ChannelKind::Topic)
            .then(|| Binding { exchange: Arc::clone(&extra.exchange), pattern: address.shared_name() });
        // Producers make the same queue as consumers, though only these know of dead letters: the arguments of a queue
        // cannot be changed later.
        let by_default = (!exclusive && !name.ends_with(".dlq")).then(|| address.dead_letters(group));
        let dead_letters = dead_letters.cloned().or(by_default).filter(|queue| queue.name() != name);
        if let Some(queue) = &dead_letters {
            topology::check_queue_name(queue.name())?;
        }
        Ok(QueuePlan {
            name: name.into(),
            dead_letters: dead_letters.map(|queue| queue.shared_name()),
            binding,
            exclusive,
            queue_type: extra.queue_type,
            declare: extra.declare,
        })
    }

    /// Stops consumers and flushes what was handed over; whether all of it was answered. Whoever does it again, because the
    /// first one was given up, waits for the same.
    async fn wind_up(&self) -> bool {
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        futures_util::future::join_all(consumers.iter_mut().map(ConsumerHandle::stop)).await;
        // Bounded for a broker that does not answer: what it has not confirmed is answered with "unknown outcome".
        let flushed = timeout(CLOSE_TIMEOUT, self.publishers.flush_all()).await;
        // Not before the copies of what is retried are confirmed, which acknowledges the originals.
        consumers.iter().for_each(ConsumerHandle::abandon);
        // First the one by which a consumer that comes meanwhile knows that it is too late.
        self.publish.close().await;
        if let Some(consume) = self.consume.get() {
            consume.close().await;
        }
        self.health.closed("closed by this program");
        flushed.is_ok()
    }

    /// The queue that counts, purges and deletes are about.
    fn named(address: &Address, group: Option<&str>) -> Result<String> {
        topology::queue_name(address, group)?.ok_or_else(|| {
            error::invalid(format!("the topic {:?} has no queue of its own", address.name())).with_hint("name a group")
        })
    }
}

async fn start(role: Role, config: &Arc<AmqpConfig>, health: &Arc<HealthBoard>) -> Result<Arc<LinkHandle>> {
    Link::start(role, Arc::clone(config), Arc::clone(health)).await
}

#[async_trait]
impl Connection for AmqpConnection {
    fn backend(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.health.reporter.watch()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        topology::check_address(address)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        let extra = Extra::of(&self.config, &options.extra, options.declare)?;
        let route = match address.kind() {
            // Where somebody waits for a reply: also a queue that the broker has named, or its pseudo-queue for replies. What
            // no queue takes is returned.
            ChannelKind::Queue if options.temporary => Route {
                exchange: "".into(),
                routing_key: address.shared_name(),
                plan: None,
                declare_exchange: false,
                persistent: extra.persistent,
                queue_type: extra.queue_type,
                temporary: true,
                ensured: AtomicU64::new(0),
            },
            ChannelKind::Queue => {
                let plan = self.plan(address, None, None, &extra)?;
                Route {
                    exchange: "".into(),
                    routing_key: address.shared_name(),
                    plan: (extra.declare == Declare::Auto).then_some(plan),
                    declare_exchange: false,
                    persistent: extra.persistent,
                    queue_type: extra.queue_type,
                    temporary: false,
                    ensured: AtomicU64::new(0),
                }
            }
            ChannelKind::Topic => {
                if topology::has_wildcard(address.name()) {
                    let problem = format!("{:?} holds a wildcard; messages are sent to one topic", address.name());
                    return Err(error::invalid(problem).with_hint("name the topic"));
                }
                Route {
                    declare_exchange: extra.declare == Declare::Auto,
                    exchange: Arc::clone(&extra.exchange),
                    routing_key: address.shared_name(),
                    plan: None,
                    persistent: extra.persistent,
                    queue_type: extra.queue_type,
                    temporary: false,
                    ensured: AtomicU64::new(0),
                }
            }
        };
        // While the first connection is still being made, what is to be made is made before the first message.
        if !options.temporary && (self.publish.is_up() || !self.config.connect_retry) {
            let (route, extra) = (&route, &extra);
            let ensured = self.bounded("declare", |live| async move {
                let checked = match address.kind() {
                    ChannelKind::Queue if route.plan.is_none() => {
                        topology::ensure(&live.connection, &self.plan(address, None, None, extra)?).await
                    }
                    ChannelKind::Topic if !route.declare_exchange => {
                        topology::ensure_exchange(&live.connection, &route.exchange, extra.declare).await
                    }
                    _ => route.ensure(&live.connection, extra.declare).await,
                };
                checked.map(|()| route.ensured.store(live.generation, Ordering::Release))
            });
            ensured.await.map_err(|error| error.with_channel(address.name()))?;
        }
        Ok(Box::new(AmqpProducer::new(Arc::clone(&self.publishers), Arc::new(route))))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        let extra = Extra::of(&self.config, &options.extra, options.declare)?;
        let group = options.group.as_deref();
        let mut plan = self.plan(address, group, options.dead_letters.as_ref(), &extra)?;
        if options.temporary {
            (plan.exclusive, plan.dead_letters) = (true, None);
        }
        let subscription = Subscription {
            // Zero would mean no bound at all.
            prefetch: u16::try_from(options.prefetch).unwrap_or(u16::MAX).max(1),
            wildcard: plan.binding.is_some() && topology::has_wildcard(address.name()),
            plan,
        };
        let link = self.consume_link().await?;
        let (consumer, handle) = AmqpConsumer::start(
            link,
            Arc::clone(&self.publishers),
            subscription,
            self.config.connect_retry,
            self.config.connect_timeout,
        )
        .await
        .map_err(|error| error.with_channel(address.name()))?;
        let mut consumers = self.consumers.lock().unwrap_or_else(PoisonError::into_inner);
        consumers.retain(|consumer| !consumer.is_gone());
        consumers.push(handle);
        Ok(Box::new(consumer))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        let extra = Extra::of(&self.config, &options.extra, options.declare)?;
        let plan = self.plan(address, options.group.as_deref(), options.dead_letters.as_ref(), &extra)?;
        let declared = self.bounded("declare", |live| async move {
            if let Some(binding) = &plan.binding {
                topology::ensure_exchange(&live.connection, &binding.exchange, plan.declare).await?;
            }
            // A queue that belongs to one consumer is made by it.
            if plan.exclusive { Ok(()) } else { topology::ensure(&live.connection, &plan).await }
        });
        declared.await.map_err(|error| error.with_channel(address.name()))
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        let Some(queue) = topology::queue_name(address, group)? else { return Ok(()) };
        let deleted = self.changing("delete", |live| async move { admin::delete(&live, &queue).await });
        match deleted.await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            deleted => deleted.map_err(|error| error.with_channel(address.name())),
        }
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        let queue = topology::queue_name(address, group)?;
        let found = self.bounded("exists", |live| async move {
            match queue {
                Some(queue) => topology::exists(&live.connection, &queue).await,
                // A topic without a group is the exchange, whatever the topic.
                None => topology::exchange_exists(&live.connection, &self.config.exchange).await,
            }
        });
        found.await.map_err(|error| error.with_channel(address.name()))
    }

    async fn bind(&self, queue: &Address, topic: &Address) -> Result<()> {
        let extra = Extra::of(&self.config, &[], true)?;
        let plan = self.plan(queue, None, None, &extra)?;
        let binding = Binding { exchange: Arc::clone(&extra.exchange), pattern: topic.shared_name() };
        let bound = self.changing("bind", |live| async move {
            topology::ensure_exchange(&live.connection, &binding.exchange, plan.declare).await?;
            topology::ensure(&live.connection, &plan).await?;
            // Whatever the settings say of what is made in passing: this was asked for.
            admin::bind(&live, &plan.name, &binding).await
        });
        bound.await.map_err(|error| error.with_channel(queue.name()))
    }

    async fn unbind(&self, queue: &Address, topic: &Address) -> Result<()> {
        let exchange = self.config.exchange.clone();
        let unbound =
            self.changing(
                "unbind",
                |live| async move { admin::unbind(&live, queue.name(), &exchange, topic.name()).await },
            );
        match unbound.await {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            unbound => unbound.map_err(|error| error.with_channel(queue.name())),
        }
    }

    async fn stats(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        let queue = Self::named(address, group)?;
        let counted = self.bounded("stats", |live| async move { admin::stats(&live, &queue).await });
        counted.await.map_err(|error| error.with_channel(address.name()))
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        let queue = Self::named(address, None)?;
        let purged = self.changing("purge", |live| async move { admin::purge(&live, &queue).await });
        purged.await.map_err(|error| error.with_channel(address.name()))
    }

    async fn ping(&self) -> Result<()> {
        self.bounded("ping", |live| async move { admin::ping(&live).await }).await
    }

    async fn close(&self) -> Result<()> {
        // Who closes at the same time waits for the same end.
        let flushed = *self.closed.get_or_init(|| self.wind_up()).await;
        if flushed || self.told.swap(true, Ordering::AcqRel) { Ok(()) } else { Err(error::timeout("close")) }
    }
}

impl fmt::Debug for AmqpConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmqpConnection").field("config", &self.config).finish_non_exhaustive()
    }
}
