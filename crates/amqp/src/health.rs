//! The health that users see.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use polymq_core::HealthReporter;

use crate::link::Role;

/// Who tells. What a connection has to tell explains what its consumers have, so it comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Line {
    Connection(Role),
    /// One that should be subscribed, by a number of its own.
    Consumer(u64),
}

/// One health out of many lines: up when both connections that are in use are up, the broker takes messages, and every
/// consumer gets some.
#[derive(Debug, Default)]
pub(crate) struct HealthBoard {
    pub(crate) reporter: HealthReporter,
    /// What is amiss.
    reasons: Mutex<BTreeMap<Line, String>>,
}

impl HealthBoard {
    pub(crate) fn set(&self, line: Line, reason: Option<String>) {
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        match (reason, line) {
            // One of many attempts that fail alike.
            (Some(reason), _) if reasons.get(&line) == Some(&reason) => return,
            (Some(reason), _) => drop(reasons.insert(line, reason)),
            // Nothing was amiss, and that is no news. A connection is up for the first time, though.
            (None, Line::Consumer(_)) if !reasons.contains_key(&line) => return,
            (None, _) => drop(reasons.remove(&line)),
        }
        match reasons.values().next() {
            Some(reason) => self.reporter.down(reason),
            None => self.reporter.up(),
        }
    }

    pub(crate) fn closed(&self, reason: &str) {
        self.reporter.closed(reason);
    }
}
