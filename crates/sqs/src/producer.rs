//! Sending to one queue or topic.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use polymq_core::{
    Completion, Error, Message, MessageId, Producer, Receipt, Result,
    dead_letter::{DEAD_AT, REPLAYED_AT},
    until,
};
use tokio::time::timeout;

use crate::{
    NAME,
    backend::MAX_SEND_DELAY,
    convert, error,
    outbox::{Letter, Outbox},
};

/// How long a goodbye may take.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest group and deduplication id, from SQS's own documents.
const MAX_FIFO_ID: usize = 128;

/// A producer.
#[derive(Debug)]
pub(crate) struct SqsProducer {
    outbox: Arc<Outbox>,
    channel: Arc<str>,
    max_message: usize,
    fifo: bool,
    topic: bool,
    subject: Option<Arc<str>>,
    closed: AtomicBool,
}

impl SqsProducer {
    pub(crate) fn new(
        outbox: Arc<Outbox>,
        channel: Arc<str>,
        max_message: usize,
        (fifo, topic): (bool, bool),
        subject: Option<String>,
    ) -> Self {
        let subject = subject.map(Arc::from);
        Self { outbox, channel, max_message, fifo, topic, subject, closed: AtomicBool::new(false) }
    }

    fn letter(&self, message: &Message) -> Result<Letter> {
        let wire = convert::encode(message, self.max_message)?;
        let delay = message.deliver_at().map(until);
        if let Some(delay) = delay {
            self.check_delay(delay)?;
        }
        let id = message.id().cloned().unwrap_or_default();
        let fifo = self.fifo.then(|| (group(message, &id), once(message, &id)));
        let deliver_at = delay.map(|delay| Instant::now() + delay);
        Ok(Letter { wire, deliver_at, fifo, subject: self.subject.clone(), id })
    }

    fn check_delay(&self, delay: Duration) -> Result<()> {
        let what = if self.topic {
            "sending to a topic now what is delivered later".to_owned()
        } else if self.fifo {
            "sending to a FIFO queue now what is delivered later".to_owned()
        } else if delay > MAX_SEND_DELAY {
            format!("a delay of {delay:?}, at most {MAX_SEND_DELAY:?} are possible")
        } else {
            return Ok(());
        };
        Err(Error::unsupported(NAME, what))
    }
}

/// The group of a message. Without a key there is no order to keep: a group of its own.
pub(crate) fn group(message: &Message, id: &MessageId) -> String {
    message.key().map_or_else(|| fifo_id(&id.to_string()), fifo_id)
}

/// What SQS takes once in five minutes: the id, and where polymq itself sends the message on under its id, the moment when it
/// did so. What was dead-lettered, replayed and dead-lettered again within that time would be lost otherwise.
fn once(message: &Message, id: &MessageId) -> String {
    let headers = message.system_headers();
    match headers.get(DEAD_AT).or_else(|| headers.get(REPLAYED_AT)) {
        Some(moment) => fifo_id(&format!("{id}@{moment}")),
        None => fifo_id(&id.to_string()),
    }
}

/// An id as FIFO queues take it: itself where it is short and plain, else a digest of it.
pub(crate) fn fifo_id(text: &str) -> String {
    let plain = text.len() <= MAX_FIFO_ID && text.bytes().all(|byte| byte.is_ascii_graphic());
    if plain { text.to_owned() } else { uuid::Uuid::new_v5(&uuid::Uuid::NAMESPACE_OID, text.as_bytes()).to_string() }
}

#[async_trait]
impl Producer for SqsProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        if self.closed.load(Ordering::Acquire) {
            return Completion::ready(Err(error::closed("send").with_channel(&*self.channel)));
        }
        match self.letter(&message) {
            Ok(letter) => {
                let (completer, completion) = Completion::queued();
                self.outbox.push(letter, completer);
                completion
            }
            Err(error) => Completion::ready(Err(error.with_operation("send").with_channel(&*self.channel))),
        }
    }

    async fn flush(&self) -> Result<()> {
        self.outbox.flush().await;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.outbox.close();
        // Bounded: what waits for the service may wait for ever. It goes on waiting until the connection is closed.
        timeout(CLOSE_TIMEOUT, self.outbox.flush()).await.map_err(|_| {
            Error::new(polymq_core::ErrorKind::Timeout, "not everything was answered in time")
                .with_backend(NAME)
                .with_operation("close")
                .with_channel(&*self.channel)
        })
    }
}

impl Drop for SqsProducer {
    fn drop(&mut self) {
        self.outbox.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_fifo_queues_refuse_are_digested_alike_everywhere() {
        assert_eq!(fifo_id("customer-7"), "customer-7");
        assert_eq!(fifo_id("customer 7"), "959170cb-304a-5fe1-9885-d65f0d5a475e");
        assert_eq!(fifo_id("é"), fifo_id("é"));
        assert_ne!(fifo_id("é"), fifo_id("è"));
        assert!(fifo_id(&"k".repeat(200)).len() <= MAX_FIFO_ID);
    }

    #[test]
    fn what_polymq_sends_on_under_its_id_is_no_repetition() {
        let message = Message::new("x").with_id("order-7").with_key("customer-7");
        let id = message.id().cloned().unwrap_or_default();
        assert_eq!((group(&message, &id), once(&message, &id)), ("customer-7".into(), "order-7".into()));
        let mut dead = message.clone();
        dead.set_system_header(DEAD_AT, "2023-11-14T22:13:20Z");
        assert_eq!(once(&dead, &id), "order-7@2023-11-14T22:13:20Z");
        assert_eq!(group(&Message::new("x").with_id("order-7"), &id), "order-7");
    }
}
