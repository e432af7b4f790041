//! Row A7 as it is written: one queue comes in over Kafka and goes out over HTTP, another is on AMQP both ways, in one process.
#![cfg(all(feature = "amqp", feature = "http", feature = "kafka"))]
#![allow(missing_docs)]

use std::time::Duration;

use polymq::{ConsumeOptions, Environment, QueueTable, prelude::*};
use polymq_testkit::{Broker, BrokerControl, free_port};
use tokio::sync::mpsc::unbounded_channel;

const PATIENCE: Duration = Duration::from_secs(60);

async fn connect(url: &str) -> Bus {
    Bus::builder().environment(Environment::default()).url(url).connect().await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a7_kafka_in_http_out_and_amqp_both_ways() {
    let (kafka, rabbitmq) = (Broker::kafka(), Broker::rabbitmq());
    let urls = (
        format!("kafka://admin:secret@{}?connect_timeout=60s", kafka.address()),
        format!("http://127.0.0.1:{}", free_port()),
        format!("amqp://{}?connect_timeout=60s", rabbitmq.address()),
    );
    let table = format!(
        "[queues.one]\nconsumer = \"kafka\"\nproducer = \"http\"\n[queues.two]\nconsumer = \"amqp\"\nproducer = \"amqp\"\n\
         [backends.kafka]\nurl = \"{}\"\n[backends.http]\nurl = \"{}\"\n[backends.amqp]\nurl = \"{}\"\n",
        urls.0, urls.1, urls.2
    );
    let factory =
        HandlerFactory::new(QueueTable::from_toml(&table).unwrap(), Registry::linked(), Environment::default())
            .unwrap();
    let (one, two) = (factory.queue("one").unwrap(), factory.queue("two").unwrap());

    // The server that the first queue goes out to.
    let server = connect(&urls.1).await;
    let mut posted = server.queue("one").subscribe(ConsumeOptions::default()).await.unwrap();
    let out = one.producer().await.unwrap();
    let forward = move |n: u64| {
        let out = out.clone();
        async move { out.send(&(n * 2)).await.map(drop) }
    };
    let first = one.handle(forward).await.unwrap().start().await.unwrap();
    connect(&urls.0).await.queue("one").send(&21_u64).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, posted.next()).await.unwrap().unwrap();
    assert_eq!(answer.message().payload(), "42");
    answer.ack().await.unwrap();

    let (sender, mut seen) = unbounded_channel();
    let handler = move |n: u64| {
        let sent = sender.send(n);
        async move { sent }
    };
    let second = two.handle(handler).await.unwrap().start().await.unwrap();
    two.producer().await.unwrap().send(&7_u64).await.unwrap();
    assert_eq!(tokio::time::timeout(PATIENCE, seen.recv()).await.unwrap(), Some(7));
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    factory.close().await.unwrap();
}
