//! Settling what consumers have taken: done, returned, kept for later, or part of a transaction.

use std::time::{Duration, Instant};

use polymq_core::{ATTEMPT, Message, Result, Token};

use super::{
    Hub,
    state::{State, Waiting, parts},
};
use crate::{error, link::lock, partition::Place, record::Content};

impl Hub {
    /// The messages are done; the error is that of one of them.
    pub(crate) fn ack(&self, tokens: &[Token]) -> Result<()> {
        let mut state = lock(&self.state);
        let mut result = Ok(());
        for token in tokens {
            result = result.and(state.finish(*token));
        }
        self.settled(&mut state);
        result
    }

    /// The message is part of a transaction: nobody else settles it, and the position to be committed passes it.
    pub(crate) fn claim(&self, token: Token) -> Result<()> {
        let mut state = lock(&self.state);
        let (slot, offset) = state.locate(token)?;
        let partition = state.slots.get_mut(&slot).ok_or_else(error::stale)?;
        if let Some(entry) = partition.entry(offset)
            && let Place::With(share) = entry.place
        {
            entry.place = Place::Finishing(share);
        }
        partition.dirty = true;
        partition.touched = true;
        Ok(())
    }

    /// The transaction is given up: they are with their consumers as before, or wait where those have returned them.
    pub(crate) fn unclaim(&self, tokens: &[Token]) {
        let mut state = lock(&self.state);
        for token in tokens {
            if let Some(entry) = state.claimed(*token)
                && let Place::Finishing(share) = entry.place
            {
                entry.place = Place::With(share);
                if let Some(message) = state.returned.remove(&token.0) {
                    state.put_back(*token, message);
                }
            }
        }
        self.settled(&mut state);
    }

    /// The transaction has happened: they are done.
    pub(crate) fn settle_claimed(&self, tokens: &[Token]) {
        let mut state = lock(&self.state);
        for token in tokens {
            let (slot, number) = parts(*token);
            state.returned.remove(&token.0);
            // Gone meanwhile: its next owner begins behind it.
            let Some(partition) = state.slots.get_mut(&slot) else { continue };
            let dirty = partition.dirty;
            let Some(entry) = partition.finish(partition.base + number) else { continue };
            // It is committed already.
            partition.dirty = dirty;
            state.give_up(entry);
        }
        self.settled(&mut state);
    }

    /// Whether the message is still ours.
    pub(crate) fn check(&self, token: Token) -> Result<()> {
        lock(&self.state).locate(token).map(drop)
    }

    /// Back to those that wait, in its place.
    pub(crate) fn release(&self, token: Token, message: Message) {
        let mut state = lock(&self.state);
        if state.claimed(token).is_some_and(|entry| matches!(entry.place, Place::Finishing(_))) {
            // Nobody waits for the answer any more, but the transaction goes on.
            state.returned.insert(token.0, message);
            return;
        }
        state.put_back(token, message);
        self.settled(&mut state);
    }

    /// Another attempt of a subscription that nobody shares: the message waits here.
    pub(crate) fn hold(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Result<()> {
        let mut state = lock(&self.state);
        let (slot, offset) = state.locate(token)?;
        let partition = state.slots.get_mut(&slot).ok_or_else(error::stale)?;
        let entry = partition.entry(offset).ok_or_else(error::stale)?;
        let copy = *entry;
        entry.place = Place::Held;
        partition.held += 1;
        partition.held_bytes += copy.bytes();
        state.give_up(copy);
        let mut message = message.clone();
        message.set_system_header(ATTEMPT, attempt.to_string());
        let content = Content::Message { message, taken_at: None }.alone();
        state.keep(Instant::now() + after, Waiting { content, token });
        self.changed.notify_all();
        Ok(())
    }

    /// Something is settled: whoever waits for that hears of it, and not of each single message.
    fn settled(&self, state: &mut State) {
        if state.wants_rest || (state.wants_room && state.is_worth_fetching()) {
            // Once: each notification costs a system call, and it takes a while until the thread runs.
            (state.wants_rest, state.wants_room) = (false, false);
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use polymq_core::Address;
    use rdkafka::{Offset, TopicPartitionList};

    use super::*;
    use crate::{bodies::Bodies, hub::Fetched, hub::Turn, topology::Names};

    /// A handler's task is given up while its transaction is being written: when that has happened the message is done, and when
    /// not it is delivered again. Neither leaves a place of the prefetch taken.
    #[test]
    fn what_is_returned_during_its_transaction_waits_for_its_end() {
        let hub = Hub::new(Names::of(&Address::queue("orders"), None));
        let (share, _) = hub.join(1, 1000).expect("it has just begun");
        let mut list = TopicPartitionList::new();
        list.add_partition_offset("orders", 0, Offset::Offset(0)).expect("an offset");
        hub.assigned(&list, true);
        let fetched = |offset| Fetched {
            is_delay: false,
            partition: 0,
            offset,
            content: Content::Message { message: Message::new(offset.to_string()), taken_at: None },
            due: None,
        };
        hub.take_in(&mut vec![fetched(0)]);
        let take = || {
            let mut taken = Vec::new();
            if let Some(result) = hub.take(share, 1, &mut Bodies::default(), &mut taken) {
                result.expect("it goes on");
            }
            taken.pop().map(|incoming| (incoming.token, incoming.message))
        };
        let (token, message) = take().expect("a message");
        hub.claim(token).expect("ours");
        hub.release(token, message);
        assert!(take().is_none(), "it may be done any moment");
        hub.unclaim(&[token]);
        let (token, message) = take().expect("the same again");
        assert_eq!(&message.payload()[..], b"0");
        hub.claim(token).expect("ours");
        hub.release(token, message);
        hub.settle_claimed(&[token]);
        assert!(take().is_none() && hub.unsettled() == 0, "it is done");
        hub.take_in(&mut vec![fetched(1)]);
        let (token, _) = take().expect("the next one has its place");
        hub.ack(&[token]).expect("ours");
        hub.part(share);
        assert_eq!(hub.turn(Instant::now()), Turn::Leave);
    }
}
