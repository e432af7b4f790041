//! One answer for several connections: up when all are, down with the reason of one that is not.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use polymq_core::{HealthReporter, HealthWatch};

/// The health of everything that one [`Connection`](polymq_core::Connection) needs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Board(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    reporter: HealthReporter,
    /// Why each link that is down is so.
    down: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    reasons: BTreeMap<u64, Arc<str>>,
}

impl Board {
    pub(crate) fn watch(&self) -> HealthWatch {
        self.0.reporter.watch()
    }

    /// A link that counts from its first connection on.
    pub(crate) fn member(&self) -> Member {
        let mut state = self.0.down.lock().unwrap_or_else(PoisonError::into_inner);
        state.next += 1;
        Member { board: self.clone(), number: state.next, counts: false }
    }

    /// Closed for good.
    pub(crate) fn close(&self) {
        self.0.reporter.closed("closed");
    }

    /// Given up for good.
    pub(crate) fn give_up(&self, reason: &str) {
        self.0.reporter.closed(reason);
    }

    fn set(&self, number: u64, reason: Option<&str>) {
        let mut state = self.0.down.lock().unwrap_or_else(PoisonError::into_inner);
        match reason {
            Some(reason) => {
                state.reasons.insert(number, reason.into());
            }
            None => {
                state.reasons.remove(&number);
            }
        }
        match state.reasons.values().next() {
            Some(reason) => self.0.reporter.down(reason),
            None => self.0.reporter.up(),
        }
    }
}

/// One line on the board: a link's, or that of a consumer which has none.
#[derive(Debug)]
pub(crate) struct Member {
    board: Board,
    number: u64,
    counts: bool,
}

impl Member {
    pub(crate) fn up(&mut self) {
        self.counts = true;
        self.board.set(self.number, None);
    }

    pub(crate) fn down(&mut self, reason: &str) {
        if self.counts {
            self.board.set(self.number, Some(reason));
        }
    }

    /// Down, also when it was never up.
    pub(crate) fn missing(&mut self, reason: &str) {
        self.counts = true;
        self.down(reason);
    }

    /// The link ended on purpose and no longer counts.
    pub(crate) fn closed(&mut self) {
        if self.counts {
            self.counts = false;
            self.board.set(self.number, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use polymq_core::HealthState;

    use super::*;

    #[test]
    fn what_is_missing_counts_before_it_was_ever_up() {
        let board = Board::default();
        let (mut link, mut attempt, mut consumer) = (board.member(), board.member(), board.member());
        link.up();
        attempt.down("refused");
        attempt.closed();
        let watch = board.watch();
        assert_eq!(watch.now().state, HealthState::Up, "it has not begun to count");
        consumer.missing("no session");
        // Another link comes and goes meanwhile.
        attempt.up();
        attempt.closed();
        assert_eq!(watch.now().state, HealthState::Down);
        assert_eq!(watch.now().reason.as_deref(), Some("no session"));
        consumer.up();
        assert_ne!(watch.now().state, HealthState::Down);
        consumer.missing("no session");
        consumer.closed();
        assert_ne!(watch.now().state, HealthState::Down, "its line is gone with it");
    }
}
