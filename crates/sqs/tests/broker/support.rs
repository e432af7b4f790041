//! The emulator that the tests share, and what they have in common.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use polymq_core::{Bus, Channel, ConsumeOptions, Delivery, Environment, Registry, Settings, Subscription};
use polymq_sqs::{SqsBackend, SqsConnection, aws_sdk_sqs::Client};
use polymq_testkit::{Broker, BrokerControl};

use crate::harness;

static SHARED: Mutex<Option<Broker>> = Mutex::new(None);

pub fn start() {
    *SHARED.lock().expect("a lock") = Some(Broker::sqs("ministack"));
}

pub fn stop() {
    drop(SHARED.lock().expect("a lock").take());
}

pub fn address() -> SocketAddr {
    SHARED.lock().expect("a lock").as_ref().expect("started by main").address()
}

pub fn url() -> String {
    url_of(address())
}

pub fn url_of(address: SocketAddr) -> String {
    format!("sqs://test:test@{address}?poll_wait=1s&connect_timeout=60s")
}

pub fn native() -> Client {
    harness::native(&format!("http://{}", address()))
}

pub async fn native_sns() -> polymq_sqs::aws_sdk_sns::Client {
    let settings = Settings::from_url(&url()).expect("a URL");
    SqsConnection::connect(&settings).await.expect("a connection").native_sns().await.expect("SNS")
}

/// A bus that looks at nothing but this URL.
pub async fn bus(url: &str) -> Bus {
    let mut registry = Registry::new();
    registry.add(Arc::new(SqsBackend)).expect("one backend");
    let builder = Bus::builder().registry(registry).environment(Environment::default());
    builder.url(url).connect().await.expect("a connection")
}

/// A name that no other test uses.
pub fn unique(name: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

pub async fn subscribe(channel: &Channel) -> Subscription {
    channel.subscribe(ConsumeOptions::default()).await.expect("a subscription")
}

/// Options that only this backend knows.
pub fn with<const N: usize>(group: Option<&str>, extra: [(&str, &str); N]) -> ConsumeOptions {
    let own = |(key, value): (&str, &str)| (key.to_owned(), value.to_owned());
    ConsumeOptions {
        group: group.map(str::to_owned),
        extra: extra.into_iter().map(own).collect(),
        ..ConsumeOptions::default()
    }
}

pub async fn next(subscription: &mut Subscription) -> Delivery {
    let delivery = tokio::time::timeout(Duration::from_secs(60), subscription.next()).await;
    delivery.expect("a message in time").expect("a message")
}

pub async fn quiet(subscription: &mut Subscription) {
    let more = subscription.receive(10, Duration::from_millis(500)).await.expect("receive");
    assert!(more.is_empty(), "nothing may come: {more:?}");
}

pub fn text(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().payload()).into_owned()
}

/// Counts requests by what they ask for.
#[derive(Debug, Clone, Default)]
pub struct Counted(Arc<Mutex<BTreeMap<String, usize>>>);

impl Counted {
    pub fn add(&self, action: String) {
        *self.0.lock().expect("a lock").entry(action).or_default() += 1;
    }

    pub fn of(&self, action: &str) -> usize {
        self.0.lock().expect("a lock").get(action).copied().unwrap_or_default()
    }
}
