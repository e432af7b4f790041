//! Loans: made longer while a handler runs, up to the cap, and forgotten when they are over.

use std::{sync::Arc, time::Duration};

use polymq_core::{Completer, Token};
use tokio::time::Instant;

use super::{Change, Held, Purpose, Shared, State};
use crate::error;

impl Shared {
    /// Extends the loan of a message that stays held.
    pub(crate) fn extend(&self, token: Token, seconds: i32, answer: Completer<()>) {
        let mut state = self.lock();
        if state.abandoned {
            return answer.complete(Err(error::closed("settle")));
        }
        match state.held.get_mut(&token) {
            Some(held) if held.deadline > Instant::now() => {
                let left = self.lease_cap.saturating_sub(held.received.elapsed());
                let seconds = seconds.min(crate::convert::seconds(left));
                if seconds == 0 {
                    drop(state);
                    return answer.complete(Err(error::capped(self.lease_cap)));
                }
                held.extending = true;
                let (receipt, deadline) = (Arc::clone(&held.receipt), held.deadline);
                let purpose = Purpose::Extend(token, Some(answer));
                state.changes.push_back(Change { receipt, seconds, deadline, purpose });
            }
            _ => return answer.complete(Err(error::stale())),
        }
        drop(state);
        self.work.notify_one();
    }

    /// A loan was extended, or not.
    pub(crate) fn extended(&self, token: Token, until: Option<Instant>) {
        let mut state = self.lock();
        // Not extended, it may not be ours any more: its loan ends when it ends.
        if let (Some(held), Some(until)) = (state.held.get_mut(&token), until) {
            held.extending = false;
            held.deadline = until;
        }
    }

    /// Asks for longer loans where they are half over, and forgets messages whose loan is over.
    pub(crate) fn heartbeat(&self, is_up: bool) {
        let now = Instant::now();
        let mut state = self.lock();
        let before = state.held.len();
        let State { held, loans, changes, bytes, .. } = &mut *state;
        held.retain(|token, held| {
            if held.deadline <= now {
                *bytes = bytes.saturating_sub(held.bytes);
                loans.remove(&held.native_id);
                return false;
            }
            let age = now - held.received;
            let half_over = held.deadline - now < self.lease / 2;
            let left = self.lease_cap.saturating_sub(age);
            let seconds = crate::convert::seconds(self.lease.min(left));
            // Not shortened either: what is left of the loan may be more than what the cap allows anew.
            let longer = now + Duration::from_secs(u64::try_from(seconds).unwrap_or_default()) > held.deadline;
            if is_up && half_over && longer && !held.extending && !left.is_zero() {
                held.extending = true;
                let (receipt, deadline) = (Arc::clone(&held.receipt), held.deadline);
                changes.push_back(Change { receipt, seconds, deadline, purpose: Purpose::Extend(*token, None) });
            }
            true
        });
        let over = before - state.held.len();
        if over > 0 {
            let State { held, buffer, .. } = &mut *state;
            buffer.retain(|incoming| held.contains_key(&incoming.token));
            tracing::warn!(over, "loans of messages are over; SQS delivers them again");
        }
    }

    /// How often [`heartbeat`](Self::heartbeat) is due.
    pub(crate) fn tick(&self) -> Duration {
        self.lease / 6
    }

    pub(crate) fn lease(&self) -> Duration {
        self.lease
    }
}

impl State {
    /// Holds a message. An earlier delivery of it is over, whatever our clock says: SQS counts from when it answered, and lends
    /// nothing twice at a time.
    pub(super) fn lend(&mut self, token: Token, held: Held) {
        if !held.native_id.is_empty()
            && let Some(earlier) = self.loans.insert(Arc::clone(&held.native_id), token)
            && let Some(over) = self.held.remove(&earlier)
        {
            self.bytes = self.bytes.saturating_sub(over.bytes);
            self.buffer.retain(|incoming| incoming.token != earlier);
        }
        self.bytes += held.bytes;
        self.held.insert(token, held);
    }

    /// Holds a message no longer.
    pub(super) fn take_back(&mut self, token: Token) -> Option<Held> {
        let held = self.held.remove(&token)?;
        self.loans.remove(&held.native_id);
        self.bytes = self.bytes.saturating_sub(held.bytes);
        Some(held)
    }
}

#[cfg(test)]
mod tests {
    use polymq_core::{ErrorKind, Incoming, Message};

    use super::*;

    /// The second delivery of a message proves that the first one's loan is over.
    #[test]
    fn what_comes_again_is_not_ours_as_it_came_before() {
        const LEASE: Duration = Duration::from_secs(30);
        let shared = Shared::new((10, 1000), (LEASE, LEASE), false, false, 1000);
        let deliver = |receipt: &str, id: &str| {
            let incoming = Incoming::new(Message::new("body"), Token::default());
            let held = Held::new(receipt, id, &incoming, LEASE);
            shared.arrive(1, vec![(incoming, held)]);
        };
        let mut taken = Vec::new();
        for (receipt, id) in [("first", "a"), ("other", "b"), ("second", "a"), ("third", "a")] {
            deliver(receipt, id);
            if receipt != "second" {
                assert!(shared.take(10, &mut taken).is_some_and(|taken| taken.is_ok()));
            }
        }
        let tokens: Vec<_> = taken.iter().map(|incoming| incoming.token).collect();
        let [first, other, third] = tokens[..] else { panic!("the second was not received: {tokens:?}") };
        assert_eq!(shared.acknowledge(&[first]).expect_err("it is over").kind(), ErrorKind::Stale);
        shared.acknowledge(&[third, other]).expect("ours");
        let receipts: Vec<_> = shared.next_deletes(0).into_iter().map(|delete| delete.receipt).collect();
        assert_eq!(receipts, ["third".into(), "other".into()]);
    }
}
