//! A broker that is not there yet, or away at the moment, is waited for.

use std::{sync::Arc, time::Duration};

use polymq_core::{Address, Connection, ConsumeOptions, Consumer, ErrorKind, HealthState, Message, Result};
use tokio::time::timeout;

use crate::{
    harness::{self, Broker, body},
    words::*,
};

/// A broker that is away, and a service that waits for it.
async fn early() -> (Broker, Arc<dyn Connection>) {
    let broker = Broker::start().await;
    broker.kill().await;
    let bus = broker.connect_with(&[("connect_retry", "true"), ("reconnect_max", "300ms")]).await;
    (broker, bus)
}

async fn consumer(bus: &dyn Connection, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
    timeout(harness::PATIENCE, bus.consumer(address, options)).await.expect("whoever starts it need not wait")
}

#[tokio::test]
async fn a_service_is_started_before_its_broker() {
    let (broker, bus) = early().await;
    let (queue, topic, held) = (Address::queue("early"), Address::topic("early/news"), Address::queue("early-held"));
    let letters = Address::queue("early.dlq");
    let options = ConsumeOptions { dead_letters: Some(letters.clone()), ..consume() };
    let mut orders = consumer(&*bus, &queue, &options).await.expect("a consumer");
    let mut audit = consumer(&*bus, &topic, &group("audit")).await.expect("a consumer");
    let mut plain = consumer(&*bus, &topic, &consume()).await.expect("a consumer");
    let mut sends = Vec::new();
    for address in [&queue, &held] {
        let producer = timeout(harness::PATIENCE, bus.producer(address, &produce())).await.expect("nobody waits");
        sends.push(producer.expect("a producer").send(Message::new("early")));
    }
    assert!(timeout(Duration::ZERO, &mut sends[0]).await.is_err(), "there is no broker");
    assert_eq!(bus.health().now().state, HealthState::Down);
    broker.up().await;
    for send in sends {
        timeout(harness::PATIENCE, send).await.expect("in time").expect("its queue was there before it");
    }
    assert_eq!(body(&harness::one(&mut *orders).await), "early");
    let mut health = bus.health();
    while health.now().state == HealthState::Down {
        timeout(harness::PATIENCE, health.changed())
            .await
            .expect("every consumer has its session")
            .expect("not closed");
    }
    bus.producer(&topic, &produce()).await.expect("a producer").send(Message::new("news")).await.expect("sent");
    assert_eq!(body(&harness::one(&mut *audit).await), "news");
    assert_eq!(body(&harness::one(&mut *plain).await), "news");
    let other = broker.connect().await;
    for made in [&letters, &held] {
        assert!(other.exists(made, None).await.expect("answered"), "{made:?}");
    }
    bus.close().await.and(other.close().await).expect("closed");
}

/// What must not be made is told when there is somebody to ask, and who is told to end does not wait.
#[tokio::test]
async fn a_service_that_waits_is_told_the_truth() {
    let (broker, bus) = early().await;
    let missing = ConsumeOptions { declare: false, ..consume() };
    let mut nowhere = consumer(&*bus, &Address::queue("early-missing"), &missing).await.expect("a consumer");
    let (_away, closing) = early().await;
    let mut ended = consumer(&*closing, &Address::queue("early"), &consume()).await.expect("a consumer");
    timeout(harness::PATIENCE, closing.close()).await.expect("in time").expect("closed");
    let told = timeout(harness::PATIENCE, ended.receive(1, &mut Vec::new())).await.expect("it ends");
    assert_eq!(told.expect_err("closed").kind(), ErrorKind::Closed);
    broker.up().await;
    let told = timeout(harness::PATIENCE, nowhere.receive(1, &mut Vec::new())).await.expect("it is told");
    assert_eq!(told.expect_err("it is not there").kind(), ErrorKind::NotFound);
    let exists = bus.exists(&Address::queue("early-missing"), None).await.expect("answered");
    assert!(!exists, "nobody has made it");
    bus.close().await.expect("closed");
}

/// What is opened for the first time during an outage.
#[tokio::test]
async fn an_outage_is_waited_for() {
    let broker = Broker::start().await;
    let bus = broker.connect_with(&[("reconnect_max", "300ms")]).await;
    let mut health = bus.health();
    broker.kill().await;
    while health.now().state != HealthState::Down {
        timeout(harness::PATIENCE, health.changed()).await.expect("the loss is seen").expect("not closed");
    }
    let (sent, consumed, declared) = (Address::queue("sent"), Address::queue("consumed"), Address::queue("declared"));
    let opened = timeout(harness::PATIENCE, bus.producer(&sent, &produce())).await.expect("nobody waits");
    let send = opened.expect("a producer").send(Message::new("meanwhile"));
    let options = consume();
    let (consumer, declaration, ()) =
        tokio::join!(bus.consumer(&consumed, &options), bus.declare(&declared, &options), broker.up());
    declaration.expect("declared");
    timeout(harness::PATIENCE, send).await.expect("in time").expect("its queue was there before it");
    send_many(&*bus, &consumed, "m", 3).await;
    each_once(harness::take(&mut *consumer.expect("a consumer"), 3).await.iter().map(body), "m", 3);
    bus.close().await.expect("closed");
}
