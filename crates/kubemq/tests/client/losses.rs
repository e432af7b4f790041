//! What is under way when a connection is lost without a word.

use polymq_broker::Broker;
use polymq_core::{ErrorKind, Message};
use polymq_kubemq::KubeMq;
use polymq_testkit::{Direction, Proxy, eventually};

use crate::{
    PATIENCE, SECOND, bus,
    bus::{group, send},
    quiet, take,
};

async fn start() -> (Broker, KubeMq, Proxy) {
    let (broker, client) = crate::start().await;
    let proxy = Proxy::start(broker.address()).await.expect("a proxy");
    (broker, client, proxy)
}

/// What waited to be moved when the connection was lost is moved from the group's position on, once, and not by what was handed over
/// before as well.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_moved_yet_leaves_with_its_connection() {
    let (broker, client, proxy) = start().await;
    let bus = bus(proxy.address()).await;
    let (topic, other) = (bus.topic("prices"), bus.queue("other").with_timeout(SECOND));
    let mut member = topic.subscribe(group()).await.expect("subscribed");
    send(&topic, &["first"]).await;
    assert_eq!(take(&mut member, 1).await, ["first"]);
    send(&other, &["first"]).await;
    // The position is written by then, so that the next thing to do is to move.
    quiet(&mut member).await;
    proxy.pause_one_way(Direction::Up);
    // As many requests as begin for a few messages: what comes now waits.
    for _ in 0..2 {
        let error = other.send_message(Message::new("unanswered")).await.expect_err("nobody answers");
        assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "it has left: {error}");
    }
    let before = proxy.stats().down;
    let sent: Vec<_> = (0..10).map(|n| format!("{n}{}", "x".repeat(2000))).collect();
    for event in &sent {
        client.store_event("prices", &Message::new(event.clone())).await.expect("stored");
    }
    eventually(PATIENCE, || async {
        let came = proxy.stats().down - before;
        if came > 20_000 { Ok(()) } else { Err(format!("{came} bytes came")) }
    })
    .await;
    proxy.reset_all();
    proxy.resume();
    assert_eq!(take(&mut member, 10).await, sent);
    quiet(&mut member).await;
    bus.close().await.expect("closed");
    broker.stop().await;
}
