//! What producers, consumers and keepers of one connection share: the link that sends, and what was declared.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use polymq_core::{ConsumeOptions, Error, ErrorKind, Result, Tally};
use rumqttc::v5::mqttbytes::v5::Publish;
use tokio::{
    runtime::Handle,
    sync::{oneshot, watch},
    time::timeout,
};

use crate::{
    NAME,
    claims::Claims,
    config::MqttConfig,
    declared::Declared,
    error::error,
    health::Board,
    hub::Hub,
    keeper::{self, Kept, Source},
    link::{Events, Link, LinkOptions, Lost},
    revisit,
    stock::Seat,
    topology::Durable,
};

/// The generation of the first connection.
const FIRST: u32 = 1;

/// What producers, consumers and keepers of one connection share.
pub(crate) struct Bus {
    pub(crate) config: Arc<MqttConfig>,
    pub(crate) claims: Arc<Claims>,
    pub(crate) board: Board,
    client_id: String,
    main: OnceLock<Link>,
    pub(crate) kept: Mutex<HashMap<Durable, Arc<tokio::sync::Mutex<Option<Kept>>>>>,
    pub(crate) own: Mutex<Vec<Kept>>,
    pub(crate) declared: Declared,
    pub(crate) stop: watch::Sender<bool>,
    watches_gone: AtomicBool,
    /// The generation of the link that sends, zero without a connection.
    pub(crate) generation: watch::Sender<u32>,
    /// Copies of messages that retries send, until the original is given up too.
    pub(crate) copies: Tally,
    /// The one that has connected, where everything runs: others may end sooner.
    pub(crate) runtime: Handle,
}

impl Bus {
    pub(crate) async fn connect(config: MqttConfig) -> Result<Arc<Self>> {
        let config = Arc::new(config);
        let client_id = config.client_id.clone();
        let bus = Arc::new(Self {
            claims: Claims::new(&config),
            board: Board::default(),
            client_id: client_id.unwrap_or_else(|| format!("{}-{:016x}", config.session, fastrand::u64(..))),
            main: OnceLock::new(),
            kept: Mutex::default(),
            own: Mutex::default(),
            declared: Declared::default(),
            stop: watch::Sender::new(false),
            watches_gone: AtomicBool::new(false),
            generation: watch::Sender::new(0),
            copies: Tally::default(),
            runtime: Handle::current(),
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
            after: 0,
        };
        let events = Main { bus: Arc::downgrade(&bus), generation: bus.generation.clone() };
        let (link, first) = bus.start(options, events);
        bus.claims.attach(link.clone());
        let _ = bus.main.set(link);
        if bus.config.connect_retry {
            let waiting = Arc::downgrade(&bus);
            bus.runtime.spawn(async move {
                if let (Ok(Ok(())), Some(bus)) = (first.await, waiting.upgrade()) {
                    bus.restore(FIRST).await;
                }
            });
        } else {
            let connected = first.await.unwrap_or_else(|_| Err(error(ErrorKind::Closed, "the connection was closed")));
            connected.map_err(|cause| cause.with_operation("connect"))?;
        }
        bus.runtime.spawn(revisit::run(Arc::downgrade(&bus)));
        Ok(bus)
    }

    /// One more link; the receiver answers its first attempt to connect.
    pub(crate) fn start(&self, options: LinkOptions, events: impl Events) -> (Link, oneshot::Receiver<Result<()>>) {
        Link::start(&self.runtime, Arc::clone(&self.config), options, self.board.member(), events)
    }

    /// The link that sends.
    pub(crate) fn link(&self) -> Result<&Link> {
        self.main.get().ok_or_else(|| Error::closed("send").with_backend(NAME))
    }

    /// Whether the link that sends is connected.
    pub(crate) fn is_up(&self) -> bool {
        *self.generation.borrow() > 0
    }

    /// Waits for the link that sends, as long as one attempt to connect may take.
    pub(crate) async fn connected(&self) -> Result<()> {
        let (mut generation, mut stop) = (self.generation.subscribe(), self.stopping());
        let link = self.link()?;
        tokio::select! {
            biased;
            connected = timeout(self.config.connect_timeout, generation.wait_for(|generation| *generation > 0)) => {
                connected.map(|_| ()).map_err(|_| self.not_connected())
            }
            _ = stop.wait_for(|stop| *stop) => Err(Error::closed("connect").with_backend(NAME)),
            () = link.ended() => Err(link.why_ended()),
        }
    }

    #[cold]
    fn not_connected(&self) -> Error {
        let reason = self.board.watch().now().reason;
        error(ErrorKind::Disconnected, format!("no connection: {}", reason.as_deref().unwrap_or("not connected yet")))
    }

    /// Whether what needs a connection waits for it in the background: a service that was told to wait for its broker is
    /// started before that is there, and must still end when it is told to.
    fn waits_for_broker(&self) -> bool {
        self.config.connect_retry && !self.is_up() && !self.link().is_ok_and(Link::has_ended)
    }

    /// Turns true when everything must end.
    pub(crate) fn stopping(&self) -> watch::Receiver<bool> {
        self.stop.subscribe()
    }

    pub(crate) fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// The hub of a row, with one more consumer in it.
    pub(crate) async fn join(
        self: &Arc<Self>,
        row: Durable,
        name: Arc<str>,
        options: &ConsumeOptions,
    ) -> Result<(Kept, Seat)> {
        let cell = Arc::clone(lock(&self.kept).entry(row.clone()).or_default());
        let mut kept = cell.lock().await;
        if let Some(running) = &*kept {
            if let Some(seat) = running.hub.join(options.prefetch, options.prefetch_bytes) {
                return Ok((running.clone(), seat));
            }
            running.closed().await;
        }
        *kept = None;
        let (hub, seat) = Hub::with_consumer(name, options);
        let started = self.keep(hub, Source::Row(row.clone()), options.declare).await?;
        if started.has_begun() {
            self.declared.insert(row);
        } else if options.declare {
            self.declare_later(row);
        }
        *kept = Some(started.clone());
        Ok((started, seat))
    }

    async fn keep(self: &Arc<Self>, hub: Arc<Hub>, source: Source, create: bool) -> Result<Kept> {
        let later = self.waits_for_broker();
        if !later {
            self.connected().await?;
        }
        keeper::start(Arc::clone(self), hub, source, create, later).await
    }

    /// Listens to others that leave.
    pub(crate) async fn watch_gone(&self) {
        if self.watches_gone.load(Ordering::Acquire) {
            return;
        }
        match self.bounded("consumer", self.claims.watch_gone()).await {
            Ok(()) => self.watches_gone.store(true, Ordering::Release),
            // Without it, sessions that were left behind are found a minute later.
            Err(cause) => tracing::debug!(%cause, "cannot watch other consumers leave"),
        }
    }

    /// A subscription of its own, that ends with its consumer.
    pub(crate) async fn own(self: &Arc<Self>, name: Arc<str>, options: &ConsumeOptions) -> Result<(Kept, Seat)> {
        let (hub, seat) = Hub::with_consumer(name, options);
        let client_id = format!("{}-{:08x}", self.client_id, fastrand::u32(..));
        let kept = self.keep(hub, Source::Own(client_id), true).await?;
        let mut own = lock(&self.own);
        own.retain(|kept| !kept.is_closed());
        own.push(kept.clone());
        Ok((kept, seat))
    }

    /// Connects as a session, for as long as it takes to look at it.
    pub(crate) async fn open(&self, row: &Durable, number: u16) -> Result<(Link, bool)> {
        let options = LinkOptions {
            client_id: row.session(number),
            clean_start: false,
            session_expiry: self.config.session_expiry,
            // The broker begins to deliver at once: the less, the better.
            receive_maximum: 1,
            will: None,
            gated: false,
            first_must_succeed: true,
            after: 0,
        };
        let present = Arc::new(AtomicBool::new(false));
        let events = Visitor(Arc::clone(&present));
        let (link, first) = self.start(options, events);
        first.await.unwrap_or_else(|_| Err(error(ErrorKind::Closed, "the connection was closed")))?;
        Ok((link, present.load(Ordering::Acquire)))
    }

    pub(crate) async fn bounded<T>(&self, what: &'static str, operation: impl Future<Output = Result<T>>) -> Result<T> {
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

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Events of the link that sends; what arrives there are messages between consumers.
struct Main {
    bus: Weak<Bus>,
    generation: watch::Sender<u32>,
}

impl Events for Main {
    fn connected(&mut self, generation: u32, _: bool) {
        self.generation.send_replace(generation);
        // The first is waited for where the connection is made.
        if generation > FIRST
            && let Some(bus) = self.bus.upgrade()
        {
            tokio::spawn(bus.restore(generation));
        }
    }

    fn message(&mut self, _: u32, publish: Publish) {
        if let Some(bus) = self.bus.upgrade() {
            bus.claims.message(&publish);
        }
    }

    fn lost(&mut self, _: &Lost) -> bool {
        self.generation.send_replace(0);
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
