//! Emptying a queue: in steps, each a transaction, so that others are served in between however much there is.

use std::sync::Arc;

use polymq_kubemq_proto::QueueMessage;
use prost::Message as _;
use tokio::sync::oneshot;

use super::{Queue, State, Waiting, now};
use crate::store::{Change, Key, StoreError};

/// Messages and bytes of a step; one message may have more.
const STEP: (usize, u64) = (4096, 8 << 20);

/// What one step discards: what memory holds of the queue's head, or a stretch that is on disk only.
#[derive(Debug)]
enum Step {
    Known(Vec<Waiting>),
    Stretch { from: u64, to: u64, count: u64, bytes: u64 },
}

impl Step {
    fn size(&self) -> (u64, u64) {
        match self {
            Self::Known(messages) => (messages.len() as u64, messages.iter().map(|waiting| waiting.size as u64).sum()),
            Self::Stretch { count, bytes, .. } => (*count, *bytes),
        }
    }
}

impl Queue {
    /// Discards what waits at the time of this call; what is lent stays, and what comes in from now on. Tells how many, when
    /// that is on disk.
    ///
    /// What consumers take in between is theirs. After a crash, an error, or when this future is dropped, the steps that were
    /// made stay made, and the rest waits as before.
    pub(crate) async fn purge(self: &Arc<Self>) -> Result<u64, StoreError> {
        let end = self.lock().visible;
        let mut discarded = 0;
        while let Some((count, done)) = self.discard(end)? {
            done.await.unwrap_or(Err(StoreError::Closed))?;
            discarded += count;
        }
        Ok(discarded)
    }

    /// Before it is deleted: discards what waits where that is more than a step, so that nobody who sends waits for all of it.
    /// What is no more goes with the queue or stays with it.
    pub(crate) async fn purge_much(self: &Arc<Self>) -> Result<(), StoreError> {
        let stats = self.stats();
        if stats.messages > STEP.0 as u64 || stats.bytes > STEP.1 {
            self.purge().await?;
        }
        Ok(())
    }

    /// Begins the next step. Tells how many messages it discards, and when it is on disk.
    #[allow(clippy::type_complexity)]
    fn discard(
        self: &Arc<Self>,
        end: u64,
    ) -> Result<Option<(u64, oneshot::Receiver<Result<(), StoreError>>)>, StoreError> {
        let mut state = self.lock();
        let Some(step) = self.next_step(&mut state, end)? else { return Ok(None) };
        let (count, bytes) = step.size();
        state.stats.messages = state.stats.messages.saturating_sub(count);
        state.stats.bytes = state.stats.bytes.saturating_sub(bytes);
        state.stats.active_at = now() / 1_000_000;
        let changes = match &step {
            Step::Known(messages) => messages
                .iter()
                .map(|waiting| Change::Remove(Key::new(self.id, waiting.sequence), waiting.size))
                .collect(),
            Step::Stretch { from, to, .. } => {
                vec![Change::RemoveRange { from: Key::new(self.id, *from), to: Key::new(self.id, *to) }]
            }
        };
        let (done, waits) = oneshot::channel();
        let queue = Arc::clone(self);
        self.store.commit(changes, None, move |result| {
            if result.is_err() {
                queue.put_back(step);
            }
            let _ = done.send(result);
        });
        Ok(Some((count, waits)))
    }

    fn next_step(&self, state: &mut State, end: u64) -> Result<Option<Step>, StoreError> {
        let (mut known, mut bytes) = (Vec::new(), 0);
        while known.len() < STEP.0
            && bytes < STEP.1
            && let Some(waiting) = state.known_before(end)
        {
            bytes += waiting.size as u64;
            known.push(waiting);
        }
        if !known.is_empty() {
            return Ok(Some(Step::Known(known)));
        }
        let from = state.cursor;
        if from >= end {
            return Ok(None);
        }
        let (mut to, mut count) = (from, 0);
        for (sequence, size) in self.store.sizes(self.id, from, STEP.0)? {
            if sequence >= end || bytes >= STEP.1 {
                break;
            }
            to = sequence + 1;
            // What has expired and is on its way out is counted there.
            if !state.leaving.contains(&sequence) {
                (count, bytes) = (count + 1, bytes + size);
            }
        }
        // Nothing is there any more, as when damaged messages were passed over.
        state.cursor = if count == 0 { end } else { to };
        Ok((count > 0).then_some(Step::Stretch { from, to, count, bytes }))
    }

    /// What could not be discarded waits again at its place.
    fn put_back(&self, step: Step) {
        let (count, bytes) = step.size();
        let messages = match step {
            Step::Known(messages) => messages,
            Step::Stretch { from, to, .. } => self.stretch(from, to),
        };
        let mut state = self.lock();
        state.stats.messages += count;
        state.stats.bytes += bytes;
        state.expires = 0;
        state.back.extend(messages.into_iter().map(|waiting| (waiting.sequence, waiting)));
        drop(state);
        self.arrived.notify_one();
    }

    fn stretch(&self, from: u64, to: u64) -> Vec<Waiting> {
        let read = self.store.read(self.id, from, STEP.0, usize::MAX).unwrap_or_else(|cause| {
            tracing::error!(queue = self.name, %cause, "messages that could not be discarded come again after a restart");
            Vec::new()
        });
        let stretch = read.into_iter().take_while(|(sequence, _)| *sequence < to);
        let readable = stretch.filter_map(|(sequence, value)| {
            Some(Waiting { sequence, size: value.len(), message: QueueMessage::decode(&*value).ok()? })
        });
        readable.collect()
    }
}

impl State {
    /// Takes the first message before a sequence that memory holds.
    fn known_before(&mut self, end: u64) -> Option<Waiting> {
        if let Some(entry) = self.back.first_entry()
            && *entry.key() < end
        {
            return Some(entry.remove());
        }
        if self.ahead.front()?.sequence < end { self.ahead.pop_front() } else { None }
    }
}
