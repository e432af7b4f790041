//! A watch over the other side, for backends whose client library keeps none.
//!
//! Somebody is asked when nothing was heard for a heartbeat. The other side counts as lost when it does not answer, or when a
//! request fails in a way that says so; one task then connects again and again, with backoff and jitter, while everybody else
//! waits. Closed is final.

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

use async_trait::async_trait;
use tokio::{
    runtime::Handle,
    sync::watch,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{Error, ErrorKind, HealthReporter, HealthWatch, Result, Retry};

/// The other side, as a backend knows it.
#[async_trait]
pub trait Peer: Send + Sync + fmt::Debug + 'static {
    /// What requests need: clients, a channel. A clone is the same connection.
    type Live: Clone + Send + Sync + fmt::Debug + 'static;
    /// What the other side says when it is asked.
    type Answer: Send;

    /// The backend's name, for errors.
    fn backend(&self) -> &'static str;

    /// One attempt, bounded; `Ok` when somebody has answered. The first attempt has the number 1.
    async fn connect(&self, generation: u64) -> Result<Self::Live>;

    /// A round trip.
    async fn ask(&self, live: &Self::Live) -> Result<Self::Answer>;

    /// Whether a request that failed so says that the other side is lost; anything else is a sign of life.
    fn is_loss(&self, error: &Error) -> bool;

    /// Whether requests that are on their way will get no answer after this loss. They do when the other side is there and
    /// only refuses our credentials.
    fn is_silence(&self, error: &Error) -> bool {
        let _ = error;
        true
    }
}

/// How long is waited, and how often is tried.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// The other side is asked after so long without a word, and has as long to answer.
    pub heartbeat: Duration,
    /// How long those wait who need a connection now.
    pub connect_timeout: Duration,
    /// Whether a first attempt that fails is repeated like any other; settings that are wrong are an error all the same.
    pub connect_retry: bool,
    /// The first pause before connecting again.
    pub reconnect_initial: Duration,
    /// The longest one; each is twice the one before.
    pub reconnect_max: Duration,
    /// How many attempts in a row may fail before it is closed; 0: any number.
    pub reconnect_limit: u32,
}

/// A connection that lives now.
#[derive(Debug, Clone)]
pub struct Live<T> {
    inner: T,
    generation: u64,
}

impl<T> Deref for Live<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

#[derive(Debug, Clone)]
enum State {
    /// Why, and whether what is on its way gets no answer.
    Down(Arc<str>, bool),
    /// The generation, and the first one since what was on its way got no answer.
    Up(u64, u64),
    /// `Closed` by this program, `Disconnected` when it was given up; and why.
    Closed(ErrorKind, Arc<str>),
}

impl State {
    /// Closed is final.
    fn is_open(&self) -> bool {
        !matches!(self, Self::Closed(..))
    }

    /// Whether a request of this generation will get no answer any more.
    fn is_over(&self, generation: u64) -> bool {
        match self {
            Self::Down(_, silent) => *silent,
            Self::Up(_, since) => *since > generation,
            Self::Closed(..) => true,
        }
    }
}

/// The supervised other side.
pub struct Watch<P: Peer> {
    peer: P,
    terms: Terms,
    state: watch::Sender<State>,
    /// None any more when it is closed: idle connections end then.
    live: RwLock<Option<Live<P::Live>>>,
    health: HealthReporter,
    started: Instant,
    /// Milliseconds after `started` at which something was heard last.
    answered: AtomicU64,
    runtime: Handle,
}

impl<P: Peer> Watch<P> {
    /// Connects, and supervises from then on, until it is [closed](Self::close).
    ///
    /// # Errors
    /// The first attempt's, unless the terms say to go on trying.
    pub async fn start(peer: P, terms: Terms) -> Result<Arc<Self>> {
        let watch = Arc::new(Self {
            peer,
            terms,
            state: watch::Sender::new(State::Down("not connected yet".into(), true)),
            live: RwLock::new(None),
            health: HealthReporter::new(),
            started: Instant::now(),
            answered: AtomicU64::new(0),
            runtime: Handle::current(),
        });
        match watch.peer.connect(1).await {
            Ok(live) => watch.up(live, 1, 1),
            Err(error) if terms.connect_retry && error.kind() != ErrorKind::Config => watch.down(&error),
            Err(error) => return Err(error),
        }
        watch.spawn(supervise(Arc::clone(&watch)));
        Ok(watch)
    }

    /// Runs a task where the connection was made: the caller may be a thread without a runtime, or of one that ends soon.
    pub fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(task)
    }

    /// The present connection, waited for.
    ///
    /// # Errors
    /// When there will be none any more: [`ErrorKind::Closed`], or [`ErrorKind::Disconnected`] and why when it was given up.
    pub async fn live(&self) -> Result<Live<P::Live>> {
        let mut states = self.state.subscribe();
        drop(states.wait_for(|state| !matches!(state, State::Down(..))).await);
        self.present().ok_or_else(|| self.ended("connect"))
    }

    /// The present connection, waited for as long as one attempt to connect may take.
    ///
    /// # Errors
    /// [`ErrorKind::Disconnected`] with the reason, and [`ErrorKind::Closed`].
    pub async fn live_soon(&self, operation: &'static str) -> Result<Live<P::Live>> {
        match timeout(self.terms.connect_timeout, self.live()).await {
            Ok(live) => live.map_err(|error| error.with_operation(operation)),
            Err(_) => Err(self.disconnected(operation, &self.reason())),
        }
    }

    /// The present connection, if there is one.
    #[must_use]
    pub fn live_now(&self) -> Option<Live<P::Live>> {
        self.is_up().then(|| self.present()).flatten()
    }

    /// Whether the other side is there, as far as is known.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(&*self.state.borrow(), State::Up(..))
    }

    /// Whether it was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        matches!(&*self.state.borrow(), State::Closed(..))
    }

    /// Returns when it is closed.
    pub async fn closed(&self) {
        drop(self.state.subscribe().wait_for(|state| matches!(state, State::Closed(..))).await);
    }

    /// Returns when requests over this connection will get no answer any more.
    pub async fn over(&self, live: &Live<P::Live>) {
        // What it waits for is let go at once: holding it while the reason is read would stop who writes in between.
        drop(self.state.subscribe().wait_for(|state| state.is_over(live.generation)).await);
    }

    /// What those are told who need a connection when there will be none any more: that this program has closed it, or why it
    /// was given up.
    #[must_use]
    pub fn ended(&self, operation: &'static str) -> Error {
        match &*self.state.borrow() {
            State::Closed(ErrorKind::Disconnected, reason) => {
                self.disconnected(operation, reason).with_retry(Retry::Never)
            }
            _ => Error::closed(operation).with_backend(self.peer.backend()),
        }
    }

    /// Why there is no connection.
    #[must_use]
    pub fn reason(&self) -> Arc<str> {
        match &*self.state.borrow() {
            State::Down(reason, _) | State::Closed(_, reason) => Arc::clone(reason),
            State::Up(..) => "connected".into(),
        }
    }

    /// Says when the other side was lost, found, or closed.
    #[must_use]
    pub fn changes(&self) -> Changes {
        Changes(self.state.subscribe())
    }

    /// What users are told.
    #[must_use]
    pub fn health(&self) -> HealthWatch {
        self.health.watch()
    }

    /// Runs a request, which is to be bounded, no longer than its connection lives, and draws conclusions from its answer.
    /// `None`: the connection was lost meanwhile.
    pub async fn unless_over<T>(
        &self,
        live: &Live<P::Live>,
        request: impl Future<Output = Result<T>>,
    ) -> Option<Result<T>> {
        let answer = tokio::select! {
            biased;
            answer = request => answer,
            () = self.over(live) => return None,
        };
        match &answer {
            Ok(_) => self.answered(),
            Err(error) => self.failed(live, error),
        }
        Some(answer)
    }

    /// A round trip.
    ///
    /// # Errors
    /// [`ErrorKind::Disconnected`], or what the other side answers.
    pub async fn ping(&self) -> Result<P::Answer> {
        let live = self.live_soon("ping").await?;
        self.ask(&live, self.terms.connect_timeout).await.map_err(|error| error.with_operation("ping"))
    }

    async fn ask(&self, live: &Live<P::Live>, limit: Duration) -> Result<P::Answer> {
        let asking = async {
            let answer = timeout(limit, self.peer.ask(live)).await;
            answer.unwrap_or_else(|_| Err(self.disconnected("ping", "no answer in time")))
        };
        self.unless_over(live, asking).await.unwrap_or_else(|| Err(self.disconnected("ping", &self.reason())))
    }

    #[cold]
    fn disconnected(&self, operation: &'static str, reason: &str) -> Error {
        let error = Error::new(ErrorKind::Disconnected, format!("no connection: {reason}"));
        error.with_backend(self.peer.backend()).with_operation(operation)
    }

    /// Something came from the other side.
    pub fn answered(&self) {
        let millis = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.answered.fetch_max(millis, Ordering::Relaxed);
    }

    fn silence(&self) -> Duration {
        self.started.elapsed().saturating_sub(Duration::from_millis(self.answered.load(Ordering::Relaxed)))
    }

    /// Something over this connection has failed. News of an earlier connection is no news.
    pub fn failed(&self, live: &Live<P::Live>, error: &Error) {
        if !self.peer.is_loss(error) {
            return self.answered();
        }
        let down = State::Down(error.message().into(), self.peer.is_silence(error));
        if self.change(down, |state| matches!(state, State::Up(now, _) if *now == live.generation)) {
            tracing::warn!(%error, "connection lost, reconnecting");
            self.health.down(error.message());
        }
    }

    /// Ends supervision; those who wait are answered.
    pub fn close(&self, reason: &str) {
        self.end(ErrorKind::Closed, reason);
    }

    fn end(&self, kind: ErrorKind, reason: &str) {
        self.change(State::Closed(kind, reason.into()), State::is_open);
        self.set_present(None);
        self.health.closed(reason);
    }

    fn up(&self, live: P::Live, generation: u64, since: u64) {
        self.set_present(Some(Live { inner: live, generation }));
        self.answered();
        if self.change(State::Up(generation, since), State::is_open) {
            self.health.up();
        } else {
            self.set_present(None);
        }
    }

    fn down(&self, error: &Error) {
        let down = State::Down(error.message().into(), self.peer.is_silence(error));
        if self.change(down, State::is_open) {
            self.health.down(error.message());
        }
    }

    fn change(&self, next: State, when: impl FnOnce(&State) -> bool) -> bool {
        self.state.send_if_modified(|state| {
            let changes = when(state);
            if changes {
                *state = next;
            }
            changes
        })
    }

    fn present(&self) -> Option<Live<P::Live>> {
        self.live.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_present(&self, live: Option<Live<P::Live>>) {
        *self.live.write().unwrap_or_else(PoisonError::into_inner) = live;
    }
}

impl<P: Peer> fmt::Debug for Watch<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("peer", &self.peer).field("state", &*self.state.borrow()).finish_non_exhaustive()
    }
}

/// Follows what becomes of the other side.
#[derive(Debug)]
pub struct Changes(watch::Receiver<State>);

impl Changes {
    /// Waits for the next change.
    pub async fn changed(&mut self) {
        // A watch without a sender is the end too; nothing changes any more.
        if self.0.changed().await.is_err() {
            std::future::pending().await
        }
    }
}

async fn supervise<P: Peer>(watch: Arc<Watch<P>>) {
    let terms = watch.terms;
    let mut states = watch.state.subscribe();
    let (mut generation, mut since) = (1, 1);
    let mut found = Instant::now();
    let mut wait = terms.reconnect_initial;
    loop {
        let state = states.borrow_and_update().clone();
        match state {
            State::Closed(..) => return,
            State::Up(..) => {
                let quiet = terms.heartbeat.saturating_sub(watch.silence());
                tokio::select! {
                    _ = states.changed() => {}
                    () = sleep(quiet) => {
                        let Some(live) = watch.present() else { return };
                        if watch.silence() >= terms.heartbeat {
                            // Its failure is the news, which spreads by itself.
                            let _ = watch.ask(&live, terms.heartbeat).await;
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
                if found.elapsed() > terms.reconnect_max {
                    wait = terms.reconnect_initial;
                }
                tokio::select! {
                    biased;
                    () = watch.closed() => return,
                    () = reconnect(&watch, &mut wait, generation, since) => {}
                }
                found = Instant::now();
            }
        }
    }
}

/// Returns when it is connected, or was given up.
async fn reconnect<P: Peer>(watch: &Watch<P>, wait: &mut Duration, generation: u64, since: u64) {
    let limit = watch.terms.reconnect_limit;
    let mut failures = 0_u32;
    loop {
        // Jitter, so that a thousand clients do not come back in the same instant.
        sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        *wait = (*wait * 2).min(watch.terms.reconnect_max);
        match watch.peer.connect(generation).await {
            Ok(live) => {
                tracing::info!("connected");
                return watch.up(live, generation, since);
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                tracing::debug!(failures, %error, "attempt to connect failed");
                watch.down(&error);
                if limit > 0 && failures >= limit {
                    let reason = format!("given up after {failures} attempts: {}", error.message());
                    return watch.end(ErrorKind::Disconnected, &reason);
                }
            }
        }
    }
}
