//! What is under way when a connection is lost without a word.

use std::{collections::HashMap, time::Duration};

use polymq_broker::Broker;
use polymq_core::{ConsumeOptions, ErrorKind, Message, Start};
use polymq_kubemq::{Ask, KubeMq, StartAt};
use polymq_testkit::{Direction, Proxy, eventually};
use tokio::time::timeout;

use crate::{
    PATIENCE, SECOND, bus,
    bus::{group, send},
    bus_of, quiet, take,
};

/// How long after its subscription an event comes that must outlive the connection. Who subscribes anew asks for what came since,
/// counted back from when the request arrives: a request that is late by less than this leaves nothing out.
const LATER: Duration = Duration::from_secs(12);

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
    // Its silence ends the connection only when this test says so.
    let bus = bus_of(&format!("kubemq://{}?heartbeat=60s", proxy.address())).await;
    let (topic, other) = (bus.topic("prices"), bus.queue("other").with_timeout(3 * SECOND));
    let mut member = topic.subscribe(group()).await.expect("subscribed");
    send(&topic, &["first"]).await;
    assert_eq!(take(&mut member, 1).await, ["first"]);
    // Its producer is open, however long a busy machine takes for that.
    let first = || async { other.send_message(Message::new("first")).await.map_err(|error| error.to_string()) };
    eventually(PATIENCE, first).await;
    // The position is written by then, so that the next thing to do is to move.
    quiet(&mut member).await;
    proxy.pause_one_way(Direction::Up);
    // As many requests as begin for a few messages: what comes now waits.
    for _ in 0..2 {
        // One whose time is over before it has left is not on its way: the next one then.
        eventually(PATIENCE, || async {
            let error = other.send_message(Message::new("unanswered")).await.expect_err("nobody answers");
            if error.kind() == ErrorKind::UnknownOutcome { Ok(()) } else { Err(error.to_string()) }
        })
        .await;
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

/// The broker has given every reader of a channel its first event.
async fn first_is_delivered(client: &KubeMq, channel: &str) {
    eventually(PATIENCE, || async {
        let ask = Ask {
            channel: "kubemq.cluster.internal.requests".into(),
            metadata: "list-readers".into(),
            body: "".into(),
            tags: HashMap::from([("channel".into(), channel.to_owned())]),
            timeout: PATIENCE,
            cache: None,
        };
        let readers = client.query(ask).await.map_err(|error| error.to_string())?;
        let readers = String::from_utf8_lossy(&readers.body).into_owned();
        if readers.contains("\"next\":2") { Ok(()) } else { Err(readers) }
    })
    .await;
}

/// An event that went into a connection that was dead already comes over the next one, also when it is the first.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_event_of_a_topic_outlives_its_connection() {
    let (broker, client, proxy) = start().await;
    let bus = bus(proxy.address()).await;
    for (name, start) in [("new", Start::New), ("earliest", Start::Earliest)] {
        let options = ConsumeOptions { start, ..ConsumeOptions::default() };
        let mut alone = bus.topic(name).subscribe(options).await.expect("subscribed");
        if start == Start::New {
            tokio::time::sleep(LATER).await;
        }
        proxy.pause_one_way(Direction::Down);
        client.store_event(name, &Message::new("1")).await.expect("stored");
        first_is_delivered(&client, name).await;
        proxy.reset_all();
        proxy.resume();
        client.store_event(name, &Message::new("2")).await.expect("stored");
        assert_eq!(take(&mut alone, 2).await, ["1", "2"], "{name}");
    }
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// As above, for a subscription of the typed client.
#[tokio::test(flavor = "multi_thread")]
async fn the_first_event_of_a_subscription_outlives_its_connection() {
    let (broker, client, proxy) = start().await;
    let settings = polymq_core::Settings::from_url(&format!("kubemq://{}", proxy.address())).expect("a URL");
    let far = KubeMq::connect(&settings).await.expect("connect");
    let mut events = far.subscribe_stored("log", "", StartAt::New).await.expect("subscribed");
    tokio::time::sleep(LATER).await;
    proxy.pause_one_way(Direction::Down);
    client.store_event("log", &Message::new("1")).await.expect("stored");
    first_is_delivered(&client, "log").await;
    proxy.reset_all();
    proxy.resume();
    client.store_event("log", &Message::new("2")).await.expect("stored");
    for expected in ["1", "2"] {
        assert_eq!(timeout(PATIENCE, events.next()).await.expect("in time").expect("an event").body, expected);
    }
    broker.stop().await;
}
