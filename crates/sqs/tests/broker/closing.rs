//! Who closes, who waits for it, and who comes too late.

use std::{
    future::poll_fn,
    pin::pin,
    task::Poll,
    time::{Duration, Instant},
};

use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, Message, ProduceOptions, Settings};
use polymq_sqs::SqsConnection;
use tokio::time::timeout;

use crate::support::{unique, url};

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
