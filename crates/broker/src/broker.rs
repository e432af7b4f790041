//! The broker as a value: built, started, asked where it listens, stopped.

#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeSet, HashMap},
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use polymq_kubemq_proto::{EventReceive, PingResult, kubemq_server::KubemqServer};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::{
    access::{Access, AccessFiles},
    connections::{Door, Tls, accept},
    counts::Counts,
    error::{BrokerError, Result},
    events::Listeners,
    http,
    limits::Limits,
    log::Logs,
    numbers::Numbers,
    queues::Queues,
    requests::Requests,
    service::{Service, Transactions},
    store::Store,
    tls::TlsFiles,
    tokens::TokenAlgorithm,
    under_way::{Counting, UnderWay},
};

/// The version that SDKs see: they look for 2.x.
const VERSION: &str = concat!("2.4.0-polymq-", env!("CARGO_PKG_VERSION"));

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) queues: Arc<Queues>,
    pub(crate) logs: Logs,
    pub(crate) events: Listeners<EventReceive>,
    pub(crate) requests: Requests,
    /// Channels that were created and hold nothing, by pattern.
    named: Mutex<HashMap<String, BTreeSet<String>>>,
    pub(crate) transactions: Transactions,
    pub(crate) stopping: CancellationToken,
    pub(crate) access: Arc<Access>,
    pub(crate) store: Store,
    pub(crate) counts: Counts,
    pub(crate) under_way: Arc<UnderWay>,
    started: (Instant, SystemTime),
}

impl Shared {
    /// Does something with the names that were created in a pattern that holds nothing.
    pub(crate) fn named<T>(&self, kind: &str, work: impl FnOnce(&mut BTreeSet<String>) -> T) -> T {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        work(named.entry(kind.to_owned()).or_default())
    }

    /// Names and patterns that somebody listens to.
    pub(crate) fn listened(&self, kind: &str) -> Vec<String> {
        match kind {
            "events" => self.events.patterns(),
            "commands" => self.requests.commands.patterns(),
            "queries" => self.requests.queries.patterns(),
            _ => Vec::new(),
        }
    }

    pub(crate) fn uptime(&self) -> Duration {
        self.started.0.elapsed()
    }

    /// What a ping is answered.
    pub(crate) fn about(&self) -> PingResult {
        let since = self.started.1.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        PingResult {
            host: "polymq".to_owned(),
            version: VERSION.to_owned(),
            server_start_time: since.as_secs().cast_signed(),
            server_up_time_seconds: self.uptime().as_secs().cast_signed(),
        }
    }
}

/// How a broker is started.
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing until it is started"]
pub struct Builder {
    listen: String,
    data_dir: Option<PathBuf>,
    limits: Limits,
    access: AccessFiles,
    tls: Option<TlsFiles>,
    client_ca: Option<PathBuf>,
    http: Option<String>,
    drain: Duration,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:50000".to_owned(),
            data_dir: None,
            limits: Limits::default(),
            access: AccessFiles::default(),
            tls: None,
            client_ca: None,
            http: None,
            drain: Duration::from_secs(10),
        }
    }
}

impl Builder {
    /// Where to listen, as `HOST:PORT`; port 0 takes a free one. The default is `127.0.0.1:50000`.
    pub fn listen(mut self, address: impl Into<String>) -> Self {
        self.listen = address.into();
        self
    }

    /// The folder of what must survive; it is made when it is not there. Without one, everything is in memory and gone
    /// with the broker.
    pub fn data_dir(mut self, folder: impl Into<PathBuf>) -> Self {
        self.data_dir = Some(folder.into());
        self
    }

    /// What requests may ask for.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Asks every call but `Ping` for a JSON web token in the metadata `authorization`, without `Bearer`, signed in this
    /// way. The file holds the secret for HS…, a public key as PEM (`BEGIN PUBLIC KEY`) for RS… and ES…; the end of
    /// its last line does not count. `exp` and `nbf` are checked when a token has them, with 30 s for clocks that differ; `ClientID`
    /// is who the token is for. See [`Broker::reload`] for a new key.
    pub fn token_key(mut self, algorithm: TokenAlgorithm, file: impl Into<PathBuf>) -> Self {
        self.access.token = Some((algorithm, file.into()));
        self
    }

    /// Allows only what the rules in a TOML file allow; the rest is refused with "Error 412: access denied to resource".
    ///
    /// ```toml
    /// [[rule]]
    /// resources = ["queues"]      # events, events_store, commands, queries, queues; left out: all of them
    /// client = "billing-.*"       # a regular expression for the whole client id; left out: every client
    /// channel = "orders\\..*"     # a regular expression for the whole name of the channel; left out: every channel
    /// allow = ["read", "write"]   # what the rule allows
    /// ```
    ///
    /// Reading is to subscribe, receive, peek and list; writing is to send, to ask, to empty a queue, to make and to delete a
    /// channel; who names a queue for dead letters must be allowed to write to it. The client id is the `ClientID` of
    /// the token when it has one, else what the request says, which anybody can write.
    pub fn rules(mut self, file: impl Into<PathBuf>) -> Self {
        self.access.rules = Some(file.into());
        self
    }

    /// Serves with TLS only, 1.2 or later: PEM files of the certificate, with what its authority asks to be sent along, and of
    /// its private key. See [`Broker::reload`] for new ones.
    pub fn tls(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.tls = Some(TlsFiles { certificate: certificate.into(), key: key.into(), client_ca: None });
        self
    }

    /// Serves only clients that show a certificate of the authorities in this PEM file. Needs [`Builder::tls`].
    pub fn client_ca(mut self, file: impl Into<PathBuf>) -> Self {
        self.client_ca = Some(file.into());
        self
    }

    /// Serves health and metrics over HTTP at another address, as `HOST:PORT`: `/health/live`, `/health/ready` and `/metrics`, to
    /// everybody who reaches it. Without one, they are not served.
    pub fn http(mut self, address: impl Into<String>) -> Self {
        self.http = Some(address.into());
        self
    }

    /// How long a stop waits for connections to end by themselves; then they are cut. The default is 10 s.
    pub fn drain(mut self, most: Duration) -> Self {
        self.drain = most;
        self
    }

    /// Opens the store, listens and serves in tasks of the present runtime.
    ///
    /// # Errors
    ///
    /// [`BrokerError::Option`] when a file that an option names cannot be used, [`BrokerError::Store`] when the data cannot
    /// be opened or are damaged, [`BrokerError::Listen`] when an address cannot be had.
    pub async fn start(self) -> Result<Broker> {
        let counts = Counts::default();
        let access = Access::open(self.access.clone(), counts.clone())?;
        let tls = match (self.tls.clone(), self.client_ca.clone()) {
            (Some(files), client_ca) => Some(TlsFiles { client_ca, ..files }),
            (None, Some(file)) => {
                let what =
                    "clients can show certificates of it only with TLS: give the server's certificate and key too";
                return Err(BrokerError::Option { file, what: what.to_owned() });
            }
            (None, None) => None,
        };
        let tls = Tls::open(tls)?;
        let (listener, address) = bind(&self.listen).await?;
        let http = match &self.http {
            Some(address) => Some(bind(address).await?),
            None => None,
        };
        let http_address = http.as_ref().map(|(_, address)| *address);
        let Opened { shared, store, clock } = self.open(access, &counts)?;
        let places = Arc::new(Semaphore::new(self.limits.connections.min(Semaphore::MAX_PERMITS)));
        let http = http.map(|(listener, _)| tokio::spawn(http::serve(listener, Arc::clone(&shared))));
        let cut = CancellationToken::new();
        let door = Door { tls: Arc::clone(&tls), places, counts, cut: cut.clone() };
        let service = self.service(&shared);
        let server = Server::builder()
            .http2_keepalive_interval(Some(Duration::from_secs(30)))
            .max_concurrent_streams(self.limits.streams)
            .add_service(Counting {
                service,
                access: Arc::clone(&shared.access),
                under_way: Arc::clone(&shared.under_way),
            })
            .serve_with_incoming_shutdown(accept(listener, door), shared.stopping.clone().cancelled_owned());
        let server = tokio::spawn(server);
        tracing::info!(%address, http = ?http_address, data_dir = ?self.data_dir, "broker listens");
        Ok(Broker { address, http_address, shared, tls, store, server, clock, http, cut, drain: self.drain })
    }

    /// The same without any address: for a program that is its own broker. Calls come through [`InProcess::call`]; tokens,
    /// rules and TLS have no effect, since there is nobody to keep out.
    ///
    /// The clock of delays runs in the present runtime.
    ///
    /// # Errors
    ///
    /// [`BrokerError::Store`] when the data cannot be opened, are damaged, or are another process's at present.
    pub fn in_process(self) -> Result<InProcess> {
        let counts = Counts::default();
        let access = Access::open(AccessFiles::default(), counts.clone())?;
        let opened = self.open(access, &counts)?;
        let service = self.service(&opened.shared);
        Ok(InProcess { service, opened })
    }

    fn service(&self, shared: &Arc<Shared>) -> KubemqServer<Service> {
        KubemqServer::new(Service(Arc::clone(shared)))
            // Wider than what a message may have: one that is too large is refused by itself then, and ends no stream with others.
            .max_decoding_message_size((self.limits.message + (1 << 20)).max(16 << 20))
            .max_encoding_message_size(usize::MAX)
    }

    fn open(&self, access: Arc<Access>, counts: &Counts) -> Result<Opened> {
        let store = match &self.data_dir {
            Some(folder) => Store::open(folder, &self.limits)?,
            None => Store::in_memory(&self.limits)?,
        };
        let stored = store.channels()?;
        let numbers = Numbers::after(&stored);
        let queues = Arc::new(Queues::open(store.clone(), self.limits.clone(), Arc::clone(&numbers), stored.clone())?);
        let shared = Arc::new(Shared {
            queues: Arc::clone(&queues),
            logs: Logs::open(store.clone(), self.limits.clone(), numbers, stored),
            events: Listeners::new(self.limits.waiting, counts.lost.clone()),
            requests: Requests::new(&self.limits, &counts.lost),
            named: Mutex::default(),
            transactions: Transactions::default(),
            stopping: CancellationToken::new(),
            access,
            store: store.clone(),
            counts: counts.clone(),
            under_way: UnderWay::new(self.limits.requests, self.limits.request_idle),
            started: (Instant::now(), SystemTime::now()),
        });
        let timed = Arc::clone(&shared);
        let clock = tokio::spawn(async move {
            tokio::join!(Arc::clone(&queues).keep_time(), queues.sweep(), timed.logs.keep_time());
        });
        Ok(Opened { shared, store, clock })
    }
}

/// What a broker is without its address.
#[derive(Debug)]
struct Opened {
    shared: Arc<Shared>,
    store: Store,
    clock: JoinHandle<()>,
}

/// A broker inside this process, without any socket. Dropped, it stops without waiting; what was answered is on disk.
#[derive(Debug)]
pub struct InProcess {
    service: KubemqServer<Service>,
    opened: Opened,
}

impl InProcess {
    /// Answers one gRPC call of the protocol.
    pub fn call(
        &self,
        request: tonic::codegen::http::Request<tonic::body::Body>,
    ) -> impl Future<Output = tonic::codegen::http::Response<tonic::body::Body>> + Send + use<> {
        let answer = tonic::codegen::Service::call(&mut self.service.clone(), request);
        async move {
            match answer.await {
                Ok(answer) => answer,
                Err(never) => match never {},
            }
        }
    }

    /// Refuses new calls, ends streams, gives back what is lent, and closes the store when everything is on disk.
    pub async fn stop(self) {
        self.opened.shared.stopping.cancel();
        self.opened.shared.logs.end_readers().await;
        let store = self.opened.store.clone();
        let _ = tokio::task::spawn_blocking(move || store.close()).await;
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        self.opened.shared.stopping.cancel();
        self.opened.clock.abort();
    }
}

/// A broker that runs. Dropped, it stops without waiting; what was answered is on disk.
#[derive(Debug)]
pub struct Broker {
    address: SocketAddr,
    shared: Arc<Shared>,
    tls: Arc<Tls>,
    store: Store,
    server: JoinHandle<std::result::Result<(), tonic::transport::Error>>,
    clock: JoinHandle<()>,
    http: Option<JoinHandle<()>>,
    http_address: Option<SocketAddr>,
    /// Ends every connection.
    cut: CancellationToken,
    drain: Duration,
}

async fn bind(address: &str) -> Result<(TcpListener, SocketAddr)> {
    let failed = |cause| BrokerError::Listen { address: address.to_owned(), cause };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

impl Broker {
    /// A broker in memory at KubeMQ's port of this machine, until told otherwise.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where health and metrics are, when they are served.
    #[must_use]
    pub fn http_address(&self) -> Option<SocketAddr> {
        self.http_address
    }

    /// Reads the files of TLS, the token key and the rules anew. Connections from now on have the new certificates, calls
    /// the new key, and requests the new rules, also on streams that are open.
    ///
    /// # Errors
    ///
    /// [`BrokerError::Option`] when a file cannot be used; then everything stays as it was.
    pub async fn reload(&self) -> Result<()> {
        // All of them are read before any is taken: one that is wrong leaves the others as they were too.
        match self.tls.read().and_then(|tls| Ok((tls, self.shared.access.read()?))) {
            Ok((tls, access)) => {
                tls();
                access();
                tracing::info!("certificates, keys and rules are read anew");
                Ok(())
            }
            Err(cause) => {
                tracing::error!(%cause, "certificates, keys and rules stay as they were");
                Err(cause)
            }
        }
    }

    /// Waits until the broker cannot go on and must be started anew: a sync to the disk has failed, so it stores and gives
    /// nothing any more. Nothing that was answered is lost by that. Never ends otherwise.
    pub async fn failed(&self) -> BrokerError {
        self.store.failure().await.into()
    }

    /// Refuses new calls, ends streams, gives back what is lent, and closes the store when everything is on disk. What was
    /// sent before and is not answered by then was not taken; acknowledgements that are on their way count. Takes as long as
    /// [`Builder::drain`] at most, and what the disk needs.
    ///
    /// Tells why not everything is on disk, when a sync has failed by then, as [`Broker::failed`] does before: what was answered is,
    /// and what was acknowledged last may come again.
    ///
    /// When this future is dropped, the broker ends at once, as by [`Drop`].
    pub async fn stop(mut self) -> Option<BrokerError> {
        tracing::info!("broker stops: no new calls, streams end");
        self.shared.stopping.cancel();
        if tokio::time::timeout(self.drain, &mut self.server).await.is_err() {
            tracing::warn!(after = ?self.drain, "connections that did not end by themselves are cut");
            self.cut.cancel();
            self.server.abort();
        }
        self.clock.abort();
        self.shared.logs.end_readers().await;
        let store = self.store.clone();
        let _ = tokio::task::spawn_blocking(move || store.close()).await;
        if let Some(cause) = self.store.damage() {
            tracing::error!(%cause, "damage was found while the broker ran");
        }
        if let Some(cause) = self.store.failed() {
            tracing::error!(%cause, "broker has stopped; what was acknowledged last may come again");
            return Some(cause.clone().into());
        }
        tracing::info!(bytes = self.store.room().used(), "broker has stopped; everything is on disk");
        None
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.shared.stopping.cancel();
        self.cut.cancel();
        self.clock.abort();
        if let Some(http) = &self.http {
            http.abort();
        }
    }
}
