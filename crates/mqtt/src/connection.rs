//! The connection that users hold: one link for sending, and one for each queue that is consumed.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Address, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, Error, ErrorKind, HealthWatch,
    ProduceOptions, Producer, Result, Start,
};
use rumqttc::v5::mqttbytes::{
    QoS,
    v5::{Filter, Publish},
};
use tokio::{sync::watch, time::timeout};

use crate::{
    NAME,
    claims::{Claims, Purpose},
    config::{MqttConfig, Protocol},
    consumer::MqttConsumer,
    error::error,
    health::Board,
    hub::Hub,
    keeper::{self, Kept, Source},
    link::{Events, Link, LinkOptions, Lost},
    producer::MqttProducer,
    topology::{self, Durable},
};

/// What producers, consumers and keepers of one connection share.
pub(crate) struct Bus {
    pub(crate) config: Arc<MqttConfig>,
    pub(crate) claims: Arc<Claims>,
    pub(crate) board: Board,
    client_id: String,
    main: OnceLock<Link>,
    kept: Mutex<HashMap<Durable, Arc<tokio::sync::Mutex<Option<Kept>>>>>,
    own: Mutex<Vec<Kept>>,
    declared: Mutex<HashSet<Durable>>,
    stop: watch::Sender<bool>,
    watches_gone: AtomicBool,
    /// Whether the link that sends is connected.
    pub(crate) is_up: Arc<AtomicBool>,
}

impl Bus {
    async fn connect(config: MqttConfig) -> Result<Arc<Self>> {
        let config = Arc::new(config);
        let client_id = config.client_id.clone();
        let bus = Arc::new(Self {
            claims: Claims::new(&config),
            board: Board::default(),
            client_id: client_id.unwrap_or_else(|| format!("{}-{:016x}", config.session, fastrand::u64(..))),
            main: OnceLock::new(),
            kept: Mutex::default(),
            own: Mutex::default(),
            declared: Mutex::default(),
            stop: watch::Sender::new(false),
            watches_gone: AtomicBool::new(false),
            is_up: Arc::default(),
            config,
        });
        let options = LinkOptions {
            client_id: bus.client_id.clone(),
            clean_start: true,
            session_expiry: Duration::ZERO,
            receive_maximum: u16::MAX,
            will: Some(bus.claims.will()),
            gated: true,
            first_must_succeed: !bus.config.connect_retry,
        };
        let events = Main { bus: Arc::downgrade(&bus), is_up: Arc::clone(&bus.is_up) };
        let (link, first) = Link::start(Arc::clone(&bus.config), options, bus.board.member(), events);
        bus.claims.attach(link.clone());
        let _ = bus.main.set(link);
        if !bus.config.connect_retry {
            let connected = first.await.unwrap_or_else(|_| Err(error(ErrorKind::Closed, "the connection was closed")));
            connected.map_err(|cause| cause.with_operation("connect"))?;
        }
        Ok(bus)
    }

    /// The link that sends.
    pub(crate) fn link(&self) -> Result<&Link> {
        self.main.get().ok_or_else(|| Error::closed("send").with_backend(NAME))
    }

    /// Turns true when everything must end.
    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// The hub of a row, with one more consumer in it.
    async fn join(self: &Arc<Self>, row: Durable, name: Arc<str>, prefetch: usize, create: bool) -> Result<Arc<Hub>> {
        if !self.watches_gone.swap(true, Ordering::AcqRel) {
            // Without it, sessions that were left behind are found a minute later.
            if let Err(cause) = self.claims.watch_gone().await {
                tracing::debug!(%cause, "cannot watch other consumers leave");
            }
        }
        let cell = Arc::clone(lock(&self.kept).entry(row.clone()).or_default());
        let mut kept = cell.lock().await;
        if let Some(running) = &*kept {
            if running.hub.join(prefetch) {
                return Ok(Arc::clone(&running.hub));
            }
            running.closed().await;
        }
        *kept = None;
        let hub = Hub::new(name);
        hub.join(prefetch);
        let started = keeper::start(Arc::clone(self), Arc::clone(&hub), Source::Row(row), create).await?;
        *kept = Some(started);
        Ok(hub)
    }

    /// A subscription of its own, that ends with its consumer.
    async fn own(self: &Arc<Self>, name: Arc<str>, prefetch: usize) -> Result<Arc<Hub>> {
        let hub = Hub::new(name);
        hub.join(prefetch);
        let client_id = format!("{}-{:08x}", self.client_id, fastrand::u32(..));
        let kept = keeper::start(Arc::clone(self), Arc::clone(&hub), Source::Own(client_id), true).await?;
        let mut own = lock(&self.own);
        own.retain(|kept| !*kept.closed.borrow());
        own.push(kept);
        Ok(hub)
    }

    /// Makes session 0 of a row, which holds messages while nobody consumes.
    async fn declare_row(&self, row: &Durable, again: bool) -> Result<()> {
        if lock(&self.declared).contains(row) && !again {
            return Ok(());
        }
        if !self.is_kept(row).await {
            self.visit(row, true).await?;
        }
        lock(&self.declared).insert(row.clone());
        Ok(())
    }

    /// Whether session 0 of a row exists; makes it if asked to.
    async fn visit(&self, row: &Durable, create: bool) -> Result<bool> {
        // Someone who holds the session has made it.
        let Some(claim) = self.claims.claim(&row.claim(0), Purpose::Visit).await? else { return Ok(true) };
        let (link, present) = self.open(row, 0).await?;
        let mut made = Ok(());
        // Even when the session is there: after a restart, mosquitto knows it without its shared subscription.
        if create {
            made = self.bounded("declare", link.subscribe(Filter::new(&*row.filter, QoS::AtLeastOnce))).await;
        }
        link.close(!present && (!create || made.is_err())).await;
        drop(claim);
        made.map(|()| present || create)
    }

    /// Connects as a session, for as long as it takes to look at it.
    async fn open(&self, row: &Durable, number: u16) -> Result<(Link, bool)> {
        let options = LinkOptions {
            client_id: row.session(number),
            clean_start: false,
            session_expiry: self.config.session_expiry,
            // The broker begins to deliver at once: the less, the better.
            receive_maximum: 1,
            will: None,
            gated: false,
            first_must_succeed: true,
        };
        let present = Arc::new(AtomicBool::new(false));
        let events = Visitor(Arc::clone(&present));
        let (link, first) = Link::start(Arc::clone(&self.config), options, self.board.member(), events);
        first.await.unwrap_or_else(|_| Err(error(ErrorKind::Closed, "the connection was closed")))?;
        Ok((link, present.load(Ordering::Acquire)))
    }

    async fn is_kept(&self, row: &Durable) -> bool {
        let cell = lock(&self.kept).get(row).cloned();
        let Some(cell) = cell else { return false };
        let kept = cell.lock().await;
        kept.as_ref().is_some_and(|kept| !*kept.closed.borrow())
    }

    /// After a reconnect: what was declared exists again before anything is sent to it.
    async fn restore(&self, generation: u32) {
        self.claims.look_again();
        let rows: Vec<_> = lock(&self.declared).iter().cloned().collect();
        let restore = async {
            for row in rows {
                if let Err(cause) = self.restore_row(&row).await {
                    tracing::warn!(session = row.session(0), %cause, "cannot declare again after a reconnect");
                }
            }
        };
        // Messages must not wait for ever: then those that nobody holds are refused one by one.
        let _ = timeout(self.config.operation_timeout, restore).await;
        if let Ok(link) = self.link() {
            link.open_gate(generation);
        }
    }

    async fn restore_row(&self, row: &Durable) -> Result<()> {
        let cell = lock(&self.kept).get(row).cloned();
        let hub = match cell {
            Some(cell) => cell.lock().await.as_ref().map(|kept| Arc::clone(&kept.hub)),
            None => None,
        };
        // Our own consumer comes back by itself, at about the same time.
        for _ in 0..100 {
            match &hub {
                Some(hub) if hub.is_subscribed() => break,
                Some(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                None => return self.declare_row(row, true).await,
            }
        }
        Ok(())
    }

    async fn bounded<T>(&self, what: &'static str, operation: impl Future<Output = Result<T>>) -> Result<T> {
        let limit = self.config.operation_timeout;
        let late = || error(ErrorKind::Timeout, format!("no answer within {limit:?}")).with_operation(what);
        timeout(limit, operation).await.unwrap_or_else(|_| Err(late()))
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bus").field("client_id", &self.client_id).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Events of the link that sends; what arrives there are messages between consumers.
struct Main {
    bus: Weak<Bus>,
    is_up: Arc<AtomicBool>,
}

impl Events for Main {
    fn connected(&mut self, generation: u32, _: bool) {
        self.is_up.store(true, Ordering::Release);
        if generation > 1 {
            if let Some(bus) = self.bus.upgrade() {
                tokio::spawn(async move { bus.restore(generation).await });
            }
        }
    }

    fn message(&mut self, _: u32, publish: Publish) {
        if let Some(bus) = self.bus.upgrade() {
            bus.claims.message(&publish);
        }
    }

    fn lost(&mut self, _: &Lost) -> bool {
        self.is_up.store(false, Ordering::Release);
        true
    }

    fn ended(&mut self, cause: Option<&Error>) {
        if let (Some(cause), Some(bus)) = (cause, self.bus.upgrade()) {
            bus.board.give_up(cause.message());
        }
    }
}

/// Events of a short visit to a session: what the broker delivers meanwhile, it delivers again.
struct Visitor(Arc<AtomicBool>);

impl Events for Visitor {
    fn connected(&mut self, _: u32, session_present: bool) {
        self.0.store(session_present, Ordering::Release);
    }

    fn message(&mut self, _: u32, _: Publish) {}

    fn lost(&mut self, _: &Lost) -> bool {
        false
    }
}

/// A connection to an MQTT broker.
#[derive(Debug)]
pub(crate) struct MqttConnection {
    bus: Arc<Bus>,
    capabilities: Capabilities,
}

impl MqttConnection {
    pub(crate) async fn connect(config: MqttConfig) -> Result<Self> {
        let capabilities = topology::capabilities(&config);
        Ok(Self { bus: Bus::connect(config).await?, capabilities })
    }

    fn row(&self, address: &Address, group: Option<&str>) -> Option<Durable> {
        Durable::of(&self.bus.config, address, group)
    }

    async fn declare_all(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        if let Some(row) = self.row(address, options.group.as_deref()) {
            self.bus.declare_row(&row, false).await?;
        }
        self.declare_dead_letters(options).await
    }

    async fn declare_dead_letters(&self, options: &ConsumeOptions) -> Result<()> {
        let Some(dead_letters) = &options.dead_letters else { return Ok(()) };
        topology::check_published(dead_letters)
            .map_err(|cause| cause.with_hint("name the queue for dead letters of a wildcard yourself"))?;
        match self.row(dead_letters, None) {
            Some(row) => self.bus.declare_row(&row, false).await,
            None => Ok(()),
        }
    }

    fn check_open(&self, operation: &'static str) -> Result<()> {
        match self.bus.is_stopped() {
            true => Err(Error::closed(operation).with_backend(NAME)),
            false => Ok(()),
        }
    }
}

fn check_consume(address: &Address, options: &ConsumeOptions) -> Result<()> {
    topology::check_address(address)?;
    if let Some(group) = &options.group {
        topology::check_group(group)?;
    }
    if options.start == Start::Earliest {
        return Err(Error::unsupported(NAME, "beginning with messages that were sent before"));
    }
    match options.extra.first() {
        Some((key, _)) => {
            Err(error(ErrorKind::InvalidInput, format!("unknown option {key:?}; a consumer has none here")))
        }
        None => Ok(()),
    }
}

#[async_trait]
impl Connection for MqttConnection {
    fn backend(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.bus.board.watch()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        topology::check_address(address)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        self.check_open("producer")?;
        topology::check_published(address)?;
        let producer = MqttProducer::new(&self.bus, address, options)?;
        if let Some(row) = self.row(address, None) {
            let named = |cause: Error| cause.with_operation("declare").with_channel(address.name());
            if options.declare {
                self.bus.declare_row(&row, false).await.map_err(named)?;
            } else if !self.bus.is_kept(&row).await && !self.bus.visit(&row, false).await.map_err(named)? {
                return Err(error(ErrorKind::NotFound, "no session holds messages of this queue")
                    .with_operation("producer")
                    .with_channel(address.name())
                    .with_hint("declare it, or send to a topic where only foreign subscribers listen"));
            }
        }
        Ok(Box::new(producer))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        self.check_open("consumer")?;
        check_consume(address, options)?;
        let named = |cause: Error| cause.with_operation("consumer").with_channel(address.name());
        if options.declare {
            self.declare_dead_letters(options).await.map_err(named)?;
        }
        let prefetch = options.prefetch.max(1);
        let hub = match self.row(address, options.group.as_deref()) {
            Some(row) => {
                let hub = self
                    .bus
                    .join(row.clone(), address.shared_name(), prefetch, options.declare)
                    .await
                    .map_err(named)?;
                lock(&self.bus.declared).insert(row);
                hub
            }
            None => self.bus.own(address.shared_name(), prefetch).await.map_err(named)?,
        };
        let republish = address.kind() == ChannelKind::Queue && self.bus.config.protocol == Protocol::V5;
        Ok(Box::new(MqttConsumer::new(Arc::clone(&self.bus), hub, prefetch, republish)))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.check_open("declare")?;
        check_consume(address, options)?;
        let named = |cause: Error| cause.with_operation("declare").with_channel(address.name());
        self.declare_all(address, options).await.map_err(named)
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.check_open("delete")?;
        let Some(row) = self.row(address, group) else { return Ok(()) };
        lock(&self.bus.declared).remove(&row);
        let cell = lock(&self.bus.kept).remove(&row);
        if let Some(cell) = cell {
            if let Some(kept) = cell.lock().await.take() {
                kept.hub.fail(&error(ErrorKind::NotFound, "the channel was deleted"));
                let _ = self.bus.bounded("delete", async { Ok(kept.closed().await) }).await;
            }
        }
        for number in 0..u16::MAX {
            let (link, present) = self.bus.open(&row, number).await.map_err(|cause| cause.with_operation("delete"))?;
            link.close(true).await;
            if !present {
                break;
            }
        }
        Ok(())
    }

    async fn ping(&self) -> Result<()> {
        self.check_open("ping")?;
        self.bus.bounded("ping", self.bus.link()?.ping()).await.map_err(|cause| cause.with_operation("ping"))
    }

    async fn close(&self) -> Result<()> {
        if self.bus.stop.send_replace(true) {
            return Ok(());
        }
        let bus = &self.bus;
        let mut kept: Vec<_> = std::mem::take(&mut *lock(&bus.own));
        let cells: Vec<_> = lock(&bus.kept).drain().map(|(_, cell)| cell).collect();
        let consumers = async {
            for cell in cells {
                kept.extend(cell.lock().await.take());
            }
            for kept in kept {
                kept.closed().await;
            }
            Ok(())
        };
        let consumers = bus.bounded("close", consumers).await;
        let link = bus.link()?;
        // Without a connection there is nothing to wait for but the connection.
        if link.waiting() > 0 || bus.board.is_up() {
            let _ = bus.bounded("close", link.flush_sends()).await;
        }
        let unsent = link.close(false).await;
        bus.board.close();
        consumers?;
        match unsent {
            0 => Ok(()),
            _ => Err(error(ErrorKind::Disconnected, format!("{unsent} messages were not sent")).with_operation("close")),
        }
    }
}
