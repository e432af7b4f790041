//! The health that users see.

use std::sync::{Mutex, PoisonError};

use polymq_core::HealthReporter;

use crate::link::Role;

/// One health out of two connections: up when all that are in use are up and the broker takes messages.
#[derive(Debug, Default)]
pub(crate) struct HealthBoard {
    pub(crate) reporter: HealthReporter,
    reasons: Mutex<[Option<String>; 2]>,
}

impl HealthBoard {
    pub(crate) fn set(&self, role: Role, reason: Option<String>) {
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if reasons[role as usize] == reason && reason.is_some() {
            // One of many attempts that fail alike.
            return;
        }
        reasons[role as usize] = reason;
        match reasons.iter().flatten().next() {
            Some(reason) => self.reporter.down(reason),
            None => self.reporter.up(),
        }
    }

    pub(crate) fn closed(&self, reason: &str) {
        self.reporter.closed(reason);
    }
}
