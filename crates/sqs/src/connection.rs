//! What a connection does: makes producers and consumers, declares, deletes and closes.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use polymq_core::{
    Address, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, Error, ErrorKind, HealthWatch, Listed,
    ProduceOptions, Producer, Result, Settings,
};
use tokio::{sync::OnceCell, time::timeout};

use crate::{
    NAME, admin,
    backend::capabilities,
    clients::Live,
    config::{Declare, SqsConfig},
    consumer::{self, ConsumerHandle, SqsConsumer},
    error::{self, Effect},
    link::{Link, LinkHandle},
    names::{self, Name},
    options::{self, Options},
    outbox::{Outbox, Target},
    producer::{CLOSE_TIMEOUT, SqsProducer},
    shared::Shared,
    topology::{self, Plan, Subscribed},
};

/// A connection to SQS and SNS.
pub struct SqsConnection {
    link: LinkHandle,
    capabilities: Capabilities,
    outboxes: Mutex<Vec<Weak<Outbox>>>,
    consumers: Mutex<Consumers>,
    /// Whether everything was answered when it was closed.
    closed: OnceCell<bool>,
    /// Whether the first one who closed has heard so.
    told: AtomicBool,
}

#[derive(Debug, Default)]
struct Consumers {
    all: Vec<ConsumerHandle>,
    /// Those who close have seen all there are: none is added.
    closed: bool,
}

impl SqsConnection {
    /// Connects, as [`Backend::connect`](polymq_core::Backend::connect) does, and keeps the type, for
    /// [`native`](Self::native).
    ///
    /// # Errors
    /// [`ErrorKind::Config`](polymq_core::ErrorKind::Config) for settings that are not valid,
    /// [`ErrorKind::Unauthenticated`](polymq_core::ErrorKind::Unauthenticated) for credentials that were refused or not
    /// found, [`ErrorKind::Disconnected`](polymq_core::ErrorKind::Disconnected) when nobody answers in time.
    pub async fn connect(settings: &Settings) -> Result<Self> {
        let config = Arc::new(SqsConfig::parse(settings)?);
        let capabilities = capabilities(&config);
        let link = Link::start(config).await?;
        Ok(Self {
            link,
            capabilities,
            outboxes: Mutex::default(),
            consumers: Mutex::default(),
            closed: OnceCell::new(),
            told: AtomicBool::new(false),
        })
    }

    /// The client of SQS, for what polymq does not do.
    ///
    /// # Errors
    /// [`ErrorKind::Disconnected`](polymq_core::ErrorKind::Disconnected) while nobody answers.
    pub async fn native(&self) -> Result<aws_sdk_sqs::Client> {
        Ok(self.link.live_soon("connect").await?.sqs.clone())
    }

    /// The client of SNS, likewise.
    ///
    /// # Errors
    /// As [`native`](Self::native).
    pub async fn native_sns(&self) -> Result<aws_sdk_sns::Client> {
        Ok(self.link.live_soon("connect").await?.sns.clone())
    }

    fn config(&self) -> &SqsConfig {
        &self.link.config
    }

    /// Runs requests, bounded; once more with new credentials when those at hand have expired. `with_sns`: SNS is among those
    /// who are asked.
    async fn bounded<T, F>(&self, operation: &'static str, with_sns: bool, run: impl Fn(Live) -> F) -> Result<T>
    where
        F: Future<Output = Result<T>>,
    {
        let mut may_renew = self.config().may_renew();
        loop {
            let live = self.link.live_soon(operation).await?;
            let limit = self.config().connect_timeout;
            let running = run(live.clone());
            let answer = if with_sns {
                self.link.call_with_sns(&live, operation, Effect::Idempotent, limit, running).await
            } else {
                self.link.call(&live, operation, Effect::Idempotent, limit, running).await
            };
            match answer {
                Err(error) if error.kind() == ErrorKind::Unauthenticated && may_renew => may_renew = false,
                answer => return answer.map_err(|error| error.with_operation(operation)),
            }
        }
    }

    fn may_declare(&self, asked: bool) -> bool {
        asked && self.config().declare == Declare::Auto
    }

    /// The topic and the queue of an address, as far as it has them.
    fn names(&self, address: &Address, group: Option<&str>) -> Result<(Option<Name>, Option<Name>)> {
        let fifo = self.config().fifo;
        let topic = match address.kind() {
            ChannelKind::Queue => None,
            ChannelKind::Topic => Some(names::topic(address.name(), fifo)?),
        };
        Ok((topic, names::queue(address, group, fifo)?))
    }

    fn queue(&self, address: &Address) -> Result<Name> {
        names::queue(address, None, self.config().fifo)?.ok_or_else(|| error::invalid("a queue without a name"))
    }

    /// The queue behind an address, its subscription and its dead-letter queue.
    fn plan(&self, address: &Address, wanted: &ConsumeOptions, extra: &Options) -> Result<Plan> {
        let fifo = self.config().fifo;
        let declare = self.may_declare(wanted.declare);
        let subscribed = match address.kind() {
            ChannelKind::Queue => None,
            ChannelKind::Topic => Some(Subscribed {
                topic: names::topic(address.name(), fifo)?,
                declare,
                raw: extra.raw_delivery,
                filter: options::filter(extra, &wanted.kinds)?,
            }),
        };
        let mut plan = match (names::queue(address, wanted.group.as_deref(), fifo)?, subscribed) {
            // Where a reply is awaited, the queue is the consumer's own: nobody else could have made it.
            (Some(queue), topic) => Plan { topic, ..Plan::of_queue(queue, declare || wanted.temporary) },
            (None, Some(topic)) => Plan::own(topic),
            (None, None) => return Err(error::invalid("a queue without a name")),
        };
        plan.dead_letters = match &wanted.dead_letters {
            Some(letters) => names::queue(letters, None, fifo)?,
            None => None,
        };
        // The setting is for all queues, and dead letters have none of their own.
        plan.redrive = if plan.dead_letters.is_some() { extra.redrive } else { 0 };
        if plan.redrive < extra.redrive && extra.own_redrive {
            return Err(error::config(
                "option \"redrive\" for a queue without dead letters, expected a queue for them",
            )
            .with_hint("name the dead letters of this consumer, or leave redrive out"));
        }
        Ok(plan)
    }

    fn consumers(&self) -> MutexGuard<'_, Consumers> {
        self.consumers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outboxes(&self) -> MutexGuard<'_, Vec<Weak<Outbox>>> {
        self.outboxes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns what is held and flushes what was handed over; whether all of it was answered. Whoever does it again, because
    /// the first one was given up, waits for the same.
    async fn wind_up(&self) -> bool {
        let consumers = {
            let mut consumers = self.consumers();
            consumers.closed = true;
            consumers.all.clone()
        };
        let closing = futures_util::future::join_all(consumers.into_iter().map(ConsumerHandle::close));
        let open: Vec<Arc<Outbox>> = self.outboxes().iter().filter_map(Weak::upgrade).collect();
        // Bounded for a service that does not answer: what it has not answered is answered with "unknown outcome".
        let flushing = futures_util::future::join_all(open.iter().map(|outbox| outbox.flush()));
        let (_, flushed) = futures_util::future::join(closing, timeout(CLOSE_TIMEOUT, flushing)).await;
        self.link.close("closed by this program");
        open.iter().for_each(|outbox| outbox.close());
        flushed.is_ok()
    }

    fn outbox(&self, target: Target, declare: bool, max_batch: usize) -> Arc<Outbox> {
        let outbox = Outbox::start(self.link.link(), target, declare, max_batch);
        let mut outboxes = self.outboxes();
        outboxes.retain(|outbox| outbox.strong_count() > 0);
        outboxes.push(Arc::downgrade(&outbox));
        outbox
    }
}

#[async_trait]
impl Connection for SqsConnection {
    fn backend(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.link.health()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        match address.kind() {
            ChannelKind::Queue => names::queue(address, None, self.config().fifo).map(drop),
            ChannelKind::Topic => names::topic(address.name(), self.config().fifo).map(drop),
        }
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        let extra = Options::read(self.config(), &options.extra)?;
        let is_topic = address.kind() == ChannelKind::Topic;
        let fifo = self.config().fifo;
        let (target, max) = if is_topic {
            (Target::Topic(names::topic(address.name(), fifo)?), self.config().max_topic_message)
        } else {
            (Target::Queue(self.queue(address)?), self.config().max_message)
        };
        let (Target::Queue(name) | Target::Topic(name)) = &target;
        let is_fifo = name.fifo;
        // A queue where somebody awaits a reply is not made again when nobody does any more.
        let outbox = self.outbox(target, self.may_declare(options.declare && !options.temporary), max);
        let subject = extra.subject.filter(|_| is_topic);
        let producer = SqsProducer::new(Arc::clone(&outbox), address.shared_name(), max, (is_fifo, is_topic), subject);
        // While the first connection is still being made, what is to be made is made before the first message.
        if self.link.is_up() || !self.config().connect_retry {
            let live = self.link.live_soon("declare").await?;
            outbox.ensure(&live).await.map_err(|error| error::copy(&error).with_channel(address.name()))?;
        }
        Ok(Box::new(producer))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        let extra = Options::read(self.config(), &options.extra)?;
        let plan = self.plan(address, options, &extra)?;
        let located = |error: Error| error.with_channel(address.name());
        let url = self.bounded("consume", plan.topic.is_some(), |live| {
            let plan = plan.clone();
            async move { topology::ensure(&live, &plan).await }
        });
        let url = match url.await {
            Ok(url) => url,
            Err(error) => {
                // A queue of this consumer alone may be made already, and nobody else knows its name.
                if let Some(live) = self.link.live_now().filter(|_| plan.own) {
                    let limit = self.config().connect_timeout;
                    tokio::spawn(async move { timeout(limit, topology::abandon(&live, &plan)).await });
                }
                return Err(located(error));
            }
        };
        let lease_cap = self.config().lease_cap.min(options.max_lease);
        let shared = Shared::new(
            (options.prefetch, options.prefetch_bytes),
            (consumer::lease(options.lease.min(lease_cap)), lease_cap),
            plan.queue.fifo,
            plan.redrive > 0,
            self.config().max_message,
        );
        let unwrap = extra.unwrap || address.kind() == ChannelKind::Topic;
        let mut consumer = SqsConsumer::start(self.link.link(), shared, plan, url, unwrap);
        let closed = {
            let mut consumers = self.consumers();
            consumers.all.retain(|consumer| !consumer.is_gone());
            if !consumers.closed {
                consumers.all.push(consumer.handle());
            }
            consumers.closed
        };
        if closed {
            consumer.close().await?;
            return Err(error::closed("consume"));
        }
        Ok(Box::new(consumer))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        let extra = Options::read(self.config(), &options.extra)?;
        let plan = self.plan(address, options, &extra)?;
        let declared = self.bounded("declare", plan.topic.is_some(), |live| {
            let plan = plan.clone();
            async move {
                match &plan.topic {
                    // A queue that belongs to one consumer is made by it.
                    Some(subscribed) if plan.own => {
                        topology::ensure_topic(&live, &subscribed.topic, subscribed.declare).await.map(drop)
                    }
                    _ => topology::ensure(&live, &plan).await.map(drop),
                }
            }
        });
        declared.await.map_err(|error| error.with_channel(address.name()))
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        let (topic, queue) = self.names(address, group)?;
        let deleted = self.bounded("delete", topic.is_some(), |live| {
            let (topic, queue) = (topic.clone(), queue.clone());
            async move {
                match (topic, queue) {
                    (None, Some(queue)) => topology::delete_queue(&live, &queue).await,
                    (Some(topic), Some(queue)) => topology::leave(&live, &topic, &queue).await,
                    (Some(topic), None) => topology::delete_topic(&live, &topic).await,
                    (None, None) => Ok(()),
                }
            }
        });
        deleted.await.map_err(|error| error.with_channel(address.name()))
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        let (topic, queue) = self.names(address, group)?;
        let found = self.bounded("exists", topic.is_some(), |live| {
            let (topic, queue) = (topic.clone(), queue.clone());
            async move { admin::exists(&live, topic.as_ref(), queue.as_ref()).await }
        });
        found.await.map_err(|error| error.with_channel(address.name()))
    }

    async fn list(&self) -> Result<Vec<Listed>> {
        let fifo = self.config().fifo;
        self.bounded("list", true, |live| async move { admin::list(&live, fifo).await }).await
    }

    async fn bind(&self, queue: &Address, topic: &Address) -> Result<()> {
        let fifo = self.config().fifo;
        let (topic, declare) = (names::topic(topic.name(), fifo)?, self.may_declare(true));
        let subscribed = Subscribed { topic, declare, raw: true, filter: None };
        let plan = Plan { topic: Some(subscribed), ..Plan::of_queue(self.queue(queue)?, declare) };
        let bound = self.bounded("bind", true, |live| {
            let plan = plan.clone();
            async move { topology::bind(&live, &plan).await.map(drop) }
        });
        bound.await.map_err(|error| error.with_channel(queue.name()))
    }

    async fn unbind(&self, queue: &Address, topic: &Address) -> Result<()> {
        let (queue_name, topic) = (self.queue(queue)?, names::topic(topic.name(), self.config().fifo)?);
        let unbound = self.bounded("unbind", true, |live| {
            let (queue, topic) = (queue_name.clone(), topic.clone());
            async move { topology::unbind(&live, &topic, &queue).await }
        });
        unbound.await.map_err(|error| error.with_channel(queue.name()))
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        let queue = self.queue(address)?;
        let url = self.bounded("purge", false, |live| {
            let queue = queue.clone();
            async move { topology::ensure_queue(&live, &queue, false, &[]).await }
        });
        let url = url.await.map_err(|error| error.with_channel(address.name()))?;
        admin::purge(&self.link, &url).await.map_err(|error| error.with_channel(address.name()))
    }

    async fn ping(&self) -> Result<()> {
        self.link.ping().await
    }

    async fn close(&self) -> Result<()> {
        // Who closes at the same time waits for the same end.
        let flushed = *self.closed.get_or_init(|| self.wind_up()).await;
        if flushed || self.told.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Timeout, "not everything was answered in time")
            .with_backend(NAME)
            .with_operation("close"))
    }
}

impl fmt::Debug for SqsConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqsConnection").field("config", self.config()).finish_non_exhaustive()
    }
}
