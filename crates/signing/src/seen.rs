//! Signatures of messages that were handled, for as long as they would be believed.

use std::{
    collections::{HashSet, VecDeque},
    time::SystemTime,
};

/// What was handled, and by whom: each group of a topic handles a message once.
type Mark = (Box<str>, Vec<u8>);

/// What was handled.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    marks: HashSet<Mark>,
    /// In the order in which they are forgotten.
    until: VecDeque<(SystemTime, Mark)>,
}

impl Seen {
    pub(crate) fn contains(&self, by: &str, signature: &[u8]) -> bool {
        self.marks.contains(&(by.into(), signature.to_vec()))
    }

    /// Remembers it until then, and forgets what nobody would believe any more.
    pub(crate) fn add(&mut self, by: &str, signature: &[u8], until: SystemTime, now: SystemTime) {
        while self.until.front().is_some_and(|(until, _)| *until < now) {
            if let Some((_, old)) = self.until.pop_front() {
                self.marks.remove(&old);
            }
        }
        let mark: Mark = (by.into(), signature.to_vec());
        if self.marks.insert(mark.clone()) {
            self.until.push_back((until, mark));
        }
    }
}
