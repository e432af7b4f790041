//! One supervised TCP connection: made, watched, and made again with backoff.
//!
//! The client library's own recovery is off: it is known to hang, and it cannot tell a delivery of before from one
//! of after. Here a lost connection ends everything that used it, and each user starts afresh on the next one.

use std::{ops::Deref, sync::Arc, time::Duration};

use futures_util::{Stream, StreamExt};
use lapin::{Connection, Event};
use polymq_core::{Error, ErrorKind, Result, Retry};
use tokio::{
    runtime::Handle,
    sync::{Notify, watch},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};

use crate::{
    config::AmqpConfig,
    connect::{Wire, connect},
    error,
    health::{HealthBoard, Line},
    socket::{Burst, Control},
};

/// How long a goodbye may take.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the client library may take to say why a connection has ended.
const REASON_TIMEOUT: Duration = Duration::from_millis(250);

/// What a connection is for. A broker short of memory stops reading from the connections that publish; those that
/// consume must go on, because they are what frees the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Role {
    Publish,
    Consume,
}

impl Role {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Consume => "consume",
        }
    }
}

/// A connection that lives now.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    pub(crate) connection: Arc<Connection>,
    control: Control,
    /// Counts the connections, from 1.
    pub(crate) generation: u64,
    /// Why the broker takes no messages at present.
    pub(crate) blocked: Option<Arc<str>>,
}

impl Live {
    /// See [`Control::burst`].
    pub(crate) fn burst(&self) -> Burst {
        self.control.burst()
    }
}

#[derive(Debug, Clone)]
enum State {
    Down(Arc<str>),
    Up(Live),
    /// `Closed` by this program, `Disconnected` when it was given up; and why.
    Closed(ErrorKind, Arc<str>),
}

impl State {
    /// Why the broker takes nothing from a connection that is there.
    fn blocked(&self, live: &Live) -> Option<Arc<str>> {
        match self {
            Self::Up(now) if now.generation == live.generation => now.blocked.clone(),
            _ => None,
        }
    }
}

/// The users' view of a supervised connection.
#[derive(Debug)]
pub(crate) struct Link {
    role: Role,
    state: watch::Sender<State>,
    suspect: Notify,
    config: Arc<AmqpConfig>,
    pub(crate) health: Arc<HealthBoard>,
    /// Where background tasks run, whoever asks for them.
    runtime: Handle,
}

impl Link {
    /// Connects and supervises from then on. The first attempt's failure is the caller's, unless
    /// `connect_retry` says to go on trying.
    pub(crate) async fn start(
        role: Role,
        config: Arc<AmqpConfig>,
        health: Arc<HealthBoard>,
    ) -> Result<Arc<LinkHandle>> {
        let link = Arc::new(Self {
            role,
            state: watch::Sender::new(State::Down("not connected yet".into())),
            suspect: Notify::new(),
            config,
            health,
            runtime: Handle::current(),
        });
        let first = match connect(&link.config, role).await {
            Ok(connection) => Some(connection),
            Err(error) if link.config.connect_retry => {
                link.down(&error.to_string());
                None
            }
            Err(error) => return Err(error),
        };
        if let Some(connection) = &first {
            link.up(connection, 1);
        }
        link.spawn(supervise(Arc::clone(&link), first));
        Ok(Arc::new(LinkHandle(link)))
    }

    /// Runs a task where the connection was made: the caller may be a thread without a runtime, or of one that ends soon.
    pub(crate) fn spawn<T: Send + 'static>(&self, task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(task)
    }

    /// The present connection, waited for; an error when there will be none any more.
    pub(crate) async fn live(&self) -> Result<Live> {
        self.once(|_| true).await
    }

    /// The same, once its broker takes messages.
    pub(crate) async fn unblocked(&self) -> Result<Live> {
        self.once(|live| live.blocked.is_none()).await
    }

    async fn once(&self, suits: impl Fn(&Live) -> bool) -> Result<Live> {
        let mut states = self.state.subscribe();
        let fits = |state: &State| match state {
            State::Down(_) => false,
            State::Up(live) => suits(live),
            State::Closed(..) => true,
        };
        let state = states.wait_for(fits).await;
        match state.map(|state| state.clone()) {
            Ok(State::Up(live)) => Ok(live),
            Ok(State::Closed(..)) | Ok(State::Down(_)) | Err(_) => Err(self.ended("connect")),
        }
    }

    /// What those are told who need a connection when there will be none any more: that this program has closed it, or why
    /// it was given up.
    pub(crate) fn ended(&self, operation: &'static str) -> Error {
        match &*self.state.borrow() {
            State::Closed(ErrorKind::Disconnected, reason) => {
                error::disconnected(operation, reason).with_retry(Retry::Never)
            }
            _ => error::closed(operation),
        }
    }

    /// The present connection, waited for as long as one attempt to connect may take.
    pub(crate) async fn live_soon(&self, operation: &'static str) -> Result<Live> {
        match timeout(self.config.connect_timeout, self.live()).await {
            Ok(live) => live.map_err(|error| error.with_operation(operation)),
            Err(_) => Err(error::disconnected(operation, &self.reason())),
        }
    }

    /// Runs requests on a connection, and stops waiting for their answers when it is lost.
    ///
    /// The client library forgets a request for a channel that comes in the instant in which the connection ends, and
    /// with it whoever waits for the answer.
    pub(crate) async fn unless_lost<T>(
        &self,
        live: &Live,
        operation: &'static str,
        requests: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let mut states = self.watch();
        tokio::select! {
            biased;
            answer = requests => {
                if answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Disconnected) {
                    self.suspect();
                }
                answer
            }
            () = states.lost(live) => Err(error::disconnected(operation, &self.reason())),
        }
    }

    /// Why the broker takes nothing from a connection at present.
    pub(crate) fn blocks(&self, live: &Live) -> Option<Arc<str>> {
        self.state.borrow().blocked(live)
    }

    /// Whether there is a connection now.
    pub(crate) fn is_up(&self) -> bool {
        matches!(&*self.state.borrow(), State::Up(_))
    }

    /// Why there is no connection.
    pub(crate) fn reason(&self) -> Arc<str> {
        match &*self.state.borrow() {
            State::Down(reason) | State::Closed(_, reason) => Arc::clone(reason),
            State::Up(_) => "connected".into(),
        }
    }

    /// Changes of the state, for [`Link::check`].
    pub(crate) fn watch(&self) -> LinkWatch {
        LinkWatch(self.state.subscribe())
    }

    /// Somebody saw an operation fail for want of a connection.
    pub(crate) fn suspect(&self) {
        self.suspect.notify_one();
    }

    /// Ends supervision and connection.
    pub(crate) async fn close(&self) {
        let before = self.state.send_replace(State::Closed(ErrorKind::Closed, "closed by this program".into()));
        if let State::Up(live) = before {
            // A peer that does not answer must not hold the goodbye up.
            if timeout(CLOSE_TIMEOUT, live.connection.close(200, "closed".into())).await.is_err() {
                live.control.abort();
            }
        }
    }

    fn up(&self, wire: &Wire, generation: u64) {
        let Wire { connection, control } = wire.clone();
        let live = Live { connection, control, generation, blocked: None };
        if self.change(State::Up(live)) {
            self.health.set(Line::Connection(self.role), None);
        }
    }

    fn down(&self, reason: &str) {
        if self.change(State::Down(reason.into())) {
            self.health.set(Line::Connection(self.role), Some(reason.to_owned()));
        }
    }

    fn blocked(&self, reason: Option<Arc<str>>) {
        self.state.send_if_modified(|state| match state {
            State::Up(live) => {
                live.blocked.clone_from(&reason);
                true
            }
            _ => false,
        });
        self.health.set(
            Line::Connection(self.role),
            reason.map(|reason| format!("the broker takes no messages at present: {reason}")),
        );
    }

    /// Closed is final.
    fn change(&self, next: State) -> bool {
        self.state.send_if_modified(|state| {
            let open = !matches!(state, State::Closed(..));
            if open {
                *state = next;
            }
            open
        })
    }

    /// Whether there will be no connection any more.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(&*self.state.borrow(), State::Closed(..))
    }
}

/// What users of a connection hold. When the last one is dropped, supervision ends and the connection with it.
#[derive(Debug)]
pub(crate) struct LinkHandle(Arc<Link>);

impl Deref for LinkHandle {
    type Target = Link;

    fn deref(&self) -> &Link {
        &self.0
    }
}

impl Drop for LinkHandle {
    fn drop(&mut self) {
        self.0.change(State::Closed(ErrorKind::Closed, "nobody uses it any more".into()));
    }
}

/// Follows one connection.
#[derive(Debug)]
pub(crate) struct LinkWatch(watch::Receiver<State>);

impl LinkWatch {
    /// Waits until `live` has ended.
    pub(crate) async fn lost(&mut self, live: &Live) {
        // A watch without a sender is the end of the link too.
        let _ = self.0.wait_for(|state| !matches!(state, State::Up(now) if now.generation == live.generation)).await;
    }

    /// Waits until `live` has ended or its blocking has changed.
    pub(crate) async fn changed(&mut self, live: &Live) -> Change {
        loop {
            match &*self.0.borrow_and_update() {
                State::Up(now) if now.generation == live.generation => {
                    if now.blocked != live.blocked {
                        return Change::Blocked(now.blocked.clone());
                    }
                }
                _ => return Change::Lost,
            }
            if self.0.changed().await.is_err() {
                return Change::Lost;
            }
        }
    }

    /// Waits until the broker takes nothing from `live`; for ever when that has ended.
    pub(crate) async fn blocked(&mut self, live: &Live) -> Arc<str> {
        let state = self.0.wait_for(|state| state.blocked(live).is_some()).await;
        match state.map(|state| state.blocked(live)) {
            Ok(Some(reason)) => reason,
            _ => std::future::pending().await,
        }
    }
}

pub(crate) enum Change {
    Lost,
    Blocked(Option<Arc<str>>),
}

async fn supervise(link: Arc<Link>, mut wire: Option<Wire>) {
    let mut generation = 1;
    // Connections in a row that were lost as soon as they were made.
    let mut short_lived = 0_u32;
    loop {
        if let Some(Wire { connection, .. }) = wire.take() {
            let made = Instant::now();
            let mut reason = watch_over(&link, &connection).await;
            if link.is_closed() {
                return;
            }
            short_lived = if made.elapsed() < link.config.heartbeat { short_lived.saturating_add(1) } else { 0 };
            if short_lived > 1 {
                reason = format!(
                    "{short_lived} connections in a row were lost within {:?}: {reason}",
                    link.config.heartbeat
                );
            }
            tracing::warn!(role = link.role.name(), %reason, "connection lost, reconnecting");
            link.down(&reason);
        }
        let Some(next) = reconnect(&link, short_lived).await else { return };
        generation += 1;
        link.up(&next, generation);
        tracing::info!(role = link.role.name(), "connected");
        wire = Some(next);
    }
}

/// Returns when the connection is gone, with the reason.
async fn watch_over(link: &Link, connection: &Arc<Connection>) -> String {
    let mut events = Box::pin(connection.events_listener());
    let mut states = link.state.subscribe();
    let mut reason = "the connection ended".to_owned();
    loop {
        // Not only events: one that was sent before the listener existed would be missed for ever.
        if !connection.status().connected() {
            // The client library fails what is under way first, and says why afterwards.
            let told = timeout(REASON_TIMEOUT, words(&mut events)).await;
            return told.ok().flatten().unwrap_or(reason);
        }
        tokio::select! {
            event = events.next() => match event {
                Some(Event::Error(error)) if error::is_channel_only(&error) => {}
                Some(Event::Error(error)) => reason = error::text(&error),
                Some(Event::ConnectionBlocked(why)) => link.blocked(Some(why.into())),
                Some(Event::ConnectionUnblocked) => link.blocked(None),
                Some(_) => {}
                None => return reason,
            },
            () = link.suspect.notified() => {}
            _ = states.wait_for(|state| matches!(state, State::Closed(..))) => return reason,
            () = sleep(link.config.heartbeat) => {}
        }
    }
}

/// What the client library says about the end of a connection, if it says anything.
async fn words(events: &mut (impl Stream<Item = Event> + Unpin)) -> Option<String> {
    loop {
        match events.next().await? {
            Event::Error(error) if !error::is_channel_only(&error) => return Some(error::text(&error)),
            _ => {}
        }
    }
}

/// The next connection; `None` when closed or given up. A loss is made good at once, but what ends each connection (a message
/// that cannot be read) must not have all others made again without a pause.
async fn reconnect(link: &Link, short_lived: u32) -> Option<Wire> {
    let config = &link.config;
    let repeated = short_lived.saturating_sub(2);
    let mut wait = config.reconnect_initial.saturating_mul(1 << repeated.min(16)).min(config.reconnect_max);
    let mut failures = 0_u32;
    let mut states = link.state.subscribe();
    loop {
        let attempt = async {
            if failures > 0 || short_lived > 1 {
                // Jitter, so that a thousand clients do not come back in the same instant.
                sleep(wait.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            }
            connect(config, link.role).await
        };
        let attempt = tokio::select! {
            attempt = attempt => attempt,
            _ = states.wait_for(|state| matches!(state, State::Closed(..))) => return None,
        };
        match attempt {
            Ok(connection) => return Some(connection),
            Err(error) => {
                if failures > 0 {
                    wait = (wait * 2).min(config.reconnect_max);
                }
                failures = failures.saturating_add(1);
                tracing::debug!(role = link.role.name(), failures, %error, "attempt to connect failed");
                link.down(error.message());
                if config.reconnect_limit > 0 && failures >= config.reconnect_limit {
                    let reason = format!("given up after {failures} attempts: {}", error.message());
                    link.change(State::Closed(ErrorKind::Disconnected, reason.as_str().into()));
                    link.health.closed(&reason);
                    return None;
                }
            }
        }
    }
}
