//! Events, stored and not.

use std::time::{Duration, SystemTime};

use kubemq::{Event, EventStore, EventStoreBuilder, EventsStoreSubscription as Start, KubemqClient, Subscription};
use tokio::time::sleep;

use crate::{Seen, client, crash, numbers, until};

crate::cases! {
    events event_stream event_groups event_wildcards events_store events_store_stream events_store_start_positions
    events_store_groups event_channels subscription_goes_on_after_a_crash
}

fn event(channel: &str, body: &str) -> Event {
    let event = Event::builder().channel(channel).metadata("about").add_tag("key", "value");
    event.body(body.as_bytes().to_vec()).build()
}

/// Listens, and sends probes until one has come: a subscription is not confirmed.
async fn listen(client: &KubemqClient, pattern: &str, group: &str, probe: &str) -> (Subscription, Seen) {
    let seen = Seen::default();
    let told = seen.clone();
    let on_event = move |event: kubemq::EventReceive| -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        told.add(&event.body);
        Box::pin(async {})
    };
    let subscription = client.subscribe_to_events(pattern, group, on_event, None).await.expect("a subscription");
    until("the subscription", async || {
        client.send_event(event(probe, "probe")).await.expect("a send");
        seen.any()
    })
    .await;
    (subscription, seen)
}

async fn events() {
    let client = client("rust").await;
    let (_one, seen) = listen(&client, "news", "", "news").await;
    for (channel, body) in [("news", "a"), ("news.other", "b"), ("news", "c")] {
        client.send_event(event(channel, body)).await.expect("a send");
    }
    until("the events", async || seen.bodies() == ["a", "c"]).await;
}

async fn event_stream() {
    let client = client("rust").await;
    let (_one, seen) = listen(&client, "news", "", "news").await;
    let stream = client.send_event_stream().await.expect("a stream");
    let bodies = numbers(50);
    for body in &bodies {
        stream.send(event("news", body)).await.expect("a send");
    }
    until("the events, in order", async || seen.bodies() == bodies).await;
}

async fn event_groups() {
    let client = client("rust").await;
    let (_one, one) = listen(&client, "work", "billing", "work").await;
    let (_other, other) = listen(&client, "work", "billing", "work").await;
    let mut bodies = numbers(50);
    for body in &bodies {
        client.send_event(event("work", body)).await.expect("a send");
    }
    until("the events", async || one.bodies().len() + other.bodies().len() >= 50).await;
    let mut shared = [one.bodies(), other.bodies()].concat();
    shared.sort();
    bodies.sort();
    assert_eq!(shared, bodies, "each event once in the group");
}

async fn event_wildcards() {
    let client = client("rust").await;
    let (_one, one) = listen(&client, "eu.*", "", "eu.x").await;
    let (_more, more) = listen(&client, "eu.>", "", "eu.x").await;
    for channel in ["eu.a", "eu.a.b", "us.a", "eu.c"] {
        client.send_event(event(channel, channel)).await.expect("a send");
    }
    until("the events", async || more.bodies() == ["eu.a", "eu.a.b", "eu.c"] && one.bodies() == ["eu.a", "eu.c"]).await;
}

fn stored(body: &str) -> EventStoreBuilder {
    EventStore::builder().channel("log").metadata("about").add_tag("key", "value").body(body.as_bytes().to_vec())
}

async fn store(client: &KubemqClient, body: &str) {
    let sent = client.send_event_store(stored(body).build()).await.expect("an answer");
    assert!(sent.sent && sent.error.is_empty(), "{sent:?}");
}

async fn read(client: &KubemqClient, group: &str, start: Start) -> (Subscription, Seen) {
    let seen = Seen::default();
    (read_into(&seen, client, group, start).await, seen)
}

async fn read_into(seen: &Seen, client: &KubemqClient, group: &str, start: Start) -> Subscription {
    let told = seen.clone();
    let on_event = move |event: kubemq::EventStoreReceive| -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
        assert_eq!((&*event.metadata, event.tags.get("key").map(String::as_str)), ("about", Some("value")));
        told.add(&event.body);
        Box::pin(async {})
    };
    let subscription = client.subscribe_to_events_store("log", group, start, on_event, None).await;
    subscription.expect("a subscription")
}

async fn events_store() {
    let client = client("rust").await;
    store(&client, "a").await;
    let (_subscription, seen) = read(&client, "", Start::StartFromFirst).await;
    store(&client, "b").await;
    until("the events", async || seen.bodies() == ["a", "b"]).await;
}

async fn events_store_stream() {
    let client = client("rust").await;
    let mut stream = client.send_event_store_stream().await.expect("a stream");
    let bodies = numbers(20);
    for body in &bodies {
        stream.send(stored(body).build()).await.expect("a send");
    }
    for _ in &bodies {
        let result = stream.results().recv().await.expect("every stored event is answered");
        assert!(result.sent, "{result:?}");
    }
    let (_subscription, seen) = read(&client, "", Start::StartFromFirst).await;
    until("the events", async || seen.bodies() == bodies).await;
}

async fn events_store_start_positions() {
    let sender = client("sender").await;
    for body in ["1", "2", "3"] {
        store(&sender, body).await;
    }
    sleep(Duration::from_secs(32)).await;
    let between = SystemTime::now() - Duration::from_millis(500);
    for body in ["4", "5"] {
        store(&sender, body).await;
    }
    let positions = [
        // First: it counts from now.
        (Start::StartAtTimeDelta(Duration::from_secs(25)), &["4", "5"][..]),
        (Start::StartFromFirst, &["1", "2", "3", "4", "5"]),
        (Start::StartFromLast, &["5"]),
        (Start::StartAtSequence(4), &["4", "5"]),
        (Start::StartAtTime(between), &["4", "5"]),
    ];
    let mut readers = Vec::new();
    for (number, (start, found)) in positions.into_iter().enumerate() {
        // One client of its own for each: where a client was is remembered.
        let reader = client(&format!("reader{number}")).await;
        let (subscription, seen) = read(&reader, "", start.clone()).await;
        until(&format!("{start:?}"), async || seen.bodies() == found).await;
        readers.push((start, found, reader, subscription, seen));
    }
    let reader = client("new").await;
    let (_subscription, new) = read(&reader, "", Start::StartNewOnly).await;
    let mut sent = Vec::new();
    // Which of these is the first one it sees depends on when it began to listen; from there on it sees all.
    until("new only", async || {
        sent.push(format!("new {}", sent.len()));
        store(&sender, &sent[sent.len() - 1]).await;
        sleep(Duration::from_millis(80)).await;
        new.any()
    })
    .await;
    sent.push("end".into());
    store(&sender, "end").await;
    until("the last event", async || new.bodies().last().is_some_and(|last| last == "end")).await;
    assert!(sent.ends_with(&new.bodies()), "{:?} of {sent:?}", new.bodies());
    for (start, found, _reader, _subscription, seen) in &readers {
        let all: Vec<_> = found.iter().map(ToString::to_string).chain(sent.iter().cloned()).collect();
        until(&format!("live events of {start:?}"), async || seen.bodies() == all).await;
    }
}

async fn events_store_groups() {
    let (sender, one, other) = (client("sender").await, client("one").await, client("other").await);
    let (_one, first) = read(&one, "billing", Start::StartFromFirst).await;
    let (_other, second) = read(&other, "billing", Start::StartFromFirst).await;
    let mut bodies = numbers(40);
    for body in &bodies {
        store(&sender, body).await;
    }
    until("the events", async || first.bodies().len() + second.bodies().len() >= 40).await;
    let mut shared = [first.bodies(), second.bodies()].concat();
    shared.sort();
    bodies.sort();
    assert_eq!(shared, bodies, "each event once in the group");
}

async fn event_channels() {
    let client = client("rust").await;
    client.create_events_channel("news").await.expect("a channel");
    client.create_events_store_channel("log").await.expect("a channel");
    let names = |found: Vec<kubemq::ChannelInfo>| found.into_iter().map(|channel| channel.name).collect::<Vec<_>>();
    assert_eq!(names(client.list_events_channels("").await.expect("a list")), ["news"]);
    assert_eq!(names(client.list_events_store_channels("").await.expect("a list")), ["log"]);
    client.delete_events_channel("news").await.expect("a deletion");
    client.delete_events_store_channel("log").await.expect("a deletion");
    assert!(client.list_events_channels("").await.expect("a list").is_empty());
    assert!(client.list_events_store_channels("").await.expect("a list").is_empty());
}

async fn subscription_goes_on_after_a_crash() {
    let (sender, reader) = (client("sender").await, client("reader").await);
    let (mut subscription, seen) = read(&reader, "", Start::StartFromFirst).await;
    store(&sender, "before").await;
    until("the first event", async || seen.any()).await;
    crash();
    until("a stored event", async || {
        let sent = sender.send_event_store(stored("after").build()).await;
        sent.is_ok_and(|sent| sent.sent)
    })
    .await;
    until("the next event", async || {
        // This SDK gives up when the broker is away for longer than its first attempt to subscribe again.
        if subscription.is_done() {
            subscription = read_into(&seen, &reader, "", Start::StartFromFirst).await;
        }
        // What was delivered a moment before the crash may come again.
        let mut bodies = seen.bodies();
        bodies.dedup();
        bodies == ["before", "after"]
    })
    .await;
}
