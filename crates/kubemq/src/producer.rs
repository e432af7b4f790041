//! Sending to one queue or topic.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Completion, Error, Message, Producer, Receipt, Result, until};
use tokio::time::timeout;

use crate::{
    NAME,
    convert::{self, MAX_SECONDS, Wire},
    error,
    outbox::{Answer, Outbox, ToQueues, ToTopics},
};

/// How long a goodbye may take.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Which stream a producer sends over.
#[derive(Debug)]
pub(crate) enum Sink {
    Queue(Arc<Outbox<ToQueues>>),
    Stored(Arc<Outbox<ToTopics<true>>>),
    Plain(Arc<Outbox<ToTopics<false>>>),
}

/// A producer.
#[derive(Debug)]
pub(crate) struct KubeMqProducer {
    sink: Sink,
    channel: Arc<str>,
    client_id: Arc<str>,
    closed: AtomicBool,
}

impl KubeMqProducer {
    pub(crate) fn new(sink: Sink, channel: Arc<str>, client_id: Arc<str>) -> Self {
        Self { sink, channel, client_id, closed: AtomicBool::new(false) }
    }

    fn delay(&self, message: &Message) -> Result<Duration> {
        let Some(delay) = message.deliver_at().map(until).filter(|delay| !delay.is_zero()) else {
            return Ok(Duration::ZERO);
        };
        let what = match &self.sink {
            Sink::Queue(_) if delay <= Duration::from_secs(MAX_SECONDS) => return Ok(delay),
            Sink::Queue(_) => format!("a delay of {delay:?}, at most {MAX_SECONDS} s are possible"),
            _ => "sending to a topic now what is delivered later".to_owned(),
        };
        Err(Error::unsupported(NAME, what))
    }
}

#[async_trait]
impl Producer for KubeMqProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        if self.closed.load(Ordering::Acquire) {
            return Completion::ready(Err(error::closed("send").with_channel(&*self.channel)));
        }
        let delay = match self.delay(&message) {
            Ok(delay) => delay,
            Err(error) => return Completion::ready(Err(error.with_operation("send").with_channel(&*self.channel))),
        };
        let (completer, completion) = Completion::queued();
        let answer = Answer::Receipt(message.id().cloned().unwrap_or_default(), completer);
        match &self.sink {
            Sink::Queue(outbox) => {
                outbox.push(convert::queued(&message, &self.channel, &self.client_id, delay), answer)
            }
            Sink::Stored(outbox) => outbox.push(Wire::of(&message).event(&self.channel, &self.client_id, true), answer),
            Sink::Plain(outbox) => outbox.push(Wire::of(&message).event(&self.channel, &self.client_id, false), answer),
        }
        completion
    }

    async fn flush(&self) -> Result<()> {
        match &self.sink {
            Sink::Queue(outbox) => outbox.flush().await,
            Sink::Stored(outbox) => outbox.flush().await,
            Sink::Plain(outbox) => outbox.flush().await,
        }
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // Bounded: what waits for the broker may wait for ever. It goes on waiting until the connection is closed.
        match timeout(CLOSE_TIMEOUT, self.flush()).await {
            Ok(flushed) => flushed,
            Err(_) => Err(error::not_in_time("close", CLOSE_TIMEOUT).with_channel(&*self.channel)),
        }
    }
}
