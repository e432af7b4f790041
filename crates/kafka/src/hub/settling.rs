//! Settling what consumers have taken: done, returned, kept for later, or part of a transaction.

use std::time::{Duration, Instant};

use polymq_core::{ATTEMPT, Message, Result, Token};

use super::{
    Hub,
    state::{State, Waiting, parts},
};
use crate::{error, link::lock, partition::Place};

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

    /// The transaction is given up: they are with their consumers as before.
    pub(crate) fn unclaim(&self, tokens: &[Token]) {
        let mut state = lock(&self.state);
        for token in tokens {
            if let Some(entry) = state.claimed(*token)
                && let Place::Finishing(share) = entry.place
            {
                entry.place = Place::With(share);
            }
        }
        self.settled(&mut state);
    }

    /// The transaction has happened: they are done.
    pub(crate) fn settle_claimed(&self, tokens: &[Token]) {
        let mut state = lock(&self.state);
        for token in tokens {
            let (slot, number) = parts(*token);
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
        // Gone: another consumer has it already.
        let Ok((slot, offset)) = state.locate(token) else { return };
        let Some(entry) = state.slots.get_mut(&slot).and_then(|slot| slot.entry(offset)) else { return };
        let copy = *entry;
        entry.place = Place::Ready;
        state.give_up(copy);
        (state.fetched, state.fetched_bytes) = (state.fetched + 1, state.fetched_bytes + copy.bytes());
        let returned = Waiting { message, token, taken_at: None };
        let same = |waiting: &&Waiting| parts(waiting.token).0 == slot;
        // Tokens of one slot are in the order of their offsets.
        let before = state.ready.iter().position(|waiting| same(&waiting) && waiting.token.0 > token.0);
        let last = state.ready.len()
            - state.ready.iter().rev().position(|waiting| same(&waiting)).unwrap_or(state.ready.len());
        let at = before.unwrap_or(last);
        state.ready.insert(at, returned);
        state.notify();
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
        state.keep(Instant::now() + after, Waiting { message, token, taken_at: None });
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
