//! R9: the consumer's process, or the broker, is killed while retries wait.

use std::time::Duration;

use polymq_core::{Attempt, Capabilities, ConsumerFactory, DeliveryCount, ErrorKind, Failure, Message, State, Support};
use tokio::time::Instant;

use super::{plan::connect, scenario::Plan, states::States};
use crate::{
    Case, Cx, Figures, PATIENCE,
    case::run,
    cases::{connecting::not_persistent, retry::refused_at_start},
    child::{self, BACKOFF, GAVE_BACK, LISTENS, Mode},
    drive::{Log, bodies, closes, counted, is_written_down, publish, retry_every, start},
    eventually,
};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("R9_killed_in_backoff", run!(killed_in_backoff))
        .when("delayed_retry", |c| c.delayed_retry.support.is_available(), run!(refused_at_start))
        .broker(),
    Case::new("R9_broker_killed_in_backoff", run!(broker_killed_in_backoff))
        .when("persistent, delayed_retry", is_kept, run!(is_not_kept))
        .own_broker(),
];

const COUNT: usize = 3;

fn is_kept(capabilities: &Capabilities) -> bool {
    capabilities.persistent && capabilities.delayed_retry.support.is_available()
}

async fn is_not_kept(cx: Cx) {
    if cx.capabilities().persistent { refused_at_start(cx).await } else { not_persistent(cx).await }
}

async fn note(message: Message, attempt: Attempt, log: State<Log>) {
    log.add(&message, attempt.0);
}

/// The attempt number that a message must have reached which was tried before.
fn second(cx: &Cx) -> u32 {
    if cx.capabilities().delivery_count == DeliveryCount::None { 1 } else { 2 }
}

/// A consumer's process is killed with SIGKILL while what it has failed to handle waits for the next attempt: another process
/// handles each of them, as the second attempt; where the broker itself delays, not before its time.
pub async fn killed_in_backoff(cx: Cx) {
    let url = cx.harness().url(None);
    let states = States::default();
    let bus = states.watched(cx.builder_to(url.clone())).connect().await.expect("connect");
    let queue = cx.queue(&bus);
    let (of_child, name) = (cx.clone(), queue.address().name().to_owned());
    let listening = tokio::task::spawn_blocking(move || {
        let child = child::Running::start_at(&of_child, Mode::FailOnce, &name, url);
        child.says(LISTENS);
        child
    });
    let child = child::watched(listening).await;
    // Nothing is tried before it is sent, so this is no later than any first attempt.
    let sent = Instant::now();
    publish(&queue, bodies(COUNT)).await;
    let killing = tokio::task::spawn_blocking(move || {
        child.says(GAVE_BACK);
        child.kill();
    });
    child::watched(killing).await;
    let killed = Instant::now();
    if sent.elapsed() >= BACKOFF {
        cx.note(format_args!("the kill came {:?} after sending, when the retries were due", sent.elapsed()));
    }
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), note);
    let running = start(consumers).await;
    eventually(BACKOFF + cx.harness().recovery(), || async {
        let missing = |body: &String| !log.of(body).iter().any(|seen| seen.attempt >= second(&cx));
        match bodies(COUNT).find(missing) {
            None => Ok(()),
            Some(body) => Err(format!("{body} was not tried again, only {:?}", log.all())),
        }
    })
    .await;
    if cx.capabilities().delayed_retry.support == Support::Native {
        for seen in log.all().iter().filter(|seen| seen.attempt >= 2) {
            let waited = seen.at - sent;
            assert!(waited >= BACKOFF, "{} came after {waited:?}, its retry waits {BACKOFF:?}", seen.body);
        }
    }
    running.stop().await.expect("stop");
    let (handled, health) = (log.len(), states.to_string());
    let recovery = Some(killed.elapsed());
    cx.record(Figures {
        accepted: COUNT,
        handled,
        duplicated: handled - COUNT,
        recovery,
        health,
        ..Figures::default()
    });
    closes(&bus).await;
    super::scenario::leaves_no_task().await;
}

async fn fails_once(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
    log.add(&message, attempt.0);
    let body = String::from_utf8_lossy(message.payload());
    if body.starts_with("m-") && log.of(&body).len() == 1 { Err(Failure::new("the first time")) } else { Ok(()) }
}

/// The broker is killed with SIGKILL while retries and, where there are any, delayed messages wait: all of them come
/// afterwards; where the broker itself delays, not before their time.
pub async fn broker_killed_in_backoff(cx: Cx) {
    // Longer than it takes to kill a broker on a busy machine, and shorter than starting some of them.
    const DELAY: Duration = Duration::from_secs(10);
    let plan = Plan::at(cx.harness().url(None));
    let states = States::default();
    let bus = connect(&cx, &plan, &plan.url, Some(&states)).await;
    let queue = cx.queue(&bus);
    let name = queue.address().name();
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).route(name, fails_once);
    route.concurrency(4).policy(retry_every(DELAY, 100));
    let running = start(consumers).await;
    let sent = Instant::now();
    publish(&queue, bodies(COUNT)).await;
    let delays = cx.capabilities().delayed_send.support.is_available();
    let later = Message::new("later").deliver_in(DELAY);
    let later = queue.send_message(later).await;
    assert_eq!(later.is_ok(), delays, "{later:?}");
    if let Err(error) = later {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error:?}");
    }
    counted(&running, name, "retried", COUNT as u64).await;
    // Twice: a broker that writes a moment after it has answered has written that when it answers the next one.
    is_written_down(&cx, &bus).await;
    is_written_down(&cx, &bus).await;
    let waited = sent.elapsed();
    cx.broker().kill().await;
    if waited >= DELAY {
        cx.note(format_args!("the kill came {waited:?} after sending, when the retries were due"));
    }
    cx.broker().start().await;
    let back = Instant::now();
    // Where the broker had not written down yet that the first attempt was settled it delivers that once more, as any attempt;
    // the retry itself, which it had confirmed, comes all the same.
    let retry = |body: &str| log.of(body).into_iter().skip(1).find(|seen| seen.attempt >= second(&cx));
    eventually(DELAY + cx.harness().recovery() * 2, || async {
        let missing = bodies(COUNT).find(|body| retry(body).is_none());
        match missing.or_else(|| (delays && log.of("later").is_empty()).then(|| "later".to_owned())) {
            None => Ok(()),
            Some(body) => Err(format!("{body} is lost: {:?}; {}", log.all(), bus.health())),
        }
    })
    .await;
    let recovery = Some(back.elapsed());
    if cx.capabilities().delayed_retry.support == Support::Native {
        for body in bodies(COUNT) {
            let waited = retry(&body).expect("it was there").at - log.of(&body)[0].at;
            assert!(waited >= DELAY, "{body} came after {waited:?}, its retry waits {DELAY:?}");
        }
    }
    if delays && cx.capabilities().delayed_send.support == Support::Native {
        let waited = log.of("later")[0].at - sent;
        assert!(waited >= DELAY, "what was to come after {DELAY:?} came after {waited:?}");
    }
    let stats = running.stats(name).expect("it runs");
    assert_eq!((stats.dead_lettered, stats.dropped), (0, 0), "{stats:?}");
    let accepted = COUNT + usize::from(delays);
    // Each failed once.
    let handled = log.len() - COUNT;
    let (duplicated, health) = (handled.saturating_sub(accepted), states.to_string());
    cx.record(Figures { accepted, handled, duplicated, recovery, health, ..Figures::default() });
    tokio::time::timeout(PATIENCE, running.stop()).await.expect("stopping is bounded").expect("stop");
    closes(&bus).await;
    super::scenario::leaves_no_task().await;
}
