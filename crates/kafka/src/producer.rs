//! Sending: a handle on the one client of the connection.

use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Completion, Error, Message, Producer, Receipt, Result, Tally, Ticket};
use tokio::time::timeout;

use crate::{
    error,
    publisher::{Answer, Outgoing, Publisher},
    topology,
};

/// How long closing waits for answers.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// How often withdrawn messages are looked for while somebody waits for a flush.
const SWEEP_EVERY: Duration = Duration::from_millis(500);

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
        let (topic, partition, due) = topology::place(&self.topic, self.delay.as_ref(), message.deliver_at())?;
        let (completer, completion) = Completion::queued();
        let id = message.id().cloned().unwrap_or_default();
        let answer = Answer::Send { completer, id, _ticket: ticket };
        Ok((Outgoing { message, topic, partition, due, answer }, completion))
    }

    /// Waits for the answers of everything sent by now; what is withdrawn meanwhile gets none.
    async fn answered(&self) {
        let mut answered = pin!(self.tally.flush());
        loop {
            self.publisher.sweep();
            if timeout(SWEEP_EVERY, answered.as_mut()).await.is_ok() {
                return;
            }
        }
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

    /// Reports come in batches, one after the other.
    fn answered_together(&self, window: usize) -> usize {
        window / 2
    }

    async fn flush(&self) -> Result<()> {
        self.answered().await;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // Bounded: what waits for a connection may wait for ever.
        timeout(CLOSE_TIMEOUT, self.answered()).await.map_err(|_| error::timeout("close").with_channel(&*self.topic))
    }
}
