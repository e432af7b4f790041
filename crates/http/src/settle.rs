//! One consumer's share of a route: the requests that wait for its answer.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use polymq_core::{
    Completion, ConsumeOptions, Error, ErrorKind, Incoming, Message, Result, Settler, Tally, Ticket, Token,
};
use tokio::sync::{mpsc, oneshot};

use crate::{NAME, answer::Answer};

/// The requests that were handed to one consumer and are not answered.
pub(crate) struct Share {
    prefetch: usize,
    prefetch_bytes: usize,
    slots: Mutex<Slots>,
    /// Answers that are not written yet.
    unwritten: Tally,
}

struct Slots {
    open: HashMap<u64, Open>,
    /// Of the bodies of all of them.
    bytes: usize,
    next: u64,
    to_consumer: mpsc::UnboundedSender<Incoming>,
    /// The consumer takes nothing more; what it has can be settled.
    closed: bool,
    /// The connection is closed: nothing can be settled.
    ended: bool,
}

/// A request without an answer.
struct Open {
    answer: oneshot::Sender<Told>,
    bytes: usize,
}

/// What a sender is told; the ticket is dropped when it is written.
pub(crate) struct Told {
    pub(crate) answer: Answer,
    pub(crate) ticket: Option<Ticket>,
}

/// A message that was not taken.
pub(crate) struct NotTaken {
    pub(crate) message: Message,
    /// Why, in words.
    pub(crate) why: &'static str,
}

impl Slots {
    fn take(&mut self, token: Token) -> Option<Open> {
        let open = self.open.remove(&token.0)?;
        self.bytes -= open.bytes;
        Some(open)
    }
}

impl Share {
    pub(crate) fn new(options: &ConsumeOptions) -> (Self, mpsc::UnboundedReceiver<Incoming>) {
        let (to_consumer, received) = mpsc::unbounded_channel();
        let slots = Slots { open: HashMap::new(), bytes: 0, next: 0, to_consumer, closed: false, ended: false };
        let (prefetch, prefetch_bytes) = (options.prefetch, options.prefetch_bytes);
        (Self { prefetch, prefetch_bytes, slots: Mutex::new(slots), unwritten: Tally::default() }, received)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a message over; the receiver gives the answer, or ends when there will be none.
    pub(crate) fn offer(&self, message: Message) -> Result<oneshot::Receiver<Told>, Box<NotTaken>> {
        let not_taken = |message, why| Err(Box::new(NotTaken { message, why }));
        let mut slots = self.slots();
        if slots.closed {
            return not_taken(message, "its consumer has ended");
        }
        if slots.open.len() >= self.prefetch || slots.bytes >= self.prefetch_bytes {
            return not_taken(message, "its consumers have as much as they may have");
        }
        let (answer, answered) = oneshot::channel();
        slots.next += 1;
        let token = slots.next;
        let bytes = message.payload().len();
        slots.open.insert(token, Open { answer, bytes });
        slots.bytes += bytes;
        let incoming = Incoming::new(message, Token(token));
        if let Err(refused) = slots.to_consumer.send(incoming) {
            slots.take(Token(token));
            return not_taken(refused.0.message, "its consumer has ended");
        }
        Ok(answered)
    }

    /// Whether the sender still waits; forgets the message otherwise.
    pub(crate) fn is_awaited(&self, token: Token) -> bool {
        let mut slots = self.slots();
        let awaited = slots.open.get(&token.0).is_some_and(|open| !open.answer.is_closed());
        if !awaited {
            slots.take(token);
        }
        awaited
    }

    /// Whether it takes nothing more.
    pub(crate) fn is_closed(&self) -> bool {
        self.slots().closed
    }

    /// Takes nothing more.
    pub(crate) fn close(&self) {
        self.slots().closed = true;
    }

    /// Takes nothing more, and tells every sender that waits to come again.
    pub(crate) fn end(&self) {
        let mut slots = self.slots();
        (slots.closed, slots.ended) = (true, true);
        for (_, open) in slots.open.drain() {
            // Whoever waits no more needs no answer.
            let _ = open.answer.send(Told { answer: Answer::Released, ticket: None });
        }
        slots.bytes = 0;
        // The consumer's receive ends.
        slots.to_consumer = mpsc::unbounded_channel().0;
    }

    /// Waits until what was settled before is written, or can never be.
    pub(crate) async fn flush(&self) {
        self.unwritten.flush().await;
    }

    fn settle(&self, token: Token, answer: Answer) -> Completion<()> {
        let mut slots = self.slots();
        if slots.ended {
            return Completion::ready(Err(Error::closed("settle").with_backend(NAME)));
        }
        let open = slots.take(token);
        drop(slots);
        let told = Told { answer, ticket: Some(self.unwritten.ticket()) };
        let told = open.is_some_and(|open| open.answer.send(told).is_ok());
        Completion::ready(if told { Ok(()) } else { Err(stale()) })
    }
}

impl Settler for Share {
    fn ack(&self, token: Token) -> Completion<()> {
        self.settle(token, Answer::Done)
    }

    fn release(&self, token: Token, _: Message) {
        // Best effort by contract; a sender that is gone keeps its message anyway.
        drop(self.settle(token, Answer::Released));
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        let message = Box::new(message.clone().with_payload(""));
        self.settle(token, Answer::Again { message, attempt, after })
    }

    fn reject(&self, token: Token, reason: &str) -> Completion<()> {
        self.settle(token, Answer::Rejected(reason.to_owned()))
    }

    fn answer(&self, token: Token, answer: &Message) -> Option<Completion<()>> {
        Some(self.settle(token, Answer::Reply(Box::new(answer.clone()))))
    }
}

#[cold]
fn stale() -> Error {
    Error::new(ErrorKind::Stale, "the sender waits for no answer any more; it keeps the message").with_backend(NAME)
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.slots();
        let awaited = slots.open.values().filter(|open| !open.answer.is_closed()).count();
        f.debug_struct("Share")
            .field("prefetch", &self.prefetch)
            .field("unsettled", &slots.open.len())
            .field("awaited", &awaited)
            .finish_non_exhaustive()
    }
}
