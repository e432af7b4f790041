//! The messages that a hub holds, from arrival to settlement.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use polymq_core::{Details, Incoming, Message, Token};
use tokio::sync::Notify;

/// What brought a message, and under which packet id: what its acknowledgement needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Origin {
    pub(crate) lender: u32,
    pub(crate) generation: u32,
    pub(crate) pkid: u16,
}

/// A consumer's place among those of a hub.
#[derive(Debug, Clone)]
pub(crate) struct Seat {
    pub(crate) number: u32,
    /// It may take one more.
    pub(crate) freed: Arc<Notify>,
}

/// Every message is in one place: arrived, delayed or held.
#[derive(Debug, Default)]
pub(crate) struct Stock {
    next_token: u64,
    arrived: VecDeque<Waiting>,
    /// Retries that wait for their time.
    delayed: HashMap<Token, Waiting>,
    /// Handed out and not settled, also by consumers that have left.
    held: HashMap<Token, Held>,
    next_seat: u32,
    shares: BTreeMap<u32, Share>,
    /// Bodies of all that is here.
    bytes: usize,
}

#[derive(Debug)]
struct Waiting {
    origin: Origin,
    incoming: Incoming,
}

impl Waiting {
    fn size(&self) -> usize {
        self.incoming.message.payload().len()
    }
}

#[derive(Debug)]
struct Held {
    origin: Origin,
    /// Whose place it takes; nobody's while a retry waits.
    seat: Option<u32>,
    size: usize,
    /// What it needs besides the message when it is handed out again.
    details: Option<Box<Details>>,
}

/// What one consumer may hold.
#[derive(Debug)]
struct Share {
    prefetch: usize,
    prefetch_bytes: usize,
    held: usize,
    freed: Arc<Notify>,
}

impl Stock {
    /// One more consumer.
    pub(crate) fn join(&mut self, prefetch: usize, prefetch_bytes: usize) -> Seat {
        let number = self.next_seat;
        self.next_seat = self.next_seat.wrapping_add(1);
        let freed = Arc::<Notify>::default();
        let share = Share { prefetch: prefetch.max(1), prefetch_bytes, held: 0, freed: Arc::clone(&freed) };
        self.shares.insert(number, share);
        Seat { number, freed }
    }

    pub(crate) fn leave(&mut self, seat: &Seat) {
        self.shares.remove(&seat.number);
    }

    /// Everybody looks again, whether there is room or not.
    pub(crate) fn wake_all(&self) {
        self.shares.values().for_each(|share| share.freed.notify_one());
    }

    pub(crate) fn consumers(&self) -> usize {
        self.shares.len()
    }

    /// What the consumers together want in flight.
    pub(crate) fn prefetch(&self) -> usize {
        self.shares.values().map(|share| share.prefetch).sum()
    }

    /// Retries that wait for their time. They take no consumer's place, but the broker counts them as lent.
    pub(crate) fn aside(&self) -> usize {
        self.delayed.len() + self.held.values().filter(|held| held.seat.is_none()).count()
    }

    /// Whether more than the consumers asked for is here: the broker has not kept to the receive maximum (mosquitto
    /// after a restart, any under MQTT 3.1.1), or the bodies are large.
    pub(crate) fn is_full(&self) -> bool {
        let limit = self.shares.values().fold(0_usize, |sum, share| sum.saturating_add(share.prefetch_bytes));
        self.arrived.len() > self.prefetch() || self.bytes >= limit.max(1)
    }

    /// How many more messages a consumer may take.
    pub(crate) fn room(&self, seat: &Seat) -> usize {
        self.shares.get(&seat.number).map_or(0, |share| share.prefetch.saturating_sub(share.held))
    }

    /// A message arrived, to be taken at once or when it is [`due`](Self::due).
    pub(crate) fn arrive(&mut self, origin: Origin, mut incoming: Incoming, delayed: bool) -> Token {
        let token = Token(self.next_token);
        self.next_token += 1;
        incoming.token = token;
        self.bytes += incoming.message.payload().len();
        match delayed {
            true => drop(self.delayed.insert(token, Waiting { origin, incoming })),
            false => self.arrived.push_back(Waiting { origin, incoming }),
        }
        token
    }

    /// The time of a delayed message has come.
    pub(crate) fn due(&mut self, token: Token) {
        self.arrived.extend(self.delayed.remove(&token));
    }

    /// Hands out the oldest messages.
    pub(crate) fn take(&mut self, seat: &Seat, max: usize, into: &mut Vec<Incoming>) -> usize {
        let Some(share) = self.shares.get_mut(&seat.number) else { return 0 };
        let count = max.min(share.prefetch.saturating_sub(share.held)).min(self.arrived.len());
        share.held += count;
        for Waiting { origin, incoming } in self.arrived.drain(..count) {
            let held = Held {
                origin,
                seat: Some(seat.number),
                size: incoming.message.payload().len(),
                details: incoming.details.clone(),
            };
            self.held.insert(incoming.token, held);
            into.push(incoming);
        }
        count
    }

    pub(crate) fn has_arrived(&self) -> bool {
        !self.arrived.is_empty()
    }

    /// Where a message that is handed out came from.
    pub(crate) fn origin(&self, token: Token) -> Option<Origin> {
        self.held.get(&token).map(|held| held.origin)
    }

    /// A message is done, or the broker delivers it again. Nothing happens the second time.
    pub(crate) fn settle(&mut self, token: Token) -> Option<Origin> {
        let held = self.held.remove(&token)?;
        self.bytes -= held.size;
        self.free(held.seat);
        Some(held.origin)
    }

    /// A message that is handed out takes no place any more: its retry waits.
    pub(crate) fn set_aside(&mut self, token: Token) {
        let seat = self.held.get_mut(&token).and_then(|held| held.seat.take());
        self.free(seat);
    }

    fn free(&mut self, seat: Option<u32>) {
        let Some(share) = seat.and_then(|seat| self.shares.get_mut(&seat)) else { return };
        if share.held >= share.prefetch {
            share.freed.notify_one();
        }
        share.held -= 1;
    }

    /// To be handed out again, before the others or behind them.
    pub(crate) fn again(&mut self, token: Token, message: Message, attempt: Option<u32>, front: bool) {
        let Some(held) = self.held.remove(&token) else { return };
        self.free(held.seat);
        self.bytes = self.bytes - held.size + message.payload().len();
        let Held { origin, details, .. } = held;
        let mut incoming = Incoming { message, token, details };
        if attempt.is_some() {
            incoming.details_mut().attempt = attempt;
        }
        match front {
            true => self.arrived.push_front(Waiting { origin, incoming }),
            false => self.arrived.push_back(Waiting { origin, incoming }),
        }
    }

    /// Of what is in no consumer's hands, how much the broker waits for.
    pub(crate) fn untaken(&self) -> usize {
        let aside = self.held.values().filter(|held| held.seat.is_none()).map(|held| held.origin);
        let waiting = self.arrived.iter().map(|waiting| waiting.origin).chain(aside);
        waiting.filter(|origin| origin.pkid > 0).count() + self.delayed.len()
    }

    /// Drops what waits and was brought by these connections, retries too: the broker delivers it again.
    pub(crate) fn forget(&mut self, is_gone: impl Fn(u32) -> bool) {
        let bytes = &mut self.bytes;
        let mut keep = |origin: Origin, size: usize| {
            let gone = is_gone(origin.lender);
            *bytes -= if gone { size } else { 0 };
            !gone
        };
        self.arrived.retain(|waiting| keep(waiting.origin, waiting.size()));
        self.delayed.retain(|_, waiting| keep(waiting.origin, waiting.size()));
        // What a consumer holds is its own to settle.
        self.held.retain(|_, held| held.seat.is_some() || keep(held.origin, held.size));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(pkid: u16) -> Origin {
        Origin { lender: 0, generation: 1, pkid }
    }

    fn stock(messages: u16, prefetch: usize, bytes: usize) -> (Stock, Seat) {
        let mut stock = Stock::default();
        let seat = stock.join(prefetch, bytes);
        for pkid in 1..=messages {
            let incoming = Incoming::new(Message::new("0123456789"), Token::default());
            stock.arrive(origin(pkid), incoming, false);
        }
        (stock, seat)
    }

    #[test]
    fn a_place_is_freed_once_however_it_is_settled() {
        let (mut stock, seat) = stock(5, 2, 1000);
        let mut taken = Vec::new();
        assert_eq!((stock.take(&seat, 9, &mut taken), stock.room(&seat)), (2, 0));
        assert_eq!(stock.settle(taken[0].token), Some(origin(1)));
        assert_eq!(stock.settle(taken[0].token), None, "settled before");
        stock.again(taken[0].token, Message::new("x"), None, true);
        assert_eq!(stock.room(&seat), 1);
        stock.set_aside(taken[1].token);
        stock.set_aside(taken[1].token);
        assert_eq!(stock.room(&seat), 2);
        stock.again(taken[1].token, Message::new("x"), Some(2), true);
        assert_eq!((stock.room(&seat), stock.untaken()), (2, 4));
        let mut again = Vec::new();
        stock.take(&seat, 1, &mut again);
        assert_eq!((again[0].token, again[0].attempt()), (taken[1].token, 2));
    }

    #[test]
    fn what_is_here_is_counted_in_messages_and_bytes() {
        let (mut stock, seat) = stock(3, 2, 1000);
        assert!(stock.is_full(), "three arrived, two are wanted");
        let mut taken = Vec::new();
        stock.take(&seat, 1, &mut taken);
        assert!(!stock.is_full());
        let (mut stock, seat) = self::stock(3, 20, 30);
        assert!(stock.is_full(), "thirty bytes");
        stock.take(&seat, 1, &mut taken);
        assert!(stock.is_full(), "handed out is here still");
        stock.settle(taken[1].token);
        assert!(!stock.is_full());
        stock.take(&seat, 1, &mut taken);
        let retry = taken[2].token;
        stock.set_aside(retry);
        assert_eq!((stock.bytes, stock.untaken(), stock.aside()), (20, 2, 1));
        stock.forget(|_| true);
        assert_eq!((stock.bytes, stock.untaken(), stock.aside()), (0, 0, 0));
        stock.again(retry, Message::new("x"), Some(2), false);
        assert_eq!((stock.bytes, stock.has_arrived()), (0, false), "its time comes after its connection has ended");
    }
}
