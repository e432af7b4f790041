//! The entry point: one connection, what is known about types, and the channels that are used over it.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use polymq_serializers::{Accept, Limits, Serializers};
use serde::Serialize;

use crate::{
    Address, Capabilities, Channel, ChannelKind, Connection, Environment, Error, ErrorKind, Health, HealthWatch, Kinds,
    Layer, Message, Registry, Result, Settings,
    config::{Origin, nearest},
    layer::Layers,
    prefix::Prefixed,
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
/// What runs when nothing is chosen.
const DEFAULT_BACKEND: &str = "memory";

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

/// Who sends: written into the headers of every message of a bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The component, such as `billing`.
    pub component: String,
    /// Its version.
    pub version: String,
    /// This instance of it.
    pub client_id: String,
}

/// Header with the sending component's name.
pub const SENDER_COMPONENT: &str = "sender-component";
/// Header with the sending component's version.
pub const SENDER_VERSION: &str = "sender-version";
/// Header with the sending instance.
pub const SENDER_CLIENT: &str = "sender-client";

impl Identity {
    pub(crate) fn sign(&self, message: &mut Message) {
        message.add_wire_header(SENDER_COMPONENT, self.component.clone());
        message.add_wire_header(SENDER_VERSION, self.version.clone());
        message.add_wire_header(SENDER_CLIENT, self.client_id.clone());
    }
}

type HealthCallback = Box<dyn Fn(&Health) + Send + Sync>;

/// Builds a [`Bus`]. What is said here overrides the environment, which overrides a file's settings.
#[derive(Default)]
#[must_use = "nothing is connected before connect is called"]
pub struct BusBuilder {
    backend: Option<String>,
    url: Option<String>,
    settings: Settings,
    registry: Option<Registry>,
    environment: Option<Environment>,
    serializers: Option<Serializers>,
    kinds: Option<Kinds>,
    accept: Option<Accept>,
    limits: Limits,
    layers: Vec<Arc<dyn Layer>>,
    identity: Option<Identity>,
    prefix: Option<String>,
    on_health: Vec<HealthCallback>,
}

impl BusBuilder {
    /// The backend, by name.
    pub fn backend(mut self, name: impl Into<String>) -> Self {
        self.backend = Some(name.into());
        self
    }

    /// The address; its scheme names the backend when no name is given.
    pub fn url(mut self, url: impl Into<String>) -> Self {
        self.url = Some(url.into());
        self
    }

    /// One setting of the backend.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings = self.settings.with(key, value);
        self
    }

    /// Settings read elsewhere, such as from a file.
    pub fn settings(mut self, settings: &Settings) -> Self {
        self.settings.merge(settings);
        self
    }

    /// The backends to choose from; without it, those that are linked.
    pub fn registry(mut self, registry: Registry) -> Self {
        self.registry = Some(registry);
        self
    }

    /// The environment; without it, the process's.
    pub fn environment(mut self, environment: Environment) -> Self {
        self.environment = Some(environment);
        self
    }

    /// The serializers; without them, the built-in and linked ones.
    pub fn serializers(mut self, serializers: Serializers) -> Self {
        self.serializers = Some(serializers);
        self
    }

    /// The kinds of types; without them, those of `#[derive(Message)]`.
    pub fn kinds(mut self, kinds: Kinds) -> Self {
        self.kinds = Some(kinds);
        self
    }

    /// The content types that handlers decode; without it, all that the serializers know, and no body without one.
    pub fn accept(mut self, accept: Accept) -> Self {
        self.accept = Some(accept);
        self
    }

    /// Limits of encoding and decoding.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Adds a layer inside those added before.
    pub fn layer(mut self, layer: impl Layer) -> Self {
        self.layers.push(Arc::new(layer));
        self
    }

    /// Writes who sends into every message.
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Puts `prefix` before the name of every channel that the broker sees, such as the name of an environment: `orders`
    /// is `dev.orders` there (`dev/orders` where the broker separates with `/`), for senders and consumers alike. Dead-letter
    /// queues follow; groups stay. An empty prefix is none. Without it, `POLYMQ_PREFIX`.
    pub fn prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = Some(prefix.into());
        self
    }

    /// Calls back on every change of the connection's state, the first connection included.
    pub fn on_health(mut self, callback: impl Fn(&Health) + Send + Sync + 'static) -> Self {
        self.on_health.push(Box::new(callback));
        self
    }

    /// Reads the settings and checks them, without connecting.
    ///
    /// # Errors
    /// As [`connect`](Self::connect), without those of connecting.
    pub fn check(&self) -> Result<()> {
        self.resolve().map(drop)
    }

    fn resolve(&self) -> Result<(Arc<dyn crate::Backend>, Settings)> {
        let registry = match &self.registry {
            Some(registry) => registry.clone(),
            None => Registry::linked(),
        };
        let process;
        let environment = match &self.environment {
            Some(environment) => environment,
            None => {
                process = Environment::process();
                &process
            }
        };
        warn_about_unknown(environment, &registry);
        let mut settings = self.settings.clone();
        // A URL given in code also decides against a backend chosen in the environment.
        let name = match (&self.backend, &self.url) {
            (Some(name), _) => Some(name.as_str()),
            (None, Some(url)) => Some(scheme(url)?),
            (None, None) => environment.get(BACKEND_VARIABLE),
        };
        let url = match (&self.url, &self.backend) {
            (Some(url), _) => Some((url.as_str(), Origin::Code)),
            // The process's URL is for the process's backend, not for one that code has chosen.
            (None, Some(_)) => None,
            (None, None) => environment.get(URL_VARIABLE).map(|url| (url, Origin::Variable(URL_VARIABLE.into()))),
        };
        let name = match (name, &url) {
            (Some(name), _) => name,
            (None, Some((url, _))) => scheme(url)?,
            (None, None) => DEFAULT_BACKEND,
        };
        let backend = Arc::clone(&*registry.backend(name)?);
        if let Some((url, origin)) = url {
            let scheme = scheme(url)?;
            if !backend.schemes().contains(&scheme) {
                return Err(Error::new(
                    ErrorKind::Config,
                    format!(
                        "a URL with the scheme {scheme:?} {origin}, expected one of: {}",
                        backend.schemes().join(", ")
                    ),
                )
                .with_backend(backend.name())
                .with_hint("change the URL or the backend"));
            }
            settings.set_url(url, origin)?;
        }
        settings.read_environment(backend.as_ref(), environment)?;
        backend.check(&settings)?;
        Ok((backend, settings))
    }

    /// Connects.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownBackend`], [`ErrorKind::NotCompiledIn`], [`ErrorKind::Config`] before any connection is
    /// tried; then [`ErrorKind::Disconnected`], [`ErrorKind::Unauthenticated`], [`ErrorKind::PermissionDenied`].
    pub async fn connect(self) -> Result<Bus> {
        let (backend, settings) = self.resolve()?;
        let serializers = match self.serializers {
            Some(serializers) => serializers,
            None => Serializers::linked()?,
        };
        let kinds = match self.kinds {
            Some(kinds) => kinds,
            None => Kinds::linked()?,
        };
        let environment = self.environment.unwrap_or_else(Environment::process);
        let accept = match self.accept {
            Some(accept) => accept,
            None => match environment.get(UNLABELLED_VARIABLE) {
                Some(name) => Accept::any().unlabelled_as(name),
                None => Accept::any(),
            },
        };
        serializers.check(&accept)?;
        let connection = backend
            .connect(&settings)
            .await
            .map_err(|error| error.with_backend(backend.name()).with_operation("connect"))?;
        report_health(connection.health(), self.on_health);
        let prefix = self.prefix.as_deref().or(environment.get(PREFIX_VARIABLE));
        let connection = Prefixed::around(connection, prefix.unwrap_or_default());
        let parts = Parts {
            capabilities: connection.capabilities().clone(),
            connection,
            serializers,
            accept,
            limits: self.limits,
            kinds,
            layers: self.layers.into(),
            identity: self.identity,
            requests: Requests::default(),
            kinds_in_use: Mutex::default(),
        };
        Ok(Bus { parts: Arc::new(parts), channels: Arc::default(), answering: Answering::default() })
    }
}

impl fmt::Debug for BusBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusBuilder")
            .field("backend", &self.backend)
            .field("settings", &self.settings)
            .finish_non_exhaustive()
    }
}

fn scheme(url: &str) -> Result<&str> {
    match url.split_once(':') {
        Some((scheme, _)) if !scheme.is_empty() => Ok(scheme),
        _ => Err(Error::new(ErrorKind::Config, format!("{:?} is no URL", crate::config::redact_url(url)))
            .with_hint("write it as scheme://host:port")),
    }
}

fn report_health(mut watch: HealthWatch, callbacks: Vec<HealthCallback>) {
    if callbacks.is_empty() {
        return;
    }
    tokio::spawn(async move {
        let mut health = Some(watch.now());
        while let Some(now) = health {
            for callback in &callbacks {
                // A callback that panics is the caller's affair; the connection must not suffer from it.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| callback(&now)));
            }
            health = watch.changed().await;
        }
    });
}

fn warn_about_unknown(environment: &Environment, registry: &Registry) {
    let own = [BACKEND_VARIABLE, URL_VARIABLE, UNLABELLED_VARIABLE, PREFIX_VARIABLE, crate::BIND_VARIABLE];
    for (variable, _) in environment.with_prefix("POLYMQ_") {
        let of_backend =
            registry.names().any(|name| variable.starts_with(&format!("POLYMQ_{}_", name.to_ascii_uppercase())));
        if !of_backend && !own.contains(&variable) && !variable.starts_with("POLYMQ_TEST_") {
            let near = nearest(variable, own.into_iter()).unwrap_or("none");
            tracing::warn!(variable, near, "unknown variable with polymq's prefix is ignored");
        }
    }
}
