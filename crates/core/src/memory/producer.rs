use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;

use super::{NAME, channel::Channel, connection::Link, queue::Ticket, state::receipt};
use crate::{Completion, Error, ErrorKind, Message, MessageId, Outgoing, Producer, Receipt, Result};

/// As many as a call sends before it lets others run: an empty queue takes them as they are, without moving any.
const CHUNK: usize = 128;

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

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.link.is_closed()
    }

    #[cold]
    #[inline(never)]
    fn send_unnamed(&self, message: Message) -> Completion<Receipt> {
        Producer::send(self, message.with_id(MessageId::new()))
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
    fn send(&self, message: Message) -> Completion<Receipt> {
        if self.is_closed() {
            return Completion::ready(Err(self.channel.closed("send")));
        }
        if message.payload().len() > self.max_payload {
            return Completion::ready(Err(self.too_large(message.payload().len())));
        }
        if message.id().is_none() {
            return self.send_unnamed(message);
        }
        let size = Ticket::size_of(&message);
        let mut channel = self.channel.lock(size, message.deliver_at().is_none());
        let Some(queue) = channel.queue() else { return self.channel.send(channel, message, size, self.link.id()) };
        // Written out here because each function on the way moves the message once more.
        let receipt = receipt(&message);
        let waiting = queue.push(message, size);
        drop(channel);
        if let Some(waiting) = waiting {
            waiting.wake();
        }
        Completion::ready(Ok(receipt))
    }

    fn send_many(&self, messages: &mut Outgoing, receipts: &mut Vec<Result<Receipt>>) {
        if !self.is_closed() {
            self.channel.send_many(messages, receipts);
        }
    }

    fn at_once(&self) -> usize {
        CHUNK
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
