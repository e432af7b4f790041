//! A message that is lent: settled, moved, or given back to its place.

use std::sync::Arc;

use md5::{Digest as _, Md5};
use polymq_kubemq_proto::{QueueMessage, QueueMessagePolicy};
use tokio::sync::{Notify, oneshot};

use super::{Queue, Waiting};
use crate::store::{Change, Key, StoreError};

/// A message that was taken and is not settled. Dropped unsettled, it is given back to its place.
#[derive(Debug)]
pub(crate) struct Lent {
    queue: Arc<Queue>,
    waiting: Option<Waiting>,
}

impl Lent {
    pub(super) fn new(queue: &Arc<Queue>, waiting: Waiting) -> Self {
        Self { queue: Arc::clone(queue), waiting: Some(waiting) }
    }

    /// The message as a receiver sees it.
    pub(crate) fn message(&self) -> QueueMessage {
        shown(self.waiting.as_ref().map(|waiting| waiting.message.clone()).unwrap_or_default())
    }

    /// How often it was delivered, and what was asked for it.
    pub(crate) fn policy(&self) -> (i32, QueueMessagePolicy) {
        let Some(waiting) = &self.waiting else { return Default::default() };
        let count = waiting.message.attributes.as_ref().map_or(0, |attributes| attributes.receive_count);
        (count, waiting.message.policy.clone().unwrap_or_default())
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

    /// Removes it for good; waits until that is written. When that cannot be stored, it comes again after a restart.
    pub(crate) async fn remove(self) -> Result<(), StoreError> {
        let (done, waits) = oneshot::channel();
        Self::remove_then(vec![self], |result| drop(done.send(result)));
        waits.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Removes messages of one queue for good, in one step. Nobody waits for it.
    pub(crate) fn remove_all(messages: Vec<Self>) {
        Self::remove_then(messages, drop);
    }

    fn remove_then(messages: Vec<Self>, then: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
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
            if let Err(cause) = &result {
                let queue = &queue.name;
                tracing::error!(queue, %cause, "messages that were acknowledged could not be removed and may come again");
            }
            then(result);
        });
    }

    /// Its message, its removal, and who is to be told whether that is stored.
    fn leave(mut self) -> Option<(QueueMessage, Change, Leaving)> {
        let waiting = self.waiting.take()?;
        let removal = Change::Remove(Key::new(self.queue.id, waiting.sequence), waiting.size);
        Some((waiting.message.clone(), removal, Leaving { queue: Arc::clone(&self.queue), waiting }))
    }

    /// Puts what `change` makes of it at the tail of a queue, in one step with its removal here. When that fails, it is
    /// back at its place.
    pub(crate) async fn move_to(
        self,
        target: &Arc<Queue>,
        change: impl FnOnce(&mut QueueMessage),
    ) -> Result<(), StoreError> {
        let Some((mut message, removal, leaving)) = self.leave() else { return Ok(()) };
        change(&mut message);
        let (done, waits) = oneshot::channel();
        target.put(vec![message], vec![removal], None, move |result| {
            leaving.end(&result);
            let _ = done.send(result);
        });
        waits.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Removes it in one step with a delay for another queue. When that fails, it is back at its place.
    pub(crate) async fn delay_to(
        self,
        target: &Arc<Queue>,
        change: Change,
        delayed: Arc<Notify>,
    ) -> Result<(), StoreError> {
        let Some((_, removal, leaving)) = self.leave() else { return Ok(()) };
        let (done, waits) = oneshot::channel();
        let queue = Arc::clone(target);
        target.row.commit(&target.store, vec![change, removal], None, move |result| {
            leaving.end(&result);
            queue.delayed(result.is_ok().into());
            // Whether anybody still waits or not.
            delayed.notify_one();
            let _ = done.send(result);
        });
        waits.await.unwrap_or(Err(StoreError::Closed))
    }
}

/// A message as a receiver sees it.
pub(crate) fn shown(mut message: QueueMessage) -> QueueMessage {
    let digest = Md5::digest(&message.body);
    message.attributes.get_or_insert_default().md5_of_body = format!("{digest:x}");
    message
}

/// A message whose removal is on its way to the disk.
struct Leaving {
    queue: Arc<Queue>,
    waiting: Waiting,
}

impl Leaving {
    /// Gone for good, or back at its place.
    fn end(self, result: &Result<(), StoreError>) {
        match result {
            Ok(()) => self.queue.lock().forget(self.waiting.sequence),
            Err(_) => self.queue.give_back(self.waiting),
        }
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if let Some(waiting) = self.waiting.take() {
            self.queue.give_back(waiting);
        }
    }
}
