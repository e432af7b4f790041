//! O1 to O5 and O7: order, concurrency and what is held.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq_core::{
    Attempt, Backoff, Bus, Channel, ConsumeOptions, ConsumerFactory, ConsumerRunner, ErrorKind, Failure, FailurePolicy,
    Jitter, Message, Order, RedeliveryOrder, Running, State,
};
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    Case, Cx, Ledger, PATIENCE,
    case::run,
    drive::{
        Log, assert_stopped, bodies, counted, in_order, next, prefetch, publish, quiet, refused, start, subscribe,
        subscribe_with, take, text,
    },
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("O1_per_key_order", run!(per_key_order)).when("order", |c| c.order != Order::None, run!(order_refused)),
    Case::new("O1_order_over_rebalance", run!(order_over_rebalance)).when(
        "order, redelivery",
        |c| c.order != Order::None && c.redelivery != RedeliveryOrder::Any,
        run!(rebalance_without_order),
    ),
    Case::new("O2_limit_is_kept_and_reached", run!(limit_is_kept_and_reached)),
    Case::new("O3_raise_and_lower", run!(raise_and_lower)),
    Case::new("O4_prefetch_is_a_bound", run!(prefetch_is_a_bound)),
    Case::new("O4_waiting_is_free_for_others", run!(waiting_is_free_for_others)),
    Case::new("O5_slow_consumer", run!(slow_consumer)).alone(),
    Case::new("O7_stuck_handler", run!(stuck_handler)),
];

/// Without any order, order by key is refused before anything is done.
pub async fn order_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let ordered = ConsumeOptions { ordered_by_key: true, ..ConsumeOptions::default() };
    refused(queue.subscribe(ordered).await, &[ErrorKind::Unsupported]);
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route(queue.address().name(), async |_: Message| ()).ordered_by_key();
    refused(consumers.check(), &[ErrorKind::Unsupported]);
}

async fn keys_in_order(cx: Cx, rebalance: bool, ordered: bool) {
    const KEYS: usize = 16;
    const EACH: usize = 63;
    async fn handle(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        tokio::time::sleep(Duration::from_micros(fastrand::u64(0..500))).await;
        if fastrand::u8(..) < 40 {
            return Err(Failure::new("at random"));
        }
        log.add(&message, attempt.0);
        Ok(())
    }
    fn consumers(bus: &Bus, queue: &Channel, log: &Log) -> ConsumerFactory {
        let (initial, max) = (Duration::from_millis(1), Duration::from_millis(20));
        let backoff = Backoff { initial, factor: 2.0, max, jitter: Jitter::Full };
        let policy = FailurePolicy { max_attempts: 100, backoff, ..FailurePolicy::default() };
        let mut consumers = ConsumerFactory::new(bus);
        let route = consumers.state(log.clone()).route(queue.address().name(), handle);
        route.ordered_by_key().concurrency(10).policy(policy);
        consumers
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let names = (0..EACH).flat_map(|n| (0..KEYS).map(move |key| format!("{key:02}/{n:04}")));
    let messages = names.clone().map(|name| Message::new(name.clone()).with_key(format!("key-{}", &name[..2])));
    for result in queue.send_all(messages).await {
        result.expect("sent");
    }
    let log = Log::default();
    let running = start(consumers(&bus, &queue, &log)).await;
    log.reaches(KEYS * EACH / 3).await;
    if rebalance {
        running.detach(queue.address().name()).await.expect("detach");
        running.attach(consumers(&bus, &queue, &log)).await.expect("attach");
    }
    log.reaches(KEYS * EACH).await;
    counted(&running, queue.address().name(), "handled", 1).await;
    running.stop().await.expect("stop");
    let mut ledger = Ledger::sent(names);
    let handled = log.bodies();
    handled.iter().for_each(|body| ledger.see(body.clone()));
    ledger.assert_exact();
    for key in 0..KEYS {
        let key = format!("{key:02}/");
        let of_key: Vec<_> = handled.iter().filter(|body| body.starts_with(&key)).collect();
        assert!(!ordered || of_key.is_sorted(), "key {key}: {of_key:?}");
    }
    quiet(&mut subscribe(&queue).await).await;
}

/// 16 keys, ten handlers at a time and failures at random: the messages of each key are handled in their order.
pub async fn per_key_order(cx: Cx) {
    keys_in_order(cx, false, true).await;
}

/// The same when the consumer is taken away and added again in the middle.
pub async fn order_over_rebalance(cx: Cx) {
    keys_in_order(cx, true, true).await;
}

/// Where a returned message may come anywhere, a rebalance may change the order; nothing is lost or repeated.
pub async fn rebalance_without_order(cx: Cx) {
    if cx.capabilities().order == Order::None {
        return order_refused(cx).await;
    }
    keys_in_order(cx, true, false).await;
}

/// Handlers that wait for leave, and how many of them run.
#[derive(Debug)]
struct Gate {
    leave: Semaphore,
    running: AtomicUsize,
    most: AtomicUsize,
}

impl Gate {
    fn closed() -> Arc<Self> {
        Arc::new(Self { leave: Semaphore::new(0), running: AtomicUsize::new(0), most: AtomicUsize::new(0) })
    }

    async fn pass(&self) {
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(running, Ordering::SeqCst);
        self.leave.acquire().await.expect("never closed").forget();
        self.running.fetch_sub(1, Ordering::SeqCst);
    }

    fn open(&self, count: usize) {
        self.leave.add_permits(count);
    }

    fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    async fn reaches(&self, running: usize) {
        eventually(PATIENCE, || async {
            match self.running() {
                now if now == running => Ok(()),
                now => Err(format!("{now} handlers run, not {running}")),
            }
        })
        .await;
    }
}

async fn gated(cx: &Cx, messages: usize, limit: usize) -> (Channel, Running, Arc<Gate>) {
    async fn handle(_: Message, gate: State<Arc<Gate>>) {
        gate.pass().await;
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(messages)).await;
    let gate = Gate::closed();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Arc::clone(&gate)).route(queue.address().name(), handle).concurrency(limit);
    (queue, start(consumers).await, gate)
}

/// No more handlers run than the limit says, and that many do run.
pub async fn limit_is_kept_and_reached(cx: Cx) {
    let (queue, running, gate) = gated(&cx, 40, 4).await;
    gate.reaches(4).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    gate.open(40);
    counted(&running, queue.address().name(), "handled", 40).await;
    running.stop().await.expect("stop");
    assert_eq!(gate.most.load(Ordering::SeqCst), 4, "the most that ran at a time");
}

/// The limit is raised and lowered while handlers run.
pub async fn raise_and_lower(cx: Cx) {
    let (queue, running, gate) = gated(&cx, 40, 2).await;
    gate.reaches(2).await;
    running.set_concurrency(queue.address().name(), 6).expect("raise");
    gate.reaches(6).await;
    running.set_concurrency(queue.address().name(), 1).expect("lower");
    gate.open(6);
    counted(&running, queue.address().name(), "handled", 6).await;
    gate.reaches(1).await;
    gate.most.store(0, Ordering::SeqCst);
    gate.open(10);
    counted(&running, queue.address().name(), "handled", 16).await;
    gate.reaches(1).await;
    assert_eq!(gate.most.load(Ordering::SeqCst), 1, "the most that ran at a time after lowering");
    running.set_concurrency(queue.address().name(), 3).expect("raise");
    gate.reaches(3).await;
    gate.open(24);
    counted(&running, queue.address().name(), "handled", 40).await;
    running.stop().await.expect("stop");
}

/// No more messages are fetched than the prefetch allows while none is settled, at the broker too; each one that is
/// settled lets one more in.
pub async fn prefetch_is_a_bound(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(20)).await;
    let mut subscription = subscribe_with(&queue, prefetch(5)).await;
    let mut held = take(&mut subscription, 5).await;
    quiet(&mut subscription).await;
    if cx.capabilities().stats {
        eventually(PATIENCE, || async {
            let stats = queue.stats(None).await.map_err(|error| error.to_string())?;
            let unsettled = stats.unsettled.unwrap_or(5);
            if (stats.ready, unsettled, stats.consumers) == (15, 5, 1) { Ok(()) } else { Err(format!("{stats:?}")) }
        })
        .await;
    }
    held.remove(0).ack().await.expect("ack");
    held.push(next(&mut subscription).await);
    quiet(&mut subscription).await;
}

/// What one consumer has not fetched is free for another, at once.
pub async fn waiting_is_free_for_others(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(20)).await;
    let mut subscription = subscribe_with(&queue, prefetch(5)).await;
    let held = take(&mut subscription, 5).await;
    let mut other = subscribe(&queue).await;
    let rest = take(&mut other, 15).await;
    let mut ledger = Ledger::sent(bodies(20));
    held.iter().chain(&rest).for_each(|delivery| ledger.see(text(delivery)));
    ledger.assert_exact();
    for delivery in held.into_iter().chain(rest) {
        delivery.ack().await.expect("ack");
    }
}

/// Resident memory of this process, in bytes.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = status.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096)
}

/// A large backlog and a slow handler: what is in flight and what is held in memory stay bounded.
pub async fn slow_consumer(cx: Cx) {
    const PREFETCH: usize = 50;
    const CONCURRENCY: usize = 4;
    const GROWTH: u64 = 48 * 1024 * 1024;
    async fn slow(_: Message) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let backlog = cx.harness().backlog();
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    // So much that memory which held all of it would show.
    let body = "x".repeat((GROWTH as usize * 3 / 2 / backlog).max(500));
    let results = queue.send_all((0..backlog).map(|_| Message::new(body.clone()))).await;
    results.into_iter().for_each(|result| drop(result.expect("sent")));
    let before = resident();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route(queue.address().name(), slow).prefetch(PREFETCH).concurrency(CONCURRENCY);
    let started = Instant::now();
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "handled", 1).await;
    let mut most = 0;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        if cx.capabilities().stats {
            let stats = queue.stats(None).await.expect("stats");
            // Asked in this order, so that what is handled meanwhile does not look as if it were held.
            let handled = running.stats(queue.address().name()).expect("stats").handled;
            let out = (backlog as u64).saturating_sub(stats.ready + handled);
            let bound = (PREFETCH + CONCURRENCY) as u64;
            assert!(out <= bound, "{out} are neither ready nor handled, with a prefetch of {PREFETCH}: {stats:?}");
            most = most.max(stats.unsettled.unwrap_or(0));
        }
    }
    let after = resident();
    let handled = running.stats(queue.address().name()).expect("stats").handled;
    running.stop().await.expect("stop");
    let took = started.elapsed();
    assert!(u128::from(handled) <= took.as_millis() / 5, "{handled} handled in {took:?} by four handlers of 20 ms");
    assert!(most <= PREFETCH as u64, "{most} in flight, the prefetch is {PREFETCH}");
    if let (Some(before), Some(after)) = (before, after) {
        let grown = after.saturating_sub(before);
        assert!(grown < GROWTH, "memory grew by {grown} bytes with a backlog of {backlog}");
        cx.note(format_args!("backlog {backlog}: {handled} handled, memory grew by {} KiB", grown / 1024));
    }
}

/// A handler that never ends stops no other one.
pub async fn stuck_handler(cx: Cx) {
    async fn handle(message: Message, attempt: Attempt, log: State<Log>) {
        if &message.payload()[..] == b"m-000000" {
            std::future::pending::<()>().await;
        }
        log.add(&message, attempt.0);
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), handle).concurrency(2).prefetch(4);
    let running =
        ConsumerRunner::new(consumers).drain_timeout(Duration::from_millis(100)).start().await.expect("start");
    publish(&queue, bodies(50)).await;
    log.reaches(49).await;
    assert_stopped(&cx, running.stop().await);
    assert_eq!(in_order(&cx, log.bodies()), bodies(50).skip(1).collect::<Vec<_>>(), "the others, in order");
    assert_eq!(crate::drive::take_acked(&mut subscribe(&queue).await, 1).await, ["m-000000"]);
}
