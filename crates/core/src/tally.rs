//! Counts what a producer has handed over and not had answered, so that a flush waits for that and for nothing later.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::Notify;

/// What a producer has handed over and not had answered: for backends whose client cannot flush as
/// [`Producer::flush`](crate::Producer::flush) must.
#[derive(Debug, Default)]
pub struct Tally {
    state: Mutex<State>,
    less: Arc<Notify>,
}

#[derive(Debug, Default)]
struct State {
    /// What was handed over since the last flush; none yet.
    current: Option<Arc<Open>>,
    /// What flushes wait for.
    earlier: Vec<Weak<Open>>,
}

/// Alive as long as a message of the time between two flushes is not answered.
#[derive(Debug)]
struct Open(Arc<Notify>);

/// A message that is not answered, or several with a clone for each: dropped with its answer.
#[derive(Debug, Clone)]
pub struct Ticket(#[allow(dead_code)] Arc<Open>); // held to be dropped

impl Tally {
    /// Counts a message until the ticket is dropped.
    #[must_use]
    pub fn ticket(&self) -> Ticket {
        let mut state = self.lock();
        let open = state.current.get_or_insert_with(|| Arc::new(Open(Arc::clone(&self.less))));
        Ticket(Arc::clone(open))
    }

    /// Waits for everything that has a ticket when this is polled first, and for nothing later. Dropping the future changes
    /// nothing for those who wait beside it.
    pub async fn flush(&self) {
        let awaited = {
            let mut state = self.lock();
            let current = state.current.take();
            state.earlier.extend(current.as_ref().map(Arc::downgrade));
            state.earlier.retain(|open| open.strong_count() > 0);
            state.earlier.clone()
        };
        loop {
            let less = self.less.notified();
            tokio::pin!(less);
            less.as_mut().enable();
            if awaited.iter().all(|open| open.strong_count() == 0) {
                return;
            }
            less.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_flush_waits_for_what_was_before_it() {
        let tally = Tally::default();
        assert!(tally.flush().now_or_never().is_some());
        let (one, two) = (tally.ticket(), tally.ticket());
        let mut flush = Box::pin(tally.flush());
        assert!(flush.as_mut().now_or_never().is_none());
        let later = tally.ticket();
        drop(two);
        assert!(flush.as_mut().now_or_never().is_none());
        drop(one);
        assert!(flush.as_mut().now_or_never().is_some());
        drop(later);
        assert!(tally.flush().now_or_never().is_some());
    }
}
