//! What is counted and not kept anywhere else.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// A number that many write.
#[derive(Debug, Clone, Default)]
pub(crate) struct Count(Arc<AtomicU64>);

impl Count {
    pub(crate) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn take(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Counts {
    /// Open connections.
    pub(crate) connections: Count,
    /// Connections beyond the limit.
    pub(crate) refused: Count,
    /// Calls without a good token.
    pub(crate) unauthenticated: Count,
    /// Requests that no rule allows.
    pub(crate) denied: Count,
    /// Events that slow subscribers lost.
    pub(crate) lost: Count,
}
