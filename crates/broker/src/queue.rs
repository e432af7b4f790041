//! One queue: who waits, what is lent, and what goes to the disk when.
//!
//! The messages are on disk; memory holds a short stretch at the head, what is lent and what was given back. A
//! message can be received once it is on disk. Sequences are given and handed to the store under one lock, so the
//! order on disk is the order of the sequences.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use polymq_kubemq_proto::{QueueMessage, QueueMessageAttributes, QueueMessagePolicy};
use prost::Message as _;
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, timeout_at},
};

use crate::store::{Admitted, Change, Key, Store, StoreError, StoredChannel};
use crate::{limits::Limits, refusal::Refusal};

/// Messages and bytes that are read from the disk at once.
const PAGE: (usize, usize) = (256, 1 << 20);

/// Nanoseconds since the Unix epoch.
pub(crate) fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Counters of a queue since the broker was started, and what it holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct QueueStats {
    /// Messages that wait or are lent.
    pub(crate) messages: u64,
    /// Bytes of them, as stored.
    pub(crate) bytes: u64,
    /// Messages that are lent.
    pub(crate) held: u64,
    /// The first sequence that may still be there.
    pub(crate) first: u64,
    /// The last sequence that was given.
    pub(crate) last: u64,
    /// Messages that came in.
    pub(crate) incoming: u64,
    /// Bytes of them.
    pub(crate) incoming_bytes: u64,
    /// Deliveries.
    pub(crate) outgoing: u64,
    /// Bytes of them.
    pub(crate) outgoing_bytes: u64,
    /// Messages whose time was over before anybody took them.
    pub(crate) expired: u64,
    /// When something happened last, in milliseconds since the Unix epoch.
    pub(crate) active_at: i64,
}

#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) id: u32,
    pub(crate) name: String,
    store: Store,
    /// Bytes that one receive gives.
    answer: usize,
    state: Mutex<State>,
    arrived: Notify,
}

#[derive(Debug)]
struct State {
    /// The sequence of the next message.
    next: u64,
    /// Everything before it that is on disk can be taken.
    visible: u64,
    /// Everything before it was discarded.
    purged: u64,
    /// Waiting messages from here on are on disk only.
    cursor: u64,
    /// What waits before the cursor.
    ahead: VecDeque<Waiting>,
    /// What was lent and given back to its place.
    back: BTreeMap<u64, Waiting>,
    /// What is lent, with the bytes that it has on disk.
    held: BTreeMap<u64, usize>,
    stats: QueueStats,
    /// Number and bytes of what is on its way to the disk.
    entering: (u64, u64),
}

#[derive(Debug)]
struct Waiting {
    sequence: u64,
    size: usize,
    message: QueueMessage,
}

/// A message that was taken and is not settled. Dropped unsettled, it is given back to its place.
#[derive(Debug)]
pub(crate) struct Lent {
    queue: Arc<Queue>,
    waiting: Option<Waiting>,
}

impl Lent {
    /// The message as a receiver sees it.
    pub(crate) fn message(&self) -> QueueMessage {
        self.waiting.as_ref().map(|waiting| waiting.message.clone()).unwrap_or_default()
    }

    pub(crate) fn sequence(&self) -> u64 {
        self.waiting.as_ref().map_or(0, |waiting| waiting.sequence)
    }

    /// Its bytes as stored.
    pub(crate) fn size(&self) -> usize {
        self.waiting.as_ref().map_or(0, |waiting| waiting.size)
    }

    pub(crate) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    /// Removes it for good. When that cannot be stored, it comes again after a restart.
    pub(crate) fn remove(self) {
        Self::remove_all(vec![self]);
    }

    /// Removes messages of one queue for good, in one step.
    pub(crate) fn remove_all(messages: Vec<Self>) {
        let Some(queue) = messages.first().map(|lent| Arc::clone(&lent.queue)) else { return };
        let mut changes = Vec::with_capacity(messages.len());
        let mut state = queue.lock();
        for mut lent in messages {
            if let Some(waiting) = lent.waiting.take() {
                state.forget(waiting.sequence);
                changes.push(Change::Remove(Key::new(queue.id, waiting.sequence), waiting.size));
            }
        }
        drop(state);
        let store = queue.store.clone();
        store.remove(changes, move |result| {
            if let Err(cause) = result {
                let queue = &queue.name;
                tracing::error!(queue, %cause, "messages that were acknowledged could not be removed and may come again");
            }
        });
    }

    /// Puts what `change` makes of it at the tail of a queue, in one step with its removal here. When that fails, it is
    /// back at its place.
    pub(crate) async fn move_to(
        mut self,
        target: &Arc<Queue>,
        change: impl FnOnce(&mut QueueMessage),
    ) -> Result<(), StoreError> {
        let Some(waiting) = self.waiting.take() else { return Ok(()) };
        let mut message = waiting.message.clone();
        change(&mut message);
        let source = Arc::clone(&self.queue);
        let removal = Change::Remove(Key::new(source.id, waiting.sequence), waiting.size);
        let (done, waits) = oneshot::channel();
        target.put(vec![message], vec![removal], None, move |result| {
            match &result {
                Ok(()) => source.lock().forget(waiting.sequence),
                Err(_) => source.give_back(waiting),
            }
            let _ = done.send(result);
        });
        waits.await.unwrap_or(Err(StoreError::Closed))
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.queue.give_back(waiting);
        }
    }
}

/// What a receive gave.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) messages: Vec<Lent>,
    /// Messages that were found to be expired.
    pub(crate) expired: u64,
}

impl Queue {
    pub(crate) fn new(store: Store, answer: usize, stored: StoredChannel) -> Self {
        let first = stored.first.unwrap_or(stored.next);
        let stats = QueueStats {
            messages: stored.count,
            bytes: stored.bytes,
            first,
            last: stored.next - 1,
            ..QueueStats::default()
        };
        let state = State {
            next: stored.next,
            visible: stored.next,
            purged: 0,
            cursor: first,
            ahead: VecDeque::new(),
            back: BTreeMap::new(),
            held: BTreeMap::new(),
            stats,
            entering: (0, 0),
        };
        Self { id: stored.id, name: stored.name, store, answer, state: Mutex::new(state), arrived: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stats(&self) -> QueueStats {
        let state = self.lock();
        QueueStats { held: state.held.len() as u64, last: state.next - 1, ..state.stats }
    }

    /// How many of these messages may be sent to it, and why not the next one.
    pub(crate) fn check_room(&self, limits: &Limits, messages: &[QueueMessage]) -> (usize, Option<Refusal>) {
        if (limits.queue_count, limits.queue_bytes) == (None, None) {
            return (messages.len(), None);
        }
        let state = self.lock();
        let (mut count, mut bytes) = (state.stats.messages + state.entering.0, state.stats.bytes + state.entering.1);
        drop(state);
        let full = |what: &str, most: u64| {
            Refusal::because(format_args!(
                "queue {:?} has {most} {what}, the most this broker allows: receive some first, or raise the limit",
                self.name
            ))
        };
        for (fit, message) in messages.iter().enumerate() {
            match (limits.queue_count, limits.queue_bytes) {
                (Some(most), _) if count >= most => return (fit, Some(full("messages", most))),
                (_, Some(most)) if bytes >= most => return (fit, Some(full("bytes of messages", most))),
                _ => (count, bytes) = (count + 1, bytes + message.encoded_len() as u64),
            }
        }
        (messages.len(), None)
    }

    /// Puts messages at the tail, in one step with other changes. `then` is told when they are on disk, or why they are not.
    pub(crate) fn put(
        self: &Arc<Self>,
        messages: Vec<QueueMessage>,
        mut with: Vec<Change>,
        admitted: Option<Admitted>,
        then: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        let mut waiting = Vec::with_capacity(messages.len());
        with.reserve(messages.len() + 1);
        let mut state = self.lock();
        let timestamp = now();
        for mut message in messages {
            message.channel.clone_from(&self.name);
            let sequence = state.next;
            state.next += 1;
            let attributes = message.attributes.get_or_insert_default();
            attributes.sequence = sequence;
            attributes.timestamp = timestamp;
            let value = message.encode_to_vec();
            state.entering = (state.entering.0 + 1, state.entering.1 + value.len() as u64);
            waiting.push(Waiting { sequence, size: value.len(), message });
            with.push(Change::Put(Key::new(self.id, sequence), value));
        }
        with.push(Change::Next { channel: self.id, sequence: state.next });
        let queue = Arc::clone(self);
        // Under the lock: the store takes changes in the order of sequences.
        self.store.commit(with, admitted, move |result| {
            queue.entered(result.is_ok(), waiting);
            then(result);
        });
    }

    /// Messages are on disk and can be taken, or could not be stored.
    fn entered(&self, stored: bool, messages: Vec<Waiting>) {
        let mut state = self.lock();
        for waiting in messages {
            state.entering = (state.entering.0 - 1, state.entering.1 - waiting.size as u64);
            if !stored || waiting.sequence < state.purged {
                continue;
            }
            state.visible = waiting.sequence + 1;
            state.stats.messages += 1;
            state.stats.bytes += waiting.size as u64;
            state.stats.incoming += 1;
            state.stats.incoming_bytes += waiting.size as u64;
            // Who reads at the tail gets it without reading the disk.
            if waiting.sequence == state.cursor && state.ahead.len() < PAGE.0 && waiting.size < PAGE.1 / 16 {
                state.cursor += 1;
                state.ahead.push_back(waiting);
            }
        }
        state.stats.active_at = now() / 1_000_000;
        drop(state);
        self.arrived.notify_one();
    }

    /// Takes up to `most` messages, waiting for the first one until the deadline.
    pub(crate) async fn take(self: &Arc<Self>, most: usize, deadline: Instant) -> Result<Taken, StoreError> {
        let mut expired = 0;
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            let mut taken = self.take_now(most)?;
            expired += taken.expired;
            if !taken.messages.is_empty() {
                taken.expired = expired;
                return Ok(taken);
            }
            if timeout_at(deadline, arrived).await.is_err() {
                return Ok(Taken { messages: Vec::new(), expired });
            }
        }
    }

    /// Takes what is there.
    pub(crate) fn take_now(self: &Arc<Self>, most: usize) -> Result<Taken, StoreError> {
        let mut taken = Taken::default();
        let mut gone = Vec::new();
        let mut bytes = 0;
        let mut state = self.lock();
        while taken.messages.len() < most {
            let Some(mut waiting) = self.next_waiting(&mut state)? else { break };
            if self.expire(&mut state, &waiting, &mut gone) {
                taken.expired += 1;
                continue;
            }
            bytes += waiting.size;
            if bytes > self.answer && !taken.messages.is_empty() {
                state.back.insert(waiting.sequence, waiting);
                break;
            }
            waiting.message.attributes.get_or_insert_default().receive_count += 1;
            state.held.insert(waiting.sequence, waiting.size);
            state.stats.outgoing += 1;
            state.stats.outgoing_bytes += waiting.size as u64;
            taken.messages.push(Lent { queue: Arc::clone(self), waiting: Some(waiting) });
        }
        let more = state.has_waiting();
        state.stats.active_at = now() / 1_000_000;
        drop(state);
        if !gone.is_empty() {
            self.store.remove(gone, drop);
        }
        if more {
            self.arrived.notify_one();
        }
        Ok(taken)
    }

    /// Discards everything that waits; what is lent stays. Tells how many.
    pub(crate) async fn purge(self: &Arc<Self>) -> Result<u64, StoreError> {
        let (done, waits) = oneshot::channel();
        let count = {
            let mut state = self.lock();
            let count = state.stats.messages - state.held.len() as u64;
            let held: usize = state.held.values().sum();
            let change = Change::RemoveRange {
                from: Key::new(self.id, 0),
                to: Key::new(self.id, state.next),
                except: state.held.keys().copied().collect(),
            };
            state.ahead.clear();
            state.back.clear();
            state.cursor = state.next;
            state.visible = state.next;
            state.purged = state.next;
            state.stats.messages = state.held.len() as u64;
            state.stats.bytes = held as u64;
            self.store.commit(vec![change], None, |result| drop(done.send(result)));
            count
        };
        waits.await.unwrap_or(Err(StoreError::Closed))?;
        Ok(count)
    }

    fn next_waiting(&self, state: &mut State) -> Result<Option<Waiting>, StoreError> {
        if let Some(entry) = state.back.first_entry() {
            return Ok(Some(entry.remove()));
        }
        if state.ahead.is_empty() && state.cursor < state.visible {
            for (sequence, value) in self.store.read(self.id, state.cursor, PAGE.0, PAGE.1)? {
                state.cursor = sequence + 1;
                let size = value.len();
                match QueueMessage::decode(&*value) {
                    Ok(message) => state.ahead.push_back(Waiting { sequence, size, message }),
                    Err(cause) => {
                        tracing::error!(queue = self.name, sequence, %cause, "a stored message cannot be read; it is passed over");
                    }
                }
            }
            // Nothing on disk from the cursor on: what was visible was discarded or has expired.
            if state.ahead.is_empty() {
                state.cursor = state.cursor.max(state.visible);
            }
        }
        Ok(state.ahead.pop_front())
    }

    fn expire(&self, state: &mut State, waiting: &Waiting, gone: &mut Vec<Change>) -> bool {
        let at = waiting.message.attributes.as_ref().map_or(0, |attributes| attributes.expiration_at);
        if at == 0 || at > now() {
            return false;
        }
        gone.push(Change::Remove(Key::new(self.id, waiting.sequence), waiting.size));
        state.stats.messages = state.stats.messages.saturating_sub(1);
        state.stats.bytes = state.stats.bytes.saturating_sub(waiting.size as u64);
        state.stats.expired += 1;
        true
    }

    /// Back to its place, as if it had never been taken.
    fn give_back(&self, mut waiting: Waiting) {
        let mut state = self.lock();
        if state.held.remove(&waiting.sequence).is_some() {
            if let Some(attributes) = &mut waiting.message.attributes {
                attributes.receive_count -= 1;
            }
            state.back.insert(waiting.sequence, waiting);
        }
        drop(state);
        self.arrived.notify_one();
    }
}

impl State {
    fn has_waiting(&self) -> bool {
        !self.back.is_empty() || !self.ahead.is_empty() || self.cursor < self.visible
    }

    /// What was lent is gone for good.
    fn forget(&mut self, sequence: u64) {
        if let Some(size) = self.held.remove(&sequence) {
            self.stats.messages = self.stats.messages.saturating_sub(1);
            self.stats.bytes = self.stats.bytes.saturating_sub(size as u64);
        }
    }
}

/// What a sender may not say about a message: that is the queue's.
pub(crate) fn fresh(message: &mut QueueMessage, expiration: Duration) {
    let expiration = i64::try_from(expiration.as_nanos()).unwrap_or(i64::MAX);
    let expiration_at = if expiration == 0 { 0 } else { now().saturating_add(expiration) };
    message.attributes = Some(QueueMessageAttributes { expiration_at, ..QueueMessageAttributes::default() });
    message.policy.get_or_insert_with(QueueMessagePolicy::default);
}
