//! What a connection does: makes producers and consumers, declares, counts, deletes and closes.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Address, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, Error, ErrorKind, HealthWatch,
    ProduceOptions, Producer, Result, Settings, Start, Stats,
};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList, admin::AdminClient, client::DefaultClientContext, consumer::Consumer as _,
};
use tokio::{sync::oneshot, time::timeout};

use crate::{
    NAME,
    backend::capabilities,
    client,
    config::{Declare, KafkaConfig},
    consumer::KafkaConsumer,
    error,
    hub::Hub,
    link::{Link, Status, lock},
    partition,
    poller::{self, Context, Plan},
    position::Position,
    producer::{CLOSE_TIMEOUT, KafkaProducer},
    publisher::{self, Native, Publisher, configuration},
    settle::KafkaSettler,
    topology::{self, Names, Wanted},
    transactions::Transactions,
};

/// A client that administers, for one use.
struct Admin(Option<AdminClient<DefaultClientContext>>);

impl Admin {
    fn client(&self) -> Result<&AdminClient<DefaultClientContext>> {
        self.0.as_ref().ok_or_else(|| error::closed("declare"))
    }
}

impl Drop for Admin {
    fn drop(&mut self) {
        // Waits for a thread of its own, which is nothing to do in async code.
        let client = self.0.take();
        std::thread::spawn(move || drop(client));
    }
}

/// A connection to a Kafka cluster: one client that sends, and one for each channel and group that is consumed.
pub struct KafkaConnection {
    config: Arc<KafkaConfig>,
    capabilities: Capabilities,
    link: Arc<Link>,
    publisher: Arc<Publisher>,
    hubs: Mutex<HashMap<Names, Arc<Hub>>>,
    /// Subscriptions without a group, each on its own.
    singles: Mutex<Vec<Arc<Hub>>>,
}

impl KafkaConnection {
    /// Connects, as [`Backend::connect`](polymq_core::Backend::connect) does, and keeps the type, for
    /// [`native_config`](Self::native_config). With `connect_retry` it waits until there is a broker.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for settings that are not valid, [`ErrorKind::Unauthenticated`] for a login that was
    /// refused, [`ErrorKind::Disconnected`] when nobody answers in time.
    pub async fn connect(settings: &Settings) -> Result<Self> {
        let config = Arc::new(KafkaConfig::parse(settings)?);
        let link = Link::new();
        let (first, connected) = oneshot::channel();
        let publisher = Publisher::start(Arc::clone(&config), Arc::clone(&link), first)?;
        let connection = Self {
            capabilities: capabilities(&config),
            config,
            link,
            publisher,
            hubs: Mutex::default(),
            singles: Mutex::default(),
        };
        // Dropped on every early return below, which ends the client and its threads.
        let mut status = connection.link.watch();
        let refused = status.wait_for(|status| matches!(status, Status::Refused(_)));
        tokio::select! {
            biased;
            answer = connected => answer.unwrap_or_else(|_| Err(error::closed("connect")))?,
            Ok(status) = refused => {
                if let Status::Refused(reason) = &*status {
                    return Err(Error::new(ErrorKind::Unauthenticated, reason.to_string())
                        .with_backend(NAME)
                        .with_operation("connect")
                        .with_hint("check user, password and mechanism"));
                }
            }
        }
        Ok(connection)
    }

    /// The client library's settings with which this connection's clients are made, the login included: for clients of
    /// your own that do what polymq does not (other partitioners, quotas).
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the settings are not valid, which `connect` would have said.
    pub fn native_config(&self) -> Result<ClientConfig> {
        client::common(&self.config)
    }

    fn admin_timeout(&self) -> Duration {
        self.config.connect_timeout
    }

    /// Runs something that blocks.
    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        run: impl FnOnce(&Native, &Arc<KafkaConfig>, &Arc<Link>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        if let Some(error) = self.link.down_error(operation) {
            return Err(error);
        }
        let Some(native) = self.publisher.native() else { return Err(error::closed(operation)) };
        let (config, link) = (Arc::clone(&self.config), Arc::clone(&self.link));
        let run = tokio::task::spawn_blocking(move || run(&native, &config, &link));
        let result = run.await.unwrap_or_else(|_| Err(error::closed(operation)));
        result.map_err(|error| error.with_operation(operation))
    }

    /// A client that administers. It is needed rarely, so it has no connection for longer.
    fn admin(&self) -> Result<Admin> {
        self.native_config()?.create().map(|client| Admin(Some(client))).map_err(configuration)
    }

    /// Makes sure that these topics exist, or makes them.
    async fn ensure(&self, wanted: Vec<Wanted>, declare: bool) -> Result<()> {
        let declare = declare && self.config.declare == Declare::Auto;
        let missing = self
            .blocking("declare", move |native, config, _| {
                let client = publisher::inner(native);
                let mut missing = Vec::new();
                for wanted in wanted {
                    match topology::partitions(client, &wanted.name, config.connect_timeout)? {
                        Some(_) => {}
                        None if declare => missing.push(wanted),
                        // Without its delay topic a channel can be used all the same, but for delays.
                        None if wanted.is_delay => {}
                        None => return Err(topology::not_found(&wanted.name)),
                    }
                }
                Ok(missing)
            })
            .await?;
        if missing.is_empty() {
            return Ok(());
        }
        topology::create(self.admin()?.client()?, &self.config, &missing).await?;
        self.blocking("declare", move |native, config, _| {
            let names: Vec<&str> = missing.iter().map(|wanted| &*wanted.name).collect();
            topology::await_existence(publisher::inner(native), &names, true, config.connect_timeout)
        })
        .await
    }

    async fn declare_all(&self, names: &Names, options: &ConsumeOptions) -> Result<()> {
        let mut wanted = Wanted::of(names);
        if let Some(letters) = options.dead_letters.as_ref().filter(|_| !options.temporary) {
            let letters = Names::of(letters, None);
            letters.check()?;
            // Made by us only: without `declare` nobody says that dead letters are needed.
            if options.declare {
                wanted.extend(Wanted::of(&letters));
            }
        }
        self.ensure(wanted, options.declare).await
    }

    /// How a consumer may differ from the rest.
    fn plan(names: &Names, options: &ConsumeOptions) -> Result<Plan> {
        let mut seek = None;
        for (key, value) in &options.extra {
            match key.as_str() {
                "position" => seek = Some(Position::parse(value)?),
                _ => return Err(error::config(format!("unknown option {key:?}; known: position"))),
            }
        }
        if options.transactional && names.group.is_none() {
            return Err(Error::unsupported(NAME, "a transactional consumer without a group").with_hint("name a group"));
        }
        Ok(Plan {
            prefetch: options.prefetch,
            bytes: options.prefetch_bytes,
            start: match options.start {
                _ if names.is_queue => Position::First,
                Start::Earliest => Position::First,
                Start::New => Position::End,
            },
            seek,
            has_delay: names.delay.is_some(),
            transactional: options.transactional,
        })
    }

    /// The hub of a channel and group, with a share in it.
    async fn join(&self, names: &Names, mut plan: Plan) -> Result<KafkaConsumer> {
        loop {
            let (hub, is_new) = self.hub(names, plan.transactional)?;
            if is_new {
                plan.has_delay = match names.delay.clone() {
                    None => false,
                    Some(delay) => self.has_topic(delay).await?,
                };
            }
            let Some((share, arrived)) = hub.join(plan.prefetch, plan.bytes) else {
                // The one before it is just leaving; two members of one process would share for nothing.
                let mut ended = hub.ended();
                let _ = timeout(CLOSE_TIMEOUT, ended.wait_for(|ended| *ended)).await;
                self.forget(names, &hub);
                continue;
            };
            if !is_new && plan.seek.is_some() {
                hub.part(share);
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "the group is consumed already, so its position cannot be set",
                )
                .with_backend(NAME)
                .with_hint("set the position with its first consumer"));
            }
            if hub.transactions().is_some() != plan.transactional {
                hub.part(share);
                return Err(Error::new(
                    ErrorKind::Conflict,
                    "the group has consumers in this process that are transactional, and ones that are not",
                )
                .with_backend(NAME)
                .with_hint("make all of them transactional, or none"));
            }
            let settler = KafkaSettler::new(Arc::clone(&hub), Arc::clone(&self.publisher));
            let consumer = KafkaConsumer::new(Arc::clone(&hub), share, arrived, settler);
            if is_new {
                let (ready, begun) = oneshot::channel();
                poller::start(Arc::clone(&hub), Arc::clone(&self.config), Arc::clone(&self.link), plan, ready)?;
                match begun.await.unwrap_or_else(|_| Err(error::closed("consume"))) {
                    Ok(()) => {}
                    Err(error) => {
                        self.forget(names, &hub);
                        return Err(error);
                    }
                }
            }
            return Ok(consumer);
        }
    }

    fn hub(&self, names: &Names, transactional: bool) -> Result<(Arc<Hub>, bool)> {
        if names.group.is_none() {
            let hub = Hub::new(names.clone());
            let mut singles = lock(&self.singles);
            singles.retain(|hub| !*hub.ended().borrow());
            singles.push(Arc::clone(&hub));
            return Ok((hub, true));
        }
        let mut hubs = lock(&self.hubs);
        hubs.retain(|_, hub| !*hub.ended().borrow());
        match hubs.get(names) {
            Some(hub) => Ok((Arc::clone(hub), false)),
            None => {
                let hub = Hub::new(names.clone());
                if transactional {
                    hub.set_transactions(Transactions::start(&hub, Arc::clone(&self.config), Arc::clone(&self.link))?);
                }
                hubs.insert(names.clone(), Arc::clone(&hub));
                Ok((hub, true))
            }
        }
    }

    fn forget(&self, names: &Names, hub: &Arc<Hub>) {
        let mut hubs = lock(&self.hubs);
        if hubs.get(names).is_some_and(|known| Arc::ptr_eq(known, hub)) {
            hubs.remove(names);
        }
    }

    async fn has_topic(&self, topic: Arc<str>) -> Result<bool> {
        self.blocking("consume", move |native, config, _| {
            topology::partitions(publisher::inner(native), &topic, config.connect_timeout).map(|found| found.is_some())
        })
        .await
    }

    fn names(&self, address: &Address, group: Option<&str>) -> Result<Names> {
        let names = Names::of(address, group);
        names.check()?;
        Ok(names)
    }
}

#[async_trait]
impl Connection for KafkaConnection {
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
        Names::of(address, None).check()
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        let names = self.names(address, None)?;
        if let Some((key, _)) = options.extra.first() {
            return Err(error::config(format!("unknown option {key:?}; a producer has none")));
        }
        let located = |error: Error| error.with_channel(address.name());
        // Somebody else's for a while: the broker tells when it is gone.
        if !options.temporary {
            self.ensure(Wanted::of(&names), options.declare).await.map_err(located)?;
        }
        Ok(Box::new(KafkaProducer::new(Arc::clone(&self.publisher), names.topic, names.delay)))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        let names = self.names(address, options.group.as_deref())?;
        let names = if options.temporary { names.temporary() } else { names };
        let located = |error: Error| error.with_channel(address.name());
        let plan = Self::plan(&names, options)?;
        self.declare_all(&names, options).await.map_err(located)?;
        Ok(Box::new(self.join(&names, plan).await.map_err(located)?))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        let names = self.names(address, options.group.as_deref())?;
        let located = |error: Error| error.with_channel(address.name());
        let plan = Self::plan(&names, options)?;
        self.declare_all(&names, options).await.map_err(located)?;
        // A group's share begins now.
        let Some(group) = names.group.clone().filter(|_| !names.is_queue) else { return Ok(()) };
        let declared = self.blocking("declare", move |_, config, link| {
            let native = asking(config, link, &group)?;
            poller::begin_at(&native, &names, plan.start, plan.seek, config.connect_timeout)
        });
        declared.await.map_err(located)
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        let names = self.names(address, group)?;
        let located = |error: Error| error.with_channel(address.name()).with_operation("delete");
        if let Some(error) = self.link.down_error("delete") {
            return Err(error);
        }
        let whole = address.kind() == ChannelKind::Queue || group.is_none();
        let main = whole.then_some(&*names.topic);
        let topics: Vec<&str> = main.into_iter().chain(names.delay.as_deref()).collect();
        let admin = self.admin()?;
        topology::delete(admin.client()?, &self.config, &topics).await.map_err(located)?;
        if let Some(group) = &names.group {
            // A group that has consumers, or is none, keeps what it has: positions of topics that are gone.
            let _ = admin.client()?.delete_groups(&[&**group], &topology::options(&self.config)).await;
        }
        let topics: Vec<Arc<str>> = topics.into_iter().map(Arc::from).collect();
        let gone = self.blocking("delete", move |native, config, _| {
            let topics: Vec<&str> = topics.iter().map(|topic| &**topic).collect();
            topology::await_existence(publisher::inner(native), &topics, false, config.connect_timeout)
        });
        gone.await.map_err(located)
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        let names = self.names(address, group)?;
        let located = |error: Error| error.with_channel(address.name());
        let found = self.blocking("exists", move |native, config, link| {
            let timeout = config.connect_timeout;
            let Some(partitions) = topology::partitions(publisher::inner(native), &names.topic, timeout)? else {
                return Ok(false);
            };
            let Some(group) = names.group.as_ref().filter(|_| !names.is_queue) else { return Ok(true) };
            // A group's share begins with its first position.
            let asked = asking(config, link, group)?;
            let positions = positions(&asked, &names.topic, &partitions, timeout)?;
            Ok(positions.iter().any(|(_, _, _, (position, _))| position.is_some()))
        });
        found.await.map_err(located)
    }

    async fn stats(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        let names = self.names(address, group)?;
        let Some(group) = names.group.clone() else {
            return Err(Error::unsupported(NAME, "counting the messages of a topic without a group")
                .with_hint("name the group"));
        };
        let hub = lock(&self.hubs).get(&names).cloned();
        let counted = self.blocking("stats", move |native, config, link| {
            let timeout = config.connect_timeout;
            let client = publisher::inner(native);
            let partitions = topology::existing(client, &names.topic, timeout)?;
            let here = hub.as_ref().and_then(|hub| hub.native());
            let (members_here, consumers_here) = match (&here, &hub) {
                (Some(_), Some(hub)) => (1, hub.consumers()),
                _ => (0, 0),
            };
            let asked = match here {
                Some(native) => native,
                None => Arc::new(asking(config, link, &group)?),
            };
            let mut ready = 0;
            for (partition, low, high, committed) in positions(&asked, &names.topic, &partitions, timeout)? {
                let ours = hub.as_ref().and_then(|hub| hub.waiting(partition, high));
                ready += ours.unwrap_or_else(|| waiting(low, high, &committed));
            }
            let groups = client.fetch_group_list(Some(&group), timeout);
            let groups = groups.map_err(|error| error::native("stats", error))?;
            let members: usize = groups.groups().iter().map(|group| group.members().len()).sum();
            let consumers = members.saturating_sub(members_here) + consumers_here;
            let unsettled = hub.filter(|_| members <= members_here).map(|hub| hub.unsettled() as u64);
            Ok(Stats { ready, unsettled, consumers: consumers as u64 })
        });
        counted.await.map_err(|error| error.with_channel(address.name()))
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        let names = self.names(address, None)?;
        let group = names.group.clone().unwrap_or_else(|| Arc::clone(&names.topic));
        let located = |error: Error| error.with_channel(address.name()).with_operation("purge");
        let counted = self.blocking("purge", move |native, config, link| {
            let timeout = config.connect_timeout;
            let partitions = topology::existing(publisher::inner(native), &names.topic, timeout)?;
            let asked = asking(config, link, &group)?;
            let mut list = TopicPartitionList::new();
            let mut count = 0;
            for (partition, low, high, committed) in positions(&asked, &names.topic, &partitions, timeout)? {
                count += waiting(low, high, &committed);
                let added = list.add_partition_offset(&names.topic, partition, Offset::Offset(high));
                added.map_err(|error| error::native("purge", error))?;
            }
            Ok((list, count))
        });
        let (list, count) = counted.await.map_err(located)?;
        let options = topology::options(&self.config);
        let admin = self.admin()?;
        let purged = admin.client()?.delete_records(&list, &options).await;
        let purged = purged.map_err(|error| located(error::native("purge", error)))?;
        for element in purged.elements() {
            element.error().map_err(|error| located(error::native("purge", error)))?;
        }
        Ok(count)
    }

    async fn ping(&self) -> Result<()> {
        let answered = self.blocking("ping", |native, config, _| {
            let asked = publisher::inner(native).fetch_metadata(Some(publisher::PROBE), config.connect_timeout);
            asked.map(drop).map_err(|error| error::native("ping", error))
        });
        // A request to a broker that has just gone waits for another one.
        timeout(self.admin_timeout(), answered).await.unwrap_or_else(|_| Err(error::timeout("ping")))
    }

    async fn close(&self) -> Result<()> {
        let hubs: Vec<_> = lock(&self.hubs).drain().map(|(_, hub)| hub).chain(lock(&self.singles).drain(..)).collect();
        // Bounded for a broker that does not answer: what it has not confirmed is answered with "unknown outcome".
        let publisher = Arc::clone(&self.publisher);
        let flushed = tokio::task::spawn_blocking(move || publisher.flush(CLOSE_TIMEOUT)).await.unwrap_or(false);
        for hub in &hubs {
            hub.fail(ErrorKind::Closed, "already closed");
        }
        let ended = async {
            for hub in &hubs {
                let _ = hub.ended().wait_for(|ended| *ended).await;
            }
        };
        let ended = timeout(CLOSE_TIMEOUT, ended).await.is_ok();
        self.link.close(ErrorKind::Closed, "closed by this program");
        let publisher = Arc::clone(&self.publisher);
        let _ = tokio::task::spawn_blocking(move || publisher.end()).await;
        if flushed && ended { Ok(()) } else { Err(error::timeout("close")) }
    }
}

impl Drop for KafkaConnection {
    fn drop(&mut self) {
        // Wakes up every thread, which ends its own client.
        self.link.close(ErrorKind::Closed, "closed by this program");
    }
}

/// A client that asks about a group and is no member of it. Blocks.
fn asking(config: &Arc<KafkaConfig>, link: &Arc<Link>, group: &str) -> Result<poller::Native> {
    let settings = client::consumer(config, group, 1, 1)?;
    settings.create_with_context(Context::asking(link, config)).map_err(configuration)
}

type Committed = (Option<i64>, String);

/// Partition, first offset, end, and what is committed. Blocks.
fn positions(
    native: &poller::Native,
    topic: &str,
    partitions: &[i32],
    timeout: Duration,
) -> Result<Vec<(i32, i64, i64, Committed)>> {
    let failed = |error| error::native("stats", error).with_channel(topic);
    let committed = native.committed_offsets(topology::list(topic, partitions), timeout).map_err(failed)?;
    let one = |partition: &i32| {
        let (low, high) = native.fetch_watermarks(topic, *partition, timeout).map_err(failed)?;
        let found = committed.find_partition(topic, *partition);
        let found = found.map(|found| match found.offset() {
            Offset::Offset(offset) => (Some(offset), found.metadata().to_owned()),
            _ => (None, String::new()),
        });
        Ok((*partition, low, high, found.unwrap_or_default()))
    };
    partitions.iter().map(one).collect()
}

fn waiting(low: i64, high: i64, (position, metadata): &Committed) -> u64 {
    match position {
        Some(position) if *position >= low => partition::unfinished(*position, metadata, high),
        _ => u64::try_from(high - low).unwrap_or(0),
    }
}

impl fmt::Debug for KafkaConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaConnection").field("config", &self.config).finish_non_exhaustive()
    }
}
