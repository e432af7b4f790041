//! What a bus makes of polymq's own broker where other servers have no such thing: limits, and channels that are deleted.

use polymq_broker::{Broker, Limits};
use polymq_core::{Bus, Channel, ConsumeOptions, ErrorKind, HealthState, Message, Retry, Start};
use polymq_kubemq::Pattern;
use polymq_testkit::{Proxy, eventually};
use tokio::time::timeout;

use crate::{PATIENCE, SECOND, connect, take};

pub(crate) async fn start(limits: Limits) -> (Broker, Bus) {
    let broker = Broker::builder().listen("127.0.0.1:0").limits(limits).start().await.expect("a broker");
    let bus = crate::bus(broker.address()).await;
    (broker, bus)
}

pub(crate) async fn send(channel: &Channel, bodies: &[&'static str]) {
    for body in bodies {
        channel.send_message(Message::new(*body)).await.expect("sent");
    }
}

pub(crate) fn group() -> ConsumeOptions {
    ConsumeOptions { group: Some("audit".to_owned()), ..ConsumeOptions::default() }
}

/// A queue that is full now is no reason to give a message up.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_busy() {
    let (broker, bus) = start(Limits { queue_count: Some(1), ..Limits::default() }).await;
    let queue = bus.queue("q");
    send(&queue, &["one"]).await;
    let error = queue.send_message(Message::new("two")).await.expect_err("full");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Busy, Retry::Now), "{error}");
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// What was withdrawn while there is no broker is not waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_flush_does_not_wait_for_what_was_withdrawn() {
    // A port that no other test gets when this broker has stopped.
    let address = format!("127.0.0.1:{}", polymq_testkit::free_port());
    let broker = Broker::builder().listen(address).start().await.expect("a broker");
    let bus = crate::bus(broker.address()).await;
    let queue = bus.queue("q");
    send(&queue, &["one"]).await;
    broker.stop().await;
    // Known, so that nothing is handed to the connection that was.
    eventually(PATIENCE, || async {
        let health = bus.health();
        if health.state == HealthState::Down { Ok(()) } else { Err(health.to_string()) }
    })
    .await;
    let sending = tokio::spawn({
        let hasty = queue.with_timeout(2 * SECOND);
        async move { hasty.send_message(Message::new("two")).await }
    });
    tokio::time::sleep(SECOND).await;
    // A flush waits as long as one send may take, which is much longer here.
    let flushing = tokio::spawn({
        let queue = queue.clone();
        async move { queue.flush().await }
    });
    let error = sending.await.expect("no panic").expect_err("there is no broker");
    assert_ne!(error.kind(), ErrorKind::UnknownOutcome, "it was withdrawn: {error}");
    timeout(PATIENCE, flushing).await.expect("in time").expect("no panic").expect("flushed");
    timeout(PATIENCE, queue.flush()).await.expect("in time").expect("flushed");
}

/// Who reads a topic that is deleted reads the one that is made under its name, from its beginning.
#[tokio::test(flavor = "multi_thread")]
async fn readers_of_a_deleted_topic_read_the_next_one() {
    let (broker, bus) = start(Limits::default()).await;
    let client = connect(&broker).await;
    let topic = bus.topic("prices");
    let mut member = topic.subscribe(group()).await.expect("subscribed");
    let alone = ConsumeOptions { start: Start::New, ..ConsumeOptions::default() };
    let mut alone = topic.subscribe(alone).await.expect("subscribed");
    send(&topic, &["1", "2", "3"]).await;
    assert_eq!(take(&mut member, 3).await, ["1", "2", "3"]);
    assert_eq!(take(&mut alone, 3).await, ["1", "2", "3"]);
    client.delete_channel(Pattern::EventsStore, "prices").await.expect("deleted");
    send(&topic, &["4", "5"]).await;
    assert_eq!(take(&mut member, 2).await, ["4", "5"]);
    assert_eq!(take(&mut alone, 2).await, ["4", "5"]);
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// What groups open to go on where they were takes no room of the connection that all share.
#[tokio::test(flavor = "multi_thread")]
async fn groups_that_go_on_leave_room_to_the_others() {
    let (broker, bus) = start(Limits::default()).await;
    let topics: Vec<_> = (0..3).map(|n| bus.topic(format!("prices-{n}"))).collect();
    for topic in &topics {
        let mut member = topic.subscribe(group()).await.expect("subscribed");
        send(topic, &["first"]).await;
        assert_eq!(take(&mut member, 1).await, ["first"]);
        member.close().await.expect("closed");
    }
    let mut members = Vec::new();
    for topic in &topics {
        let mut member = topic.subscribe(group()).await.expect("subscribed");
        // More than one stream may have under way.
        for _ in 0..6 {
            topic.send_message(Message::new(vec![b'x'; 1 << 20])).await.expect("sent");
            assert_eq!(take(&mut member, 1).await[0].len(), 1 << 20);
        }
        // It stays, while the next ones come.
        members.push(member);
    }
    assert_eq!(bus.health().reconnects, 0, "{}", bus.health());
    broker.stop().await;
}

/// Subscriptions that nobody reads hold what is theirs, and none of what the connection has for all.
#[tokio::test(flavor = "multi_thread")]
async fn who_stops_reading_stops_nobody_else() {
    const MIB: usize = 1 << 20;
    let broker = Broker::builder().listen("127.0.0.1:0").start().await.expect("a broker");
    let proxy = Proxy::start(broker.address()).await.expect("a proxy");
    let (client, bus) = (connect(&broker).await, crate::bus(proxy.address()).await);
    let one = ConsumeOptions { prefetch: 1, ..ConsumeOptions::default() };
    let mut stuck = Vec::new();
    for topic in ["prices", "rates", "stocks"] {
        stuck.push(bus.topic(topic).subscribe(one.clone()).await.expect("subscribed"));
    }
    for n in b'0'..b'8' {
        for topic in ["prices", "rates", "stocks"] {
            client.store_event(topic, &Message::new(vec![n; MIB])).await.expect("stored");
        }
    }
    // Each has one in its hands, and as much is under way as goes.
    eventually(PATIENCE, || async {
        let came = proxy.stats().down;
        if came > 8 * MIB as u64 { Ok(()) } else { Err(format!("{came} bytes came")) }
    })
    .await;
    let queue = bus.queue("orders");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    for _ in 0..3 {
        queue.send_message(Message::new(vec![b'x'; MIB])).await.expect("sent");
        assert_eq!(take(&mut subscription, 1).await[0].len(), MIB);
    }
    assert_eq!(bus.health().reconnects, 0, "{}", bus.health());
    for subscription in &mut stuck {
        let first: String = take(subscription, 8).await.iter().map(|body| &body[..1]).collect();
        assert_eq!(first, "01234567");
    }
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// Nor does a group stay behind that nobody read when its topic was deleted, or miss any of the next one, whether that has fewer
/// events than the group had handled, as many, or more.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_was_away_begins_with_the_next_topic() {
    let (broker, bus) = start(Limits::default()).await;
    let client = connect(&broker).await;
    for (name, new) in [("a", &["4"][..]), ("b", &["4", "5", "6"]), ("c", &["4", "5", "6", "7", "8"])] {
        let topic = bus.topic(name);
        let mut member = topic.subscribe(group()).await.expect("subscribed");
        send(&topic, &["1", "2", "3"]).await;
        assert_eq!(take(&mut member, 3).await, ["1", "2", "3"]);
        member.close().await.expect("closed");
        client.delete_channel(Pattern::EventsStore, name).await.expect("deleted");
        send(&topic, new).await;
        let mut member = topic.subscribe(group()).await.expect("subscribed");
        assert_eq!(take(&mut member, new.len()).await, new);
    }
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// A topic that is deleted while its events are moved by the hundred.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_under_load_goes_on_with_the_next_topic() {
    let (broker, bus) = start(Limits::default()).await;
    let client = connect(&broker).await;
    let topic = bus.topic("prices");
    let mut member = topic.subscribe(group()).await.expect("subscribed");
    for round in 0..3 {
        let sent = (0..300).map(|_| client.stream_stored("prices", &Message::new("old")));
        for stored in sent.collect::<Vec<_>>() {
            stored.await.expect("stored");
        }
        client.delete_channel(Pattern::EventsStore, "prices").await.expect("deleted");
        send(&topic, &["new"]).await;
        while take(&mut member, 1).await != ["new"] {}
        println!("round {round} is over");
    }
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// The largest event that is taken fits into the group's queue, and a larger one is refused to its sender.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_is_taken_reaches_the_group() {
    let (broker, bus) = start(Limits { message: 1000, ..Limits::default() }).await;
    let topic = bus.topic("prices");
    let mut member = topic.subscribe(group()).await.expect("subscribed");
    let error = topic.send_message(Message::new("x".repeat(1001))).await.expect_err("too large");
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
    let mut size = 1000;
    while let Err(error) = topic.send_message(Message::new("x".repeat(size))).await {
        assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
        size -= 1;
    }
    println!("{size} bytes of body were taken");
    send(&topic, &["small"]).await;
    assert_eq!(take(&mut member, 2).await, ["x".repeat(size), "small".to_owned()]);
    bus.close().await.expect("closed");
    broker.stop().await;
}
