//! What is chosen before a bus connects: the backend, its settings, and what goes with every message.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use polymq_serializers::{Accept, Limits, Serializers};

use super::{BACKEND_VARIABLE, Bus, Identity, PREFIX_VARIABLE, Parts, UNLABELLED_VARIABLE, URL_VARIABLE};
use crate::{
    Environment, Error, ErrorKind, Health, HealthWatch, Kinds, KnownBackend, Layer, Registry, Result, Settings,
    channel::{Opened, Sent},
    config::{Origin, is_slip_of},
    prefix::Prefixed,
    request::{Answering, Requests},
};

/// What runs when nothing is chosen.
const DEFAULT_BACKEND: &str = "memory";

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

    /// Calls back on every change of the connection's state, the first connection included. A loss is told however short it
    /// was ([`HealthWatch::changed`]).
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
        self.check_variables(environment, &registry)?;
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
            (None, None) => {
                nobody_else_is_meant(environment, &registry)?;
                tracing::warn!(
                    "no backend is chosen: messages stay in this process and are gone with it; {URL_VARIABLE} or {BACKEND_VARIABLE} \
                     chooses one"
                );
                DEFAULT_BACKEND
            }
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

    /// A variable that is one slip away from one of polymq's own, which is asked for and not set, is taken for a slip: the
    /// service would run with its default, which for the backend is this process. Others may belong to another program.
    fn check_variables(&self, environment: &Environment, registry: &Registry) -> Result<()> {
        let own = [
            (BACKEND_VARIABLE, self.backend.is_none() && self.url.is_none()),
            (URL_VARIABLE, self.backend.is_none() && self.url.is_none()),
            (UNLABELLED_VARIABLE, self.accept.is_none()),
            (PREFIX_VARIABLE, self.prefix.is_none()),
            (crate::BIND_VARIABLE, true),
        ];
        for (variable, _) in environment.with_prefix("POLYMQ_") {
            let of_backend =
                registry.names().any(|name| variable.starts_with(&format!("POLYMQ_{}_", name.to_ascii_uppercase())));
            let is_own = own.iter().any(|(own, _)| *own == variable);
            if of_backend || is_own || variable.starts_with("POLYMQ_TEST_") {
                continue;
            }
            let meant = own
                .iter()
                .find(|(own, asked_for)| *asked_for && is_slip_of(own, variable) && environment.get(own).is_none());
            if let Some((meant, _)) = meant {
                return Err(Error::new(ErrorKind::Config, format!("the environment variable {variable} is not known"))
                    .with_hint(format!(
                        "did you mean {meant}? If it belongs to another program, set {meant} as well"
                    )));
            }
            tracing::warn!(variable, "unknown variable with polymq's prefix is ignored");
        }
        Ok(())
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
            sent: Sent::default(),
            opened: Opened::default(),
            closed: Arc::default(),
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
    // Read here: by the time the task runs, the first connection may be lost.
    let mut health = Some(watch.now());
    tokio::spawn(async move {
        while let Some(now) = health {
            for callback in &callbacks {
                // A callback that panics is the caller's affair; the connection must not suffer from it.
                let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| callback(&now)));
            }
            health = watch.changed().await;
        }
    });
}

/// Where nothing chooses a backend, a setting of one is a choice that was forgotten: the service would run in this process.
fn nobody_else_is_meant(environment: &Environment, registry: &Registry) -> Result<()> {
    let known = inventory::iter::<KnownBackend>.into_iter().map(|known| known.name);
    for name in registry.names().chain(known).filter(|name| *name != DEFAULT_BACKEND) {
        let prefix = format!("POLYMQ_{}_", name.to_ascii_uppercase());
        if let Some((variable, _)) = environment.with_prefix(&prefix).next() {
            return Err(Error::new(
                ErrorKind::Config,
                format!("{variable} is set, but no variable chooses the backend {name}"),
            )
            .with_hint(format!(
                "set {BACKEND_VARIABLE}={name}, or {BACKEND_VARIABLE}={DEFAULT_BACKEND} to stay in this process"
            )));
        }
    }
    Ok(())
}
