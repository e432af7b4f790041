//! What the polling thread does between two fetches: takes in what has come, waits for room, holds back what is too much.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

use polymq_core::Message;
use rdkafka::TopicPartitionList;

use super::Hub;
use crate::link::lock;

/// The most messages and bytes of one partition that wait here for their time. What is behind them waits with the broker.
const MAX_HELD: usize = 1000;
const MAX_HELD_BYTES: usize = 16 * 1024 * 1024;

/// The most records that are handed over at once. Each time may wake a consumer up, which costs as much as some of them.
const SLICE: usize = 512;

/// A message as it was fetched.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) is_delay: bool,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    /// Milliseconds since 1970 when the broker took it.
    pub(crate) taken_at: Option<u64>,
    pub(crate) message: Message,
    pub(crate) due: Option<Instant>,
}

/// What the polling thread is to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Fetch this many at most; something is due at that time.
    Fetch(usize, Option<Instant>),
    /// Everything that may be fetched is.
    Full,
    /// Nobody is left.
    Leave,
}

impl Hub {
    /// What to do next; what is due by now is ready.
    pub(crate) fn turn(&self, now: Instant) -> Turn {
        let mut state = lock(&self.state);
        state.release_due(now);
        if state.end.is_some() || (state.shares.is_empty() && state.unsettled == 0) {
            state.leaving = true;
            return Turn::Leave;
        }
        match state.room() {
            0 => Turn::Full,
            // Not all at once: consumers go on with the first ones while the next ones are fetched.
            room => {
                Turn::Fetch(room.min(state.most.div_ceil(2)).min(SLICE), state.held.keys().next().map(|(due, _)| *due))
            }
        }
    }

    /// Waits until there is enough room to be worth fetching, nothing left to receive, or something to commit: `true`.
    pub(crate) fn wait_for_room(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut state = lock(&self.state);
        loop {
            if state.is_worth_fetching() || state.end.is_some() || !state.flushing.is_empty() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || (state.shares.is_empty() && state.unsettled == 0) {
                return state.room() > 0;
            }
            state.wants_room = true;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.wants_room = false;
        }
    }

    /// Takes in what was fetched.
    pub(crate) fn take_in(&self, batch: &mut Vec<Fetched>) {
        let mut state = lock(&self.state);
        state.take_in(batch);
        state.notify();
    }

    /// Partitions of which too much waits for its time, and those of which there is room again.
    pub(crate) fn fullness(&self) -> (TopicPartitionList, TopicPartitionList) {
        let (mut full, mut again) = (TopicPartitionList::new(), TopicPartitionList::new());
        let mut state = lock(&self.state);
        for partition in state.slots.values_mut() {
            let is_full = partition.held >= MAX_HELD || partition.held_bytes >= MAX_HELD_BYTES;
            let has_room = partition.held < MAX_HELD / 2 && partition.held_bytes < MAX_HELD_BYTES / 2;
            if is_full && !partition.is_full {
                partition.is_full = true;
                full.add_partition(self.topic(partition.is_delay), partition.number);
            } else if has_room && partition.is_full {
                partition.is_full = false;
                again.add_partition(self.topic(partition.is_delay), partition.number);
            }
        }
        (full, again)
    }

    /// Whether anything waits for its time, or did so too much.
    pub(crate) fn is_holding(&self) -> bool {
        let state = lock(&self.state);
        !state.held.is_empty() || state.slots.values().any(|partition| partition.is_full)
    }

    /// All partitions of which too much waits for its time.
    pub(crate) fn full(&self) -> TopicPartitionList {
        let mut full = TopicPartitionList::new();
        for partition in lock(&self.state).slots.values().filter(|partition| partition.is_full) {
            full.add_partition(self.topic(partition.is_delay), partition.number);
        }
        full
    }
}
