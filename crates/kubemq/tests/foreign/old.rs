//! A server before 2.2.

use polymq_core::{ConsumeOptions, Error, ErrorKind, Message, Settings};
use polymq_kubemq::{KubeMq, Policy, StartAt};

use crate::{PATIENCE, SECOND, start, stub::Age};

/// It has no streams to and from queues: sending and consuming are refused with a sentence that says what is missing, and
/// not tried for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_bus_is_refused_by_a_server_that_is_too_old() {
    let (_server, bus) = start(Age::Old).await;
    let queue = bus.queue("orders");
    let sent = queue.send_message(Message::new("x")).await.map(drop);
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("nobody knows yet");
    let received = tokio::time::timeout(PATIENCE, subscription.next()).await.expect("in time").map(drop);
    let looked = queue.exists(None).await.map(drop);
    let group = ConsumeOptions { group: Some("audit".into()), ..ConsumeOptions::default() };
    let grouped = bus.topic("prices").subscribe(group).await.map(drop);
    let errors: [Error; 4] = [sent, received, looked, grouped].map(|refused| refused.expect_err("too old"));
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
        let text = error.to_string();
        assert!(text.contains("unknown method Queues") && text.contains("from version 2.2 on"), "{text}");
    }
    bus.close().await.expect("closed");
}

/// What it has works: the typed client's single calls, transactions, and events.
#[tokio::test(flavor = "multi_thread")]
async fn the_typed_client_works_with_an_old_server() {
    let (server, _) = start(Age::Old).await;
    let client = KubeMq::connect(&Settings::from_url(&server.url).expect("a URL")).await.expect("connect");
    assert_eq!(client.ping().await.expect("ping").version, "2.1.0");
    client.send("q", &Message::new("1"), &Policy::default()).await.expect("sent");
    for sent in client.send_batch("q", &["2", "3", "4"].map(Message::new), &Policy::default()).await.expect("sent") {
        sent.expect("accepted");
    }
    assert_eq!(client.peek("q", 10, SECOND).await.expect("peeked").len(), 4);
    let held = client.transaction("q", 30 * SECOND, SECOND).await.expect("asked").expect("a message");
    held.ack().await.expect("acknowledged");
    assert_eq!(client.receive("q", 1, SECOND).await.expect("received")[0].body, "2");
    assert_eq!(client.ack_all("q").await.expect("emptied"), 2);
    client.store_event("log", &Message::new("5")).await.expect("stored");
    let mut events = client.subscribe_stored("log", "", StartAt::First).await.expect("subscribed");
    assert_eq!(events.next().await.expect("an event").body, "5");
    let error = client.poll("q", 1, SECOND).await.expect_err("polls are younger");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}
