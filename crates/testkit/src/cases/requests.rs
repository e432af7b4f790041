//! Q1 to Q5: requests and their replies, one of each in good time and all the other ways.

use std::{sync::Arc, time::Duration};

use polymq_core::{
    Answer, Attempt, Bus, Channel, ConsumerFactory, ErrorKind, Failure, FailurePolicy, Message, Retry, Running, State,
};
use tokio::{sync::Semaphore, time::Instant};

use crate::{
    Case, Cx, PATIENCE,
    case::run,
    drive::{closes, quiet, refused, retry_every, start, subscribe},
    eventually,
};

pub(super) const CASES: &[Case] = &[
    case("Q1_answer", run!(answer)),
    case("Q2_error_reply", run!(error_reply)),
    case("Q3_late_reply", run!(late_reply)),
    case("Q4_many_at_once", run!(many_at_once)),
    case("Q5_answer_of_a_later_attempt", run!(answer_of_a_later_attempt)),
];

const fn case(id: &'static str, run: crate::Run) -> Case {
    Case::new(id, run).when("request_reply", |c| c.request_reply, run!(refused_by_capability))
}

/// Long enough for a reply on a busy machine.
const IN_TIME: Duration = Duration::from_secs(120);
/// How long is waited for the reply that is late, which is made when this is over.
const HASTE: Duration = Duration::from_secs(20);
/// Opened when the late reply may be made.
type Gate = Arc<Semaphore>;

/// Twice the number; what it cannot double it refuses, and some numbers take their time.
async fn double(n: u64, attempt: Attempt, late: State<Gate>) -> Result<Answer<u64>, Failure> {
    match n {
        13 => return Err(Failure::permanent("thirteen is not doubled")),
        // Later ones overtake earlier ones.
        100..200 => tokio::time::sleep(Duration::from_millis(200 - n)).await,
        1000 => late.acquire().await.expect("never closed").forget(),
        2000 if attempt.0 < 3 => return Err(Failure::new("not yet")),
        _ => {}
    }
    Ok(Answer(n * 2))
}

async fn doubling(cx: &Cx, policy: FailurePolicy) -> (Bus, Channel, Running) {
    doubling_at(cx, policy, Gate::new(Semaphore::new(0))).await
}

async fn doubling_at(cx: &Cx, policy: FailurePolicy, late: Gate) -> (Bus, Channel, Running) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(late).route(queue.address().name(), double).concurrency(16).policy(policy);
    let running = start(consumers).await;
    let asking = queue.with_timeout(IN_TIME);
    (bus, asking, running)
}

async fn end(bus: Bus, running: Running) {
    running.stop().await.expect("stop");
    closes(&bus).await;
}

/// What a handler returns is the reply, on the same connection and on another one, and a message that asks for nothing
/// is handled all the same.
pub async fn answer(cx: Cx) {
    let (bus, queue, running) = doubling(&cx, FailurePolicy::default()).await;
    for n in 0..5_u64 {
        let reply = queue.request(&n).await.expect("a reply");
        assert_eq!(reply.decode::<u64>().expect("a number"), n * 2);
    }
    queue.send(&7_u64).await.expect("sent");
    let other = cx.bus().await;
    let asked = other.queue(queue.address().name()).with_timeout(IN_TIME);
    assert_eq!(asked.request(&21_u64).await.expect("a reply").decode::<u64>().expect("a number"), 42);
    crate::drive::counted(&running, queue.address().name(), "handled", 7).await;
    assert_eq!((bus.late_replies(), other.late_replies()), (0, 0));
    closes(&other).await;
    refused(asked.request(&1_u64).await, &[ErrorKind::Closed]);
    end(bus, running).await;
}

/// A request that is given up is answered with the reason, not with silence.
pub async fn error_reply(cx: Cx) {
    let (bus, queue, running) = doubling(&cx, FailurePolicy::default()).await;
    let started = Instant::now();
    let error = refused(queue.request(&13_u64).await, &[ErrorKind::Handler, ErrorKind::Refused]);
    assert!(error.to_string().contains("thirteen is not doubled"), "{error}");
    assert_eq!(error.retry(), Retry::Never);
    let undecodable = Message::new("no number").with_content_type("application/json");
    let error = refused(queue.request_message(undecodable).await, &[ErrorKind::Handler, ErrorKind::Refused]);
    assert!(error.to_string().contains("undecodable"), "{error}");
    assert!(started.elapsed() < IN_TIME, "told, not waited for: {:?}", started.elapsed());
    assert_eq!(queue.request(&4_u64).await.expect("the next one").decode::<u64>().expect("a number"), 8);
    end(bus, running).await;
}

/// A reply that does not come in time is not waited for; when it comes, it is counted and is nobody else's reply.
pub async fn late_reply(cx: Cx) {
    let late = Gate::new(Semaphore::new(0));
    let (bus, queue, running) = doubling_at(&cx, FailurePolicy::default(), Arc::clone(&late)).await;
    let hasty = queue.with_timeout(HASTE);
    for asking in [&queue, &hasty] {
        assert_eq!(asking.request(&1_u64).await.expect("all is open").decode::<u64>().expect("a number"), 2);
    }
    let started = Instant::now();
    let asked = tokio::time::timeout(HASTE + PATIENCE, hasty.request(&1000_u64)).await.expect("not waited for");
    let error = refused(asked, &[ErrorKind::UnknownOutcome]);
    assert!(started.elapsed() >= HASTE, "{:?}: {error}", started.elapsed());
    late.add_permits(1);
    for n in 2..6_u64 {
        assert_eq!(queue.request(&n).await.expect("a reply").decode::<u64>().expect("a number"), n * 2);
    }
    if !cx.capabilities().direct {
        eventually(PATIENCE, || async {
            match bus.late_replies() {
                1 => Ok(()),
                count => Err(format!("{count} late replies, not 1")),
            }
        })
        .await;
    }
    assert_eq!(queue.request(&6_u64).await.expect("a reply").decode::<u64>().expect("a number"), 12);
    assert_eq!(bus.late_replies(), u64::from(!cx.capabilities().direct), "each reply came once");
    end(bus, running).await;
}

/// Many requests at a time, whose replies overtake each other, each get their own.
pub async fn many_at_once(cx: Cx) {
    let (bus, queue, running) = doubling(&cx, FailurePolicy::default()).await;
    let mut asking = tokio::task::JoinSet::new();
    for n in 100..200_u64 {
        let queue = queue.clone();
        asking.spawn(async move {
            // With a correlation id of the caller's: it is no one request's.
            let request = queue.message(&n).expect("encode").with_correlation_id("saga");
            (n, queue.request_message(request).await.expect("a reply").decode::<u64>().expect("a number"))
        });
    }
    let answers = asking.join_all().await;
    let wrong: Vec<_> = answers.iter().filter(|(n, doubled)| n * 2 != *doubled).collect();
    assert!(answers.len() == 100 && wrong.is_empty(), "crossed: {wrong:?}");
    end(bus, running).await;
}

/// A request that fails and is tried again is answered by the attempt that succeeds. Where the sender itself has to come
/// again, it is told so.
pub async fn answer_of_a_later_attempt(cx: Cx) {
    let capabilities = cx.capabilities();
    if !capabilities.delayed_retry.support.is_available() {
        return super::retry::refused_at_start(cx).await;
    }
    let (bus, queue, running) = doubling(&cx, retry_every(Duration::from_millis(100), 5)).await;
    let asked = queue.request(&2000_u64).await;
    if capabilities.direct {
        let error = refused(asked, &[ErrorKind::Busy]);
        assert!(matches!(error.retry(), Retry::Now | Retry::After(_)), "{error:?}");
    } else {
        assert_eq!(asked.expect("a reply").decode::<u64>().expect("a number"), 4000);
    }
    end(bus, running).await;
}

/// Without replies, a request is refused before anything is sent.
pub async fn refused_by_capability(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    refused(queue.request(&1_u64).await, &[ErrorKind::Unsupported]);
    quiet(&mut subscription).await;
}
