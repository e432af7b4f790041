//! Sending: a handle on the one client of the connection.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Completion, Error, Message, Producer, Receipt, Result};
use tokio::time::timeout;

use crate::{
    error,
    publisher::{Answer, Outgoing, Publisher},
    tally::{Tally, Ticket},
    topology,
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
    tally: Tally,
    closed: AtomicBool,
}

impl KafkaProducer {
    pub(crate) fn new(publisher: Arc<Publisher>, topic: Arc<str>, delay: Option<Arc<str>>) -> Self {
        Self { publisher, topic, delay, tally: Tally::default(), closed: AtomicBool::new(false) }
    }

    fn outgoing(&self, message: Message, ticket: Ticket) -> Result<(Outgoing, Completion<Receipt>)> {
        if self.closed.load(Ordering::Acquire) {
            return Err(error::closed("send"));
        }
        let due = message.deliver_at();
        let (topic, partition) = topology::place(&self.topic, self.delay.as_ref(), due)?;
        let (completer, completion) = Completion::queued();
        let id = message.id().cloned().unwrap_or_default();
        let answer = Answer::Send { completer, id, _ticket: ticket };
        Ok((Outgoing { message, topic, partition, due, answer }, completion))
    }

    fn refused(&self, error: Error) -> Completion<Receipt> {
        Completion::ready(Err(error.with_operation("send").with_channel(&*self.topic)))
    }
}

#[async_trait]
impl Producer for KafkaProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        match self.outgoing(message, self.tally.ticket()) {
            Ok((outgoing, completion)) => {
                self.publisher.send(outgoing);
                completion
            }
            Err(error) => self.refused(error),
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
