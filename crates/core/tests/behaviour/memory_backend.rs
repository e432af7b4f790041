//! The memory backend through the public interface.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use polymq_core::{
    Address, Backend, Connection, ConsumeOptions, Consumer, ErrorKind, HealthState, Incoming, Message, ProduceOptions,
    Producer, Settings, Start, memory::MemoryBackend,
};
use tokio::time::{Instant, sleep, timeout};

const SECOND: Duration = Duration::from_secs(1);

/// A space that no other test uses.
fn url() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    format!("memory://test-{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

async fn connect(url: &str) -> Arc<dyn Connection> {
    MemoryBackend.connect(&Settings::from_url(url).unwrap()).await.unwrap()
}

fn queue() -> Address {
    Address::queue("q")
}

fn topic() -> Address {
    Address::topic("t")
}

async fn producer(connection: &Arc<dyn Connection>, address: &Address) -> Box<dyn Producer> {
    connection.producer(address, &ProduceOptions::default()).await.unwrap()
}

async fn consumer(connection: &Arc<dyn Connection>, address: &Address) -> Box<dyn Consumer> {
    consumer_with(connection, address, ConsumeOptions::default()).await
}

async fn consumer_with(
    connection: &Arc<dyn Connection>,
    address: &Address,
    options: ConsumeOptions,
) -> Box<dyn Consumer> {
    connection.consumer(address, &options).await.unwrap()
}

fn group(name: &str) -> ConsumeOptions {
    ConsumeOptions { group: Some(name.into()), ..ConsumeOptions::default() }
}

fn message(text: impl ToString) -> Message {
    Message::new(text.to_string())
}

async fn send(producer: &dyn Producer, text: impl ToString) {
    producer.send(message(text)).await.unwrap();
}

async fn send_all(producer: &dyn Producer, numbers: std::ops::Range<u32>) {
    for number in numbers {
        send(producer, number).await;
    }
}

async fn receive(consumer: &mut dyn Consumer, max: usize) -> Vec<Incoming> {
    let mut into = Vec::new();
    timeout(60 * SECOND, consumer.receive(max, &mut into)).await.expect("nothing came").unwrap();
    into
}

async fn receive_one(consumer: &mut dyn Consumer) -> Incoming {
    receive(consumer, 1).await.pop().unwrap()
}

async fn comes_nothing(consumer: &mut dyn Consumer) -> bool {
    let mut into = Vec::new();
    timeout(Duration::from_millis(50), consumer.receive(1, &mut into)).await.is_err() && into.is_empty()
}

fn text(incoming: &Incoming) -> &str {
    std::str::from_utf8(incoming.message.payload()).unwrap()
}

fn texts(incoming: &[Incoming]) -> Vec<&str> {
    incoming.iter().map(text).collect()
}

#[tokio::test(start_paused = true)]
async fn a_message_arrives_as_it_was_sent() {
    let connection = connect(&url()).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    let sent = Message::new(vec![0, 255])
        .with_id("id-1")
        .with_key("k")
        .with_header("h", "v")
        .with_kind("a.b")
        .with_version(2)
        .with_correlation_id("c")
        .with_reply_to("r");
    let receipt = producer.send(sent.clone()).await.unwrap();
    assert_eq!(receipt.id.to_string(), "id-1");
    let came = receive_one(consumer.as_mut()).await;
    assert_eq!(came.message, sent);
    assert!(came.details.is_none(), "nothing is to be told about a first delivery");
    assert_eq!(came.attempt(), 1);
}

#[tokio::test(start_paused = true)]
async fn order_is_kept_across_batches() {
    let connection = connect(&url()).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    let (mut came, mut sent) = (Vec::new(), 0);
    // Batches of every shape: a part, exactly all, more than all; into an empty buffer and behind what it holds.
    for (send, max) in [(50, 7), (0, 43), (20, 1), (0, 100), (3, 3), (2, 9), (40, 40), (64, 64)] {
        send_all(producer.as_ref(), sent..sent + send).await;
        sent += send;
        if max % 2 == 0 {
            came.extend(receive(consumer.as_mut(), max).await);
        } else {
            consumer.receive(max, &mut came).await.unwrap();
        }
    }
    assert_eq!(came.len(), sent as usize);
    let expected: Vec<String> = (0..came.len()).map(|number| number.to_string()).collect();
    assert_eq!(texts(&came), expected);
}

#[tokio::test(start_paused = true)]
async fn connections_of_one_space_share_it_and_others_do_not() {
    let (name, other) = (url(), connect(&url()).await);
    let first = connect(&name).await;
    send(producer(&first, &queue()).await.as_ref(), "kept").await;
    first.close().await.unwrap();
    let second = connect(&name).await;
    let mut consumer_second = consumer(&second, &queue()).await;
    let mut consumer_other = consumer(&other, &queue()).await;
    assert!(comes_nothing(consumer_other.as_mut()).await);
    assert_eq!(text(&receive_one(consumer_second.as_mut()).await), "kept");
}

#[tokio::test(start_paused = true)]
async fn consumers_of_a_queue_compete_fairly() {
    let connection = connect(&url()).await;
    let producer = producer(&connection, &queue()).await;
    let mut tasks = Vec::new();
    for _ in 0..4 {
        let mut consumer = consumer(&connection, &queue()).await;
        tasks.push(tokio::spawn(async move {
            let (settler, mut came) = (consumer.settler(), Vec::new());
            loop {
                let mut batch = Vec::new();
                if timeout(10 * SECOND, consumer.receive(128, &mut batch)).await.is_err() {
                    return came;
                }
                sleep(Duration::from_millis(10)).await;
                for incoming in batch {
                    settler.ack(incoming.token).await.unwrap();
                    came.push(text(&incoming).to_owned());
                }
            }
        }));
    }
    sleep(SECOND).await;
    for start in 0..10 {
        send_all(producer.as_ref(), 100 * start..100 * start + 100).await;
        sleep(SECOND).await;
    }
    let mut all = Vec::new();
    for task in tasks {
        let came = task.await.unwrap();
        assert!(came.len() >= 150, "one consumer got {} of 1000", came.len());
        all.extend(came);
    }
    assert_eq!(all.len(), 1000);
    assert_eq!(all.into_iter().collect::<HashSet<_>>().len(), 1000);
}

#[tokio::test(start_paused = true)]
async fn a_topic_gives_each_message_to_every_group_and_subscription() {
    let connection = connect(&url()).await;
    let producer = producer(&connection, &topic()).await;
    send(producer.as_ref(), "before anyone").await;
    let mut a1 = consumer_with(&connection, &topic(), group("a")).await;
    let mut a2 = consumer_with(&connection, &topic(), group("a")).await;
    let mut alone = consumer(&connection, &topic()).await;
    connection.declare(&topic(), &group("late")).await.unwrap();
    send_all(producer.as_ref(), 0..2).await;
    let mut shared = receive(a1.as_mut(), 1).await;
    shared.extend(receive(a2.as_mut(), 1).await);
    assert_eq!(texts(&shared), ["0", "1"]);
    assert_eq!(texts(&receive(alone.as_mut(), 9).await), ["0", "1"]);
    let mut late = consumer_with(&connection, &topic(), group("late")).await;
    assert_eq!(texts(&receive(late.as_mut(), 9).await), ["0", "1"]);
    assert_eq!(connection.stats(&topic(), Some("a")).await.unwrap().consumers, 2);
    assert_eq!(connection.stats(&topic(), Some("b")).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn a_subscription_without_a_group_ends_with_its_consumer() {
    let connection = connect(&format!("{}?capacity=1", url())).await;
    let producer = producer(&connection, &topic()).await;
    let alone = consumer(&connection, &topic()).await;
    send(producer.as_ref(), 1).await;
    let waits = producer.send(message(2));
    drop(alone);
    waits.await.unwrap();
    assert_eq!(
        connection.stats(&topic(), None).await.unwrap(),
        polymq_core::Stats { ready: 0, unsettled: Some(0), consumers: 0 }
    );
}

#[tokio::test(start_paused = true)]
async fn a_full_group_makes_the_publisher_wait_and_no_group_gets_a_message_twice() {
    let connection = connect(&format!("{}?capacity=2", url())).await;
    let producer = producer(&connection, &topic()).await;
    let mut fast = consumer_with(&connection, &topic(), group("fast")).await;
    let mut slow = consumer_with(&connection, &topic(), group("slow")).await;
    send_all(producer.as_ref(), 0..2).await;
    assert_eq!(receive(fast.as_mut(), 9).await.len(), 2);
    let mut third = producer.send(message(2));
    assert!(third.try_take().is_none());
    assert!(comes_nothing(fast.as_mut()).await);
    assert_eq!(receive(slow.as_mut(), 1).await.len(), 1);
    third.await.unwrap();
    assert_eq!(texts(&receive(fast.as_mut(), 9).await), ["2"]);
    assert_eq!(texts(&receive(slow.as_mut(), 9).await), ["1", "2"]);
}

#[tokio::test(start_paused = true)]
async fn released_messages_come_back_in_their_order_before_the_others() {
    let connection = connect(&url()).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    send_all(producer.as_ref(), 0..6).await;
    let settler = consumer.settler();
    let mut came = receive(consumer.as_mut(), 4).await;
    settler.ack(came.remove(1).token).await.unwrap();
    for incoming in came {
        settler.release(incoming.token, incoming.message);
    }
    let again = receive(consumer.as_mut(), 9).await;
    assert_eq!(texts(&again), ["0", "2", "3", "4", "5"]);
    let attempts: Vec<_> = again.iter().map(|incoming| incoming.attempt()).collect();
    assert_eq!(attempts, [1, 1, 1, 1, 1], "what was released was not tried");
    let redelivered: Vec<_> = again.iter().map(|incoming| incoming.details.is_some()).collect();
    assert_eq!(redelivered, [true, true, true, false, false]);
}

#[tokio::test(start_paused = true)]
async fn a_retry_and_a_deferral_go_behind_the_others() {
    let connection = connect(&url()).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    send_all(producer.as_ref(), 0..4).await;
    let (settler, came) = (consumer.settler(), receive(consumer.as_mut(), 3).await);
    for (incoming, attempt) in came.iter().zip([1, 2, 2]).rev() {
        settler.retry(incoming.token, &incoming.message, attempt, Duration::ZERO).await.unwrap();
    }
    let again = receive(consumer.as_mut(), 9).await;
    assert_eq!(texts(&again), ["3", "2", "1", "0"]);
    assert_eq!(again.iter().map(|incoming| incoming.attempt()).collect::<Vec<_>>(), [1, 2, 2, 1]);
}

#[tokio::test(start_paused = true)]
async fn the_attempt_moves_between_consumers_and_connections() {
    let name = url();
    let connection = connect(&name).await;
    let mut consumer_first = consumer(&connection, &queue()).await;
    send(producer(&connection, &queue()).await.as_ref(), "m").await;
    let came = receive_one(consumer_first.as_mut()).await;
    consumer_first.settler().retry(came.token, &came.message, 5, Duration::ZERO).await.unwrap();
    connection.close().await.unwrap();
    let connection = connect(&name).await;
    let mut consumer_second = consumer(&connection, &queue()).await;
    assert_eq!(receive_one(consumer_second.as_mut()).await.attempt(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_retry_comes_exactly_when_it_is_due() {
    let connection = connect(&url()).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    send_all(producer.as_ref(), 0..3).await;
    let (settler, start) = (consumer.settler(), Instant::now());
    for (incoming, delay) in receive(consumer.as_mut(), 3).await.iter().zip([3, 1, 2]) {
        settler.retry(incoming.token, &incoming.message, 2, delay * SECOND).await.unwrap();
    }
    for (expected, seconds) in [("1", 1), ("2", 2), ("0", 3)] {
        let came = receive_one(consumer.as_mut()).await;
        assert_eq!((text(&came), came.attempt(), start.elapsed()), (expected, 2, seconds * SECOND));
    }
}

#[tokio::test(start_paused = true)]
async fn a_delayed_send_is_delivered_when_it_is_due_and_others_pass_it() {
    let connection = connect(&url()).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    sleep(SECOND).await;
    let (start, real) = (Instant::now(), std::time::Instant::now());
    producer.send(message("late").deliver_in(10 * SECOND)).await.unwrap();
    // A thread that stands still while it reads the clocks takes it for later, by no more than this.
    let tolerance = Duration::from_millis(2) + real.elapsed();
    producer.send(message("past").with_deliver_at(std::time::SystemTime::UNIX_EPOCH)).await.unwrap();
    assert_eq!(text(&receive_one(consumer.as_mut()).await), "past");
    assert_eq!(connection.stats(&queue(), None).await.unwrap().ready, 1);
    let came = receive_one(consumer.as_mut()).await;
    assert_eq!((text(&came), came.attempt(), came.message.deliver_at()), ("late", 1, None));
    let took = start.elapsed();
    assert!(took >= 10 * SECOND - tolerance && took <= 10 * SECOND + tolerance, "came after {took:?}");
}

#[tokio::test(start_paused = true)]
async fn an_earlier_delay_wakes_a_consumer_that_waits_for_a_later_one() {
    let connection = connect(&url()).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    producer.send(message("late").deliver_in(30 * SECOND)).await.unwrap();
    let waiting = tokio::spawn(async move { text(&receive_one(consumer.as_mut()).await).to_owned() });
    sleep(SECOND).await;
    let start = Instant::now();
    producer.send(message("early").deliver_in(SECOND)).await.unwrap();
    assert_eq!(waiting.await.unwrap(), "early");
    assert!(start.elapsed() < 2 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_makes_senders_wait_in_order() {
    let connection = connect(&format!("{}?capacity=2", url())).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    let mut sends: Vec<_> = (0..5).map(|number| producer.send(message(number))).collect();
    let answered: Vec<_> = sends.iter_mut().map(|send| send.try_take().is_some()).collect();
    assert_eq!(answered, [true, true, false, false, false]);
    let mut came = Vec::new();
    for _ in 0..5 {
        came.push(receive_one(consumer.as_mut()).await);
    }
    assert_eq!(texts(&came), ["0", "1", "2", "3", "4"]);
    for send in sends.drain(2..) {
        send.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn bytes_fill_a_queue_too_but_an_empty_one_takes_any_message() {
    let connection = connect(&format!("{}?capacity_bytes=4096", url())).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    let large = || Message::new(vec![0; 10_000]);
    producer.send(large()).await.unwrap();
    let mut second = producer.send(large());
    assert!(second.try_take().is_none());
    receive_one(consumer.as_mut()).await;
    second.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_send_that_waits_can_be_withdrawn() {
    let connection = connect(&format!("{}?capacity=1", url())).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    send(producer.as_ref(), 0).await;
    let (withdrawn, kept) = (producer.send(message(1)), producer.send(message(2)));
    assert!(withdrawn.withdraw());
    assert_eq!(text(&receive_one(consumer.as_mut()).await), "0");
    assert_eq!(text(&receive_one(consumer.as_mut()).await), "2");
    assert!(!kept.withdraw());
    kept.await.unwrap();
    assert!(withdrawn.await.is_err());
}

#[tokio::test(start_paused = true)]
async fn senders_that_wait_are_bounded_and_those_that_gave_up_do_not_count() {
    let connection = connect(&format!("{}?capacity=1", url())).await;
    let producer = producer(&connection, &queue()).await;
    send(producer.as_ref(), 0).await;
    for number in 0..10_000 {
        assert!(producer.send(message(number)).withdraw(), "send {number} was refused");
    }
    let waiting: Vec<_> = (0..2000).map(|number| producer.send(message(number))).collect();
    let mut last = waiting.into_iter().next_back().unwrap();
    assert_eq!(last.try_take().unwrap().unwrap_err().kind(), ErrorKind::Busy);
}

/// Those who gave up all at once are nobody's wait: neither a flush's nor the next sender's.
#[tokio::test(start_paused = true)]
async fn senders_that_gave_up_hold_up_nobody() {
    let connection = connect(&format!("{}?capacity=1", url())).await;
    let producer = producer(&connection, &queue()).await;
    send(producer.as_ref(), 0).await;
    let waiting: Vec<_> = (0..1024).map(|number| producer.send(message(number))).collect();
    assert_eq!(producer.send(message(0)).try_take().unwrap().unwrap_err().kind(), ErrorKind::Busy);
    waiting.into_iter().for_each(|send| assert!(send.withdraw()));
    let mut next = producer.send(message(1));
    assert!(next.try_take().is_none(), "it waits for room");
    assert!(next.withdraw());
    timeout(SECOND, producer.flush()).await.expect("nobody waits").unwrap();
}

#[tokio::test(start_paused = true)]
async fn flush_waits_for_what_was_sent_before() {
    let connection = connect(&format!("{}?capacity=1", url())).await;
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    producer.flush().await.unwrap();
    let sends: Vec<_> = (0..3).map(|number| producer.send(message(number))).collect();
    assert!(timeout(SECOND, producer.flush()).await.is_err());
    let reading = tokio::spawn(async move {
        for _ in 0..3 {
            sleep(SECOND).await;
            receive_one(consumer.as_mut()).await;
        }
        consumer
    });
    producer.close().await.unwrap();
    for send in sends {
        send.await.unwrap();
    }
    assert_eq!(producer.send(message(9)).await.unwrap_err().kind(), ErrorKind::Closed);
    producer.close().await.unwrap();
    reading.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn prefetch_bounds_what_is_not_settled() {
    let connection = connect(&url()).await;
    let options = ConsumeOptions { prefetch: 2, ..ConsumeOptions::default() };
    let (producer, mut consumer) =
        (producer(&connection, &queue()).await, consumer_with(&connection, &queue(), options).await);
    send_all(producer.as_ref(), 0..10).await;
    let came = receive(consumer.as_mut(), 10).await;
    assert_eq!(texts(&came), ["0", "1"]);
    assert!(comes_nothing(consumer.as_mut()).await);
    let stats = connection.stats(&queue(), None).await.unwrap();
    assert_eq!((stats.ready, stats.unsettled, stats.consumers), (8, Some(2), 1));
    let (settler, token) = (consumer.settler(), came[1].token);
    tokio::spawn(async move {
        sleep(SECOND).await;
        settler.ack(token).await.unwrap();
    });
    let start = Instant::now();
    assert_eq!(texts(&receive(consumer.as_mut(), 10).await), ["2"]);
    assert_eq!(start.elapsed(), SECOND);
}

#[tokio::test(start_paused = true)]
async fn prefetch_bounds_bytes_and_one_large_message_passes() {
    let connection = connect(&url()).await;
    let options = ConsumeOptions { prefetch_bytes: 10_000, ..ConsumeOptions::default() };
    let (producer, mut consumer) =
        (producer(&connection, &queue()).await, consumer_with(&connection, &queue(), options).await);
    let settler = consumer.settler();
    for size in [4000, 4000, 4000, 50_000, 10] {
        producer.send(Message::new(vec![0; size])).await.unwrap();
    }
    for expected in [vec![4000, 4000], vec![4000], vec![50_000], vec![10]] {
        let came = receive(consumer.as_mut(), 10).await;
        assert_eq!(came.iter().map(|incoming| incoming.message.payload().len()).collect::<Vec<_>>(), expected);
        if expected != [10] {
            assert!(comes_nothing(consumer.as_mut()).await);
        }
        for incoming in came {
            settler.ack(incoming.token).await.unwrap();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_consumer_without_room_leaves_messages_to_others() {
    let connection = connect(&url()).await;
    let options = ConsumeOptions { prefetch: 1, ..ConsumeOptions::default() };
    let producer = producer(&connection, &queue()).await;
    let mut stuck = consumer_with(&connection, &queue(), options).await;
    let mut other = consumer(&connection, &queue()).await;
    send(producer.as_ref(), 0).await;
    receive_one(stuck.as_mut()).await;
    let waiting = tokio::spawn(async move { stuck.receive(1, &mut Vec::new()).await });
    sleep(SECOND).await;
    send_all(producer.as_ref(), 1..4).await;
    assert_eq!(texts(&receive(other.as_mut(), 9).await), ["1", "2", "3"]);
    waiting.abort();
}

#[tokio::test(start_paused = true)]
async fn a_dropped_receive_loses_neither_message_nor_wake_up() {
    let connection = connect(&url()).await;
    let producer = producer(&connection, &queue()).await;
    let mut first = consumer(&connection, &queue()).await;
    let mut second = consumer(&connection, &queue()).await;
    let mut into = Vec::new();
    let mut dropped = first.receive(1, &mut into);
    assert!(poll_once(&mut dropped).is_none());
    let waiting = tokio::spawn(async move { text(&receive_one(second.as_mut()).await).to_owned() });
    sleep(SECOND).await;
    // Wakes the first, whose receive is then dropped.
    send(producer.as_ref(), "m").await;
    drop(dropped);
    assert_eq!(waiting.await.unwrap(), "m");
    assert!(into.is_empty());
}

/// Polls once, without a task to wake.
fn poll_once<T>(future: &mut std::pin::Pin<Box<dyn Future<Output = T> + Send + '_>>) -> Option<T> {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    match future.as_mut().poll(&mut context) {
        std::task::Poll::Ready(value) => Some(value),
        std::task::Poll::Pending => None,
    }
}

#[tokio::test(start_paused = true)]
async fn deliveries_of_a_closed_consumer_can_be_settled() {
    let connection = connect(&url()).await;
    let (producer, mut first) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    send_all(producer.as_ref(), 0..3).await;
    let (settler, came) = (first.settler(), receive(first.as_mut(), 3).await);
    first.close().await.unwrap();
    first.close().await.unwrap();
    assert_eq!(first.receive(1, &mut Vec::new()).await.unwrap_err().kind(), ErrorKind::Closed);
    drop(first);
    assert_eq!(connection.stats(&queue(), None).await.unwrap().unsettled, Some(3));
    settler.ack(came[0].token).await.unwrap();
    settler.retry(came[1].token, &came[1].message, 2, Duration::ZERO).await.unwrap();
    settler.release(came[2].token, came[2].message.clone());
    let mut second = consumer(&connection, &queue()).await;
    assert_eq!(texts(&receive(second.as_mut(), 9).await), ["2", "1"]);
}

#[tokio::test(start_paused = true)]
async fn closing_a_connection_ends_everything_with_a_typed_error() {
    let name = url();
    let connection = connect(&name).await;
    let health = connection.health();
    assert_eq!(health.now().state, HealthState::Up);
    let (producer, mut reader) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    send_all(producer.as_ref(), 0..2).await;
    let (settler, came) = (reader.settler(), receive(reader.as_mut(), 2).await);
    let blocked = tokio::spawn(async move { reader.receive(1, &mut Vec::new()).await });
    sleep(SECOND).await;
    let (one, two) = tokio::join!(connection.close(), connection.close());
    one.unwrap();
    two.unwrap();
    let closed = |kind| assert_eq!(kind, ErrorKind::Closed);
    closed(blocked.await.unwrap().unwrap_err().kind());
    closed(producer.send(message(9)).await.unwrap_err().kind());
    closed(settler.ack(came[0].token).await.unwrap_err().kind());
    closed(settler.retry(came[0].token, &came[0].message, 2, SECOND).await.unwrap_err().kind());
    closed(connection.ping().await.unwrap_err().kind());
    closed(connection.consumer(&queue(), &ConsumeOptions::default()).await.unwrap_err().kind());
    assert_eq!(health.now().state, HealthState::Closed);
    // What could not be acknowledged is not lost when it is dropped.
    for incoming in came {
        settler.release(incoming.token, incoming.message);
    }
    let connection = connect(&name).await;
    let mut again = consumer(&connection, &queue()).await;
    assert_eq!(texts(&receive(again.as_mut(), 9).await), ["0", "1"]);
}

#[tokio::test(start_paused = true)]
async fn closing_waits_for_senders_but_not_for_ever() {
    let connection = connect(&format!("{}?capacity=1", url())).await;
    let producer = producer(&connection, &queue()).await;
    send(producer.as_ref(), 0).await;
    let waits = producer.send(message(1));
    timeout(60 * SECOND, connection.close()).await.unwrap().unwrap();
    assert_eq!(waits.await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_missing_channel_is_not_found_and_a_deleted_one_unroutable() {
    let connection = connect(&format!("{}?capacity=1", url())).await;
    let (produce, consume) = (
        ProduceOptions { declare: false, ..ProduceOptions::default() },
        ConsumeOptions { declare: false, ..ConsumeOptions::default() },
    );
    for address in [queue(), topic()] {
        assert_eq!(connection.producer(&address, &produce).await.unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(connection.consumer(&address, &consume).await.unwrap_err().kind(), ErrorKind::NotFound);
    }
    assert_eq!(connection.purge(&queue()).await.unwrap_err().kind(), ErrorKind::NotFound);
    connection.delete(&queue(), None).await.unwrap();

    let (producer, mut reader) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    let settler = reader.settler();
    send(producer.as_ref(), 0).await;
    let held = receive_one(reader.as_mut()).await;
    send(producer.as_ref(), 1).await;
    let waits = producer.send(message(2));
    let blocked = tokio::spawn(async move {
        let mut came = Vec::new();
        loop {
            if let Err(error) = reader.receive(1, &mut came).await {
                return error.kind();
            }
        }
    });
    connection.delete(&queue(), None).await.unwrap();
    assert_eq!(waits.await.unwrap_err().kind(), ErrorKind::Unroutable);
    assert_eq!(producer.send(message(3)).await.unwrap_err().kind(), ErrorKind::Unroutable);
    assert_eq!(blocked.await.unwrap(), ErrorKind::NotFound);
    assert_eq!(settler.retry(held.token, &held.message, 2, SECOND).await.unwrap_err().kind(), ErrorKind::Stale);

    let mut again = consumer(&connection, &queue()).await;
    send(producer.as_ref(), 4).await;
    assert_eq!(text(&receive_one(again.as_mut()).await), "4");
}

#[tokio::test(start_paused = true)]
async fn declaring_makes_group_and_dead_letters_and_harms_nothing() {
    let connection = connect(&url()).await;
    let options = ConsumeOptions { dead_letters: Some(topic().dead_letters(Some("g"))), ..group("g") };
    connection.declare(&topic(), &options).await.unwrap();
    send(producer(&connection, &topic()).await.as_ref(), "kept").await;
    connection.declare(&topic(), &options).await.unwrap();
    assert_eq!(connection.stats(&topic(), Some("g")).await.unwrap().ready, 1);
    assert_eq!(connection.stats(&Address::queue("t.g.dlq"), None).await.unwrap().ready, 0);
    connection.delete(&topic(), Some("g")).await.unwrap();
    assert_eq!(connection.stats(&topic(), Some("g")).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test(start_paused = true)]
async fn purging_counts_and_makes_room() {
    let connection = connect(&format!("{}?capacity=3", url())).await;
    let producer = producer(&connection, &queue()).await;
    send_all(producer.as_ref(), 0..2).await;
    producer.send(message(2).deliver_in(SECOND)).await.unwrap();
    let waits = producer.send(message(3));
    assert_eq!(connection.purge(&queue()).await.unwrap(), 3);
    waits.await.unwrap();
    assert_eq!(connection.stats(&queue(), None).await.unwrap().ready, 1);
}

#[tokio::test(start_paused = true)]
async fn what_is_declared_impossible_is_refused() {
    let connection = connect(&format!("{}?max_payload=10", url())).await;
    assert_eq!(connection.capabilities().max_payload, Some(10));
    assert!(!connection.capabilities().replay && !connection.capabilities().leases);
    let replay = ConsumeOptions { start: Start::Earliest, ..group("g") };
    assert_eq!(connection.consumer(&topic(), &replay).await.unwrap_err().kind(), ErrorKind::Unsupported);
    let extra = ConsumeOptions { extra: vec![("qos".into(), "1".into())], ..ConsumeOptions::default() };
    assert_eq!(connection.consumer(&queue(), &extra).await.unwrap_err().kind(), ErrorKind::InvalidInput);
    let (producer, mut consumer) = (producer(&connection, &queue()).await, consumer(&connection, &queue()).await);
    let error = producer.send(Message::new(vec![0; 11])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TooLarge);
    producer.send(Message::new(vec![0; 10])).await.unwrap();
    let came = receive_one(consumer.as_mut()).await;
    let error = consumer.settler().extend(came.token, SECOND).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[tokio::test(start_paused = true)]
async fn repeated_opening_leaves_nothing_behind() {
    let name = url();
    let connection = connect(&name).await;
    for _ in 0..50 {
        let other = connect(&name).await;
        let _producer = producer(&other, &topic()).await;
        let mut alone = consumer(&other, &topic()).await;
        let mut member = consumer_with(&other, &topic(), group("g")).await;
        assert!(poll_once(&mut alone.receive(1, &mut Vec::new())).is_none());
        member.close().await.unwrap();
        other.close().await.unwrap();
    }
    let stats = connection.stats(&topic(), None).await.unwrap();
    assert_eq!((stats.consumers, stats.ready), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_among_many_tasks() {
    let connection = connect(&format!("{}?capacity=50", url())).await;
    let mut senders = tokio::task::JoinSet::new();
    for task in 0..64 {
        let producer = producer(&connection, &queue()).await;
        senders.spawn(async move {
            for number in 0..100 {
                producer.send(message(format!("{task}-{number}"))).await.unwrap();
            }
        });
    }
    let mut readers = tokio::task::JoinSet::new();
    let left = Arc::new(AtomicU32::new(6400));
    for reader in 0..8 {
        let options = ConsumeOptions { prefetch: 1 + 5 * reader, ..ConsumeOptions::default() };
        let (mut consumer, left) = (consumer_with(&connection, &queue(), options).await, Arc::clone(&left));
        let connection = Arc::clone(&connection);
        readers.spawn(async move {
            let (settler, mut came, mut batch) = (consumer.settler(), Vec::new(), Vec::new());
            while consumer.receive(1 + 3 * reader, &mut batch).await.is_ok() {
                for incoming in batch.drain(..) {
                    // Every third first attempt fails in one of two ways.
                    match (incoming.attempt(), text(&incoming).len() % 3, came.len() % 2) {
                        (1, 0, 0) => settler.release(incoming.token, incoming.message),
                        (1, 0, _) => {
                            let delay = Duration::from_millis(1);
                            settler.retry(incoming.token, &incoming.message, 2, delay).await.unwrap();
                        }
                        _ => {
                            settler.ack(incoming.token).await.unwrap();
                            came.push(text(&incoming).to_owned());
                            if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                                connection.close().await.unwrap();
                            }
                        }
                    }
                }
            }
            came
        });
    }
    let all = timeout(30 * SECOND, readers.join_all()).await.expect("messages were lost");
    let all: Vec<String> = all.into_iter().flatten().collect();
    assert_eq!(all.len(), 6400);
    assert_eq!(all.into_iter().collect::<HashSet<_>>().len(), 6400);
    senders.join_all().await;
}
