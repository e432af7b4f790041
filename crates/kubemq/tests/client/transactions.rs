//! One message held for a time.

use std::{
    sync::{Arc, mpsc},
    time::Duration,
};

use futures_util::FutureExt;
use polymq_broker::Broker;
use polymq_core::{ErrorKind, Message};
use polymq_kubemq::{InProcess, KubeMq, KubeMqConfig, Policy, Transaction};
use tokio::time::advance;

use crate::{SECOND, bodies, fill, start, waiting};

async fn hold(client: &KubeMq, queue: &str, visibility: Duration) -> Transaction {
    let held = client.transaction(queue, visibility, 5 * SECOND).await.expect("asked");
    held.unwrap_or_else(|| panic!("nothing in {queue}"))
}

fn count(held: &Transaction) -> i32 {
    held.message().attributes.as_ref().map_or(0, |attributes| attributes.receive_count)
}

/// Mission row G4: an acknowledged message is gone, a rejected one is back and counted, a dropped one too.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_message_is_acknowledged_or_rejected() {
    let (broker, client) = start().await;
    fill(&client, "q", ["a".to_owned()]).await;
    let held = hold(&client, "q", 30 * SECOND).await;
    assert_eq!((&*held.message().body, count(&held)), (&b"a"[..], 1));
    assert!(client.transaction("q", SECOND, SECOND).await.expect("asked").is_none(), "nobody else sees it");
    held.reject().await.expect("rejected");
    let held = hold(&client, "q", 30 * SECOND).await;
    assert_eq!(count(&held), 2);
    drop(held);
    let held = hold(&client, "q", 30 * SECOND).await;
    assert_eq!(count(&held), 3);
    held.ack().await.expect("acknowledged");
    assert!(client.transaction("q", SECOND, SECOND).await.expect("asked").is_none());
    for (visibility, wait) in [(Duration::ZERO, SECOND), (SECOND, Duration::ZERO), (SECOND / 2, SECOND)] {
        let error = client.transaction("q", visibility, wait).await.expect_err("bounds");
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    broker.stop().await;
}

/// A client of a broker in this process, whose clock stands until the test moves it: a paused clock goes on by itself only
/// while no blocking task runs, and one does until the second value is dropped.
async fn stepped() -> (KubeMq, mpsc::Sender<()>) {
    let (end, ended) = mpsc::channel();
    tokio::task::spawn_blocking(move || ended.recv());
    let broker = Broker::builder().in_process().expect("a broker");
    let service: InProcess = Arc::new(move |request| broker.call(request).boxed());
    (KubeMq::in_process(KubeMqConfig::default(), service).await.expect("connect"), end)
}

/// Mission rows G5 and G9: with the times of the seed, an extended message is acknowledged, also when nothing but the extension
/// holds it; without one it comes again, and the late acknowledgement is told.
#[tokio::test(start_paused = true)]
async fn a_message_is_held_longer_when_extended_and_comes_again_when_not() {
    let (client, _clock) = stepped().await;
    for (queue, first) in [("seed", 5), ("short", 2)] {
        fill(&client, queue, ["work".to_owned()]).await;
        let mut held = hold(&client, queue, first * SECOND).await;
        advance(SECOND).await;
        held.extend(3 * SECOND).await.expect("extended");
        advance(SECOND * 5 / 2).await;
        held.ack().await.expect("acknowledged in time");
        assert_eq!(client.ack_all(queue).await.expect("looked"), 0, "{queue}: it is done");
    }
    for (queue, extended) in [("forgotten", false), ("extended too little", true)] {
        let queue = queue.replace(' ', "-");
        fill(&client, &queue, ["work".to_owned()]).await;
        let mut held = hold(&client, &queue, 2 * SECOND).await;
        advance(SECOND).await;
        if extended {
            held.extend(2 * SECOND).await.expect("extended");
        }
        advance(SECOND * 5 / 2).await;
        // Its time is over when somebody else can hold it.
        let again = hold(&client, &queue, 30 * SECOND).await;
        assert_eq!((&*again.message().body, count(&again)), (&b"work"[..], 2), "{queue}");
        let error = held.ack().await.expect_err("too late");
        assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
        again.ack().await.expect("acknowledged");
        assert_eq!(client.ack_all(&queue).await.expect("looked"), 0, "{queue}: once, by who held it last");
    }
    fill(&client, "late", ["x".to_owned()]).await;
    let mut held = hold(&client, "late", SECOND).await;
    assert_eq!(held.extend(Duration::ZERO).await.expect_err("bounds").kind(), ErrorKind::InvalidInput);
    advance(SECOND * 3 / 2).await;
    let again = hold(&client, "late", SECOND).await;
    assert_eq!(held.extend(SECOND).await.expect_err("too late").kind(), ErrorKind::Stale);
    again.ack().await.expect("acknowledged");
}

/// Mission row G27: an extension whose future is dropped does not disturb what comes after it. On one thread, so that no
/// answer can come while the future is polled.
#[tokio::test]
async fn a_dropped_extension_does_not_disturb_the_acknowledgement() {
    let (broker, client) = start().await;
    fill(&client, "q", ["a".to_owned()]).await;
    let mut held = hold(&client, "q", 30 * SECOND).await;
    // Polled once, so that its request is on its way.
    assert!(futures_util::poll!(Box::pin(held.extend(30 * SECOND))).is_pending());
    held.ack().await.expect("acknowledged");
    assert!(client.transaction("q", SECOND, SECOND).await.expect("asked").is_none());
    broker.stop().await;
}

/// Mission row G6. KubeMQ resends a new message: its own server tells where it came from for polls only, see
/// `moved_messages_tell_where_they_came_from`.
#[tokio::test(flavor = "multi_thread")]
async fn a_held_message_is_resent_to_another_queue() {
    let (broker, client) = start().await;
    client.send("q", &Message::new("a").with_id("order-7"), &Policy::default()).await.expect("sent");
    let held = hold(&client, "q", 30 * SECOND).await;
    held.resend("other").await.expect("resent");
    assert!(waiting(&client, "q").await.is_empty());
    let there = waiting(&client, "other").await;
    assert_eq!((bodies(&there), &*there[0].message_id), (vec!["a".to_owned()], "order-7"));
    let held = hold(&client, "other", 30 * SECOND).await;
    assert_eq!(count(&held), 1, "counted anew");
    let refused = held.resend("a b").await.expect_err("white space");
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    assert_eq!(count(&hold(&client, "other", 30 * SECOND).await), 2, "it went back");
    broker.stop().await;
}

/// Mission row G7: another body, other metadata, another queue and a new id; the original is done.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_message_takes_the_place_of_a_held_one() {
    let (broker, client) = start().await;
    client.send("q", &Message::new("a").with_id("order-7"), &Policy::default()).await.expect("sent");
    let held = hold(&client, "q", 30 * SECOND).await;
    let changed = Message::new("b").with_header("kubemq-metadata", "changed");
    held.resend_modified("other", &changed, &Policy::default()).await.expect("resent");
    assert!(waiting(&client, "q").await.is_empty());
    let there = waiting(&client, "other").await;
    assert_eq!((bodies(&there), &*there[0].metadata), (vec!["b".to_owned()], "changed"));
    assert!(!there[0].message_id.is_empty() && there[0].message_id != "order-7", "{}", there[0].message_id);
    broker.stop().await;
}
