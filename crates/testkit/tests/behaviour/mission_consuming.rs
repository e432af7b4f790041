//! Mission rows B2, C5, C6, C13, C17, C22, F21 and F29 where core alone decides; the suite proves them on each backend.

use std::time::Duration;

use futures_util::StreamExt;
use polymq_core::{
    Attempt, ConsumeOptions, ConsumerFactory, ConsumerRunner, ErrorKind, Message, Outcome, RouteStats, State,
};
use polymq_testkit::{TestBus, TestService, eventually};
use tokio::{sync::mpsc, time::Instant};

fn text(delivery: &polymq_core::Delivery) -> String {
    String::from_utf8_lossy(delivery.message().payload()).into_owned()
}

async fn numbers(bus: &TestBus, queue: &str, count: usize) {
    for result in bus.queue(queue).send_all((0..count).map(|n| Message::new(n.to_string()))).await {
        result.expect("sent");
    }
}

/// A channel exists only on a bus; when that is closed, using it is a typed error and no panic.
#[tokio::test]
async fn b2_a_producer_is_ready_or_says_so() {
    let bus = TestBus::new().await;
    let queue = bus.queue("orders");
    queue.send(&1).await.expect("the first send opens it");
    bus.close().await.expect("close");
    assert_eq!(queue.send(&2).await.expect_err("closed").kind(), ErrorKind::Closed);
    assert_eq!(bus.queue("never used").send(&3).await.expect_err("closed").kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn c5_seven_waiting_five_asked_gives_five_then_two_then_none_after_the_wait() {
    let bus = TestBus::new().await;
    numbers(&bus, "orders", 7).await;
    let mut subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let wait = Duration::from_secs(2);
    let first = subscription.receive(5, wait).await.expect("receive");
    let second = subscription.receive(5, wait).await.expect("receive");
    assert_eq!((first.len(), second.len()), (5, 2));
    let asked = Instant::now();
    assert!(subscription.receive(5, wait).await.expect("receive").is_empty());
    assert_eq!(asked.elapsed().as_secs(), 2);
    for delivery in first.into_iter().chain(second) {
        delivery.ack().await.expect("ack");
    }
}

#[tokio::test]
async fn c6_a_stream_goes_on_until_it_is_given_up() {
    let bus = TestBus::new().await;
    numbers(&bus, "orders", 3).await;
    let subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let mut stream = Box::pin(subscription.stream());
    let mut seen = Vec::new();
    for round in 0..3 {
        while seen.len() < 3 * (round + 1) {
            let delivery = stream.next().await.expect("no end").expect("receive");
            seen.push(text(&delivery));
            delivery.ack().await.expect("ack");
        }
        numbers(&bus, "orders", 3).await;
    }
    drop(stream);
    assert_eq!(bus.queue("orders").stats(None).await.expect("stats").ready, 3, "what was not taken is still there");
    bus.close().await.expect("close");
}

#[tokio::test(start_paused = true)]
async fn c13_one_subscription_ends_and_the_other_goes_on() {
    async fn pass(n: u64, seen: State<mpsc::UnboundedSender<u64>>) {
        seen.send(n).expect("the test listens");
    }
    let bus = TestBus::new().await;
    let (sender, mut seen) = mpsc::unbounded_channel();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(sender);
    consumers.route("one", pass);
    consumers.route("two", pass);
    let service = TestService::start(consumers).await.expect("start");
    service.running().detach("one").await.expect("detach");
    bus.queue("one").send(&1_u64).await.expect("sent");
    for n in 2..50_u64 {
        bus.queue("two").send(&n).await.expect("sent");
        assert_eq!(seen.recv().await, Some(n));
    }
    assert!(seen.try_recv().is_err());
    assert_eq!(bus.queue("one").stats(None).await.expect("stats").ready, 1, "it waits for the next consumer");
    service.stop().await.expect("stop");
}

#[tokio::test]
async fn c17_what_the_broker_knows_reaches_the_handler() {
    let bus = TestBus::new().await;
    numbers(&bus, "orders", 1).await;
    let mut subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let first = subscription.next().await.expect("a message");
    assert_eq!((first.attempt(), first.channel()), (1, "orders"));
    assert!(first.details().is_none_or(|details| !details.redelivered));
    first.retry(Duration::ZERO).await.expect("retry");
    let second = subscription.next().await.expect("again");
    assert_eq!(second.attempt(), 2);
    assert!(second.details().is_some_and(|details| details.redelivered), "the broker says that it came before");
    second.ack().await.expect("ack");
}

#[tokio::test]
async fn c22_after_a_close_there_is_no_consumer_and_nothing_unsettled() {
    let bus = TestBus::new().await;
    numbers(&bus, "orders", 5).await;
    let queue = bus.queue("orders");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let held = subscription.receive(3, Duration::from_secs(1)).await.expect("receive");
    let during = queue.stats(None).await.expect("stats");
    assert_eq!((during.consumers, during.unsettled), (1, Some(3)));
    subscription.close().await.expect("close");
    drop((held, subscription));
    let after = queue.stats(None).await.expect("stats");
    assert_eq!((after.ready, after.consumers, after.unsettled), (5, 0, Some(0)));
}

#[tokio::test(start_paused = true)]
async fn f21_a_deferred_message_comes_after_the_others_or_after_its_delay_and_counts_no_attempt() {
    type Seen = mpsc::UnboundedSender<(String, u32, Instant)>;
    async fn defer_once(
        message: Message,
        attempt: Attempt,
        seen: State<Seen>,
        marks: State<std::sync::Mutex<Vec<String>>>,
    ) -> Outcome {
        let body = String::from_utf8_lossy(message.payload()).into_owned();
        seen.send((body.clone(), attempt.0, Instant::now())).expect("the test listens");
        let mut marks = marks.lock().expect("no panic");
        if marks.contains(&body) {
            return Outcome::Ack;
        }
        marks.push(body.clone());
        match body.as_str() {
            "0" => Outcome::defer(Duration::ZERO),
            "1" => Outcome::defer(Duration::from_secs(60)),
            _ => Outcome::Ack,
        }
    }
    let bus = TestBus::new().await;
    numbers(&bus, "orders", 4).await;
    let (sender, mut seen) = mpsc::unbounded_channel();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state::<Seen>(sender).state(std::sync::Mutex::new(Vec::<String>::new()));
    consumers.route("orders", defer_once);
    let began = Instant::now();
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    let mut order = Vec::new();
    for _ in 0..6 {
        order.push(seen.recv().await.expect("six calls"));
    }
    let bodies: Vec<_> = order.iter().map(|(body, ..)| body.as_str()).collect();
    assert_eq!(bodies, ["0", "1", "2", "3", "0", "1"]);
    assert!(order.iter().all(|(_, attempt, _)| *attempt == 1), "{order:?}");
    assert!(order[4].2 - began < Duration::from_secs(60) && order[5].2 - began >= Duration::from_secs(60));
    eventually(Duration::from_secs(5), || async {
        let stats: RouteStats = running.stats("orders").expect("stats");
        if (stats.handled, stats.deferred, stats.failed) == (4, 2, 0) { Ok(()) } else { Err(format!("{stats:?}")) }
    })
    .await;
    running.stop().await.expect("stop");
}

#[tokio::test(start_paused = true)]
async fn f29_a_message_for_later_is_not_before_its_time() {
    let bus = TestBus::new().await;
    let queue = bus.queue("orders");
    let sent = Instant::now();
    queue.send_message(Message::new("late").deliver_in(Duration::from_secs(7200))).await.expect("sent");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let delivery = subscription.next().await.expect("in the end");
    let after = sent.elapsed();
    assert!(after >= Duration::from_secs(7200) && after < Duration::from_secs(7201), "{after:?}");
    delivery.ack().await.expect("ack");
}
