//! What a connection does: makes producers and consumers, declares, counts, deletes and closes.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use polymq_core::{
    Address, Capabilities, Connection, ConsumeOptions, Consumer, Error, ErrorKind, HealthWatch, ProduceOptions,
    Producer, Result, Settings, Stats,
};
use rdkafka::ClientConfig;
use tokio::{
    sync::{OnceCell, oneshot},
    time::timeout,
};

use crate::{
    NAME,
    backend::capabilities,
    client,
    config::KafkaConfig,
    error,
    hub::Hub,
    link::{Link, Status, lock},
    position::{self, Position},
    producer::{CLOSE_TIMEOUT, KafkaProducer},
    publisher::{self, Native, Publisher},
    stats,
    topology::{Names, Wanted},
};

/// A connection to a Kafka cluster: one client that sends, and one for each channel and group that is consumed.
pub struct KafkaConnection {
    pub(crate) config: Arc<KafkaConfig>,
    capabilities: Capabilities,
    pub(crate) link: Arc<Link>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) hubs: Mutex<Hubs>,
    /// Whether everything was answered when it was closed.
    closed: OnceCell<bool>,
    /// Whether the first one who closed has heard so.
    told: AtomicBool,
}

/// What is consumed.
#[derive(Default)]
pub(crate) struct Hubs {
    pub(crate) groups: HashMap<Names, Arc<Hub>>,
    /// Subscriptions without a group, each on its own.
    pub(crate) singles: Vec<Arc<Hub>>,
    /// Where groups were moved to by subscriptions that have failed since. Whoever opens them again does not move them again.
    pub(crate) moved: HashMap<Names, Position>,
    /// Those who close have seen all there are: none is added.
    pub(crate) closed: bool,
}

impl Hubs {
    /// Takes one away that has ended.
    pub(crate) fn remove(&mut self, names: &Names) {
        if let Some(hub) = self.groups.remove(names) {
            match hub.to_be_resumed() {
                Some(position) => self.moved.insert(names.clone(), position),
                None => self.moved.remove(names),
            };
        }
    }
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
            closed: OnceCell::new(),
            told: AtomicBool::new(false),
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

    /// Runs something that blocks.
    pub(crate) async fn blocking<T: Send + 'static>(
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

    /// Commits what is done and flushes what was handed over; whether all of it was answered. Whoever does it again, because
    /// the first one was given up, waits for the same.
    async fn wind_up(&self) -> bool {
        let hubs: Vec<_> = {
            let mut hubs = lock(&self.hubs);
            hubs.closed = true;
            hubs.groups.values().chain(&hubs.singles).cloned().collect()
        };
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
        // Whoever has not come that far commits nothing any more.
        hubs.iter().for_each(|hub| hub.seal());
        self.link.close(ErrorKind::Closed, "closed by this program");
        // The client of a transactional group lives as long as somebody knows its hub.
        let known = {
            let mut hubs = lock(&self.hubs);
            (std::mem::take(&mut hubs.groups), std::mem::take(&mut hubs.singles))
        };
        let publisher = Arc::clone(&self.publisher);
        let ending = move || {
            drop((known, hubs));
            publisher.end();
        };
        let _ = tokio::task::spawn_blocking(ending).await;
        flushed && ended
    }

    pub(crate) fn names(&self, address: &Address, group: Option<&str>) -> Result<Names> {
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
            self.ensure(Wanted::of(&names), options.declare, false).await.map_err(located)?;
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
        // A group's share begins now. One that exists stays where it is: only a consumer moves it.
        let start = plan.seek.unwrap_or(plan.start);
        let Some(group) = names.group.clone().filter(|_| !names.is_queue) else { return Ok(()) };
        let declared = self.blocking("declare", move |_, config, link| {
            let native = stats::asking(config, link, &group)?;
            position::begin_at(&native, &names, start, None, config.connect_timeout)
        });
        declared.await.map_err(located)
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.delete_topics(address, group).await
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        self.is_there(address, group).await
    }

    async fn stats(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        self.count(address, group).await
    }

    async fn purge(&self, address: &Address) -> Result<u64> {
        self.purge_topic(address).await
    }

    async fn ping(&self) -> Result<()> {
        let answered = self.blocking("ping", |native, config, _| {
            let asked = publisher::inner(native).fetch_metadata(Some(publisher::PROBE), config.connect_timeout);
            asked.map(drop).map_err(|error| error::native("ping", error))
        });
        // A request to a broker that has just gone waits for another one.
        timeout(self.config.connect_timeout, answered).await.unwrap_or_else(|_| Err(error::timeout("ping")))
    }

    async fn close(&self) -> Result<()> {
        // Who closes at the same time waits for the same end.
        let answered = *self.closed.get_or_init(|| self.wind_up()).await;
        if answered || self.told.swap(true, Ordering::AcqRel) { Ok(()) } else { Err(error::timeout("close")) }
    }
}

impl Drop for KafkaConnection {
    fn drop(&mut self) {
        // Wakes up every thread, which ends its own client.
        self.link.close(ErrorKind::Closed, "closed by this program");
    }
}

impl fmt::Debug for KafkaConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaConnection").field("config", &self.config).finish_non_exhaustive()
    }
}
