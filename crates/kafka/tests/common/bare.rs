//! rdkafka alone.

use std::time::{Duration, Instant};

use async_trait::async_trait;
use polymq_kafka::rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::{Header, Headers, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer},
};
use polymq_testkit::{BareClient, BareMessage, BareReceiver};

const WAIT: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Bare {
    pub servers: String,
}

impl Bare {
    pub fn config(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.servers)
            .set("security.protocol", "sasl_plaintext")
            .set("sasl.mechanism", "PLAIN")
            .set("sasl.username", "admin")
            .set("sasl.password", "secret");
        config
    }

    /// A consumer of a topic from its end, or from its beginning.
    pub fn consumer(&self, topic: &str, from_start: bool) -> BaseConsumer {
        let consumer: BaseConsumer = self.config().set("group.id", "bare").create().expect("a consumer");
        let metadata = consumer.fetch_metadata(Some(topic), WAIT).expect("metadata");
        let mut list = TopicPartitionList::new();
        for partition in metadata.topics()[0].partitions() {
            let (low, high) = consumer.fetch_watermarks(topic, partition.id(), WAIT).expect("watermarks");
            let offset = Offset::Offset(if from_start { low } else { high });
            list.add_partition_offset(topic, partition.id(), offset).expect("a partition");
        }
        consumer.assign(&list).expect("assign");
        consumer
    }
}

#[async_trait]
impl BareClient for Bare {
    async fn send(&self, queue: &str, message: BareMessage) {
        let producer: BaseProducer = self.config().set("acks", "all").create().expect("a producer");
        let mut headers = OwnedHeaders::new();
        let mut key = None;
        for (name, value) in &message.properties {
            match name.strip_prefix("header ") {
                Some(name) => headers = headers.insert(Header { key: name, value: Some(value) }),
                None if name == "key" => key = Some(value.as_str()),
                None => panic!("no property {name}"),
            }
        }
        let mut record: BaseRecord<'_, str, [u8]> = BaseRecord::to(queue).payload(&message.body);
        record.key = key;
        record.headers = (headers.count() > 0).then_some(headers);
        producer.send(record).expect("sent");
        tokio::task::block_in_place(|| producer.flush(WAIT)).expect("delivered");
    }

    async fn listen(&self, queue: &str) -> Box<dyn BareReceiver> {
        let consumer = tokio::task::block_in_place(|| self.consumer(queue, false));
        Box::new(Listening(consumer))
    }

    fn golden(&self) -> BareMessage {
        BareMessage::new(
            b"{\"id\": 7}",
            [
                ("header ce_correlationid", "saga-1"),
                ("header ce_dataversion", "2"),
                ("header ce_id", "0190a0a0-0000-7000-8000-000000000007"),
                ("header ce_replyto", "replies"),
                ("header ce_time", "2023-11-14T22:13:20.123000000Z"),
                ("header ce_type", "order.created"),
                ("header content-type", "application/json"),
                ("header tenant", "acme é"),
                ("key", "customer-7"),
            ],
        )
    }

    fn foreign(&self) -> BareMessage {
        BareMessage::new(b"{\"id\": 1}", [("header content-type", "application/json"), ("header tenant", "acme")])
    }
}

struct Listening(BaseConsumer);

impl std::fmt::Debug for Listening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listening")
    }
}

#[async_trait]
impl BareReceiver for Listening {
    async fn next(&mut self, wait: Duration) -> Option<BareMessage> {
        let deadline = Instant::now() + wait;
        tokio::task::block_in_place(|| {
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                match self.0.poll(left.min(Duration::from_millis(100))) {
                    Some(record) => return Some(from_kafka(&record.expect("a record"))),
                    None if left.is_zero() => return None,
                    None => {}
                }
            }
        })
    }
}

/// A record with all that it has.
pub fn from_kafka(record: &impl Message) -> BareMessage {
    let mut message = BareMessage { body: record.payload().unwrap_or_default().to_vec(), ..BareMessage::default() };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if let Some(key) = record.key() {
        message.properties.insert("key".into(), text(key));
    }
    for header in record.headers().into_iter().flat_map(Headers::iter) {
        message.properties.insert(format!("header {}", header.key), text(header.value.unwrap_or_default()));
    }
    message
}
