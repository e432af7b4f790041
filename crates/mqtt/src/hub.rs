//! Where the messages of one channel meet its consumers inside a process.
//!
//! All consumers of a queue (or of a topic's group) on one connection share what arrives, whichever session brought
//! it. [`keeper`](crate::keeper) decides which sessions these are.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use polymq_core::{Details, Error, Incoming, Message, Result, Token};
use rumqttc::v5::mqttbytes::v5::Publish;
use tokio::{sync::Notify, time::Instant};

use crate::{
    convert,
    link::{Events, Link, Lost},
};

/// What arrives and who takes it.
#[derive(Debug)]
pub(crate) struct Hub {
    /// The name that consumers asked for.
    pub(crate) name: Arc<str>,
    state: Mutex<State>,
    /// One message or more are at hand, or the hub has failed.
    ready: Notify,
    /// Something that the keeper waits for has changed.
    pub(crate) changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    arrived: VecDeque<(Token, Incoming)>,
    /// What a message needs besides itself when it is handed out again.
    beside: HashMap<Token, Beside>,
    lenders: BTreeMap<u16, Lender>,
    next_lender: u16,
    consumers: usize,
    /// Sum over the consumers.
    prefetch: usize,
    failed: Option<(polymq_core::ErrorKind, String)>,
    /// No consumer may join any more.
    closed: bool,
}

#[derive(Debug, Default)]
struct Beside {
    attempt: Option<u32>,
    channel: Option<Arc<str>>,
    details: Option<Box<Details>>,
}

/// A connection that brings messages.
#[derive(Debug)]
struct Lender {
    link: Option<Link>,
    /// Of the present connection; zero without one.
    generation: u32,
    /// Whether this connection is subscribed, so that what is sent now arrives.
    subscribed: bool,
    /// Messages that the broker waits to be acknowledged, in our hands or in a consumer's.
    lent: usize,
    last: Instant,
}

/// What one consumer holds.
#[derive(Debug)]
pub(crate) struct Quota {
    held: AtomicUsize,
    limit: usize,
    freed: Notify,
}

impl Quota {
    pub(crate) fn new(limit: usize) -> Self {
        Self { held: AtomicUsize::new(0), limit: limit.max(1), freed: Notify::new() }
    }

    fn room(&self) -> usize {
        self.limit.saturating_sub(self.held.load(Ordering::Acquire))
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// A delivery is settled.
    pub(crate) fn free(&self) {
        if self.held.fetch_sub(1, Ordering::AcqRel) >= self.limit {
            self.freed.notify_one();
        }
    }
}

/// A token names the connection, its generation and the packet id: nothing need be kept to settle.
fn token(lender: u16, generation: u32, pkid: u16) -> Token {
    Token(u64::from(lender) << 48 | u64::from(generation) << 16 | u64::from(pkid))
}

fn parts(token: Token) -> (u16, u32, u16) {
    ((token.0 >> 48) as u16, (token.0 >> 16) as u32, token.0 as u16)
}

impl Hub {
    pub(crate) fn new(name: Arc<str>) -> Arc<Self> {
        Arc::new(Self { name, state: Mutex::default(), ready: Notify::new(), changed: Notify::new() })
    }

    /// A connection that will bring messages; `None` when the hub has had more connections than it can tell apart.
    pub(crate) fn add_lender(self: &Arc<Self>, sibling: Option<Arc<AtomicBool>>) -> (u16, Lends) {
        let mut state = self.lock();
        let number = state.next_lender;
        // 65536 connections later, the first one is long gone.
        state.next_lender = state.next_lender.wrapping_add(1);
        state
            .lenders
            .insert(number, Lender { link: None, generation: 0, subscribed: false, lent: 0, last: Instant::now() });
        (number, Lends { hub: Arc::clone(self), number, fate: Fate::default(), sibling })
    }

    pub(crate) fn attach(&self, lender: u16, link: Link) {
        if let Some(lender) = self.lock().lenders.get_mut(&lender) {
            lender.link = Some(link);
        }
    }

    /// Forgets a connection and what it brought and nobody took.
    pub(crate) fn remove_lender(&self, number: u16) {
        let mut state = self.lock();
        state.lenders.remove(&number);
        state.forget(number);
    }

    /// When nothing of this connection is unsettled: since when nothing came.
    pub(crate) fn quiet_since(&self, lender: u16) -> Option<Instant> {
        let state = self.lock();
        state.lenders.get(&lender).filter(|lender| lender.lent == 0 && lender.generation > 0).map(|lender| lender.last)
    }

    /// Forgets every connection; they end when nobody else holds them.
    pub(crate) fn clear(&self) {
        let mut state = self.lock();
        let lenders = std::mem::take(&mut state.lenders);
        state.arrived.clear();
        drop(state);
        drop(lenders);
    }

    /// Closes the hub when it has failed, or when no consumer is left and none holds anything; what nobody took does
    /// not count.
    pub(crate) fn close_if_done(&self) -> bool {
        let mut state = self.lock();
        let untaken = state.arrived.iter().filter(|(token, _)| parts(*token).2 > 0).count();
        let lent = state.lenders.values().map(|lender| lender.lent).sum::<usize>();
        state.closed |= state.failed.is_some() || (state.consumers == 0 && lent <= untaken);
        state.closed
    }

    /// Stops taking messages from a connection of which nothing is in flight, so that it can be closed without
    /// delivering anything twice.
    pub(crate) fn suspend_if_empty(&self, lender: u16) -> bool {
        match self.lock().lenders.get_mut(&lender) {
            Some(lender) if lender.lent == 0 && lender.generation > 0 => {
                lender.generation = 0;
                true
            }
            _ => false,
        }
    }

    /// Whether what is sent now arrives.
    pub(crate) fn is_subscribed(&self) -> bool {
        self.lock().lenders.values().any(|lender| lender.subscribed)
    }

    /// One more consumer; `false` when the hub is closing.
    pub(crate) fn join(&self, prefetch: usize) -> bool {
        let mut state = self.lock();
        if state.closed {
            return false;
        }
        state.consumers += 1;
        state.prefetch += prefetch;
        drop(state);
        self.changed.notify_one();
        true
    }

    pub(crate) fn leave(&self, prefetch: usize) {
        let mut state = self.lock();
        state.consumers = state.consumers.saturating_sub(1);
        state.prefetch = state.prefetch.saturating_sub(prefetch);
        drop(state);
        self.changed.notify_one();
        // A message that had woken the one who leaves belongs to another.
        self.ready.notify_one();
    }

    pub(crate) fn prefetch(&self) -> usize {
        self.lock().prefetch
    }

    /// Ends every consumer with this error.
    pub(crate) fn fail(&self, error: &Error) {
        self.lock().failed.get_or_insert_with(|| (error.kind(), error.message().to_owned()));
        self.ready.notify_waiters();
        self.changed.notify_one();
    }

    /// Waits for messages within the consumer's quota.
    pub(crate) async fn receive(&self, quota: &Quota, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        loop {
            let freed = quota.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            let room = quota.room().min(max);
            if room == 0 && max > 0 {
                // Only a delivery that is settled changes that; it also keeps the consumer from failing early.
                freed.await;
                continue;
            }
            let ready = self.ready.notified();
            tokio::pin!(ready);
            ready.as_mut().enable();
            if self.take(quota, room, into)? {
                return Ok(());
            }
            ready.await;
        }
    }

    fn take(&self, quota: &Quota, room: usize, into: &mut Vec<Incoming>) -> Result<bool> {
        let mut state = self.lock();
        if let Some((kind, sentence)) = &state.failed {
            return Err(crate::error::error(*kind, sentence.clone())
                .with_operation("receive")
                .with_channel(&*self.name));
        }
        let count = room.min(state.arrived.len());
        if count == 0 {
            return Ok(false);
        }
        let state = &mut *state;
        for (token, incoming) in state.arrived.drain(..count) {
            let Incoming { attempt, channel, details, .. } = &incoming;
            if attempt.is_some() || channel.is_some() || details.is_some() {
                let beside = Beside { attempt: *attempt, channel: channel.clone(), details: details.clone() };
                state.beside.insert(token, beside);
            }
            into.push(incoming);
        }
        quota.held.fetch_add(count, Ordering::AcqRel);
        if !state.arrived.is_empty() {
            self.ready.notify_one();
        }
        Ok(true)
    }

    /// Whether the broker still waits for this delivery to be acknowledged over the present connection.
    pub(crate) fn is_current(&self, token: Token) -> bool {
        let (lender, generation, _) = parts(token);
        self.lock().lenders.get(&lender).is_some_and(|lender| lender.generation == generation)
    }

    /// Acknowledges; `false` when the connection has ended and the broker delivers the message again.
    pub(crate) fn ack(&self, token: Token) -> bool {
        let (lender, generation, pkid) = parts(token);
        let mut state = self.lock();
        let state = &mut *state;
        state.beside.remove(&token);
        let Some(lender) = state.lenders.get_mut(&lender).filter(|lender| lender.generation == generation) else {
            return false;
        };
        if pkid == 0 {
            return true;
        }
        if let Some(link) = &lender.link {
            link.ack(generation, pkid);
        }
        lender.lent = lender.lent.saturating_sub(1);
        if lender.lent == 0 || state.consumers == 0 {
            self.changed.notify_one();
        }
        true
    }

    /// Hands a delivery out again inside this process; `false` when the broker does it.
    pub(crate) fn again(&self, token: Token, message: Message, attempt: Option<u32>, front: bool) -> bool {
        let (lender, generation, _) = parts(token);
        let mut state = self.lock();
        let beside = state.beside.remove(&token);
        if state.lenders.get(&lender).is_none_or(|lender| lender.generation != generation) {
            return false;
        }
        let Beside { attempt: before, channel, details } = beside.unwrap_or_default();
        let incoming = Incoming { message, token, attempt: attempt.or(before), channel, details };
        match front {
            true => state.arrived.push_front((token, incoming)),
            false => state.arrived.push_back((token, incoming)),
        }
        let nobody = state.consumers == 0;
        drop(state);
        self.ready.notify_one();
        if nobody {
            self.changed.notify_one();
        }
        true
    }

    /// Waits until the acknowledgements given so far are written.
    pub(crate) async fn flush(&self) {
        let links: Vec<_> = self.lock().lenders.values().filter_map(|lender| lender.link.clone()).collect();
        for link in links {
            link.flush_commands().await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget(&mut self, lender: u16) {
        self.arrived.retain(|(token, _)| parts(*token).0 != lender);
        self.beside.retain(|token, _| parts(*token).0 != lender);
    }
}

/// What has become of a connection that brings messages.
#[derive(Debug, Default, Clone)]
pub(crate) struct Fate(Arc<Mutex<(Option<Ended>, bool)>>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    TakenOver,
    GivenUp,
}

impl Fate {
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Whether the broker knew the session at the last connect.
    pub(crate) fn session_present(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    fn set_ended(&self, ended: Ended) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0.get_or_insert(ended);
    }

    fn set_present(&self, present: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1 = present;
    }
}

/// The events of one connection that brings messages.
#[derive(Debug)]
pub(crate) struct Lends {
    hub: Arc<Hub>,
    number: u16,
    fate: Fate,
    /// Whether another connection to the same broker is up, where the session may be taken over.
    sibling: Option<Arc<AtomicBool>>,
}

impl Lends {
    pub(crate) fn fate(&self) -> Fate {
        self.fate.clone()
    }
}

impl Events for Lends {
    fn connected(&mut self, generation: u32, session_present: bool) {
        self.fate.set_present(session_present);
        let mut state = self.hub.lock();
        if let Some(lender) = state.lenders.get_mut(&self.number) {
            (lender.generation, lender.lent, lender.last) = (generation, 0, Instant::now());
        }
        drop(state);
        self.hub.changed.notify_one();
    }

    fn message(&mut self, generation: u32, publish: Publish) {
        let token = token(self.number, generation, publish.pkid);
        let channel = convert::concrete_topic(&publish, &self.hub.name);
        let (message, details) = convert::from_publish(publish);
        let incoming = Incoming { message, token, attempt: None, channel, details };
        let mut state = self.hub.lock();
        // A connection that is being closed may still bring something; the broker delivers it again.
        let current = state.lenders.get_mut(&self.number).filter(|lender| lender.generation == generation);
        if let Some(lender) = current {
            lender.lent += usize::from(parts(token).2 > 0);
            lender.last = Instant::now();
            state.arrived.push_back((token, incoming));
        }
    }

    fn idle(&mut self) {
        self.hub.ready.notify_one();
    }

    fn lost(&mut self, lost: &Lost) -> bool {
        let mut state = self.hub.lock();
        if let Some(lender) = state.lenders.get_mut(&self.number) {
            (lender.generation, lender.lent, lender.subscribed) = (0, 0, false);
        }
        // The broker delivers these again: handing them out now would hand them out twice.
        state.forget(self.number);
        drop(state);
        let go_on = !matches!(lost, Lost::TakenOver);
        if !go_on {
            self.fate.set_ended(Ended::TakenOver);
        }
        self.hub.changed.notify_one();
        go_on
    }

    fn may_reconnect(&mut self) -> bool {
        // A broker that ends one connection and not the other has given the session to someone else; mosquitto closes
        // without a word more often than with one. Whoever has it must be asked before we take it back.
        let taken_over = self.sibling.as_ref().is_some_and(|up| up.load(Ordering::Acquire));
        if taken_over {
            self.fate.set_ended(Ended::TakenOver);
            self.hub.changed.notify_one();
        }
        !taken_over
    }

    fn subscribed(&mut self) {
        if let Some(lender) = self.hub.lock().lenders.get_mut(&self.number) {
            lender.subscribed = true;
        }
    }

    fn refused(&mut self, error: Error) {
        self.hub.fail(&error);
    }

    fn ended(&mut self, error: Option<&Error>) {
        if error.is_some() {
            self.fate.set_ended(Ended::GivenUp);
        }
        self.lost(&Lost::Because(String::new()));
    }
}
