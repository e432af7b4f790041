//! How many handlers run at a time, and what is fetched for them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::common::{Log, Order, bus, order};
use polymq_core::{
    Address, Backoff, Batch, ConsumeOptions, ConsumerFactory, ConsumerRunner, DeadLetters, ErrorKind, Failure,
    FailurePolicy, FromDelivery, Message, Result, Route, State, View,
};
use tokio::sync::Semaphore;

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn more_handlers_run_than_are_fetched_ahead_otherwise() {
    const MANY: usize = 300;
    let bus = bus("limits-many").await;
    let (running_now, may_end) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let mut consumers = ConsumerFactory::new(&bus);
    async fn waits(running: State<Arc<AtomicUsize>>, may_end: State<Arc<Semaphore>>) {
        running.fetch_add(1, Ordering::SeqCst);
        let _permit = may_end.acquire().await;
    }
    consumers.state(Arc::clone(&running_now)).state(Arc::clone(&may_end)).route("orders", waits).concurrency(MANY);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("orders");
    let messages = (0..2 * MANY as u64).map(|id| queue.message(&order(id)).expect("encodes"));
    assert!(queue.send_all(messages).await.iter().all(Result::is_ok));
    tokio::time::sleep(60 * SECOND).await;
    assert_eq!(running_now.load(Ordering::SeqCst), MANY);
    may_end.add_permits(2 * MANY);
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn a_prefetch_that_starves_handlers_is_refused() {
    let bus = bus("limits-refused").await;
    let started = async |prefetch| {
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.route("orders", async |_: Order| {}).concurrency(8).prefetch(prefetch);
        ConsumerRunner::new(consumers).start().await
    };
    let error = started(7).await.expect_err("one of them would never run");
    assert_eq!(error.kind(), ErrorKind::Config);
    let text = error.to_string();
    assert!(text.contains("prefetch of 7") && text.contains("concurrency of 8"), "{text}");
    let running = started(8).await.expect("enough");
    running.set_concurrency("orders", 100).expect("no more run, which is logged");
    running.stop().await.expect("stops");
}

/// What a batch is told of one message.
struct Seen(String, u32);

impl FromDelivery for Seen {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(Self(String::from_utf8_lossy(view.message().payload()).into_owned(), view.attempt()))
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_takes_no_more_retries_than_may_run_at_a_time() {
    let bus = bus("limits-batch").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let handled = log.clone();
    let handle = move |batch: Batch<Seen>| {
        let log = handled.clone();
        async move {
            let seen: Vec<_> = batch.iter().map(|Seen(body, attempt)| format!("{body}{attempt}")).collect();
            log.add(seen.join(" "));
            if seen.iter().any(|seen| seen == "slow1") {
                tokio::time::sleep(5 * SECOND).await;
            }
            if seen.iter().any(|seen| seen == "fails1") { Err(Failure::new("once")) } else { Ok(()) }
        }
    };
    let policy =
        FailurePolicy { backoff: Backoff::fixed(SECOND), max_concurrent_retries: Some(1), ..FailurePolicy::default() };
    consumers.route_batch("orders", 10, handle).concurrency(2).policy(policy);
    let queue = bus.queue("orders");
    let send = async |bodies: &[&'static str]| {
        let sent = queue.send_all(bodies.iter().map(|body| Message::new(*body))).await;
        assert!(sent.iter().all(Result::is_ok));
    };
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    send(&["fails", "fails", "fails"]).await;
    log.wait(1).await;
    for calls in [2, 3] {
        send(&["slow"]).await;
        log.wait(calls).await;
    }
    // Waits for one of the two to end, and the three that failed come again behind it.
    send(&["new"]).await;
    let entries = log.wait(7).await;
    running.stop().await.expect("stops");
    assert_eq!(entries, ["fails1 fails1 fails1", "slow1", "slow1", "new1", "fails2", "fails2", "fails2"]);
}

#[tokio::test(start_paused = true)]
async fn what_would_never_handle_anything_is_refused() {
    let bus = bus("limits-nothing").await;
    let refused = async |change: fn(&mut Route)| {
        let mut consumers = ConsumerFactory::new(&bus);
        change(consumers.route("orders", async |_: Order| {}));
        let error = ConsumerRunner::new(consumers).start().await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        error.to_string()
    };
    let text = refused(|route| _ = route.concurrency(0)).await;
    assert!(text.contains("a concurrency of 0"), "{text}");
    let text = refused(|route| _ = route.timeout(Duration::ZERO)).await;
    assert!(text.contains("a timeout of 0"), "{text}");
    let text = refused(|route| _ = route.lease(Duration::ZERO, Duration::ZERO)).await;
    assert!(text.contains("a lease of 0"), "{text}");
    let many = FailurePolicy { max_concurrent_retries: Some(usize::MAX), ..FailurePolicy::default() };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Order| {}).policy(many);
    let error = ConsumerRunner::new(consumers).start().await.expect_err("refused");
    assert!(error.to_string().contains("max_concurrent_retries"), "{error}");
    let to_topic =
        FailurePolicy { dead_letters: DeadLetters::To(Address::topic("failed")), ..FailurePolicy::default() };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Order| {}).policy(to_topic);
    let error = ConsumerRunner::new(consumers).start().await.expect_err("refused");
    assert!(error.to_string().contains("is a topic, which keeps nothing"), "{error}");
    let options = ConsumeOptions { dead_letters: Some(Address::topic("failed")), ..ConsumeOptions::default() };
    let error = bus.queue("orders").subscribe(options).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
}
