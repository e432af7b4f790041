//! Attempts that are made in place: what a stop and a pause leave behind, batches, and the limit of retries.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::common::{Log, Order, assert_empty, bus, order};
use polymq_core::{
    Attempt, Backoff, Batch, Bus, ConsumeOptions, ConsumerFactory, ConsumerRunner, Failure, FailurePolicy, Outcome,
    RetryMode, Running, State,
};

fn in_place(delay: Duration) -> FailurePolicy {
    FailurePolicy { backoff: Backoff::fixed(delay), mode: RetryMode::InPlace, ..FailurePolicy::default() }
}

/// Three messages wait, and a handler of three at once fails with the first of them, the first time.
async fn batch_of_three(bus: &Bus, log: &Log, policy: FailurePolicy) -> Running {
    let queue = bus.queue("orders");
    queue.declare(ConsumeOptions::default()).await.expect("declared");
    for id in 1..=3 {
        queue.send(&order(id)).await.expect("sent");
    }
    let (seen, calls) = (log.clone(), Arc::new(AtomicUsize::new(0)));
    let handle = move |orders: Batch<Order>| {
        let (seen, first) = (seen.clone(), calls.fetch_add(1, Ordering::SeqCst) == 0);
        async move {
            seen.add(format!("{:?}", orders.iter().map(|order| order.id).collect::<Vec<_>>()));
            let outcome = |order: &Order| if first && order.id == 1 { Outcome::retry("not yet") } else { Outcome::Ack };
            orders.iter().map(outcome).collect::<Vec<_>>()
        }
    };
    let mut consumers = ConsumerFactory::new(bus);
    consumers.route_batch("orders", 3, handle).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    assert_eq!(log.wait(1).await, ["[1, 2, 3]"]);
    running
}

#[tokio::test(start_paused = true)]
async fn a_stop_while_one_of_a_batch_waits_in_place_loses_nothing() {
    let bus = bus("in-place-stop").await;
    let log = Log::default();
    let running = batch_of_three(&bus, &log, in_place(Duration::from_secs(60))).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    running.stop().await.expect("stops");
    let mut left = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let mut ids = Vec::new();
    for delivery in left.receive(10, Duration::from_secs(1)).await.expect("works") {
        ids.push(String::from_utf8_lossy(delivery.message().payload()).into_owned());
        delivery.ack().await.expect("acked");
    }
    assert_eq!(ids, [r#"{"id":1}"#, r#"{"id":2}"#, r#"{"id":3}"#], "none was acknowledged for another");
}

#[tokio::test(start_paused = true)]
async fn a_pause_while_one_of_a_batch_waits_in_place_loses_nothing() {
    let bus = bus("in-place-pause").await;
    let log = Log::default();
    let policy = FailurePolicy { pause_after_failures: Some(1), ..in_place(Duration::from_millis(10)) };
    let running = batch_of_three(&bus, &log, policy).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.paused, stats.handled), (true, 0), "nothing is settled while it is paused");
    running.resume("orders").expect("known");
    assert_eq!(log.wait(2).await, ["[1, 2, 3]", "[1, 2, 3]"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
    assert_eq!(running.stats("orders").expect("known").handled, 3);
}

#[tokio::test(start_paused = true)]
async fn a_pause_with_a_limit_of_retries_goes_on_after_it() {
    let bus = bus("in-place-limit").await;
    let log = Log::default();
    let policy = FailurePolicy { max_concurrent_retries: Some(1), ..in_place(Duration::from_secs(1)) };
    let running = batch_of_three(&bus, &log, policy).await;
    running.pause("orders").expect("known");
    tokio::time::sleep(Duration::from_secs(5)).await;
    running.resume("orders").expect("known");
    // The one that is tried again is one of the limited number, by itself.
    assert_eq!(log.wait(3).await, ["[1, 2, 3]", "[1]", "[2, 3]"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn a_retry_does_not_wait_for_its_own_place() {
    let bus = bus("in-place-own").await;
    let log = Log::default();
    let queue = bus.queue("orders");
    let mut before = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    queue.send(&order(1)).await.expect("sent");
    before.next().await.expect("a delivery").retry(Duration::ZERO).await.expect("returned");
    before.close().await.expect("closes");

    async fn handle(attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(format!("attempt {}", attempt.0));
        if attempt.0 < 4 { Err(Failure::new("not yet")) } else { Ok(()) }
    }
    let mut consumers = ConsumerFactory::new(&bus);
    let policy = FailurePolicy { max_concurrent_retries: Some(1), ..in_place(Duration::from_secs(1)) };
    consumers.state(log.clone()).route("orders", handle).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    assert_eq!(log.wait(3).await, ["attempt 2", "attempt 3", "attempt 4"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn order_by_key_holds_over_a_pause() {
    let bus = bus("in-place-order").await;
    let log = Log::default();
    async fn handle(order: Order, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(format!("{} attempt {}", order.id, attempt.0));
        if order.id == 1 && attempt.0 == 1 { Err(Failure::new("not yet")) } else { Ok(()) }
    }
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).route("orders", handle);
    route.concurrency(4).ordered_by_key().policy(in_place(Duration::from_secs(1)));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("orders");
    for id in 1..=3 {
        queue.send_message(queue.message(&order(id)).expect("encodes").with_key("k")).await.expect("sent");
    }
    log.wait(1).await;
    running.pause("orders").expect("known");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(log.entries(), ["1 attempt 1"], "nothing starts while it is paused");
    running.resume("orders").expect("known");
    assert_eq!(log.wait(4).await, ["1 attempt 1", "1 attempt 2", "2 attempt 1", "3 attempt 1"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn attempts_in_place_count_when_more_handlers_may_run() {
    for limit in [None, Some(1)] {
        let bus = bus(&format!("in-place-raised-{limit:?}")).await;
        let log = Log::default();
        async fn handle(order: Order, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
            log.add(format!("{} attempt {}", order.id, attempt.0));
            if order.id == 1 && attempt.0 < 4 { Err(Failure::new("not yet")) } else { Ok(()) }
        }
        let mut consumers = ConsumerFactory::new(&bus);
        let policy = FailurePolicy { max_concurrent_retries: limit, ..in_place(Duration::from_secs(1)) };
        consumers.state(log.clone()).route("orders", handle).ordered_by_key().policy(policy);
        let queue = bus.queue("orders");
        queue.declare(ConsumeOptions::default()).await.expect("declared");
        for id in 1..=2 {
            queue.send_message(queue.message(&order(id)).expect("encodes").with_key("k")).await.expect("sent");
        }
        let running = ConsumerRunner::new(consumers).start().await.expect("starts");
        log.wait(2).await;
        running.pause("orders").expect("known");
        tokio::time::sleep(Duration::from_secs(5)).await;
        running.set_concurrency("orders", 2).expect("known");
        running.resume("orders").expect("known");
        let expected = ["1 attempt 1", "1 attempt 2", "1 attempt 3", "1 attempt 4", "2 attempt 1"];
        assert_eq!(log.wait(5).await, expected, "limit {limit:?}");
        running.stop().await.expect("stops");
        assert_empty(&bus, "orders").await;
    }
}
