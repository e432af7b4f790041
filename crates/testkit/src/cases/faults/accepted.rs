//! What the broker has accepted in a scenario, and when.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use tokio::time::Instant;

use crate::cx::lock;

/// Each message by its body.
#[derive(Debug, Clone, Default)]
pub(super) struct Accepted(Arc<Mutex<HashMap<String, Sent>>>);

/// When the send began that was accepted, and when its answer was seen.
#[derive(Debug, Clone, Copy)]
struct Sent {
    began: Instant,
    answered: Instant,
}

impl Accepted {
    pub(super) fn add(&self, body: impl Into<String>, began: Instant) {
        lock(&self.0).insert(body.into(), Sent { began, answered: Instant::now() });
    }

    pub(super) fn len(&self) -> usize {
        lock(&self.0).len()
    }

    pub(super) fn at(&self, body: &str) -> Option<Instant> {
        lock(&self.0).get(body).map(|sent| sent.answered)
    }

    /// When the last one began that was answered by then. A broker that writes between two rounds of answers has written what it had
    /// answered well before that, however long its writing takes.
    pub(super) fn last_began(&self, answered_by: Instant) -> Option<Instant> {
        lock(&self.0).values().filter(|sent| sent.answered <= answered_by).map(|sent| sent.began).max()
    }
}
