//! What this process has declared, and how it is declared again where the broker has forgotten it.
//!
//! A session goes when its broker loses it (a restart), when it expires, or when another program deletes the queue. The
//! first shows as a new connection, the others under MQTT 5 as a message that nobody holds. Either way the row is
//! *missing* from then on, and tried again until it is there.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Weak},
};

use polymq_core::{Completer, Error, ErrorKind, Receipt, Result};
use rumqttc::v5::mqttbytes::{QoS, v5::Filter};
use tokio::{
    sync::{Semaphore, watch},
    time::{Duration, sleep, timeout},
};

use crate::{
    bus::{Bus, lock},
    claims::Purpose,
    error::{error, is_refusal, unanswered},
    link::Link,
    supervisor::backoff,
    topology::Durable,
};

/// How many rows are declared again at once: each is a connection of its own.
const AT_ONCE: usize = 32;

/// What this process has declared.
#[derive(Debug)]
pub(crate) struct Declared {
    rows: watch::Sender<HashMap<Durable, State>>,
    turns: Semaphore,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Session 0 is there, as far as we know.
    There,
    /// It has to be made again; a task is at it.
    Missing,
}

impl Default for Declared {
    fn default() -> Self {
        Self { rows: watch::Sender::default(), turns: Semaphore::new(AT_ONCE) }
    }
}

impl Declared {
    pub(crate) fn insert(&self, row: Durable) {
        self.rows.send_modify(|rows| {
            rows.insert(row, State::There);
        });
    }

    /// It has to be made; `false` when that is known.
    fn expect(&self, row: Durable) -> bool {
        self.rows.send_if_modified(|rows| match rows.entry(row) {
            Entry::Vacant(vacant) => {
                vacant.insert(State::Missing);
                true
            }
            Entry::Occupied(_) => false,
        })
    }

    /// It was deleted here, and stays so until it is declared.
    pub(crate) fn remove(&self, row: &Durable) {
        self.rows.send_modify(|rows| {
            rows.remove(row);
        });
    }

    /// Whether it was not deleted here.
    fn knows(&self, row: &Durable) -> bool {
        self.rows.borrow().contains_key(row)
    }

    fn is(&self, row: &Durable, state: State) -> bool {
        self.rows.borrow().get(row) == Some(&state)
    }

    /// From one state to the other; `false` when it was not in the first.
    fn turn(&self, row: &Durable, from: State, to: State) -> bool {
        self.rows.send_if_modified(|rows| match rows.get_mut(row) {
            Some(state) if *state == from => {
                *state = to;
                true
            }
            _ => false,
        })
    }

    /// Waits until no row is missing among those that `counts` chooses.
    async fn all_there(&self, counts: impl Fn(&Durable) -> bool) {
        let there =
            |rows: &HashMap<Durable, State>| rows.iter().all(|(row, state)| *state == State::There || !counts(row));
        // The sender is ours.
        let _ = self.rows.subscribe().wait_for(there).await;
    }
}

impl Bus {
    /// Makes session 0 of a row, which holds messages while nobody consumes. Unless it must be seen, what is known to be there
    /// is not looked at, and without a connection it is left to the next one.
    pub(crate) async fn declare_row(self: &Arc<Self>, row: &Durable, see: bool) -> Result<()> {
        if !see && (self.declared.is(row, State::There) || self.is_left_to_the_next(row)) {
            return Ok(());
        }
        if !self.is_kept(row).await {
            self.visit(row, true).await?;
        }
        self.declared.insert(row.clone());
        Ok(())
    }

    /// Whether a row is declared with the next connection, before anything is sent over that.
    fn is_left_to_the_next(self: &Arc<Self>, row: &Durable) -> bool {
        let waits = || !self.is_up() && !self.link().is_ok_and(Link::has_ended);
        if !waits() {
            return false;
        }
        self.declare_later(row.clone());
        // One that was made in between has opened its gate perhaps.
        waits()
    }

    /// Has a row made as soon as it can be, unless it is known.
    pub(crate) fn declare_later(self: &Arc<Self>, row: Durable) {
        if self.declared.expect(row.clone()) {
            self.make_again(row);
        }
    }

    /// Whether session 0 of a row exists; makes it if asked to.
    pub(crate) async fn visit(&self, row: &Durable, create: bool) -> Result<bool> {
        self.connected().await?;
        self.visit_while(row, create, || true).await
    }

    /// The same; what was made goes again when it is not wanted any more by then.
    async fn visit_while(&self, row: &Durable, create: bool, wanted: impl Fn() -> bool) -> Result<bool> {
        // Someone who holds the session has made it.
        let Some(claim) = self.claims.claim(&row.claim(0), Purpose::Visit).await? else { return Ok(true) };
        let (link, present) = self.open(row, 0).await?;
        let mut made = Ok(());
        // Even when the session is there: after a restart, mosquitto knows it without its shared subscription.
        if create {
            made = self.bounded("declare", link.subscribe(Filter::new(&*row.filter, QoS::AtLeastOnce))).await;
            made = made.map_err(unanswered);
        }
        // An answer that is only late is no refusal: messages may have been confirmed that the session holds.
        let refused = made.as_ref().is_err_and(is_refusal);
        link.close(!present && (!create || refused || !wanted())).await;
        drop(claim);
        made.map(|()| present || create)
    }

    pub(crate) async fn is_kept(&self, row: &Durable) -> bool {
        let cell = lock(&self.kept).get(row).cloned();
        let Some(cell) = cell else { return false };
        let kept = cell.lock().await;
        kept.as_ref().is_some_and(|kept| kept.has_begun() && !kept.is_closed())
    }

    /// After a reconnect, or when the first connection was waited for: what was declared exists before anything is sent to it.
    pub(crate) async fn restore(self: Arc<Self>, generation: u32) {
        self.claims.look_again();
        let rows: Vec<_> = self.declared.rows.borrow().keys().cloned().collect();
        for row in rows {
            self.miss(&row);
        }
        // Messages must not wait for ever. Those to a row that is missing still are refused one by one.
        let mut stop = self.stopping();
        tokio::select! {
            _ = timeout(self.config.operation_timeout, self.declared.all_there(|_| true)) => {}
            // Nothing is declared any more, and what is being closed waits for its messages.
            _ = stop.wait_for(|stop| *stop) => {}
        }
        if let Ok(link) = self.link() {
            link.open_gate(generation);
        }
    }

    /// Connects once to each session that nobody here consumes; one that is gone is made again.
    pub(crate) async fn revisit(&self) {
        let rows: Vec<_> = self.declared.rows.borrow().keys().cloned().collect();
        for row in rows {
            // What is missing is tried on anyway.
            if self.is_kept(&row).await || !self.declared.is(&row, State::There) || !self.is_up() {
                continue;
            }
            if let Err(cause) = self.visit_while(&row, true, || self.declared.knows(&row)).await {
                tracing::warn!(session = row.session(0), %cause, "cannot keep a session from expiring");
            }
        }
    }

    /// A row may not be there any more: has it made again. `false` when this process has not declared it, or deleted it.
    fn miss(self: &Arc<Self>, row: &Durable) -> bool {
        if self.declared.turn(row, State::There, State::Missing) {
            self.make_again(row.clone());
            return true;
        }
        self.declared.is(row, State::Missing)
    }

    fn make_again(self: &Arc<Self>, row: Durable) {
        let (stop, generation) = (self.stopping(), self.generation.subscribe());
        self.runtime.spawn(make_again(Arc::downgrade(self), row, stop, generation));
    }

    async fn restore_row(&self, row: &Durable) -> Result<()> {
        let cell = lock(&self.kept).get(row).cloned();
        let kept = match cell {
            Some(cell) => cell.lock().await.clone(),
            None => None,
        };
        // Our own consumer comes back by itself, at about the same time.
        while let Some(kept) = &kept
            && !kept.is_closed()
        {
            // While enough is here, the answer to its subscription would wait unread behind messages.
            kept.hub.look();
            sleep(Duration::from_millis(20)).await;
            if kept.hub.is_subscribed() {
                return Ok(());
            }
        }
        let _turn = self.declared.turns.acquire().await;
        // It may have been deleted or declared while this waited.
        if !self.declared.is(row, State::Missing) {
            return Ok(());
        }
        // While the session is ours: whoever declares it after it was deleted makes it anew.
        self.visit_while(row, true, || self.declared.knows(row)).await.map(|_| ())
    }
}

/// Declares a row until it is there, or nobody wants it any more.
async fn make_again(
    bus: Weak<Bus>,
    row: Durable,
    mut stop: watch::Receiver<bool>,
    mut generation: watch::Receiver<u32>,
) {
    let mut failures = 0;
    loop {
        let connected = tokio::select! {
            connected = generation.wait_for(|generation| *generation > 0) => connected.map(|generation| *generation),
            _ = stop.wait_for(|stop| *stop) => return,
        };
        let (Ok(connected), Some(bus)) = (connected, bus.upgrade()) else { return };
        if !bus.declared.is(&row, State::Missing) {
            return;
        }
        let made = tokio::select! {
            made = bus.restore_row(&row) => made,
            _ = stop.wait_for(|stop| *stop) => return,
        };
        match made {
            // A broker that has gone in between may have forgotten it again.
            Ok(()) if *generation.borrow() == connected => {
                bus.declared.turn(&row, State::Missing, State::There);
                return;
            }
            Ok(()) => failures = 0,
            Err(cause) => {
                failures += 1;
                tracing::warn!(session = row.session(0), %cause, "cannot declare again, and tries on");
            }
        }
        let pause = backoff(&bus.config, failures);
        drop(bus);
        tokio::select! {
            () = sleep(pause) => {}
            _ = generation.changed() => failures = 0,
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// The queue of a message, which some session must hold.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// Where it is declared again when nobody holds it.
    declares: Option<(Weak<Bus>, Durable)>,
    /// Whether the broker tells that nobody holds a message.
    told: bool,
}

impl Queue {
    pub(crate) fn new(bus: &Arc<Bus>, row: Durable, told: bool) -> Self {
        Self { declares: Some((Arc::downgrade(bus), row)), told }
    }

    /// Whether the broker would take a message and drop it without a word.
    pub(crate) fn would_be_lost(&self) -> bool {
        !self.told
            && self
                .declares
                .as_ref()
                .is_some_and(|(bus, row)| bus.upgrade().is_some_and(|bus| bus.declared.is(row, State::Missing)))
    }

    /// Nobody holds a message. Its sender is told when the queue is there again, so that the next one is held.
    pub(crate) fn unheld(&self, completer: Completer<Receipt>, refused: Error) {
        let bus = self.declares.as_ref().and_then(|(bus, row)| Some((bus.upgrade()?, row.clone())));
        let Some((bus, row)) = bus.filter(|(bus, row)| bus.miss(row)) else {
            return completer.complete(Err(refused));
        };
        let (mut stop, runtime) = (bus.stopping(), bus.runtime.clone());
        runtime.spawn(async move {
            let limit = bus.config.operation_timeout;
            let there = tokio::select! {
                there = timeout(limit, bus.declared.all_there(|other| *other == row)) => there.is_ok(),
                _ = stop.wait_for(|stop| *stop) => false,
            };
            completer.complete(Err(match there {
                true => refused.with_hint("it has been declared again since: send the message once more"),
                false => refused,
            }));
        });
    }
}

#[cold]
pub(crate) fn not_there() -> Error {
    error(ErrorKind::Disconnected, "the queue could not be declared again since the connection was lost")
        .with_operation("send")
}
