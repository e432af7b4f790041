//! X3: counters are what happened, no more and no less.

use std::time::Duration;

use polymq_core::{
    Attempt, ConsumerFactory, ErrorKind, Failure, Kinds, Message, Outcome, RouteStats, SendStats, State,
};
use serde::{Deserialize, Serialize};

use crate::{
    Case, Cx, PATIENCE,
    case::run,
    drive::{
        Log, bodies, counted, counts, dead_letters, publish, quiet, refused, retry_every, start, subscribe, take_acked,
    },
};

pub(super) const CASES: &[Case] = &[
    Case::new("X3_counters_equal_the_truth", run!(counters_equal_the_truth)),
    Case::new("X3_sent_equals_the_truth", run!(sent_equals_the_truth)),
];

/// What its handler does with it, by the number of the attempt.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
enum Job {
    Succeed,
    FailTwice,
    FailAlways,
    GiveUp,
    PanicOnce,
    HangOnce,
    Drop,
    DeferOnce,
}

const ATTEMPTS: u32 = 3;

async fn work(job: Job, message: Message, attempt: Attempt, log: State<Log>) -> Outcome {
    let before = log.of(&String::from_utf8_lossy(message.payload())).len();
    log.add(&message, attempt.0);
    match (job, attempt.0) {
        (Job::FailTwice, 1 | 2) | (Job::FailAlways, _) => Failure::new("as the case wants").into(),
        (Job::GiveUp, _) => Failure::permanent("as the case wants").into(),
        (Job::PanicOnce, 1) => panic!("a panic of the handler, as the case wants"),
        (Job::HangOnce, 1) => std::future::pending().await,
        (Job::Drop, _) => Outcome::drop("as the case wants"),
        (Job::DeferOnce, _) if before == 0 => Outcome::defer(Duration::ZERO),
        _ => Outcome::Ack,
    }
}

/// After a run in which everything happened that a counter counts, each counter is what was made to happen, and the
/// broker agrees.
pub async fn counters_equal_the_truth(cx: Cx) {
    let mut kinds = Kinds::new();
    kinds.bind::<Job>("job", None).expect("no conflict");
    let bus = cx.builder().kinds(kinds).connect().await.expect("connect");
    let queue = cx.queue(&bus);
    let jobs = [
        (Job::Succeed, 20),
        (Job::FailTwice, 3),
        (Job::FailAlways, 2),
        (Job::GiveUp, 2),
        (Job::PanicOnce, 1),
        (Job::HangOnce, 1),
        (Job::Drop, 2),
        (Job::DeferOnce, 1),
    ];
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).route(queue.address().name(), work);
    route.policy(retry_every(Duration::from_millis(50), ATTEMPTS)).timeout(Duration::from_millis(500));
    if let Err(error) = consumers.check() {
        // Without delayed retries there is less to count.
        return drop(refused::<()>(Err(error), &[ErrorKind::Unsupported]));
    }
    let running = start(consumers).await;
    for (job, times) in jobs {
        for _ in 0..times {
            queue.send(&job).await.expect("send");
        }
    }
    queue.send_message(Message::new("{").with_content_type("application/json").with_kind("job")).await.expect("send");
    queue.send_message(Message::new("x").with_kind("nobody's")).await.expect("send");
    // What is refused is not sent, and nothing comes of it.
    refused(queue.send_message(invalid()).await, &[ErrorKind::InvalidInput]);

    let name = queue.address().name();
    let truth = RouteStats {
        handled: 20 + 3 + 1 + 1 + 1,
        failed: 3 * 2 + 2 * u64::from(ATTEMPTS) + 2 + 1 + 1,
        retried: 3 * 2 + 2 * u64::from(ATTEMPTS - 1) + 1 + 1,
        deferred: 1,
        dead_lettered: 2 + 2 + 1 + 1,
        dropped: 2,
        undecodable: 1,
        unwanted: 1,
        panicked: 1,
        timed_out: 1,
        ..RouteStats::default()
    };
    counted(&running, name, "handled", truth.handled).await;
    counted(&running, name, "dead_lettered", truth.dead_lettered).await;
    counted(&running, name, "dropped", truth.dropped).await;
    running.stop().await.expect("stop");
    let counted = running.stats(name).expect("stats");
    assert_eq!(counted, truth, "what was counted is not what happened");
    let calls = truth.handled + truth.failed + truth.deferred + truth.dropped;
    assert_eq!(log.len() as u64, calls, "each call of the handler is one of these: {counted:?}");
    // Neither the copies for another attempt nor the dead letters were sent by anybody.
    let sent = SendStats { accepted: 32 + 2, failed: 1, unknown: 0 };
    assert_eq!(bus.sent(), [(queue.address().clone(), sent)].into(), "what was counted as sent");
    let mut letters = dead_letters(&bus, &queue).await;
    assert_eq!(take_acked(&mut letters, truth.dead_lettered as usize).await.len() as u64, truth.dead_lettered);
    quiet(&mut letters).await;
    quiet(&mut subscribe(&queue).await).await;
}

fn invalid() -> Message {
    Message::new("x").with_header("no\nheader", "x")
}

/// Each message that was given to a channel is counted once, by its outcome; those counted as accepted have arrived, and no
/// others have.
pub async fn sent_equals_the_truth(cx: Cx) {
    let bus = cx.bus().await;
    let (queue, other) = (cx.queue(&bus), cx.queue(&bus));
    publish(&other, bodies(3)).await;
    queue.send_message(Message::new("alone")).await.expect("send");
    refused(queue.send_message(invalid()).await, &[ErrorKind::InvalidInput]);
    let batch = bodies(40).enumerate().map(|(n, body)| if n % 10 == 3 { invalid() } else { Message::new(body) });
    let results = queue.with_timeout(PATIENCE).send_all(batch).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 36, "{results:?}");
    let answer = queue.enqueue(Message::new("enqueued")).await.expect("handed over");
    answer.await.expect("accepted");
    drop(refused(queue.enqueue(invalid()).await, &[ErrorKind::InvalidInput]));

    let stats = |accepted, failed| SendStats { accepted, failed, unknown: 0 };
    assert_eq!(queue.sent(), stats(1 + 36 + 1, 1 + 4 + 1), "what was counted as sent");
    let mut subscription = subscribe(&queue).await;
    let arrived = counts(take_acked(&mut subscription, 38).await);
    let expected = bodies(40).enumerate().filter(|(n, _)| n % 10 != 3).map(|(_, body)| body);
    assert_eq!(arrived, counts(expected.chain(["alone".to_owned(), "enqueued".to_owned()])));
    quiet(&mut subscription).await;
    assert_eq!(take_acked(&mut subscribe(&other).await, 3).await.len(), 3);

    let mut all = vec![(queue.address().clone(), queue.sent()), (other.address().clone(), stats(3, 0))];
    if cx.capabilities().detects_unroutable {
        // What the broker takes for a queue that is no more was not sent.
        let gone = cx.queue(&bus);
        let existing = gone.existing();
        let mut subscription = subscribe(&gone).await;
        publish(&existing, ["taken".to_owned()]).await;
        assert_eq!(take_acked(&mut subscription, 1).await, ["taken"]);
        subscription.close().await.expect("close");
        gone.delete(None).await.expect("delete");
        for _ in 0..3 {
            drop(existing.send_message(Message::new("lost")).await);
        }
        all.push((gone.address().clone(), stats(1, 3)));
    }
    assert_eq!(bus.sent(), all.into_iter().collect(), "what was counted as sent");
}
