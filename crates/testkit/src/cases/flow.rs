//! O6 and O8 to O10: a consumer that is full, slow or paused goes on as if nothing had been, and one queue does not
//! hold up another.

use std::time::Duration;

use polymq_core::{Attempt, Bus, ConsumerFactory, FailurePolicy, HealthState, Message, RetryMode, State};
use tokio::time::Instant;

use crate::{
    Case, Cx, Ledger, PATIENCE,
    case::run,
    drive::{
        Log, bodies, counted, counted_within, prefetch, publish, quiet, start, subscribe, subscribe_with, take, text,
    },
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("O6_saturated_then_acked", run!(saturated_then_acked)),
    Case::new("O8_long_handler_runs_once", run!(lent_handler_runs_once)).when(
        "leases",
        |c| c.leases,
        run!(long_handler_runs_once),
    ),
    Case::new("O9_pause_keeps_the_session", run!(pause_keeps_the_session)),
    Case::new("O10_queues_are_served_fairly", run!(queues_are_served_fairly)),
];

async fn note_down(message: Message, attempt: Attempt, log: State<Log>) {
    log.add(&message, attempt.0);
}

/// A consumer that holds as much as the prefetch allows gets nothing more; when it acknowledges, it goes on, again and
/// again, and each message comes once.
pub async fn saturated_then_acked(cx: Cx) {
    const PREFETCH: usize = 8;
    const ROUNDS: usize = 4;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(PREFETCH * ROUNDS)).await;
    let mut ledger = Ledger::sent(bodies(PREFETCH * ROUNDS));
    let mut subscription = subscribe_with(&queue, prefetch(PREFETCH)).await;
    for _ in 0..ROUNDS {
        let held = take(&mut subscription, PREFETCH).await;
        quiet(&mut subscription).await;
        // The last one first: what was acknowledged makes room, wherever it is.
        for delivery in held.into_iter().rev() {
            ledger.see(text(&delivery));
            delivery.ack().await.expect("ack");
        }
    }
    quiet(&mut subscription).await;
    ledger.assert_exact();
}

/// A handler that takes longer than this many seconds, and how often it was called when it has ended.
async fn handled_for(cx: &Cx, takes: Duration, lease: Option<Duration>) {
    async fn slow(message: Message, attempt: Attempt, log: State<Log>, takes: State<Duration>) {
        log.add(&message, attempt.0);
        tokio::time::sleep(*takes).await;
    }
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).state(takes).route(queue.address().name(), slow).concurrency(2);
    // In place, because the default needs delayed retries and this case is for backends without them too.
    route.policy(FailurePolicy { mode: RetryMode::InPlace, ..FailurePolicy::default() });
    if let Some(lease) = lease {
        route.lease(lease, takes * 10);
    }
    let running = start(consumers).await;
    publish(&queue, bodies(1)).await;
    counted_within(takes + PATIENCE, &running, queue.address().name(), "handled", 1).await;
    // Half of it again: a second call would have been made meanwhile.
    tokio::time::sleep(lease.unwrap_or(takes) / 2).await;
    running.stop().await.expect("stop");
    assert_eq!(log.len(), 1, "one message, one call: {:?}", log.all());
    quiet(&mut subscribe(&queue).await).await;
}

/// A handler that takes more than three times as long as its message is lent runs once: the loan is extended meanwhile.
pub async fn lent_handler_runs_once(cx: Cx) {
    // It is extended after a third of its time: a machine may stand still for the rest.
    let lease = Duration::from_secs(15);
    handled_for(&cx, lease * 13 / 4, Some(lease)).await;
}

/// Where nothing is lent, a handler that takes its time runs once too, and there is no loan to be extended.
pub async fn long_handler_runs_once(cx: Cx) {
    handled_for(&cx, Duration::from_secs(7), None).await;
    super::late_settlement::lease_extension_refused(cx).await;
}

/// A pause fetches and handles nothing and loses nothing, not even the connection or the place at the broker; resumed,
/// it goes on with what has come meanwhile, each message once and as its first attempt.
pub async fn pause_keeps_the_session(cx: Cx) {
    // Longer than the time after which brokers of the suite give up consumers that show no sign of life.
    const PAUSE: Duration = Duration::from_secs(25);
    // Where messages are lent, no sign of life keeps a place at the broker, and a slow answer is told as a lost connection.
    let bus = if cx.capabilities().leases { cx.steady(cx.builder()) } else { cx.builder() };
    let bus = bus.connect().await.expect("connect");
    let queue = cx.queue(&bus);
    let name = queue.address().name();
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(name, note_down);
    let running = start(consumers).await;
    publish(&queue, bodies(20)).await;
    counted(&running, name, "handled", 20).await;

    running.pause(name).expect("pause");
    assert!(running.stats(name).expect("stats").paused);
    // A fetch that was under way when the pause came is over by then.
    tokio::time::sleep(Duration::from_millis(200)).await;
    publish(&queue, bodies(40).skip(20)).await;
    let before = bus.health();
    tokio::time::sleep(PAUSE).await;
    assert_eq!(log.len(), 20, "nothing is handled while it is paused");
    let now = bus.health();
    assert_eq!((now.state, now.reconnects), (before.state, before.reconnects), "the connection is the same one");
    assert_ne!(now.state, HealthState::Down, "{now}");
    if cx.capabilities().stats {
        eventually(PATIENCE, || async {
            let stats = queue.stats(None).await.map_err(|error| error.to_string())?;
            if stats.consumers == 1 { Ok(()) } else { Err(format!("the consumer is still there, but {stats:?}")) }
        })
        .await;
    }

    running.resume(name).expect("resume");
    counted(&running, name, "handled", 40).await;
    publish(&queue, bodies(60).skip(40)).await;
    counted(&running, name, "handled", 60).await;
    running.stop().await.expect("stop");
    let mut ledger = Ledger::sent(bodies(60));
    log.bodies().into_iter().for_each(|body| ledger.see(body));
    ledger.assert_exact();
    assert!(log.all().iter().all(|seen| seen.attempt == 1), "a pause is no failed attempt: {:?}", log.all());
    quiet(&mut subscribe(&queue).await).await;
}

/// While one queue is flooded and consumed slowly, messages of another queue on the same connection are sent and
/// handled without waiting for it.
pub async fn queues_are_served_fairly(cx: Cx) {
    const FLOOD: usize = 1000;
    const FEW: usize = 20;
    async fn slowly(_: Message) {
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    async fn send_all(bus: Bus, name: String) {
        publish(&bus.queue(name), bodies(FLOOD)).await;
    }
    let bus = cx.bus().await;
    let (flooded, other) = (cx.queue(&bus), cx.queue(&bus));
    publish(&flooded, bodies(FLOOD)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(flooded.address().name(), slowly).prefetch(50);
    consumers.route(other.address().name(), note_down).prefetch(50);
    let running = start(consumers).await;
    counted(&running, flooded.address().name(), "handled", 1).await;
    let flood = tokio::spawn(send_all(bus.clone(), flooded.address().name().to_owned()));
    let mut longest = Duration::ZERO;
    for (count, body) in bodies(FEW).enumerate() {
        let sent = Instant::now();
        publish(&other, [body]).await;
        eventually(PATIENCE, || async {
            match log.len() {
                seen if seen > count => Ok(()),
                seen => Err(format!("{seen} of {} messages of the other queue were handled", count + 1)),
            }
        })
        .await;
        longest = longest.max(sent.elapsed());
    }
    let handled = running.stats(flooded.address().name()).expect("stats").handled as usize;
    flood.await.expect("the flood is sent");
    running.stop().await.expect("stop");
    assert!(handled < 2 * FLOOD, "the flood was over before the {FEW} messages of the other queue were handled");
    cx.note(format_args!("beside a flood, a message took {longest:?} at most; {handled} of the flood were handled"));
}
