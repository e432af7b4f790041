//! One queue: who waits, what is lent, and what goes to the disk when.
//!
//! The messages are on disk; memory holds a short stretch at the head, what is lent and what was given back. A
//! message can be received once it is on disk. Sequences are given and handed to the store under one lock, so the
//! order on disk is the order of the sequences.

mod lent;
mod peek;
mod purge;
mod sweep;
mod take;
#[cfg(test)]
mod tests;

pub(crate) use lent::{Lent, shown};

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use polymq_kubemq_proto::{QueueMessage, QueueMessageAttributes, QueueMessagePolicy};
use prost::Message as _;
use tokio::sync::Notify;

use self::take::expires_at;
use crate::store::{Admitted, Change, Key, Store, StoreError, StoredChannel};
use crate::{limits::Limits, refusal::Refusal, row::Row};

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
    /// Messages that enter it when their delay has ended.
    pub(crate) delayed: u64,
    /// When something happened last, in milliseconds since the Unix epoch.
    pub(crate) active_at: i64,
}

#[derive(Debug)]
pub(crate) struct Queue {
    pub(crate) id: u32,
    pub(crate) name: String,
    pub(crate) store: Store,
    pub(crate) row: Row,
    /// Bytes that one receive gives.
    answer: usize,
    state: Mutex<State>,
    arrived: Notify,
    /// Messages that those who wait would take.
    wanted: AtomicUsize,
}

#[derive(Debug)]
struct State {
    /// The sequence of the next message.
    next: u64,
    /// Everything before it that is on disk can be taken.
    visible: u64,
    /// Waiting messages from here on are on disk only.
    cursor: u64,
    /// What waits before the cursor.
    ahead: VecDeque<Waiting>,
    /// What was lent and given back to its place.
    back: BTreeMap<u64, Waiting>,
    /// What is lent, with the bytes that it has on disk.
    held: BTreeMap<u64, usize>,
    /// When the first message expires that a look for them has seen or that came in since, in nanoseconds since the Unix epoch.
    expires: i64,
    /// How far a look for what has expired has come.
    swept: Option<u64>,
    /// What has expired and is being removed.
    leaving: BTreeSet<u64>,
    stats: QueueStats,
    /// Number and bytes of what is on its way to the disk.
    entering: (u64, u64),
    /// It was deleted: nothing comes any more.
    gone: bool,
}

#[derive(Debug)]
struct Waiting {
    sequence: u64,
    size: usize,
    message: QueueMessage,
}

impl Queue {
    pub(crate) fn new(store: Store, row: Row, answer: usize, stored: StoredChannel) -> Self {
        let first = stored.first.unwrap_or(stored.next);
        let stats = QueueStats {
            messages: stored.count,
            bytes: stored.bytes,
            last: stored.next - 1,
            delayed: stored.delayed,
            ..QueueStats::default()
        };
        let state = State {
            next: stored.next,
            visible: stored.next,
            cursor: first,
            ahead: VecDeque::new(),
            back: BTreeMap::new(),
            held: BTreeMap::new(),
            // Nobody knows of what is there already.
            expires: if stored.count > 0 { 0 } else { i64::MAX },
            swept: None,
            leaving: BTreeSet::new(),
            stats,
            entering: (0, 0),
            gone: false,
        };
        Self {
            id: stored.id,
            name: stored.name,
            store,
            row,
            answer,
            state: Mutex::new(state),
            arrived: Notify::new(),
            wanted: AtomicUsize::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stats(&self) -> QueueStats {
        let state = self.lock();
        let known = [
            state.back.first_key_value().map(|(sequence, _)| *sequence),
            state.held.first_key_value().map(|(sequence, _)| *sequence),
            state.leaving.first().copied(),
            state.ahead.front().map(|waiting| waiting.sequence),
        ];
        let first = known.into_iter().flatten().fold(state.cursor, u64::min);
        QueueStats { held: state.held.len() as u64, first, last: state.next - 1, ..state.stats }
    }

    /// So many more messages wait for the end of their delay: they are on disk.
    pub(crate) fn delayed(&self, count: u64) {
        self.lock().stats.delayed += count;
    }

    /// A delay has ended, and that is on disk.
    pub(crate) fn undelayed(&self) {
        let mut state = self.lock();
        state.stats.delayed = state.stats.delayed.saturating_sub(1);
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
        self.row.commit(&self.store, with, admitted, move |result| {
            queue.entered(result.is_ok(), waiting);
            then(result);
        });
    }

    /// Messages are on disk and can be taken, or could not be stored.
    fn entered(&self, stored: bool, messages: Vec<Waiting>) {
        let wanted = self.wanted.load(Ordering::Relaxed).min(PAGE.0);
        let mut state = self.lock();
        for mut waiting in messages {
            state.entering = (state.entering.0 - 1, state.entering.1 - waiting.size as u64);
            if !stored {
                continue;
            }
            state.visible = waiting.sequence + 1;
            state.expires = state.expires.min(expires_at(&waiting.message));
            state.stats.messages += 1;
            state.stats.bytes += waiting.size as u64;
            state.stats.incoming += 1;
            state.stats.incoming_bytes += waiting.size as u64;
            // Who waits for it gets it without reading the disk. Nothing is kept for nobody, nor all of the request that
            // it came with, of which its body is a part.
            if waiting.sequence == state.cursor && state.ahead.len() < wanted && waiting.size < PAGE.1 / 16 {
                waiting.message.body = Bytes::copy_from_slice(&waiting.message.body);
                state.cursor += 1;
                state.ahead.push_back(waiting);
            }
        }
        state.stats.active_at = now() / 1_000_000;
        drop(state);
        self.arrived.notify_one();
    }

    /// It was deleted: who waits here waits for nothing.
    pub(crate) fn end(&self) {
        self.lock().gone = true;
        self.arrived.notify_waiters();
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
