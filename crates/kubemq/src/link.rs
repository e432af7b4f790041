//! One supervised connection: made, watched, and made again with backoff.
//!
//! Calls share it; streams end with it. It counts as lost when a call or a stream fails for want of it, or when a ping gets
//! no answer; each user starts afresh on the next one.

use std::{
    future::Future,
    ops::Deref,
    pin::pin,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use async_trait::async_trait;
use futures_util::{StreamExt, TryFutureExt, stream::BoxStream};
use polymq_core::{
    Error, ErrorKind, Result,
    watch::{self, Peer, Terms, Watch},
};
use polymq_kubemq_proto::PingResult;
use tokio::time::timeout;
use tonic::{Response, Status, Streaming};

use crate::{
    NAME,
    config::KubeMqConfig,
    connect::{self, Target, ask},
    error::{self, Effect},
    transport::{Client, Token},
};

/// Some servers confirm a subscription with its first message only: after this long it counts as there.
const SILENT: Duration = Duration::from_secs(1);

/// What a subscription gives.
pub(crate) type Items<T> = BoxStream<'static, std::result::Result<T, Status>>;

/// A connection to a server.
#[derive(Debug, Clone)]
pub(crate) struct Connected {
    pub(crate) client: Client,
    /// Whether the server is polymq's own, which takes single messages back to their places and confirms subscriptions at once.
    pub(crate) returns: bool,
    /// The server was asked to make a channel and did not answer: it does not manage channels.
    pub(crate) unmanaged: Arc<AtomicBool>,
}

/// A connection that lives now.
pub(crate) type Live = watch::Live<Connected>;

/// The server.
pub(crate) struct Server {
    config: Arc<KubeMqConfig>,
    target: Target,
    token: Token,
}

#[async_trait]
impl Peer for Server {
    type Live = Connected;
    type Answer = PingResult;

    fn backend(&self) -> &'static str {
        NAME
    }

    async fn connect(&self, generation: u64) -> Result<Connected> {
        let (client, about) = connect::connect(&self.config, &self.target, &self.token).await?;
        if generation == 1 {
            connect::check_version(&about);
        }
        Ok(Connected { client, returns: about.version.contains("polymq"), unmanaged: Arc::default() })
    }

    async fn ask(&self, connected: &Connected) -> Result<PingResult> {
        ask(&connected.client).await
    }

    fn is_loss(&self, error: &Error) -> bool {
        // A token that has expired is as bad as no connection, and a new one is looked for in the same way.
        let kinds = [ErrorKind::Disconnected, ErrorKind::Unauthenticated];
        let timed_out = error.kind() == ErrorKind::UnknownOutcome && !error.message().contains("Error 301");
        kinds.contains(&error.kind()) || timed_out
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").field("config", &self.config).finish_non_exhaustive()
    }
}

/// The users' view of a supervised connection.
#[derive(Debug)]
pub(crate) struct Link {
    watch: Arc<Watch<Server>>,
    pub(crate) config: Arc<KubeMqConfig>,
    pub(crate) client_id: String,
}

impl Link {
    /// Connects and supervises from then on. The first attempt's failure is the caller's, unless `connect_retry` says to
    /// go on trying.
    pub(crate) async fn start(config: Arc<KubeMqConfig>, target: Target) -> Result<LinkHandle> {
        let terms = Terms {
            heartbeat: config.heartbeat,
            connect_timeout: config.connect_timeout,
            connect_retry: config.connect_retry,
            reconnect_initial: config.reconnect_initial,
            reconnect_max: config.reconnect_max,
            reconnect_limit: config.reconnect_limit,
        };
        let random = || format!("polymq-{}", uuid::Uuid::new_v4().simple());
        let client_id = config.client_id.clone().unwrap_or_else(random);
        let token = Token::of(config.token_file.clone());
        let server = Server { config: Arc::clone(&config), target, token };
        let watch = Watch::start(server, terms).await.map_err(|error| connect::first(error, &config))?;
        Ok(LinkHandle(Arc::new(Self { watch, config, client_id })))
    }

    /// Runs one call, bounded, and no longer than its connection lives.
    pub(crate) async fn call<T>(
        &self,
        live: &Live,
        operation: &'static str,
        effect: Effect,
        limit: Duration,
        call: impl Future<Output = std::result::Result<Response<T>, Status>>,
    ) -> Result<T> {
        // Pinned here: each function on the way would make room for it once more.
        let call = pin!(call);
        let bounded = async {
            match timeout(limit, call).await {
                Ok(answer) => answer.map_err(|status| error::native(operation, effect, status)),
                Err(_) => Err(error::lost(operation, effect, "the broker did not answer in time")),
            }
        };
        match self.unless_over(live, bounded).await {
            Some(answer) => answer.map(Response::into_inner),
            None => Err(error::lost(operation, effect, &self.reason())),
        }
    }

    /// Subscribes; returns when the server has the subscription.
    pub(crate) async fn subscribe<T: Send + 'static>(
        &self,
        live: &Live,
        operation: &'static str,
        opening: impl Future<Output = std::result::Result<Response<Streaming<T>>, Status>> + Send + 'static,
    ) -> Result<Items<T>> {
        let mut opening = Box::pin(opening);
        let limit = self.config.request_timeout;
        if live.returns {
            return self.call(live, operation, Effect::Idempotent, limit, opening).await.map(StreamExt::boxed);
        }
        // Silence is no loss here, however short requests are.
        let confirmed = self.call(live, operation, Effect::Idempotent, limit.max(2 * SILENT), &mut opening);
        match timeout(SILENT, confirmed).await {
            Ok(items) => items.map(StreamExt::boxed),
            Err(_) => Ok(opening.map_ok(Response::into_inner).try_flatten_stream().boxed()),
        }
    }
}

impl Deref for Link {
    type Target = Watch<Server>;

    fn deref(&self) -> &Watch<Server> {
        &self.watch
    }
}

/// What users of a connection hold. When the last one is dropped, supervision ends and the connection with it.
#[derive(Debug)]
pub(crate) struct LinkHandle(Arc<Link>);

impl LinkHandle {
    pub(crate) fn link(&self) -> Arc<Link> {
        Arc::clone(&self.0)
    }
}

impl Deref for LinkHandle {
    type Target = Link;

    fn deref(&self) -> &Link {
        &self.0
    }
}

impl Drop for LinkHandle {
    fn drop(&mut self) {
        self.0.close("nobody uses it any more");
    }
}
