//! Retries: what they count, where they wait, and what they take from others.

use std::time::Duration;

use polymq_core::{Address, ConsumeOptions, Message};
use tokio::time::{Instant, timeout};

use crate::{
    harness::{self, Broker, body},
    words::*,
};

#[tokio::test]
async fn a_retry_counts_and_waits_and_gives_the_original_up_last() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("retry");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let settler = consumer.settler();
    send_many(&*bus, &queue, "m", 1).await;
    let first = harness::one(&mut *consumer).await;
    assert_eq!(first.message.header_attempt(), 1);
    let began = Instant::now();
    settler.retry(first.token, &first.message, 2, Duration::from_millis(300)).await.expect("will happen");
    let second = harness::one(&mut *consumer).await;
    assert!(began.elapsed() >= Duration::from_millis(300) && began.elapsed() < harness::PATIENCE);
    assert_eq!((second.message.header_attempt(), body(&second).as_str()), (2, "m0"));
    assert_eq!(second.message.id(), first.message.id());
    settler.retry(second.token, &second.message, 3, Duration::ZERO).await.expect("sent again");
    let third = harness::one(&mut *consumer).await;
    assert_eq!(third.message.header_attempt(), 3);
    // The number survives a restart of the consumer.
    drop(third);
    bus.close().await.expect("closed");
    let bus = broker.connect().await;
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let again = harness::one(&mut *consumer).await;
    assert_eq!(again.message.header_attempt(), 3);
    assert!(again.details.as_ref().is_some_and(|details| details.redelivered));
    consumer.settler().ack(again.token).await.expect("acknowledged");
    harness::nothing(&mut *consumer, Duration::from_millis(200)).await;

    // The members of other groups must not see the retry of one.
    let topic = Address::topic("retries");
    let mut one = bus.consumer(&topic, &group("one")).await.expect("consumer");
    let mut two = bus.consumer(&topic, &group("two")).await.expect("consumer");
    send_many(&*bus, &topic, "t", 1).await;
    let first = harness::one(&mut *one).await;
    one.settler().retry(first.token, &first.message, 2, Duration::from_millis(50)).await.expect("will happen");
    assert_eq!(harness::one(&mut *one).await.attempt(), 2);
    harness::take(&mut *two, 1).await;
    harness::nothing(&mut *two, Duration::from_millis(200)).await;
    bus.close().await.expect("closed");
}

/// A retry that waits is still lent as far as the broker knows, and takes none of what it may lend all the same.
#[tokio::test]
async fn retries_that_wait_hold_nobody_up() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let one_by_one = |group: Option<&str>| ConsumeOptions { prefetch: 1, group: group.map(Into::into), ..consume() };
    for (address, options) in [
        (Address::queue("failing"), one_by_one(None)),
        (Address::topic("failing/group"), one_by_one(Some("audit"))),
        (Address::topic("failing/own"), one_by_one(None)),
    ] {
        let mut consumer = bus.consumer(&address, &options).await.expect("consumer");
        let settler = consumer.settler();
        send_many(&*bus, &address, "m", 10).await;
        let mut seen = Vec::new();
        for _ in 0..10 {
            let got = harness::one(&mut *consumer).await;
            seen.push(body(&got));
            let retried = settler.retry(got.token, &got.message, 2, Duration::from_secs(3600));
            timeout(harness::PATIENCE, retried).await.expect("in time").expect("will happen");
        }
        each_once(seen, "m", 10);
        send_many(&*bus, &address, "later", 10).await;
        each_once(harness::take(&mut *consumer, 10).await.iter().map(body), "later", 10);
        consumer.close().await.expect("closed");
    }
    bus.close().await.expect("closed");
}

/// A retry that waits in a process takes nothing with it when the last consumer there closes: the broker has the message still.
#[tokio::test]
async fn a_group_that_is_left_leaves_its_waiting_retries_too() {
    let broker = Broker::start().await;
    let (leaves, stays) = (broker.connect().await, broker.connect().await);
    let topic = Address::topic("left/retries");
    let mut consumer = leaves.consumer(&topic, &group("audit")).await.expect("consumer");
    send_many(&*leaves, &topic, "m", 2).await;
    let held = harness::hold(&mut *consumer, 2).await;
    let settler = consumer.settler();
    settler.retry(held[0].token, &held[0].message, 2, Duration::from_secs(3600)).await.expect("will happen");
    // One is in a handler's hands still, which may take its time.
    consumer.close().await.expect("closed");
    settler.retry(held[1].token, &held[1].message, 2, Duration::from_secs(3600)).await.expect("will happen");
    let mut next = stays.consumer(&topic, &group("audit")).await.expect("consumer");
    each_once(harness::take(&mut *next, 2).await.iter().map(body), "m", 2);
    leaves.close().await.and(stays.close().await).expect("closed");
}

/// A connection that is made again because retries wait subscribes again, which is no new subscription.
#[tokio::test]
async fn a_wider_connection_brings_no_retained_message_again() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let topic = Address::topic("state/window");
    let retaining = bus.producer(&topic, &with(&[("retain", "true")])).await.expect("producer");
    retaining.send(Message::new("retained")).await.expect("sent");
    let options = ConsumeOptions { prefetch: 1, ..consume() };
    let mut consumer = bus.consumer(&topic, &options).await.expect("consumer");
    let settler = consumer.settler();
    let mut seen = Vec::new();
    for n in 0..5 {
        let got = harness::one(&mut *consumer).await;
        seen.push(body(&got));
        settler.retry(got.token, &got.message, 2, Duration::from_secs(3600)).await.expect("will happen");
        let producer = bus.producer(&topic, &produce()).await.expect("producer");
        producer.send(Message::new(format!("m{n}"))).await.expect("sent");
    }
    assert_eq!(seen, ["retained", "m0", "m1", "m2", "m3"]);
    assert_eq!(body(&harness::one(&mut *consumer).await), "m4");
    bus.close().await.expect("closed");
}
