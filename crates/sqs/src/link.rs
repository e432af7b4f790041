//! What stands for a connection: clients of the two services, and a watch over whether anybody answers.
//!
//! HTTP has no connection to lose. The service counts as lost when a request got no answer, and is asked again and again
//! then, by one task, while everybody else waits; it counts as found when it answers anything.

use std::{
    future::Future,
    ops::Deref,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use polymq_core::{Error, ErrorKind, HealthReporter, Result};
use tokio::{
    runtime::Handle,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    NAME,
    clients::{Live, ask, clients},
    config::{Place, SqsConfig},
    error::{self, Effect},
};

#[derive(Debug, Clone)]
enum State {
    /// Why, and whether it is silent. A service that refuses our credentials still answers what it was asked before.
    Down(Arc<str>, bool),
    /// The generation, and the first one since it was silent.
    Up(u64, u64),
    Closed(Arc<str>),
}

impl State {
    /// Whether a request of this generation will get no answer any more.
    fn is_over(&self, generation: u64) -> bool {
        match self {
            Self::Down(_, silent) => *silent,
            Self::Up(_, since) => *since > generation,
            Self::Closed(_) => true,
        }
    }
}

/// The users' view of the supervised service.
#[derive(Debug)]
pub(crate) struct Link {
    state: watch::Sender<State>,
    /// None any more when it is closed: idle connections end then.
    clients: RwLock<Option<Live>>,
    pub(crate) config: Arc<SqsConfig>,
    pub(crate) health: HealthReporter,
    started: Instant,
    /// Milliseconds after `started` at which something was answered last.
    answered: AtomicU64,
    runtime: Handle,
}

impl Link {
    /// Asks the service whether it is there, and supervises from then on. The first attempt's failure is the caller's,
    /// unless `connect_retry` says to go on trying.
    pub(crate) async fn start(config: Arc<SqsConfig>) -> Result<LinkHandle> {
        let place = config.place()?;
        let clients = clients(&config, 0).await?;
        let link = Arc::new(Self {
            state: watch::Sender::new(State::Down("not connected yet".into(), true)),
            clients: RwLock::new(None),
            health: HealthReporter::new(),
            started: Instant::now(),
            answered: AtomicU64::new(0),
            runtime: Handle::current(),
            config: Arc::clone(&config),
        });
        match link.ask(&clients, config.connect_timeout).await {
            Ok(()) => link.up(clients, 1, 1),
            Err(error) if config.connect_retry => link.down(&error),
            Err(error) => return Err(with_place(error, &place)),
        }
        link.spawn(supervise(Arc::clone(&link)));
        Ok(LinkHandle(link))
    }

    /// Runs a task where the connection was made: the caller may be a thread without a runtime, or of one that ends soon.
    pub(crate) fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(task)
    }

    /// The clients, as soon as the service is there; an error when it will not be any more.
    pub(crate) async fn live(&self) -> Result<Live> {
        let mut states = self.state.subscribe();
        let state = states.wait_for(|state| !matches!(state, State::Down(..))).await.map(|state| state.clone());
        match state {
            Ok(State::Up(..)) => self.clients().ok_or_else(|| error::closed("connect")),
            _ => Err(error::closed("connect")),
        }
    }

    /// The clients, waited for as long as one attempt to connect may take.
    pub(crate) async fn live_soon(&self, operation: &'static str) -> Result<Live> {
        match timeout(self.config.connect_timeout, self.live()).await {
            Ok(live) => live.map_err(|error| error.with_operation(operation)),
            Err(_) => Err(error::disconnected(operation, &self.reason())),
        }
    }

    /// The clients, if the service is there.
    pub(crate) fn live_now(&self) -> Option<Live> {
        self.is_up().then(|| self.clients()).flatten()
    }

    fn clients(&self) -> Option<Live> {
        self.clients.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says when the service was lost, found, or closed.
    pub(crate) fn changes(&self) -> LinkWatch {
        LinkWatch(self.state.subscribe())
    }

    pub(crate) fn is_up(&self) -> bool {
        matches!(&*self.state.borrow(), State::Up(..))
    }

    pub(crate) fn is_closed(&self) -> bool {
        matches!(&*self.state.borrow(), State::Closed(_))
    }

    /// Returns when the link is closed.
    pub(crate) async fn closed(&self) {
        let mut states = self.state.subscribe();
        let _ = states.wait_for(|state| matches!(state, State::Closed(_))).await;
    }

    fn reason(&self) -> Arc<str> {
        match &*self.state.borrow() {
            State::Down(reason, _) | State::Closed(reason) => Arc::clone(reason),
            State::Up(..) => "connected".into(),
        }
    }

    /// Runs one request, bounded, and no longer than the service counts as there.
    pub(crate) async fn call<T>(
        &self,
        live: &Live,
        operation: &'static str,
        effect: Effect,
        limit: Duration,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut states = self.state.subscribe();
        // What it waits for is let go at once: holding it while the reason is read would stop who writes in between.
        let gone = async { drop(states.wait_for(|state| state.is_over(live.generation)).await) };
        let answer = tokio::select! {
            biased;
            answer = timeout(limit, request) => match answer {
                Ok(answer) => answer,
                Err(_) => Err(error::lost(operation, effect, "the service did not answer in time")),
            },
            _ = gone => return Err(error::lost(operation, effect, &self.reason())),
        };
        match &answer {
            // Credentials that have expired are as bad as no connection, and new ones are looked for in the same way.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::Disconnected | ErrorKind::UnknownOutcome | ErrorKind::Unauthenticated
                ) =>
            {
                self.lost(live.generation, error);
            }
            _ => self.answered(),
        }
        answer
    }

    /// A round trip.
    pub(crate) async fn ping(&self) -> Result<()> {
        let live = self.live_soon("ping").await?;
        self.call(&live, "ping", Effect::Idempotent, self.config.connect_timeout, ask(&live)).await
    }

    /// Ends supervision; what waits is answered.
    pub(crate) fn close(&self, reason: &str) {
        self.change(State::Closed(reason.into()));
        *self.clients.write().unwrap_or_else(PoisonError::into_inner) = None;
        self.health.closed(reason);
    }

    async fn ask(&self, live: &Live, limit: Duration) -> Result<()> {
        match timeout(limit, ask(live)).await {
            Ok(answer) => answer,
            Err(_) => Err(error::disconnected("connect", "no answer in time")),
        }
    }

    fn answered(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered.fetch_max(millis, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        self.started.elapsed().saturating_sub(Duration::from_millis(self.answered.load(Ordering::Relaxed)))
    }

    fn up(&self, mut live: Live, generation: u64, since: u64) {
        live.generation = generation;
        *self.clients.write().unwrap_or_else(PoisonError::into_inner) = Some(live);
        self.answered();
        if self.change(State::Up(generation, since)) {
            self.health.up();
        } else {
            *self.clients.write().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    fn down(&self, error: &Error) {
        if self.change(State::Down(error.message().into(), is_silence(error))) {
            self.health.down(error.message());
        }
    }

    /// A request of this generation was lost; those of an earlier one say nothing new.
    fn lost(&self, generation: u64, error: &Error) {
        let changed = self.state.send_if_modified(|state| {
            let current = matches!(state, State::Up(now, _) if *now == generation);
            if current {
                *state = State::Down(error.message().into(), is_silence(error));
            }
            current
        });
        if changed {
            tracing::warn!(%error, "connection lost, reconnecting");
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

/// Credentials that were refused were refused by somebody.
fn is_silence(error: &Error) -> bool {
    error.kind() != ErrorKind::Unauthenticated
}

/// Follows the state of the link.
#[derive(Debug)]
pub(crate) struct LinkWatch(watch::Receiver<State>);

impl LinkWatch {
    /// Waits for the next change.
    pub(crate) async fn changed(&mut self) {
        // A watch without a sender is the end of the link too; nothing changes any more.
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
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

async fn supervise(link: Arc<Link>) {
    let mut states = link.state.subscribe();
    let (mut generation, mut since) = (1, 1);
    let mut found = Instant::now();
    let mut wait = link.config.reconnect_initial;
    loop {
        let state = states.borrow_and_update().clone();
        match state {
            State::Closed(_) => return,
            State::Up(..) => {
                let quiet = link.config.heartbeat.saturating_sub(link.silence());
                tokio::select! {
                    _ = states.changed() => {}
                    () = sleep(quiet) => {
                        let Ok(live) = link.live().await else { return };
                        if link.silence() >= link.config.heartbeat {
                            // Its failure is the news; `call` spreads it.
                            let _ = link.call(&live, "ping", Effect::Idempotent, link.config.heartbeat, ask(&live)).await;
                        }
                    }
                }
            }
            State::Down(_, silent) => {
                generation += 1;
                if silent {
                    since = generation;
                }
                // One that comes and goes is asked less and less often too.
                if found.elapsed() > link.config.reconnect_max {
                    wait = link.config.reconnect_initial;
                }
                tokio::select! {
                    biased;
                    () = link.closed() => return,
                    again = reconnect(&link, &mut wait, generation, since) => if !again { return },
                }
                found = Instant::now();
            }
        }
    }
}

/// `false` when it was given up.
async fn reconnect(link: &Link, wait: &mut Duration, generation: u64, since: u64) -> bool {
    let config = &link.config;
    let mut failures = 0_u32;
    loop {
        // Jitter, so that a thousand clients do not come back in the same instant.
        sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        *wait = (*wait * 2).min(config.reconnect_max);
        // Fresh ones, with credentials that are looked for anew: idle connections may lead nowhere, and the credentials
        // that were found before may be what was refused.
        let attempt = match clients(config, generation).await {
            Ok(live) => link.ask(&live, config.connect_timeout).await.map(|()| live),
            Err(error) => Err(error),
        };
        match attempt {
            Ok(live) => {
                tracing::info!("connected");
                link.up(live, generation, since);
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
