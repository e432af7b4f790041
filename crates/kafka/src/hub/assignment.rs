//! Partitions that come and go, and the positions in them that are to be committed.

use std::{
    sync::PoisonError,
    time::{Duration, Instant},
};

use rdkafka::{Offset, TopicPartitionList};

use super::{Hub, state::State};
use crate::{
    convert::legible,
    link::lock,
    partition::{Entry, Partition},
};

impl Hub {
    /// Partitions that were assigned, at their committed positions.
    pub(crate) fn assigned(&self, list: &TopicPartitionList, ours: bool) {
        let mut state = lock(&self.state);
        for element in list.elements() {
            let is_delay = element.topic() != &*self.names.topic;
            let position = match element.offset() {
                Offset::Offset(offset) if offset >= 0 => Some(offset),
                _ => None,
            };
            state.drop_partition(is_delay, element.partition());
            // Those of others, which may be no text, are nothing to us.
            let metadata = if ours { legible(|| element.metadata()).unwrap_or_default() } else { "" };
            state.add(Partition::at(is_delay, element.partition(), position, metadata));
        }
        drop(state);
        self.renew_positions();
    }

    /// Positions are committed again, though nothing has changed. Those in the delay topic, because Kafka forgets them some days
    /// after their last commit, as the group subscribes to the topic only, and keeps the messages for longer. All that we have
    /// committed, because nobody tells when the broker has refused that, as it does while partitions are shared anew.
    pub(crate) fn renew_positions(&self) {
        lock(&self.state).slots.values_mut().for_each(Partition::renew);
    }

    /// Partitions that go to another consumer: what nobody has received is forgotten, and handlers that run may end, for
    /// a while. What is to be committed.
    pub(crate) fn revoking(&self, list: &TopicPartitionList, wait: Duration) -> TopicPartitionList {
        let deadline = Instant::now() + wait;
        let mut state = lock(&self.state);
        let gone = state.slots_of(list, &self.names);
        state.forget_unreceived(&gone);
        loop {
            let busy = gone.iter().filter_map(|slot| state.slots.get(slot));
            let busy = busy.flat_map(Partition::entries).any(Entry::is_out);
            let left = deadline.saturating_duration_since(Instant::now());
            if !busy || left.is_zero() || state.end.is_some() {
                return self.positions(&mut state, |slot, partition| partition.touched && gone.contains(&slot));
            }
            state.wants_rest = true;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.wants_rest = false;
            // What is returned meanwhile is not for us either.
            state.forget_unreceived(&gone);
        }
    }

    /// They are gone: their tokens are stale.
    pub(crate) fn revoked(&self, list: &TopicPartitionList) {
        let mut state = lock(&self.state);
        for slot in state.slots_of(list, &self.names) {
            state.drop_slot(slot);
        }
    }

    /// The client is gone, and all partitions with it: their tokens are stale. Where another one goes on without a group.
    pub(crate) fn abandoned(&self) -> TopicPartitionList {
        let mut state = lock(&self.state);
        let list = self.positions(&mut state, |_, partition| !partition.is_delay);
        let all: Vec<u32> = state.slots.keys().copied().collect();
        all.into_iter().for_each(|slot| state.drop_slot(slot));
        list
    }

    /// Those of them that are not ours.
    pub(crate) fn missing(&self, partitions: &[i32]) -> Vec<i32> {
        let state = lock(&self.state);
        partitions.iter().copied().filter(|number| state.find(false, *number).is_none()).collect()
    }

    /// Whether the first partition of the topic is ours.
    pub(crate) fn has_first(&self) -> bool {
        lock(&self.state).find(false, 0).is_some()
    }

    /// Whether anything has changed since the last commit.
    pub(crate) fn has_changes(&self) -> bool {
        lock(&self.state).slots.values().any(|partition| partition.dirty)
    }

    /// What has changed since the last call, to be committed.
    pub(crate) fn changes(&self) -> TopicPartitionList {
        let mut state = lock(&self.state);
        self.positions(&mut state, |_, partition| partition.dirty)
    }

    /// Everything that has changed at all, for the last commit.
    pub(crate) fn all_changes(&self) -> TopicPartitionList {
        let mut state = lock(&self.state);
        self.positions(&mut state, |_, partition| partition.touched)
    }

    /// A commit has failed: these are to be committed again, but for those that have come anew meanwhile.
    pub(crate) fn not_committed(&self, list: &TopicPartitionList) {
        let mut state = lock(&self.state);
        for slot in state.slots_of(list, &self.names) {
            if let Some(partition) = state.slots.get_mut(&slot) {
                partition.dirty = partition.touched;
            }
        }
    }

    fn positions(&self, state: &mut State, wanted: impl Fn(u32, &Partition) -> bool) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for (slot, partition) in &mut state.slots {
            if !wanted(*slot, partition) {
                continue;
            }
            partition.dirty = false;
            let topic = self.topic(partition.is_delay);
            // A position of our own making cannot be invalid.
            if list.add_partition_offset(topic, partition.number, Offset::Offset(partition.position())).is_ok()
                && let Some(mut element) = list.find_partition(topic, partition.number)
            {
                element.set_metadata(partition.metadata());
            }
        }
        list
    }

    /// How many messages wait in a partition that ends at `high`; `None` when it is not ours.
    pub(crate) fn waiting(&self, number: i32, high: i64) -> Option<u64> {
        let state = lock(&self.state);
        let slot = state.find(false, number)?;
        state.slots.get(&slot).map(|partition| partition.waiting(high))
    }
}

#[cfg(test)]
mod tests {
    use polymq_core::Address;

    use super::*;
    use crate::topology::Names;

    /// What is to be committed: topic, partition and offset.
    fn changes(hub: &Hub) -> Vec<(String, i32, Offset)> {
        let list = hub.changes();
        list.elements().iter().map(|one| (one.topic().to_owned(), one.partition(), one.offset())).collect()
    }

    #[test]
    fn positions_in_the_delay_topic_are_renewed() {
        let hub = Hub::new(Names::of(&Address::queue("orders"), None));
        let mut list = TopicPartitionList::new();
        for (topic, partition, offset) in [
            ("orders", 0, Offset::Offset(7)),
            ("orders.delay", 0, Offset::Offset(5)),
            ("orders.delay", 1, Offset::Invalid),
            ("orders.delay", 2, Offset::Offset(0)),
        ] {
            list.add_partition_offset(topic, partition, offset).expect("an offset");
        }
        hub.assigned(&list, true);
        let renewed = [("orders.delay".to_owned(), 0, Offset::Offset(5))];
        assert_eq!(changes(&hub), renewed, "with the assignment");
        assert_eq!(changes(&hub), [], "once");
        hub.renew_positions();
        assert_eq!(changes(&hub), renewed, "and now and then");
        hub.not_committed(&list);
        assert_eq!(changes(&hub), renewed, "and after a commit that failed, and nothing else");
    }
}
