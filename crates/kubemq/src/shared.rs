//! What one consumer's reader, handlers and background task share: messages that are held, and what is to be told the
//! broker about them.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use polymq_core::{ConsumeOptions, Error, Incoming, Message, Result, Token};
use tokio::sync::Notify;

use crate::{
    error,
    held::{Held, Loans},
    outbox::{Outbox, ToQueues},
};

/// What is to be done with messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Verb {
    /// They are done.
    Ack,
    /// To the tail, counted.
    Nack,
    /// To the tail, as new.
    Requeue,
    /// Back in place, uncounted: a whole transaction.
    Close,
    /// Back in place, uncounted: these only. Of polymq's own broker.
    Return,
}

/// One thing to tell the broker.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) verb: Verb,
    pub(crate) transaction: Arc<str>,
    pub(crate) sequences: Vec<i64>,
}

#[derive(Debug, Default)]
struct State {
    held: Loans,
    buffer: VecDeque<Incoming>,
    /// What was received, goes back unhandled, and waits for the end of the stream.
    kept: HashMap<Token, Message>,
    last: u64,
    /// Counts the streams: what one has lent is gone with it.
    generation: u64,
    returns: bool,
    orders: Vec<Order>,
    /// Settlements that the broker may not have yet.
    untold: usize,
    /// Those of them that the task has taken.
    taken: usize,
    closing: bool,
    /// Nobody can settle any more.
    abandoned: bool,
    /// Why reading is over.
    end: Option<Error>,
}

/// Shared by a consumer, its settler and its task.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) queue: Arc<str>,
    pub(crate) client_id: Arc<str>,
    pub(crate) outbox: Arc<Outbox<ToQueues>>,
    state: Mutex<State>,
    /// Something arrived, or reading is over.
    pub(crate) arrived: Notify,
    /// The task has something to do.
    pub(crate) work: Notify,
    /// Something was told.
    told: Notify,
    prefetch: usize,
    prefetch_bytes: usize,
}

impl Shared {
    pub(crate) fn new(
        queue: Arc<str>,
        client_id: Arc<str>,
        outbox: Arc<Outbox<ToQueues>>,
        options: &ConsumeOptions,
    ) -> Arc<Self> {
        Arc::new(Self {
            queue,
            client_id,
            outbox,
            state: Mutex::default(),
            arrived: Notify::new(),
            work: Notify::new(),
            told: Notify::new(),
            prefetch: options.prefetch.max(1),
            prefetch_bytes: options.prefetch_bytes.max(1),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many messages, and of how many bytes, may be asked for. Nobody knows how large the next ones are: a poll may bring
    /// more bytes than that, and then there is none until enough are settled.
    pub(crate) fn room(&self) -> Option<(usize, usize)> {
        let state = self.lock();
        let count = self.prefetch.saturating_sub(state.held.count());
        let bytes = self.prefetch_bytes.saturating_sub(state.held.bytes());
        // A poll for one message costs as much as one for many: while others wait to be read, it can wait too.
        let enough = |most: usize| if state.buffer.is_empty() { 1 } else { (most / 4).max(1) };
        let fits = count >= enough(self.prefetch) && bytes >= enough(self.prefetch_bytes);
        (!state.closing && state.end.is_none() && fits).then_some((count, bytes))
    }

    /// A stream begins, to a server that takes single messages back to their places, or not.
    pub(crate) fn begin(&self, returns: bool) {
        let mut state = self.lock();
        state.generation += 1;
        state.returns = returns;
    }

    pub(crate) fn returns(&self) -> bool {
        self.lock().returns
    }

    /// The stream has ended: everything that it had lent is with the broker again.
    pub(crate) fn lose(&self) {
        let mut state = self.lock();
        state.generation += 1;
        state.held = Loans::default();
        state.buffer.clear();
        state.kept.clear();
        let lost = state.orders.drain(..).map(|order| order.sequences.len()).sum::<usize>();
        state.untold = state.untold.saturating_sub(lost + std::mem::take(&mut state.taken));
        drop(state);
        if lost > 0 {
            tracing::warn!(queue = %self.queue, lost, "settlements were lost with the connection; the messages come again");
        }
        self.told.notify_waiters();
    }

    /// What a poll has brought. `false`: nobody reads any more, and it must go back.
    pub(crate) fn arrive(&self, messages: Vec<(Incoming, Held)>) -> bool {
        let mut state = self.lock();
        if state.closing {
            return false;
        }
        for (mut incoming, mut held) in messages {
            state.last += 1;
            incoming.token = Token(state.last);
            held.generation = state.generation;
            state.held.insert(incoming.token, held);
            state.buffer.push_back(incoming);
        }
        drop(state);
        self.arrived.notify_one();
        true
    }

    /// Up to `max` messages; `None` when there is none yet.
    pub(crate) fn take(&self, max: usize, into: &mut Vec<Incoming>) -> Option<Result<()>> {
        let mut state = self.lock();
        if let Some(error) = &state.end {
            return Some(Err(error::copy(error).with_operation("receive")));
        }
        if state.closing {
            return Some(Err(error::closed("receive")));
        }
        if state.buffer.is_empty() {
            return None;
        }
        let count = max.max(1).min(state.buffer.len());
        into.extend(state.buffer.drain(..count));
        let poll = state.buffer.len() < self.prefetch / 2;
        drop(state);
        if poll {
            self.work.notify_one();
        }
        Some(Ok(()))
    }

    /// Reading is over for good.
    pub(crate) fn fail(&self, error: &Error) {
        self.lock().end.get_or_insert_with(|| error::copy(error));
        self.arrived.notify_one();
    }

    /// Asks the task to stop fetching.
    pub(crate) fn start_close(&self) {
        self.lock().closing = true;
        self.arrived.notify_one();
        self.work.notify_one();
    }

    /// Nobody settles any more: everything that is held goes back.
    pub(crate) fn abandon(&self) {
        let mut state = self.lock();
        state.closing = true;
        state.abandoned = true;
        state.held = Loans::default();
        state.buffer.clear();
        state.kept.clear();
        drop(state);
        self.work.notify_one();
    }

    pub(crate) fn is_closing(&self) -> bool {
        let state = self.lock();
        state.closing || state.end.is_some()
    }

    /// Keeps a message that goes back unhandled, once nothing more is fetched: it returns to its place with the end of the
    /// stream. `None`: it was kept.
    pub(crate) fn keep(&self, token: Token, message: Message) -> Option<Message> {
        let mut state = self.lock();
        if state.returns || !state.closing || state.abandoned || !state.held.contains(token) {
            return Some(message);
        }
        state.kept.insert(token, message);
        drop(state);
        self.work.notify_one();
        None
    }

    /// Gives back what waits for the end of the stream when that takes too long.
    pub(crate) fn return_kept(self: &Arc<Self>) {
        let mut state = self.lock();
        let unread: Vec<Incoming> = state.buffer.drain(..).collect();
        let kept = std::mem::take(&mut state.kept);
        let all = unread.into_iter().map(|incoming| (incoming.token, incoming.message)).chain(kept);
        let mut released = Vec::new();
        for (token, message) in all {
            released.extend(state.held.remove(token).map(|held| (held, message)));
        }
        // In the order in which they were.
        released.sort_by_key(|(held, _)| held.sequence);
        state.untold += released.len();
        drop(state);
        for (held, message) in released {
            crate::settle::release(self, held, message);
        }
    }

    /// Gives everything that is still held back to its place, the oldest first. For when nothing that was received is
    /// unsettled.
    pub(crate) fn give_back(&self) -> Vec<Order> {
        let mut state = self.lock();
        state.buffer.clear();
        state.kept.clear();
        let mut first: HashMap<Arc<str>, i64> = HashMap::new();
        for held in state.held.take() {
            let sequence = first.entry(held.transaction).or_insert(held.sequence);
            *sequence = held.sequence.min(*sequence);
        }
        drop(state);
        let mut first: Vec<_> = first.into_iter().collect();
        first.sort_by_key(|(_, sequence)| *sequence);
        let close = |(transaction, _)| Order { verb: Verb::Close, transaction, sequences: Vec::new() };
        first.into_iter().map(close).collect()
    }

    /// Nothing that was received is unsettled.
    pub(crate) fn is_settled(&self) -> bool {
        let state = self.lock();
        state.held.count() <= state.buffer.len() + state.kept.len()
    }

    /// Everything that was settled is told.
    pub(crate) fn is_told(&self) -> bool {
        self.lock().untold == 0
    }

    /// Waits until everything that was settled is told.
    pub(crate) async fn all_told(&self) {
        loop {
            let told = self.told.notified();
            tokio::pin!(told);
            // Registered before looking, or what is told in between would be missed.
            told.as_mut().enable();
            if self.is_told() {
                return;
            }
            told.await;
        }
    }

    /// The task has ended: whoever reads or settles is told so.
    pub(crate) fn seal(&self, error: &Error) {
        let mut state = self.lock();
        let end = state.end.take();
        *state = State { abandoned: true, closing: true, end, last: state.last, ..State::default() };
        state.end.get_or_insert_with(|| error::copy(error));
        drop(state);
        self.arrived.notify_one();
        self.told.notify_waiters();
    }

    /// Takes messages that are ours and unsettled, and gives them up; an error is that of one of them.
    pub(crate) fn acknowledge(&self, tokens: &[Token]) -> Result<()> {
        let mut state = self.lock();
        let mut result = Ok(());
        for token in tokens {
            match state.claim(*token) {
                Ok(held) => {
                    state.untold += 1;
                    state.order(Verb::Ack, held);
                }
                Err(error) => result = Err(error),
            }
        }
        drop(state);
        self.work.notify_one();
        result
    }

    /// Takes a message that is ours and unsettled. It counts as not yet told until [`order`](Self::order) or
    /// [`told`](Self::told).
    pub(crate) fn claim(&self, token: Token) -> Result<Held> {
        let mut state = self.lock();
        let held = state.claim(token)?;
        state.untold += 1;
        Ok(held)
    }

    /// Has the broker told about a message that was claimed. `false`: its stream has ended, so it is there already.
    pub(crate) fn order(&self, verb: Verb, held: Held) -> bool {
        let mut state = self.lock();
        if held.generation != state.generation {
            drop(state);
            self.told(1);
            return false;
        }
        state.order(verb, held);
        drop(state);
        self.work.notify_one();
        true
    }

    /// Gives a message back that could not be settled.
    pub(crate) fn unclaim(&self, token: Token, held: Held) {
        let mut state = self.lock();
        if !state.abandoned && held.generation == state.generation {
            state.held.insert(token, held);
        }
        drop(state);
        self.told(1);
    }

    /// So many settlements are with the broker, or need not be any more.
    pub(crate) fn told(&self, count: usize) {
        let mut state = self.lock();
        state.untold = state.untold.saturating_sub(count);
        drop(state);
        self.told.notify_waiters();
    }

    /// What is to be told next; the task says with [`taken_are_told`](Self::taken_are_told) when it is.
    pub(crate) fn orders(&self) -> Vec<Order> {
        let mut state = self.lock();
        let orders = std::mem::take(&mut state.orders);
        state.taken += orders.iter().map(|order| order.sequences.len()).sum::<usize>();
        orders
    }

    pub(crate) fn taken_are_told(&self, count: usize) {
        let mut state = self.lock();
        state.taken = state.taken.saturating_sub(count);
        drop(state);
        self.told(count);
    }
}

impl State {
    fn claim(&mut self, token: Token) -> Result<Held> {
        if self.abandoned {
            return Err(error::closed("settle"));
        }
        self.held.remove(token).ok_or_else(error::stale)
    }

    fn order(&mut self, verb: Verb, held: Held) {
        let same = |order: &&mut Order| order.verb == verb && order.transaction == held.transaction;
        match self.orders.iter_mut().rev().find(same) {
            Some(order) => order.sequences.push(held.sequence),
            None => self.orders.push(Order { verb, transaction: held.transaction, sequences: vec![held.sequence] }),
        }
    }
}
