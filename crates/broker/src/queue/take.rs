//! Taking messages, and waiting for them.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use polymq_kubemq_proto::QueueMessage;
use prost::Message as _;
use tokio::time::{Instant, timeout_at};

use super::{Lent, PAGE, Queue, State, Waiting, now};
use crate::store::{Change, Key, StoreError};

/// Messages, and bytes of them, that are found to be expired in one step, so that nobody waits long for it.
pub(super) const EXPIRED: (u64, usize) = (1024, 8 << 20);

/// What a receive gave.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) messages: Vec<Lent>,
    /// Messages that were found to be expired.
    pub(crate) expired: u64,
}

impl Queue {
    /// Takes up to `most` messages, waiting for the first one until the deadline, or until the queue is deleted. Behind very many
    /// that have expired it may find none in time: who asks again goes on, and [`Queue::sweep`] does.
    pub(crate) async fn take(self: &Arc<Self>, most: usize, deadline: Instant) -> Result<Taken, StoreError> {
        self.take_up_to(|| most, deadline).await
    }

    /// As [`Queue::take`], with the bound as it is when there is something; ends when that is none.
    pub(crate) async fn take_up_to(
        self: &Arc<Self>,
        most: impl Fn() -> usize + Send,
        deadline: Instant,
    ) -> Result<Taken, StoreError> {
        let mut expired = 0;
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            let most = most();
            // With a bound of none, it passes on what woke it.
            let mut taken = self.take_now(most)?;
            expired += taken.expired;
            if !taken.messages.is_empty() {
                taken.expired = expired;
                return Ok(taken);
            }
            if most == 0 || self.lock().gone {
                return Ok(Taken { messages: Vec::new(), expired });
            }
            if taken.expired > 0 {
                if Instant::now() >= deadline {
                    return Ok(Taken { messages: Vec::new(), expired });
                }
                // Others are served in between, and the store keeps up.
                self.store.written().await?;
                continue;
            }
            let _wants = Wants::begin(&self.wanted, most);
            if timeout_at(deadline, arrived).await.is_err() {
                return Ok(Taken { messages: Vec::new(), expired });
            }
        }
    }

    /// Takes what is there, or as much as is behind so many expired messages.
    pub(crate) fn take_now(self: &Arc<Self>, most: usize) -> Result<Taken, StoreError> {
        // What is taken now could not be settled.
        if let Some(cause) = self.store.failed() {
            return Err(cause.clone());
        }
        let mut taken = Taken::default();
        let mut gone = Vec::new();
        let (mut bytes, mut passed, mut unread) = (0, 0, None);
        let mut state = self.lock();
        while taken.messages.len() < most && taken.expired < EXPIRED.0 && passed < EXPIRED.1 && !state.gone {
            let mut waiting = match self.next_waiting(&mut state) {
                Ok(Some(waiting)) => waiting,
                Ok(None) => break,
                // What has expired until here leaves all the same, and whoever waits is woken.
                Err(cause) => {
                    unread = Some(cause);
                    break;
                }
            };
            if self.expire(&mut state, &waiting, &mut gone) {
                taken.expired += 1;
                passed += waiting.size;
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
            taken.messages.push(Lent::new(self, waiting));
        }
        let more = state.has_waiting() && !state.gone;
        state.stats.active_at = now() / 1_000_000;
        drop(state);
        if !gone.is_empty() {
            self.store.remove(gone, drop);
        }
        if more {
            self.arrived.notify_one();
        }
        match unread {
            Some(cause) if taken.messages.is_empty() => Err(cause),
            _ => Ok(taken),
        }
    }

    fn next_waiting(&self, state: &mut State) -> Result<Option<Waiting>, StoreError> {
        if let Some(entry) = state.back.first_entry() {
            return Ok(Some(entry.remove()));
        }
        while state.ahead.is_empty() && state.cursor < state.visible {
            let page = self.store.read(self.id, state.cursor, PAGE.0, PAGE.1)?;
            if page.is_empty() {
                // Nothing on disk from the cursor on: what was visible was discarded or has expired.
                state.cursor = state.visible;
            }
            for (sequence, value) in page {
                // Written and not synced yet: it is given when it has entered.
                if sequence >= state.visible {
                    state.cursor = state.visible;
                    break;
                }
                state.cursor = sequence + 1;
                if state.leaving.contains(&sequence) {
                    continue;
                }
                let size = value.len();
                match QueueMessage::decode(&*value) {
                    Ok(message) => state.ahead.push_back(Waiting { sequence, size, message }),
                    Err(cause) => {
                        tracing::error!(queue = self.name, sequence, %cause, "a stored message cannot be read; it is passed over");
                    }
                }
            }
        }
        Ok(state.ahead.pop_front())
    }

    fn expire(&self, state: &mut State, waiting: &Waiting, gone: &mut Vec<Change>) -> bool {
        if !is_over(&waiting.message, now()) {
            return false;
        }
        gone.push(Change::Remove(Key::new(self.id, waiting.sequence), waiting.size));
        state.stats.messages = state.stats.messages.saturating_sub(1);
        state.stats.bytes = state.stats.bytes.saturating_sub(waiting.size as u64);
        state.stats.expired += 1;
        true
    }

    /// Back to its place, as if it had never been taken.
    pub(super) fn give_back(&self, mut waiting: Waiting) {
        let mut state = self.lock();
        if state.held.remove(&waiting.sequence).is_some() {
            if let Some(attributes) = &mut waiting.message.attributes {
                attributes.receive_count -= 1;
            }
            state.expires = state.expires.min(expires_at(&waiting.message));
            state.back.insert(waiting.sequence, waiting);
        }
        drop(state);
        self.arrived.notify_one();
    }
}

/// Whether a message has expired.
pub(super) fn is_over(message: &QueueMessage, now: i64) -> bool {
    expires_at(message) <= now
}

/// When a message expires, in nanoseconds since the Unix epoch; never is the latest.
pub(super) fn expires_at(message: &QueueMessage) -> i64 {
    let at = message.attributes.as_ref().map_or(0, |attributes| attributes.expiration_at);
    if at == 0 { i64::MAX } else { at }
}

/// Somebody waits for so many messages.
struct Wants<'a>(&'a AtomicUsize, usize);

impl<'a> Wants<'a> {
    fn begin(wanted: &'a AtomicUsize, most: usize) -> Self {
        wanted.fetch_add(most, Ordering::Relaxed);
        Self(wanted, most)
    }
}

impl Drop for Wants<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}
