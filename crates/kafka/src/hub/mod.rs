//! One membership in a consumer group, shared by all consumers of this connection that read the same channel.
//!
//! The thread of [`poller`](crate::poller) fetches and commits; consumers take what has come, each up to its own
//! prefetch, and settle it. So consumers of one process share a partition, and only other processes need others.

mod assignment;
mod consumers;
mod fetching;
mod settling;
mod state;

use std::sync::{Arc, Condvar, Mutex, OnceLock};

use polymq_core::ErrorKind;
use tokio::sync::watch;

pub(crate) use self::fetching::{Fetched, Turn};
use self::state::State;
use crate::{context::Native, link::lock, topology::Names, transactions::Transactions};

/// What consumers, handlers and the polling thread share.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) names: Names,
    state: Mutex<State>,
    /// There is room for more messages, or something is settled that somebody waits for.
    changed: Condvar,
    ended: watch::Sender<bool>,
    /// Commits positions in the place of plain commits, where what handlers send is part of them.
    transactions: OnceLock<Arc<Transactions>>,
}

impl Hub {
    pub(crate) fn new(names: Names) -> Arc<Self> {
        Arc::new(Self {
            names,
            state: Mutex::default(),
            changed: Condvar::new(),
            ended: watch::Sender::new(false),
            transactions: OnceLock::new(),
        })
    }

    pub(crate) fn set_transactions(&self, transactions: Arc<Transactions>) {
        let _ = self.transactions.set(transactions);
    }

    pub(crate) fn transactions(&self) -> Option<&Arc<Transactions>> {
        self.transactions.get()
    }

    fn topic(&self, is_delay: bool) -> &str {
        match &self.names.delay {
            Some(delay) if is_delay => delay,
            _ => &self.names.topic,
        }
    }

    /// Reading is over; what nobody has settled can be settled no more.
    pub(crate) fn fail(&self, kind: ErrorKind, text: &str) {
        let mut state = lock(&self.state);
        state.end.get_or_insert_with(|| (kind, text.to_owned()));
        state.leaving = true;
        state.notify_all();
        self.changed.notify_all();
    }

    pub(crate) fn set_native(&self, native: Option<Arc<Native>>) -> Option<Arc<Native>> {
        std::mem::replace(&mut lock(&self.state).native, native)
    }

    pub(crate) fn native(&self) -> Option<Arc<Native>> {
        lock(&self.state).native.clone()
    }

    /// From here on nothing is received or settled: what is done by now is what will be committed.
    pub(crate) fn seal(&self) {
        let mut state = lock(&self.state);
        (state.leaving, state.sealed) = (true, true);
        state.ready.clear();
        state.held.clear();
        state.notify_all();
    }

    /// The polling thread has ended.
    pub(crate) fn set_ended(&self) {
        self.seal();
        lock(&self.state).slots.clear();
        self.ended.send_replace(true);
    }

    pub(crate) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }
}
        state.returned.clear();
