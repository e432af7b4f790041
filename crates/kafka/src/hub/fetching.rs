//! What the polling thread does between two fetches: takes in what has come, waits for room, holds back what is too much.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

use rdkafka::TopicPartitionList;

use super::Hub;
use crate::{link::lock, record::Content};

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
    pub(crate) content: Content,
    pub(crate) due: Option<Instant>,
}

/// How much may be fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    pub(crate) messages: usize,
    /// The message that reaches this number is the last one.
    pub(crate) bytes: usize,
}

/// What the polling thread is to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Fetch no more than there is room for; something is due at that time.
    Fetch(Room, Option<Instant>),
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
                let messages = room.min(state.most.div_ceil(2)).min(SLICE);
                let bytes = state.most_bytes.saturating_sub(state.fetched_bytes);
                Turn::Fetch(Room { messages, bytes }, state.held.keys().next().map(|(due, _)| *due))
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

#[cfg(test)]
mod tests {
    use polymq_core::{Address, Message};
    use rdkafka::Offset;

    use super::*;
    use crate::{bodies::Bodies, topology::Names};

    #[test]
    fn what_is_fetched_takes_room_of_messages_and_of_bytes() {
        let hub = Hub::new(Names::of(&Address::queue("orders"), None));
        let message = Message::new(vec![0; 400]);
        let size = message.size();
        let most = 2 * size + 1;
        let (share, _) = hub.join(4, most).expect("it has just begun");
        let mut list = TopicPartitionList::new();
        list.add_partition_offset("orders", 0, Offset::Offset(0)).expect("an offset");
        hub.assigned(&list, true);
        let room = |messages, bytes| Turn::Fetch(Room { messages, bytes }, None);
        assert_eq!(hub.turn(Instant::now()), room(2, most), "half of it at a time");
        let fetched = |offset| Fetched {
            is_delay: false,
            partition: 0,
            offset,
            content: Content::Message { message: message.clone(), taken_at: None },
            due: None,
        };
        hub.take_in(&mut vec![fetched(0), fetched(1)]);
        assert_eq!(hub.turn(Instant::now()), room(2, 1));
        hub.take_in(&mut vec![fetched(2)]);
        assert_eq!(hub.turn(Instant::now()), Turn::Full, "a message is left, but no byte");
        let mut taken = Vec::new();
        hub.take(share, 1, &mut Bodies::default(), &mut taken).expect("there is some").expect("it goes on");
        hub.ack(&[taken[0].token]).expect("ours");
        assert_eq!(hub.turn(Instant::now()), room(2, 1));
    }
}
