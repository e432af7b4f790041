use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, Weak},
    task::Waker,
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};

use super::{
    NAME,
    after::After,
    config::Limits,
    queue::{Queue, Taken, Ticket},
    settle::Share,
    space::lock,
    state::{Parked, State, receipt},
};
use crate::{Address, ChannelKind, Completion, Error, ErrorKind, Incoming, Message, Outgoing, Receipt, Result, Stats};

/// A queue, or a topic with the queues of its groups: one lock for all of them, so that a message is in every one
/// or in none.
pub(super) struct Channel {
    address: Address,
    state: Mutex<State>,
}

/// So few may wait for room whatever their size; more may wait as long as all of them would fit into an empty queue.
const ALWAYS_PARKED: usize = 1024;

impl Channel {
    pub(super) fn new(address: Address) -> Self {
        Self { address, state: Mutex::default() }
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub(super) fn exists(&self) -> bool {
        self.state().limits.is_some()
    }

    /// Makes it exist.
    pub(super) fn declare(&self, limits: Limits) {
        let mut state = self.state();
        if state.limits.is_none() {
            state.limits = Some(limits);
            if self.address.kind() == ChannelKind::Queue {
                state.add_queue(None, limits);
            }
        }
    }

    /// Makes a group of a topic exist.
    pub(super) fn declare_group(&self, group: &str) {
        let mut state = self.state();
        if let (Some(limits), None) = (state.limits, state.group(group)) {
            state.add_queue(Some(group), limits);
        }
    }

    /// Whether this group of a topic exists.
    pub(super) fn has_group(&self, group: &str) -> bool {
        self.state().group(group).is_some()
    }

    /// The groups of a topic.
    pub(super) fn groups(&self) -> Vec<String> {
        self.state().queues.iter().filter_map(|queue| queue.group.as_deref().map(str::to_owned)).collect()
    }

    /// A queue gets the messages of this topic too. Locks the queue after the topic, as sending does.
    pub(super) fn bind(self: &Arc<Self>, queue: &Arc<Self>) {
        let mut state = self.state();
        if !state.bound.iter().any(|bound| Arc::ptr_eq(bound, queue)) {
            state.bound.push(Arc::clone(queue));
            queue.state().feeders.push(Arc::downgrade(self));
        }
    }

    /// The queue of this address gets no more of this topic.
    pub(super) fn unbind(self: &Arc<Self>, queue: &Address) {
        let mut after = After::default();
        let mut state = self.state();
        state.bound.retain(|bound| {
            let stays = bound.address != *queue;
            if !stays {
                bound.state().feeders.retain(|feeder| !std::ptr::eq(feeder.as_ptr(), Arc::as_ptr(self)));
            }
            stays
        });
        // Senders may have waited for room in it.
        state.admit(&mut after);
        drop(state);
        after.run();
    }

    /// Whether a message of this size may be added; what is deleted takes it too, and forgets it.
    pub(super) fn takes(&self, size: u64) -> bool {
        let state = self.state();
        state.limits.is_none() || (state.parked.is_empty() && state.fits(size))
    }

    pub(super) fn push_bound(&self, message: Message, size: u64, due: Option<Instant>, after: &mut After) {
        if let Some(queue) = self.state().queues.first_mut() {
            queue.push_at(message, size, due, after);
        }
    }

    /// Takes in what waited for room.
    pub(super) fn admit(&self) {
        let mut after = After::default();
        self.state().admit(&mut after);
        after.run();
    }

    /// Up to `max` of the messages that wait.
    pub(super) fn peek(&self, group: Option<&str>, max: usize) -> Result<Vec<Message>> {
        let state = self.state();
        if state.limits.is_none() {
            return Err(self.missing("peek"));
        }
        let queue = match (self.address.kind(), group) {
            (ChannelKind::Queue, _) => state.queues.first(),
            (ChannelKind::Topic, Some(group)) => state.group(group),
            (ChannelKind::Topic, None) => {
                return Err(self
                    .error(ErrorKind::InvalidInput, "peek", "a topic has no messages of its own")
                    .with_hint("name a group"));
            }
        };
        let queue = queue.ok_or_else(|| self.missing_group(group.unwrap_or_default()))?;
        Ok(queue.peek(max))
    }

    /// Deletes it with all that it holds.
    #[must_use]
    pub(super) fn delete(&self) -> After {
        let mut after = After::default();
        let mut state = self.state();
        state.limits = None;
        state.bound.clear();
        after.rest().feeders.extend(std::mem::take(&mut state.feeders).iter().filter_map(Weak::upgrade));
        for mut queue in std::mem::take(&mut state.queues) {
            queue.purge(&mut after);
            after.rest().deleted.extend(queue.shares());
        }
        state.parked_size = 0;
        for parked in std::mem::take(&mut state.parked) {
            match parked {
                Parked::Send { completer, .. } => after.rest().answers.push((completer, Err(self.unroutable()))),
                Parked::Flush { done, .. } => after.rest().flushed.push(done),
            }
        }
        after
    }

    /// Deletes a group of a topic.
    pub(super) fn delete_group(&self, group: &str) {
        let mut after = After::default();
        let mut state = self.state();
        if let Some(at) = state.queues.iter().position(|queue| queue.group.as_deref() == Some(group)) {
            let mut queue = state.queues.remove(at);
            queue.purge(&mut after);
            after.rest().deleted.extend(queue.shares());
            state.admit(&mut after);
        }
        drop(state);
        after.run();
    }

    /// The queue that a consumer reads; a topic without a group gets one for it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] when channel or group does not exist.
    pub(super) fn queue(&self, group: Option<&str>) -> Result<u64> {
        let mut state = self.state();
        let Some(limits) = state.limits else { return Err(self.missing("consume")) };
        let found = match (self.address.kind(), group) {
            (ChannelKind::Queue, _) => state.queues.first().map(|queue| queue.id),
            (ChannelKind::Topic, Some(group)) => state.group(group).map(|queue| queue.id),
            (ChannelKind::Topic, None) => Some(state.add_queue(None, limits)),
        };
        found.ok_or_else(|| self.missing_group(group.unwrap_or_default()))
    }

    /// Counts the consumer in.
    pub(super) fn attach(&self, share: &Arc<Share>) -> Result<()> {
        match self.state().find(share.queue()) {
            Some(queue) => {
                queue.attach(share);
                Ok(())
            }
            None => Err(self.missing("consume")),
        }
    }

    /// Counts the consumer out; a queue of its own ends with it.
    pub(super) fn detach(&self, share: &Arc<Share>, waits: bool) {
        let mut after = After::default();
        let mut state = self.state();
        let Some(at) = state.queues.iter().position(|queue| queue.id == share.queue()) else { return };
        let queue = &mut state.queues[at];
        queue.consumers = queue.consumers.saturating_sub(1);
        if waits {
            queue.stop_waiting(share, &mut after);
        }
        if self.address.kind() == ChannelKind::Topic && queue.group.is_none() {
            let mut queue = state.queues.remove(at);
            queue.purge(&mut after);
            state.admit(&mut after);
        }
        drop(state);
        after.run();
    }

    /// Locks the channel for a message of this size, to be delivered `now` or later.
    #[inline]
    pub(super) fn lock(&self, size: u64, now: bool) -> Locked<'_> {
        let state = self.state();
        let is_simple = now && state.is_alone() && matches!(state.queues.as_slice(), [queue] if queue.fits(size));
        Locked { state, is_simple }
    }

    /// Takes messages into the only queue of the channel, under one lock, until one needs more than that.
    pub(super) fn send_many(&self, messages: &mut Outgoing, receipts: &mut Vec<Result<Receipt>>) {
        let mut after = After::default();
        let mut state = self.state();
        let alone = state.is_alone();
        if let ([queue], true) = (state.queues.as_mut_slice(), alone) {
            queue.push_many(&mut messages.0, receipts, &mut after);
        }
        drop(state);
        after.run();
    }

    /// Takes a message into every queue of the channel, or lets it wait.
    #[inline(never)]
    pub(super) fn send(
        &self,
        Locked { mut state, .. }: Locked<'_>,
        message: Message,
        size: u64,
        connection: u64,
    ) -> Completion<Receipt> {
        let Some(limits) = state.limits else {
            drop(state);
            return Completion::ready(Err(self.unroutable()));
        };
        if state.parked.is_empty() && state.fits(size) {
            let receipt = receipt(&message);
            let mut after = After::default();
            state.push(message, size, &mut after);
            drop(state);
            after.run();
            return Completion::ready(Ok(receipt));
        }
        let is_full = |state: &State| {
            let waiting = state.parked.len();
            waiting >= ALWAYS_PARKED && (waiting >= limits.messages || state.parked_size >= limits.size)
        };
        // Whoever is refused is refused for those who wait still, not for those who gave up.
        if state.parked.len() >= state.sweep_at.max(64) || is_full(&state) {
            state.sweep();
        }
        if is_full(&state) {
            drop(state);
            return Completion::ready(Err(self
                .error(ErrorKind::Busy, "send", "the queue is full and as many messages wait to be added")
                .with_hint("bound the sends in flight, or raise capacity")));
        }
        let (completer, completion) = Completion::queued();
        state.parked_size += size;
        state.parked.push_back(Parked::Send { message, completer, connection });
        completion
    }

    /// A signal for when everything sent before was answered; `None`: it was.
    pub(super) fn flush(&self, connection: u64) -> Option<oneshot::Receiver<()>> {
        let mut state = self.state();
        if state.parked.is_empty() {
            return None;
        }
        // Senders that gave up have their answer, and what stood behind them may fit.
        state.sweep();
        let mut after = After::default();
        state.admit(&mut after);
        let flushed = (!state.parked.is_empty()).then(|| {
            let (done, flushed) = oneshot::channel();
            state.parked.push_back(Parked::Flush { done, connection });
            flushed
        });
        drop(state);
        after.run();
        flushed
    }

    /// Gives up what a connection has waiting; its senders are told that nothing was sent.
    pub(super) fn abandon(&self, connection: u64) {
        let mut state = self.state();
        let (mine, others) = std::mem::take(&mut state.parked).into_iter().partition(|parked| {
            let (Parked::Send { connection: owner, .. } | Parked::Flush { connection: owner, .. }) = parked;
            *owner == connection
        });
        let mine: VecDeque<Parked> = mine;
        state.parked = others;
        state.parked_size = state.parked.iter().map(Parked::size).sum();
        let mut after = After::default();
        state.admit(&mut after);
        drop(state);
        after.run();
        // Completers that are dropped without having been handed over answer `Closed`.
        drop(mine);
    }

    /// Moves messages to a consumer; see [`Queue::take`].
    pub(super) fn take(
        &self,
        max: usize,
        share: &Arc<Share>,
        into: &mut Vec<Incoming>,
        waker: &Waker,
        waits: bool,
    ) -> Option<Taken> {
        let mut after = After::default();
        let mut state = self.state();
        let queue = state.find(share.queue())?;
        let taken = queue.take(max, share, into, waker, waits);
        if !matches!(taken, Taken::Nothing { .. }) {
            queue.pass_on(&mut after);
            state.admit(&mut after);
        }
        drop(state);
        after.run();
        Some(taken)
    }

    /// The consumer that waited does so no more.
    pub(super) fn stop_waiting(&self, share: &Arc<Share>) {
        let mut after = After::default();
        let mut state = self.state();
        if let Some(queue) = state.find(share.queue()) {
            queue.stop_waiting(share, &mut after);
        }
        drop(state);
        after.run();
    }

    /// Puts a delivered message back; `false`: its queue exists no more.
    pub(super) fn give_back(
        &self,
        queue: u64,
        message: Message,
        ticket: Ticket,
        attempt: Option<u32>,
        delay: Duration,
    ) -> bool {
        let due = (!delay.is_zero()).then(|| Instant::now() + delay);
        let mut after = After::default();
        let mut state = self.state();
        let Some(queue) = state.find(queue) else { return false };
        queue.give_back(message, ticket, attempt, due, &mut after);
        drop(state);
        after.run();
        true
    }

    pub(super) fn stats(&self, group: Option<&str>) -> Result<Stats> {
        let state = self.state();
        if state.limits.is_none() {
            return Err(self.missing("stats"));
        }
        let group = group.filter(|_| self.address.kind() == ChannelKind::Topic);
        let mut stats = Stats { unsettled: Some(0), ..Stats::default() };
        let mut found = group.is_none();
        for queue in state.queues.iter().filter(|queue| group.is_none() || queue.group.as_deref() == group) {
            found = true;
            stats.ready += queue.len() as u64;
            stats.consumers += queue.consumers;
            stats.unsettled = stats.unsettled.map(|count| count + queue.unsettled());
        }
        if found { Ok(stats) } else { Err(self.missing_group(group.unwrap_or_default())) }
    }

    pub(super) fn purge(&self) -> Result<u64> {
        let mut after = After::default();
        let mut state = self.state();
        if state.limits.is_none() {
            return Err(self.missing("purge"));
        }
        let count = state.queues.iter_mut().map(|queue| queue.purge(&mut after)).sum();
        state.admit(&mut after);
        drop(state);
        after.run();
        Ok(count)
    }

    #[cold]
    fn error(
        &self,
        kind: ErrorKind,
        operation: &'static str,
        sentence: impl Into<std::borrow::Cow<'static, str>>,
    ) -> Error {
        Error::new(kind, sentence).with_backend(NAME).with_operation(operation).with_channel(self.address.name())
    }

    #[cold]
    pub(super) fn missing(&self, operation: &'static str) -> Error {
        self.error(ErrorKind::NotFound, operation, format!("the {} does not exist", self.address.kind()))
            .with_hint("declare it first")
    }

    #[cold]
    fn missing_group(&self, group: &str) -> Error {
        self.error(ErrorKind::NotFound, "consume", format!("the topic has no group {group:?}"))
            .with_hint("declare it first")
    }

    #[cold]
    pub(super) fn closed(&self, operation: &'static str) -> Error {
        Error::closed(operation).with_backend(NAME).with_channel(self.address.name())
    }

    #[cold]
    fn unroutable(&self) -> Error {
        self.error(ErrorKind::Unroutable, "send", format!("the {} was deleted", self.address.kind()))
            .with_hint("declare it again")
    }
}

/// A channel that a message is being sent to.
pub(super) struct Locked<'a> {
    state: MutexGuard<'a, State>,
    is_simple: bool,
}

impl Locked<'_> {
    /// The only queue of the channel, when the message can go there at once.
    #[inline]
    pub(super) fn queue(&mut self) -> Option<&mut Queue> {
        if self.is_simple { self.state.queues.first_mut() } else { None }
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.address, f)
    }
}
