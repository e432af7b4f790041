//! Queues without transactions, and policies.

use std::time::{Duration, SystemTime};

use polymq_core::{ConsumeOptions, ErrorKind, Message};
use polymq_kubemq::Policy;
use polymq_kubemq_proto::{QueueMessage, QueueMessagePolicy, kubemq_client::KubemqClient};
use tokio::time::Instant;

use crate::{SECOND, bodies, bus, next, start, waiting};

/// Mission rows G1, C21 and G26.
#[tokio::test(flavor = "multi_thread")]
async fn messages_are_seen_taken_and_discarded() {
    let (begun, clock) = (SystemTime::now(), Instant::now());
    let (broker, client) = start().await;
    let ready = Instant::now();
    for n in 0..5 {
        let message = Message::new(format!("m{n}")).with_id(format!("order-{n}"));
        let before = SystemTime::now();
        let accepted = client.send("orders", &message, &Policy::default()).await.expect("sent");
        assert_eq!((&*accepted.id, accepted.expires_at, accepted.delayed_to), (&*format!("order-{n}"), None, None));
        assert!(accepted.at.is_some_and(|at| at >= before), "{accepted:?}");
    }
    for _ in 0..2 {
        let seen = client.peek("orders", 3, SECOND).await.expect("peeked");
        assert_eq!(bodies(&seen), ["m0", "m1", "m2"]);
    }
    assert_eq!(bodies(&client.receive("orders", 3, SECOND).await.expect("received")), ["m0", "m1", "m2"]);
    assert_eq!(client.ack_all("orders").await.expect("discarded"), 2);
    assert!(client.receive("orders", 1, SECOND).await.expect("received").is_empty());
    let least = ready.elapsed();
    let about = client.ping().await.expect("ping");
    assert!(about.version.starts_with("2.") && !about.host.is_empty(), "{about:?}");
    // Both in whole seconds. The last look waited a second in vain.
    assert!(about.started + SECOND > begun && about.started <= SystemTime::now(), "{about:?}");
    assert!(least >= SECOND && about.up + SECOND > least && about.up <= clock.elapsed(), "{about:?} after {least:?}");
    broker.stop().await;
}

/// Mission row C17: what a delivery tells is what the protocol's own look at the queue shows.
#[tokio::test(flavor = "multi_thread")]
async fn c17_a_delivery_tells_what_a_look_at_the_queue_shows() {
    let (broker, client) = start().await;
    let bus = bus(broker.address()).await;
    let queue = bus.queue("orders");
    for body in ["one", "two"] {
        queue.send_message(Message::new(body)).await.expect("sent");
    }
    let shown = client.peek("orders", 2, SECOND).await.expect("peeked");
    assert_eq!(bodies(&shown), ["one", "two"]);
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    for shown in shown {
        let shown = shown.attributes.expect("attributes");
        let delivery = next(&mut subscription).await;
        let details = delivery.details().expect("details");
        let told = details.broker_time.expect("a time").duration_since(SystemTime::UNIX_EPOCH).expect("after 1970");
        assert_eq!(told.as_nanos(), u128::try_from(shown.timestamp).expect("after 1970"));
        assert_eq!((details.sequence, delivery.attempt(), delivery.channel()), (Some(shown.sequence), 1, "orders"));
        delivery.ack().await.expect("acknowledged");
    }
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// Mission row G2: each policy does what it says.
#[tokio::test(flavor = "multi_thread")]
async fn policies_are_kept() {
    let (broker, client) = start().await;
    let expires = Policy { expires_in: Some(5 * SECOND), ..Policy::default() };
    let delayed = Policy { delay: Some(8 * SECOND), ..Policy::default() };
    let mut tries = 0;
    let (queue, sent, stored) = loop {
        tries += 1;
        let (queue, sent) = (format!("q{tries}"), Instant::now());
        let accepted = client.send(&queue, &Message::new("gone"), &expires).await.expect("sent");
        let end = accepted.at.expect("a time") + 5 * SECOND;
        assert!(accepted.expires_at.is_some_and(|expires| expires <= end), "{accepted:?}");
        let stored = Instant::now();
        let due = SystemTime::now() + 8 * SECOND;
        let accepted = client.send(&queue, &Message::new("late"), &delayed).await.expect("sent");
        assert!(accepted.delayed_to.is_some_and(|until| until >= due), "{accepted:?}");
        let seen = client.peek(&queue, 5, SECOND).await.expect("peeked");
        // On a busy machine it may have expired before anybody looked.
        if sent.elapsed() < 4 * SECOND {
            assert_eq!(bodies(&seen), ["gone"]);
            break (queue, sent, stored);
        }
    };
    // What has expired by then is not there any more; its time began before its send was answered, however late that was.
    tokio::time::sleep_until(stored + 6 * SECOND).await;
    assert_eq!(bodies(&client.receive(&queue, 5, 30 * SECOND).await.expect("received")), ["late"]);
    assert!(sent.elapsed() >= 8 * SECOND, "came after {:?}", sent.elapsed());
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

/// Mission row G2: the third reject moves it, with all of its policy.
#[tokio::test(flavor = "multi_thread")]
async fn the_last_reject_moves_a_message_to_its_dead_letters() {
    let (broker, client) = start().await;
    let policy =
        Policy { expires_in: Some(60 * SECOND), delay: Some(SECOND), dead_letters: Some((3, "q.dead".into())) };
    client.send("q", &Message::new("bad").with_id("order-7"), &policy).await.expect("sent");
    for count in 1..=3 {
        let held = client.transaction("q", 30 * SECOND, 20 * SECOND).await.expect("asked").expect("a message");
        let attributes = held.message().attributes.as_ref().expect("attributes");
        assert_eq!((attributes.receive_count, attributes.expiration_at > 0), (count, true));
        assert!(waiting(&client, "q.dead").await.is_empty(), "before reject {count}");
        held.reject().await.expect("rejected");
    }
    assert!(waiting(&client, "q").await.is_empty());
    let dead = client.receive("q.dead", 5, SECOND).await.expect("received");
    assert_eq!((bodies(&dead), &*dead[0].message_id), (vec!["bad".to_owned()], "order-7"));
    let attributes = dead[0].attributes.as_ref().expect("attributes");
    assert_eq!((attributes.re_routed, &*attributes.re_routed_from_queue), (true, "q"));
    broker.stop().await;
}

/// Mission row G1: a batch has a result for each message.
#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_sent_in_order() {
    let (broker, client) = start().await;
    let messages: Vec<_> = (0..10).map(|n| Message::new(format!("m{n}"))).collect();
    let sent = client.send_batch("q", &messages, &Policy::default()).await.expect("sent");
    assert!(sent.len() == 10 && sent.iter().all(Result::is_ok), "{sent:?}");
    let expected: Vec<_> = (0..10).map(|n| format!("m{n}")).collect();
    assert_eq!(bodies(&client.receive("q", 10, SECOND).await.expect("received")), expected);
    let mixed = [Message::new("good"), Message::new("")];
    assert_eq!(
        client.send_batch("q", &mixed, &Policy::default()).await.expect_err("refused").kind(),
        ErrorKind::InvalidInput
    );
    assert!(waiting(&client, "q").await.is_empty(), "none was sent");
    broker.stop().await;
}

/// A retry loses no message that another program lets the broker drop after so many deliveries.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_tried_again_after_its_last_delivery_is_not_lost() {
    let (broker, _client) = start().await;
    let bus = bus(broker.address()).await;
    let message = QueueMessage {
        client_id: "other".into(),
        channel: "orders".into(),
        body: "x".into(),
        policy: Some(QueueMessagePolicy { max_receive_count: 2, ..QueueMessagePolicy::default() }),
        ..QueueMessage::default()
    };
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", broker.address())).expect("an address");
    let mut other = KubemqClient::new(channel.connect().await.expect("connected"));
    let sent = other.send_queue_message(message).await.expect("sent").into_inner();
    assert!(!sent.is_error, "{sent:?}");
    let mut subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribed");
    for attempt in 1..=4 {
        let delivery = next(&mut subscription).await;
        assert_eq!((delivery.attempt(), &delivery.message().payload()[..]), (attempt, &b"x"[..]));
        delivery.retry(Duration::ZERO).await.expect("tried again");
    }
    next(&mut subscription).await.ack().await.expect("acknowledged");
    bus.close().await.expect("closed");
    broker.stop().await;
}

/// What any client has sent to expire does so although it is put off: polymq's own know it too.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_tried_again_later_expires_as_its_sender_wants() {
    let (broker, client) = start().await;
    let bus = bus(broker.address()).await;
    let expires = Policy { expires_in: Some(3600 * SECOND), ..Policy::default() };
    let accepted = client.send("orders", &Message::new("x"), &expires).await.expect("sent");
    let until = accepted.expires_at.expect("it expires");
    let mut subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribed");
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.message().expires_at(), Some(until));
    delivery.retry(SECOND).await.expect("put off");
    subscription.close().await.expect("closed");
    let mut copies = Vec::new();
    while copies.is_empty() {
        copies = waiting(&client, "orders").await;
    }
    let at = copies[0].attributes.as_ref().expect("attributes").expiration_at;
    let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(u64::try_from(at).expect("a time"));
    // The broker counts whole seconds, and from when the delay has ended.
    assert!(at >= until - SECOND && at < until + 600 * SECOND, "{at:?}, not {until:?}");
    let mut subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribed");
    let again = next(&mut subscription).await;
    assert_eq!((again.message().expires_at(), again.attempt()), (Some(until), 2));
    again.ack().await.expect("acknowledged");
    bus.close().await.expect("closed");
    broker.stop().await;
}
