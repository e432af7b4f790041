//! Closing connections and consumers: nothing is lost, nothing hangs, and what was answered holds.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use polymq_core::{Address, Backend, Connection, ConsumeOptions, Consumer, ErrorKind, HealthState, Message, Settings};
use polymq_mqtt::MqttBackend;
use polymq_testkit::{Direction, Proxy};
use tokio::time::{sleep, timeout};

use crate::{
    harness::{self, Broker, body},
    words::*,
};

/// A broker that reads nothing, with more to write than the socket takes.
#[tokio::test]
async fn closing_is_bounded_when_the_broker_does_not_read() {
    let broker = Broker::start_with(&["--volatile"]).await;
    let bus = broker.connect_with(&[("operation_timeout", "1s"), ("keep_alive", "60s")]).await;
    let producer = bus.producer(&Address::topic("stalled"), &produce()).await.expect("producer");
    broker.signal("STOP").await;
    let sends: Vec<_> = (0..400).map(|_| producer.send(Message::new(vec![b'x'; 64 * 1024]))).collect();
    sleep(Duration::from_millis(500)).await;
    let closed = timeout(harness::PATIENCE, bus.close()).await;
    broker.signal("CONT").await;
    let error = closed.expect("closing is bounded").expect_err("not everything was sent");
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
    let mut unknown = 0;
    for send in sends {
        let error = timeout(harness::PATIENCE, send).await.expect("answered").expect_err("nothing was read");
        unknown += usize::from(error.kind() == ErrorKind::UnknownOutcome);
    }
    assert!((1..400).contains(&unknown), "{unknown} of 400 were written");
}

#[tokio::test]
async fn closing_is_bounded_idempotent_and_leaves_nothing() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("closing");
    for _ in 0..50 {
        let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
        consumer.close().await.expect("closed");
        consumer.close().await.expect("closed twice");
        let mut got = Vec::new();
        assert_eq!(consumer.receive(1, &mut got).await.expect_err("closed").kind(), ErrorKind::Closed);
    }
    send_many(&*bus, &queue, "m", 10).await;
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let held = harness::one(&mut *consumer).await;
    consumer.close().await.expect("closed");
    consumer.settler().ack(held.token).await.expect("settled after closing");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    assert_eq!(harness::take(&mut *consumer, 9).await.len(), 9);
    let blocked = tokio::spawn(async move { consumer.receive(1, &mut Vec::new()).await });
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    let sends: Vec<_> = (0..100).map(|n| producer.send(Message::new(format!("{n}")))).collect();
    let (first, second) = tokio::join!(bus.close(), bus.close());
    first.and(second).expect("closed");
    for send in sends {
        send.await.expect("closing flushes");
    }
    let _ = blocked.await.expect("not a panic");
    assert_eq!(bus.health().now().state, HealthState::Closed);
    assert_eq!(producer.send(Message::new("")).await.expect_err("closed").kind(), ErrorKind::Closed);
    assert_eq!(bus.ping().await.expect_err("closed").kind(), ErrorKind::Closed);
}

/// A connection whose packets the test may hold back.
async fn behind_proxy(broker: &Broker) -> (Proxy, Arc<dyn Connection>) {
    let proxy = Proxy::start(([127, 0, 0, 1], broker.port).into()).await.expect("a port");
    let settings = Settings::from_url(&format!("mqtt://{}", proxy.address())).expect("a URL");
    let settings = settings.with("connect_timeout", "60s").with("operation_timeout", "15s").with("keep_alive", "60s");
    let bus = MqttBackend.connect(&settings).await.expect("connected");
    (proxy, bus)
}

/// The goodbye of a connection is on its way, and the consumer knows: what is acknowledged now would never be written.
#[tokio::test]
async fn what_is_acknowledged_behind_the_goodbye_is_not_called_done() {
    let broker = Broker::start().await;
    let (proxy, bus) = behind_proxy(&broker).await;
    let queue = Address::queue("goodbye");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    send_many(&*bus, &queue, "m", 20).await;
    let held = harness::hold(&mut *consumer, 20).await;
    let settler = consumer.settler();
    // Its keeper looks at other sessions in the beginning, and would say goodbye after that only.
    let mut passed = None;
    while passed.replace(proxy.stats()) != Some(proxy.stats()) {
        sleep(Duration::from_millis(250)).await;
    }
    proxy.pause_one_way(Direction::Down);
    let mut done = BTreeSet::new();
    for incoming in &held[..5] {
        settler.ack(incoming.token).await.expect("before the goodbye");
        done.insert(body(incoming));
    }
    let closing = tokio::spawn({
        let bus = Arc::clone(&bus);
        async move { bus.close().await }
    });
    ends(&mut *consumer, ErrorKind::Closed).await;
    for incoming in &held[5..] {
        match settler.ack(incoming.token).await {
            Ok(()) => drop(done.insert(body(incoming))),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Stale, "{error}"),
        }
    }
    proxy.resume();
    closing.await.expect("no panic").expect("closed");
    let bus = broker.connect().await;
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let again: BTreeSet<_> = harness::take(&mut *consumer, 20 - done.len()).await.iter().map(body).collect();
    assert!(done.is_disjoint(&again), "done and delivered again: {:?}", done.intersection(&again).collect::<Vec<_>>());
    harness::nothing(&mut *consumer, Duration::from_millis(300)).await;
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn closing_waits_for_the_copies_of_retries() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("copies");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    send_many(&*bus, &queue, "m", 20).await;
    let held = harness::hold(&mut *consumer, 20).await;
    let settler = consumer.settler();
    let retries: Vec<_> = held.iter().map(|got| settler.retry(got.token, &got.message, 2, Duration::ZERO)).collect();
    bus.close().await.expect("closed");
    for retry in retries {
        timeout(harness::PATIENCE, retry).await.expect("in time").expect("sent, and the original is given up");
    }
    let bus = broker.connect().await;
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let again = harness::take(&mut *consumer, 20).await;
    each_once(again.iter().map(body), "m", 20);
    assert!(again.iter().all(|copy| copy.message.header_attempt() == 2), "copies, not originals");
    harness::nothing(&mut *consumer, Duration::from_millis(300)).await;
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn who_holds_all_that_it_may_hears_of_the_end() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let one = ConsumeOptions { prefetch: 1, ..consume() };
    let (deleted, closed) = (Address::queue("deleted"), Address::queue("closed"));
    let mut waiting = Vec::new();
    for queue in [&deleted, &closed] {
        let mut consumer = bus.consumer(queue, &one).await.expect("consumer");
        send_many(&*bus, queue, "m", 2).await;
        harness::hold(&mut *consumer, 1).await;
        waiting.push(tokio::spawn(async move { consumer.receive(1, &mut Vec::new()).await }));
        tokio::task::yield_now().await;
    }
    bus.delete(&deleted, None).await.expect("deleted");
    bus.close().await.expect("closed");
    for (waiting, kind) in waiting.into_iter().zip([ErrorKind::NotFound, ErrorKind::Closed]) {
        let told = timeout(harness::PATIENCE, waiting).await.expect("it is told").expect("no panic");
        assert_eq!(told.expect_err("it has ended").kind(), kind);
    }
}

/// A process may end after that.
#[tokio::test]
async fn closing_a_consumer_again_waits_until_its_last_acknowledgement_is_read() {
    let broker = Broker::start().await;
    let (proxy, bus) = behind_proxy(&broker).await;
    let queue = Address::queue("last");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    send_many(&*bus, &queue, "m", 1).await;
    let held = harness::one(&mut *consumer).await;
    timeout(harness::PATIENCE, consumer.close()).await.expect("it does not wait for what is held").expect("closed");
    proxy.pause_one_way(Direction::Up);
    consumer.settler().ack(held.token).await.expect("acknowledged");
    let mut closing = consumer.close();
    assert!(timeout(Duration::from_millis(200), &mut closing).await.is_err(), "the broker has not read it");
    proxy.resume();
    timeout(harness::PATIENCE, closing).await.expect("in time").expect("closed");
    let next = broker.connect().await;
    let mut consumer = next.consumer(&queue, &consume()).await.expect("consumer");
    harness::nothing(&mut *consumer, Duration::from_millis(300)).await;
}

#[tokio::test]
async fn every_close_waits_for_the_same_end() {
    let broker = Broker::start().await;
    let (proxy, bus) = behind_proxy(&broker).await;
    let mut consumer = bus.consumer(&Address::queue("same"), &consume()).await.expect("consumer");
    proxy.pause_one_way(Direction::Down);
    let given_up = timeout(Duration::from_millis(200), bus.close()).await;
    assert!(given_up.is_err(), "the broker has not said goodbye");
    ends(&mut *consumer, ErrorKind::Closed).await;
    let (mut second, mut third) = (bus.close(), bus.close());
    assert!(timeout(Duration::from_millis(200), &mut second).await.is_err(), "it waits for what the first has begun");
    assert!(timeout(Duration::from_millis(200), &mut third).await.is_err(), "and so does who closes beside it");
    proxy.resume();
    let closed = async { tokio::join!(second, third) };
    let (second, third) = timeout(harness::PATIENCE, closed).await.expect("in time");
    second.and(third).expect("closed");
    assert_eq!(bus.health().now().state, HealthState::Closed);
    timeout(harness::PATIENCE, bus.close()).await.expect("at once").expect("closed long ago");
}

#[tokio::test]
async fn a_consumer_that_is_made_while_the_connection_closes_ends() {
    let broker = Broker::start().await;
    for yields in 0..20 {
        let bus = broker.connect().await;
        // The first consumer of a connection has more to ask.
        let queue = Address::queue("beside");
        let beside = bus.consumer(&queue, &consume()).await.expect("consumer");
        let closing = async {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            bus.close().await
        };
        let address = if yields % 2 == 0 { queue } else { Address::topic("beside") };
        let options = consume();
        let (made, closed) = tokio::join!(bus.consumer(&address, &options), closing);
        closed.expect("closed");
        if let Ok(mut consumer) = made {
            ends(&mut *consumer, ErrorKind::Closed).await;
        }
        drop(beside);
    }
}

/// The consumer is told so.
async fn ends(consumer: &mut dyn Consumer, kind: ErrorKind) {
    // A look at other sessions that has begun ends first.
    let received = timeout(harness::PATIENCE * 3, consumer.receive(1, &mut Vec::new())).await;
    assert_eq!(received.expect("it is told").expect_err("it has ended").kind(), kind);
}
