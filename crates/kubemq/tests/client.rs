//! The typed client against a broker in this process.

use std::{collections::HashMap, time::Duration};

use polymq_broker::Broker;
use polymq_core::{ErrorKind, Message, Settings};
use polymq_kubemq::{Ask, KubeMq, Pattern, Policy};
use tokio::time::Instant;

const SECOND: Duration = Duration::from_secs(1);

async fn start() -> (Broker, KubeMq) {
    let broker = Broker::builder().listen("127.0.0.1:0").start().await.expect("a broker");
    let settings = Settings::from_url(&format!("kubemq://{}", broker.address())).expect("a URL");
    let client = KubeMq::connect(&settings).await.expect("connect");
    (broker, client)
}

fn bodies(messages: &[polymq_kubemq_proto::QueueMessage]) -> Vec<String> {
    messages.iter().map(|message| String::from_utf8_lossy(&message.body).into_owned()).collect()
}

/// Mission rows G1, C21 and G26.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_seen_taken_and_discarded() {
    let (broker, client) = start().await;
    for n in 0..5 {
        client.send("orders", &Message::new(format!("m{n}")), &Policy::default()).await.expect("sent");
    }
    for _ in 0..2 {
        let seen = client.peek("orders", 3, SECOND).await.expect("peeked");
        assert_eq!(bodies(&seen), ["m0", "m1", "m2"]);
    }
    assert_eq!(bodies(&client.receive("orders", 3, SECOND).await.expect("received")), ["m0", "m1", "m2"]);
    assert_eq!(client.ack_all("orders").await.expect("discarded"), 2);
    assert!(client.receive("orders", 1, SECOND).await.expect("received").is_empty());
    let about = client.ping().await.expect("ping");
    assert!(about.version.starts_with("2.") && !about.host.is_empty(), "{about:?}");
    broker.stop().await;
}

/// Mission row G2: each policy does what it says.
#[tokio::test(flavor = "multi_thread")]
async fn policies_are_kept() {
    let (broker, client) = start().await;
    let expires = Policy { expires_in: Some(SECOND), ..Policy::default() };
    client.send("q", &Message::new("gone"), &expires).await.expect("sent");
    let delayed = Policy { delay: Some(2 * SECOND), ..Policy::default() };
    let sent = Instant::now();
    client.send("q", &Message::new("late"), &delayed).await.expect("sent");
    assert_eq!(bodies(&client.peek("q", 5, SECOND).await.expect("peeked")), ["gone"]);
    // What has expired by then is not there any more.
    tokio::time::sleep_until(sent + SECOND + SECOND / 2).await;
    assert_eq!(bodies(&client.receive("q", 5, 3 * SECOND).await.expect("received")), ["late"]);
    assert!(sent.elapsed() >= 2 * SECOND, "came after {:?}", sent.elapsed());
    broker.stop().await;
}

/// Mission row G3: refused before any call, so a broker that is gone does not matter.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_valid_is_refused_before_any_call() {
    let (broker, client) = start().await;
    broker.stop().await;
    let policy = |change: fn(&mut Policy)| {
        let mut policy = Policy::default();
        change(&mut policy);
        policy
    };
    let message = Message::new("x");
    for (policy, part) in [
        (policy(|p| p.expires_in = Some(Duration::ZERO)), "expiration"),
        (policy(|p| p.expires_in = Some(Duration::from_secs(43_201))), "expiration"),
        (policy(|p| p.delay = Some(Duration::from_millis(1500))), "delay"),
        (policy(|p| p.dead_letters = Some((0, "dead".into()))), "deliveries"),
        (policy(|p| p.dead_letters = Some((1025, "dead".into()))), "deliveries"),
        (policy(|p| p.dead_letters = Some((3, "a b".into()))), "white space"),
    ] {
        let error = client.send("q", &message, &policy).await.expect_err(part);
        assert!(error.kind() == ErrorKind::InvalidInput && error.to_string().contains(part), "{error}");
    }
    let empty = client.send("q", &Message::new(""), &Policy::default()).await.expect_err("empty");
    assert_eq!(empty.kind(), ErrorKind::InvalidInput, "{empty}");
    for (max, wait) in [(0, SECOND), (1025, SECOND), (1, Duration::ZERO), (1, SECOND / 2)] {
        let error = client.receive("q", max, wait).await.expect_err("bounds");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}

fn ask(channel: &str, timeout: Duration) -> Ask {
    Ask {
        channel: channel.into(),
        metadata: "what".into(),
        body: "body".into(),
        tags: HashMap::new(),
        timeout,
        cache: None,
    }
}

/// Of mission row G17: nobody answers, and the error comes when the time is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_without_a_responder_times_out() {
    let (broker, client) = start().await;
    let asked = Instant::now();
    let error = client.command(ask("nobody", SECOND)).await.expect_err("nobody answers");
    assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error}");
    assert!((SECOND..5 * SECOND).contains(&asked.elapsed()), "after {:?}", asked.elapsed());
    client.ping().await.expect("the connection is as good as before");
    let cached = Ask { cache: Some(("k".into(), SECOND)), ..ask("nobody", SECOND) };
    assert_eq!(client.command(cached).await.expect_err("no cache").kind(), ErrorKind::InvalidInput);
    broker.stop().await;
}

/// Channels are made, listed and deleted.
#[tokio::test(flavor = "multi_thread")]
async fn channels_are_managed() {
    let (broker, client) = start().await;
    for pattern in [Pattern::Queues, Pattern::EventsStore, Pattern::Events, Pattern::Commands, Pattern::Queries] {
        client.create_channel(pattern, "mine").await.expect("made");
        let names = |listed: Vec<polymq_kubemq::ChannelInfo>| listed.into_iter().map(|it| it.name).collect::<Vec<_>>();
        assert_eq!(names(client.list_channels(pattern, "min").await.expect("listed")), ["mine"], "{pattern:?}");
        client.delete_channel(pattern, "mine").await.expect("deleted");
        client.delete_channel(pattern, "mine").await.expect("harmless");
        assert!(client.list_channels(pattern, "min").await.expect("listed").is_empty(), "{pattern:?}");
    }
    broker.stop().await;
}
