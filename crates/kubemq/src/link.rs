//! One supervised connection: made, watched, and made again with backoff.
//!
//! Calls share it; streams end with it. It counts as lost when a call or a stream fails for want of it, or when a ping gets
//! no answer; each user starts afresh on the next one.

use std::{
    fmt,
    future::Future,
    ops::Deref,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use polymq_core::{Error, ErrorKind, HealthReporter, Result};
use polymq_kubemq_proto::PingResult;
use tokio::{
    runtime::Handle,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tonic::Status;

use crate::{
    config::KubeMqConfig,
    connect::{self, Target, ask},
    error::{self, Effect},
    transport::{Client, Token},
};

/// A connection that lives now.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    pub(crate) client: Client,
    /// Whether the server is polymq's own, which takes single messages back to their places.
    pub(crate) returns: bool,
    /// Counts the connections, from 1.
    pub(crate) generation: u64,
}

#[derive(Debug, Clone)]
enum State {
    Down(Arc<str>),
    Up(u64),
    Closed(Arc<str>),
}

/// The users' view of a supervised connection.
pub(crate) struct Link {
    state: watch::Sender<State>,
    live: RwLock<Option<Live>>,
    pub(crate) config: Arc<KubeMqConfig>,
    pub(crate) client_id: String,
    pub(crate) token: Token,
    target: Target,
    pub(crate) health: HealthReporter,
    started: Instant,
    /// Milliseconds after `started` at which something was answered last.
    answered: AtomicU64,
    /// Where background tasks run, whoever asks for them.
    runtime: Handle,
}

impl Link {
    /// Connects and supervises from then on. The first attempt's failure is the caller's, unless `connect_retry` says to
    /// go on trying.
    pub(crate) async fn start(config: Arc<KubeMqConfig>, target: Target) -> Result<LinkHandle> {
        let random = || format!("polymq-{}", uuid::Uuid::new_v4().simple());
        let link = Arc::new(Self {
            state: watch::Sender::new(State::Down("not connected yet".into())),
            live: RwLock::new(None),
            client_id: config.client_id.clone().unwrap_or_else(random),
            config,
            token: Token::default(),
            target,
            health: HealthReporter::new(),
            started: Instant::now(),
            answered: AtomicU64::new(0),
            runtime: Handle::current(),
        });
        match connect::connect(&link.config, &link.target, &link.token).await {
            Ok((client, about)) => {
                connect::check_version(&about);
                link.up(client, &about, 1);
            }
            Err(error) if link.config.connect_retry => link.down(&error),
            Err(error) => return Err(connect::first(error, &link.config)),
        }
        link.spawn(supervise(Arc::clone(&link)));
        Ok(LinkHandle(link))
    }

    /// Runs a task where the connection was made: the caller may be a thread without a runtime, or of one that ends soon.
    pub(crate) fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(task)
    }

    /// The present connection, waited for; an error when there will be none any more.
    pub(crate) async fn live(&self) -> Result<Live> {
        let mut states = self.state.subscribe();
        let state = states.wait_for(|state| !matches!(state, State::Down(_))).await.map(|state| state.clone());
        match state {
            Ok(State::Up(_)) => self.live_now().ok_or_else(|| error::closed("connect")),
            _ => Err(error::closed("connect")),
        }
    }

    /// The present connection, waited for as long as one attempt to connect may take.
    pub(crate) async fn live_soon(&self, operation: &'static str) -> Result<Live> {
        match timeout(self.config.connect_timeout, self.live()).await {
            Ok(live) => live.map_err(|error| error.with_operation(operation)),
            Err(_) => Err(error::disconnected(operation, &self.reason())),
        }
    }

    pub(crate) fn live_now(&self) -> Option<Live> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(&*self.state.borrow(), State::Up(_))
    }

    /// Returns when the link is closed.
    pub(crate) async fn closed(&self) {
        let mut states = self.state.subscribe();
        let _ = states.wait_for(|state| matches!(state, State::Closed(_))).await;
    }

    /// Returns when this connection is no more.
    pub(crate) async fn over(&self, live: &Live) {
        let mut states = self.state.subscribe();
        let _ = states.wait_for(|state| !matches!(state, State::Up(now) if *now == live.generation)).await;
    }

    pub(crate) fn reason(&self) -> Arc<str> {
        match &*self.state.borrow() {
            State::Down(reason) | State::Closed(reason) => Arc::clone(reason),
            State::Up(_) => "connected".into(),
        }
    }

    /// Runs one call, bounded, and no longer than its connection lives.
    pub(crate) async fn call<T>(
        &self,
        live: &Live,
        operation: &'static str,
        effect: Effect,
        limit: Duration,
        call: impl Future<Output = std::result::Result<tonic::Response<T>, Status>>,
    ) -> Result<T> {
        let answer = tokio::select! {
            biased;
            answer = timeout(limit, call) => match answer {
                Ok(answer) => answer.map_err(|status| error::native(operation, effect, status)),
                Err(_) => Err(error::lost(operation, effect, "the broker did not answer in time")),
            },
            () = self.over(live) => return Err(error::lost(operation, effect, &self.reason())),
        };
        match answer {
            Ok(answer) => {
                self.answered();
                Ok(answer.into_inner())
            }
            Err(error) => {
                self.failed(live, &error);
                Err(error)
            }
        }
    }

    /// A call or a stream of this connection has failed; some failures are the connection's.
    pub(crate) fn failed(&self, live: &Live, error: &Error) {
        // A token that has expired is as bad as no connection, and a new one is looked for in the same way.
        let kinds = [ErrorKind::Disconnected, ErrorKind::Unauthenticated];
        let timed_out = error.kind() == ErrorKind::UnknownOutcome && !error.message().contains("Error 301");
        if kinds.contains(&error.kind()) || timed_out {
            self.lost(live, error.message());
        } else {
            self.answered();
        }
    }

    /// This connection is lost; news of an earlier one is no news.
    pub(crate) fn lost(&self, live: &Live, reason: &str) {
        let changed = self.state.send_if_modified(|state| {
            let current = matches!(state, State::Up(now) if *now == live.generation);
            if current {
                *state = State::Down(reason.into());
            }
            current
        });
        if changed {
            tracing::warn!(reason, "connection lost, reconnecting");
            self.health.down(reason);
        }
    }

    /// A round trip.
    pub(crate) async fn ping(&self) -> Result<PingResult> {
        let live = self.live_soon("ping").await?;
        self.ping_of(&live, self.config.connect_timeout).await
    }

    async fn ping_of(&self, live: &Live, limit: Duration) -> Result<PingResult> {
        let answer = tokio::select! {
            answer = timeout(limit, ask(&live.client)) => answer.unwrap_or_else(|_| {
                Err(error::disconnected("ping", "the broker did not answer in time"))
            }),
            () = self.over(live) => return Err(error::disconnected("ping", &self.reason())),
        };
        match &answer {
            Ok(_) => self.answered(),
            Err(error) => self.failed(live, error),
        }
        answer.map_err(|error| error.with_operation("ping"))
    }

    /// Ends supervision; what waits is answered.
    pub(crate) fn close(&self, reason: &str) {
        self.change(State::Closed(reason.into()));
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.health.closed(reason);
    }

    /// Something came from the broker.
    pub(crate) fn answered(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered.fetch_max(millis, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        self.started.elapsed().saturating_sub(Duration::from_millis(self.answered.load(Ordering::Relaxed)))
    }

    fn up(&self, client: Client, about: &PingResult, generation: u64) {
        let returns = about.version.contains("polymq");
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = Some(Live { client, returns, generation });
        self.answered();
        if self.change(State::Up(generation)) {
            self.health.up();
        } else {
            *self.live.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    fn down(&self, error: &Error) {
        if self.change(State::Down(error.message().into())) {
            self.health.down(error.message());
        }
    }

    /// Closed is final.
    fn change(&self, next: State) -> bool {
        self.state.send_if_modified(|state| {
            let open = !matches!(state, State::Closed(_));
            if open {
                *state = next;
            }
            open
        })
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("state", &*self.state.borrow())
            .field("config", &self.config)
            .finish_non_exhaustive()
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

async fn supervise(link: Arc<Link>) {
    let mut states = link.state.subscribe();
    let mut generation = 1;
    let mut found = Instant::now();
    let mut wait = link.config.reconnect_initial;
    loop {
        let state = states.borrow_and_update().clone();
        match state {
            State::Closed(_) => return,
            State::Up(_) => {
                let quiet = link.config.heartbeat.saturating_sub(link.silence());
                tokio::select! {
                    _ = states.changed() => {}
                    () = sleep(quiet) => {
                        let Some(live) = link.live_now() else { return };
                        if link.silence() >= link.config.heartbeat {
                            // Its failure is the news; it spreads it itself.
                            let _ = link.ping_of(&live, link.config.heartbeat).await;
                        }
                    }
                }
            }
            State::Down(_) => {
                generation += 1;
                // One that comes and goes is asked less and less often too.
                if found.elapsed() > link.config.reconnect_max {
                    wait = link.config.reconnect_initial;
                }
                tokio::select! {
                    biased;
                    () = link.closed() => return,
                    again = reconnect(&link, &mut wait, generation) => if !again { return },
                }
                found = Instant::now();
            }
        }
    }
}

/// `false` when it was given up.
async fn reconnect(link: &Link, wait: &mut Duration, generation: u64) -> bool {
    let config = &link.config;
    let mut failures = 0_u32;
    loop {
        // Jitter, so that a thousand clients do not come back in the same instant.
        sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        *wait = (*wait * 2).min(config.reconnect_max);
        match connect::connect(config, &link.target, &link.token).await {
            Ok((client, about)) => {
                tracing::info!("connected");
                link.up(client, &about, generation);
                return true;
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                tracing::debug!(failures, %error, "attempt to connect failed");
                link.down(&error);
                if config.reconnect_limit > 0 && failures >= config.reconnect_limit {
                    link.close(&format!("gave up after {failures} attempts: {}", error.message()));
                    return false;
                }
            }
        }
    }
}
