//! What a bus holds at most, and what it makes of a broker that takes or gives no more for now.

use polymq_broker::Limits;
use polymq_core::{ConsumeOptions, ErrorKind, Message, Start};
use tokio::time::timeout;

use crate::{
    PATIENCE, SECOND, body,
    bus::{group, send, start},
    connect, next, quiet, take,
};

fn numbers(range: std::ops::RangeInclusive<u32>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

/// A poll that the broker refuses, as too much is held already, takes nothing from who holds it.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_poll_keeps_what_is_held() {
    let (broker, bus) = start(Limits { held_count: 8, ..Limits::default() }).await;
    let queue = bus.queue("q");
    for sent in queue.send_all(numbers(1..=20).into_iter().map(Message::new)).await {
        sent.expect("accepted");
    }
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    // One poll brings as much as may be held, and the next one is refused.
    let mut held = Vec::new();
    for n in numbers(1..=8) {
        held.push(next(&mut subscription).await);
        assert_eq!(body(&held[held.len() - 1]), n);
    }
    quiet(&mut subscription).await;
    for delivery in held {
        delivery.ack().await.expect("it is held as it was");
    }
    assert_eq!(take(&mut subscription, 4).await, numbers(9..=12));
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// A message that is too large for the broker is refused by itself: those that are on their way with it are accepted.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_is_refused_alone() {
    let (broker, bus) = start(Limits { message: 1 << 20, ..Limits::default() }).await;
    let large = std::iter::once("x".repeat(3 << 20));
    let sent = bus.queue("q").send_all(large.chain(numbers(1..=600)).map(Message::new)).await;
    let mut results = sent.into_iter();
    let error = results.next().expect("a result").expect_err("too large");
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error:?}");
    for result in results {
        result.expect("accepted");
    }
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// What is fetched and not settled is bounded in bytes too, as well as that can be known before.
#[tokio::test(flavor = "multi_thread")]
async fn a_queue_is_fetched_until_so_many_bytes_are_held() {
    let (broker, bus) = start(Limits::default()).await;
    let queue = bus.queue("q");
    for sent in queue.send_all((0..40).map(|_| Message::new("x".repeat(10_000)))).await {
        sent.expect("accepted");
    }
    let few = ConsumeOptions { prefetch_bytes: 50_000, ..ConsumeOptions::default() };
    let mut subscription = queue.subscribe(few).await.expect("subscribed");
    let mut held = Vec::new();
    loop {
        // Five must come; whether a sixth does, this silence tells.
        let wait = if held.len() < 5 { PATIENCE } else { 3 * SECOND };
        let more = subscription.receive(40, wait).await.expect("received");
        if more.is_empty() {
            break;
        }
        held.extend(more);
    }
    assert_eq!(held.len(), 5);
    for delivery in held {
        delivery.ack().await.expect("acknowledged");
    }
    take(&mut subscription, 35).await;
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// Where a group's queue takes a part of what is moved, that part is not moved again.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_full_queue_has_taken_is_not_moved_again() {
    let (broker, bus) = start(Limits { queue_count: Some(40), ..Limits::default() }).await;
    let client = connect(&broker).await;
    let stored = numbers(1..=60).into_iter().map(|n| client.stream_stored("prices", &Message::new(n)));
    for stored in stored.collect::<Vec<_>>() {
        stored.await.expect("stored");
    }
    let all = ConsumeOptions { start: Start::Earliest, ..group() };
    let mut member = bus.topic("prices").subscribe(all).await.expect("subscribed");
    let mut held = Vec::new();
    for n in numbers(1..=40) {
        held.push(next(&mut member).await);
        assert_eq!(body(&held[held.len() - 1]), n);
    }
    quiet(&mut member).await;
    // Less room than the next attempt asks for.
    for delivery in held.drain(..10) {
        delivery.ack().await.expect("acknowledged");
    }
    assert_eq!(take(&mut member, 10).await, numbers(41..=50));
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// What waits to be tried again counts against the prefetch: a handler that fails everything for a while holds no more than that.
#[tokio::test(flavor = "multi_thread")]
async fn retries_of_a_topic_are_bounded_by_the_prefetch() {
    let (broker, bus) = start(Limits::default()).await;
    let topic = bus.topic("prices");
    let two = ConsumeOptions { prefetch: 2, ..ConsumeOptions::default() };
    let mut alone = topic.subscribe(two).await.expect("subscribed");
    send(&topic, &["1", "2", "3", "4"]).await;
    for (expected, after) in [("1", 25 * SECOND), ("2", 3600 * SECOND)] {
        let delivery = next(&mut alone).await;
        assert_eq!(body(&delivery), expected);
        delivery.retry(after).await.expect("waits");
    }
    quiet(&mut alone).await;
    // Each one that is done makes room for one. The first is tried again after most of the usual time.
    let again = timeout(2 * PATIENCE, alone.next()).await.expect("in time").expect("received");
    assert_eq!(body(&again), "1");
    again.ack().await.expect("acknowledged");
    assert_eq!(take(&mut alone, 2).await, ["3", "4"]);
    bus.close().await.expect("closed");
    broker.stop().await;
}
