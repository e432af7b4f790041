//! Who gets what: consumers of one queue, groups of a topic, wildcards.

use std::time::{Duration, Instant};

use polymq_core::{Address, ConsumeOptions, ErrorKind, Message};
use tokio::time::{sleep, timeout};

use crate::{
    harness::{self, Broker, body},
    words::*,
};

#[tokio::test]
async fn consumers_of_one_queue_split_its_messages() {
    let broker = Broker::start().await;
    let queue = Address::queue("shared");
    let (one, two) = (broker.connect().await, broker.connect().await);
    // Two on one connection, one on another.
    let mut consumers = Vec::new();
    for bus in [&one, &one, &two] {
        consumers.push(bus.consumer(&queue, &ConsumeOptions { prefetch: 8, ..consume() }).await.expect("consumer"));
    }
    let (found, mut finds) = tokio::sync::mpsc::unbounded_channel();
    for (n, mut consumer) in consumers.into_iter().enumerate() {
        let found = found.clone();
        tokio::spawn(async move {
            let settler = consumer.settler();
            let mut got = Vec::new();
            while consumer.receive(4, &mut got).await.is_ok() {
                for incoming in got.drain(..) {
                    let _ = found.send((n, body(&incoming)));
                    settler.ack(incoming.token).await.expect("acknowledged");
                }
            }
        });
    }
    // The broker deals to both connections from when both have got something.
    let prober = one.producer(&queue, &produce()).await.expect("producer");
    let deadline = Instant::now() + harness::PATIENCE;
    let mut reached = [false; 2];
    while reached != [true; 2] {
        assert!(Instant::now() < deadline, "a connection gets nothing: {reached:?}");
        prober.send(Message::new("probe")).await.expect("sent");
        let (n, _) = timeout(harness::PATIENCE, finds.recv()).await.expect("in time").expect("found");
        reached[usize::from(n == 2)] = true;
    }
    send_many(&*one, &queue, "m", 300).await;
    let mut seen = Vec::new();
    while seen.len() < 300 {
        seen.push(timeout(harness::PATIENCE, finds.recv()).await.expect("in time").expect("found"));
    }
    sleep(Duration::from_millis(200)).await;
    assert!(finds.try_recv().is_err(), "a message came twice");
    each_once(seen.iter().map(|(_, body)| body.clone()), "m", 300);
    let of_two = seen.iter().filter(|(n, _)| *n == 2).count();
    assert!((100..200).contains(&of_two), "the broker deals out half of 300 to each connection, not {of_two}");
    one.close().await.expect("closed");
    two.close().await.expect("closed");
}

#[tokio::test]
async fn a_consumer_that_leaves_leaves_nothing_behind() {
    let broker = Broker::start().await;
    let queue = Address::queue("leaving");
    let (stays, leaves) = (broker.connect().await, broker.connect().await);
    for (first, second) in [(&stays, &leaves), (&leaves, &stays)] {
        let first = (*first).consumer(&queue, &consume()).await.expect("consumer");
        let second = (*second).consumer(&queue, &consume()).await.expect("consumer");
        send_many(&*stays, &queue, "m", 100).await;
        drop((first, second));
        // Both have let go; whoever comes next gets the part of each.
        let mut next = stays.consumer(&queue, &consume()).await.expect("consumer");
        each_once(harness::take(&mut *next, 100).await.iter().map(body), "m", 100);
        next.close().await.expect("closed");
    }
    // One leaves while the other goes on.
    let mut goes_on = stays.consumer(&queue, &consume()).await.expect("consumer");
    let mut other = leaves.consumer(&queue, &ConsumeOptions { prefetch: 4, ..consume() }).await.expect("consumer");
    send_many(&*stays, &queue, "m", 100).await;
    let held = harness::one(&mut *other).await;
    leaves.close().await.expect("closed");
    each_once(harness::take(&mut *goes_on, 100).await.iter().map(body), "m", 100);
    drop(held);
    stays.close().await.expect("closed");
}

#[tokio::test]
async fn every_group_gets_every_message_and_its_members_share() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let topic = Address::topic("events/eu");
    let mut audit = bus.consumer(&topic, &group("audit")).await.expect("consumer");
    let mut billing = bus.consumer(&topic, &group("billing")).await.expect("consumer");
    let mut one = bus.consumer(&Address::topic("events/+"), &consume()).await.expect("consumer");
    let mut many = bus.consumer(&Address::topic("#"), &consume()).await.expect("consumer");
    let mut other = bus.consumer(&Address::topic("events/us"), &consume()).await.expect("consumer");
    send_many(&*bus, &topic, "e", 20).await;
    for consumer in [&mut audit, &mut billing, &mut one, &mut many] {
        each_once(harness::take(&mut **consumer, 20).await.iter().map(body), "e", 20);
    }
    harness::nothing(&mut *other, Duration::from_millis(200)).await;
    // What consumers say to each other is no message of a user's.
    harness::nothing(&mut *many, Duration::from_millis(200)).await;
    bus.producer(&Address::topic("events/us"), &produce())
        .await
        .expect("producer")
        .send(Message::new("x"))
        .await
        .expect("sent");
    let got = harness::one(&mut *one).await;
    assert_eq!(got.channel(), Some("events/us"));
    // Handed out again, it still knows where it came from.
    one.settler().release(got.token, got.message);
    assert_eq!(harness::one(&mut *one).await.channel(), Some("events/us"));
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn wildcards_follow_the_table() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    for (filter, hits, misses) in [
        ("a/+", vec!["a/b", "a/"], vec!["a", "a/b/c", "b/b"]),
        ("+/b", vec!["a/b", "/b"], vec!["b", "a/b/b"]),
        ("a/#", vec!["a", "a/b", "a/b/c"], vec!["b", "ab"]),
        ("+", vec!["a", "grün"], vec!["a/b"]),
        ("a/+/c", vec!["a/b/c", "a//c"], vec!["a/c", "a/b/d"]),
    ] {
        let mut consumer = bus.consumer(&Address::topic(filter), &consume()).await.expect(filter);
        for topic in hits.iter().chain(&misses) {
            let producer = bus.producer(&Address::topic(*topic), &produce()).await.expect("producer");
            producer.send(Message::new(*topic)).await.expect("sent");
        }
        let got = harness::take(&mut *consumer, hits.len()).await;
        assert_eq!(got.iter().map(body).collect::<Vec<_>>(), hits, "{filter}");
        harness::nothing(&mut *consumer, Duration::from_millis(50)).await;
        consumer.close().await.expect("closed");
    }
    for (address, word) in
        [(Address::topic("a/+"), "wildcard"), (Address::queue("#"), "wildcard"), (Address::queue("$a"), "$")]
    {
        let error = bus.producer(&address, &produce()).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(word), "{error}");
    }
}
