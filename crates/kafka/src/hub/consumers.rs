//! Consumers: each joins, takes what has come up to its own prefetch, and parts.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use polymq_core::{Details, Error, Incoming, Result};
use tokio::sync::{Notify, oneshot};

use super::{
    Hub,
    state::{Share, State, Waiting, parts},
};
use crate::{NAME, error, link::lock, partition::Place};

/// Where a message comes from.
struct Origin {
    partition: i32,
    offset: i64,
    taken_at: Option<u64>,
}

impl Origin {
    fn details(self) -> Details {
        Details {
            broker_time: self.taken_at.map(|millis| SystemTime::UNIX_EPOCH + Duration::from_millis(millis)),
            sequence: u64::try_from(self.offset).ok(),
            partition: Some(self.partition),
            ..Details::default()
        }
    }
}

impl Hub {
    /// Adds a consumer; `None` when it is too late.
    pub(crate) fn join(&self, prefetch: usize, bytes: usize) -> Option<(u32, Arc<Notify>)> {
        let mut state = lock(&self.state);
        if state.leaving || state.end.is_some() {
            return None;
        }
        let number = state.next_share;
        state.next_share += 1;
        let arrived = Arc::new(Notify::new());
        let share = Share {
            prefetch: prefetch.max(1),
            bytes: bytes.max(1),
            taken: 0,
            taken_bytes: 0,
            arrived: Arc::clone(&arrived),
        };
        state.shares.insert(number, share);
        state.sum_up();
        state.notify();
        self.changed.notify_all();
        Some((number, arrived))
    }

    /// Takes a consumer away. What it has received can still be settled.
    pub(crate) fn part(&self, share: u32) {
        let mut state = lock(&self.state);
        if let Some(share) = state.shares.remove(&share) {
            // Its reader, if it is waiting, learns that it is closed.
            share.arrived.notify_one();
            state.sum_up();
        }
        // What this one was woken for is the others'.
        state.notify();
        self.changed.notify_all();
    }

    /// Takes what has come; `None` when there is nothing.
    pub(crate) fn take(&self, number: u32, max: usize, into: &mut Vec<Incoming>) -> Option<Result<()>> {
        let before = into.len();
        let mut origins: Vec<Origin> = Vec::new();
        let mut state = lock(&self.state);
        let State { shares, ready, slots, unsettled, end, .. } = &mut *state;
        let Some(share) = shares.get_mut(&number) else {
            return Some(Err(match end {
                Some((kind, text)) => Error::new(*kind, text.clone()).with_backend(NAME).with_operation("receive"),
                None => error::closed("receive"),
            }));
        };
        while into.len() - before < max
            && share.taken < share.prefetch
            && (share.taken == 0 || share.taken_bytes < share.bytes)
            && let Some(Waiting { message, token, taken_at }) = ready.pop_front()
        {
            let (slot, number_in) = parts(token);
            let Some(partition) = slots.get_mut(&slot) else { continue };
            let offset = partition.base + number_in;
            let Some(entry) = partition.entry(offset) else { continue };
            entry.place = Place::With(number);
            share.taken += 1;
            share.taken_bytes += entry.bytes();
            *unsettled += 1;
            origins.push(Origin { partition: partition.number, offset, taken_at });
            into.push(Incoming::new(message, token));
        }
        if into.len() == before {
            let (kind, text) = end.as_ref()?;
            return Some(Err(Error::new(*kind, text.clone()).with_backend(NAME).with_operation("receive")));
        }
        drop(state);
        // Made by the thread that drops them, and while nobody waits for the lock.
        for (incoming, origin) in into[before..].iter_mut().zip(origins) {
            incoming.details = Some(Box::new(origin.details()));
        }
        Some(Ok(()))
    }

    /// Hears when everything that was acknowledged until now is committed, unless the hub ends with that.
    pub(crate) fn committed(&self) -> oneshot::Receiver<()> {
        let (told, committed) = oneshot::channel();
        let mut state = lock(&self.state);
        state.flushing.push(told);
        // The polling thread does not sleep until there is room.
        self.changed.notify_all();
        committed
    }

    /// Those who wait for a commit while somebody still holds messages or reads: the end of the hub answers the others.
    pub(crate) fn flushing(&self) -> Vec<oneshot::Sender<()>> {
        let mut state = lock(&self.state);
        if state.shares.is_empty() && state.unsettled == 0 {
            return Vec::new();
        }
        std::mem::take(&mut state.flushing)
    }

    /// How many consumers of this connection share it.
    pub(crate) fn consumers(&self) -> usize {
        lock(&self.state).shares.len()
    }

    /// Messages with consumers of this connection.
    pub(crate) fn unsettled(&self) -> usize {
        lock(&self.state).unsettled
    }
}
