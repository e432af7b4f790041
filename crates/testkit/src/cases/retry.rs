//! R1, R2, R7, R9, R10: retries through the runner. What R9 kills is with the faults.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Attempt, Backoff, Completion, ConsumerFactory, DeliveryCount, Failure, FailurePolicy, Jitter, Message, RetryMode,
    State, Support, Token,
};

use crate::{
    Case, Cx, PATIENCE,
    case::run,
    cx::lock,
    drive::{
        Log, bodies, closes, counted, counted_within, counts, dead_letters, in_order, next, publish, quiet,
        retry_every, start, subscribe, take_acked,
    },
    twist::{Receiving, Twist, Twisted},
};

pub(super) const CASES: &[Case] = &[
    Case::new("R1_schedule", run!(schedule)).when(
        "delayed_retry",
        |c| c.delayed_retry.support.is_available(),
        run!(refused_at_start),
    ),
    Case::new("R1_jitter", run!(jitter)).when(
        "delayed_retry",
        |c| c.delayed_retry.support.is_available(),
        run!(refused_at_start),
    ),
    Case::new("R1_in_place_schedule", run!(in_place_schedule)),
    Case::new("R2_permanent_goes_at_once", run!(permanent_goes_at_once)),
    Case::new("R7_retries_do_not_block", run!(retries_do_not_block)).when(
        "delayed_retry",
        |c| c.delayed_retry.support.is_available(),
        run!(refused_at_start),
    ),
    Case::new("R7_in_place_blocks_the_key", run!(in_place_blocks_the_key)).when(
        "order",
        |c| c.order != polymq_core::Order::None,
        run!(super::order::order_refused),
    ),
    Case::new("R9_restart_in_backoff", run!(restart_in_backoff)).when(
        "delayed_retry",
        |c| c.delayed_retry.support.is_available(),
        run!(refused_at_start),
    ),
    Case::new("R10_finished_handlers_rest", run!(finished_handlers_rest)),
];

/// How much later than planned a retry may come on a busy machine.
const TOLERANCE: Duration = Duration::from_secs(30);

async fn fail(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
    log.add(&message, attempt.0);
    Err(Failure::new(format!("attempt {} failed", attempt.0)))
}

/// Without delayed retries, a policy that needs them is refused at start, with what to do instead.
pub async fn refused_at_start(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Log::default()).route(queue.address().name(), fail);
    let error = consumers.check().expect_err("a backoff that the backend cannot do");
    assert_eq!(error.kind(), polymq_core::ErrorKind::Unsupported, "{error}");
    assert!(error.hint().is_some(), "{error}");
}

async fn follows_schedule(cx: &Cx, mode: RetryMode) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(1)).await;
    let log = Log::default();
    let backoff =
        Backoff { initial: Duration::from_millis(300), factor: 2.0, max: Duration::from_secs(1), jitter: Jitter::None };
    let policy = FailurePolicy { max_attempts: 5, backoff, mode, ..FailurePolicy::default() };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), fail).policy(policy);
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "dead_lettered", 1).await;
    running.stop().await.expect("stop");
    assert_eq!(take_acked(&mut dead_letters(&bus, &queue).await, 1).await, bodies(1).collect::<Vec<_>>());
    quiet(&mut subscribe(&queue).await).await;
    let seen = log.all();
    if cx.capabilities().delivery_count != DeliveryCount::None || mode == RetryMode::InPlace {
        assert_eq!(seen.iter().map(|seen| seen.attempt).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    }
    for (pair, planned) in seen.windows(2).zip([300, 600, 1000, 1000].map(Duration::from_millis)) {
        let waited = pair[1].at - pair[0].at;
        assert!(waited >= planned, "attempt {} came after {waited:?}, planned {planned:?}", pair[1].attempt);
        assert!(waited < planned + TOLERANCE, "attempt {} came after {waited:?}, planned {planned:?}", pair[1].attempt);
    }
}

/// Retries follow the schedule of the policy: never early, not much later, as often as allowed.
pub async fn schedule(cx: Cx) {
    follows_schedule(&cx, RetryMode::Redeliver).await;
}

/// Retries in place follow the same schedule.
pub async fn in_place_schedule(cx: Cx) {
    follows_schedule(&cx, RetryMode::InPlace).await;
}

/// The delays that a backend was asked for.
#[derive(Debug, Default)]
struct Delays(Mutex<Vec<Duration>>);

#[async_trait]
impl Twist for Delays {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        lock(&self.0).push(after);
        at.settler.retry(token, message, attempt, after)
    }
}

/// With equal jitter, the delays of 1000 retries are spread over the second half of what is set, and each message comes no
/// earlier. (How late it comes says more about the machine than about the spread.)
pub async fn jitter(cx: Cx) {
    const DELAY: Duration = Duration::from_secs(4);
    const COUNT: usize = 1000;
    async fn fail_once(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(&message, attempt.0);
        if attempt.0 == 1 { Err(Failure::new("the first time")) } else { Ok(()) }
    }
    let delays = Arc::new(Delays::default());
    let twist = Arc::clone(&delays);
    let builder = cx.builder_around(cx.harness().url(None), |backend| Twisted::around(backend, twist));
    let bus = builder.connect().await.expect("connect");
    let queue = cx.queue(&bus);
    let log = Log::default();
    let backoff = Backoff { initial: DELAY, factor: 1.0, max: DELAY, jitter: Jitter::Equal };
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).route(queue.address().name(), fail_once);
    route.policy(FailurePolicy { backoff, ..FailurePolicy::default() }).concurrency(64);
    let running = start(consumers).await;
    publish(&queue, bodies(COUNT)).await;
    counted_within(PATIENCE * 4, &running, queue.address().name(), "handled", COUNT as u64).await;
    running.stop().await.expect("stop");
    let mut first = std::collections::BTreeMap::new();
    let mut waits = Vec::new();
    for seen in log.all() {
        match first.get(&seen.body) {
            None => drop(first.insert(seen.body, seen.at)),
            Some(before) => waits.push(seen.at - *before),
        }
    }
    assert_eq!(waits.len(), COUNT, "each is tried twice");
    waits.sort();
    let (shortest, longest) = (waits[0], waits[COUNT - 1]);
    assert!(shortest >= DELAY / 2, "the shortest delay was {shortest:?}");
    assert!(longest < DELAY + TOLERANCE * 4, "the longest delay was {longest:?}");
    let mut asked = std::mem::take(&mut *lock(&delays.0));
    asked.sort();
    let most = asked.len().checked_sub(1).expect("delays");
    assert!(asked.len() >= COUNT && asked[0] >= DELAY / 2 && asked[most] <= DELAY, "{:?} {:?}", asked[0], asked[most]);
    // Uniform in 2 s to 4 s: a tenth of them lies below 2.2 s and a tenth above 3.8 s.
    let spread = asked[most * 9 / 10] - asked[most / 10];
    assert!(spread > Duration::from_millis(1400), "the middle 80 % of the delays are only {spread:?} wide");
    cx.note(format_args!("1000 delays of 2 s to 4 s: shortest {shortest:?}, longest {longest:?}"));
}

/// An error that no retry can help sends the message to the dead letters after one attempt.
pub async fn permanent_goes_at_once(cx: Cx) {
    async fn fail(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(&message, attempt.0);
        Err(Failure::permanent("no such customer"))
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(3)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), fail).policy(retry_every(Duration::from_secs(1), 5));
    let running = start(consumers).await;
    let mut letters = dead_letters(&bus, &queue).await;
    assert_eq!(in_order(&cx, take_acked(&mut letters, 3).await), bodies(3).collect::<Vec<_>>());
    running.stop().await.expect("stop");
    assert!(log.all().iter().all(|seen| seen.attempt == 1) && log.len() == 3, "{:?}", log.all());
    quiet(&mut letters).await;
    quiet(&mut subscribe(&queue).await).await;
}

/// While a message waits for its retry, the others are handled, one at a time as the limit says.
pub async fn retries_do_not_block(cx: Cx) {
    const DELAY: Duration = Duration::from_secs(20);
    async fn fail_first(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(&message, attempt.0);
        if attempt.0 == 1 && &message.payload()[..] == b"m-000000" { Err(Failure::new("later")) } else { Ok(()) }
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(20)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), fail_first).policy(retry_every(DELAY, 5));
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "handled", 20).await;
    running.stop().await.expect("stop");
    let seen = log.bodies();
    assert_eq!(counts(&seen)[&"m-000000".to_owned()], 2, "{seen:?}");
    assert_eq!(seen.last().map(String::as_str), Some("m-000000"), "the others were held up: {seen:?}");
    let bad = log.of("m-000000");
    assert!(bad[1].at - bad[0].at >= DELAY, "{bad:?}");
    let others =
        log.all().into_iter().filter(|seen| seen.body != "m-000000").map(|seen| seen.at).max().expect("others");
    assert!(others < bad[1].at, "the others waited for the retry");
}

/// With order by key, a message that is tried again holds its key up, and no other key.
pub async fn in_place_blocks_the_key(cx: Cx) {
    // Until the other key is through, which takes as long as it takes.
    async fn fails_for_a_while(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(&message, attempt.0);
        let waits = &message.payload()[..] == b"a1" && (attempt.0 <= 2 || log.of("b3").is_empty());
        if waits { Err(Failure::new("again")) } else { Ok(()) }
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    for body in ["a1", "b1", "a2", "b2", "a3", "b3"] {
        let message = Message::new(body).with_key(body[..1].to_owned());
        queue.send_message(message).await.expect("send");
    }
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).route(queue.address().name(), fails_for_a_while);
    route.ordered_by_key().concurrency(4).policy(retry_every(Duration::from_millis(500), 1000));
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "handled", 6).await;
    running.stop().await.expect("stop");
    let seen = log.bodies();
    let of = |key: char| seen.iter().filter(|body| body.starts_with(key)).map(String::as_str).collect::<Vec<_>>();
    let of_a = of('a');
    let tries = of_a.iter().take_while(|body| **body == "a1").count();
    assert!(tries >= 3 && of_a[tries..] == ["a2", "a3"], "{seen:?}");
    assert_eq!(of('b'), ["b1", "b2", "b3"], "{seen:?}");
}

/// A restart in the middle of a backoff loses nothing and repeats nothing; where the broker itself delays, the
/// message does not come early either.
pub async fn restart_in_backoff(cx: Cx) {
    const DELAY: Duration = Duration::from_secs(8);
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(3)).await;
    let mut subscription = subscribe(&queue).await;
    let returned = tokio::time::Instant::now();
    for _ in 0..3 {
        next(&mut subscription).await.retry(DELAY).await.expect("retry");
    }
    drop(subscription);
    closes(&bus).await;
    let bus = cx.bus().await;
    let mut again = subscribe(&bus.channel(queue.address().clone())).await;
    for _ in 0..3 {
        let delivery = next(&mut again).await;
        let early = DELAY.saturating_sub(returned.elapsed());
        assert!(early.is_zero() || cx.capabilities().delayed_retry.support != Support::Native, "came {early:?} early");
        if !early.is_zero() {
            cx.note(format_args!("after a restart it came {early:?} early"));
        }
        if cx.capabilities().delivery_count != DeliveryCount::None {
            assert_eq!(delivery.attempt(), 2);
        }
        delivery.ack().await.expect("ack");
    }
    quiet(&mut again).await;
}

/// Of several handlers of a message, one that has succeeded is not called again, however often the others fail and in whichever
/// way the message is tried again.
pub async fn finished_handlers_rest(cx: Cx) {
    const SHORT: Duration = Duration::from_millis(50);
    let (bus, can) = (cx.bus().await, cx.capabilities());
    let modes = [
        (can.requeue.is_available(), RetryMode::Redeliver, Duration::ZERO),
        (can.delayed_retry.support.is_available(), RetryMode::Redeliver, SHORT),
        (true, RetryMode::InPlace, SHORT),
    ];
    for (_, mode, delay) in modes.into_iter().filter(|(available, ..)| *available) {
        let queue = cx.queue(&bus);
        let calls: Arc<[AtomicU32; 3]> = Arc::default();
        // They succeed one after the other, each in an attempt of its own.
        let fails = |handler: usize, times: u32| {
            let calls = Arc::clone(&calls);
            move || {
                let call = calls[handler].fetch_add(1, Ordering::SeqCst);
                std::future::ready(if call < times { Err(Failure::new("not yet")) } else { Ok(()) })
            }
        };
        let mut consumers = ConsumerFactory::new(&bus);
        let route = consumers.route(queue.address().name(), fails(0, 1));
        route.also("second", fails(1, 2)).also("third", fails(2, 3));
        route.policy(FailurePolicy { mode, ..retry_every(delay, 5) });
        let running = start(consumers).await;
        publish(&queue, bodies(1)).await;
        counted(&running, queue.address().name(), "handled", 1).await;
        running.stop().await.expect("stop");
        let calls = calls.each_ref().map(|calls| calls.load(Ordering::SeqCst));
        assert_eq!(calls, [2, 3, 4], "calls of each handler, {mode:?} after {delay:?}");
        quiet(&mut subscribe(&queue).await).await;
    }
}
