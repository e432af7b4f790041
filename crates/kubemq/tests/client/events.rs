//! Events, stored and not.

use std::time::{Duration, Instant, SystemTime};

use polymq_core::{ErrorKind, Message, Settings};
use polymq_kubemq::{Events, KubeMq, Pattern, StartAt};
use polymq_testkit::Proxy;
use tokio::time::timeout;

use crate::{SECOND, connect, start, start_again};

/// How long something that must come may take.
const SOON: Duration = Duration::from_secs(60);

async fn next(events: &mut Events) -> String {
    let event = timeout(SOON, events.next()).await.expect("in time").expect("an event");
    String::from_utf8_lossy(&event.body).into_owned()
}

async fn store(client: &KubeMq, channel: &str, bodies: std::ops::RangeInclusive<u32>) {
    for n in bodies {
        client.store_event(channel, &Message::new(n.to_string())).await.expect("stored");
    }
}

/// Mission row G13: who is not there gets nothing; then events come alone and over a stream, in order, with what they carry.
#[tokio::test(flavor = "multi_thread")]
async fn events_reach_who_is_there() {
    let (broker, client) = start().await;
    client.send_event("news", &Message::new("lost")).await.expect("accepted, for nobody");
    let mut events = client.subscribe_events("news", "").await.expect("subscribed");
    client.send_event("news", &Message::new("single").with_header("tenant", "acme")).await.expect("sent");
    let event = timeout(SOON, events.next()).await.expect("in time").expect("an event");
    assert_eq!((&*event.body, &*event.tags["tenant"], event.sequence), (&b"single"[..], "acme", 0));
    for n in 0..100 {
        client.stream_event("news", &Message::new(n.to_string())).await.expect("on its way");
    }
    for n in 0..100 {
        assert_eq!(next(&mut events).await, n.to_string());
    }
    assert_eq!(
        client.send_event("a.*", &Message::new("x")).await.expect_err("a pattern").kind(),
        ErrorKind::InvalidInput
    );
    broker.stop().await;
}

/// Mission row G13: each event reaches one member of a group, and everyone outside.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_shares_events() {
    let (broker, client) = start().await;
    let mut one = client.subscribe_events("news", "group").await.expect("subscribed");
    let mut two = client.subscribe_events("news", "group").await.expect("subscribed");
    let mut alone = client.subscribe_events("news", "").await.expect("subscribed");
    for n in 0..40 {
        client.send_event("news", &Message::new(n.to_string())).await.expect("sent");
    }
    let mut shared = Vec::new();
    while shared.len() < 40 {
        let body = tokio::select! { body = next(&mut one) => body, body = next(&mut two) => body };
        shared.push(body.parse::<u32>().expect("a number"));
    }
    shared.sort_unstable();
    assert_eq!(shared, (0..40).collect::<Vec<_>>(), "each once");
    for n in 0..40 {
        assert_eq!(next(&mut alone).await, n.to_string());
    }
    broker.stop().await;
}

/// Mission row G13: the table of patterns. What matches all comes last, so everything before it has been told.
#[tokio::test(flavor = "multi_thread")]
async fn patterns_match_events() {
    let (broker, client) = start().await;
    for (pattern, matching, others) in [
        ("a.*", &["a.b", "a.c"][..], &["a", "a.b.c", "b.a"][..]),
        ("a.>", &["a.b", "a.b.c"], &["a", "b.a"]),
        ("*.b", &["a.b", "c.b"], &["b", "a.b.c", "b.a"]),
        (">", &["a", "a.b.c"], &[]),
        ("a", &["a"], &["a.b", "b"]),
    ] {
        let mut events = client.subscribe_events(pattern, "").await.expect("subscribed");
        for channel in others.iter().chain(matching) {
            client.send_event(channel, &Message::new("x")).await.expect("sent");
        }
        for channel in matching {
            let event = timeout(SOON, events.next()).await.expect("in time").expect("an event");
            assert_eq!(event.channel, *channel, "{pattern}");
        }
    }
    broker.stop().await;
}

/// Mission row G14: ten events without a subscriber are kept, confirmed and numbered.
#[tokio::test(flavor = "multi_thread")]
async fn stored_events_wait_for_their_first_subscriber() {
    let (broker, client) = start().await;
    store(&client, "log", 1..=5).await;
    let streamed: Vec<_> = (6..=10).map(|n| client.stream_stored("log", &Message::new(n.to_string()))).collect();
    for stored in streamed {
        stored.await.expect("stored");
    }
    let mut events = client.subscribe_stored("log", "", StartAt::First).await.expect("subscribed");
    for n in 1..=10_u64 {
        let event = timeout(SOON, events.next()).await.expect("in time").expect("an event");
        assert_eq!((event.sequence, &*event.body), (n, n.to_string().as_bytes()));
        assert!(event.timestamp > 0);
    }
    broker.stop().await;
}

/// Mission row G15: each of the six places to start at; those that are none are refused.
#[tokio::test(flavor = "multi_thread")]
async fn stored_events_are_read_from_each_place() {
    let (broker, client) = start().await;
    store(&client, "log", 1..=3).await;
    // Two seconds lie between the third and the fourth: one of each side, for what counts in seconds.
    tokio::time::sleep(2 * SECOND).await;
    let between = SystemTime::now() - SECOND;
    store(&client, "log", 4..=5).await;
    let mut places = Vec::new();
    for (place, first) in [
        (StartAt::New, 6),
        (StartAt::First, 1),
        (StartAt::Last, 5),
        (StartAt::Sequence(3), 3),
        (StartAt::Sequence(6), 6),
        (StartAt::Time(between), 4),
        (StartAt::Time(SystemTime::UNIX_EPOCH + SECOND), 1),
        (StartAt::Ago(3600 * SECOND), 1),
    ] {
        places.push((place, first, client.subscribe_stored("log", "", place).await.expect("subscribed")));
    }
    store(&client, "log", 6..=6).await;
    for (place, first, mut events) in places {
        for n in first..=6 {
            assert_eq!(next(&mut events).await, n.to_string(), "{place:?}");
        }
    }
    for place in [
        StartAt::Sequence(0),
        StartAt::Time(SystemTime::UNIX_EPOCH),
        StartAt::Ago(Duration::ZERO),
        StartAt::Ago(SECOND / 2),
    ] {
        let error = client.subscribe_stored("log", "", place).await.expect_err("no such place");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    broker.stop().await;
}

/// Mission row G15: seconds back leave out what is older.
#[tokio::test(flavor = "multi_thread")]
async fn seconds_back_leave_out_what_is_older() {
    let (broker, client) = start().await;
    for n in 1.. {
        store(&client, "log", n..=n).await;
        tokio::time::sleep(4 * SECOND).await;
        let began = Instant::now();
        store(&client, "log", 0..=0).await;
        let mut events = client.subscribe_stored("log", "", StartAt::Ago(3 * SECOND)).await.expect("subscribed");
        // On a busy machine the last one may be too old as well.
        if began.elapsed() < 2 * SECOND {
            assert_eq!(next(&mut events).await, "0");
            break;
        }
    }
    broker.stop().await;
}

/// Mission row G14: members of a group share stored events, and one that joins goes on where the group is.
#[tokio::test(flavor = "multi_thread")]
async fn a_group_of_stored_events_has_one_place() {
    let (broker, client) = start().await;
    store(&client, "log", 1..=20).await;
    let mut one = client.subscribe_stored("log", "group", StartAt::First).await.expect("subscribed");
    let mut two = client.subscribe_stored("log", "group", StartAt::First).await.expect("subscribed");
    let mut shared = Vec::new();
    while shared.len() < 20 {
        let body = tokio::select! { body = next(&mut one) => body, body = next(&mut two) => body };
        shared.push(body.parse::<u32>().expect("a number"));
    }
    shared.sort_unstable();
    assert_eq!(shared, (1..=20).collect::<Vec<_>>(), "each once");
    let mut three = client.subscribe_stored("log", "group", StartAt::First).await.expect("subscribed");
    store(&client, "log", 21..=21).await;
    let body = tokio::select! {
        body = next(&mut one) => body,
        body = next(&mut two) => body,
        body = next(&mut three) => body,
    };
    assert_eq!(body, "21", "not from the first again");
    broker.stop().await;
}

/// Of mission row G15: through a restart of the broker, a subscription goes on after what it gave last, and those that are not
/// kept are there again.
#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_go_on_after_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let broker = start_again(folder.path(), &format!("127.0.0.1:{}", polymq_testkit::free_port())).await;
    let address = broker.address().to_string();
    let client = connect(&broker).await;
    store(&client, "log", 1..=5).await;
    let mut stored = client.subscribe_stored("log", "", StartAt::First).await.expect("subscribed");
    let mut plain = client.subscribe_events("news", "").await.expect("subscribed");
    for n in 1..=3 {
        assert_eq!(next(&mut stored).await, n.to_string());
    }
    broker.stop().await;
    let broker = start_again(folder.path(), &address).await;
    let other = connect(&broker).await;
    store(&other, "log", 6..=6).await;
    // What had arrived before the connection was lost may be given first; nothing is left out or comes twice.
    for n in 4..=6 {
        assert_eq!(next(&mut stored).await, n.to_string());
    }
    // Nobody tells when it is there again: who sends until it is heard knows.
    let heard = next(&mut plain);
    tokio::pin!(heard);
    loop {
        other.send_event("news", &Message::new("again")).await.expect("sent");
        if let Ok(body) = timeout(SECOND / 10, &mut heard).await {
            assert_eq!(body, "again");
            break;
        }
    }
    broker.stop().await;
}

/// Who reads stored events of a channel that is deleted reads the one that is made under its name, from its beginning.
#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_to_a_deleted_channel_read_the_next_one() {
    let (broker, client) = start().await;
    store(&client, "log", 1..=3).await;
    let mut readers = Vec::new();
    for (group, place) in [("", StartAt::First), ("", StartAt::Sequence(2)), ("group", StartAt::First)] {
        readers.push(client.subscribe_stored("log", group, place).await.expect("subscribed"));
    }
    let mut silent = client.subscribe_stored("log", "", StartAt::New).await.expect("subscribed");
    for reader in &mut readers {
        while next(reader).await != "3" {}
    }
    client.delete_channel(Pattern::EventsStore, "log").await.expect("deleted");
    store(&client, "log", 4..=5).await;
    for reader in readers.iter_mut().chain([&mut silent]) {
        assert_eq!([next(reader).await, next(reader).await], ["4", "5"]);
    }
    broker.stop().await;
}

/// However long the broker takes to have a subscription, what is sent after it was made is heard.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_subscription_hears_what_is_sent_after_it() {
    let (broker, sender) = start().await;
    let proxy = Proxy::start(broker.address()).await.expect("a proxy");
    let url = format!("kubemq://{}", proxy.address());
    let client = KubeMq::connect(&Settings::from_url(&url).expect("a URL")).await.expect("connect");
    proxy.latency(2 * SECOND);
    let mut events = client.subscribe_events("news", "").await.expect("subscribed");
    sender.send_event("news", &Message::new("first")).await.expect("sent");
    assert_eq!(next(&mut events).await, "first");
    broker.stop().await;
}

/// Mission row G27: a subscription that is dropped has ended, and no other one with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_subscription_leaves_its_sibling() {
    let (broker, client) = start().await;
    let mut one = client.subscribe_events("news", "").await.expect("subscribed");
    let two = client.subscribe_events("news", "").await.expect("subscribed");
    // A future that is dropped loses nothing.
    assert!(timeout(SECOND / 10, one.next()).await.is_err());
    drop(two);
    client.send_event("news", &Message::new("a")).await.expect("sent");
    assert_eq!(next(&mut one).await, "a");
    let parent = connect(&broker).await;
    let mut child = parent.subscribe_events("news", "").await.expect("subscribed");
    drop(parent);
    let error = timeout(SOON, child.next()).await.expect("in time").expect_err("its client is gone");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    client.send_event("news", &Message::new("b")).await.expect("sent");
    assert_eq!(next(&mut one).await, "b");
    broker.stop().await;
}
