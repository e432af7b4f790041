//! Numbers of channels, of every pattern: each is one channel's until nobody has that channel any more, not even the one
//! who still settles what it holds of it.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex},
};

use crate::{log::lock, refusal::Refusal, store::MOST_CHANNELS, store::StoredChannel};

#[derive(Debug)]
pub(crate) struct Numbers(Mutex<State>);

#[derive(Debug)]
struct State {
    /// The one that was given last.
    last: u32,
    /// Those that are somebody's.
    taken: HashSet<u32>,
}

/// The number of a channel. Nobody else gets it before this is dropped.
#[derive(Debug)]
pub(crate) struct Number {
    id: u32,
    of: Arc<Numbers>,
}

impl Numbers {
    /// What is stored has its numbers already.
    pub(crate) fn after(stored: &[StoredChannel]) -> Arc<Self> {
        let taken: HashSet<_> = stored.iter().map(|channel| channel.id).collect();
        let last = taken.iter().copied().max().unwrap_or(0);
        Arc::new(Self(Mutex::new(State { last, taken })))
    }

    /// The number of a channel that is stored.
    pub(crate) fn stored(self: &Arc<Self>, channel: &StoredChannel) -> Number {
        Number { id: channel.id, of: Arc::clone(self) }
    }

    /// A number that is nobody's: the next one, and after the highest one the first one that is free again.
    pub(crate) fn next(self: &Arc<Self>) -> Result<Number, Refusal> {
        let mut state = lock(&self.0);
        if state.taken.len() >= MOST_CHANNELS as usize {
            return Err(Refusal::channels(MOST_CHANNELS as usize));
        }
        loop {
            let id = state.last % MOST_CHANNELS + 1;
            state.last = id;
            if state.taken.insert(id) {
                return Ok(Number { id, of: Arc::clone(self) });
            }
        }
    }
}

impl Number {
    pub(crate) fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for Number {
    fn drop(&mut self) {
        lock(&self.of.0).taken.remove(&self.id);
    }
}
