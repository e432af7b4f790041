//! Subscriptions that are opened at once, and again after an error.

use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, HealthState, Settings};
use polymq_kafka::rdkafka::{
    ClientConfig,
    producer::{BaseProducer, Producer as _},
    types::{RDKafkaApiKey, RDKafkaRespErr},
};

use crate::harness::{PATIENCE, body, closed, connect, consumer, group, name, producer, quiet, send, settings, take};

/// The client library's own broker, which refuses what it is told to.
fn mock() -> BaseProducer {
    ClientConfig::new().set("test.mock.num.brokers", "1").create().expect("a client")
}

fn passive(servers: &str) -> Settings {
    Settings::from_url(&format!("kafka://{servers}?declare=passive&connect_timeout=60s")).expect("a URL")
}

fn at(position: &str) -> ConsumeOptions {
    ConsumeOptions { extra: vec![("position".to_owned(), position.to_owned())], ..ConsumeOptions::default() }
}

/// A runner opens a subscription that has ended with an error again, with the options that it had: it goes on where it was, and
/// what came meanwhile is not passed over.
pub async fn a_position_is_for_the_first_opening() {
    let host = mock();
    let cluster = || host.client().mock_cluster().expect("it has one");
    let queue = Address::queue("orders");
    cluster().create_topic(queue.name(), 1, 1).expect("a topic");
    let passive = passive(&cluster().bootstrap_servers());
    let connection = connect(&passive).await;
    let sender = producer(&connection, &queue).await;
    send(&*sender, ["one".to_owned()]).await;
    let mut reader = consumer(&connection, &queue, at("end")).await;
    quiet(&mut *reader).await;
    // The broker has given its place to another one, it says.
    cluster().request_errors(RDKafkaApiKey::Heartbeat, &[RDKafkaRespErr::RD_KAFKA_RESP_ERR_FENCED_INSTANCE_ID]);
    let ended = tokio::time::timeout(PATIENCE, reader.receive(1, &mut Vec::new())).await.expect("it ends");
    ended.expect_err("it cannot go on");
    send(&*sender, ["two".to_owned()]).await;
    // Another handler of the same group may be opened again before: that is in nobody's way.
    let mut other = consumer(&connection, &queue, ConsumeOptions { prefetch: 1, ..ConsumeOptions::default() }).await;
    let two = take(&mut *other, 1).await;
    assert_eq!(body(&two[0]), "two");
    send(&*sender, ["three".to_owned()]).await;
    reader.close().await.expect("closed");
    let mut reader = consumer(&connection, &queue, at("end")).await;
    let three = take(&mut *reader, 1).await;
    assert_eq!(body(&three[0]), "three");
    let error = connection.consumer(&queue, &at("first")).await.map(drop).expect_err("that would be a move");
    assert_eq!(error.kind(), ErrorKind::Conflict);

    drop((reader, other, connection));
}

/// Two handlers of one group are opened at once, and the group cannot begin: both hear so.
pub async fn whoever_joins_a_group_that_cannot_begin_hears_so() {
    let host = mock();
    let cluster = || host.client().mock_cluster().expect("it has one");
    let topic = Address::topic("prices");
    cluster().create_topic(topic.name(), 1, 1).expect("a topic");
    let passive = passive(&cluster().bootstrap_servers());
    let connection = connect(&passive).await;
    let refused = RDKafkaRespErr::RD_KAFKA_RESP_ERR_GROUP_AUTHORIZATION_FAILED;
    cluster().request_errors(RDKafkaApiKey::OffsetCommit, &[refused]);
    let audit = group("audit");
    let both = tokio::join!(connection.consumer(&topic, &audit), connection.consumer(&topic, &audit));
    for made in [both.0, both.1] {
        assert_eq!(made.map(drop).expect_err("not allowed").kind(), ErrorKind::PermissionDenied);
    }
    // What they left behind is in nobody's way.
    let mut reader = consumer(&connection, &topic, audit).await;
    send(&*producer(&connection, &topic).await, ["one".to_owned()]).await;
    assert_eq!(body(&take(&mut *reader, 1).await[0]), "one");
    drop((reader, connection));
}

/// Another process takes the place of a consumer in its group for good: that one ends, and who sends goes on as before.
pub async fn a_consumer_whose_place_is_taken_is_nothing_to_senders() {
    let queue = Address::queue(name("fenced"));
    let settings = settings().with("options", "group.instance.id=the-one");
    let (one, two) = (connect(&settings).await, connect(&settings).await);
    let mut watch = one.health();
    let watching = tokio::spawn(async move {
        let mut told = Vec::new();
        while let Some(health) = watch.changed().await {
            told.push(health.to_string());
            if health.state == HealthState::Closed {
                break;
            }
        }
        told
    });
    let sender = producer(&one, &queue).await;
    let mut first = consumer(&one, &queue, ConsumeOptions::default()).await;
    send(&*sender, ["one".to_owned()]).await;
    take(&mut *first, 1).await;
    let mut second = consumer(&two, &queue, ConsumeOptions::default()).await;
    let ended = tokio::time::timeout(PATIENCE, first.receive(1, &mut Vec::new())).await.expect("it ends");
    let error = ended.expect_err("its place is taken");
    assert!(error.to_string().contains("fenced"), "{error}");
    send(&*sender, ["two".to_owned()]).await;
    take(&mut *second, 1).await;
    closed(one.close().await);
    closed(two.close().await);
    // A broker that is busy may be told as one that does not answer; what has happened to the consumer may not be told of it.
    let told = tokio::time::timeout(PATIENCE, watching).await.expect("the connection ends").expect("no panic");
    assert!(!told.iter().any(|health| health.to_lowercase().contains("fenced")), "{told:?}");
}
