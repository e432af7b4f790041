use std::{
    collections::{BTreeMap, VecDeque},
    fmt, iter, mem,
    sync::{Arc, Weak},
    task::Waker,
};

use tokio::time::Instant;

use super::{after::After, config::Limits, settle::Share, state::receipt};
use crate::{Details, Incoming, Message, Receipt, Result, Token};

/// Place in the queue, attempt and size of a message in one word: it is the token of a delivery too, so that
/// settling needs no table of what is in flight.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket(u64);

/// Sizes are counted in units of so many bytes.
pub(super) const UNIT: u64 = 64;
const SIZE_BITS: u32 = 20;
const ATTEMPT_BITS: u32 = 12;
const MAX_SIZE: u64 = (1 << SIZE_BITS) - 1;
const MAX_ATTEMPT: u32 = (1 << ATTEMPT_BITS) - 1;

impl Ticket {
    /// The size of a message; one of more than 64 MiB counts as 64 MiB.
    #[inline]
    pub(super) fn size_of(message: &Message) -> u64 {
        units(message.size())
    }

    fn new(place: u32, attempt: u32, size: u64) -> Self {
        let attempt = u64::from(attempt.min(MAX_ATTEMPT));
        Self(u64::from(place) << 32 | attempt << SIZE_BITS | size)
    }

    /// Grows with each message sent, and wraps.
    fn place(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(super) fn attempt(self) -> u32 {
        (self.0 >> SIZE_BITS) as u32 & MAX_ATTEMPT
    }

    pub(super) fn size(self) -> u64 {
        self.0 & MAX_SIZE
    }

    fn is_before(self, other: Self) -> bool {
        (self.place().wrapping_sub(other.place()) as i32) < 0
    }
}

fn units(bytes: usize) -> u64 {
    (bytes as u64).div_ceil(UNIT).min(MAX_SIZE)
}

impl From<Token> for Ticket {
    fn from(token: Token) -> Self {
        Self(token.0)
    }
}

/// What waits is kept as it is handed out, so that handing out is a plain move. This one was handed out before.
fn redelivery(message: Message, ticket: Ticket) -> Incoming {
    let details = Details { attempt: Some(ticket.attempt()), redelivered: true, ..Details::default() };
    Incoming { details: Some(Box::new(details)), ..Incoming::new(message, Token(ticket.0)) }
}

fn ticket(entry: &Incoming) -> Ticket {
    Ticket(entry.token.0)
}

/// The messages of a queue, or of one group of a topic, and who waits for them. Lives under its channel's lock.
pub(super) struct Queue {
    pub(super) id: u64,
    /// The group of a topic; `None` for a queue and for a subscription that ends with its consumer.
    pub(super) group: Option<Box<str>>,
    /// In the order of their places: what came back is before what was never handed out.
    ready: VecDeque<Incoming>,
    /// Not due yet; the number tells messages of one instant apart.
    delayed: BTreeMap<(Instant, u64), Incoming>,
    delays: u64,
    size: u64,
    next_place: u32,
    waiting: VecDeque<Arc<Share>>,
    /// Taken off `waiting` and not seen since.
    woken: usize,
    shares: Vec<Weak<Share>>,
    pub(super) consumers: u64,
    limits: Limits,
}

impl Queue {
    pub(super) fn new(id: u64, group: Option<&str>, limits: Limits) -> Self {
        Self {
            id,
            group: group.map(Into::into),
            ready: VecDeque::new(),
            delayed: BTreeMap::new(),
            delays: 0,
            size: 0,
            next_place: 0,
            waiting: VecDeque::new(),
            woken: 0,
            shares: Vec::new(),
            consumers: 0,
            limits,
        }
    }

    /// How many messages wait, delayed ones included.
    pub(super) fn len(&self) -> usize {
        self.ready.len() + self.delayed.len()
    }

    /// Copies of those that wait to be handed out, in their order.
    pub(super) fn peek(&self, max: usize) -> Vec<Message> {
        self.ready.iter().take(max).map(|entry| entry.message.clone()).collect()
    }

    /// How many messages are delivered and not settled.
    pub(super) fn unsettled(&self) -> u64 {
        self.shares.iter().filter_map(Weak::upgrade).map(|share| share.unsettled()).sum()
    }

    /// Whether a message of this size may be added. An empty queue takes any, or a large one would wait for ever.
    #[inline]
    pub(super) fn fits(&self, size: u64) -> bool {
        let len = self.len();
        len == 0 || (len < self.limits.messages && self.size + size <= self.limits.size)
    }

    /// The token of the next message that is sent, which takes up this size from now on.
    #[inline]
    fn next_token(&mut self, size: u64, attempt: u32) -> Token {
        let ticket = Ticket::new(self.next_place, attempt, size);
        self.next_place = self.next_place.wrapping_add(1);
        self.size += size;
        Token(ticket.0)
    }

    /// Adds a message that was sent; gives back who is to be woken.
    #[inline(always)] // A call would move the message once more.
    pub(super) fn push(&mut self, message: Message, size: u64) -> Option<Arc<Share>> {
        let token = self.next_token(size, message.header_attempt());
        // Extended, not pushed: there is room before the entry is made, and it is made where it stays.
        self.ready.extend(iter::once(message).map(|message| Incoming::new(message, token)));
        let first = self.waiting.pop_front()?;
        self.woken += 1;
        Some(first)
    }

    /// Adds the first of these, up to one for later or one that there is no room for.
    pub(super) fn push_many(
        &mut self,
        entries: &mut VecDeque<Incoming>,
        receipts: &mut Vec<Result<Receipt>>,
        after: &mut After,
    ) {
        let room = self.limits.messages.saturating_sub(self.len());
        let mut count = 0;
        let known = entries.make_contiguous();
        for entry in known.iter_mut().take(room) {
            let size = Ticket::size_of(&entry.message);
            let fits = self.size + size <= self.limits.size || (count == 0 && self.len() == 0);
            if !fits || entry.message.deliver_at().is_some() {
                break;
            }
            entry.token = self.next_token(size, entry.message.header_attempt());
            count += 1;
        }
        // Not in the same turn: each receipt would be made elsewhere and copied.
        receipts.extend(known.iter().take(count).map(|entry| Ok(receipt(&entry.message))));
        if count == entries.len() && self.ready.is_empty() {
            mem::swap(&mut self.ready, entries);
        } else if count == entries.len() {
            self.ready.append(entries);
        } else {
            self.ready.extend(entries.drain(..count));
        }
        for _ in 0..count.min(self.waiting.len()) {
            self.wake_one(after);
        }
    }

    /// The same, now or when it is due.
    pub(super) fn push_at(&mut self, message: Message, size: u64, due: Option<Instant>, after: &mut After) {
        match due {
            None => {
                self.push(message, size).into_iter().for_each(|share| after.wake(share));
            }
            Some(due) => {
                self.size += size;
                let entry = Incoming::new(message, Token(Ticket::new(0, 0, size).0));
                self.delay(entry, due, after);
            }
        }
    }

    /// Puts a delivered message back: to its place, or behind the others, now or later, with the attempt it is given.
    pub(super) fn give_back(
        &mut self,
        message: Message,
        old: Ticket,
        attempt: Option<u32>,
        due: Option<Instant>,
        after: &mut After,
    ) {
        let ticket = match attempt {
            None => old,
            Some(attempt) => Ticket::new(Ticket::from(self.next_token(0, 1)).place(), attempt.max(1), old.size()),
        };
        let entry = redelivery(message, ticket);
        self.size += old.size();
        match due {
            Some(due) => self.delay(entry, due, after),
            None => {
                self.insert(entry);
                self.wake_one(after);
            }
        }
    }

    fn insert(&mut self, entry: Incoming) {
        let at = self.ready.partition_point(|known| ticket(known).is_before(ticket(&entry)));
        self.ready.insert(at, entry);
    }

    fn delay(&mut self, entry: Incoming, due: Instant, after: &mut After) {
        let first = self.delayed.first_key_value().is_none_or(|((first, _), _)| due < *first);
        self.delays += 1;
        self.delayed.insert((due, self.delays), entry);
        if first {
            // Each consumer that waits has a timer for what was first until now.
            self.woken += self.waiting.len();
            self.waiting.drain(..).for_each(|share| after.wake(share));
        }
    }

    /// Makes ready what is due; tells when the next one is.
    fn promote(&mut self) -> Option<Instant> {
        if self.delayed.is_empty() {
            return None;
        }
        let now = Instant::now();
        while let Some(first) = self.delayed.first_entry() {
            if first.key().0 > now {
                return Some(first.key().0);
            }
            let entry = first.remove();
            match entry.details {
                // Sent for later: its place is where it would be if it were sent now.
                None => {
                    let size = ticket(&entry).size();
                    self.size -= size;
                    let token = self.next_token(size, entry.message.header_attempt());
                    self.ready.push_back(Incoming { token, ..entry });
                }
                Some(_) => self.insert(entry),
            }
        }
        None
    }

    /// Moves up to `max` messages to a consumer, within its prefetch. When there is none, it waits, and is told
    /// when the next delayed message is due.
    pub(super) fn take(
        &mut self,
        max: usize,
        share: &Arc<Share>,
        into: &mut Vec<Incoming>,
        waker: &Waker,
        waits: bool,
    ) -> Taken {
        let due = self.promote();
        let listed = waits && self.unlist(share);
        // Who else has nothing to do gets a part of a batch.
        let idle = self.waiting.len() + self.woken;
        let fair = if idle == 0 { max } else { max.min(self.ready.len().div_ceil(idle + 1)) };
        let room = share.room();
        let most = fair.min(room.messages);
        if self.ready.len() <= most && self.delayed.is_empty() && self.size <= room.size && !self.ready.is_empty() {
            share.charge(self.ready.len(), std::mem::take(&mut self.size));
            self.move_all(into);
            return Taken::Some;
        }
        let (mut count, mut size) = (0, 0);
        for entry in self.ready.iter().take(most) {
            let next = size + ticket(entry).size();
            if next > room.size && !(count == 0 && room.is_whole) {
                break;
            }
            count += 1;
            size = next;
        }
        if count > 0 {
            match count {
                1 => into.extend(self.ready.pop_front()),
                _ => into.extend(self.ready.drain(..count)),
            }
            share.charge(count, size);
            self.size -= size;
            return Taken::Some;
        }
        if !self.ready.is_empty() {
            return Taken::NoRoom;
        }
        if self.ready.capacity() == 0 && into.is_empty() {
            // Who waits leaves its memory to what comes: one buffer less that the processor's cache has to hold.
            self.ready = std::mem::take(into).into();
        }
        share.set_waker(waker);
        if waits && !listed {
            // Woken for a message that another consumer has taken: its turn is still next.
            self.waiting.push_front(Arc::clone(share));
        } else {
            self.waiting.push_back(Arc::clone(share));
        }
        Taken::Nothing { due }
    }

    /// Hands out everything that is ready; exchanges the buffers instead of moving messages where it can.
    fn move_all(&mut self, into: &mut Vec<Incoming>) {
        let len = self.ready.len();
        if len == 1 {
            into.extend(self.ready.pop_front());
        } else if into.is_empty() && self.ready.capacity() <= 2 * into.capacity().max(len) {
            let empty = std::mem::take(into);
            *into = std::mem::replace(&mut self.ready, empty.into()).into();
        } else {
            into.extend(self.ready.drain(..));
        }
    }

    /// Takes a consumer that waited off the list; `false` when a wake-up has done so before.
    #[inline]
    fn unlist(&mut self, share: &Arc<Share>) -> bool {
        if self.waiting.is_empty() {
            self.woken = self.woken.saturating_sub(1);
            return false;
        }
        match self.waiting.iter().position(|waiting| Arc::ptr_eq(waiting, share)) {
            Some(at) => self.waiting.remove(at).is_some(),
            None => {
                self.woken = self.woken.saturating_sub(1);
                false
            }
        }
    }

    /// The consumer waits no more; a wake-up that it had goes to another.
    pub(super) fn stop_waiting(&mut self, share: &Arc<Share>, after: &mut After) {
        if !self.unlist(share) && !self.ready.is_empty() {
            self.wake_one(after);
        }
    }

    fn wake_one(&mut self, after: &mut After) {
        if let Some(share) = self.waiting.pop_front() {
            self.woken += 1;
            after.wake(share);
        }
    }

    /// Wakes another consumer while messages are left.
    pub(super) fn pass_on(&mut self, after: &mut After) {
        if !self.ready.is_empty() && !self.waiting.is_empty() {
            self.wake_one(after);
        }
    }

    pub(super) fn attach(&mut self, share: &Arc<Share>) {
        self.shares.retain(|known| known.strong_count() > 0);
        self.shares.push(Arc::downgrade(share));
        self.consumers += 1;
    }

    /// Every consumer, for when the queue is deleted.
    pub(super) fn shares(&self) -> impl Iterator<Item = Arc<Share>> {
        self.shares.iter().filter_map(Weak::upgrade)
    }

    /// Empties the queue.
    pub(super) fn purge(&mut self, after: &mut After) -> u64 {
        let count = self.len() as u64;
        self.size = 0;
        let delayed = std::mem::take(&mut self.delayed).into_values();
        after.discard(std::mem::take(&mut self.ready).into_iter().chain(delayed).map(|entry| entry.message));
        count
    }
}

/// What [`Queue::take`] has done.
pub(super) enum Taken {
    Some,
    /// Messages wait that the consumer's prefetch does not allow.
    NoRoom,
    /// The consumer is on the list of those who wait.
    Nothing {
        due: Option<Instant>,
    },
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue")
            .field("id", &self.id)
            .field("group", &self.group)
            .field("ready", &self.ready.len())
            .field("delayed", &self.delayed.len())
            .field("consumers", &self.consumers)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_holds_place_attempt_and_size() {
        let ticket = Ticket::new(u32::MAX, 7, units(100_000));
        assert_eq!((ticket.place(), ticket.attempt(), ticket.size()), (u32::MAX, 7, 1563));
        assert_eq!(Ticket::new(0, u32::MAX, 0).attempt(), 4095);
        assert_eq!(units(usize::MAX), MAX_SIZE);
        assert_eq!(Ticket::new(1, 1, units(usize::MAX)).attempt(), 1);
    }

    #[test]
    fn places_wrap() {
        let (old, new) = (Ticket::new(u32::MAX, 1, 0), Ticket::new(0, 1, 0));
        assert!(old.is_before(new) && !new.is_before(old) && !old.is_before(old));
    }
}
