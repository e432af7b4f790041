//! Looking at what waits: nothing is taken by it, counted or hidden from those who take.

use polymq_kubemq_proto::QueueMessage;
use prost::Message as _;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use super::{PAGE, Queue, now, take::is_over};
use crate::store::StoreError;

/// Wakes the next one when it goes.
struct PassesOn<'a>(&'a Notify);

impl Drop for PassesOn<'_> {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Queue {
    /// Up to `most` messages that wait, without those whose time is over; waits for the first one until the deadline, or until
    /// the queue is deleted.
    pub(crate) async fn peek(&self, most: usize, deadline: Instant) -> Result<Vec<QueueMessage>, StoreError> {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            // Who takes messages may have been meant by what woke this one, also when this future is dropped while it looks.
            let passes_on = PassesOn(&self.arrived);
            let found = self.look(most).await?;
            if !found.is_empty() {
                return Ok(found);
            }
            // There is nothing for anybody.
            std::mem::forget(passes_on);
            if self.lock().gone {
                return Ok(Vec::new());
            }
            if timeout_at(deadline, arrived).await.is_err() {
                return Ok(Vec::new());
            }
        }
    }

    async fn look(&self, most: usize) -> Result<Vec<QueueMessage>, StoreError> {
        if let Some(cause) = self.store.failed() {
            return Err(cause.clone());
        }
        let (mut found, mut bytes, now) = (Vec::new(), 0, now());
        // Whether there may be more.
        let mut add = |message: &QueueMessage, size: usize| {
            if is_over(message, now) {
                return true;
            }
            bytes += size;
            if found.len() >= most || (bytes > self.answer && !found.is_empty()) {
                return false;
            }
            let mut message = message.clone();
            // As who takes it next sees it.
            message.attributes.get_or_insert_default().receive_count += 1;
            found.push(message);
            true
        };
        let (mut goes, mut from, end) = {
            let state = self.lock();
            let mut goes = !state.gone;
            for waiting in state.back.values().chain(&state.ahead) {
                goes = goes && add(&waiting.message, waiting.size);
            }
            (goes, state.cursor, state.visible)
        };
        // Without the lock, so that nobody waits for this. What is taken meanwhile was there when this began.
        while goes && from < end {
            let page = self.store.read(self.id, from, PAGE.0, PAGE.1)?;
            goes = !page.is_empty();
            for (sequence, value) in page {
                from = sequence + 1;
                let message = QueueMessage::decode(&*value);
                goes = goes && sequence < end && message.map_or(true, |message| add(&message, value.len()));
            }
            // Very many may be over, and other callers are served by this thread too.
            tokio::task::yield_now().await;
        }
        Ok(found)
    }
}
