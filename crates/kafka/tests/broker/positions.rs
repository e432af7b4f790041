//! Positions that are committed though nothing new has happened.

use polymq_core::{Address, Connection, ConsumeOptions, Message, Settings};
use polymq_kafka::rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    producer::{BaseProducer, Producer as _},
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use polymq_testkit::eventually;

use crate::{
    groups::committed,
    harness::{PATIENCE, bare, closed, connect, consumer, group, name, producer, send, settings, take},
};

/// Kafka forgets a position some days after its last commit when its group subscribes to another topic, as that of the delay
/// topic does. So each assignment commits it again, though nothing was delayed since.
pub async fn a_position_in_the_delay_topic_is_committed_with_each_assignment() {
    let queue = Address::queue(name("kept"));
    let delay = format!("{}.delay", queue.name());
    let connection = connect(&settings()).await;
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    let late = Message::new("late").deliver_in(std::time::Duration::from_millis(100));
    producer(&connection, &queue).await.send(late).await.expect("accepted");
    let taken = take(&mut *reader, 1).await;
    reader.settler().ack(taken[0].token).await.expect("ack");
    reader.close().await.expect("close");
    // The same position, with words beside it that tell who has committed it last.
    let client: BaseConsumer = bare().config().set("group.id", queue.name()).create().expect("a client");
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&delay, 0, Offset::Offset(1)).expect("an offset");
    list.find_partition(&delay, 0).expect("just added").set_metadata("long ago");
    // Refused until the group is empty.
    eventually(PATIENCE, || async {
        tokio::task::block_in_place(|| client.commit(&list, CommitMode::Sync)).map_err(|error| error.to_string())
    })
    .await;
    let before = tokio::task::block_in_place(|| committed(&delay, queue.name()));
    assert_eq!(before, (Offset::Offset(1), "long ago".to_owned()));
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    eventually(PATIENCE, || async {
        let found = tokio::task::block_in_place(|| committed(&delay, queue.name()));
        if found == (Offset::Offset(1), String::new()) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    reader.close().await.expect("close");
    closed(connection.close().await);
}

/// Only a consumer moves a group to the `position` that it asks for. Declaring is harmless, with members or without.
pub async fn declaring_does_not_move_a_group_that_exists() {
    let topic = Address::topic(name("unmoved"));
    let connection = connect(&settings()).await;
    send(&*producer(&connection, &topic).await, ["one".to_owned(), "two".to_owned()]).await;
    let at = |position: &str| {
        let extra = vec![("position".to_owned(), position.to_owned())];
        ConsumeOptions { extra, ..group("audit") }
    };
    let position = || tokio::task::block_in_place(|| committed(topic.name(), &format!("{}@audit", topic.name()))).0;
    connection.declare(&topic, &at("offset:1")).await.expect("declare");
    assert_eq!(position(), Offset::Offset(1), "a new one begins there");
    connection.declare(&topic, &at("first")).await.expect("declare");
    assert_eq!(position(), Offset::Offset(1));
    let mut reader = consumer(&connection, &topic, group("audit")).await;
    take(&mut *reader, 1).await;
    connection.declare(&topic, &at("first")).await.expect("declare beside a member");
    assert_eq!(position(), Offset::Offset(1));
    closed(connection.close().await);
}

/// A commit falls into a rebalance of the group, and nothing is received afterwards: nobody tells, but the rebalance ends.
pub async fn a_commit_that_is_refused_is_repeated() {
    // A real broker refuses for a few milliseconds only; the client library's own one refuses what it is told to.
    let host: BaseProducer = ClientConfig::new().set("test.mock.num.brokers", "1").create().expect("a client");
    let cluster = || host.client().mock_cluster().expect("it has one");
    let queue = Address::queue("orders");
    cluster().create_topic(queue.name(), 1, 1).expect("a topic");
    let servers = cluster().bootstrap_servers();
    let position = || {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &servers).set("group.id", queue.name());
        let client: BaseConsumer = config.create().expect("a client");
        let mut list = TopicPartitionList::new();
        list.add_partition(queue.name(), 0);
        let list = client.committed_offsets(list, PATIENCE).expect("positions");
        list.find_partition(queue.name(), 0).expect("asked for").offset()
    };
    let is_at = async |expected: i64| {
        eventually(PATIENCE, || async {
            let found = tokio::task::block_in_place(position);
            if found == Offset::Offset(expected) { Ok(()) } else { Err(format!("{found:?}, not {expected}")) }
        })
        .await;
    };
    let url = format!("kafka://{servers}?declare=passive&connect_timeout=60s");
    let settings = Settings::from_url(&url).expect("a URL");
    let connection = connect(&settings).await;
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    send(&*producer(&connection, &queue).await, ["one".to_owned()]).await;
    let taken = take(&mut *reader, 1).await;
    is_at(0).await;
    let refused = RDKafkaRespErr::RD_KAFKA_RESP_ERR_REBALANCE_IN_PROGRESS;
    cluster().request_errors(RDKafkaApiKey::OffsetCommit, &[refused]);
    reader.settler().ack(taken[0].token).await.expect("ack");
    let other = connect(&settings).await;
    let joined = consumer(&other, &queue, ConsumeOptions::default()).await;
    is_at(1).await;
    drop(joined);
    closed(connection.close().await);
    closed(other.close().await);
}
