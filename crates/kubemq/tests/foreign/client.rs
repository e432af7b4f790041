//! The typed client with the Community server.

use polymq_core::{Message, Settings};
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
