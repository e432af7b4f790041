//! Counts what a producer has handed over and not had answered, so that a flush waits for that and for nothing later.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tokio::sync::Notify;

use crate::link::lock;

#[derive(Debug, Default)]
pub(crate) struct Tally {
    state: Mutex<State>,
    less: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Counts the flushes; a message belongs to the one that comes next.
    flushes: u64,
    open: BTreeMap<u64, usize>,
}

/// One message that is not answered; dropped with its answer.
#[derive(Debug)]
pub(crate) struct Ticket {
    tally: Arc<Tally>,
    flush: u64,
}

impl Tally {
    pub(crate) fn ticket(self: &Arc<Self>) -> Ticket {
        let mut state = lock(&self.state);
        let flush = state.flushes;
        *state.open.entry(flush).or_default() += 1;
        Ticket { tally: Arc::clone(self), flush }
    }

    /// Waits for everything that has a ticket by now.
    pub(crate) async fn flush(&self) {
        let flush = {
            let mut state = lock(&self.state);
            state.flushes += 1;
            state.flushes
        };
        loop {
            let less = self.less.notified();
            tokio::pin!(less);
            less.as_mut().enable();
            if lock(&self.state).open.keys().next().is_none_or(|first| *first >= flush) {
                return;
            }
            less.await;
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = lock(&self.tally.state);
        if let Some(count) = state.open.get_mut(&self.flush) {
            *count -= 1;
            if *count == 0 {
                state.open.remove(&self.flush);
                self.tally.less.notify_waiters();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_flush_waits_for_what_was_before_it() {
        let tally = Arc::new(Tally::default());
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
