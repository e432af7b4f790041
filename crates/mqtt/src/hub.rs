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
use tokio::{
    sync::Notify,
    time::{Instant, sleep},
};

use crate::{convert, lender::Lender, lends::Lends, link::Link};

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
    /// Retries that wait for their time.
    delayed: HashMap<Token, Incoming>,
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
        let before = self.held.fetch_update(Ordering::AcqRel, Ordering::Acquire, |held| held.checked_sub(1));
        if before.is_ok_and(|before| before >= self.limit) {
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

    /// A connection that will bring messages.
    pub(crate) fn add_lender(self: &Arc<Self>, sibling: Option<Arc<AtomicBool>>) -> (u16, Lends) {
        let mut state = self.lock();
        let number = state.next_lender;
        // 65536 connections later, the first one is long gone.
        state.next_lender = state.next_lender.wrapping_add(1);
        state.lenders.insert(number, Lender::new());
        (number, Lends::new(self, number, 0, sibling))
    }

    /// Another link for the same connection; with the generation after which it counts.
    pub(crate) fn hand_over(self: &Arc<Self>, number: u16, sibling: Option<Arc<AtomicBool>>) -> Option<(Lends, u32)> {
        let mut state = self.lock();
        let lender = state.lenders.get_mut(&number)?;
        let after = lender.hand_over()?;
        Some((Lends::new(self, number, lender.serial, sibling), after))
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
        state
            .lenders
            .get(&lender)
            .filter(|lender| lender.lent() == 0 && lender.generation > 0)
            .map(|lender| lender.last)
    }

    /// Forgets every connection; they end when nobody else holds them.
    pub(crate) fn clear(&self) {
        let mut state = self.lock();
        let lenders = std::mem::take(&mut state.lenders);
        state.arrived.clear();
        state.delayed.clear();
        drop(state);
        drop(lenders);
    }

    /// Closes the hub when it has failed, or when no consumer is left and none holds anything; what nobody took does
    /// not count.
    pub(crate) fn close_if_done(&self) -> bool {
        let mut state = self.lock();
        let untaken = state.arrived.iter().filter(|(token, _)| parts(*token).2 > 0).count();
        let lent = state.lenders.values().map(Lender::lent).sum::<usize>();
        state.closed |= state.failed.is_some() || (state.consumers == 0 && lent <= untaken + state.delayed.len());
        state.closed
    }

    /// Stops taking messages from a connection of which nothing is in flight, so that it can be closed without
    /// delivering anything twice.
    pub(crate) fn suspend_if_empty(&self, lender: u16) -> bool {
        match self.lock().lenders.get_mut(&lender) {
            Some(lender) if lender.lent() == 0 && lender.generation > 0 => {
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

    /// Whether the broker still waits for this delivery to be acknowledged, and we can do it.
    pub(crate) fn is_current(&self, token: Token) -> bool {
        let (lender, generation, _) = parts(token);
        self.lock().lenders.get(&lender).is_some_and(|lender| lender.knows(generation))
    }

    /// Acknowledges; `false` when the connection has ended and the broker delivers the message again.
    pub(crate) fn ack(&self, token: Token) -> bool {
        let (lender, generation, pkid) = parts(token);
        let mut state = self.lock();
        let state = &mut *state;
        if !state.beside.is_empty() {
            state.beside.remove(&token);
        }
        let Some(lender) = state.lenders.get_mut(&lender).filter(|lender| lender.knows(generation)) else {
            return false;
        };
        lender.ack(pkid);
        if lender.lent() == 0 || state.consumers == 0 {
            self.changed.notify_one();
        }
        true
    }

    /// Hands a delivery out again inside this process; `false` when the broker does it.
    pub(crate) fn again(&self, token: Token, message: Message, attempt: Option<u32>, front: bool) -> bool {
        let (lender, generation, _) = parts(token);
        let mut state = self.lock();
        let beside = state.beside.remove(&token);
        if !state.lenders.get(&lender).is_some_and(|lender| lender.knows(generation)) {
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

    /// Events of a link: connected.
    pub(crate) fn connected(&self, number: u16, serial: u32, generation: u32, session_present: bool) {
        let mut state = self.lock();
        let lender = state.lenders.get_mut(&number).filter(|lender| lender.serial == serial);
        let resumed = lender.is_none_or(|lender| lender.connected(generation, session_present));
        if !resumed {
            state.forget(number);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Events of a link: a message.
    pub(crate) fn message(self: &Arc<Self>, number: u16, generation: u32, publish: Publish) {
        let (pkid, dup) = (publish.pkid, publish.dup);
        let token = token(number, generation, pkid);
        let channel = convert::concrete_topic(&publish, &self.name);
        let (message, details) = convert::from_publish(publish);
        let wait = convert::due_in(&message);
        let incoming = Incoming { message, token, attempt: None, channel, details };
        let mut state = self.lock();
        // A connection that is being closed may still bring something; the broker delivers it again.
        let lender = state.lenders.get_mut(&number).filter(|lender| lender.generation == generation);
        if !lender.is_some_and(|lender| lender.arrived(pkid, dup)) {
            return;
        }
        let Some(wait) = wait else {
            state.arrived.push_back((token, incoming));
            return;
        };
        state.delayed.insert(token, incoming);
        let hub = Arc::downgrade(self);
        tokio::spawn(async move {
            sleep(wait).await;
            if let Some(hub) = hub.upgrade() {
                hub.due(token);
            }
        });
    }

    /// The time of a retry has come.
    fn due(&self, token: Token) {
        let mut state = self.lock();
        if let Some(incoming) = state.delayed.remove(&token) {
            state.arrived.push_back((token, incoming));
            drop(state);
            self.wake();
        }
    }

    /// Events of a link: no more messages for now.
    pub(crate) fn wake(&self) {
        self.ready.notify_one();
    }

    /// Events of a link: what is sent now arrives.
    pub(crate) fn subscribed(&self, number: u16, serial: u32) {
        if let Some(lender) = self.lock().lenders.get_mut(&number).filter(|lender| lender.serial == serial) {
            lender.subscribed = true;
        }
    }

    /// Events of a link: the connection ended.
    pub(crate) fn lost(&self, number: u16, serial: u32) {
        let mut state = self.lock();
        if let Some(lender) = state.lenders.get_mut(&number).filter(|lender| lender.serial == serial) {
            lender.lost();
            // The broker delivers these again: handing them out now would hand them out twice.
            state.forget(number);
        }
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget(&mut self, lender: u16) {
        self.arrived.retain(|(token, _)| parts(*token).0 != lender);
        self.delayed.retain(|token, _| parts(*token).0 != lender);
        self.beside.retain(|token, _| parts(*token).0 != lender);
    }
}
