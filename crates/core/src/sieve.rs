//! A consumer whose messages are looked at on their way to those who receive: each is changed, or kept from them.

use std::{
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use async_trait::async_trait;

use crate::{Consumer, Incoming, Result, Settler};

/// Gives what `look` makes of each message.
pub(crate) struct Sieve<F> {
    consumer: Box<dyn Consumer>,
    look: F,
    /// Cancel-safe: what a call that was given up has fetched stays here.
    received: Vec<Incoming>,
}

impl<F: FnMut(Incoming) -> Option<Incoming>> Sieve<F> {
    pub(crate) fn new(consumer: Box<dyn Consumer>, look: F) -> Self {
        Self { consumer, look, received: Vec::new() }
    }

    /// Whether one came through.
    fn pass(&mut self, into: &mut Vec<Incoming>) -> bool {
        let before = into.len();
        into.extend(self.received.drain(..).filter_map(&mut self.look));
        into.len() > before
    }
}

#[async_trait]
impl<F: FnMut(Incoming) -> Option<Incoming> + Send + 'static> Consumer for Sieve<F> {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        while !self.pass(into) {
            self.consumer.receive(max, &mut self.received).await?;
        }
        Ok(())
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>, max: usize, into: &mut Vec<Incoming>) -> Option<Poll<Result<()>>> {
        while !self.pass(into) {
            match self.consumer.poll_receive(cx, max, &mut self.received)? {
                Poll::Ready(Ok(())) => {}
                other => return Some(other),
            }
        }
        Some(Poll::Ready(Ok(())))
    }

    fn stop_receiving(&mut self) {
        self.consumer.stop_receiving();
    }

    fn settler(&self) -> Arc<dyn Settler> {
        self.consumer.settler()
    }

    async fn close(&mut self) -> Result<()> {
        let settler = self.consumer.settler();
        self.received.drain(..).for_each(|incoming| settler.release(incoming.token, incoming.message));
        self.consumer.close().await
    }
}

impl<F> fmt::Debug for Sieve<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sieve").field(&self.consumer).finish()
    }
}
