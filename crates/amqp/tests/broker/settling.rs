use std::time::{Duration, Instant, SystemTime};

use futures_util::{
    FutureExt,
    future::{join, join_all},
};
use lapin::options::{BasicGetOptions, BasicNackOptions};
use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, ProduceOptions};

use super::harness::*;

pub async fn a_delayed_message_comes_in_time_and_never_early() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("delayed"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let start = SystemTime::now();
    // All of them are sent before the first is due.
    let delays = [13_500, 12_250, 12_700, 12_030];
    for millis in delays {
        let due = start + Duration::from_millis(millis);
        send(&*producer, message(&millis.to_string()).with_deliver_at(due)).await.expect("sent");
    }
    let mut left = delays.to_vec();
    while !left.is_empty() {
        let incoming = receive(&mut *consumer, 1).await.remove(0);
        let waited = start.elapsed().expect("a clock");
        // Each waits in a queue of its own, and a busy broker may look at those in any order.
        let millis: u64 = text(&incoming).parse().expect("a number");
        left.remove(left.iter().position(|one| *one == millis).expect("each comes once"));
        let due = Duration::from_millis(millis);
        assert!(waited >= due && waited < due + Duration::from_secs(45), "{millis}: {waited:?}");
        assert!(incoming.message.headers().is_empty(), "{:?}", incoming.message);
        consumer.settler().ack(incoming.token).await.expect("acknowledged");
    }
    let topic = Address::topic(unique("later"));
    let mut listener = connection.consumer(&topic, &ConsumeOptions::default()).await.expect("a consumer");
    let topic = connection.producer(&topic, &ProduceOptions::default()).await.expect("a producer");
    let start = Instant::now();
    send(&*topic, message("x").deliver_in(Duration::from_millis(400))).await.expect("sent");
    receive(&mut *listener, 1).await;
    assert!(start.elapsed() >= Duration::from_millis(400));
}

pub async fn a_retried_message_counts_its_attempts() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("retried"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let settler = consumer.settler();
    let original = message("x").with_header("tenant", "acme").with_key("k").expires_in(Duration::from_secs(60));
    send(&*producer, original.clone()).await.expect("sent");
    let mut due = Instant::now();
    for attempt in 1..=4 {
        let incoming = receive(&mut *consumer, 1).await.remove(0);
        let mut seen = incoming.message.clone();
        assert_eq!(seen.header_attempt(), attempt);
        seen.clear_system_headers();
        assert_eq!(
            (seen.id(), seen.key(), seen.headers(), seen.expires_at()),
            (original.id(), original.key(), original.headers(), original.expires_at())
        );
        if attempt == 4 {
            settler.ack(incoming.token).await.expect("acknowledged");
            break;
        }
        assert!(Instant::now() >= due, "attempt {attempt} is early");
        let after = Duration::from_millis(300) * (attempt - 1);
        due = Instant::now() + after;
        within(60, settler.retry(incoming.token, &incoming.message, attempt + 1, after)).await.expect("retried");
        let again = settler.retry(incoming.token, &incoming.message, attempt + 1, after).await;
        assert_eq!(again.expect_err("settled").kind(), ErrorKind::Stale);
    }
    silence(&mut *consumer, 500).await;
    consumer.close().await.expect("closed");
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 0);
}

pub async fn what_a_foreign_consumer_rejects_is_a_dead_letter() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("rejected"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("bad")).await.expect("sent");
    let bare = raw(shared()).await;
    let got = bare.basic_get(queue.name().into(), BasicGetOptions::default()).await.expect("a get").expect("a message");
    got.nack(BasicNackOptions { requeue: false, multiple: false }).await.expect("rejected");
    let mut dead = consumer(&connection, &queue.dead_letters(None)).await;
    let incoming = receive(&mut *dead, 1).await.remove(0);
    assert_eq!(text(&incoming), "bad");
    assert!(incoming.message.headers().is_empty(), "{:?}", incoming.message);
}

pub async fn acknowledgements_are_coalesced() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&proxy.url()).await;
    let queue = Address::queue(unique("coalesced"));
    let producer = producer(&connection, &queue).await;
    join_all((0..5_000).map(|n| producer.send(message(&n.to_string())))).await;
    let mut consumer = consumer(&connection, &queue).await;
    let settler = consumer.settler();
    eventually("the window is full", || async {
        let queue = shared().management("GET", &format!("queues/%2F/{}", queue.name()), "").await;
        queue["messages_unacknowledged"].as_u64() >= Some(100)
    })
    .await;
    let mut left = 5_000;
    while left > 0 {
        // Half of the window, the other half being always under way: what trickles in would be acknowledged one by one.
        let batch = receive(&mut *consumer, left.min(64)).await;
        for incoming in &batch {
            settler.ack(incoming.token).await.expect("acknowledged");
        }
        left -= batch.len();
    }
    consumer.close().await.expect("closed");
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 0);
    let frames = proxy.acks.load(std::sync::atomic::Ordering::SeqCst);
    assert!(frames < 5_000 / 2, "{frames} acknowledgements for 5000 messages");
}

pub async fn one_stuck_message_does_not_stop_the_others() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("stuck"));
    let producer = producer(&connection, &queue).await;
    join_all((0..200).map(|n| producer.send(message(&n.to_string())))).await;
    let options = ConsumeOptions { prefetch: 4, ..ConsumeOptions::default() };
    let mut consumer = connection.consumer(&queue, &options).await.expect("a consumer");
    let settler = consumer.settler();
    let stuck = receive(&mut *consumer, 1).await.remove(0);
    for n in 1..200 {
        let incoming = receive(&mut *consumer, 1).await.remove(0);
        assert_eq!(text(&incoming), n.to_string());
        settler.ack(incoming.token).await.expect("acknowledged");
    }
    eventually("all but one are acknowledged", || async {
        let queue = shared().management("GET", &format!("queues/%2F/{}", queue.name()), "").await;
        queue["messages"] == 1 && queue["messages_unacknowledged"] == 1
    })
    .await;
    // The prefetch window is visible, and full of what was sent meanwhile.
    join_all((0..10).map(|n| producer.send(message(&n.to_string())))).await;
    eventually("the prefetch window is full", || async {
        let queue = shared().management("GET", &format!("queues/%2F/{}", queue.name()), "").await;
        queue["messages"] == 11 && queue["messages_unacknowledged"] == 4
    })
    .await;
    settler.ack(stuck.token).await.expect("acknowledged");
}

pub async fn close_returns_what_was_not_received() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("returned"));
    let producer = producer(&connection, &queue).await;
    join_all((0..10).map(|n| producer.send(message(&n.to_string())))).await;
    let mut first = consumer(&connection, &queue).await;
    let received = receive(&mut *first, 3).await;
    let settler = first.settler();
    first.close().await.expect("closed");
    first.close().await.expect("closed twice");
    drop(first);
    let mut second = consumer(&connection, &queue).await;
    let rest = receive(&mut *second, 7).await;
    // A broker that is slow to cancel brings the new consumer some before it has the others back.
    let mut rest: Vec<_> = rest.iter().map(text).collect();
    rest.sort();
    assert_eq!(rest, ["3", "4", "5", "6", "7", "8", "9"]);
    // What was received can still be settled, and given back.
    settler.ack(received[0].token).await.expect("acknowledged");
    settler.ack(received[2].token).await.expect("acknowledged");
    settler.release(received[1].token, received[1].message.clone());
    let again = receive(&mut *second, 1).await.remove(0);
    assert_eq!(text(&again), "1");
    assert!(again.details.is_some_and(|details| details.redelivered));
    silence(&mut *second, 300).await;
    // A settler that goes away gives back what it held.
    drop((settler, second));
    let mut third = consumer(&connection, &queue).await;
    assert_eq!(receive(&mut *third, 8).await.len(), 8);
}

pub async fn an_expired_message_is_not_delivered() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("expired"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("short").expires_in(Duration::from_millis(200))).await.expect("sent");
    send(&*producer, message("long").expires_in(Duration::from_secs(60))).await.expect("sent");
    tokio::time::sleep(Duration::from_millis(600)).await;
    let mut consumer = consumer(&connection, &queue).await;
    let incoming = receive(&mut *consumer, 1).await.remove(0);
    assert_eq!(text(&incoming), "long");
    assert!(incoming.message.expires_at().is_some());
    silence(&mut *consumer, 300).await;
}

pub async fn a_second_close_waits_for_what_was_settled_since() {
    let broker = breakable();
    let connection = connect(&broker.url()).await;
    let queue = Address::queue(unique("twice"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    send(&*producer, message("held")).await.expect("sent");
    let held = receive(&mut *consumer, 1).await.remove(0);
    within(60, consumer.close()).await.expect("closed");
    broker.kill("STOP");
    consumer.settler().ack(held.token).await.expect("acknowledged");
    {
        let mut closing = std::pin::pin!(consumer.close());
        let early = closing.as_mut().now_or_never();
        broker.kill("CONT");
        assert!(early.is_none(), "nobody has read the acknowledgement");
        within(60, closing).await.expect("closed");
    }
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 0);
}

pub async fn a_message_that_expires_in_ten_thousand_years_is_one_like_others() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("lasting"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    send(&*producer, message("lasting").with_expires_at(SystemTime::now() + Duration::from_secs(1 << 40)))
        .await
        .expect("sent");
    send(&*producer, message("another")).await.expect("sent");
    let received = receive(&mut *consumer, 2).await;
    assert_eq!((text(&received[0]).as_str(), text(&received[1]).as_str()), ("lasting", "another"));
    assert!(received[0].message.expires_at().is_some_and(|at| at > SystemTime::now() + Duration::from_secs(1 << 30)));
}

/// Whoever closes beside another one: when it is over for any of them, it is over.
pub async fn who_closes_at_the_same_time_waits_for_the_same_end() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("closers"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("kept")).await.expect("sent");
    let mut consumer = consumer(&connection, &queue).await;
    let (settler, received) = (consumer.settler(), receive(&mut *consumer, 1).await);
    let (mut first, mut second) = (connection.close(), connection.close());
    assert!((&mut first).now_or_never().is_none(), "it has begun, and the broker is asked");
    let alone = tokio::time::timeout(Duration::from_secs(1), &mut second).await;
    assert!(alone.is_err(), "it ended before the one that had begun");
    let (first, second) = join(first, async {
        second.await.expect("closed");
        settler.ack(received[0].token).await.expect_err("after the end").kind()
    })
    .await;
    first.expect("closed");
    assert!(matches!(second, ErrorKind::Stale | ErrorKind::Closed), "{second:?}");
    let again = connect(&shared().url()).await;
    let mut consumer = self::consumer(&again, &queue).await;
    assert_eq!(text(&receive(&mut *consumer, 1).await[0]), "kept");
}
