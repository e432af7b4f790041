//! Which topics and groups of Kafka stand behind a channel, and making, finding and deleting them.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use polymq_core::{Address, ChannelKind, Error, ErrorKind, Result, until};
use rdkafka::{
    TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::{Client, ClientContext},
    types::RDKafkaErrorCode as Code,
};

use crate::{
    NAME,
    config::{DEFAULT_PAYLOAD, KafkaConfig, RECORD_ROOM},
    error,
};

/// The longest delay of a message.
pub(crate) const MAX_DELAY: Duration = Duration::from_secs(7 * 24 * 3600);
/// A delay topic keeps its messages for longer than the longest delay, whatever the broker's default is.
const DELAY_RETENTION: Duration = Duration::from_secs(14 * 24 * 3600);
/// A delay topic has a partition for each of these spans and one for what is longer, so that what is due in seconds is not
/// behind what is due in hours. Within a span it may be: only so much of a partition waits in memory.
const TIERS: [Duration; 3] = [Duration::from_secs(15), Duration::from_secs(5 * 60), Duration::from_secs(3600)];
/// The partitions of a delay topic.
pub(crate) const DELAY_PARTITIONS: [i32; TIERS.len() + 1] = [0, 1, 2, 3];
/// The longest name of a topic.
const MAX_NAME: usize = 249;

/// The partition of a delay topic for this delay.
pub(crate) fn tier(delay: Duration) -> i32 {
    TIERS.iter().take_while(|most| delay > **most).count() as i32
}

/// The topic and partition of a message to `topic`, or for later to its delay topic.
pub(crate) fn place(
    topic: &Arc<str>,
    later: Option<&Arc<str>>,
    deliver_at: Option<SystemTime>,
) -> Result<(Arc<str>, Option<i32>, Option<Instant>)> {
    let Some(due) = deliver_at else { return Ok((Arc::clone(topic), None, None)) };
    let delay = until(due);
    match later {
        None => {
            Err(Error::unsupported(NAME, "sending to a topic now what is delivered later")
                .with_hint("send it to a queue"))
        }
        Some(_) if delay > MAX_DELAY => {
            Err(Error::unsupported(NAME, format_args!("a delay of more than {MAX_DELAY:?}")))
        }
        Some(later) => Ok((Arc::clone(later), Some(tier(delay)), Some(Instant::now() + delay))),
    }
}

/// What stands behind a channel, for one group.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Names {
    pub(crate) topic: Arc<str>,
    /// Where messages wait that are tried again later. Without a group there is none: they wait in memory.
    pub(crate) delay: Option<Arc<str>>,
    /// The consumer group; none for a subscription of its own.
    pub(crate) group: Option<Arc<str>>,
    /// A queue's first position is the oldest message.
    pub(crate) is_queue: bool,
}

impl Names {
    pub(crate) fn of(address: &Address, group: Option<&str>) -> Self {
        let (topic, name) = (address.shared_name(), address.name());
        match (address.kind(), group) {
            (ChannelKind::Queue, _) => Self {
                delay: Some(format!("{name}.delay").into()),
                group: Some(Arc::clone(&topic)),
                topic,
                is_queue: true,
            },
            // No queue and no other group has the same: no name holds an `@`, and where a topic's name cannot either, the
            // length tells where the group begins.
            (ChannelKind::Topic, Some(group)) => Self {
                topic,
                delay: Some(format!("{name}.{group}.delay{}", group.len()).into()),
                group: Some(format!("{name}@{group}").into()),
                is_queue: false,
            },
            (ChannelKind::Topic, None) => Self { topic, delay: None, group: None, is_queue: false },
        }
    }

    /// The same for a queue of one consumer that ends with it: no group, no other topics.
    pub(crate) fn temporary(self) -> Self {
        Self { delay: None, group: None, ..self }
    }

    /// Refuses what cannot be the name of a topic.
    pub(crate) fn check(&self) -> Result<()> {
        let longest = self.delay.as_ref().unwrap_or(&self.topic);
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let problem = if !longest.bytes().all(allowed) {
            "Kafka's names are made of a-z A-Z 0-9 . _ -".to_owned()
        } else if matches!(&*self.topic, "." | "..") || self.topic.starts_with("__") {
            "this name is Kafka's own".to_owned()
        } else if longest.len() > MAX_NAME {
            format!("with its suffix it has {} bytes, Kafka takes {MAX_NAME}", longest.len())
        } else {
            return Ok(());
        };
        Err(error::invalid(format!("{:?} cannot be a topic or group: {problem}", self.topic)))
    }
}

/// A topic that is to exist.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) name: Arc<str>,
    pub(crate) is_delay: bool,
}

impl Wanted {
    pub(crate) fn of(names: &Names) -> Vec<Self> {
        let main = Self { name: Arc::clone(&names.topic), is_delay: false };
        let delay = names.delay.iter().map(|name| Self { name: Arc::clone(name), is_delay: true });
        std::iter::once(main).chain(delay).collect()
    }
}

/// The partitions of a topic; `None` when it does not exist. Blocks.
pub(crate) fn partitions<C: ClientContext>(
    client: &Client<C>,
    topic: &str,
    timeout: Duration,
) -> Result<Option<Vec<i32>>> {
    let failed = |error| error::native("declare", error).with_channel(topic);
    let metadata = client.fetch_metadata(Some(topic), timeout).map_err(failed)?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    match found.map(|found| (found.error().map(Code::from), found)) {
        None | Some((Some(Code::UnknownTopicOrPartition | Code::UnknownTopic), _)) => Ok(None),
        // A leader is being chosen; the topic is there.
        Some((None | Some(Code::LeaderNotAvailable), found)) if !found.partitions().is_empty() => {
            Ok(Some(found.partitions().iter().map(|partition| partition.id()).collect()))
        }
        Some((None | Some(Code::LeaderNotAvailable), _)) => Ok(None),
        Some((Some(code), _)) => Err(error::of_code("declare", code).with_channel(topic)),
    }
}

/// The same, for a topic that has to exist.
pub(crate) fn existing<C: ClientContext>(client: &Client<C>, topic: &str, timeout: Duration) -> Result<Vec<i32>> {
    partitions(client, topic, timeout)?.ok_or_else(|| not_found(topic))
}

#[cold]
pub(crate) fn not_found(topic: &str) -> Error {
    error::of_code("declare", Code::UnknownTopicOrPartition).with_channel(topic)
}

/// Whether its leader has taken a partition over, which is a moment later than that it is known. Blocks.
fn is_led<C: ClientContext>(client: &Client<C>, topic: &str, partition: i32) -> bool {
    let asked = client.fetch_watermarks(topic, partition, Duration::from_secs(1));
    // Whoever may not ask has to do without.
    asked.err().and_then(|error| error::code(&error)).is_none_or(|code| error::kind(code) != ErrorKind::Disconnected)
}

/// These partitions, to be asked about.
pub(crate) fn list(topic: &str, partitions: &[i32]) -> TopicPartitionList {
    let mut list = TopicPartitionList::new();
    for partition in partitions {
        list.add_partition(topic, *partition);
    }
    list
}

/// Makes topics, and waits until the broker knows them.
pub(crate) async fn create<C: ClientContext>(
    admin: &AdminClient<C>,
    config: &KafkaConfig,
    wanted: &[Wanted],
) -> Result<()> {
    let retention = config.retention.map(|time| time.as_millis().to_string());
    let delay_retention = DELAY_RETENTION.as_millis().to_string();
    let largest = (config.max_payload + RECORD_ROOM).to_string();
    let topics = wanted.iter().map(|wanted| {
        let partitions = if wanted.is_delay { DELAY_PARTITIONS.len() as i32 } else { config.partitions.unwrap_or(-1) };
        let replication = TopicReplication::Fixed(config.replication.unwrap_or(-1));
        let mut topic = NewTopic::new(&wanted.name, partitions, replication);
        if config.max_payload > DEFAULT_PAYLOAD {
            topic = topic.set("max.message.bytes", &largest);
        }
        match &retention {
            _ if wanted.is_delay => topic.set("retention.ms", &delay_retention),
            Some(retention) => topic.set("retention.ms", retention),
            None => topic,
        }
    });
    let topics: Vec<NewTopic<'_>> = topics.collect();
    let options = options(config);
    let results = admin.create_topics(&topics, &options).await.map_err(|error| error::native("declare", error))?;
    for result in results {
        match result {
            Ok(_) | Err((_, Code::TopicAlreadyExists)) => {}
            Err((name, code)) => {
                let error = error::of_code("declare", code).with_channel(name);
                return Err(match code {
                    Code::InvalidTopic => {
                        error.with_hint("Kafka takes `.` and `_` in names for the same: check for `a_b` beside `a.b`")
                    }
                    _ => error,
                });
            }
        }
    }
    Ok(())
}

/// Deletes topics; harmless for those that do not exist.
pub(crate) async fn delete<C: ClientContext>(
    admin: &AdminClient<C>,
    config: &KafkaConfig,
    topics: &[&str],
) -> Result<()> {
    let deleted = admin.delete_topics(topics, &options(config)).await;
    for result in deleted.map_err(|error| error::native("delete", error))? {
        match result {
            Ok(_) | Err((_, Code::UnknownTopicOrPartition)) => {}
            Err((name, code)) => return Err(error::of_code("delete", code).with_channel(name)),
        }
    }
    Ok(())
}

pub(crate) fn options(config: &KafkaConfig) -> AdminOptions {
    let timeout = Some(config.connect_timeout);
    AdminOptions::new().request_timeout(timeout).operation_timeout(timeout)
}

/// Asks until all of these exist, or none of them does. Blocks.
pub(crate) fn await_existence<C: ClientContext>(
    client: &Client<C>,
    topics: &[&str],
    exist: bool,
    timeout: Duration,
) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let agreed = |topic: &str| -> Result<bool> {
        Ok(match partitions(client, topic, timeout)? {
            Some(found) => exist && found.into_iter().all(|partition| is_led(client, topic, partition)),
            None => !exist,
        })
    };
    for topic in topics {
        while !agreed(topic)? {
            if Instant::now() > deadline {
                return Err(Error::new(ErrorKind::Timeout, "the brokers do not agree about the topic in time")
                    .with_operation("declare")
                    .with_channel(*topic));
            }
            // The controller has done it; the brokers hear of it in milliseconds.
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_untouched() {
        let queue = Names::of(&Address::queue("orders"), None);
        assert_eq!(
            (&*queue.topic, queue.delay.as_deref(), queue.group.as_deref()),
            ("orders", Some("orders.delay"), Some("orders"))
        );
        let group = Names::of(&Address::topic("prices"), Some("audit"));
        assert_eq!(
            (group.delay.as_deref(), group.group.as_deref()),
            (Some("prices.audit.delay5"), Some("prices@audit"))
        );
        assert_eq!(Names::of(&Address::topic("prices"), None).group, None);
    }

    #[test]
    fn no_two_channels_share_a_group_or_a_delay_topic() {
        let queues = ["a.b.c", "a.b", "a.b.c.delay1", "a.b.c.1"].map(|name| Names::of(&Address::queue(name), None));
        let groups = [("a.b", "c"), ("a", "b.c"), ("a", "b"), ("a.b.c", "delay1"), ("a", "b.c.delay1")];
        let groups = groups.map(|(topic, group)| Names::of(&Address::topic(topic), Some(group)));
        let all: Vec<Names> = queues.into_iter().chain(groups).collect();
        for (at, one) in all.iter().enumerate() {
            for other in &all[..at] {
                assert!(one.group != other.group && one.delay != other.delay, "{one:?} {other:?}");
            }
        }
    }

    #[test]
    fn what_kafka_cannot_name_is_refused() {
        for name in ["a b", "ä", "a/b", "..", "__consumer_offsets", &"n".repeat(250)] {
            let error = Names::of(&Address::queue(name), None).check().expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
        assert!(Names::of(&Address::queue("a.B_c-9"), None).check().is_ok());
    }

    #[test]
    fn delays_have_tiers() {
        let seconds = |seconds| tier(Duration::from_secs(seconds));
        assert_eq!([seconds(0), seconds(15), seconds(16), seconds(301), seconds(9999)], [0, 0, 1, 2, 3]);
    }
}
