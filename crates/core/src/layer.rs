//! Layers: what happens around every send and every handling.
//!
//! Layers are given to the [`BusBuilder`](crate::BusBuilder), so the stack is complete before any message
//! moves. Given A, B, C, a send passes A, then B, then C, then the broker; a handling passes C, then B, then A,
//! then the handler: what was done last on the way out is undone first on the way in, so that layers nest. Each
//! layer sees the answer of those that it called.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use crate::{Address, Message, Outcome, Receipt, Result};

/// Something around sending and handling: signing, compression, timing, deduplication.
///
/// A layer that changes messages on the way out (compresses, signs) changes them back on the way in; the order
/// described in [the module](self) makes such layers nest.
#[async_trait]
pub trait Layer: Send + Sync + fmt::Debug + 'static {
    /// Around a send. Call `next.send(message)` once to go on; an error without calling it refuses the message.
    async fn send(&self, message: Message, next: NextSend<'_>) -> Result<Receipt> {
        next.send(message).await
    }

    /// Around a handling. The message may be changed for the handler; the one that is retried or dead-lettered
    /// stays as it was received. Dropping the future (time-out, forced stop) cancels what is inside.
    async fn handle(&self, message: Message, next: NextHandle<'_>) -> Outcome {
        next.handle(message).await
    }
}

pub(crate) type Layers = Arc<[Arc<dyn Layer>]>;
type LastSend<'a> = &'a (dyn Fn(Message) -> BoxFuture<'a, Result<Receipt>> + Sync);
type LastHandle<'a> = &'a (dyn Fn(Message) -> BoxFuture<'a, Outcome> + Sync);

/// The layers inside this one, and the broker behind them.
#[derive(Clone, Copy)]
pub struct NextSend<'a> {
    pub(crate) address: &'a Address,
    pub(crate) layers: &'a [Arc<dyn Layer>],
    pub(crate) last: LastSend<'a>,
}

impl<'a> NextSend<'a> {
    /// Where the message goes.
    #[must_use]
    pub fn address(&self) -> &'a Address {
        self.address
    }

    /// Goes on.
    ///
    /// # Errors
    /// Those of the layers inside and of the broker.
    pub async fn send(self, message: Message) -> Result<Receipt> {
        match self.layers.split_first() {
            Some((layer, inner)) => layer.send(message, Self { layers: inner, ..self }).await,
            None => (self.last)(message).await,
        }
    }
}

impl fmt::Debug for NextSend<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NextSend").field("address", self.address).field("layers", &self.layers).finish_non_exhaustive()
    }
}

/// The layers inside this one, and the handler behind them.
#[derive(Clone, Copy)]
pub struct NextHandle<'a> {
    pub(crate) address: &'a Address,
    pub(crate) channel: &'a str,
    pub(crate) group: Option<&'a str>,
    pub(crate) subscription: u64,
    pub(crate) attempt: u32,
    pub(crate) layers: &'a [Arc<dyn Layer>],
    pub(crate) last: LastHandle<'a>,
}

impl<'a> NextHandle<'a> {
    /// Where the message comes from.
    #[must_use]
    pub fn address(&self) -> &'a Address {
        self.address
    }

    /// The concrete name of the channel: with wildcards, the name that was sent to.
    #[must_use]
    pub fn channel(&self) -> &'a str {
        self.channel
    }

    /// The group of the topic, if it is consumed by one.
    #[must_use]
    pub fn group(&self) -> Option<&'a str> {
        self.group
    }

    /// The number of the subscription in this process, which it keeps while it lives: it tells those of a topic without a
    /// group apart, of which each has the message. 0 for a reply.
    #[must_use]
    pub fn subscription(&self) -> u64 {
        self.subscription
    }

    /// The number of this attempt, 1-based.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Goes on.
    pub async fn handle(self, message: Message) -> Outcome {
        match self.layers.split_last() {
            Some((layer, inner)) => layer.handle(message, Self { layers: inner, ..self }).await,
            None => (self.last)(message).await,
        }
    }
}

impl fmt::Debug for NextHandle<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NextHandle")
            .field("address", self.address)
            .field("layers", &self.layers)
            .finish_non_exhaustive()
    }
}
