//! rdkafka alone, and what all paths need of it: topics, their messages, and what a group has committed.

use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, all_handled, handled, payload},
};
use rdkafka::{
    ClientConfig, ClientContext, Message as _, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, CommitMode, Consumer, StreamConsumer},
    message::{DeliveryResult, Header, Headers as _, OwnedHeaders},
    producer::{BaseRecord, FutureProducer, FutureRecord, ProducerContext, ThreadedProducer},
};

use crate::{PARTITIONS, WINDOW, filled, topic};

const WAIT: Duration = Duration::from_secs(30);
/// How often positions are committed, on every path that can be told.
const COMMIT: Duration = Duration::from_millis(100);

pub fn config(options: &Options) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", servers(options));
    config
}

pub fn servers(options: &Options) -> &str {
    options.need("url").trim_start_matches("kafka://")
}

/// Makes a topic; `false` when it is there already.
pub async fn create(options: &Options, topic: &str) -> bool {
    let admin: AdminClient<DefaultClientContext> = config(options).create().expect("a client");
    let new = NewTopic::new(topic, PARTITIONS, TopicReplication::Fixed(1));
    let made = admin.create_topics(&[new], &AdminOptions::new()).await.expect("answered").remove(0).is_ok();
    // The broker leads its partitions a moment later than the controller says so.
    while made && ends(options, topic).is_none() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    made
}

pub async fn delete(options: &Options, topic: &str) {
    let admin: AdminClient<DefaultClientContext> = config(options).create().expect("a client");
    let _ = admin.delete_topics(&[topic], &AdminOptions::new()).await;
}

/// The number of messages in each partition.
fn ends(options: &Options, topic: &str) -> Option<Vec<i64>> {
    let consumer: BaseConsumer = config(options).set("group.id", "ends").create().expect("a client");
    (0..PARTITIONS).map(|at| consumer.fetch_watermarks(topic, at, WAIT).ok().map(|(_, high)| high)).collect()
}

/// Checks that so many messages are in a topic.
pub fn expect_sent(options: &Options, topic: &str, messages: u64) {
    let sent: i64 = ends(options, topic).expect("it is there").iter().sum();
    assert_eq!(sent as u64, messages, "messages in the topic");
}

/// Checks that a group has committed everything.
pub fn expect_committed(options: &Options, topic: &str, group: &str) {
    let client: BaseConsumer = config(options).set("group.id", group).create().expect("a client");
    let mut list = TopicPartitionList::new();
    list.add_partition_range(topic, 0, PARTITIONS - 1);
    let found = client.committed_offsets(list, WAIT).expect("positions");
    for (at, end) in ends(options, topic).expect("it is there").into_iter().enumerate() {
        let committed = found.find_partition(topic, at as i32).expect("asked for").offset();
        assert_eq!(committed, Offset::Offset(end), "partition {at} of {topic}");
    }
}

/// The topic of this many messages of this size, made and filled by the first run that needs it.
pub async fn fill(options: &Options) -> String {
    let topic = filled(options);
    if create(options, &topic).await {
        let (options, name) = (options.clone(), topic.clone());
        let sent = move || send(&options, &name, 10_000, &payload(&options), None);
        tokio::task::spawn_blocking(sent).await.expect("no panic");
    }
    expect_sent(options, &topic, options.messages());
    topic
}

// ---- publishing -----------------------------------------------------------------------------------

/// How many messages have no delivery report.
#[derive(Default)]
struct Window {
    open: Mutex<usize>,
    less: Condvar,
}

struct Reports;

impl ClientContext for Reports {}

impl ProducerContext for Reports {
    type DeliveryOpaque = Arc<Window>;

    fn delivery(&self, result: &DeliveryResult<'_>, window: Arc<Window>) {
        assert!(result.is_ok(), "delivered");
        let mut open = window.open.lock().expect("no panic");
        *open -= 1;
        // The sender sleeps only when the window is full; to wake it for each place would cost more than the place.
        if *open == WINDOW / 2 || *open == 0 {
            window.less.notify_one();
        }
    }
}

fn send(options: &Options, topic: &str, window: usize, body: &[u8], id: Option<&str>) {
    let producer: ThreadedProducer<Reports> = config(options)
        .set("enable.idempotence", "true")
        .set("linger.ms", options.get("linger", "0".to_owned()))
        .create_with_context(Reports)
        .expect("a producer");
    let reports = Arc::new(Window::default());
    for _ in 0..options.messages() {
        let mut open = reports.open.lock().expect("no panic");
        if *open >= window {
            open = reports.less.wait_while(open, |open| *open > window / 2).expect("no panic");
        }
        *open += 1;
        drop(open);
        let mut record: BaseRecord<'_, [u8], [u8], _> =
            BaseRecord::with_opaque_to(topic, Arc::clone(&reports)).payload(body);
        if let Some(id) = id {
            record =
                record.headers(OwnedHeaders::new_with_capacity(1).insert(Header { key: "ce_id", value: Some(id) }));
        }
        producer.send(record).map_err(|(error, _)| error).expect("taken");
    }
    drop(reports.less.wait_while(reports.open.lock().expect("no panic"), |open| *open > 0).expect("no panic"));
}

/// Publishes with what `send` is, into a topic of its own.
async fn publish_by(options: Options, id: Option<&'static str>) -> Numbers {
    let topic = topic();
    create(&options, &topic).await;
    let body = payload(&options);
    let meter = Meter::start(&options);
    let (sender, name) = (options.clone(), topic.clone());
    tokio::task::spawn_blocking(move || send(&sender, &name, WINDOW, &body, id)).await.expect("no panic");
    let numbers = meter.stop(options.messages());
    expect_sent(&options, &topic, options.messages());
    delete(&options, &topic).await;
    numbers
}

pub async fn publish(options: Options) -> Numbers {
    publish_by(options, None).await
}

/// Messages that can be told apart, as polymq's can: what the client, the wire and the broker pay for that.
pub async fn publish_with_ids(options: Options) -> Numbers {
    publish_by(options, Some("0190b5a3-6c1e-7d11-8f2b-7c0d3f1a2b3c")).await
}

/// The producer that async programs use.
pub async fn publish_with_futures(options: Options) -> Numbers {
    let topic = topic();
    create(&options, &topic).await;
    let body = payload(&options);
    let producer: FutureProducer = config(&options)
        .set("enable.idempotence", "true")
        .set("linger.ms", options.get("linger", "0".to_owned()))
        .create()
        .expect("a producer");
    let meter = Meter::start(&options);
    let sends = stream::iter(0..options.messages()).map(|_| {
        let record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(&topic).payload(&body);
        producer.send_result(record).map_err(|(error, _)| error).expect("taken")
    });
    let delivered = sends.buffered(WINDOW).for_each(|report| {
        report.expect("reported").map_err(|(error, _)| error).expect("delivered");
        std::future::ready(())
    });
    delivered.await;
    let numbers = meter.stop(options.messages());
    expect_sent(&options, &topic, options.messages());
    delete(&options, &topic).await;
    numbers
}

// ---- consuming ------------------------------------------------------------------------------------

fn consumer_config(options: &Options, group: &str) -> ClientConfig {
    let mut config = config(options);
    config.set("group.id", group).set("auto.offset.reset", "earliest");
    config
}

/// As librdkafka comes: a full buffer is looked at again after a second.
pub async fn consume_with_defaults(options: Options) -> Numbers {
    let config = consumer_config(&options, &topic());
    consume_by(options, config, Ask::Body).await
}

/// The same, looking at it sooner: who knows of that setting is twice as fast.
pub async fn consume(options: Options) -> Numbers {
    let mut config = consumer_config(&options, &topic());
    config.set("fetch.queue.backoff.ms", "2");
    consume_by(options, config, Ask::Body).await
}

/// The same, asking for each message's headers, as whoever gives them to a handler has to: librdkafka allocates for the
/// answer, also when it is that there are none.
pub async fn consume_with_headers(options: Options) -> Numbers {
    let mut config = consumer_config(&options, &topic());
    config.set("fetch.queue.backoff.ms", "2");
    consume_by(options, config, Ask::Headers).await
}

/// The same, with a copy of each body: librdkafka takes its own back, so whoever lets handlers run elsewhere needs one.
pub async fn consume_with_copies(options: Options) -> Numbers {
    let mut config = consumer_config(&options, &topic());
    config.set("fetch.queue.backoff.ms", "2");
    consume_by(options, config, Ask::Copies).await
}

/// What a loop asks of each record.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Ask {
    Body,
    Headers,
    Copies,
}

/// A thread that polls, handles, and commits what it has handled ten times a second.
async fn consume_by(options: Options, mut config: ClientConfig, ask: Ask) -> Numbers {
    let (topic, group) = (fill(&options).await, topic());
    let consumer: BaseConsumer = config.set("enable.auto.commit", "false").create().expect("a consumer");
    consumer.subscribe(&[&topic]).expect("subscribed");
    let name = topic.clone();
    let reading = tokio::task::spawn_blocking(move || {
        let mut next: BTreeMap<i32, i64> = BTreeMap::new();
        let mut committed = Instant::now();
        let list = |next: &BTreeMap<i32, i64>| {
            let mut list = TopicPartitionList::new();
            for (partition, offset) in next {
                list.add_partition_offset(&name, *partition, Offset::Offset(*offset)).expect("an offset");
            }
            list
        };
        let mut since = 0;
        while LATCH.remaining() > 0 {
            if let Some(record) = consumer.poll(Duration::from_millis(100)) {
                let record = record.expect("a record");
                if ask >= Ask::Headers {
                    std::hint::black_box(record.headers().map(|headers| headers.count()));
                }
                let body = record.payload().unwrap_or_default();
                if ask == Ask::Copies {
                    handled(std::hint::black_box(&body.to_vec()));
                } else {
                    handled(body);
                }
                *next.entry(record.partition()).or_default() = record.offset() + 1;
            }
            since += 1;
            // A look at the clock for each message would cost more than it is worth.
            if since == 256 {
                since = 0;
                if committed.elapsed() > COMMIT {
                    committed = Instant::now();
                    consumer.commit(&list(&next), CommitMode::Async).expect("on its way");
                }
            }
        }
        consumer.commit(&list(&next), CommitMode::Sync).expect("committed");
    });
    let numbers = all_handled(options.messages()).await;
    reading.await.expect("no panic");
    expect_committed(&options, &topic, &group);
    numbers
}

/// The consumer that async programs use: what is handled is stored, and committed in the background.
pub async fn consume_stream(options: Options) -> Numbers {
    let (topic, group) = (fill(&options).await, topic());
    let consumer: StreamConsumer = consumer_config(&options, &group)
        .set("enable.auto.offset.store", "false")
        .set("fetch.queue.backoff.ms", "2")
        .set("auto.commit.interval.ms", COMMIT.as_millis().to_string())
        .create()
        .expect("a consumer");
    consumer.subscribe(&[&topic]).expect("subscribed");
    let reading = tokio::spawn(async move {
        while LATCH.remaining() > 0 {
            let record = consumer.recv().await.expect("a record");
            handled(record.payload().unwrap_or_default());
            consumer.store_offset_from_message(&record).expect("stored");
        }
        consumer.commit_consumer_state(CommitMode::Sync).expect("committed");
    });
    let numbers = all_handled(options.messages()).await;
    reading.await.expect("no panic");
    expect_committed(&options, &topic, &group);
    numbers
}
