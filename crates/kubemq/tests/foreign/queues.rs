//! Queues of the Community server.

use std::{sync::atomic::Ordering::SeqCst, time::Instant};

use polymq_core::{ConsumeOptions, ErrorKind, Message};

use crate::{PATIENCE, body, connect, group, next, quiet, send, start, stub::Age, take};

/// Nobody makes channels there, so they are made by using them; that nobody does is found out once, since it takes a whole
/// time-out. What cannot be asked is refused with a sentence.
#[tokio::test(flavor = "multi_thread")]
async fn channels_are_made_by_using_them_where_nobody_manages_them() {
    let (server, bus) = start(Age::Community).await;
    let (queue, topic) = (bus.queue("orders"), bus.topic("prices"));
    let mut from_queue = queue.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    let mut of_group = topic.subscribe(group("audit")).await.expect("subscribed");
    let mut alone = topic.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    send(&queue, 1..=20).await;
    send(&topic, 1..=20).await;
    for subscription in [&mut from_queue, &mut of_group, &mut alone] {
        assert_eq!(take(subscription, 20).await, (1..=20).collect::<Vec<_>>());
    }
    assert_eq!(server.seen.managed.load(SeqCst), 1, "asked once");
    assert!(queue.exists(None).await.expect("queues are known"));
    for error in [
        topic.exists(None).await.map(drop).expect_err("topics are not"),
        bus.list().await.map(drop).expect_err("nor a list"),
        queue.delete(None).await.expect_err("nor deleting"),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
        assert!(error.to_string().contains("this server does not manage channels"), "{error}");
    }
    bus.close().await.expect("closed");
}

/// Where a channel is only looked for, one that cannot be looked for is an error, not a yes.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_looked_for_is_not_taken_for_there() {
    let (server, _) = start(Age::Community).await;
    let bus = connect(&server, &[("declare", "passive")]).await;
    let missing = bus.queue("orders").subscribe(ConsumeOptions::default()).await.map(drop).expect_err("is not there");
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
    let unknown = bus.topic("prices").subscribe(ConsumeOptions::default()).await.map(drop).expect_err("nobody knows");
    assert_eq!(unknown.kind(), ErrorKind::Unsupported, "{unknown}");
}

/// A message that is given back counts no attempt, although the server counts each delivery; one that is retried does.
#[tokio::test(flavor = "multi_thread")]
async fn given_back_messages_count_no_attempt() {
    let (_server, bus) = start(Age::Community).await;
    let queue = bus.queue("orders");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    send(&queue, [7]).await;
    for attempt in [1, 1, 1] {
        let delivery = next(&mut subscription).await;
        assert_eq!((body(&delivery), delivery.attempt()), (7, attempt));
        drop(delivery);
    }
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.attempt(), 1);
    delivery.retry(std::time::Duration::ZERO).await.expect("retried");
    for attempt in [2, 2] {
        let delivery = next(&mut subscription).await;
        assert_eq!((body(&delivery), delivery.attempt()), (7, attempt));
        drop(delivery);
    }
    let delivery = next(&mut subscription).await;
    delivery.ack().await.expect("acknowledged");
    quiet(&mut subscription).await;
    bus.close().await.expect("closed");
}

/// A poll that takes its whole time holds nobody up: what it brings after its consumer was closed goes to the next one, uncounted.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_late_poll_brings_goes_to_the_next_consumer() {
    let (_server, bus) = start(Age::Community).await;
    let queue = bus.queue("orders");
    let mut first =
        queue.subscribe(ConsumeOptions { prefetch: 4, ..ConsumeOptions::default() }).await.expect("subscribed");
    send(&queue, 1..=8).await;
    let delivery = next(&mut first).await;
    assert_eq!(body(&delivery), 1);
    delivery.ack().await.expect("acknowledged");
    let closing = Instant::now();
    first.close().await.expect("closed");
    // Far more than closing waits, for a busy machine.
    assert!(closing.elapsed() < PATIENCE * 3 / 2, "closing took {:?}", closing.elapsed());
    let mut second = queue.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    let mut rest = Vec::new();
    for _ in 0..7 {
        let delivery = next(&mut second).await;
        assert_eq!(delivery.attempt(), 1);
        rest.push(body(&delivery));
        delivery.ack().await.expect("acknowledged");
    }
    rest.sort_unstable();
    assert_eq!(rest, (2..=8).collect::<Vec<_>>());
    quiet(&mut second).await;
    bus.close().await.expect("closed");
}

/// A refusal that is told once for a whole request is the answer of each of its messages; those after it go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_refused_as_a_whole_fails_each_message() {
    let (_server, bus) = start(Age::Community).await;
    let queue = bus.queue("orders");
    let sent = queue.send_all((0..1100).map(|n| Message::new(n.to_string()))).await;
    assert_eq!(sent.len(), 1100);
    let refused: Vec<_> = sent.into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.len(), 100, "the queue takes a thousand");
    for error in refused {
        assert!(error.to_string().contains("1000"), "{error}");
    }
    send(&bus.queue("other"), [1]).await;
    bus.close().await.expect("closed");
}
