//! One message held for a time.

use std::time::Duration;

use polymq_core::{ErrorKind, Message};
use polymq_kubemq::{KubeMq, Policy, Transaction};
use tokio::time::sleep;

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

/// Mission rows G5 and G9: with the times of the seed, an extended message is acknowledged; a shorter time is over without the
/// extension, which the late acknowledgement is told, and the message comes again.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_is_held_longer_when_extended_and_comes_again_when_not() {
    let (broker, client) = start().await;
    let client = &client;
    let extended = async |queue: &'static str, first: u32| {
        fill(client, queue, ["work".to_owned()]).await;
        let mut held = hold(client, queue, first * SECOND).await;
        sleep(SECOND).await;
        held.extend(3 * SECOND).await.expect("extended");
        sleep(SECOND * 5 / 2).await;
        held.ack().await.expect("acknowledged in time");
        assert!(waiting(client, queue).await.is_empty(), "{queue}");
    };
    let forgotten = async {
        fill(client, "forgotten", ["work".to_owned()]).await;
        let held = hold(client, "forgotten", 2 * SECOND).await;
        sleep(SECOND * 7 / 2).await;
        let error = held.ack().await.expect_err("too late");
        assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
        let again = hold(client, "forgotten", 30 * SECOND).await;
        assert_eq!((&*again.message().body, count(&again)), (&b"work"[..], 2));
        again.ack().await.expect("acknowledged");
    };
    tokio::join!(extended("seed", 5), extended("short", 2), forgotten);
    let mut held = {
        fill(client, "late", ["x".to_owned()]).await;
        hold(client, "late", SECOND).await
    };
    assert_eq!(held.extend(Duration::ZERO).await.expect_err("bounds").kind(), ErrorKind::InvalidInput);
    sleep(SECOND * 3 / 2).await;
    assert_eq!(held.extend(SECOND).await.expect_err("too late").kind(), ErrorKind::Stale);
    broker.stop().await;
}

/// Mission row G27: an extension whose future is dropped does not disturb what comes after it.
#[tokio::test(flavor = "multi_thread")]
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
