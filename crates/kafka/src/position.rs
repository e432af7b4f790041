//! Where a group begins, or begins again: the option `position` of a consumer.

use std::{
    thread,
    time::{Duration, Instant, SystemTime},
};

use polymq_core::{Error, ErrorKind, Result};
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer},
    error::KafkaError,
    types::RDKafkaErrorCode as Code,
};

use crate::{
    context::Native,
    error,
    topology::{self, Names},
};

/// A place in a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Position {
    /// The oldest message that is kept.
    First,
    /// After the newest message.
    End,
    /// This many messages before the end, in each partition.
    Last(i64),
    /// This offset, in each partition.
    Offset(i64),
    /// The first message that the broker took at this time or later.
    Time(SystemTime),
}

impl Position {
    /// Reads `first`, `end`, `last:10`, `offset:4711` and `time:2026-01-02T03:04:05Z`.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let (word, argument) = text.split_once(':').unwrap_or((text, ""));
        let number = || argument.parse().ok().filter(|number: &i64| *number >= 0);
        let found = match (word, argument) {
            ("first", "") => Some(Self::First),
            ("end", "") => Some(Self::End),
            ("last", _) => number().map(Self::Last),
            ("offset", _) => number().map(Self::Offset),
            ("time", _) => humantime::parse_rfc3339_weak(argument).ok().map(Self::Time),
            _ => None,
        };
        found.ok_or_else(|| {
            error::config(format!("option \"position\": {text:?} is not valid"))
                .with_hint("write first, end, last:10, offset:4711 or time:2026-01-02T03:04:05Z")
        })
    }

    /// The offsets of this place. Blocks.
    pub(crate) fn offsets(
        self,
        consumer: &Native,
        topic: &str,
        partitions: &[i32],
        timeout: Duration,
    ) -> Result<TopicPartitionList> {
        let failed = |error| error::native("consume", error).with_channel(topic);
        let mut list = TopicPartitionList::new();
        if let Self::Time(time) = self {
            let millis = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_millis();
            let millis = i64::try_from(millis).unwrap_or(i64::MAX);
            for partition in partitions {
                list.add_partition_offset(topic, *partition, Offset::Offset(millis)).map_err(failed)?;
            }
            list = consumer.offsets_for_times(list, timeout).map_err(failed)?;
        }
        let mut found = TopicPartitionList::new();
        for partition in partitions {
            let (low, high) = consumer.fetch_watermarks(topic, *partition, timeout).map_err(failed)?;
            let offset = match self {
                Self::First => low,
                Self::End => high,
                Self::Last(count) => (high - count).max(low),
                Self::Offset(offset) => offset.clamp(low, high),
                Self::Time(_) => match list.find_partition(topic, *partition).map(|found| found.offset()) {
                    Some(Offset::Offset(offset)) => offset,
                    // Nothing is that young.
                    _ => high,
                },
            };
            found.add_partition_offset(topic, *partition, Offset::Offset(offset)).map_err(failed)?;
        }
        Ok(found)
    }
}

/// How soon the coordinator of a group is asked again that is about to be another one.
const MOVED: Duration = Duration::from_millis(100);

/// Commits where a group begins, unless it has a position: from now on it misses nothing. Blocks.
pub(crate) fn begin_at(
    native: &Native,
    names: &Names,
    start: Position,
    seek: Option<Position>,
    timeout: Duration,
) -> Result<()> {
    if names.is_queue && seek.is_none() {
        // The oldest message, which is where a group without a position begins.
        return Ok(());
    }
    let topic = &*names.topic;
    let failed = |error| error::native("consume", error).with_channel(topic);
    let partitions = topology::existing(native.client(), topic, timeout)?;
    let known = native.committed_offsets(topology::list(topic, &partitions), timeout).map_err(failed)?;
    let any_position = known.elements().iter().any(|found| matches!(found.offset(), Offset::Offset(_)));
    if seek.is_none() && any_position {
        // It has begun. A partition without a position was added since, and is read from its beginning.
        return Ok(());
    }
    let list = seek.unwrap_or(start).offsets(native, topic, &partitions, timeout)?;
    // Another process may have begun meanwhile, and from where it begins nothing is to be missed. Kafka commits under no
    // condition, so what is left is a moment.
    let not_begun = || match seek {
        Some(_) => Ok(list.clone()),
        None => without(&list, &native.committed_offsets(topology::list(topic, &partitions), timeout)?),
    };
    let end = Instant::now() + timeout;
    loop {
        let committed = not_begun()
            .and_then(|left| if left.count() == 0 { Ok(()) } else { native.commit(&left, CommitMode::Sync) });
        return match committed {
            Ok(()) => Ok(()),
            Err(error) if is_moving(&error) && Instant::now() < end => {
                thread::sleep(MOVED);
                continue;
            }
            // The group has members; the first of them has said where it begins.
            Err(KafkaError::ConsumerCommit(
                Code::UnknownMemberId | Code::IllegalGeneration | Code::RebalanceInProgress,
            )) => match seek {
                None => Ok(()),
                Some(_) => {
                    Err(Error::new(ErrorKind::Conflict, "the group has consumers, so its position cannot be set")
                        .with_backend(crate::NAME)
                        .with_operation("consume")
                        .with_channel(topic)
                        .with_hint("stop them first"))
                }
            },
            Err(error) => Err(failed(error)),
        };
    }
}

/// A cluster that is new makes the place for positions with the first question for it; in others it moves at times.
fn is_moving(error: &KafkaError) -> bool {
    matches!(
        error::code(error),
        Some(
            Code::NotCoordinator
                | Code::WaitingForCoordinator
                | Code::CoordinatorNotAvailable
                | Code::CoordinatorLoadInProgress
        )
    )
}

/// Those of them that have no position among the `known` ones.
fn without(list: &TopicPartitionList, known: &TopicPartitionList) -> Result<TopicPartitionList, KafkaError> {
    let mut left = TopicPartitionList::new();
    for one in list.elements() {
        let found = known.find_partition(one.topic(), one.partition());
        if !found.is_some_and(|found| matches!(found.offset(), Offset::Offset(_))) {
            left.add_partition_offset(one.topic(), one.partition(), one.offset())?;
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_another_process_has_begun_is_left_to_it() {
        let mut list = TopicPartitionList::new();
        let mut known = TopicPartitionList::new();
        for (partition, theirs) in [(0, Offset::Offset(3)), (1, Offset::Invalid), (2, Offset::Offset(0))] {
            list.add_partition_offset("prices", partition, Offset::Offset(7)).expect("an offset");
            known.add_partition_offset("prices", partition, theirs).expect("an offset");
        }
        list.add_partition_offset("prices", 3, Offset::Offset(8)).expect("an offset");
        let left = without(&list, &known).expect("a list");
        let left: Vec<_> = left.elements().iter().map(|one| (one.partition(), one.offset())).collect();
        assert_eq!(left, [(1, Offset::Offset(7)), (3, Offset::Offset(8))]);
    }

    #[test]
    fn positions_are_read() {
        for (text, expected) in [
            ("first", Position::First),
            ("end", Position::End),
            ("last:10", Position::Last(10)),
            ("offset:4711", Position::Offset(4711)),
            ("time:1970-01-01T00:00:05Z", Position::Time(SystemTime::UNIX_EPOCH + Duration::from_secs(5))),
        ] {
            assert_eq!(Position::parse(text).expect("valid"), expected);
        }
        for text in ["", "lasst", "last", "last:-1", "offset:x", "time:noon", "first:1"] {
            let error = Position::parse(text).expect_err("not valid");
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }
}
