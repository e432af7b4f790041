//! Sending and receiving, and the options that a producer has.

use std::time::{Duration, Instant};

use polymq_core::{Address, ConsumeOptions, ErrorKind, Message, ProduceOptions};
use tokio::time::sleep;

use crate::{
    harness::{self, Broker, body, client, text},
    words::*,
};

#[tokio::test]
async fn a_message_is_sent_received_and_acknowledged() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("orders");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    let receipt = producer.send(Message::new("hello").with_id("m1").with_header("tenant", "acme")).await.expect("sent");
    assert_eq!(receipt.id.to_string(), "m1");
    let got = harness::one(&mut *consumer).await;
    assert_eq!(body(&got), "hello");
    assert_eq!(got.message.headers().get("tenant"), Some("acme"));
    assert_eq!(got.details, None);
    consumer.settler().ack(got.token).await.expect("acknowledged");
    bus.close().await.expect("closed");
    let bus = broker.connect().await;
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    harness::nothing(&mut *consumer, Duration::from_millis(300)).await;
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn a_queue_without_a_session_is_unroutable() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("nobody");
    let undeclared = ProduceOptions { declare: false, ..produce() };
    let error = bus.producer(&queue, &undeclared).await.expect_err("there is no session");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = bus.consumer(&queue, &ConsumeOptions { declare: false, ..consume() }).await.expect_err("no session");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let producer = bus.producer(&queue, &produce()).await.expect("declared");
    producer.send(Message::new("kept")).await.expect("the declared session holds it");
    bus.producer(&queue, &undeclared).await.expect("there is a session");
    bus.delete(&queue, None).await.expect("deleted");
    let error = producer.send(Message::new("lost")).await.expect_err("nobody holds it");
    assert_eq!(error.kind(), ErrorKind::Unroutable, "{error}");
    let topic = bus.producer(&Address::topic("nobody"), &produce()).await.expect("producer");
    topic.send(Message::new("fine")).await.expect("a topic needs no subscriber");
    let error = producer.send(Message::new("lost")).await.expect_err("nobody holds it");
    assert_eq!(error.kind(), ErrorKind::Unroutable, "{error}");
}

#[tokio::test]
async fn what_is_sent_while_nobody_consumes_is_delivered_later() {
    for protocol in ["5", "3.1.1"] {
        let broker = Broker::start().await;
        let queue = Address::queue("later");
        let bus = broker.connect_with(&[("protocol", protocol)]).await;
        bus.declare(&queue, &consume()).await.expect("declared");
        send_many(&*bus, &queue, "m", 50).await;
        bus.close().await.expect("closed");
        let bus = broker.connect_with(&[("protocol", protocol)]).await;
        let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
        let got = harness::take(&mut *consumer, 50).await;
        let bodies: Vec<_> = got.iter().map(body).collect();
        assert_eq!(bodies, (0..50).map(|n| format!("m{n}")).collect::<Vec<_>>(), "in order");
        assert!(got.iter().all(|incoming| incoming.details.is_none()), "delivered for the first time");
        // The group of a topic keeps messages too, once it has been there.
        let topic = Address::topic("news");
        let mut member = bus.consumer(&topic, &group("audit")).await.expect("consumer");
        member.close().await.expect("closed");
        send_many(&*bus, &topic, "t", 5).await;
        let mut member = bus.consumer(&topic, &group("audit")).await.expect("consumer");
        each_once(harness::take(&mut *member, 5).await.iter().map(body), "t", 5);
        bus.close().await.expect("closed");
    }
}

#[tokio::test]
async fn every_quality_of_service_is_delivered() {
    let broker = Broker::start().await;
    for protocol in ["5", "3.1.1"] {
        let bus = broker.connect_with(&[("protocol", protocol)]).await;
        let queue = Address::queue("quality");
        let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
        for qos in ["0", "1", "2"] {
            let producer = bus.producer(&queue, &with(&[("qos", qos)])).await.expect("producer");
            let sends: Vec<_> = (0..500).map(|n| producer.send(Message::new(format!("{qos}-{n}")))).collect();
            for send in sends {
                send.await.expect("sent");
            }
            producer.flush().await.expect("flushed");
            each_once(harness::take(&mut *consumer, 500).await.iter().map(body), &format!("{qos}-"), 500);
        }
        for (key, value) in [("qos", "3"), ("retain", "maybe"), ("exchange", "x")] {
            let error = bus.producer(&queue, &with(&[(key, value)])).await.expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(key), "{error}");
        }
        bus.close().await.expect("closed");
    }
}

#[tokio::test]
async fn a_retained_message_meets_a_new_subscriber() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let topic = Address::topic("state/door");
    let producer = bus.producer(&topic, &with(&[("retain", "true")])).await.expect("producer");
    producer.send(Message::new("open")).await.expect("sent");
    let mut consumer = bus.consumer(&topic, &consume()).await.expect("consumer");
    let got = harness::one(&mut *consumer).await;
    assert!(got.details.as_ref().is_some_and(|details| details.retained));
    producer.send(Message::new("closed")).await.expect("sent");
    let got = harness::one(&mut *consumer).await;
    assert_eq!((body(&got).as_str(), got.details.is_none()), ("closed", true));
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn foreign_clients_read_and_write_the_same_channels() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("interop");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    for version in ["311", "5"] {
        let port = broker.port;
        let sent = tokio::task::spawn_blocking(move || {
            client("mosquitto_pub", port, &["-V", version, "-t", "interop", "-q", "1", "-m", "from afar"])
        });
        assert!(sent.await.expect("ran").status.success());
        let got = harness::one(&mut *consumer).await;
        assert_eq!(got.message, Message::new("from afar"));
        consumer.settler().ack(got.token).await.expect("acknowledged");
    }
    let port = broker.port;
    let listening = tokio::task::spawn_blocking(move || {
        client("mosquitto_sub", port, &["-V", "5", "-t", "interop", "-C", "1", "-W", "60", "-F", "%P|%C|%p"])
    });
    let heard = loop {
        let producer = bus.producer(&queue, &produce()).await.expect("producer");
        let message = Message::new("{}")
            .with_time(std::time::SystemTime::now())
            .with_id("i1")
            .with_kind("k")
            .with_content_type("application/json");
        producer.send(message.with_header("tenant", "acme")).await.expect("sent");
        if listening.is_finished() {
            break text(&listening.await.expect("ran").stdout);
        }
        sleep(Duration::from_millis(50)).await;
    };
    assert!(heard.starts_with("id:i1 type:k time:"), "{heard}");
    assert!(heard.trim_end().ends_with("tenant:acme|application/json|{}"), "{heard}");
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn attempts_and_bodies_survive_version_3_1_1() {
    let broker = Broker::start().await;
    let bus = broker.connect_with(&[("protocol", "3.1.1")]).await;
    let queue = Address::queue("old");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let mut second =
        broker.connect_with(&[("protocol", "3.1.1")]).await.consumer(&queue, &consume()).await.expect("consumer");
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    // The broker deals to both from when both have got something.
    let deadline = Instant::now() + harness::PATIENCE;
    let mut reached = [false; 2];
    while reached != [true; 2] {
        assert!(Instant::now() < deadline, "one of them gets nothing: {reached:?}");
        producer.send(Message::new("probe")).await.expect("sent");
        tokio::select! {
            _ = harness::take(&mut *consumer, 1) => reached[0] = true,
            _ = harness::take(&mut *second, 1) => reached[1] = true,
        }
    }
    for n in 0..4 {
        producer.send(Message::new(format!("m{n}")).with_id("dropped")).await.expect("sent");
    }
    let first = harness::one(&mut *consumer).await;
    assert_eq!(first.message.id(), None, "MQTT 3.1.1 carries the body alone");
    consumer.settler().retry(first.token, &first.message, 2, Duration::ZERO).await.expect("again");
    let mut got = harness::take(&mut *consumer, 2).await;
    assert!(got.iter().any(|incoming| incoming.attempt() == 2));
    got.extend(harness::take(&mut *second, 2).await);
    each_once(got.iter().map(body), "m", 4);
    bus.close().await.expect("closed");
}
