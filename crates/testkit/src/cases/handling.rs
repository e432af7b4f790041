//! S5 to S7: how handlers end, and what becomes of their messages.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use polymq_core::{
    AckMode, Attempt, Batch, ConsumerFactory, ConsumerRunner, Context, Failure, FailurePolicy, Message, Outcome, State,
};
use tokio::time::Instant;

use crate::{
    Case, Cx, Ledger, PATIENCE,
    case::run,
    drive::{
        Log, assert_stopped, bodies, closes, counted, counts, dead_letters, publish, quiet, retry_every, start,
        subscribe,
    },
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("S5_bad_message_in_a_batch", run!(bad_message_in_a_batch)),
    Case::new("S6_handler_panics", run!(handler_panics)),
    Case::new("S6_acknowledgement_modes", run!(acknowledgement_modes)),
    Case::new("S6_handler_times_out", run!(handler_times_out)),
    Case::new("S6_handler_cancelled", run!(handler_cancelled)),
    Case::new("S7_cancelled_is_not_failed", run!(cancelled_is_not_failed)),
];

const SHORT: Duration = Duration::from_millis(50);

/// One message of a batch that fails is tried again alone; its neighbours are done.
pub async fn bad_message_in_a_batch(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(10)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let of_handler = log.clone();
    let handler = move |batch: Batch<Context>| {
        let log = of_handler.clone();
        async move {
            let outcome = |context: &Context| {
                log.add(context.message(), context.attempt());
                match (&context.message().payload()[..], context.attempt()) {
                    (b"m-000003", 1) => Outcome::retry("bad for now"),
                    (b"m-000005", _) => Outcome::reject("bad for ever"),
                    _ => Outcome::Ack,
                }
            };
            batch.iter().map(outcome).collect::<Vec<_>>()
        }
    };
    consumers.route_batch(queue.address().name(), 10, handler).policy(retry_every(SHORT, 5));
    let running = start(consumers).await;
    log.reaches(11).await;
    counted(&running, queue.address().name(), "handled", 9).await;
    counted(&running, queue.address().name(), "dead_lettered", 1).await;
    running.stop().await.expect("stop");
    let mut ledger = Ledger::sent(bodies(10).chain(["m-000003".to_owned()]));
    log.bodies().into_iter().for_each(|body| ledger.see(body));
    ledger.assert_exact();
    assert_eq!(crate::drive::take_acked(&mut dead_letters(&bus, &queue).await, 1).await, ["m-000005"]);
    quiet(&mut subscribe(&queue).await).await;
}

/// A handler that panics loses nothing: its message is tried again, the others are handled.
pub async fn handler_panics(cx: Cx) {
    async fn handle(message: Message, attempt: Attempt, log: State<Log>) {
        log.add(&message, attempt.0);
        assert!(
            !(attempt.0 == 1 && &message.payload()[..] == b"m-000002"),
            "a panic of the handler, as the case wants"
        );
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(5)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), handle).policy(retry_every(SHORT, 5));
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "handled", 5).await;
    let stats = running.stats(queue.address().name()).expect("stats");
    assert_eq!((stats.panicked, stats.failed, stats.retried, stats.dead_lettered), (1, 1, 1, 0), "{stats:?}");
    running.stop().await.expect("stop");
    let seen = counts(log.bodies());
    assert_eq!((seen.len(), seen["m-000002"], log.len()), (5, 2, 6), "{seen:?}");
    quiet(&mut subscribe(&queue).await).await;
}

/// A handler that panics gets its message again where success is acknowledged, and not where the receipt is, or everything
/// (mission row C4).
pub async fn acknowledgement_modes(cx: Cx) {
    async fn handle(message: Message, attempt: Attempt, log: State<Log>) {
        log.add(&message, attempt.0);
        assert!(
            !(attempt.0 == 1 && &message.payload()[..] == b"m-000001"),
            "a panic of the handler, as the case wants"
        );
    }
    let bus = cx.bus().await;
    for (mode, calls) in [(AckMode::AfterSuccess, 4), (AckMode::OnReceipt, 3), (AckMode::Always, 3)] {
        let queue = cx.queue(&bus);
        publish(&queue, bodies(3)).await;
        let log = Log::default();
        let mut consumers = ConsumerFactory::new(&bus);
        let route = consumers.state(log.clone()).route(queue.address().name(), handle);
        route.ack_mode(mode).policy(retry_every(SHORT, 5));
        let running = start(consumers).await;
        log.reaches(calls).await;
        running.stop().await.expect("stop");
        assert_eq!(running.stats(queue.address().name()).expect("stats").panicked, 1, "{mode:?}");
        quiet(&mut subscribe(&queue).await).await;
        quiet(&mut dead_letters(&bus, &queue).await).await;
        assert_eq!(log.len(), calls, "{mode:?}: {:?}", log.bodies());
    }
}

/// A handler that takes too long is cancelled; that counts as a failure and its message is tried again.
pub async fn handler_times_out(cx: Cx) {
    const LIMIT: Duration = Duration::from_secs(1);
    /// When the first call was given up.
    struct Ended(Arc<OnceLock<Instant>>);
    impl Drop for Ended {
        fn drop(&mut self) {
            self.0.get_or_init(Instant::now);
        }
    }
    async fn handle(message: Message, attempt: Attempt, log: State<Log>, ended: State<Arc<OnceLock<Instant>>>) {
        log.add(&message, attempt.0);
        if attempt.0 == 1 {
            let _ended = Ended(Arc::clone(&ended));
            std::future::pending::<()>().await;
        }
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let (log, ended) = (Log::default(), Arc::new(OnceLock::<Instant>::new()));
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).state(Arc::clone(&ended)).route(queue.address().name(), handle);
    route.timeout(LIMIT).policy(retry_every(SHORT, 5));
    let running = start(consumers).await;
    let began = Instant::now();
    publish(&queue, bodies(1)).await;
    counted(&running, queue.address().name(), "handled", 1).await;
    let stats = running.stats(queue.address().name()).expect("stats");
    assert_eq!((stats.timed_out, stats.failed, stats.retried), (1, 1, 1), "{stats:?}");
    running.stop().await.expect("stop");
    let seen = log.all();
    assert_eq!(seen.len(), 2, "{seen:?}");
    let ended = *ended.get().expect("it was given up");
    assert!(ended - began >= LIMIT, "the limit: {:?}", ended - began);
    assert!(seen[1].at - ended >= SHORT, "the backoff: {:?}", seen[1].at - ended);
    quiet(&mut subscribe(&queue).await).await;
}

/// Starts a handler that never ends with one message, then stops it by force.
async fn cancel_a_handler(cx: &Cx, max_attempts: u32) -> (polymq_core::Bus, polymq_core::Channel, Log) {
    async fn stuck(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(&message, attempt.0);
        std::future::pending().await
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(1)).await;
    let (log, errors) = (Log::default(), Log::default());
    let mut consumers = ConsumerFactory::new(&bus);
    let of_callback = errors.clone();
    consumers.on_handler_error(move |event| of_callback.add(event.message, event.attempt));
    let route = consumers.state(log.clone()).route(queue.address().name(), stuck);
    route.policy(FailurePolicy { max_attempts, ..FailurePolicy::default() });
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    log.reaches(1).await;
    running.force();
    assert_stopped(cx, running.stop().await);
    let stats = running.stats(queue.address().name()).expect("stats");
    assert_eq!((stats.handled, stats.failed, stats.retried, stats.dead_lettered), (0, 0, 0, 0), "{stats:?}");
    assert_eq!(errors.len(), 0, "a cancelled handler was reported as a failed one");
    (bus, queue, log)
}

/// A handler that is cancelled leaves its message with the broker; the next one handles it.
pub async fn handler_cancelled(cx: Cx) {
    let (bus, queue, _log) = cancel_a_handler(&cx, 5).await;
    assert_eq!(crate::drive::take_acked(&mut subscribe(&queue).await, 1).await, ["m-000000"]);
    closes(&bus).await;
}

/// Cancelling uses up no attempt: a message that may be tried once is handled by the next handler, not given up.
pub async fn cancelled_is_not_failed(cx: Cx) {
    async fn handle(message: Message, attempt: Attempt, log: State<Log>) {
        log.add(&message, attempt.0);
    }
    let (bus, queue, _) = cancel_a_handler(&cx, 1).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).route(queue.address().name(), handle);
    route.policy(FailurePolicy { max_attempts: 1, ..FailurePolicy::default() });
    let running = start(consumers).await;
    eventually(PATIENCE, || async {
        let stats = running.stats(queue.address().name()).expect("stats");
        if stats.handled + stats.dead_lettered > 0 { Ok(()) } else { Err(format!("{stats:?}")) }
    })
    .await;
    let stats = running.stats(queue.address().name()).expect("stats");
    assert_eq!((stats.handled, stats.dead_lettered), (1, 0), "{stats:?}");
    running.stop().await.expect("stop");
    quiet(&mut dead_letters(&bus, &queue).await).await;
}
