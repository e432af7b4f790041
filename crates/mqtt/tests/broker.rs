//! What is special about MQTT, against a real Mosquitto. The contract that all backends share is in the
//! conformance suite.

mod harness;

use std::time::Duration;

use harness::{Broker, body};
use polymq_core::{Address, ConsumeOptions, ErrorKind, Message, ProduceOptions};

#[tokio::test]
async fn a_message_is_sent_received_and_acknowledged() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("orders");
    let mut consumer = bus.consumer(&queue, &ConsumeOptions::default()).await.expect("consumer");
    let producer = bus.producer(&queue, &ProduceOptions::default()).await.expect("producer");
    let receipt = producer.send(Message::new("hello").with_id("m1").with_header("tenant", "acme")).await.expect("sent");
    assert_eq!(receipt.id.to_string(), "m1");
    let got = harness::one(&mut *consumer).await;
    assert_eq!(body(&got), "hello");
    assert_eq!(got.message.headers().get("tenant"), Some("acme"));
    consumer.settler().ack(got.token).await.expect("acknowledged");
    bus.close().await.expect("closed");
    let bus = broker.connect().await;
    let mut consumer = bus.consumer(&queue, &ConsumeOptions::default()).await.expect("consumer");
    harness::nothing(&mut *consumer, Duration::from_millis(300)).await;
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn a_queue_without_a_session_is_unroutable() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("nobody");
    let undeclared = ProduceOptions { declare: false, ..ProduceOptions::default() };
    let error = bus.producer(&queue, &undeclared).await.expect_err("there is no session");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let producer = bus.producer(&queue, &ProduceOptions::default()).await.expect("declared");
    producer.send(Message::new("kept")).await.expect("the declared session holds it");
    bus.delete(&queue, None).await.expect("deleted");
    let error = producer.send(Message::new("lost")).await.expect_err("nobody holds it");
    assert_eq!(error.kind(), ErrorKind::Unroutable, "{error}");
    let topic = bus.producer(&Address::topic("nobody"), &ProduceOptions::default()).await.expect("producer");
    topic.send(Message::new("fine")).await.expect("a topic needs no subscriber");
}
