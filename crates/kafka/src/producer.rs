//! Sending: a handle on the one client of the connection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Completion, Error, Message, Producer, Receipt, Result, now};
use tokio::time::timeout;

use crate::{
    NAME, convert, error,
    publisher::{Answer, Outgoing, Publisher},
    tally::Tally,
    topology::{self, MAX_DELAY},
};

/// How long closing waits for answers.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A producer to one topic of Kafka.
#[derive(Debug)]
pub(crate) struct KafkaProducer {
    publisher: Arc<Publisher>,
    topic: Arc<str>,
    /// Where messages for later go; a queue has such a topic.
    delay: Option<Arc<str>>,
    tally: Arc<Tally>,
    closed: AtomicBool,
}

impl KafkaProducer {
    pub(crate) fn new(publisher: Arc<Publisher>, topic: Arc<str>, delay: Option<Arc<str>>) -> Self {
        Self { publisher, topic, delay, tally: Arc::default(), closed: AtomicBool::new(false) }
    }

    fn outgoing(&self, message: Message) -> Result<(Outgoing, Completion<Receipt>)> {
        if self.closed.load(Ordering::Acquire) {
            return Err(error::closed("send"));
        }
        convert::check(&message)?;
        let (mut topic, mut partition, due) = (Arc::clone(&self.topic), None, message.deliver_at());
        if let Some(due) = due {
            let delay = due.duration_since(now()).unwrap_or_default();
            let Some(to) = &self.delay else {
                return Err(Error::unsupported(NAME, "sending to a topic now what is delivered later")
                    .with_hint("send it to a queue"));
            };
            if delay > MAX_DELAY {
                return Err(Error::unsupported(NAME, format_args!("a delay of more than {MAX_DELAY:?}")));
            }
            (topic, partition) = (Arc::clone(to), Some(topology::tier(delay)));
        }
        let (completer, completion) = Completion::queued();
        let id = message.id().cloned().unwrap_or_default();
        let answer = Answer::Send { completer, id, _ticket: self.tally.ticket() };
        Ok((Outgoing { message, topic, partition, due, answer }, completion))
    }
}

#[async_trait]
impl Producer for KafkaProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        match self.outgoing(message) {
            Ok((outgoing, completion)) => {
                self.publisher.send(outgoing);
                completion
            }
            Err(error) => Completion::ready(Err(error.with_operation("send").with_channel(&*self.topic))),
        }
    }

    async fn flush(&self) -> Result<()> {
        self.tally.flush().await;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // Bounded: what waits for a connection may wait for ever.
        timeout(CLOSE_TIMEOUT, self.tally.flush()).await.map_err(|_| error::timeout("close").with_channel(&*self.topic))
    }
}
