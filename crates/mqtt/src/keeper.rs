//! Keeps the sessions of one queue or group connected, as long as this process consumes it.
//!
//! A broker deals a shared subscription's messages out to every session that has it, connected or not. So every
//! session of a row must be somebody's, or its share waits. A keeper holds one session (the lowest that is free) for
//! the consumers of its process, and takes over those that others have left behind: it unsubscribes them, hands out
//! what they hold, and lets go when nothing more comes.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use polymq_core::{Error, ErrorKind, Result};
use rumqttc::v5::mqttbytes::{
    QoS,
    v5::{Filter, RetainForwardRule},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    bus::Bus,
    claims::{Claim, Purpose},
    config::Protocol,
    error::{error, is_refusal},
    health::Member,
    hub::Hub,
    lends::{Ended, Fate, Lends},
    link::{Link, LinkOptions},
    supervisor::backoff,
    topology::{Durable, OWN_SESSION},
};

/// How often sessions are looked for that were left behind without a word: when the broker and a consumer die at once.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// A session that was left behind may be empty when nothing has come for this long and nothing is unsettled; then the
/// broker is asked.
const QUIET: Duration = Duration::from_secs(1);

/// A row ends where this many numbers in a row have no session. A session that was emptied expires, and one above it lives on.
pub(crate) const ROW_ENDS_AFTER: u16 = 4;

/// A hub, and when its keeper has let everything go.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) hub: Arc<Hub>,
    /// Whether it has had a session; the keeper has the other end.
    keeper: watch::Receiver<bool>,
}

impl Kept {
    /// Whether there was a session: from then on, the keeper finds one again by itself.
    pub(crate) fn has_begun(&self) -> bool {
        *self.keeper.borrow()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.keeper.has_changed().is_err()
    }

    pub(crate) async fn closed(&self) {
        let mut keeper = self.keeper.clone();
        while keeper.changed().await.is_ok() {}
    }
}

/// What a keeper keeps.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// A row of durable sessions.
    Row(Durable),
    /// One session of our own under this client id, that ends with the consumer.
    Own(String),
}

#[derive(Debug)]
struct Session {
    number: u16,
    link: Link,
    lender: u32,
    fate: Fate,
    receive_maximum: u16,
    /// Dropped last, when the connection is closed.
    claim: Option<Claim>,
}

struct Keeper {
    bus: Arc<Bus>,
    hub: Arc<Hub>,
    source: Source,
    own: Option<Session>,
    left_behind: Vec<Session>,
    /// Sessions that were found empty since somebody left.
    empty: BTreeSet<u16>,
    /// When to look for sessions that were left behind.
    look_at: Instant,
    /// Says that there is no session where none can be taken: a link that never connects says nothing.
    health: Member,
    /// Whether session 0 may be made where there is none. What was there once may.
    create: bool,
    begun: watch::Sender<bool>,
    /// Tries to take a session that failed in a row, and when to try again.
    failures: u32,
    try_at: Instant,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Also when the runtime of the connection ends: nobody may wait for what does not come.
        self.hub.fail(&Error::closed("receive"));
        self.hub.close_if_done();
        self.health.closed();
        // The connections and the hub hold each other.
        self.hub.clear();
    }
}

/// Takes a session and keeps it until the hub is closed; `later`, it is taken when there is a connection.
pub(crate) async fn start(bus: Arc<Bus>, hub: Arc<Hub>, source: Source, create: bool, later: bool) -> Result<Kept> {
    let health = bus.board.member();
    let (begun, kept) = watch::channel(false);
    let mut keeper = Keeper {
        bus,
        hub: Arc::clone(&hub),
        source,
        own: None,
        left_behind: Vec::new(),
        empty: BTreeSet::new(),
        // Not at once: a process that starts often opens several queues.
        look_at: Instant::now() + jitter(Duration::from_millis(50)),
        health,
        create,
        begun,
        failures: 0,
        try_at: Instant::now(),
    };
    match later {
        true => keeper.misses("there was no connection yet"),
        false => keeper.take().await?,
    }
    let runtime = keeper.bus.runtime.clone();
    runtime.spawn(async move {
        keeper.run().await;
        keeper.let_go().await;
    });
    Ok(Kept { hub, keeper: kept })
}

impl Keeper {
    async fn run(&mut self) {
        let bus = Arc::clone(&self.bus);
        let mut gone = bus.claims.gone();
        let mut stop = bus.stopping();
        loop {
            if self.hub.close_if_done() || *stop.borrow() {
                return;
            }
            self.tend().await;
            let hub = Arc::clone(&self.hub);
            let soon = Instant::now() + QUIET / 4;
            tokio::select! {
                () = hub.changed.notified() => {}
                _ = stop.changed() => {}
                changed = gone.changed() => {
                    if changed.is_ok() {
                        self.empty.clear();
                        self.look_soon();
                        // The broker is back, or someone has made room.
                        self.try_at = self.try_at.min(soon_by_chance());
                    }
                }
                () = sleep_until(self.look_at), if matches!(self.source, Source::Row(_)) => {
                    self.look_at = Instant::now() + jitter(LOOK_EVERY);
                    if let Err(cause) = self.look().await {
                        tracing::debug!(%cause, "cannot look for sessions that were left behind");
                    }
                }
                () = sleep_until(soon), if !self.left_behind.is_empty() || self.own.is_none() => {}
            }
        }
    }

    /// Reacts to what has changed.
    async fn tend(&mut self) {
        match self.own.as_ref().map(|own| own.fate.ended()) {
            Some(Some(Ended::TakenOver)) => {
                tracing::warn!(channel = &*self.hub.name, "another connection took over this consumer's session");
                if let Some(own) = self.own.take() {
                    self.hub.remove_lender(own.lender);
                }
            }
            Some(Some(Ended::GivenUp)) => {
                self.hub.fail(&error(ErrorKind::Disconnected, "given up after reconnect_limit attempts"));
                return;
            }
            Some(None) | None => {}
        }
        if self.own.is_none() && !self.take_again().await {
            return;
        }
        self.widen().await;
        let quiet = |session: &Session| {
            let since = self.hub.quiet_since(session.lender);
            session.fate.ended().is_some() || since.is_some_and(|since| since.elapsed() >= QUIET)
        };
        let (done, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut self.left_behind).into_iter().partition(quiet);
        self.left_behind = kept;
        for session in done {
            if session.fate.ended().is_some() {
                // Only its connection may have ended, with messages left in it.
                self.look_soon();
            } else if self.is_empty(&session).await {
                self.empty.insert(session.number);
            } else {
                self.left_behind.push(session);
                continue;
            }
            self.end(session, false).await;
        }
    }

    /// Takes a session in place of one that is lost, when it is time to try; `false` when there will be none.
    async fn take_again(&mut self) -> bool {
        // Without a connection nobody can be asked who has which session.
        if Instant::now() >= self.try_at && self.bus.is_up() {
            match self.take().await {
                Ok(()) => {
                    // One that was taken over and taken again at once was never missing.
                    if std::mem::take(&mut self.failures) > 0 {
                        self.health.up();
                    }
                    return true;
                }
                Err(cause) => self.cannot_take(&cause),
            }
        }
        // Nobody can be asked any more, so that no try can end otherwise.
        let given_up = self.bus.link().ok().and_then(Link::given_up);
        if let Some(reason) = given_up {
            self.hub.fail(&error(ErrorKind::Disconnected, reason.to_owned()));
        }
        given_up.is_none()
    }

    fn cannot_take(&mut self, cause: &Error) {
        // Who leaves needs none.
        if self.hub.close_if_done() || self.bus.is_stopped() {
            return;
        }
        tracing::warn!(channel = &*self.hub.name, %cause, "cannot take a session");
        // As where the link subscribes again. A login may be good again some day, as for every connection.
        use ErrorKind as K;
        if matches!(cause.kind(), K::PermissionDenied | K::Unsupported | K::InvalidInput | K::NotFound) {
            self.hub.fail(cause);
            return;
        }
        self.misses(cause.message());
        self.try_at = Instant::now() + backoff(&self.bus.config, self.failures);
    }

    fn misses(&mut self, reason: &str) {
        self.failures = self.failures.saturating_add(1);
        self.health.missing(&format!("no session for a consumer of {:?}: {reason}", self.hub.name));
    }

    /// Whether a session has nothing for us and gets nothing more: what it held came before the broker's answer. It was told to
    /// unsubscribe before, but that may have been lost with a connection.
    async fn is_empty(&self, session: &Session) -> bool {
        let Source::Row(row) = &self.source else { return true };
        let unsubscribed = tokio::select! {
            biased;
            answer = self.bounded(session.link.unsubscribe(row.filter.clone())) => answer.is_ok(),
            () = self.hub.turns(true) => false,
        };
        unsubscribed && self.hub.suspend_if_empty(session.lender)
    }

    fn look_soon(&mut self) {
        self.look_at = self.look_at.min(soon_by_chance());
    }

    /// The consumers of this process together want more in flight than the connection was made for, or as many retries wait
    /// that the broker would lend nothing beside them. MQTT 3.1.1 has no such bound.
    async fn widen(&mut self) {
        if self.bus.config.protocol == Protocol::V311 {
            return;
        }
        let wanted = self.receive_maximum();
        let Some(own) = self.own.as_mut().filter(|own| own.receive_maximum < wanted) else { return };
        let Some((events, after)) = self.hub.hand_over(own.lender, Some(self.bus.generation.subscribe())) else {
            return;
        };
        // Acknowledgements that were written must be read before the session has a new connection.
        own.link.close(false).await;
        let (number, lender, claim) = (own.number, own.lender, own.claim.take());
        self.own = None;
        let filter = match &self.source {
            Source::Row(row) => row.filter.clone(),
            Source::Own(_) => self.hub.name.to_string(),
        };
        let session = self.connect(number, lender, events, after, claim).await;
        let widened = match session {
            Ok(session) => {
                let subscribed = self.subscribe(&session, filter).await;
                self.own = Some(session);
                subscribed
            }
            Err(cause) => Err(cause),
        };
        if let Err(cause) = widened {
            tracing::debug!(%cause, "cannot connect with a larger window");
        }
    }

    /// Takes the lowest session that nobody has.
    async fn take(&mut self) -> Result<()> {
        let Source::Row(row) = self.source.clone() else {
            let session = self.open(0, None).await?;
            let subscribed = self.subscribe(&session, self.hub.name.to_string()).await;
            return self.keep_if(session, subscribed).await;
        };
        self.bus.watch_gone().await;
        for number in 0..u16::MAX {
            if self.left_behind.iter().any(|session| session.number == number) {
                continue;
            }
            let Some(claim) = self.bus.claims.claim(&row.claim(number), Purpose::Hold).await? else { continue };
            let session = self.open(number, Some(claim)).await?;
            if number == 0 && !self.create && !session.fate.session_present() {
                self.end(session, true).await;
                return Err(error(ErrorKind::NotFound, "no session holds messages of this channel")
                    .with_hint("declare it, or send to it with declare"));
            }
            let subscribed = self.subscribe(&session, row.filter.clone()).await;
            return self.keep_if(session, subscribed).await;
        }
        Err(error(ErrorKind::Busy, "every session of this channel is taken"))
    }

    async fn keep_if(&mut self, session: Session, subscribed: Result<()>) -> Result<()> {
        match subscribed {
            Ok(()) => {
                self.own = Some(session);
                self.create = true;
                self.begun.send_replace(true);
                Ok(())
            }
            Err(cause) => {
                // An answer that is only late is no refusal: the session may hold messages by now.
                let forget = !session.fate.session_present() && is_refusal(&cause);
                self.end(session, forget).await;
                Err(cause)
            }
        }
    }

    /// Takes over sessions that nobody uses.
    async fn look(&mut self) -> Result<()> {
        let Source::Row(row) = self.source.clone() else { return Ok(()) };
        let mut absent = 0;
        for number in 0..u16::MAX {
            // A consumer that leaves need not wait for the rest.
            if absent >= ROW_ENDS_AFTER || self.hub.close_if_done() || self.bus.is_stopped() {
                return Ok(());
            }
            let mine = self.own.iter().chain(&self.left_behind).any(|session| session.number == number);
            if mine || self.empty.contains(&number) {
                absent = 0;
                continue;
            }
            let Some(claim) = self.bus.claims.claim(&row.claim(number), Purpose::Visit).await? else {
                absent = 0;
                continue;
            };
            let session = self.open(number, Some(claim)).await?;
            if !session.fate.session_present() {
                absent += 1;
                self.end(session, true).await;
                continue;
            }
            absent = 0;
            session.claim.iter().for_each(Claim::hold);
            tracing::debug!(channel = &*self.hub.name, number, "took over a session that was left behind");
            match &self.own {
                // The lowest stays subscribed, so that a row of consumers that shrinks ends at session 0.
                Some(own) if own.number > number => {
                    if let Err(cause) = self.subscribe(&session, row.filter.clone()).await {
                        // Its connection must not live on with nobody to end it.
                        self.look_soon();
                        self.end(session, false).await;
                        return Err(cause);
                    }
                    let former = self.own.replace(session);
                    if let Some(former) = former {
                        self.drain(former, &row.filter).await?;
                    }
                }
                _ => self.drain(session, &row.filter).await?,
            }
        }
        Ok(())
    }

    /// Keeps a session until what it holds is done with; it must get nothing new.
    async fn drain(&mut self, session: Session, filter: &str) -> Result<()> {
        let unsubscribed = self.answered(session.link.unsubscribe(filter.to_owned())).await;
        match &unsubscribed {
            Ok(()) => self.left_behind.push(session),
            Err(_) => {
                self.look_soon();
                self.end(session, false).await;
            }
        }
        unsubscribed
    }

    /// Connects as a session.
    async fn open(&self, number: u16, claim: Option<Claim>) -> Result<Session> {
        let row = matches!(self.source, Source::Row(_));
        let (lender, events) = self.hub.add_lender(row.then(|| self.bus.generation.subscribe()));
        self.connect(number, lender, events, 0, claim).await
    }

    async fn connect(
        &self,
        number: u16,
        lender: u32,
        events: Lends,
        after: u32,
        claim: Option<Claim>,
    ) -> Result<Session> {
        let fate = events.fate();
        let receive_maximum = self.receive_maximum();
        let own = matches!(self.source, Source::Own(_));
        let options = LinkOptions {
            client_id: match &self.source {
                Source::Row(row) => row.session(number),
                Source::Own(client_id) => client_id.clone(),
            },
            // Mosquitto does not write a session to disk that was opened with a clean start. Under 3.1.1 a session
            // that is not clean never expires, so one of our own has to be.
            clean_start: own && self.bus.config.protocol == Protocol::V311,
            session_expiry: if own { OWN_SESSION } else { self.bus.config.session_expiry },
            receive_maximum,
            will: None,
            gated: false,
            first_must_succeed: true,
            after,
        };
        let (link, first) = self.bus.start(options, events);
        self.hub.attach(lender, link.clone());
        let connected = first.await.unwrap_or_else(|_| Err(error(ErrorKind::Closed, "the connection was closed")));
        if let Err(cause) = connected {
            self.hub.remove_lender(lender);
            return Err(cause);
        }
        Ok(Session { number, link, lender, fate, receive_maximum, claim })
    }

    async fn subscribe(&self, session: &Session, filter: String) -> Result<()> {
        let mut filter = Filter::new(filter, QoS::AtLeastOnce);
        // Subscribing again over a wider connection brings no retained message a second time.
        filter.retain_forward_rule = RetainForwardRule::OnNewSubscribe;
        self.answered(session.link.subscribe(filter)).await
    }

    /// Waits for an answer, which may be behind more messages than are read for now: then it comes later.
    async fn answered(&self, operation: impl Future<Output = Result<()>>) -> Result<()> {
        tokio::select! {
            biased;
            answer = self.bounded(operation) => answer,
            () = self.hub.turns(true) => Ok(()),
        }
    }

    /// Lets a session go; with `forget`, the broker forgets it too.
    async fn end(&self, session: Session, forget: bool) {
        self.hub.retire(session.lender);
        session.link.close(forget).await;
        self.hub.remove_lender(session.lender);
    }

    /// Closes everything; the sessions stay with the broker.
    async fn let_go(&mut self) {
        self.hub.fail(&Error::closed("receive"));
        let filter = match &self.source {
            Source::Row(row) => Some(row.filter.clone()),
            Source::Own(_) => None,
        };
        for session in self.own.take().into_iter().chain(std::mem::take(&mut self.left_behind)) {
            match &filter {
                // Session 0 holds what is sent while nobody consumes; the others must not get more.
                Some(filter) if session.number > 0 => {
                    let _ = self.bounded(session.link.unsubscribe(filter.clone())).await;
                }
                _ => {}
            }
            self.end(session, filter.is_none()).await;
        }
        if filter.is_some() {
            self.bus.claims.say_gone();
        }
    }

    /// How much the broker may lend: what the consumers want, and as much again as waits for its time. By powers of two, so
    /// that the connection is made again seldom.
    fn receive_maximum(&self) -> u16 {
        let (prefetch, aside) = self.hub.wanted();
        let beside = if aside == 0 { 0 } else { aside.next_power_of_two() };
        u16::try_from(prefetch.max(1).saturating_add(beside)).unwrap_or(u16::MAX).min(self.bus.config.receive_maximum)
    }

    async fn bounded(&self, operation: impl Future<Output = Result<()>>) -> Result<()> {
        let limit = self.bus.config.operation_timeout;
        timeout(limit, operation)
            .await
            .unwrap_or_else(|_| Err(error(ErrorKind::Timeout, format!("no answer in {limit:?}"))))
    }
}

/// In a moment, which is not the same for everybody.
fn soon_by_chance() -> Instant {
    Instant::now() + jitter(Duration::from_millis(200))
}

/// Up to half more or less, so that many processes do not act at once.
fn jitter(around: Duration) -> Duration {
    around.mul_f64(0.5 + fastrand::f64())
}
