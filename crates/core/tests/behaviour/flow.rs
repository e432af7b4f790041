//! Concurrency, order, pausing, attaching, stopping and telling about it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::common::{Log, Order, assert_empty, bus, order};
use polymq_core::{
    Attempt, Backoff, Batch, ConsumeOptions, ConsumerFactory, ConsumerRunner, ErrorKind, Failure, FailurePolicy,
    Message, RetryMode, State,
};

#[derive(Default)]
struct Gauge {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Gauge {
    async fn during(&self, time: Duration) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        tokio::time::sleep(time).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test(start_paused = true)]
async fn c7_the_concurrency_limit_is_reached_and_never_exceeded() {
    let bus = bus("c7").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).state(Gauge::default());
    async fn slow(order: Order, gauge: State<Gauge>, log: State<Log>) {
        gauge.during(Duration::from_secs(1)).await;
        log.add(format!("{} most {}", order.id, gauge.most.load(Ordering::SeqCst)));
    }
    consumers.route("orders", slow).concurrency(4).prefetch(16);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("orders");
    let messages = (0..100).map(|id| queue.message(&order(id)).expect("encodes"));
    assert!(queue.send_all(messages).await.iter().all(Result::is_ok));
    log.wait(10).await;
    let stats = queue.stats(None).await.expect("counts");
    assert!(stats.unsettled <= Some(16), "prefetch bounds what is held: {stats:?}");
    let entries = log.wait(100).await;
    assert!(entries.last().is_some_and(|entry| entry.ends_with("most 4")), "{entries:?}");
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn o3_the_limit_is_raised_and_lowered_while_it_runs() {
    let bus = bus("o3").await;
    let log = Log::default();
    let gauge = Arc::new(Gauge::default());
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).state(Arc::clone(&gauge));
    async fn slow(order: Order, gauge: State<Arc<Gauge>>, log: State<Log>) {
        gauge.during(Duration::from_secs(1)).await;
        log.add(order.id.to_string());
    }
    consumers.route("orders", slow);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("orders");
    let messages = (0..60).map(|id| queue.message(&order(id)).expect("encodes"));
    assert!(queue.send_all(messages).await.iter().all(Result::is_ok));
    for (limit, from) in [(1, 0), (6, 5), (1, 30)] {
        log.wait(from).await;
        running.set_concurrency("orders", limit).expect("known");
        // Those that run are not interrupted: the new limit holds once they have ended.
        log.wait(from + 7).await;
        gauge.most.store(0, Ordering::SeqCst);
        log.wait(from + 20).await;
        assert_eq!(gauge.most.load(Ordering::SeqCst), limit);
    }
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn c8_order_by_key_holds_with_concurrency_and_failures() {
    let bus = bus("c8").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn handle(order: Order, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(1..20))).await;
        if attempt.0 == 1 && order.id.is_multiple_of(7) {
            return Err(Failure::new("once"));
        }
        log.add(order.id.to_string());
        Ok(())
    }
    let policy = FailurePolicy { backoff: Backoff::fixed(Duration::from_millis(50)), ..FailurePolicy::default() };
    consumers.route("orders", handle).concurrency(8).ordered_by_key().policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("orders");
    let keyed = |id: u64| queue.message(&order(id)).expect("encodes").with_key((id % 10).to_string());
    assert!(queue.send_all((0..1000).map(keyed)).await.iter().all(Result::is_ok));
    let entries = log.wait(1000).await;
    for key in 0..10 {
        let ids: Vec<u64> =
            entries.iter().map(|id| id.parse().expect("a number")).filter(|id| id % 10 == key).collect();
        let expected: Vec<u64> = (0..1000).filter(|id| id % 10 == key).collect();
        assert_eq!(ids, expected, "key {key}");
    }
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn f22_the_limit_of_concurrent_retries_is_respected() {
    let bus = bus("f22").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).state(Gauge::default());
    async fn handle(attempt: Attempt, gauge: State<Gauge>, log: State<Log>) -> Result<(), Failure> {
        if attempt.0 == 1 {
            return Err(Failure::new("once"));
        }
        gauge.during(Duration::from_millis(100)).await;
        log.add(format!("most {}", gauge.most.load(Ordering::SeqCst)));
        Ok(())
    }
    let policy = FailurePolicy {
        backoff: Backoff::fixed(Duration::from_millis(10)),
        max_concurrent_retries: Some(2),
        ..FailurePolicy::default()
    };
    consumers.route("orders", handle).concurrency(10).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for id in 0..20 {
        bus.queue("orders").send(&order(id)).await.expect("sent");
    }
    assert!(log.wait(20).await.iter().all(|entry| entry == "most 1" || entry == "most 2"));
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn f27_repeated_failure_pauses_a_channel_until_it_is_resumed() {
    let bus = bus("f27").await;
    let log = Log::default();
    let broken = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).state(Arc::clone(&broken));
    async fn handle(
        order: Order,
        broken: State<Arc<std::sync::atomic::AtomicBool>>,
        log: State<Log>,
    ) -> Result<(), Failure> {
        if broken.load(Ordering::SeqCst) {
            return Err(Failure::new("database is down"));
        }
        log.add(order.id.to_string());
        Ok(())
    }
    let policy = FailurePolicy {
        max_attempts: 100,
        mode: RetryMode::InPlace,
        backoff: Backoff::fixed(Duration::from_millis(10)),
        pause_after_failures: Some(3),
        ..FailurePolicy::default()
    };
    consumers.route("orders", handle).policy(policy);
    consumers.route("others", async |order: Order, log: State<Log>| log.add(format!("other {}", order.id)));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for id in 1..=3 {
        bus.queue("orders").send(&order(id)).await.expect("sent");
    }
    tokio::time::sleep(Duration::from_secs(5)).await;
    let stats = running.stats("orders").expect("known");
    assert!(stats.paused && stats.failed == 3, "{stats:?}");
    bus.queue("others").send(&order(9)).await.expect("sent");
    assert_eq!(log.wait(1).await, ["other 9"]);
    broken.store(false, Ordering::SeqCst);
    running.resume("orders").expect("known");
    assert_eq!(log.wait(4).await, ["other 9", "1", "2", "3"], "goes on with the same message");
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn o7_a_stuck_handler_beside_one_of_many_holds_up_nothing() {
    let bus = bus("o7-batch").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn single(order: Order, log: State<Log>) {
        if order.id == 1 {
            std::future::pending::<()>().await;
        }
        log.add(order.id.to_string());
    }
    consumers.route_batch("orders", 100, async |_: Batch<Order>| {}).kind("many").concurrency(4);
    consumers.route("orders", single).kind("single");
    for id in 1..=20 {
        let body = serde_json::to_vec(&order(id)).expect("JSON");
        let message = Message::new(body).with_content_type("application/json").with_kind("single");
        bus.queue("orders").send_message(message).await.expect("sent");
    }
    let runner = ConsumerRunner::new(consumers).drain_timeout(Duration::from_secs(1));
    let running = runner.start().await.expect("starts");
    let mut done = log.wait(19).await;
    done.sort_by_key(|id| id.parse::<u64>().expect("a number"));
    assert_eq!(done, (2..=20).map(|id| id.to_string()).collect::<Vec<_>>());
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn d19_handlers_are_attached_and_detached_while_it_runs() {
    let bus = bus("d19").await;
    let log = Log::default();
    let factory = |queue: &str| {
        let mut consumers = ConsumerFactory::new(&bus);
        let name = queue.to_owned();
        consumers.state(log.clone());
        consumers.route(queue, move |order: Order, log: State<Log>| {
            let entry = format!("{name} {}", order.id);
            async move { log.add(entry) }
        });
        consumers
    };
    let running = ConsumerRunner::new(factory("a")).start().await.expect("starts");
    running.attach(factory("b")).await.expect("attaches");
    assert_eq!(running.attach(factory("b")).await.expect_err("twice").kind(), ErrorKind::Conflict);
    running.detach("a").await.expect("detaches");
    let unknown = running.detach("a").await.expect_err("gone").to_string();
    assert!(unknown.contains("it consumes: b"), "{unknown}");
    bus.queue("a").send(&order(1)).await.expect("sent");
    bus.queue("b").send(&order(2)).await.expect("sent");
    assert_eq!(log.wait(1).await, ["b 2"]);
    running.attach(factory("a")).await.expect("attaches");
    assert_eq!(log.wait(2).await, ["b 2", "a 1"], "nothing was lost meanwhile");
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn j12_stopping_drains_within_the_deadline_and_returns_the_rest() {
    let bus = bus("j12").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn handle(order: Order, log: State<Log>) {
        log.add(format!("start {}", order.id));
        tokio::time::sleep(Duration::from_secs(if order.id < 5 { 5 } else { 3600 })).await;
        log.add(format!("end {}", order.id));
    }
    consumers.route("orders", handle).concurrency(10);
    let runner = ConsumerRunner::new(consumers).drain_timeout(Duration::from_secs(20));
    let running = runner.start().await.expect("starts");
    for id in 0..15 {
        bus.queue("orders").send(&order(id)).await.expect("sent");
    }
    log.wait(10).await;
    let stopping = tokio::time::Instant::now();
    running.stop().await.expect("stops");
    assert!(stopping.elapsed() < Duration::from_secs(26));
    assert_eq!(log.entries().iter().filter(|entry| entry.starts_with("end")).count(), 5);
    let stats = bus.queue("orders").stats(None).await.expect("counts");
    assert_eq!((stats.ready, stats.unsettled, stats.consumers), (10, Some(0), 0));
    assert_eq!(running.stats("orders").expect("known").failed, 0, "a cancelled handler has not failed");
    let mut again = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    for delivery in again.receive(15, Duration::from_secs(1)).await.expect("works") {
        assert_eq!(delivery.attempt(), 1, "and no attempt was counted");
        delivery.ack().await.expect("acked");
    }
}

#[tokio::test(start_paused = true)]
async fn l2_a_second_stop_forces() {
    let bus = bus("l2").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn hangs(log: State<Log>) {
        log.add("started");
        std::future::pending::<()>().await;
    }
    consumers.route("orders", hangs);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    log.wait(1).await;
    let started = tokio::time::Instant::now();
    running.force();
    running.stop().await.expect("stops");
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!(bus.queue("orders").stats(None).await.expect("counts").ready, 1);
}

#[tokio::test]
async fn nothing_to_run_is_one_clear_sentence() {
    let bus = bus("nothing").await;
    let error = ConsumerRunner::new(ConsumerFactory::new(&bus)).start().await.expect_err("refused");
    assert_eq!(
        error.to_string(),
        "start: there is no handler to run; mark a function with #[consumer(\"queue\")] or call ConsumerFactory::route"
    );
}

#[cfg(feature = "ops")]
#[tokio::test]
async fn j13_health_readiness_and_metrics_over_http() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn get(address: &str, path: &str) -> String {
        let mut stream = tokio::net::TcpStream::connect(address).await.expect("served");
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("written");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("read");
        answer
    }

    let bus = bus("j13").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("orders", async |order: Order, log: State<Log>| log.add(order.id.to_string()));
    let mut more = ConsumerFactory::new(&bus);
    more.route("others", async |_: Order| ());
    // Two factories on one bus are one connection.
    let running = ConsumerRunner::new(consumers).and(more).bind("127.0.0.1:0").start().await.expect("starts");
    let address = running.bound().expect("served").to_string();
    bus.queue("orders").send(&order(1)).await.expect("sent");
    bus.queue("orders")
        .send_message(polymq_core::Message::new("x").with_header("no\nheader", "x"))
        .await
        .expect_err("refused");
    bus.queue("two\nlines").send(&order(1)).await.expect_err("refused");
    log.wait(1).await;
    let ready = get(&address, "/ready").await;
    assert!(ready.starts_with("HTTP/1.1 200") && ready.contains("\"state\":\"up\""), "{ready}");
    let metrics = get(&address, "/metrics").await;
    assert!(metrics.contains("polymq_handled_total{subscription=\"orders\"} 1"), "{metrics}");
    let to = "{backend=\"memory\",kind=\"queue\",channel=\"orders\"}";
    for line in ["sent_total{} 1", "send_failed_total{} 1", "send_unknown_total{} 0"] {
        let line = format!("\npolymq_{}\n", line.replace("{}", to));
        assert_eq!(metrics.matches(&line).count(), 1, "{line} in {metrics}");
    }
    let refused = "\npolymq_send_failed_total{backend=\"memory\",kind=\"queue\",channel=\"polymq-others\"} 1\n";
    assert!(metrics.contains(refused) && !metrics.contains("lines"), "{metrics}");
    assert!(ready.contains("\"queue orders\":{\"accepted\":1,\"failed\":1,\"unknown\":0}"), "{ready}");
    bus.close().await.expect("closes");
    let ready = get(&address, "/ready").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("\"state\":\"closed\""), "{ready}");
    running.stop().await.ok();
}
