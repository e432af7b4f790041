//! Who closes, who waits for it, and who comes too late.

use std::{
    future::poll_fn,
    pin::pin,
    task::Poll,
    time::{Duration, Instant},
};

use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, Message, ProduceOptions, Settings};
use polymq_sqs::SqsConnection;
use polymq_testkit::{Direction, Proxy};
use tokio::time::timeout;

use crate::support::{address, bus, subscribe, unique, url, url_of};

async fn connect() -> SqsConnection {
    SqsConnection::connect(&Settings::from_url(&url()).expect("a URL")).await.expect("a connection")
}

/// While a connection closes nobody begins to consume; who closes after a close that was dropped waits for what that one had
/// begun: what was held is back.
pub async fn a_close_that_was_dropped_is_waited_for() {
    let (connection, queue) = (connect().await, Address::queue(unique("closing")));
    // What is not returned stays away for longer than anybody waits here.
    let options = ConsumeOptions { lease: Duration::from_secs(600), ..ConsumeOptions::default() };
    let producer = connection.producer(&queue, &ProduceOptions::default()).await.expect("a producer");
    producer.send(Message::new("held")).await.expect("sent");
    let mut consumer = connection.consumer(&queue, &options).await.expect("a consumer");
    let mut held = Vec::new();
    timeout(Duration::from_secs(30), consumer.receive(1, &mut held)).await.expect("in time").expect("a message");
    {
        let mut closing = pin!(connection.close());
        let waits = poll_fn(|context| Poll::Ready(closing.as_mut().poll(context).is_pending())).await;
        assert!(waits, "there is something to wait for");
        let late = connection.consumer(&queue, &options).await.map(drop);
        assert_eq!(late.expect_err("it closes").kind(), ErrorKind::Closed);
    }
    let began = Instant::now();
    connection.close().await.expect("closed");
    let given_up = began.elapsed() >= Duration::from_secs(5);
    let error = consumer.settler().ack(held[0].token).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    // On a machine that stands still it gives up waiting for the emulator, as it may.
    if given_up {
        return;
    }
    let other = connect().await;
    let mut next = other.consumer(&queue, &options).await.expect("a consumer");
    timeout(Duration::from_secs(60), next.receive(1, &mut held)).await.expect("it is back").expect("a message");
    next.settler().ack(held[1].token).await.expect("ack");
    other.close().await.expect("closed");
}

/// Closing a consumer that waits in a long poll, and then its connection, waits for that poll once: 5 s in all, not 5 s for each
/// step.
pub async fn closing_waits_for_a_long_poll_once() {
    let mut took = Vec::new();
    // A busy machine may take longer twice.
    while took.len() < 3 {
        let proxy = Proxy::start(address()).await.expect("a proxy");
        let url = format!("{}&heartbeat=600s", url_of(proxy.address())).replace("poll_wait=1s", "poll_wait=20s");
        let bus = bus(&url).await;
        let mut subscription = subscribe(&bus.queue(unique("idle"))).await;
        // Its answer never comes.
        proxy.pause_one_way(Direction::Down);
        assert!(subscription.receive(1, Duration::from_millis(300)).await.expect("receive").is_empty());
        let began = Instant::now();
        subscription.close().await.expect("closed");
        bus.close().await.expect("closed");
        took.push(began.elapsed());
        if began.elapsed() < Duration::from_secs(9) {
            return;
        }
    }
    panic!("closing took {took:?}");
}
