//! Topics of the Community server, whose groups are queues that one of their members fills.

use std::time::Instant;

use polymq_core::{ConsumeOptions, Start};
use tokio::time::timeout;

use crate::{PATIENCE, SECOND, connect, group, quiet, send, start, stub::Age, take};

/// Groups of one name on two topics each have what is theirs, although the server lets a client id read one channel only.
#[tokio::test(flavor = "multi_thread")]
async fn groups_of_one_name_read_each_their_topic() {
    let (_server, bus) = start(Age::Community).await;
    let (prices, orders) = (bus.topic("prices"), bus.topic("orders"));
    let mut of_prices = prices.subscribe(group("audit")).await.expect("subscribed");
    let mut of_orders = orders.subscribe(group("audit")).await.expect("subscribed");
    send(&prices, 1..=3).await;
    send(&orders, 4..=6).await;
    assert_eq!(take(&mut of_prices, 3).await, [1, 2, 3]);
    assert_eq!(take(&mut of_orders, 3).await, [4, 5, 6]);
    bus.close().await.expect("closed");
}

/// A member that is closed while nothing is sent lets another one go on, although its subscription was never confirmed.
#[tokio::test(flavor = "multi_thread")]
async fn another_member_goes_on_when_one_is_closed() {
    let (server, bus) = start(Age::Community).await;
    let topic = bus.topic("prices");
    let mut first = topic.subscribe(group("audit")).await.expect("subscribed");
    send(&topic, 1..=3).await;
    assert_eq!(take(&mut first, 3).await, [1, 2, 3]);
    // The one that takes over has an unconfirmed subscription: nothing was sent since.
    let other_bus = connect(&server, &[]).await;
    let mut second = other_bus.topic("prices").subscribe(group("audit")).await.expect("subscribed");
    timeout(PATIENCE, first.close()).await.expect("in time").expect("closed");
    let mut closings = Vec::new();
    let mut third = loop {
        quiet(&mut second).await;
        let third = topic.subscribe(group("audit")).await.expect("subscribed");
        let closing = Instant::now();
        timeout(PATIENCE, second.close()).await.expect("in time").expect("closed");
        closings.push(closing.elapsed());
        // Five seconds is when closing gives up; a busy machine may take as long once.
        if closing.elapsed() < 5 * SECOND {
            break third;
        }
        assert!(closings.len() < 3, "it has not let go after {closings:?}");
        second = third;
    };
    // The connections of those that were closed are still there.
    send(&topic, 4..=6).await;
    assert_eq!(take(&mut third, 3).await, [4, 5, 6]);
    quiet(&mut third).await;
    other_bus.close().await.expect("closed");
    bus.close().await.expect("closed");
}

/// A server that forgets queue messages and stored events alike after a while forgets where a group is, and what the group had
/// handled before that: it goes on with exactly what is left.
#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_position_repeats_nothing_where_events_are_forgotten_too() {
    let (server, bus) = start(Age::Community).await;
    let topic = bus.topic("prices");
    let mut member = topic.subscribe(group("audit")).await.expect("subscribed");
    send(&topic, 1..=5).await;
    assert_eq!(take(&mut member, 5).await, [1, 2, 3, 4, 5]);
    member.close().await.expect("closed");
    server.forget(true);
    send(&topic, 6..=8).await;
    let mut member = topic.subscribe(group("audit")).await.expect("subscribed");
    assert_eq!(take(&mut member, 3).await, [6, 7, 8]);
    quiet(&mut member).await;
    bus.close().await.expect("closed");
}

/// Where events are kept longer than the queue that has the position, everything that is kept comes again: twice, and not never.
#[tokio::test(flavor = "multi_thread")]
async fn a_forgotten_position_loses_nothing_where_events_are_kept_longer() {
    let (server, bus) = start(Age::Community).await;
    let earliest = || ConsumeOptions { start: Start::Earliest, ..group("audit") };
    let mut closings = Vec::new();
    let topic = loop {
        let topic = bus.topic(format!("prices-{}", closings.len()));
        send(&topic, 1..=2).await;
        let mut member = topic.subscribe(earliest()).await.expect("subscribed");
        assert_eq!(take(&mut member, 2).await, [1, 2]);
        let closing = Instant::now();
        member.close().await.expect("closed");
        closings.push(closing.elapsed());
        // Five seconds is when closing gives up, and the member may not be gone: a new topic then.
        if closing.elapsed() < 5 * SECOND {
            break topic;
        }
        assert!(closings.len() < 3, "it has not let go after {closings:?}");
    };
    server.forget(false);
    send(&topic, 3..=4).await;
    let mut member = topic.subscribe(earliest()).await.expect("subscribed");
    assert_eq!(take(&mut member, 4).await, [1, 2, 3, 4]);
    quiet(&mut member).await;
    bus.close().await.expect("closed");
}
