//! Where the messages of one channel meet its consumers inside a process.
//!
//! All consumers of a queue (or of a topic's group) on one connection share what arrives, whichever session brought
//! it. [`keeper`](crate::keeper) decides which sessions these are.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use polymq_core::{ConsumeOptions, Error, Incoming, Message, Result, Token};
use rumqttc::v5::mqttbytes::v5::Publish;
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep},
};

use crate::{
    convert,
    lender::Lender,
    lends::Lends,
    link::Link,
    stock::{Origin, Seat, Stock},
};

/// What arrives and who takes it.
#[derive(Debug)]
pub(crate) struct Hub {
    /// The name that consumers asked for.
    pub(crate) name: Arc<str>,
    state: Mutex<State>,
    /// One message or more are at hand, or the hub has failed.
    ready: Notify,
    /// Something that the keeper waits for has changed.
    pub(crate) changed: Notify,
    /// Since when more may be read; `None` while enough is here.
    room: watch::Sender<Option<Instant>>,
}

#[derive(Debug, Default)]
struct State {
    stock: Stock,
    lenders: BTreeMap<u32, Lender>,
    next_lender: u32,
    /// Those that read although there is no room, to see whether their connection is still there.
    looking: BTreeSet<u32>,
    failed: Option<(polymq_core::ErrorKind, String)>,
    /// No consumer may join any more.
    closed: bool,
}

impl Hub {
    /// A hub and its first consumer.
    pub(crate) fn with_consumer(name: Arc<str>, options: &ConsumeOptions) -> (Arc<Self>, Seat) {
        let mut stock = Stock::default();
        let seat = stock.join(options.prefetch, options.prefetch_bytes);
        let hub = Self {
            name,
            state: Mutex::new(State { stock, ..State::default() }),
            ready: Notify::new(),
            changed: Notify::new(),
            room: watch::Sender::new(Some(Instant::now())),
        };
        (Arc::new(hub), seat)
    }

    /// A connection that will bring messages.
    pub(crate) fn add_lender(self: &Arc<Self>, sibling: Option<watch::Receiver<u32>>) -> (u32, Lends) {
        let mut state = self.lock();
        let number = state.next_lender;
        // One a minute: they last for eight thousand years.
        state.next_lender = state.next_lender.wrapping_add(1);
        state.lenders.insert(number, Lender::new());
        (number, Lends::new(self, number, 0, sibling))
    }

    /// Another link for the same connection; with the generation after which it counts.
    pub(crate) fn hand_over(
        self: &Arc<Self>,
        number: u32,
        sibling: Option<watch::Receiver<u32>>,
    ) -> Option<(Lends, u32)> {
        let mut state = self.lock();
        let lender = state.lenders.get_mut(&number)?;
        let after = lender.hand_over()?;
        Some((Lends::new(self, number, lender.serial, sibling), after))
    }

    pub(crate) fn attach(&self, lender: u32, link: Link) {
        if let Some(lender) = self.lock().lenders.get_mut(&lender) {
            lender.link = Some(link);
        }
    }

    /// A connection says goodbye next. What was acknowledged before that is written first; from now on its deliveries are
    /// stale, since the broker delivers them again.
    pub(crate) fn retire(&self, number: u32) {
        let mut state = self.lock();
        let Some(lender) = state.lenders.get_mut(&number) else { return };
        lender.lost();
        // A reconnect in between does not count.
        lender.serial += 1;
        self.forget(&mut state, number);
    }

    /// Forgets a connection and what it brought and nobody took.
    pub(crate) fn remove_lender(&self, number: u32) {
        let mut state = self.lock();
        state.lenders.remove(&number);
        self.forget(&mut state, number);
    }

    /// When nothing of this connection is unsettled: since when nothing came, although it was read.
    pub(crate) fn quiet_since(&self, lender: u32) -> Option<Instant> {
        let state = self.lock();
        let read_since = (*self.room.borrow())?;
        state
            .lenders
            .get(&lender)
            .filter(|lender| lender.lent() == 0 && lender.generation > 0)
            .map(|lender| lender.last.max(read_since))
    }

    /// Forgets every connection; they end when nobody else holds them.
    pub(crate) fn clear(&self) {
        let mut state = self.lock();
        let lenders = std::mem::take(&mut state.lenders);
        state.looking.clear();
        state.stock.forget(|_| true);
        drop(state);
        drop(lenders);
    }

    /// Closes the hub when it has failed, or when no consumer is left and none holds anything; what nobody took does
    /// not count, nor a retry that waits: the broker delivers both to someone else.
    pub(crate) fn close_if_done(&self) -> bool {
        let mut state = self.lock();
        let lent = state.lenders.values().map(Lender::lent).sum::<usize>();
        let nobody = state.stock.consumers() == 0;
        state.closed |= state.failed.is_some() || (nobody && lent <= state.stock.untaken());
        state.closed
    }

    /// Stops taking messages from a connection of which nothing is in flight, so that it can be closed without
    /// delivering anything twice.
    pub(crate) fn suspend_if_empty(&self, lender: u32) -> bool {
        match self.lock().lenders.get_mut(&lender) {
            Some(lender) if lender.lent() == 0 && lender.generation > 0 => {
                lender.generation = 0;
                true
            }
            _ => false,
        }
    }

    /// Whether what is sent now arrives.
    pub(crate) fn is_subscribed(&self) -> bool {
        let state = self.lock();
        state.looking.is_empty() && state.lenders.values().any(|lender| lender.subscribed)
    }

    /// Has connections that nothing is read from looked at; [`is_subscribed`](Self::is_subscribed) waits for that.
    pub(crate) fn look(&self) {
        let mut state = self.lock();
        if state.stock.is_full() {
            state.looking =
                state.lenders.iter().filter(|(_, lender)| lender.generation > 0).map(|(number, _)| *number).collect();
            self.weigh(&state);
        }
    }

    pub(crate) fn must_look(&self, lender: u32) -> bool {
        self.lock().looking.contains(&lender)
    }

    pub(crate) fn looked(&self, lender: u32) {
        let mut state = self.lock();
        state.looking.remove(&lender);
        self.weigh(&state);
    }

    /// One more consumer; `None` when the hub is closing.
    pub(crate) fn join(&self, prefetch: usize, prefetch_bytes: usize) -> Option<Seat> {
        let mut state = self.lock();
        if state.closed {
            return None;
        }
        let seat = state.stock.join(prefetch, prefetch_bytes);
        self.weigh(&state);
        drop(state);
        self.changed.notify_one();
        Some(seat)
    }

    pub(crate) fn leave(&self, seat: &Seat) {
        let mut state = self.lock();
        state.stock.leave(seat);
        self.weigh(&state);
        drop(state);
        self.changed.notify_one();
        // A message that had woken the one who leaves belongs to another.
        self.ready.notify_one();
    }

    /// What the consumers together want in flight, and how many retries wait beside it.
    pub(crate) fn wanted(&self) -> (usize, usize) {
        let state = self.lock();
        (state.stock.prefetch(), state.stock.aside())
    }

    /// Ends every consumer with this error.
    pub(crate) fn fail(&self, error: &Error) {
        let mut state = self.lock();
        state.failed.get_or_insert_with(|| (error.kind(), error.message().to_owned()));
        self.weigh(&state);
        state.stock.wake_all();
        drop(state);
        self.ready.notify_waiters();
        self.changed.notify_one();
    }

    /// Waits for messages within the consumer's prefetch.
    pub(crate) async fn receive(&self, seat: &Seat, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        loop {
            let freed = seat.freed.notified();
            tokio::pin!(freed);
            freed.as_mut().enable();
            if self.lock().must_wait(seat) {
                freed.await;
                continue;
            }
            let ready = self.ready.notified();
            tokio::pin!(ready);
            ready.as_mut().enable();
            if self.take(seat, max, into)? {
                return Ok(());
            }
            ready.await;
        }
    }

    fn take(&self, seat: &Seat, max: usize, into: &mut Vec<Incoming>) -> Result<bool> {
        let mut state = self.lock();
        if let Some((kind, sentence)) = &state.failed {
            return Err(crate::error::error(*kind, sentence.clone())
                .with_operation("receive")
                .with_channel(&*self.name));
        }
        let taken = state.stock.take(seat, max, into);
        self.weigh(&state);
        if taken > 0 && state.stock.has_arrived() {
            self.ready.notify_one();
        }
        Ok(taken > 0)
    }

    /// Whether the broker still waits for this delivery to be acknowledged, and we can do it.
    pub(crate) fn is_current(&self, token: Token) -> bool {
        let state = self.lock();
        state.stock.origin(token).is_some_and(|origin| state.knows(origin))
    }

    /// Acknowledges; `false` when the connection has ended and the broker delivers the message again. Either way the
    /// delivery is done with and its place is free.
    pub(crate) fn ack(&self, token: Token) -> bool {
        let mut state = self.lock();
        let settled = state.stock.settle(token);
        self.weigh(&state);
        let Some(origin) = settled.filter(|origin| state.knows(*origin)) else { return false };
        let nobody = state.stock.consumers() == 0;
        if let Some(lender) = state.lenders.get_mut(&origin.lender) {
            lender.ack(origin.pkid);
            if lender.lent() == 0 || nobody {
                self.changed.notify_one();
            }
        }
        true
    }

    /// A retry waits and takes no place meanwhile; `false` when the broker delivers the message again.
    pub(crate) fn set_aside(&self, token: Token) -> bool {
        let mut state = self.lock();
        // A connection that ends in between would leave a retry behind that nobody forgets.
        let current = state.stock.origin(token).is_some_and(|origin| state.knows(origin));
        if current {
            state.stock.set_aside(token);
            self.changed.notify_one();
        }
        current
    }

    /// Hands a delivery out again inside this process; `false` when the broker does it.
    pub(crate) fn again(&self, token: Token, message: Message, attempt: Option<u32>, front: bool) -> bool {
        let mut state = self.lock();
        let current = state.stock.origin(token).is_some_and(|origin| state.knows(origin));
        match current {
            true => state.stock.again(token, message, attempt, front),
            false => drop(state.stock.settle(token)),
        }
        self.weigh(&state);
        let nobody = state.stock.consumers() == 0;
        drop(state);
        if current {
            self.ready.notify_one();
        }
        if nobody {
            self.changed.notify_one();
        }
        current
    }

    /// Whether more may be read.
    pub(crate) fn has_room(&self) -> bool {
        self.room.borrow().is_some()
    }

    /// Waits until more may be read, or until nothing more is.
    pub(crate) async fn turns(&self, full: bool) {
        // The sender is ours.
        let _ = self.room.subscribe().wait_for(|room| room.is_none() == full).await;
    }

    /// To be called after every change of what is here.
    fn weigh(&self, state: &State) {
        // A hub that ends reads on: there may be answers among what comes, and messages are not kept.
        let full = state.failed.is_none() && state.looking.is_empty() && state.stock.is_full();
        if self.has_room() == full {
            self.room.send_replace((!full).then(Instant::now));
        }
    }

    fn forget(&self, state: &mut State, lender: u32) {
        state.looking.remove(&lender);
        state.stock.forget(|number| number == lender);
        self.weigh(state);
    }

    /// Waits until the acknowledgements given so far are written.
    pub(crate) async fn flush(&self) {
        let links: Vec<_> = self.lock().lenders.values().filter_map(|lender| lender.link.clone()).collect();
        for link in links {
            link.flush_commands().await;
        }
    }

    /// Events of a link: connected.
    pub(crate) fn connected(&self, number: u32, serial: u32, generation: u32, session_present: bool) {
        let mut state = self.lock();
        let lender = state.lenders.get_mut(&number).filter(|lender| lender.serial == serial);
        let resumed = lender.is_none_or(|lender| lender.connected(generation, session_present));
        if !resumed {
            self.forget(&mut state, number);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Events of a link: a message.
    pub(crate) fn message(self: &Arc<Self>, number: u32, generation: u32, publish: Publish) {
        let (pkid, dup) = (publish.pkid, publish.dup);
        let channel = convert::concrete_topic(&publish, &self.name);
        let (message, details) = convert::from_publish(publish);
        let wait = convert::due_in(&message);
        let mut incoming = Incoming { message, token: Token::default(), details };
        if channel.is_some() {
            incoming.details_mut().channel = channel;
        }
        let mut state = self.lock();
        if state.failed.is_some() {
            return;
        }
        // A connection that is being closed may still bring something; the broker delivers it again.
        let lender = state.lenders.get_mut(&number).filter(|lender| lender.generation == generation);
        if !lender.is_some_and(|lender| lender.arrived(pkid, dup)) {
            return;
        }
        let token = state.stock.arrive(Origin { lender: number, generation, pkid }, incoming, wait.is_some());
        self.weigh(&state);
        drop(state);
        let Some(wait) = wait else { return };
        self.changed.notify_one();
        let hub = Arc::downgrade(self);
        tokio::spawn(async move {
            sleep(wait).await;
            if let Some(hub) = hub.upgrade() {
                hub.lock().stock.due(token);
                hub.wake();
            }
        });
    }

    /// Events of a link: no more messages for now.
    pub(crate) fn wake(&self) {
        self.ready.notify_one();
    }

    /// Events of a link: what is sent now arrives.
    pub(crate) fn subscribed(&self, number: u32, serial: u32) {
        if let Some(lender) = self.lock().lenders.get_mut(&number).filter(|lender| lender.serial == serial) {
            lender.subscribed = true;
        }
    }

    /// Events of a link: the connection ended.
    pub(crate) fn lost(&self, number: u32, serial: u32) {
        let mut state = self.lock();
        if let Some(lender) = state.lenders.get_mut(&number).filter(|lender| lender.serial == serial) {
            lender.lost();
            // The broker delivers these again: handing them out now would hand them out twice.
            self.forget(&mut state, number);
        }
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether a consumer holds all that it may, which only a delivery that is settled changes, or the end.
    fn must_wait(&self, seat: &Seat) -> bool {
        self.failed.is_none() && self.stock.room(seat) == 0
    }

    /// Whether what came from there can be acknowledged.
    fn knows(&self, origin: Origin) -> bool {
        self.lenders.get(&origin.lender).is_some_and(|lender| lender.knows(origin.generation))
    }
}

#[cfg(test)]
mod tests {
    use rumqttc::v5::mqttbytes::QoS;

    use super::*;

    fn hub(prefetch: usize) -> (Arc<Hub>, Seat) {
        Hub::with_consumer("q".into(), &ConsumeOptions { prefetch, ..ConsumeOptions::default() })
    }

    #[test]
    fn a_connection_that_stays_keeps_its_number() {
        let (hub, _seat) = hub(1);
        let (stays, _events) = hub.add_lender(None);
        for _ in 0..=u16::MAX {
            // A session that is looked at.
            let (number, _events) = hub.add_lender(None);
            assert_ne!(number, stays);
            hub.remove_lender(number);
        }
    }

    fn bring(hub: &Arc<Hub>, lender: u32, generation: u32, pkid: u16) {
        let mut publish = Publish::new("q", QoS::AtLeastOnce, "x", None);
        publish.pkid = pkid;
        hub.message(lender, generation, publish);
    }

    /// A retry that waits counts no more when its connection has ended: the broker does not wait for it either.
    #[test]
    fn a_retry_of_a_lost_connection_closes_no_hub() {
        let (hub, seat) = hub(2);
        let (lender, _events) = hub.add_lender(None);
        let mut taken = Vec::new();
        hub.connected(lender, 0, 1, false);
        bring(&hub, lender, 1, 1);
        assert!(hub.take(&seat, 1, &mut taken).expect("one is there"));
        assert!(hub.set_aside(taken[0].token), "its retry waits");
        hub.lost(lender, 0);
        hub.connected(lender, 0, 2, true);
        bring(&hub, lender, 2, 1);
        assert!(hub.take(&seat, 1, &mut taken).expect("it came again"));
        hub.leave(&seat);
        assert!(!hub.close_if_done(), "a handler holds one");
        assert!(!hub.again(taken[0].token, taken[0].message.clone(), Some(2), false), "the broker did it");
        assert!(!hub.close_if_done(), "a handler holds one");
        assert!(hub.ack(taken[1].token));
        assert!(hub.close_if_done());
    }

    /// While the hub is full nothing is read, so that nothing comes does not say that nothing is there.
    #[test]
    fn a_connection_that_is_not_read_is_not_quiet() {
        let (hub, seat) = hub(1);
        let ((brings, _a), (silent, _b)) = (hub.add_lender(None), hub.add_lender(None));
        hub.connected(brings, 0, 1, false);
        hub.connected(silent, 0, 1, true);
        assert!(hub.quiet_since(silent).is_some());
        for pkid in 1..=2 {
            bring(&hub, brings, 1, pkid);
        }
        assert!(!hub.has_room());
        assert_eq!(hub.quiet_since(silent), None);
        let full = Instant::now();
        let mut taken = Vec::new();
        assert!(hub.take(&seat, 1, &mut taken).expect("one is there"));
        assert!(hub.has_room());
        assert!(hub.quiet_since(silent).is_some_and(|since| since >= full));
    }
}
