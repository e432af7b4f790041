//! Sending: a handle on one of the shared confirm channels.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use polymq_core::{Completion, Message, Producer, Receipt, Result};
use tokio::time::timeout;

use crate::{
    convert, error,
    link::CLOSE_TIMEOUT,
    pool::{Answer, Outgoing, Publishers, Route},
};

/// A producer to one queue or topic.
#[derive(Debug)]
pub(crate) struct AmqpProducer {
    publishers: Arc<Publishers>,
    route: Arc<Route>,
    closed: AtomicBool,
}

impl AmqpProducer {
    pub(crate) fn new(publishers: Arc<Publishers>, route: Arc<Route>) -> Self {
        Self { publishers, route, closed: AtomicBool::new(false) }
    }
}

#[async_trait]
impl Producer for AmqpProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        if self.closed.load(Ordering::Acquire) {
            return Completion::ready(Err(error::closed("send").with_channel(&*self.route.routing_key)));
        }
        if let Err(error) = convert::check(&message) {
            return Completion::ready(Err(error.with_operation("send").with_channel(&*self.route.routing_key)));
        }
        let (completer, completion) = Completion::queued();
        let answer = Answer::Send(completer);
        self.publishers.send(Outgoing { message, route: Arc::clone(&self.route), answer });
        completion
    }

    async fn flush(&self) -> Result<()> {
        self.publishers.flush(&self.route).await;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        // Bounded: what waits for a connection may wait for ever. It goes on waiting until the connection is closed.
        timeout(CLOSE_TIMEOUT, self.flush())
            .await
            .unwrap_or_else(|_| Err(error::timeout("close").with_channel(&*self.route.routing_key)))
    }
}
