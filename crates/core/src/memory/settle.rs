use std::{
    fmt, iter,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::Waker,
    time::Duration,
};

use super::{NAME, channel::Channel, queue::Ticket, space::lock};
use crate::{Completion, ConsumeOptions, Error, ErrorKind, Message, Result, Settler, Token};

/// A consumer's share of its queue: what it has in flight, who to wake, and how deliveries are settled.
///
/// Counts and flags are one atomic word, so that an acknowledgement is one atomic subtraction: from the top, three
/// flags, 21 bits of messages, 40 bits of size.
pub(super) struct Share {
    word: AtomicU64,
    max_messages: usize,
    max_size: u64,
    waker: Mutex<Option<Waker>>,
    channel: Arc<Channel>,
    queue: u64,
}

/// The consumer waits until something is settled.
const WANTS_ROOM: u64 = 1 << 63;
/// The connection is closed.
const CLOSED: u64 = 1 << 62;
/// The queue is deleted.
const DELETED: u64 = 1 << 61;
const MESSAGE: u64 = 1 << 40;
const SIZES: u64 = MESSAGE - 1;
const MAX_IN_FLIGHT: usize = 1 << 20;

/// How much more a consumer may be given.
pub(super) struct Room {
    pub(super) messages: usize,
    pub(super) size: u64,
    /// Nothing is in flight: one message goes out whatever its size.
    pub(super) is_whole: bool,
}

impl Share {
    pub(super) fn new(channel: Arc<Channel>, queue: u64, options: &ConsumeOptions) -> Self {
        Self {
            word: AtomicU64::new(0),
            max_messages: options.prefetch.clamp(1, MAX_IN_FLIGHT),
            max_size: (options.prefetch_bytes as u64 / 64).min(SIZES / 2),
            waker: Mutex::default(),
            channel,
            queue,
        }
    }

    pub(super) fn queue(&self) -> u64 {
        self.queue
    }

    pub(super) fn channel(&self) -> &Channel {
        &self.channel
    }

    pub(super) fn unsettled(&self) -> u64 {
        messages(self.word.load(Ordering::Acquire)) as u64
    }

    pub(super) fn room(&self) -> Room {
        let word = self.word.load(Ordering::Acquire);
        let in_flight = messages(word);
        Room {
            messages: self.max_messages.saturating_sub(in_flight),
            size: self.max_size.saturating_sub(word & SIZES),
            is_whole: in_flight == 0,
        }
    }

    pub(super) fn charge(&self, count: usize, size: u64) {
        self.word.fetch_add(count as u64 * MESSAGE + size, Ordering::AcqRel);
    }

    /// What ends this consumer, if anything has.
    pub(super) fn check(&self) -> Result<()> {
        match self.word.load(Ordering::Acquire) & (CLOSED | DELETED) {
            0 => Ok(()),
            DELETED => Err(self.channel.missing("receive")),
            _ => Err(self.channel.closed("receive")),
        }
    }

    pub(super) fn close(&self) {
        self.end(CLOSED);
    }

    pub(super) fn delete(&self) {
        self.end(DELETED);
    }

    fn end(&self, flag: u64) {
        self.word.fetch_or(flag, Ordering::AcqRel);
        self.wake();
    }

    pub(super) fn set_waker(&self, waker: &Waker) {
        match &mut *lock(&self.waker) {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    pub(super) fn wake(&self) {
        let waker = lock(&self.waker).take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Asks to be woken at the next settlement; `false` when something has changed since `seen`.
    pub(super) fn wait_for_room(&self, seen: &Room, waker: &Waker) -> bool {
        self.set_waker(waker);
        self.word.fetch_or(WANTS_ROOM, Ordering::AcqRel);
        let now = self.room();
        now.messages == seen.messages && now.size == seen.size && self.check().is_ok()
    }

    fn settle(&self, tokens: &[Token]) -> Result<()> {
        if self.word.load(Ordering::Acquire) & CLOSED != 0 {
            return Err(self.channel.closed("settle"));
        }
        self.discharge(tokens.iter().map(|token| Ticket::from(*token)));
        Ok(())
    }

    fn discharge(&self, tickets: impl Iterator<Item = Ticket>) {
        let (count, charge) = tickets.fold((0, 0), |(count, sum), ticket| (count + 1, sum + MESSAGE + ticket.size()));
        let before = self.word.fetch_sub(charge, Ordering::AcqRel);
        debug_assert!(messages(before) >= count, "a delivery was settled twice");
        if before & WANTS_ROOM != 0 {
            self.word.fetch_and(!WANTS_ROOM, Ordering::AcqRel);
            self.wake();
        }
    }
}

fn messages(word: u64) -> usize {
    (word >> 40) as usize & (2 * MAX_IN_FLIGHT - 1)
}

impl Settler for Share {
    fn ack(&self, token: Token) -> Completion<()> {
        Completion::ready(self.settle(&[token]))
    }

    fn ack_many(&self, tokens: &[Token]) -> Completion<()> {
        Completion::ready(self.settle(tokens))
    }

    fn release(&self, token: Token, message: Message) {
        // Also after the connection was closed: nobody else has the message.
        let ticket = Ticket::from(token);
        // What was not tried, or was cancelled, has not failed: the attempt stays the same, and so does its place.
        self.channel.give_back(self.queue, message, ticket, None, Duration::ZERO);
        self.discharge(iter::once(ticket));
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if self.word.load(Ordering::Acquire) & CLOSED != 0 {
            return Completion::ready(Err(self.channel.closed("settle")));
        }
        let ticket = Ticket::from(token);
        if !self.channel.give_back(self.queue, message.clone(), ticket, Some(attempt), after) {
            // The delivery has ended with its queue. It is released next, which settles the ticket.
            return Completion::ready(Err(Error::new(
                ErrorKind::Stale,
                "its queue was deleted, and the message with it",
            )));
        }
        self.discharge(iter::once(ticket));
        Completion::ready(Ok(()))
    }

    fn extend(&self, _token: Token, _by: Duration) -> Completion<()> {
        let error = Error::unsupported(NAME, "lease extension, a delivery is held without a lease");
        Completion::ready(Err(error.with_channel(self.channel.address().name())))
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Share")
            .field("channel", self.channel.address())
            .field("queue", &self.queue)
            .field("unsettled", &self.unsettled())
            .finish_non_exhaustive()
    }
}
