//! Loans: made longer while a handler runs, up to the cap, and forgotten when they are over.

use std::{collections::VecDeque, sync::Arc, time::Duration};

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
    pub(crate) fn extended(&self, token: Token, receipt: &str, until: Option<Instant>) {
        let mut state = self.lock();
        state.extending.remove(receipt);
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
        let mut held = self.held.remove(&token)?;
        self.loans.remove(&held.native_id);
        self.bytes = self.bytes.saturating_sub(held.bytes);
        if std::mem::take(&mut held.extending) {
            self.forget_extensions(|of| of == token);
        }
        Some(held)
    }

    /// A longer loan that was asked for and not told yet would undo what is done with the message now.
    pub(super) fn forget_extensions(&mut self, is_moot: impl Fn(Token) -> bool) {
        let is_moot = |change: &Change| matches!(&change.purpose, Purpose::Extend(of, _) if is_moot(*of));
        if self.changes.iter().any(is_moot) {
            let (moot, rest) = self.changes.drain(..).partition::<VecDeque<_>, _>(is_moot);
            self.changes = rest;
            moot.into_iter().for_each(Change::too_late);
        }
    }
}

#[cfg(test)]
mod tests {
    use polymq_core::{Completion, ErrorKind, Incoming, Message};

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

    /// SQS does what it is told last: a longer loan that comes after a return would hide the message from everybody.
    #[tokio::test]
    async fn a_longer_loan_does_not_overtake_a_return() {
        const LEASE: Duration = Duration::from_secs(600);
        let shared = Shared::new((10, 1000), (LEASE, LEASE), false, false, 1000);
        let lend = |receipt: &str| {
            let incoming = Incoming::new(Message::new("body"), Token::default());
            let held = Held::new(receipt, receipt, &incoming, LEASE);
            shared.arrive(1, vec![(incoming, held)]);
            let mut got = Vec::new();
            shared.take(1, &mut got).expect("one").expect("no error");
            got[0].token
        };
        let returned = |token| {
            let (answer, _) = Completion::queued();
            shared.settle(token, |held| shared.change(&held, 5, Purpose::Retry(answer))).expect("it is ours");
        };
        let told = |running| -> Vec<String> {
            let name = |change: &Change| match change.purpose {
                Purpose::Extend(..) => format!("{} longer", change.receipt),
                _ => format!("{} back", change.receipt),
            };
            shared.next_changes(running).iter().map(name).collect()
        };
        // One that waits is not told at all.
        let token = lend("waiting");
        let (answer, extension) = Completion::queued();
        shared.extend(token, 60, answer);
        returned(token);
        assert_eq!(told(0), ["waiting back"]);
        assert_eq!(extension.await.expect_err("it went back").kind(), ErrorKind::Stale);
        // One that is on its way is waited for, and no other message waits with it.
        let token = lend("on its way");
        shared.extend(token, 60, Completion::queued().0);
        assert_eq!(told(0), ["on its way longer"]);
        returned(token);
        let other = lend("other");
        returned(other);
        assert_eq!(told(0), ["other back"]);
        shared.extended(token, "on its way", None);
        assert_eq!(told(0), ["on its way back"]);
        // One that SQS was too busy for is not told again.
        let token = lend("busy");
        shared.extend(token, 60, Completion::queued().0);
        let batch = shared.next_changes(0);
        returned(token);
        shared.again(Vec::new(), batch);
        assert_eq!(told(0), ["busy back"]);
    }
}
