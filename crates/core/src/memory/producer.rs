use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;

use super::{NAME, channel::Channel, connection::Link};
use crate::{Completion, Error, ErrorKind, Message, MessageId, Producer, Receipt, Result};

pub(super) struct MemoryProducer {
    channel: Arc<Channel>,
    link: Arc<Link>,
    closed: AtomicBool,
    max_payload: usize,
}

impl MemoryProducer {
    pub(super) fn new(channel: Arc<Channel>, link: Arc<Link>, max_payload: usize) -> Self {
        Self { channel, link, closed: AtomicBool::new(false), max_payload }
    }

    #[cold]
    fn too_large(&self, bytes: usize) -> Error {
        Error::new(ErrorKind::TooLarge, format!("body of {bytes} bytes, at most {} are allowed", self.max_payload))
            .with_backend(NAME)
            .with_operation("send")
            .with_channel(self.channel.address().name())
            .with_hint("raise max_payload or send less")
    }
}

#[async_trait]
impl Producer for MemoryProducer {
    fn send(&self, mut message: Message) -> Completion<Receipt> {
        if self.closed.load(Ordering::Acquire) || self.link.is_closed() {
            return Completion::ready(Err(self.channel.closed("send")));
        }
        if message.payload().len() > self.max_payload {
            return Completion::ready(Err(self.too_large(message.payload().len())));
        }
        if message.id().is_none() {
            message = message.with_id(MessageId::new());
        }
        self.channel.send(message, self.link.id())
    }

    async fn flush(&self) -> Result<()> {
        match self.channel.flush(self.link.id()) {
            None => Ok(()),
            Some(flushed) => flushed.await.map_err(|_| self.channel.closed("flush")),
        }
    }

    async fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) { Ok(()) } else { self.flush().await }
    }
}

impl fmt::Debug for MemoryProducer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("MemoryProducer").field(&self.channel).finish()
    }
}
