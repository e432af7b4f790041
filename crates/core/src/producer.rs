//! What a backend implements to send.

use std::{fmt, time::Duration};

use async_trait::async_trait;

use crate::{Completion, Error, Message, MessageId, Outgoing, Result};

/// Proof that the broker has accepted responsibility for a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// The id under which the message travels.
    pub id: MessageId,
    /// The broker's own identifier or position, where it gives one.
    pub broker_id: Option<Box<str>>,
}

/// The backend's side of sending to one channel. Users hold a [`Channel`](crate::Channel).
///
/// The handle has checked the message (headers, size, capabilities) and given it an id and a time before.
#[async_trait]
pub trait Producer: Send + Sync + fmt::Debug + 'static {
    /// Hands one message over; the completion answers when the broker has accepted responsibility
    /// (publisher confirm, PUBACK, delivery report, 2xx).
    ///
    /// Must not block, and must keep the order of calls on the wire. May be called from many tasks. While the
    /// connection is down the message waits; the handle bounds the wait and withdraws it with
    /// [`Completion::withdraw`], which a backend honours by [`Completer::hand_over`](crate::Completer::hand_over).
    /// A message must never be written twice unless it is certain that the first one had no effect: a
    /// connection lost after writing is [`ErrorKind::UnknownOutcome`](crate::ErrorKind::UnknownOutcome).
    fn send(&self, message: Message) -> Completion<Receipt>;

    /// Takes from the front of `messages` those whose answer is at hand when they are handed over together, and appends
    /// their receipts in their order. What it leaves is handed to [`send`](Self::send) one by one. For backends that do
    /// something once for many messages; the others take none.
    fn send_many(&self, messages: &mut Outgoing, receipts: &mut Vec<Result<Receipt>>) {
        let _ = (messages, receipts);
    }

    /// How many messages are best handed to [`send_many`](Self::send_many) at once; 1 where it takes none.
    fn at_once(&self) -> usize {
        1
    }

    /// How many of the oldest answers are best waited for together when `window` messages have none, by one who sends many:
    /// where a thread brings many answers at a time, waking the sender for the first of them costs more than a send. 1 where
    /// a place is best taken again as soon as it is free.
    fn answered_together(&self, window: usize) -> usize {
        let _ = window;
        1
    }

    /// Sends a request whose answer comes back on the same exchange, where the protocol has one
    /// ([`Capabilities::direct`](crate::Capabilities)); elsewhere it is never called.
    fn request(&self, message: Message) -> Completion<Message> {
        drop(message);
        Completion::ready(Err(Error::unsupported("this", "a request that is answered on the same exchange")))
    }

    /// Waits until everything handed over before has been answered.
    ///
    /// # Errors
    /// Only when that cannot happen any more; the outcome of each message is in its own completion.
    async fn flush(&self) -> Result<()>;

    /// Flushes, then releases what the producer holds. A second call does nothing; `send` afterwards answers
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed).
    async fn close(&self) -> Result<()>;
}

/// How a channel is produced to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProduceOptions {
    /// The most unconfirmed messages at a time. Small wastes round trips, large costs memory when the broker stalls.
    pub window: usize,
    /// How long one send may take, waiting for a lost connection included.
    pub timeout: Duration,
    /// Creates the channel (and what holds its messages) when it does not exist; otherwise a missing
    /// channel is an error.
    pub declare: bool,
    /// The queue is somebody's for a while, such as where a reply is awaited ([`ConsumeOptions::temporary`](crate::ConsumeOptions)):
    /// it is neither made nor looked for, and what cannot be delivered is answered as the broker does it.
    pub temporary: bool,
    /// Settings that only one backend knows (`qos`, `retain`, `exchange`), checked by it.
    pub extra: Vec<(String, String)>,
}

impl Default for ProduceOptions {
    fn default() -> Self {
        Self { window: 256, timeout: Duration::from_secs(30), declare: true, temporary: false, extra: Vec::new() }
    }
}
