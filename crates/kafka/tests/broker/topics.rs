//! Making topics.

use std::time::Duration;

use polymq_core::{
    Address, Answer, Bus, Connection, ConsumeOptions, ConsumerFactory, ConsumerRunner, ErrorKind, Message,
    ProduceOptions, Settings,
};
use polymq_kafka::rdkafka::{
    Offset,
    admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    producer::{BaseProducer, BaseRecord, Producer as _},
};

use polymq_testkit::{Broker, BrokerControl, eventually};

use crate::{
    common::bare::Bare,
    groups::committed,
    harness::{
        PATIENCE, bare, body, closed, connect, consumer, group, name, producer, quiet, send, settings, take, url,
    },
};

pub fn admin() -> AdminClient<DefaultClientContext> {
    bare().config().create().expect("an admin client")
}

fn partitions(topic: &str) -> usize {
    let metadata = admin().inner().fetch_metadata(Some(topic), PATIENCE).expect("metadata");
    metadata.topics()[0].partitions().len()
}

async fn setting(topic: &str, name: &str) -> Option<String> {
    let found = admin().describe_configs(&[ResourceSpecifier::Topic(topic)], &AdminOptions::new()).await;
    let found = found.expect("described").remove(0).expect("a topic");
    found.get(name).and_then(|entry| entry.value.clone())
}

/// Mission row H7: partitions, retention and the size of messages are as asked.
pub async fn h7_topics_are_made_as_they_are_wanted() {
    let settings = settings().with("partitions", "3").with("replication", "1").with("retention", "1h");
    let connection = connect(&settings.with("max_payload", "2000000")).await;
    let queue = Address::queue(name("made"));
    let letters = queue.dead_letters(None);
    let options = ConsumeOptions { dead_letters: Some(letters.clone()), ..ConsumeOptions::default() };
    connection.declare(&queue, &options).await.expect("declare");
    for topic in [queue.name(), letters.name()] {
        assert_eq!(partitions(topic), 3);
        assert_eq!(setting(topic, "retention.ms").await.as_deref(), Some("3600000"));
    }
    let delay = format!("{}.delay", queue.name());
    assert_eq!(setting(&delay, "retention.ms").await.as_deref(), Some("1209600000"), "longer than the longest delay");
    // And the large body is carried.
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    send(&*producer(&connection, &queue).await, ["x".repeat(2_000_000)]).await;
    assert_eq!(body(&take(&mut *reader, 1).await[0]).len(), 2_000_000);
    connection.delete(&queue, None).await.expect("delete");
    assert_eq!(partitions(queue.name()), 0, "deleted");
    connection.delete(&queue, None).await.expect("harmless");
    closed(connection.close().await);
}

/// Mission row H7: what the cluster cannot make is an error of who asked.
pub async fn h7_more_copies_than_brokers_are_an_error() {
    let connection = connect(&settings().with("replication", "3")).await;
    let queue = Address::queue(name("copies"));
    let error = connection.producer(&queue, &ProduceOptions::default()).await.expect_err("one broker only");
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    assert!(error.to_string().contains("eplication factor") && error.channel() == Some(queue.name()), "{error}");
    assert_eq!(partitions(queue.name()), 0);
    closed(connection.close().await);
}

/// Makes a topic, as another tool would, and waits until the broker tells everybody of it.
async fn made(topic: &NewTopic<'_>) {
    admin().create_topics([topic], &AdminOptions::new()).await.expect("asked").remove(0).expect("made");
    eventually(PATIENCE, || async {
        let found = tokio::task::block_in_place(|| partitions(topic.name));
        if found as i32 == topic.num_partitions { Ok(()) } else { Err(format!("{found} partitions")) }
    })
    .await;
}

/// Its partitions stay what they are, and nothing else is needed with it.
pub async fn a_topic_made_by_another_tool_is_taken_as_it_is() {
    let queue = Address::queue(name("foreign"));
    let topic = NewTopic::new(queue.name(), 5, TopicReplication::Fixed(1));
    made(&topic).await;
    let connection = connect(&settings().with("declare", "passive")).await;
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    send(&*producer(&connection, &queue).await, ["one".to_owned()]).await;
    let taken = take(&mut *reader, 1).await;
    assert_eq!((body(&taken[0]).as_str(), partitions(queue.name())), ("one", 5));
    // At once goes through the queue itself; later needs the delay topic, which nobody has made.
    let later = std::time::Duration::from_secs(1);
    let error = reader.settler().retry(taken[0].token, &taken[0].message, 2, later).await.expect_err("no delay topic");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    reader.settler().retry(taken[0].token, &taken[0].message, 2, std::time::Duration::ZERO).await.expect("at once");
    assert_eq!(take(&mut *reader, 1).await[0].message.header_attempt(), 2);
    closed(connection.close().await);
}

/// A process that makes nothing consumes a queue that has no delay topic; another one makes it, and delays.
pub async fn a_delay_topic_that_is_made_later_is_read() {
    let queue = Address::queue(name("grown"));
    let topic = NewTopic::new(queue.name(), 1, TopicReplication::Fixed(1));
    made(&topic).await;
    let passive = connect(&settings().with("declare", "passive").with("heartbeat", "3s")).await;
    let mut reader = consumer(&passive, &queue, ConsumeOptions::default()).await;
    let auto = connect(&settings()).await;
    let sender = producer(&auto, &queue).await;
    let soon = Duration::from_secs(1);
    sender.send(Message::new("late").deliver_in(soon)).await.expect("accepted");
    let taken = take(&mut *reader, 1).await;
    assert_eq!((body(&taken[0]).as_str(), taken[0].message.header_attempt()), ("late", 1));
    reader.settler().retry(taken[0].token, &taken[0].message, 2, soon).await.expect("there is a delay topic");
    let again = take(&mut *reader, 1).await;
    assert_eq!(again[0].message.header_attempt(), 2);
    reader.settler().ack(again[0].token).await.expect("ack");
    reader.close().await.expect("close");
    // And once only: what was read of it is committed with the rest, though a close does not wait for that for ever.
    let delay = format!("{}.delay", queue.name());
    eventually(PATIENCE, || async {
        let found = tokio::task::block_in_place(|| committed(&delay, queue.name())).0;
        if found == Offset::Offset(2) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    let mut reader = consumer(&passive, &queue, ConsumeOptions::default()).await;
    quiet(&mut *reader).await;
    closed(passive.close().await);
    closed(auto.close().await);
}

/// A queue for replies is this process's own, and made where topics are only checked, too.
pub async fn requests_are_answered_where_topics_are_only_checked() {
    async fn double(n: u64) -> polymq_core::Result<Answer<u64>> {
        Ok(Answer(n * 2))
    }
    let queue = name("doubled");
    let server = Bus::connect(&url()).await.expect("connect");
    let mut consumers = ConsumerFactory::new(&server);
    consumers.route(queue.as_str(), double);
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    let asker = Bus::connect(&format!("{}&declare=passive", url())).await.expect("connect");
    assert!(asker.capabilities().request_reply && !asker.capabilities().creates_channels);
    let reply = asker.request(queue.as_str(), &21_u64).await.expect("a reply");
    assert_eq!(reply.decode::<u64>().expect("a number"), 42);
    let error = asker.queue(name("missing")).send(&1).await.expect_err("nobody makes it");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    closed(asker.close().await);
    running.stop().await.expect("stop");
    closed(server.close().await);
}

/// A broker that makes whatever topic it is asked about, as Kafka does unless it is told otherwise: nobody asks for that by
/// looking or by sending, and what is declared is as it was wanted.
pub async fn looking_makes_no_topic() {
    let directory = tempfile::tempdir().expect("a directory");
    let include = directory.path().join("include.properties");
    std::fs::write(&include, "auto.create.topics.enable=true\n").expect("written");
    let broker = tokio::task::block_in_place(|| Broker::kafka_with(&["--include", &include.display().to_string()]));
    let servers = broker.address().to_string();
    let listed = || {
        let asking: AdminClient<DefaultClientContext> =
            Bare { servers: servers.clone() }.config().create().expect("an admin client");
        // Asking for all of them names none.
        let metadata = tokio::task::block_in_place(|| asking.inner().fetch_metadata(None, PATIENCE)).expect("metadata");
        let found: Vec<(String, usize)> =
            metadata.topics().iter().map(|topic| (topic.name().to_owned(), topic.partitions().len())).collect();
        found.into_iter().filter(|(name, _)| !name.starts_with("__")).collect::<Vec<_>>()
    };
    let url = format!("kafka://admin:secret@{servers}?connect_timeout=60s&declare=passive");
    let passive = connect(&Settings::from_url(&url).expect("a URL")).await;
    let queue = Address::queue("asked");
    assert!(!passive.exists(&queue, None).await.expect("an answer"), "nobody has made it");
    for error in [
        passive.stats(&queue, None).await.map(drop).expect_err("nothing to count"),
        passive.purge(&queue).await.map(drop).expect_err("nothing to purge"),
        passive.producer(&queue, &ProduceOptions::default()).await.map(drop).expect_err("nobody makes it"),
    ] {
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    }
    // Nobody has looked whether it is there.
    let unlooked = ProduceOptions { temporary: true, ..ProduceOptions::default() };
    let sender = passive.producer(&queue, &unlooked).await.expect("a producer");
    let error = sender.send(Message::new("lost").with_id("1")).await.expect_err("nowhere to go");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    assert_eq!(listed(), []);
    let url = format!("kafka://admin:secret@{servers}?connect_timeout=60s&partitions=12");
    let auto = connect(&Settings::from_url(&url).expect("a URL")).await;
    auto.declare(&Address::topic("declared"), &ConsumeOptions::default()).await.expect("declared");
    assert_eq!(listed(), [("declared".to_owned(), 12)]);
    auto.delete(&Address::topic("declared"), None).await.expect("deleted");
    assert_eq!(listed(), []);
    closed(passive.close().await);
    closed(auto.close().await);
    tokio::task::block_in_place(|| drop(broker));
}

/// Makes more partitions, as another tool would, and waits until the broker tells everybody of them.
async fn widen(topic: &str, count: usize) {
    let wider = NewPartitions::new(topic, count);
    admin().create_partitions([&wider], &AdminOptions::new()).await.expect("asked").remove(0).expect("made");
    eventually(PATIENCE, || async {
        let found = tokio::task::block_in_place(|| partitions(topic));
        if found == count { Ok(()) } else { Err(format!("{found} partitions")) }
    })
    .await;
}

/// One message in each of the first partitions: its number.
fn fill(topic: &str, count: i32) {
    tokio::task::block_in_place(|| {
        let native: BaseProducer = bare().config().create().expect("a producer");
        for partition in 0..count {
            let text = partition.to_string();
            let record: BaseRecord<'_, str, str> = BaseRecord::to(topic).partition(partition).payload(&text);
            native.send(record).expect("sent");
        }
        native.flush(PATIENCE).expect("delivered");
    });
}

/// Somebody makes more partitions, and sends to them, while nobody of a group is there: the group has begun long before.
pub async fn partitions_that_are_added_are_read_by_a_group_that_was_away() {
    let topic = Address::topic(name("away"));
    made(&NewTopic::new(topic.name(), 1, TopicReplication::Fixed(1))).await;
    let connection = connect(&settings()).await;
    // It begins at the end.
    eventually(PATIENCE, || async {
        match connection.declare(&topic, &group("audit")).await {
            // The first group of a broker that has just been started.
            Err(error) if error.kind() == ErrorKind::Disconnected => Err(error),
            made => {
                made.expect("declare");
                Ok(())
            }
        }
    })
    .await;
    widen(topic.name(), 3).await;
    fill(topic.name(), 3);
    let mut reader = consumer(&connection, &topic, group("audit")).await;
    let mut bodies: Vec<String> = take(&mut *reader, 3).await.iter().map(body).collect();
    bodies.sort();
    assert_eq!(bodies, ["0", "1", "2"]);
    quiet(&mut *reader).await;
    closed(connection.close().await);
}

/// Somebody makes more partitions while a reader without a group is at work: it has no rebalance that would tell.
pub async fn partitions_that_are_added_are_read_without_a_group() {
    let topic = Address::topic(name("wider"));
    let narrow = NewTopic::new(topic.name(), 1, TopicReplication::Fixed(1));
    made(&narrow).await;
    let connection = connect(&settings().with("heartbeat", "3s")).await;
    let mut reader = consumer(&connection, &topic, ConsumeOptions::default()).await;
    widen(topic.name(), 3).await;
    fill(topic.name(), 3);
    let mut bodies: Vec<String> = take(&mut *reader, 3).await.iter().map(body).collect();
    bodies.sort();
    assert_eq!(bodies, ["0", "1", "2"]);
    quiet(&mut *reader).await;
    closed(connection.close().await);
}

/// Nobody waits for a topic that is no more.
pub async fn a_deleted_topic_ends_its_consumers() {
    let queue = Address::queue(name("deleted"));
    let connection = connect(&settings()).await;
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    send(&*producer(&connection, &queue).await, ["one".to_owned()]).await;
    let taken = take(&mut *reader, 1).await;
    reader.settler().ack(taken[0].token).await.expect("ack");
    connection.delete(&queue, None).await.expect("delete");
    let ended = tokio::time::timeout(PATIENCE, reader.receive(1, &mut Vec::new())).await.expect("it ends");
    assert_eq!(ended.expect_err("there is nothing to read").kind(), ErrorKind::NotFound);
    closed(connection.close().await);
}
