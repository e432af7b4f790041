//! L1, L2: a stop drains, and is forced.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq_core::{Attempt, ConsumerFactory, ConsumerRunner, Message, State};
use tokio::time::Instant;

use crate::{
    Case, Cx, Ledger, PATIENCE,
    case::run,
    child::{self, DRAIN, Mode},
    drive::{CLOSE_FOR, Log, assert_stopped, bodies, closes, publish, rest, rest_until},
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("L1_drain_under_load", run!(drain_under_load)),
    Case::new("L1_deadline_returns_the_rest", run!(deadline_returns_the_rest)),
    Case::new("L1_sigterm_drains", run!(sigterm_drains)).broker(),
    Case::new("L2_force", run!(force)),
    Case::new("L2_second_signal_forces", run!(second_signal_forces)),
];

/// A stop under load: every handler that was started ends, what was not started is back with the broker, nothing is
/// lost, nothing comes twice, and it is soon over.
pub async fn drain_under_load(cx: Cx) {
    const COUNT: usize = 3000;
    async fn handle(message: Message, started: State<Log>, ended: State<Ended>) {
        started.add(&message, 1);
        tokio::time::sleep(Duration::from_millis(5)).await;
        ended.0.0.add(&message, 1);
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(COUNT / 3 * 2)).await;
    let (started, ended) = (Log::default(), Log::default());
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(started.clone()).state(Ended(ended.clone()));
    // Few are fetched ahead: what is fetched and not started goes back, one by one on some brokers.
    consumers.route(queue.address().name(), handle).concurrency(8).prefetch(40);
    let running = ConsumerRunner::new(consumers).drain_timeout(Duration::from_secs(120)).start().await.expect("start");
    let sending = tokio::spawn({
        let queue = queue.clone();
        async move { publish(&queue, bodies(COUNT).skip(COUNT / 3 * 2)).await }
    });
    started.reaches(COUNT / 15).await;
    let stopping = Instant::now();
    running.stop().await.expect("stop");
    assert!(stopping.elapsed() < Duration::from_secs(60), "the stop took {:?}", stopping.elapsed());
    assert_eq!(started.len(), ended.len(), "every handler that was started has ended");
    sending.await.expect("the sender");
    let mut ledger = Ledger::sent(bodies(COUNT));
    ended.bodies().into_iter().for_each(|body| ledger.see(body));
    let told = closes(&bus).await;
    rest(&cx, &queue, COUNT.saturating_sub(ended.len())).await.into_iter().for_each(|body| ledger.see(body));
    assert_rest(&ledger, told);
}

#[derive(Debug)]
struct Ended(Log);

/// How many handlers were called.
type Turn = Arc<AtomicUsize>;

/// Handlers that do not end within the drain time-out are cancelled, their messages come again, and the stop is over
/// soon after the time-out.
pub async fn deadline_returns_the_rest(cx: Cx) {
    // Each tenth one never ends, whichever it is: not every broker keeps the order.
    async fn handle(message: Message, turn: State<Turn>, started: State<Log>, ended: State<Ended>) {
        let turn = turn.fetch_add(1, Ordering::SeqCst);
        started.add(&message, 1);
        if turn % 10 == 3 {
            std::future::pending::<()>().await;
        }
        ended.0.0.add(&message, 1);
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(40)).await;
    let (started, ended) = (Log::default(), Log::default());
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Turn::default()).state(started.clone()).state(Ended(ended.clone()));
    consumers.route(queue.address().name(), handle).concurrency(3);
    let running =
        ConsumerRunner::new(consumers).drain_timeout(Duration::from_millis(500)).start().await.expect("start");
    started.reaches(24).await;
    eventually(PATIENCE, || async { if ended.len() == 21 { Ok(()) } else { Err(format!("{} ended", ended.len())) } })
        .await;
    let stopping = Instant::now();
    let stopped = assert_stopped(&cx, running.stop().await);
    let took = stopping.elapsed();
    assert!(took >= Duration::from_millis(500), "handlers got only {took:?}");
    assert!(took < Duration::from_secs(60), "the stop took {took:?}");
    let told = closes(&bus).await && stopped;
    let mut ledger = Ledger::sent(bodies(40));
    ended.bodies().into_iter().for_each(|body| ledger.see(body));
    rest(&cx, &queue, 40_usize.saturating_sub(ended.len())).await.into_iter().for_each(|body| ledger.see(body));
    assert_rest(&ledger, told);
}

/// Nothing is lost, and nothing comes twice: unless the broker was too slow to be told what had ended, which comes again then.
#[track_caller]
fn assert_rest(ledger: &Ledger, told: bool) {
    if told { ledger.assert_exact() } else { ledger.assert_nothing_lost() }
}

/// What a child says at its end: that it has stopped; beside a broker, if need be without waiting any longer for it. Gives whether
/// it has waited.
#[track_caller]
fn assert_ended(cx: &Cx, line: Option<String>) -> bool {
    let line = line.expect("the child says how it has ended");
    let gave_up = cx.harness().broker().is_some() && line.contains("did not close in time");
    assert!(line == "ended: Ok(())" || gave_up, "{line}");
    !gave_up
}

/// A process that gets SIGTERM with ten messages in its handlers: those that end in time are acknowledged, the rest
/// come again, and the process ends in order, soon after its drain time-out (mission row J12).
pub async fn sigterm_drains(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(10)).await;
    let (of_child, name) = (cx.clone(), queue.address().name().to_owned());
    let work = move || {
        let mut child = child::Running::start(&of_child, Mode::Drain, &name);
        for _ in 0..10 {
            assert!(child.line(PATIENCE).is_some_and(|line| line.starts_with("handling ")), "ten are in flight");
        }
        let told = std::time::Instant::now();
        child.signal("TERM");
        let waited = assert_ended(&of_child, child.line(PATIENCE));
        // A consumer waits for its broker as long as closing may take, and says nothing when that was too short.
        let in_time = waited && told.elapsed() < DRAIN + CLOSE_FOR;
        while child.ended().is_none() {
            assert!(told.elapsed() < PATIENCE, "the child goes on");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(told.elapsed() < Duration::from_secs(60), "the drain of ten seconds took {:?}", told.elapsed());
        assert!(child.ended().is_some_and(|status| status.success()), "{:?}", child.ended());
        in_time
    };
    let told = child::watched(tokio::task::spawn_blocking(work)).await;
    let others = ["m-000001", "m-000003", "m-000005", "m-000007", "m-000009"];
    // What the broker was not told of in time comes again beside them.
    let mut left = rest_until(&cx, &queue, |seen| others.iter().all(|body| seen.iter().any(|seen| seen == body))).await;
    left.sort();
    if told {
        assert_eq!(left, others, "exactly the others come again");
    } else {
        let missing: Vec<_> = others.iter().filter(|body| !left.iter().any(|seen| seen == **body)).collect();
        assert!(missing.is_empty(), "{missing:?} are lost; {left:?} came again");
    }
    closes(&bus).await;
}

async fn stuck(message: Message, attempt: Attempt, log: State<Log>) {
    log.add(&message, attempt.0);
    std::future::pending::<()>().await;
}

/// A stop that waits for handlers ends at once when it is forced, and the messages come again.
pub async fn force(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(10)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), stuck).concurrency(4);
    let running = ConsumerRunner::new(consumers).drain_timeout(Duration::from_secs(120)).start().await.expect("start");
    log.reaches(4).await;
    let stopping = tokio::spawn({
        let running = running.clone();
        async move { running.stop().await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!stopping.is_finished(), "the stop did not wait for its handlers");
    let forced = Instant::now();
    running.force();
    assert_stopped(&cx, stopping.await.expect("the stop"));
    assert!(forced.elapsed() < Duration::from_secs(60), "the forced stop took {:?}", forced.elapsed());
    closes(&bus).await;
    let mut seen = rest(&cx, &queue, 10).await;
    seen.sort();
    assert_eq!(seen, bodies(10).collect::<Vec<_>>());
}

/// A process that drains after SIGTERM goes on until a second one, which ends it at once, in order.
pub async fn second_signal_forces(cx: Cx) {
    let queue = cx.name();
    let work = move |cx: Cx| {
        let within = PATIENCE;
        let mut child = child::Running::start(&cx, Mode::Stuck, &queue);
        assert_eq!(child.line(within).as_deref(), Some("handling stuck"), "the child handles a message");
        child.signal("TERM");
        std::thread::sleep(Duration::from_millis(700));
        assert!(child.ended().is_none(), "the child did not wait for its handler");
        let second = std::time::Instant::now();
        // Again and again, because two signals that meet a process that stands still are one.
        let told = std::iter::repeat_with(|| {
            child.signal("TERM");
            child.line(Duration::from_secs(1))
        });
        assert_ended(&cx, told.take(30).flatten().next());
        while child.ended().is_none() {
            assert!(second.elapsed() < within, "the child goes on after the second signal");
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(second.elapsed() < Duration::from_secs(45), "the second signal took {:?}", second.elapsed());
        assert!(child.ended().is_some_and(|status| status.success()));
    };
    child::watched(tokio::task::spawn_blocking(move || work(cx))).await;
}
