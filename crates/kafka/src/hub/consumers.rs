//! Consumers: each joins, takes what has come up to its own prefetch, and parts.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use polymq_core::{Details, Error, Incoming, Result, Token};
use tokio::sync::{Notify, oneshot};

use super::{
    Hub,
    state::{Share, State, Waiting, parts},
};
use crate::{NAME, bodies::Bodies, error, link::lock, partition::Place, record::Content};

/// What a consumer has taken, and where it comes from.
struct Taken {
    content: Content,
    token: Token,
    partition: i32,
    offset: i64,
}

impl Taken {
    fn read(self, bodies: &mut Bodies) -> Incoming {
        let (message, taken_at) = self.content.read(|body| bodies.keep(body));
        let mut incoming = Incoming::new(message, self.token);
        incoming.details = Some(Box::new(Details {
            broker_time: taken_at.map(|millis| SystemTime::UNIX_EPOCH + Duration::from_millis(millis)),
            sequence: u64::try_from(self.offset).ok(),
            partition: Some(self.partition),
            ..Details::default()
        }));
        incoming
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
    pub(crate) fn take(
        &self,
        number: u32,
        max: usize,
        bodies: &mut Bodies,
        into: &mut Vec<Incoming>,
    ) -> Option<Result<()>> {
        let mut all: Vec<Taken> = Vec::new();
        let mut state = lock(&self.state);
        let State { shares, ready, slots, unsettled, end, .. } = &mut *state;
        let Some(share) = shares.get_mut(&number) else {
            return Some(Err(match end {
                Some((kind, text)) => Error::new(*kind, text.clone()).with_backend(NAME).with_operation("receive"),
                None => error::closed("receive"),
            }));
        };
        while all.len() < max
            && share.taken < share.prefetch
            && (share.taken == 0 || share.taken_bytes < share.bytes)
            && let Some(Waiting { content, token }) = ready.pop_front()
        {
            let (slot, number_in) = parts(token);
            let Some(partition) = slots.get_mut(&slot) else { continue };
            let offset = partition.base + number_in;
            let Some(entry) = partition.entry(offset) else { continue };
            entry.place = Place::With(number);
            share.taken += 1;
            share.taken_bytes += entry.bytes();
            *unsettled += 1;
            all.push(Taken { content, token, partition: partition.number, offset });
        }
        if all.is_empty() {
            let (kind, text) = end.as_ref()?;
            return Some(Err(Error::new(*kind, text.clone()).with_backend(NAME).with_operation("receive")));
        }
        drop(state);
        // Made by the thread that drops them, and while nobody waits for the lock.
        let mut larger = Vec::new();
        into.extend(all.into_iter().map(|taken| {
            let told = taken.content.bytes();
            let incoming = taken.read(bodies);
            let bytes = incoming.message.size();
            if bytes > told {
                larger.push((incoming.token, bytes - told));
            }
            incoming
        }));
        if !larger.is_empty() {
            self.add_bytes(&larger);
        }
        Some(Ok(()))
    }

    /// Messages that are larger than was known when they were fetched.
    fn add_bytes(&self, larger: &[(Token, usize)]) {
        let mut state = lock(&self.state);
        for (token, more) in larger {
            let Some(entry) = state.claimed(*token) else { continue };
            let (more, place) = (entry.grow(*more), entry.place);
            state.fetched_bytes += more;
            if let Place::With(share) = place
                && let Some(share) = state.shares.get_mut(&share)
            {
                share.taken_bytes += more;
            }
        }
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
