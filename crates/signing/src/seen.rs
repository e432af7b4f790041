//! Signatures of messages that are being handled, and of those that were, for as long as they would be believed.

use std::{
    collections::{HashSet, VecDeque},
    time::SystemTime,
};

use ring::digest::{Context, SHA256};

/// What was handled, and by whom: each group of a topic handles a message once. Half of a digest, which nobody can make equal to
/// that of another message: there may be very many of them.
pub(crate) type Mark = [u8; 16];

pub(crate) fn mark(by: &str, signature: &[u8]) -> Mark {
    let mut digest = Context::new(&SHA256);
    // The signature first: its length is known, so that nothing can be read in two ways.
    digest.update(signature);
    digest.update(by.as_bytes());
    let mut mark = Mark::default();
    mark.copy_from_slice(&digest.finish().as_ref()[..16]);
    mark
}

/// What is known of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Known {
    /// Nothing: it is under way from now on.
    New,
    UnderWay,
    Handled,
}

/// What was handled, and what is under way.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    under_way: HashSet<Mark>,
    marks: HashSet<Mark>,
    /// In the order in which they are forgotten.
    until: VecDeque<(SystemTime, Mark)>,
}

impl Seen {
    pub(crate) fn begin(&mut self, mark: &Mark) -> Known {
        if self.marks.contains(mark) {
            return Known::Handled;
        }
        if self.under_way.insert(*mark) { Known::New } else { Known::UnderWay }
    }

    /// It is under way no more.
    pub(crate) fn end(&mut self, mark: &Mark) {
        self.under_way.remove(mark);
    }

    /// Remembers it until then, and forgets what nobody would believe any more.
    pub(crate) fn add(&mut self, mark: &Mark, until: SystemTime, now: SystemTime) {
        while self.until.front().is_some_and(|(until, _)| *until < now) {
            if let Some((_, old)) = self.until.pop_front() {
                self.marks.remove(&old);
            }
        }
        if self.marks.insert(*mark) {
            self.until.push_back((until, *mark));
        }
    }
}
