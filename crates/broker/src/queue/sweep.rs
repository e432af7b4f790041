//! Removing what has expired although nobody takes anything: in steps, and only where something is due.
//!
//! A queue knows when the first of its messages expires, as far as it has seen them; of what is there at the start it knows
//! nothing, and looks. Then one pass goes through all that waits, which finds out when the next one expires.

use std::sync::Arc;

use polymq_kubemq_proto::QueueMessage;
use prost::Message as _;
use tokio::sync::oneshot;

use super::{
    PAGE, Queue, State, Waiting, now,
    take::{EXPIRED, expires_at},
};
use crate::store::{Change, Key, StoreError};

/// Pages of a queue that are looked through without finding anything, before it is the others' turn.
const PAGES: usize = 16;

impl Queue {
    /// Goes on removing what has expired, until it is gone or so much was looked through for nothing.
    pub(crate) async fn sweep(self: &Arc<Self>) -> Result<(), StoreError> {
        for _ in 0..PAGES {
            // Where something is found, the next page is looked at too.
            loop {
                let Some(from) = self.sweeps_from() else { return Ok(()) };
                let page = self.store.read(self.id, from, PAGE.0, PAGE.1)?;
                match self.sweep_page(from, page) {
                    // On disk before the next step, so that no more than a step is on its way.
                    Some(done) => done.await.unwrap_or(Err(StoreError::Closed))?,
                    None => break,
                }
            }
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// Where the pass goes on, if there is one or one is due.
    fn sweeps_from(&self) -> Option<u64> {
        let mut state = self.lock();
        if state.gone {
            return None;
        }
        if state.swept.is_none() && state.expires <= now() {
            state.expires = i64::MAX;
            state.swept = Some(0);
        }
        state.swept.map(|from| from.max(state.cursor))
    }

    /// Removes what has expired of a page from the disk, and of what memory holds. Tells when that is on disk, if there was anything.
    fn sweep_page(
        self: &Arc<Self>,
        from: u64,
        page: Vec<(u64, Vec<u8>)>,
    ) -> Option<oneshot::Receiver<Result<(), StoreError>>> {
        let now = now();
        let mut state = self.lock();
        if state.gone {
            return None;
        }
        let mut over = state.known_over(now);
        let mut next = if page.is_empty() { state.visible } else { from };
        for (sequence, value) in page {
            next = sequence + 1;
            // What was read ahead in between is known, and what somebody has taken is not ours.
            if sequence < state.cursor || sequence >= state.visible || state.leaving.contains(&sequence) {
                continue;
            }
            let Ok(message) = QueueMessage::decode(&*value) else { continue };
            let waiting = Waiting { sequence, size: value.len(), message };
            if state.stays(&waiting, now) {
                continue;
            }
            over.push(waiting);
        }
        // Where memory holds more that has expired than a step removes, it is due again at once.
        state.swept = (next < state.visible).then_some(next);
        if over.is_empty() {
            return None;
        }
        state.leaving.extend(over.iter().map(|waiting| waiting.sequence));
        let removal = |waiting: &Waiting| Change::Remove(Key::new(self.id, waiting.sequence), waiting.size);
        let (done, waits) = oneshot::channel();
        let queue = Arc::clone(self);
        // Under the lock: who empties the queue does not count what goes before.
        self.store.commit(over.iter().map(removal).collect(), None, move |result| {
            queue.swept(over, result.is_ok());
            let _ = done.send(result);
        });
        Some(waits)
    }

    /// What has expired is gone, or could not be removed and waits at its place.
    fn swept(&self, over: Vec<Waiting>, gone: bool) {
        let mut state = self.lock();
        for waiting in over {
            state.leaving.remove(&waiting.sequence);
            if gone {
                state.stats.messages = state.stats.messages.saturating_sub(1);
                state.stats.bytes = state.stats.bytes.saturating_sub(waiting.size as u64);
                state.stats.expired += 1;
            } else {
                state.expires = 0;
                if waiting.sequence < state.cursor {
                    state.back.insert(waiting.sequence, waiting);
                }
            }
        }
    }
}

impl State {
    /// Takes what has expired out of what memory holds, about a step of it.
    fn known_over(&mut self, now: i64) -> Vec<Waiting> {
        let mut due = Vec::new();
        for (sequence, waiting) in &self.back {
            let at = expires_at(&waiting.message);
            if at <= now && (due.len() as u64) < EXPIRED.0 {
                due.push(*sequence);
            } else {
                self.expires = self.expires.min(at);
            }
        }
        let mut over: Vec<_> = due.iter().filter_map(|sequence| self.back.remove(sequence)).collect();
        for waiting in std::mem::take(&mut self.ahead) {
            if self.stays(&waiting, now) { self.ahead.push_back(waiting) } else { over.push(waiting) }
        }
        over
    }

    /// Whether a message has time left; then it is remembered when that ends.
    fn stays(&mut self, waiting: &Waiting, now: i64) -> bool {
        let at = expires_at(&waiting.message);
        if at > now {
            self.expires = self.expires.min(at);
        }
        at > now
    }
}
