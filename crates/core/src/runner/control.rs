//! What can be changed and read while a subscription runs.

use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Concurrency, pause and counters of one running subscription.
#[derive(Debug, Default)]
pub(crate) struct Control {
    concurrency: AtomicUsize,
    prefetch: usize,
    paused: std::sync::atomic::AtomicBool,
    /// Its consumer has ended with an error, and another one is not open yet.
    reopening: std::sync::atomic::AtomicBool,
    changed: Notify,
    failures_in_a_row: AtomicU32,
    /// No other subscription of this process has it.
    pub(crate) number: u64,
    pub(crate) counters: Counters,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) handled: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) retried: AtomicU64,
    pub(crate) deferred: AtomicU64,
    pub(crate) dead_lettered: AtomicU64,
    pub(crate) dropped: AtomicU64,
    pub(crate) undecodable: AtomicU64,
    pub(crate) untrusted: AtomicU64,
    pub(crate) expired: AtomicU64,
    pub(crate) unwanted: AtomicU64,
    pub(crate) panicked: AtomicU64,
    pub(crate) timed_out: AtomicU64,
    pub(crate) running: AtomicU64,
}

/// Counters of one subscription since it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct RouteStats {
    /// Messages handled with success; one whose acknowledgement is lost comes again, and counts again.
    pub handled: u64,
    /// Attempts that failed; a cancelled handler is not a failed one.
    pub failed: u64,
    /// Messages sent back for another attempt, or tried again in place.
    pub retried: u64,
    /// Messages put behind the others by their handler.
    pub deferred: u64,
    /// Messages moved to the dead letters.
    pub dead_lettered: u64,
    /// Messages acknowledged without having been handled.
    pub dropped: u64,
    /// Messages whose body could not be decoded.
    pub undecodable: u64,
    /// Messages that a layer did not believe.
    pub untrusted: u64,
    /// Messages whose time had passed.
    pub expired: u64,
    /// Messages that no handler takes.
    pub unwanted: u64,
    /// Attempts that panicked.
    pub panicked: u64,
    /// Attempts that did not end in their time.
    pub timed_out: u64,
    /// Handlers that run now.
    pub running: u64,
    /// Whether it is paused.
    pub paused: bool,
}

impl Control {
    pub(crate) fn new(concurrency: usize, prefetch: usize) -> Self {
        static SUBSCRIPTIONS: AtomicU64 = AtomicU64::new(1);
        let number = SUBSCRIPTIONS.fetch_add(1, Ordering::Relaxed);
        Self { concurrency: AtomicUsize::new(concurrency), prefetch, number, ..Self::default() }
    }

    pub(crate) fn set_consuming(&self, consuming: bool) {
        self.reopening.store(!consuming, Ordering::Release);
    }

    pub(crate) fn is_consuming(&self) -> bool {
        !self.reopening.load(Ordering::Acquire)
    }

    pub(crate) fn concurrency(&self) -> usize {
        self.concurrency.load(Ordering::Relaxed)
    }

    /// The most messages that are held at a time.
    pub(crate) fn prefetch(&self) -> usize {
        self.prefetch
    }

    pub(crate) fn set_concurrency(&self, limit: usize) {
        self.concurrency.store(limit.max(1), Ordering::Relaxed);
        self.changed.notify_one();
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.failures_in_a_row.store(0, Ordering::Relaxed);
        self.paused.store(paused, Ordering::Release);
        self.changed.notify_one();
    }

    /// Resolves when concurrency or pause were changed since the last call.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(crate) fn succeeded(&self, count: u64) {
        self.counters.handled.fetch_add(count, Ordering::Relaxed);
        if self.failures_in_a_row.load(Ordering::Relaxed) != 0 {
            self.failures_in_a_row.store(0, Ordering::Relaxed);
        }
    }

    /// Counts a failure; pauses when there were too many in a row.
    pub(crate) fn failed(&self, pause_after: Option<u32>) -> bool {
        self.counters.failed.fetch_add(1, Ordering::Relaxed);
        let in_a_row = self.failures_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
        let pause = pause_after.is_some_and(|limit| in_a_row >= limit) && !self.is_paused();
        if pause {
            self.set_paused(true);
        }
        pause
    }

    pub(crate) fn stats(&self) -> RouteStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        RouteStats {
            handled: read(&counters.handled),
            failed: read(&counters.failed),
            retried: read(&counters.retried),
            deferred: read(&counters.deferred),
            dead_lettered: read(&counters.dead_lettered),
            dropped: read(&counters.dropped),
            undecodable: read(&counters.undecodable),
            untrusted: read(&counters.untrusted),
            expired: read(&counters.expired),
            unwanted: read(&counters.unwanted),
            panicked: read(&counters.panicked),
            timed_out: read(&counters.timed_out),
            running: read(&counters.running),
            paused: self.is_paused(),
        }
    }
}
