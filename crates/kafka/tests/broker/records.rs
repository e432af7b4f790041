//! What is on the wire, and what sending means.

use std::{
    net::SocketAddr,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, HealthState, Message, Settings};
use polymq_kafka::rdkafka::{
    Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, CommitMode, Consumer as _},
    message::{Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer as _},
};
use polymq_testkit::{Proxy, eventually};
use tokio::time::timeout;

use crate::{
    common::relay::Relays,
    harness::{PATIENCE, bare, body, closed, connect, consumer, name, producer, quiet, settings, take},
};

/// How many records a topic has, and their bodies.
fn records(topic: &str, count: usize) -> Vec<String> {
    let reader = bare().consumer(topic, true);
    let deadline = Instant::now() + PATIENCE;
    let mut found = Vec::new();
    while found.len() < count && Instant::now() < deadline {
        // Errors on the way are no end.
        if let Some(Ok(record)) = reader.poll(Duration::from_millis(100)) {
            found.push(String::from_utf8_lossy(record.payload().unwrap_or_default()).into_owned());
        }
    }
    found
}

/// The hashes are Kafka's own examples for its murmur2: -790332482 of "foobar", -985981536 of the long one.
pub async fn keys_choose_the_partition_as_other_clients_do() {
    let queue = Address::queue(name("keys"));
    let connection = connect(&settings().with("partitions", "7")).await;
    let sender = producer(&connection, &queue).await;
    for (key, hash) in [("foobar", -790_332_482_i32), ("a-little-bit-long-string", -985_981_536)] {
        let receipt = sender.send(Message::new("x").with_key(key)).await.expect("accepted");
        let partition = (hash & i32::MAX) % 7;
        let place = receipt.broker_id.expect("a place");
        assert!(place.starts_with(&format!("{partition}@")), "{key} is at {place}, not in {partition}");
    }
    closed(connection.close().await);
}

/// Mission row B15: a program sends 100, awaits none of them, and closes; 100 are on the topic.
pub async fn b15_closing_flushes_what_was_not_awaited() {
    for _ in 0..5 {
        let queue = Address::queue(name("flushed"));
        let connection = connect(&settings()).await;
        let sender = producer(&connection, &queue).await;
        for n in 0..100 {
            drop(sender.send(Message::new(format!("{n}"))));
        }
        let began = Instant::now();
        if let Err(error) = connection.close().await {
            // On a machine that stands still it gives up waiting, as it may, and says so: that round proves nothing.
            assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
            assert!(began.elapsed() >= Duration::from_secs(5), "gave up after {:?}", began.elapsed());
            continue;
        }
        let found = tokio::task::block_in_place(|| records(queue.name(), 100));
        assert_eq!(found, (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
        return;
    }
    panic!("it gave up waiting each time");
}

/// While there is no connection messages wait; those that nobody waits for any more take no room, and no flush waits for them.
pub async fn what_is_withdrawn_in_an_outage_is_gone() {
    let queue = Address::queue(name("outage"));
    producer(&connect(&settings()).await, &queue).await;
    let broker: SocketAddr = bare().servers.parse().expect("an address");
    let (proxy, relays) = (Proxy::start(broker).await.expect("a proxy"), Relays::new(broker));
    let at = relays.before(proxy.address());
    let url = format!("kafka://admin:secret@{at}?declare=passive&connect_timeout=60s");
    let connection = connect(&Settings::from_url(&url).expect("a URL")).await;
    let sender = producer(&connection, &queue).await;
    let is = |wanted: HealthState| {
        let state = connection.health().now().state;
        async move { if state == wanted { Ok(()) } else { Err(format!("{state:?}")) } }
    };
    proxy.refuse(true);
    proxy.reset_all();
    eventually(PATIENCE, || is(HealthState::Down)).await;
    let alive = Arc::new(b"withdrawn".to_vec());
    for _ in 0..10_000 {
        let body = Bytes::from_owner(Held(Arc::clone(&alive)));
        assert!(sender.send(Message::new(body)).withdraw(), "nothing of it was handed over");
    }
    let held = Arc::strong_count(&alive) - 1;
    assert!(held < 2_000, "{held} of 10000 messages that nobody waits for are held");
    let kept = sender.send(Message::new("kept"));
    let mut flush = pin!(sender.flush());
    assert!(timeout(Duration::from_millis(100), flush.as_mut()).await.is_err(), "one is waited for");
    assert!(kept.withdraw());
    timeout(PATIENCE, flush).await.expect("nothing is left to wait for").expect("flush");
    assert_eq!(Arc::strong_count(&alive), 1, "all are gone");
    proxy.refuse(false);
    sender.send(Message::new("next")).await.expect("accepted");
    assert_eq!(tokio::task::block_in_place(|| records(queue.name(), 1)), ["next"]);
    closed(connection.close().await);
}

/// A body that tells whether somebody has it.
struct Held(Arc<Vec<u8>>);

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Binary keys, binary and repeated headers, no body at all: it is a message.
pub async fn a_foreign_record_may_hold_anything() {
    let queue = Address::queue(name("odd"));
    let connection = connect(&settings()).await;
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    tokio::task::block_in_place(|| {
        let sender: BaseProducer = bare().config().create().expect("a producer");
        let headers = OwnedHeaders::new()
            .insert(Header { key: "tenant", value: Some("acme") })
            .insert(Header { key: "tenant", value: Some("other") })
            .insert(Header { key: "raw", value: Some(&[0xff, 0x00][..]) })
            .insert(Header { key: "ce_source", value: Some("/shop") })
            .insert(Header { key: "null", value: None::<&str> });
        let record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(queue.name()).key(&[0, 159][..]).headers(headers);
        sender.send(record).expect("sent");
        sender.flush(PATIENCE).expect("delivered");
    });
    let taken = take(&mut *reader, 1).await;
    let message = &taken[0].message;
    // Mission row C17: what the broker knows of it, as Kafka's own client tells it.
    let (offset, partition, time) = tokio::task::block_in_place(|| {
        let reader = bare().consumer(queue.name(), true);
        let deadline = Instant::now() + PATIENCE;
        let record = loop {
            assert!(Instant::now() < deadline, "it is not kept");
            // Errors on the way are no end.
            if let Some(Ok(record)) = reader.poll(Duration::from_millis(100)) {
                break record;
            }
        };
        (record.offset(), record.partition(), record.timestamp().to_millis())
    });
    let details = taken[0].details.as_deref().expect("what the broker knows");
    assert_eq!((details.sequence, details.partition), (u64::try_from(offset).ok(), Some(partition)));
    let told = details.broker_time.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
    assert_eq!(told.and_then(|told| i64::try_from(told.as_millis()).ok()), time);
    assert_eq!((message.payload().len(), message.key(), message.id()), (0, None, None));
    assert_eq!(message.headers().iter().collect::<Vec<_>>(), [("tenant", "other"), ("ce_source", "/shop")]);
    // It can be tried again as it is.
    reader.settler().retry(taken[0].token, message, 2, Duration::ZERO).await.expect("retry");
    let again = take(&mut *reader, 1).await;
    assert_eq!((again[0].message.headers(), again[0].message.header_attempt()), (message.headers(), 2));
    closed(connection.close().await);
}

/// Other programs write what they like where text belongs: a header's name, the words beside a position. That header is left
/// out, the words are nobody's, and all the rest is read.
pub async fn what_is_no_text_stops_nobody() {
    // The client library writes text only, so what it wrote is made into something else on its way back.
    const MARK: &str = "polymq-no-text";
    let queue = Address::queue(name("no-text"));
    let broker: SocketAddr = bare().servers.parse().expect("an address");
    let relays = Relays::new(broker).changing(MARK.as_bytes(), &[0xff; MARK.len()]);
    let url = format!("kafka://admin:secret@{}?session_timeout=30s&connect_timeout=60s", relays.before(broker));
    let connection = connect(&Settings::from_url(&url).expect("a URL")).await;
    connection.declare(&queue, &ConsumeOptions::default()).await.expect("declare");
    tokio::task::block_in_place(|| {
        let sender: BaseProducer = bare().config().create().expect("a producer");
        let headers = OwnedHeaders::new()
            .insert(Header { key: "before", value: Some("1") })
            .insert(Header { key: MARK, value: Some("2") })
            .insert(Header { key: "after", value: Some("3") });
        let record: BaseRecord<'_, str, str> = BaseRecord::to(queue.name()).payload("foreign").headers(headers);
        sender.send(record).expect("sent");
        sender.flush(PATIENCE).expect("delivered");
        let member: BaseConsumer = bare().config().set("group.id", queue.name()).create().expect("a client");
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(queue.name(), 0, Offset::Offset(0)).expect("an offset");
        list.find_partition(queue.name(), 0).expect("just added").set_metadata(MARK);
        member.commit(&list, CommitMode::Sync).expect("committed");
    });
    assert_eq!(connection.stats(&queue, None).await.expect("counted").ready, 1);
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    let taken = take(&mut *reader, 1).await;
    assert_eq!(body(&taken[0]), "foreign");
    assert_eq!(taken[0].message.headers().iter().collect::<Vec<_>>(), [("before", "1"), ("after", "3")]);
    reader.settler().ack(taken[0].token).await.expect("ack");
    producer(&connection, &queue).await.send(Message::new("next")).await.expect("accepted");
    assert_eq!(body(&take(&mut *reader, 1).await[0]), "next");
    closed(connection.close().await);
}

/// Nobody else sees them before, and a process that starts later delivers them.
pub async fn delayed_messages_are_in_the_delay_topic_until_they_are_due() {
    const DELAY: Duration = Duration::from_secs(10);
    let queue = Address::queue(name("later"));
    let connection = connect(&settings()).await;
    let sender = producer(&connection, &queue).await;
    let sent = Instant::now();
    sender.send(Message::new("late").deliver_in(DELAY)).await.expect("accepted");
    sender.send(Message::new("much later").deliver_in(Duration::from_secs(600))).await.expect("accepted");
    let delay = format!("{}.delay", queue.name());
    assert_eq!(tokio::task::block_in_place(|| records(&delay, 2)).len(), 2);
    closed(connection.close().await);
    let connection = connect(&settings()).await;
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    let taken = take(&mut *reader, 1).await;
    assert!(sent.elapsed() >= DELAY, "came {:?} too early", DELAY - sent.elapsed());
    assert_eq!((body(&taken[0]).as_str(), taken[0].message.header_attempt()), ("late", 1));
    assert!(taken[0].message.system_headers().is_empty() && taken[0].message.deliver_at().is_none());
    reader.settler().ack(taken[0].token).await.expect("ack");
    quiet(&mut *reader).await;
    closed(connection.close().await);
}

/// The escape to the native client.
pub async fn clients_of_your_own_have_the_same_login() {
    let connection = connect(&settings()).await;
    let own: BaseConsumer = connection.native_config().expect("settings").create().expect("a client");
    let metadata = tokio::task::block_in_place(|| own.fetch_metadata(None, PATIENCE)).expect("metadata");
    assert_eq!(metadata.brokers().len(), 1);
    closed(connection.close().await);
}
