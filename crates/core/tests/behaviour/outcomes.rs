//! What becomes of a message by what its handler did.

use std::time::Duration;

use crate::common::{Log, Order, assert_empty, bus, dead_letter, letters, order};
use polymq_core::{
    AckMode, Answer, Attempt, Backoff, Batch, Body, ConsumeOptions, ConsumerFactory, ConsumerRunner, Context,
    ErrorKind, Failure, FailurePolicy, Message, Outcome, RetryMode, Sends, State, blocking,
    dead_letter::{ATTEMPTS, FIRST_ERROR, LAST_ERROR, REASON, SOURCE},
};
use tokio::time::Instant;

fn fixed(delay: Duration, mode: RetryMode) -> FailurePolicy {
    FailurePolicy { max_attempts: 3, backoff: Backoff::fixed(delay), mode, ..FailurePolicy::default() }
}

#[tokio::test(start_paused = true)]
async fn c2_fails_once_then_succeeds_in_both_modes() {
    for mode in [RetryMode::Redeliver, RetryMode::InPlace] {
        let bus = bus(&format!("c2-{mode:?}")).await;
        let log = Log::default();
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.state(log.clone());
        async fn flaky(order: Order, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
            log.add(format!("{} attempt {}", order.id, attempt.0));
            if attempt.0 == 1 { Err(Failure::new("once")) } else { Ok(()) }
        }
        consumers.route("orders", flaky).policy(fixed(Duration::from_secs(2), mode));
        let running = ConsumerRunner::new(consumers).start().await.expect("starts");
        let started = Instant::now();
        bus.queue("orders").send(&order(1)).await.expect("sent");
        assert_eq!(log.wait(2).await, ["1 attempt 1", "1 attempt 2"]);
        assert!(started.elapsed() >= Duration::from_secs(2), "{mode:?}: not before the backoff");
        running.stop().await.expect("stops");
        assert_empty(&bus, "orders").await;
        let stats = running.stats("orders").expect("known");
        assert_eq!((stats.handled, stats.failed, stats.retried), (1, 1, 1), "{mode:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn c3_d13_each_outcome_is_observed_at_the_broker() {
    let bus = bus("c3").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn decide(order: Order, attempt: Attempt, log: State<Log>) -> Outcome {
        log.add(format!("{} attempt {}", order.id, attempt.0));
        match (order.id, log.entries().len()) {
            (2, _) if attempt.0 == 1 => Outcome::retry_after(Duration::from_secs(60), "busy"),
            (3, _) => Outcome::reject("bad customer"),
            (4, _) => Outcome::drop("of no use"),
            (5, 5) => Outcome::defer(Duration::ZERO),
            _ => Outcome::Ack,
        }
    }
    consumers.route("orders", decide);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("orders");
    for id in 1..=6 {
        queue.send(&order(id)).await.expect("sent");
    }
    let entries = log.wait(8).await;
    let first = ["1 attempt 1", "2 attempt 1", "3 attempt 1", "4 attempt 1", "5 attempt 1", "6 attempt 1"];
    assert_eq!(entries[..6], first);
    assert_eq!(entries[6..], ["5 attempt 1", "2 attempt 2"], "f21: deferred goes behind the others and counts nothing");
    let letter = dead_letter(&bus, "orders").await;
    assert_eq!(letter.message().system_headers().get(REASON), Some("bad customer"));
    letter.ack().await.expect("acked");
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.handled, stats.dropped, stats.dead_lettered, stats.deferred), (4, 1, 1, 1));
}

#[tokio::test(start_paused = true)]
async fn c4_acknowledgement_modes() {
    for (mode, calls) in [(AckMode::AfterSuccess, 3), (AckMode::OnReceipt, 1), (AckMode::Always, 1)] {
        let bus = bus(&format!("c4-{mode:?}")).await;
        let log = Log::default();
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.state(log.clone());
        async fn panics(log: State<Log>) {
            log.add("called");
            panic!("as planned");
        }
        let policy = fixed(Duration::from_secs(1), RetryMode::Redeliver);
        consumers.route("orders", panics).ack_mode(mode).policy(policy);
        let running = ConsumerRunner::new(consumers).start().await.expect("starts");
        bus.queue("orders").send(&order(1)).await.expect("sent");
        log.wait(calls).await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        assert_eq!(log.entries().len(), calls, "{mode:?}");
        running.stop().await.expect("stops");
        assert_empty(&bus, "orders").await;
    }
}

#[tokio::test(start_paused = true)]
async fn c14_c15_panic_and_poison_leave_the_others_alone() {
    let bus = bus("c14").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    async fn handle(order: Order, log: State<Log>) {
        assert!(order.id != 3, "three");
        log.add(order.id.to_string());
    }
    consumers.route("orders", handle).policy(fixed(Duration::from_secs(1), RetryMode::Redeliver));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("orders");
    for id in 1..=3 {
        queue.send(&order(id)).await.expect("sent");
    }
    queue.send_message(Message::new("{half").with_content_type("application/json")).await.expect("sent");
    queue.send_message(Message::new("{\"id\": 9}")).await.expect("sent");
    for id in 4..=5 {
        queue.send(&order(id)).await.expect("sent");
    }
    assert_eq!(log.wait(4).await, ["1", "2", "4", "5"]);
    let mut letters = letters(&bus, "orders").await;
    let reasons = ["undecodable: ", "undecodable: ", "3 attempts failed, the last with: the handler panicked: three"];
    for expected in reasons {
        let letter = letters.next().await.expect("a dead letter");
        let reason = letter.message().system_headers().get(REASON).unwrap_or_default().to_owned();
        assert!(reason.starts_with(expected), "{reason}");
        letter.ack().await.expect("acked");
    }
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.handled, stats.panicked, stats.undecodable), (4, 3, 2), "e6: unlabelled bodies are not guessed");
}

#[tokio::test(start_paused = true)]
async fn f24_the_dead_letter_says_everything_and_keeps_the_original() {
    let bus = bus("f24").await;
    let mut consumers = ConsumerFactory::new(&bus);
    async fn fails(attempt: Attempt) -> Result<(), Failure> {
        Err(Failure::new(format!("error {}", attempt.0)))
    }
    consumers.route("orders", fails).policy(fixed(Duration::from_secs(1), RetryMode::Redeliver));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let sent = Message::new("body").with_id("order-1").with_header("tenant", "acme").with_key("k").with_kind("order");
    bus.queue("orders").send_message(sent.clone()).await.expect("sent");
    let mut letters = letters(&bus, "orders").await;
    let letter = letters.next().await.expect("a dead letter");
    let message = letter.message();
    assert_eq!((message.id(), message.payload(), message.key()), (sent.id(), sent.payload(), Some("k")));
    assert_eq!((message.headers(), message.kind()), (sent.headers(), Some("order")));
    let system = message.system_headers();
    assert_eq!((system.get(ATTEMPTS), system.get(SOURCE)), (Some("3"), Some("queue orders")));
    assert_eq!((system.get(FIRST_ERROR), system.get(LAST_ERROR)), (Some("error 1"), Some("error 3")));
    letter.ack().await.expect("acked");
    assert!(letters.receive(1, Duration::from_secs(60)).await.expect("works").is_empty(), "exactly one");
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn d12_a_handler_replies_through_its_context() {
    let bus = bus("d12").await;
    let mut consumers = ConsumerFactory::new(&bus);
    async fn answer(order: Order, context: Context) -> Result<(), Failure> {
        assert_eq!((context.attempt(), context.channel()), (1, "questions"));
        assert_eq!(context.headers().get("tenant"), Some("acme"));
        assert!(!context.cancelled().is_cancelled());
        context.bus().queue("copies").send(&order).await?;
        context.reply(&order).await?;
        Ok(())
    }
    consumers.route("questions", answer);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("questions");
    let question = queue.message(&order(7)).expect("encodes").with_reply_to("answers").with_correlation_id("c-1");
    queue.send_message(question.with_header("tenant", "acme")).await.expect("sent");
    let mut answers = bus.queue("answers").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let reply = answers.next().await.expect("a reply");
    assert_eq!(reply.message().correlation_id(), Some("c-1"));
    assert_eq!(&reply.message().payload()[..], br#"{"id":7}"#);
    reply.ack().await.expect("acked");
    assert_eq!(bus.queue("copies").stats(None).await.expect("counts").ready, 1, "it sends through the context too");
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn d14_a_handler_that_never_returns_is_cancelled_counted_and_retried() {
    let bus = bus("d14").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    /// Tells that the handler's future was dropped.
    struct Cancelled(Log);
    impl Drop for Cancelled {
        fn drop(&mut self) {
            self.0.add("cancelled");
        }
    }
    async fn hangs(attempt: Attempt, log: State<Log>) {
        log.add(format!("attempt {}", attempt.0));
        if attempt.0 == 1 {
            let _cancelled = Cancelled(Log::clone(&log));
            std::future::pending::<()>().await;
        }
    }
    let policy = fixed(Duration::from_secs(1), RetryMode::Redeliver);
    consumers.route("orders", hangs).timeout(Duration::from_secs(5)).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    assert_eq!(log.wait(3).await, ["attempt 1", "cancelled", "attempt 2"]);
    running.stop().await.expect("stops");
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.timed_out, stats.failed, stats.retried, stats.handled), (1, 1, 1, 1));
}

#[tokio::test]
async fn d17_blocking_handlers_do_not_hold_up_others() {
    let bus = bus("d17").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let (release, gate) = std::sync::mpsc::channel::<()>();
    consumers.state(log.clone());
    consumers.state(std::sync::Mutex::new(gate));
    fn blocks(order: Order, log: State<Log>, gate: State<std::sync::Mutex<std::sync::mpsc::Receiver<()>>>) {
        gate.lock().expect("not poisoned").recv().expect("released");
        log.add(format!("blocked {}", order.id));
    }
    consumers.route("slow", blocking(blocks));
    consumers.route("fast", async |order: Order, log: State<Log>| log.add(format!("fast {}", order.id)));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("slow").send(&order(1)).await.expect("sent");
    bus.queue("fast").send(&order(2)).await.expect("sent");
    assert_eq!(log.wait(1).await, ["fast 2"]);
    release.send(()).expect("waits");
    assert_eq!(log.wait(2).await, ["fast 2", "blocked 1"]);
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn d20_callbacks_tell_errors_apart_and_a_failing_one_harms_nothing() {
    let bus = bus("d20").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    async fn handle(order: Order) -> Result<(), Failure> {
        if order.id == 1 { Err(Failure::permanent("no")) } else { Ok(()) }
    }
    consumers.route("orders", handle);
    let (errors, transport, handled) = (log.clone(), log.clone(), log.clone());
    consumers.on_handler_error(move |event| {
        errors.add(format!("handler error: {}", event.error));
        panic!("a callback's own problem");
    });
    consumers
        .on_transport_error(move |address, error| transport.add(format!("transport {address}: {:?}", error.kind())));
    consumers.on_handled(move |event| handled.add(event.outcome));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    bus.queue("orders").send(&order(2)).await.expect("sent");
    assert_eq!(log.wait(3).await, ["handler error: no", "dead-lettered", "acked"]);
    bus.queue("orders").delete(None).await.expect("deleted");
    let entries = log.wait(4).await;
    assert!(entries[3].starts_with("transport queue orders: "), "{entries:?}");
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn f28_expired_messages_are_counted_and_not_handled() {
    let bus = bus("f28").await;
    let log = Log::default();
    let queue = bus.queue("orders");
    queue.declare(ConsumeOptions::default()).await.expect("declared");
    let short = queue.message(&order(1)).expect("encodes").expires_in(Duration::from_secs(1));
    queue.send_message(short).await.expect("sent");
    let long = queue.message(&order(2)).expect("encodes").expires_in(Duration::from_secs(3600));
    queue.send_message(long).await.expect("sent");
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("orders", async |order: Order, log: State<Log>| log.add(order.id.to_string()));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    assert_eq!(log.wait(1).await, ["2"]);
    let letter = dead_letter(&bus, "orders").await;
    assert_eq!(letter.message().system_headers().get(REASON), Some("expired"));
    letter.ack().await.expect("acked");
    assert_eq!(running.stats("orders").expect("known").expired, 1);
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn batches_are_handled_at_once_and_each_message_is_settled_alone() {
    let bus = bus("batch").await;
    let log = Log::default();
    let queue = bus.queue("orders");
    queue.declare(ConsumeOptions::default()).await.expect("declared");
    for id in 1..=6 {
        queue.send(&order(id)).await.expect("sent");
    }
    queue.send_message(Message::new("{").with_content_type("application/json")).await.expect("sent");
    queue.send(&order(7)).await.expect("sent");
    let mut consumers = ConsumerFactory::new(&bus);
    let seen = log.clone();
    let handle = move |orders: Batch<Order>| {
        let seen = seen.clone();
        async move {
            seen.add(format!("{:?}", orders.iter().map(|order| order.id).collect::<Vec<_>>()));
            let outcome = |order: &Order| if order.id == 3 { Outcome::reject("three") } else { Outcome::Ack };
            orders.iter().map(outcome).collect::<Vec<_>>()
        }
    };
    consumers.route_batch("orders", 4, handle);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    assert_eq!(log.wait(3).await, ["[1, 2, 3, 4]", "[5, 6]", "[7]"]);
    let mut letters = letters(&bus, "orders").await;
    for expected in ["three", "undecodable"] {
        let letter = letters.next().await.expect("a dead letter");
        assert!(letter.message().system_headers().get(REASON).is_some_and(|reason| reason.starts_with(expected)));
        letter.ack().await.expect("acked");
    }
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn a_body_whose_decoding_panics_costs_the_others_of_its_batch_nothing() {
    #[derive(Debug)]
    struct Fragile(u64);
    impl<'de> serde::Deserialize<'de> for Fragile {
        fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
            let Order { id } = Order::deserialize(from)?;
            assert_ne!(id, 3, "for the test");
            Ok(Self(id))
        }
    }
    let bus = bus("batch-panic").await;
    let log = Log::default();
    let queue = bus.queue("orders");
    queue.declare(ConsumeOptions::default()).await.expect("declared");
    for id in 1..=4 {
        queue.send(&order(id)).await.expect("sent");
    }
    let mut consumers = ConsumerFactory::new(&bus);
    let seen = log.clone();
    let handle = move |orders: Batch<Fragile>| {
        seen.add(format!("{:?}", orders.iter().map(|order| order.0).collect::<Vec<_>>()));
        async {}
    };
    let policy = FailurePolicy { max_attempts: 1, ..FailurePolicy::default() };
    consumers.route_batch("orders", 4, handle).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    assert_eq!(log.wait(2).await, ["[1, 2]", "[4]"]);
    let letter = dead_letter(&bus, "orders").await;
    assert_eq!(&letter.message().payload()[..], br#"{"id":3}"#);
    letter.ack().await.expect("acked");
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.handled, stats.panicked, stats.dead_lettered), (3, 1, 1), "{stats:?}");
}

#[tokio::test(start_paused = true)]
async fn f24_the_first_error_is_kept_while_it_is_tried_in_place() {
    let bus = bus("f24-in-place").await;
    let mut consumers = ConsumerFactory::new(&bus);
    let fail = async |attempt: Attempt| Outcome::retry(if attempt.0 == 1 { "no stock" } else { "too late" });
    consumers.route("orders", fail).policy(fixed(Duration::from_secs(1), RetryMode::InPlace));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    let letter = dead_letter(&bus, "orders").await;
    let headers = letter.message().system_headers();
    assert_eq!((headers.get(FIRST_ERROR), headers.get(LAST_ERROR)), (Some("no stock"), Some("too late")));
    letter.ack().await.expect("acked");
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn a_raw_body_needs_no_content_type() {
    let bus = bus("raw").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("raw", async |body: Body, log: State<Log>| log.add(format!("{:?}", &body[..])));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("raw").send_message(Message::new(vec![0xff, 0x00])).await.expect("sent");
    assert_eq!(log.wait(1).await, ["[255, 0]"]);
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn what_panics_where_it_is_encoded_cannot_be_sent() {
    struct Panics;
    impl serde::Serialize for Panics {
        fn serialize<S: serde::Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
            panic!("no such value")
        }
    }
    let bus = bus("encode-panic").await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("answers", async || Answer(Panics));
    consumers.route("sends", async || Sends::new().to("elsewhere", Panics));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for (queue, what) in [("answers", "its answer"), ("sends", "what it sends")] {
        bus.queue(queue).send(&order(1)).await.expect("sent");
        let mut letters = letters(&bus, queue).await;
        let received = letters.receive(1, Duration::from_secs(60)).await.expect("works");
        let reason = received.first().and_then(|letter| letter.message().system_headers().get(REASON));
        let reason = reason.unwrap_or_else(|| panic!("no dead letter of {queue}"));
        assert!(reason.starts_with(what) && reason.ends_with("encoding it panicked: no such value"), "{reason}");
        for letter in received {
            letter.ack().await.expect("acked");
        }
    }
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn an_acknowledged_message_that_failed_counts_as_dropped_and_who_asked_is_told() {
    for mode in [AckMode::OnReceipt, AckMode::Always] {
        let bus = bus(&format!("dropped-{mode:?}")).await;
        let mut consumers = ConsumerFactory::new(&bus);
        async fn fails(_: Order) -> Result<(), Failure> {
            Err(Failure::new("no stock"))
        }
        consumers.route("orders", fails).ack_mode(mode);
        let running = ConsumerRunner::new(consumers).start().await.expect("starts");
        let error = bus.request("orders", &order(1)).await.expect_err("it failed");
        assert_eq!(error.kind(), ErrorKind::Handler, "{mode:?}: {error}");
        assert!(error.to_string().contains("no stock"), "{error}");
        let undecodable = Message::new("{").with_content_type("application/json");
        bus.queue("orders").send_message(undecodable).await.expect("sent");
        tokio::time::sleep(Duration::from_secs(60)).await;
        running.stop().await.expect("stops");
        assert_empty(&bus, "orders").await;
        let stats = running.stats("orders").expect("known");
        let (failed, undecodable) = (stats.failed, stats.undecodable);
        assert_eq!(
            (failed, undecodable, stats.retried, stats.dead_lettered, stats.dropped),
            (1, 1, 0, 0, 2),
            "{mode:?}"
        );
    }
}
