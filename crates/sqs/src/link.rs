//! What stands for a connection: clients of the two services, and a watch over whether anybody answers.
//!
//! HTTP has no connection to lose. The service counts as lost when a request got no answer, and is asked again and again
//! then, by one task, while everybody else waits; it counts as found when it answers anything. The service is SQS: SNS may be
//! away alone, and then only topics wait for it.

use std::{future::Future, ops::Deref, sync::Arc, time::Duration};

use async_trait::async_trait;
use polymq_core::{
    Error, ErrorKind, Result,
    watch::{Peer, Terms, Watch},
};
use tokio::time::timeout;

use crate::{
    NAME,
    clients::{Clients, Live, ask, clients},
    config::SqsConfig,
    error::{self, Effect},
    place::Place,
    policy::Grants,
};

/// The two services.
#[derive(Debug)]
pub(crate) struct Service {
    config: Arc<SqsConfig>,
    grants: Arc<Grants>,
}

#[async_trait]
impl Peer for Service {
    type Live = Clients;
    type Answer = ();

    fn backend(&self) -> &'static str {
        NAME
    }

    async fn connect(&self, _: u64) -> Result<Clients> {
        // Fresh ones, with credentials that are looked for anew: idle connections may lead nowhere, and the credentials
        // that were found before may be what was refused.
        let clients = clients(&self.config, Arc::clone(&self.grants)).await?;
        let asked = timeout(self.config.connect_timeout, ask(&clients)).await;
        match asked.unwrap_or_else(|_| Err(error::disconnected("connect", "no answer in time"))) {
            Ok(()) => Ok(clients),
            Err(error) => Err(with_place(error, &self.config.place()?)),
        }
    }

    async fn ask(&self, clients: &Clients) -> Result<()> {
        ask(clients).await
    }

    fn is_loss(&self, error: &Error) -> bool {
        match error.kind() {
            // Credentials that have expired are as bad as no connection, and new ones are looked for in the same way.
            ErrorKind::Disconnected | ErrorKind::Unauthenticated => true,
            // A send without an answer, or one that the service has answered with its own trouble.
            ErrorKind::UnknownOutcome => !error::is_answered(error),
            _ => false,
        }
    }

    fn is_silence(&self, error: &Error) -> bool {
        // A service that refuses our credentials still answers what it was asked before.
        error.kind() != ErrorKind::Unauthenticated
    }
}

/// The users' view of the supervised service.
#[derive(Debug)]
pub(crate) struct Link {
    watch: Arc<Watch<Service>>,
    pub(crate) config: Arc<SqsConfig>,
}

impl Link {
    /// Asks the service whether it is there, and supervises from then on. The first attempt's failure is the caller's,
    /// unless `connect_retry` says to go on trying.
    pub(crate) async fn start(config: Arc<SqsConfig>) -> Result<LinkHandle> {
        let terms = Terms {
            heartbeat: config.heartbeat,
            connect_timeout: config.connect_timeout,
            connect_retry: config.connect_retry,
            reconnect_initial: config.reconnect_initial,
            reconnect_max: config.reconnect_max,
            reconnect_limit: config.reconnect_limit,
        };
        let watch = Watch::start(Service { config: Arc::clone(&config), grants: Arc::default() }, terms).await?;
        Ok(LinkHandle(Arc::new(Self { watch, config })))
    }

    /// Runs one request, bounded, and no longer than the service counts as there.
    pub(crate) fn call<T>(
        &self,
        live: &Live,
        operation: &'static str,
        effect: Effect,
        limit: Duration,
        request: impl Future<Output = Result<T>>,
    ) -> impl Future<Output = Result<T>> {
        // Boxed before anything waits: each function on the way would make room for it once more.
        let request = Box::pin(bounded(operation, effect, limit, request));
        async move {
            let answer = self.unless_over(live, request).await;
            answer.unwrap_or_else(|| Err(error::lost(operation, effect, &self.reason())))
        }
    }

    /// The same for what asks SNS, alone or beside SQS: nothing is concluded from it about SQS, so queues go on while SNS is
    /// away. Only the credentials are those of both.
    pub(crate) fn call_with_sns<T>(
        &self,
        live: &Live,
        operation: &'static str,
        effect: Effect,
        limit: Duration,
        request: impl Future<Output = Result<T>>,
    ) -> impl Future<Output = Result<T>> {
        let request = Box::pin(bounded(operation, effect, limit, request));
        async move {
            let answer = tokio::select! {
                biased;
                answer = request => answer,
                () = self.closed() => Err(error::lost(operation, effect, &self.reason())),
            };
            if let Err(error) = &answer
                && error.kind() == ErrorKind::Unauthenticated
                && self.config.may_renew()
            {
                self.failed(live, error);
            }
            answer
        }
    }
}

/// A request that is answered in time, or not at all.
async fn bounded<T>(
    operation: &'static str,
    effect: Effect,
    limit: Duration,
    request: impl Future<Output = Result<T>>,
) -> Result<T> {
    let answer = timeout(limit, request).await;
    answer.unwrap_or_else(|_| Err(error::lost(operation, effect, "the service did not answer in time")))
}

impl Deref for Link {
    type Target = Watch<Service>;

    fn deref(&self) -> &Watch<Service> {
        &self.watch
    }
}

/// What users of the link hold. When the last one is dropped, supervision ends.
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

fn with_place(error: Error, place: &Place) -> Error {
    let message = format!("{} ({place})", error.message());
    let hint = error.hint().map(str::to_owned);
    let retry = error.retry();
    let placed = Error::new(error.kind(), message).with_retry(retry).with_backend(NAME).with_operation("connect");
    match hint {
        Some(hint) => placed.with_hint(hint),
        None => placed,
    }
    .with_source(error)
}
