//! A channel's row in the store: what is put into the channel brings it along until it is known to be stored, so that
//! nothing is ever stored without it.

use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use crate::{
    log::lock,
    numbers::{Number, Numbers},
    store::{Admitted, Change, Store, StoreError, StoredChannel},
};

/// Of one channel. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Row(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    number: Number,
    kind: u8,
    name: String,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// It comes along with what is put into the channel.
    New,
    Stored,
    /// It comes no more.
    Removed,
}

impl Row {
    /// Of a channel that is stored.
    pub(crate) fn of(channel: &StoredChannel, numbers: &Arc<Numbers>) -> Self {
        Self::new(numbers.stored(channel), channel, State::Stored)
    }

    fn new(number: Number, channel: &StoredChannel, state: State) -> Self {
        let (kind, name) = (channel.kind, channel.name.clone());
        Self(Arc::new(Inner { number, kind, name, state: Mutex::new(state) }))
    }

    /// Makes an empty channel. Nobody has to wait for it.
    pub(crate) fn make(store: &Store, number: Number, kind: u8, name: &str) -> (Self, StoredChannel) {
        let (id, name) = (number.id(), name.to_owned());
        let channel = StoredChannel { id, kind, name, next: 1, count: 0, bytes: 0, delayed: 0, first: None };
        let row = Self::new(number, &channel, State::New);
        row.commit(store, Vec::new(), None, drop);
        (row, channel)
    }

    /// As [`Store::commit`], for what is put into the channel: refused with [`StoreError::Gone`] when that was deleted.
    pub(crate) fn commit(
        &self,
        store: &Store,
        mut changes: Vec<Change>,
        admitted: Option<Admitted>,
        then: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        // Held until it is handed over: after a removal it comes no more.
        let state = lock(&self.0.state);
        if *state != State::New {
            return store.commit(changes, admitted, then);
        }
        changes.insert(0, Change::Channel { id: self.0.number.id(), kind: self.0.kind, name: self.0.name.clone() });
        let row = self.clone();
        store.commit(changes, admitted, move |result| {
            if result.is_ok() {
                let mut state = lock(&row.0.state);
                if *state == State::New {
                    *state = State::Stored;
                }
            }
            then(result);
        });
    }

    /// Waits until the channel is on disk, and stores it anew when that failed before; [`StoreError::Gone`] when it was deleted.
    pub(crate) async fn stored(&self, store: &Store) -> Result<(), StoreError> {
        let (done, waits) = oneshot::channel();
        self.commit(store, Vec::new(), None, |result| drop(done.send(result)));
        waits.await.unwrap_or(Err(StoreError::Closed))?;
        if *lock(&self.0.state) == State::Removed { Err(StoreError::Gone) } else { Ok(()) }
    }

    /// Removes the channel with everything in it.
    pub(crate) fn remove(&self, store: &Store, then: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
        let mut state = lock(&self.0.state);
        *state = State::Removed;
        let row = self.clone();
        store.commit(vec![Change::RemoveChannel(self.0.number.id())], None, move |result| {
            if result.is_err() {
                *lock(&row.0.state) = State::New;
            }
            then(result);
        });
    }
}
