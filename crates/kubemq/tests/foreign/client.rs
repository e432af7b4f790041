//! The typed client with the Community server.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use polymq_core::{ErrorKind, Message, Settings};
use polymq_kubemq::{Ask, KubeMq, Poll, Reply, RequestKind, StartAt};
use tokio::time::timeout;

use crate::{
    PATIENCE, SECOND,
    stub::{Age, Foreign},
};

async fn client(server: &Foreign) -> KubeMq {
    KubeMq::connect(&Settings::from_url(&server.url).expect("a URL")).await.expect("connect")
}

/// Subscriptions that are not confirmed before something comes are there all the same: what is sent next is heard.
#[tokio::test(flavor = "multi_thread")]
async fn subscriptions_need_no_confirmation() {
    let server = Foreign::start(Age::Community).await;
    let client = client(&server).await;
    let mut plain = client.subscribe_events("news", "").await.expect("subscribed");
    let mut stored = client.subscribe_stored("log", "", StartAt::New).await.expect("subscribed");
    client.send_event("news", &Message::new("a")).await.expect("sent");
    client.stream_event("news", &Message::new("b")).await.expect("sent");
    client.stream_stored("log", &Message::new("c")).await.expect("stored");
    for expected in ["a", "b"] {
        assert_eq!(timeout(PATIENCE, plain.next()).await.expect("in time").expect("an event").body, expected);
    }
    assert_eq!(timeout(PATIENCE, stored.next()).await.expect("in time").expect("an event").body, "c");
}

/// A request without an id is answered under one of the responder's, which the server asks for.
#[tokio::test(flavor = "multi_thread")]
async fn requests_without_an_id_are_answered() {
    let server = Foreign::start(Age::Community).await;
    let client = client(&server).await;
    let respond = |asked: polymq_kubemq::Asked| async move {
        Ok::<_, std::convert::Infallible>(Reply { body: asked.body, ..Reply::default() })
    };
    let responder = client.respond(RequestKind::Query, "ask", "", 1, respond).await.expect("responds");
    let ask = Ask {
        channel: "ask".into(),
        metadata: String::new(),
        body: "hello".into(),
        tags: std::collections::HashMap::new(),
        timeout: PATIENCE,
        cache: None,
    };
    let answered = client.query(ask).await.expect("answered");
    assert!(answered.executed && answered.body == "hello", "{answered:?}");
    responder.stop().await;
}

/// A poll is settled in parts although the server confirms its stream late, and gives what is left back when it ends.
#[tokio::test(flavor = "multi_thread")]
async fn a_poll_is_settled_in_parts_by_a_slow_server() {
    let server = Foreign::start(Age::Community).await;
    let client = client(&server).await;
    for sent in client.send_batch("q", &["1", "2", "3"].map(Message::new), &Default::default()).await.expect("sent") {
        sent.expect("accepted");
    }
    let mut poll = client.poll("q", 3, SECOND).await.expect("polled");
    let sequences: Vec<_> = poll.messages().iter().map(Poll::sequence_of).collect();
    poll.ack(&sequences[..1]).await.expect("acknowledged");
    poll.nack(&sequences[1..2]).await.expect("returned");
    assert_eq!(poll.held().collect::<Vec<_>>(), sequences[2..]);
    drop(poll);
    let mut rest = Vec::new();
    while rest.len() < 2 {
        rest.extend(client.receive("q", 2, 5 * SECOND).await.expect("received").into_iter().map(|it| it.body));
    }
    rest.sort();
    assert_eq!(rest, ["2", "3"]);
}

/// Whoever ends each connection before its first call is asked once, and the error says what happened: nobody connects again
/// without a pause.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ends_each_connection_at_once_is_asked_once() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("kubemq://{}?connect_timeout=60s", listener.local_addr().expect("bound"));
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    let server = tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::Relaxed);
            drop(connection);
        }
    });
    let settings = Settings::from_url(&url).expect("a URL");
    let error = tokio::time::timeout(PATIENCE, KubeMq::connect(&settings)).await.expect("at once").expect_err("ended");
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error:?}");
    assert_eq!(connections.load(Ordering::Relaxed), 1, "{error}");
    server.abort();
}
