//! Stopping that is given up, done twice or by somebody else.

use std::time::Duration;

use crate::common::{Log, Order, assert_empty, bus, order};
use polymq_core::{AckMode, Bus, ConsumerFactory, ConsumerRunner, Running, Sends, State};
use tokio::time::{Instant, timeout};

const SECOND: Duration = Duration::from_secs(1);

/// A handler that takes ten seconds has begun.
async fn begun(bus: &Bus, log: &Log) -> Running {
    async fn slow(log: State<Log>) {
        log.add("begun");
        tokio::time::sleep(10 * SECOND).await;
        log.add("ended");
    }
    let mut consumers = ConsumerFactory::new(bus);
    consumers.state(log.clone()).route("orders", slow);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    log.wait(1).await;
    running
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_was_given_up_is_waited_for_by_the_next() {
    let bus = bus("stop-twice").await;
    let log = Log::default();
    let running = begun(&bus, &log).await;
    timeout(SECOND, running.stop()).await.expect_err("the handler runs");
    running.stop().await.expect("stops");
    assert_eq!(log.entries(), ["begun", "ended"], "stopped while the handler still ran");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_nobody_polls_holds_up_no_other() {
    let bus = bus("stop-unpolled").await;
    let log = Log::default();
    let running = begun(&bus, &log).await;
    let first = running.stop();
    tokio::pin!(first);
    timeout(SECOND, &mut first).await.expect_err("the handler runs");
    timeout(60 * SECOND, running.stop()).await.expect("the second ends by itself").expect("stops");
    first.await.expect("and so does the first");
}

#[tokio::test(start_paused = true)]
async fn a_detach_that_was_given_up_is_waited_for_by_the_next() {
    let bus = bus("detach-twice").await;
    let log = Log::default();
    let running = begun(&bus, &log).await;
    timeout(SECOND, running.detach("orders")).await.expect_err("the handler runs");
    running.detach("orders").await.expect("still known, and stops");
    assert_eq!(log.entries(), ["begun", "ended"], "detached while the handler still ran");
    assert!(running.stats("orders").is_err(), "it is gone");
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_signal_learns_that_somebody_else_has_stopped_it() {
    let bus = bus("stop-elsewhere").await;
    let log = Log::default();
    let running = begun(&bus, &log).await;
    let waiting = tokio::spawn(running.clone().until_signal());
    tokio::time::sleep(SECOND).await;
    let stopping = Instant::now();
    running.stop().await.expect("stops");
    timeout(SECOND, waiting)
        .await
        .expect("it does not wait for a signal any more")
        .expect("no panic")
        .expect("stopped");
    assert!(stopping.elapsed() < 15 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn what_was_acknowledged_on_receipt_does_not_come_again_when_its_sends_are_cut_off() {
    let bus = bus("stop-sends?capacity=1").await;
    bus.queue("full").send(&order(0)).await.expect("there is room for one");
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn sends(order: Order, log: State<Log>) -> Sends {
        log.add("handled");
        Sends::new().to("full", order)
    }
    consumers.route("orders", sends).ack_mode(AckMode::OnReceipt);
    let running = ConsumerRunner::new(consumers).drain_timeout(SECOND).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    log.wait(1).await;
    // The handler has ended; what it sends waits for room, beyond the drain time-out.
    running.detach("orders").await.expect("detached");
    assert_empty(&bus, "orders").await;
}
