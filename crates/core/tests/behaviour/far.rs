//! Durations that no clock can add to the present: they mean "for ever", and nothing breaks.

use std::time::{Duration, SystemTime};

use crate::common::{Log, Order, bus, order};
use polymq_core::{
    Backoff, ConsumeOptions, ConsumerFactory, ConsumerRunner, Failure, FailurePolicy, Message, Outcome, State, now,
};

const FOR_EVER: Duration = Duration::MAX;

/// What a handler that parks its message for ever may return.
fn parked(how: &str) -> Result<Outcome, Failure> {
    match how {
        "retry" => Ok(Outcome::retry_after(FOR_EVER, "parked")),
        "defer" => Ok(Outcome::defer(FOR_EVER)),
        _ => Err(Failure::new("parked").retry_after(Duration::from_secs(u64::MAX))),
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_that_is_parked_for_ever_holds_up_no_other() {
    for how in ["retry", "defer", "failure"] {
        let bus = bus(&format!("far-{how}")).await;
        let log = Log::default();
        let mut consumers = ConsumerFactory::new(&bus);
        let handle = move |order: Order, log: State<Log>| async move {
            log.add(order.id.to_string());
            if order.id == 1 { parked(how) } else { Ok(Outcome::Ack) }
        };
        consumers.state(log.clone()).route("orders", handle);
        let running = ConsumerRunner::new(consumers).start().await.expect("starts");
        for id in [1, 2] {
            bus.queue("orders").send(&order(id)).await.expect("sent");
        }
        assert_eq!(log.wait(2).await, ["1", "2"], "{how}");
        running.stop().await.expect("stops");
        let stats = running.stats("orders").expect("known");
        assert_eq!((stats.handled, stats.retried + stats.deferred), (1, 1), "{how}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_delivery_is_retried_and_put_off_for_ever() {
    let bus = bus("far-delivery").await;
    let queue = bus.queue("orders");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    queue.send(&order(1)).await.expect("sent");
    subscription.next().await.expect("a delivery").retry(FOR_EVER).await.expect("retried");
    queue.send(&order(2)).await.expect("sent");
    subscription.next().await.expect("a delivery").defer(FOR_EVER).await.expect("deferred");
    let nothing = subscription.receive(1, Duration::from_secs(3600)).await.expect("works");
    assert!(nothing.is_empty(), "not before its time");
}

#[tokio::test(start_paused = true)]
async fn a_message_is_made_that_expires_or_comes_never() {
    let bus = bus("far-message").await;
    let queue = bus.queue("orders");
    let year = now() + Duration::from_secs(365 * 24 * 3600);
    let lasts = Message::new("lasts").expires_in(FOR_EVER);
    assert!(lasts.expires_at().is_some_and(|at| at > year), "{:?}", lasts.expires_at());
    let late = Message::new("late").deliver_in(FOR_EVER);
    assert!(late.deliver_at().is_some_and(|at| at > year), "{:?}", late.deliver_at());
    let last = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(i64::MAX.unsigned_abs()));
    let later = Message::new("later").with_deliver_at(last.expect("the last second of this clock"));
    for message in [late, later, lasts] {
        queue.send_message(message).await.expect("sent");
    }
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let come = subscription.receive(3, Duration::from_secs(3600)).await.expect("works");
    let bodies: Vec<_> = come.iter().map(|delivery| delivery.message().payload().clone()).collect();
    assert_eq!(bodies, ["lasts"]);
}

#[tokio::test(start_paused = true)]
async fn a_service_without_a_limit_for_draining_stops_and_detaches() {
    let bus = bus("far-drain").await;
    let log = Log::default();
    async fn slow(order: Order, log: State<Log>) {
        log.add(format!("{} begun", order.id));
        tokio::time::sleep(Duration::from_secs(600)).await;
        log.add(format!("{} ended", order.id));
    }
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route("orders", slow);
    consumers.route("refunds", slow);
    let running = ConsumerRunner::new(consumers).drain_timeout(FOR_EVER).start().await.expect("starts");
    for (at, queue) in ["orders", "refunds"].into_iter().enumerate() {
        bus.queue(queue).send(&order(at as u64)).await.expect("sent");
    }
    log.wait(2).await;
    running.detach("orders").await.expect("detached");
    running.stop().await.expect("stopped");
    assert_eq!(log.entries().iter().filter(|entry| entry.ends_with("ended")).count(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_backoff_without_a_limit_parks_the_message() {
    let bus = bus("far-backoff").await;
    let log = Log::default();
    async fn fails(order: Order, log: State<Log>) -> Result<(), Failure> {
        log.add(order.id.to_string());
        if order.id == 1 { Err(Failure::new("parked")) } else { Ok(()) }
    }
    let mut consumers = ConsumerFactory::new(&bus);
    let policy = FailurePolicy { backoff: Backoff::fixed(FOR_EVER), ..FailurePolicy::default() };
    consumers.state(log.clone()).route("orders", fails).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for id in [1, 2] {
        bus.queue("orders").send(&order(id)).await.expect("sent");
    }
    assert_eq!(log.wait(2).await, ["1", "2"]);
    running.stop().await.expect("stops");
}
