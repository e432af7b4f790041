//! A group of a topic that takes only some kinds, where the broker delivers all of them.

use std::{fmt, sync::Arc};

use async_trait::async_trait;

use crate::{Consumer, Incoming, Result, Settler};

/// Acknowledges, unseen, what is of another kind.
pub(crate) struct Filtered {
    consumer: Box<dyn Consumer>,
    settler: Arc<dyn Settler>,
    kinds: Vec<String>,
    received: Vec<Incoming>,
}

impl Filtered {
    /// The consumer itself when there is nothing to filter.
    pub(crate) fn around(consumer: Box<dyn Consumer>, kinds: &[String]) -> Box<dyn Consumer> {
        if kinds.is_empty() {
            return consumer;
        }
        let settler = consumer.settler();
        Box::new(Self { consumer, settler, kinds: kinds.to_vec(), received: Vec::new() })
    }

    fn is_wanted(&self, incoming: &Incoming) -> bool {
        incoming.message.kind().is_some_and(|kind| self.kinds.iter().any(|wanted| wanted == kind))
    }
}

#[async_trait]
impl Consumer for Filtered {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        let before = into.len();
        while into.len() == before {
            // Cancel-safe: what a call that was given up has fetched stays here.
            if self.received.is_empty() {
                self.consumer.receive(max, &mut self.received).await?;
            }
            for incoming in std::mem::take(&mut self.received) {
                if self.is_wanted(&incoming) {
                    into.push(incoming);
                } else if let Some(Err(error)) = self.settler.ack(incoming.token).try_take() {
                    // It comes again, and is passed over again.
                    tracing::debug!(%error, "a message of another kind was not acknowledged");
                }
            }
        }
        Ok(())
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.settler)
    }

    async fn close(&mut self) -> Result<()> {
        for incoming in self.received.drain(..) {
            self.settler.release(incoming.token, incoming.message);
        }
        self.consumer.close().await
    }
}

impl fmt::Debug for Filtered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Filtered").field("consumer", &self.consumer).field("kinds", &self.kinds).finish_non_exhaustive()
    }
}
