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

use polymq_core::{Error, ErrorKind, Result};
use tokio::sync::watch;

pub(crate) use self::fetching::{Fetched, Room, Turn};
use self::state::State;
use crate::{
    NAME, context::Native, error, link::lock, position::Position, topology::Names, transactions::Transactions,
};

/// What consumers, handlers and the polling thread share.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) names: Names,
    state: Mutex<State>,
    /// There is room for more messages, or something is settled that somebody waits for.
    changed: Condvar,
    /// It reads: what comes from now on, is delivered.
    begun: watch::Sender<bool>,
    ended: watch::Sender<bool>,
    /// Where the subscription was moved to that this one takes over from, when that one has failed.
    resumed: Option<Position>,
    /// Where this one has moved its group to.
    moved: OnceLock<Position>,
    /// Commits positions in the place of plain commits, where what handlers send is part of them.
    transactions: OnceLock<Arc<Transactions>>,
}

impl Hub {
    pub(crate) fn new(names: Names) -> Arc<Self> {
        Self::resuming(names, None)
    }

    /// One that takes over from another one that has failed, and had moved its group there.
    pub(crate) fn resuming(names: Names, resumed: Option<Position>) -> Arc<Self> {
        Arc::new(Self {
            names,
            state: Mutex::default(),
            changed: Condvar::new(),
            begun: watch::Sender::new(false),
            ended: watch::Sender::new(false),
            resumed,
            moved: OnceLock::new(),
            transactions: OnceLock::new(),
        })
    }

    /// Whether a consumer that asks for this position is one that had been moved there before it was opened again by itself.
    pub(crate) fn resumes(&self, seek: Option<Position>) -> bool {
        seek.is_some() && seek == self.resumed
    }

    /// What the one that takes over from this one needs to know. One that was closed in order has no successor: whoever comes
    /// next is new.
    pub(crate) fn to_be_resumed(&self) -> Option<Position> {
        let failed = lock(&self.state).end.is_some();
        self.moved.get().copied().or(self.resumed).filter(|_| failed)
    }

    /// It reads, from where its group was moved to.
    pub(crate) fn set_begun(&self, moved: Option<Position>) {
        if let Some(position) = moved {
            let _ = self.moved.set(position);
        }
        self.begun.send_replace(true);
    }

    /// Waits until it reads; the error is the one with which it has ended before that.
    pub(crate) async fn begun(&self) -> Result<()> {
        let (mut begun, mut ended) = (self.begun.subscribe(), self.ended());
        tokio::select! {
            biased;
            _ = begun.wait_for(|begun| *begun) => Ok(()),
            _ = ended.wait_for(|ended| *ended) => Err(match &lock(&self.state).end {
                Some((kind, text)) => Error::new(*kind, text.clone()).with_backend(NAME).with_operation("consume"),
                None => error::closed("consume"),
            }),
        }
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
        state.returned.clear();
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
