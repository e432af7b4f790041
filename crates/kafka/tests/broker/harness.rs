//! One broker for all tests, and what they have in common.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use polymq_core::{
    Address, Connection, ConsumeOptions, Consumer, ErrorKind, Incoming, Message, MessageId, ProduceOptions, Producer,
    Settings,
};
use polymq_kafka::KafkaConnection;
use polymq_testkit::{Broker, BrokerControl};

use crate::common::bare::Bare;

static BROKER: Mutex<Option<Broker>> = Mutex::new(None);

pub const PATIENCE: Duration = Duration::from_secs(60);

pub fn start() {
    *BROKER.lock().unwrap_or_else(PoisonError::into_inner) = Some(Broker::kafka());
}

pub fn stop() {
    *BROKER.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

pub fn bare() -> Bare {
    let broker = BROKER.lock().unwrap_or_else(PoisonError::into_inner);
    Bare { servers: broker.as_ref().expect("it is started").address().to_string() }
}

pub fn url() -> String {
    format!("kafka://admin:secret@{}?session_timeout=30s&connect_timeout=60s", bare().servers)
}

pub fn settings() -> Settings {
    Settings::from_url(&url()).expect("a URL")
}

pub async fn connect(settings: &Settings) -> KafkaConnection {
    KafkaConnection::connect(settings).await.expect("connect")
}

/// What closing a connection answered. It gives up waiting for a broker that takes longer than five seconds, as one may on a
/// machine that stands still; it is closed all the same.
#[track_caller]
pub fn closed(answer: polymq_core::Result<()>) {
    if let Err(error) = answer {
        assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    }
}

/// A name that no other test uses.
pub fn name(what: &str) -> String {
    use std::time::SystemTime;
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970").as_nanos();
    format!("{what}-{nanos:x}")
}

pub async fn producer(connection: &KafkaConnection, address: &Address) -> Box<dyn Producer> {
    connection.producer(address, &ProduceOptions::default()).await.expect("a producer")
}

pub async fn consumer(connection: &KafkaConnection, address: &Address, options: ConsumeOptions) -> Box<dyn Consumer> {
    connection.consumer(address, &options).await.expect("a consumer")
}

pub fn group(name: &str) -> ConsumeOptions {
    ConsumeOptions { group: Some(name.into()), ..ConsumeOptions::default() }
}

/// Sends these bodies, one after the other.
pub async fn send(producer: &dyn Producer, bodies: impl IntoIterator<Item = String>) {
    let sent: Vec<_> =
        bodies.into_iter().map(|body| producer.send(Message::new(body).with_id(MessageId::new()))).collect();
    for sent in sent {
        sent.await.expect("accepted");
    }
}

/// The next `count` deliveries.
pub async fn take(consumer: &mut dyn Consumer, count: usize) -> Vec<Incoming> {
    let mut taken = Vec::new();
    while taken.len() < count {
        let more = tokio::time::timeout(PATIENCE, consumer.receive(count - taken.len(), &mut taken)).await;
        more.unwrap_or_else(|_| panic!("a message in time")).expect("receive");
    }
    taken
}

/// Nothing more comes.
pub async fn quiet(consumer: &mut dyn Consumer) {
    let mut more = Vec::new();
    let waited = tokio::time::timeout(Duration::from_millis(500), consumer.receive(10, &mut more)).await;
    assert!(waited.is_err(), "these came although nothing may come: {:?}", more.iter().map(body).collect::<Vec<_>>());
}

pub fn body(incoming: &Incoming) -> String {
    String::from_utf8_lossy(incoming.message.payload()).into_owned()
}
