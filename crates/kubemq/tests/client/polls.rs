//! Several messages held at once.

use polymq_core::ErrorKind;
use polymq_kubemq::Poll;

use crate::{SECOND, bodies, fill, start, waiting};

/// Mission row G8: 100 messages, the odd ones acknowledged, the even ones returned; the counts are right.
#[tokio::test(flavor = "multi_thread")]
async fn a_poll_is_settled_in_parts() {
    let (broker, client) = start().await;
    fill(&client, "q", (1..=100).map(|n| n.to_string())).await;
    let mut poll = client.poll("q", 100, 5 * SECOND).await.expect("polled");
    assert_eq!(bodies(poll.messages()), (1..=100).map(|n| n.to_string()).collect::<Vec<_>>());
    let (odd, even): (Vec<_>, Vec<_>) = poll.held().partition(|sequence| sequence % 2 == 1);
    poll.ack(&odd).await.expect("acknowledged");
    assert_eq!(poll.held().collect::<Vec<_>>(), even);
    let twice = poll.ack(&odd[..1]).await.expect_err("settled before");
    assert_eq!(twice.kind(), ErrorKind::InvalidInput, "{twice}");
    poll.nack(&even).await.expect("returned");
    assert_eq!(poll.held().count(), 0);
    poll.ack_all().await.expect("nothing left to do");
    let back = client.poll("q", 100, 5 * SECOND).await.expect("polled");
    assert_eq!(bodies(back.messages()), (1..=50).map(|n| (2 * n).to_string()).collect::<Vec<_>>());
    for message in back.messages() {
        assert_eq!(message.attributes.as_ref().map(|attributes| attributes.receive_count), Some(2));
    }
    back.ack_all().await.expect("acknowledged");
    assert_eq!(client.ack_all("q").await.expect("emptied"), 0);
    broker.stop().await;
}

/// Mission row G8: several polls are open at a time, and what one does not settle is back in its place.
#[tokio::test(flavor = "multi_thread")]
async fn polls_do_not_disturb_each_other() {
    let (broker, client) = start().await;
    fill(&client, "q", (0..30).map(|n| n.to_string())).await;
    let mut polls = Vec::new();
    for _ in 0..3 {
        polls.push(client.poll("q", 10, 5 * SECOND).await.expect("polled"));
    }
    assert!(client.poll("q", 10, SECOND / 10).await.expect("polled").messages().is_empty(), "all are held");
    let [first, second, third] = <[Poll; 3]>::try_from(polls).expect("three");
    drop(second);
    while waiting(&client, "q").await.len() < 10 {}
    let back = client.poll("q", 10, 5 * SECOND).await.expect("polled");
    assert_eq!(bodies(back.messages()), (10..20).map(|n| n.to_string()).collect::<Vec<_>>());
    assert!(back.messages().iter().all(|m| m.attributes.as_ref().is_some_and(|a| a.receive_count == 1)), "uncounted");
    tokio::try_join!(first.ack_all(), third.nack_all(), back.ack_all()).expect("settled");
    let left: Vec<_> = (20..30).map(|n| n.to_string()).collect();
    assert_eq!(bodies(&waiting(&client, "q").await), left);
    broker.stop().await;
}

/// Mission rows G6 and G8: what is moved is in the other queue, and says where it was.
#[tokio::test(flavor = "multi_thread")]
async fn moved_messages_tell_where_they_came_from() {
    let (broker, client) = start().await;
    fill(&client, "q", (0..4).map(|n| n.to_string())).await;
    let mut poll = client.poll("q", 4, 5 * SECOND).await.expect("polled");
    let first: Vec<_> = poll.held().take(2).collect();
    assert_eq!(poll.requeue(&first, "a b").await.expect_err("white space").kind(), ErrorKind::InvalidInput);
    poll.requeue(&first, "other").await.expect("moved");
    assert_eq!(bodies(&waiting(&client, "other").await), ["0", "1"]);
    poll.requeue_all("other").await.expect("moved");
    let there = waiting(&client, "other").await;
    assert_eq!(bodies(&there), ["0", "1", "2", "3"]);
    for message in there {
        let attributes = message.attributes.expect("attributes");
        assert_eq!((attributes.re_routed, &*attributes.re_routed_from_queue), (true, "q"));
    }
    assert!(waiting(&client, "q").await.is_empty());
    broker.stop().await;
}

/// Mission row G9, of polls: a broker that does not hold them any more is an error.
#[tokio::test(flavor = "multi_thread")]
async fn a_poll_whose_broker_has_gone_is_not_acknowledged() {
    let (broker, client) = start().await;
    fill(&client, "q", ["a".to_owned()]).await;
    let poll = client.poll("q", 1, 5 * SECOND).await.expect("polled");
    broker.stop().await;
    let error = poll.ack_all().await.expect_err("nobody heard it");
    assert!([ErrorKind::UnknownOutcome, ErrorKind::Disconnected].contains(&error.kind()), "{error}");
}
