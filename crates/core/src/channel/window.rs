//! The bound of what is sent and not answered yet.

use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::Notify;

/// Counts sends that wait for their answer. A semaphore would do, at four times the cost on the path where the
/// answer is at hand and nothing waits.
#[derive(Debug, Default)]
pub(super) struct Window {
    in_flight: AtomicUsize,
    waiting: AtomicUsize,
    room: Notify,
}

/// How much room lets a send start without a place: more threads than this do not start one at the same instant.
const PLENTY: usize = 64;

impl Window {
    /// Whether a message may be handed over first and counted afterwards, when its answer is not at hand.
    #[inline]
    pub(super) fn has_plenty(&self, limit: usize) -> bool {
        self.in_flight.load(Ordering::Relaxed) + PLENTY < limit
    }

    pub(super) fn enter_late(&self) -> Permit<'_> {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        Permit(self)
    }

    /// A place that was taken, until this is dropped.
    pub(super) fn permit(&self) -> Permit<'_> {
        Permit(self)
    }

    pub(super) fn try_enter(&self, limit: usize) -> bool {
        let room = |taken| (taken < limit).then_some(taken + 1);
        self.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, room).is_ok()
    }

    pub(super) async fn wait(&self, limit: usize) {
        // Counted before looking, so that a leaver either is seen here or sees this waiter.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(&self.waiting);
        loop {
            let room = self.room.notified();
            if self.try_enter(limit) {
                return;
            }
            room.await;
        }
    }

    /// How many sends wait for their answer.
    pub(super) fn taken(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(super) fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.room.notify_one();
        }
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A place in the window.
pub(super) struct Permit<'a>(&'a Window);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}
