//! R3 to R6 and R8: dead letters through the runner.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Address, Attempt, Bus, Channel, Completion, ConsumerFactory, Error, ErrorKind, Failure, FailurePolicy, Fate, Kinds,
    Layer, Message, NextHandle, Outcome, Receipt, State, Support, Token, dead_letter, replay_dead_letters,
    serializers::Limits,
};

use crate::{
    Case, Cx, PATIENCE, QUIET,
    case::run,
    cx::lock,
    drive::{
        Log, bodies, counted, dead_letters, in_order, next, publish, quiet, refused, retry_every, start, subscribe,
        take_acked, text,
    },
    eventually, try_eventually,
    twist::{Receiving, Sending, Twist, Twisted},
};

pub(super) const CASES: &[Case] = &[
    Case::new("R3_exhausted_once", run!(exhausted_once)),
    Case::new("R4_dead_letters_down", run!(dead_letters_down)),
    Case::new("R5_crash_before_ack", run!(crash_before_ack)),
    Case::new("R6_undecodable", run!(undecodable)),
    Case::new("R6_oversize", run!(oversize)),
    Case::new("R6_unknown_kind", run!(unknown_kind)),
    Case::new("R6_wrong_signature", run!(wrong_signature)),
    Case::new("R6_expired", run!(expired)),
    Case::new("R8_replay", run!(replay)),
];

const SHORT: Duration = Duration::from_millis(100);

async fn fail(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
    log.add(&message, attempt.0);
    Err(Failure::new(format!("attempt {} failed", attempt.0)))
}

async fn accept(message: Message, attempt: Attempt, log: State<Log>) {
    log.add(&message, attempt.0);
}

fn rich(body: &str) -> Message {
    Message::new(body.to_owned())
        .with_id(format!("id of {body}"))
        .with_content_type("text/plain")
        .with_kind("order.created")
        .with_version(3)
        .with_key("key-1")
        .with_correlation_id("saga-1")
        .with_header("tenant", "acme é")
}

#[track_caller]
fn assert_same(letter: &Message, sent: &Message) {
    assert_eq!((letter.id(), letter.payload()), (sent.id(), sent.payload()));
    assert_eq!(
        (letter.content_type(), letter.kind(), letter.version()),
        (sent.content_type(), sent.kind(), sent.version())
    );
    assert_eq!((letter.key(), letter.correlation_id()), (sent.key(), sent.correlation_id()));
    assert_eq!(letter.headers(), sent.headers());
}

/// After the last attempt there is exactly one dead letter: the original, with reason, attempts, errors and source.
pub async fn exhausted_once(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let sent = rich("doomed");
    queue.send_message(sent.clone()).await.expect("send");
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), fail).policy(retry_every(SHORT, 3));
    let running = start(consumers).await;
    let mut letters = dead_letters(&bus, &queue).await;
    let letter = next(&mut letters).await;
    assert_same(letter.message(), &sent);
    let known = letter.message().system_headers();
    assert!(known.get(dead_letter::REASON).is_some_and(|reason| reason.contains("attempt 3 failed")), "the reason");
    assert_eq!(known.get(dead_letter::ATTEMPTS), Some("3"));
    assert_eq!(known.get(dead_letter::FIRST_ERROR), Some("attempt 1 failed"));
    assert_eq!(known.get(dead_letter::LAST_ERROR), Some("attempt 3 failed"));
    assert_eq!(known.get(dead_letter::SOURCE), Some(queue.address().to_string().as_str()));
    assert!(known.get(dead_letter::DEAD_AT).is_some());
    assert_eq!(letter.attempt(), 1, "the count starts afresh in the dead-letter queue");
    letter.ack().await.expect("ack");
    quiet(&mut letters).await;
    running.stop().await.expect("stop");
    assert_eq!(log.len(), 3, "three attempts are allowed");
    quiet(&mut subscribe(&queue).await).await;
}

/// Sends to a dead-letter queue fail while this is set.
#[derive(Debug, Default)]
struct LettersDown {
    down: AtomicBool,
    refused: AtomicUsize,
}

#[async_trait]
impl Twist for LettersDown {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if at.address.name().ends_with(".dlq") && self.down.load(Ordering::SeqCst) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Completion::ready(Err(Error::new(ErrorKind::Disconnected, "the dead-letter queue is down")));
        }
        at.producer.send(message)
    }
}

/// While the dead-letter queue is down, the message stays unacknowledged and moving it is tried again: nothing is
/// lost, the others go on, and there is one dead letter in the end.
pub async fn dead_letters_down(cx: Cx) {
    async fn fail_first(message: Message, attempt: Attempt, log: State<Log>) -> Result<(), Failure> {
        log.add(&message, attempt.0);
        if &message.payload()[..] == b"m-000000" { Err(Failure::permanent("bad")) } else { Ok(()) }
    }
    let fault = Arc::new(LettersDown { down: AtomicBool::new(true), ..LettersDown::default() });
    let twist = Arc::clone(&fault);
    let bus = cx.builder_around(cx.harness().url(None), |backend| Twisted::around(backend, twist)).connect().await;
    let bus = bus.expect("connect");
    let queue = cx.queue(&bus);
    publish(&queue, bodies(5)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), fail_first).concurrency(2).policy(retry_every(SHORT, 3));
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "handled", 4).await;
    eventually(PATIENCE, || async {
        let refused = fault.refused.load(Ordering::SeqCst);
        if refused >= 2 { Ok(()) } else { Err(format!("moving it was tried {refused} times")) }
    })
    .await;
    let mut letters = dead_letters(&bus, &queue).await;
    quiet(&mut letters).await;
    fault.down.store(false, Ordering::SeqCst);
    assert_eq!(take_acked(&mut letters, 1).await, ["m-000000"]);
    quiet(&mut letters).await;
    running.stop().await.expect("stop");
    assert_eq!(log.of("m-000000").len(), 1, "moving it again is no further attempt");
    quiet(&mut subscribe(&queue).await).await;
}

/// The first acknowledgement after a dead letter was sent is lost, as if the process had died between the two.
#[derive(Debug, Default)]
struct DiesBeforeAck {
    letters: AtomicUsize,
    died: AtomicBool,
    /// The consumer and token that were lost: its connection has returned it already.
    lost: std::sync::Mutex<Option<(u64, Token)>>,
    messages: std::sync::Mutex<BTreeMap<(u64, u64), Message>>,
}

#[async_trait]
impl Twist for DiesBeforeAck {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if at.address.name().ends_with(".dlq") {
            self.letters.fetch_add(1, Ordering::SeqCst);
        }
        at.producer.send(message)
    }

    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn polymq_core::Consumer,
        max: usize,
        into: &mut Vec<polymq_core::Incoming>,
    ) -> polymq_core::Result<()> {
        consumer.receive(max, into).await?;
        let received = into.iter().map(|incoming| ((at.id, incoming.token.0), incoming.message.clone()));
        lock(&self.messages).extend(received);
        Ok(())
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        let letters = self.letters.load(Ordering::SeqCst);
        if letters > 0 && !at.address.name().ends_with(".dlq") && !self.died.swap(true, Ordering::SeqCst) {
            let message = lock(&self.messages).remove(&(at.id, token.0)).expect("a message that was received");
            at.settler.release(token, message);
            *lock(&self.lost) = Some((at.id, token));
            return Completion::ready(Err(Error::new(ErrorKind::Stale, "the connection was lost")));
        }
        at.settler.ack(token)
    }

    fn release(&self, at: &Receiving, token: Token, message: Message) {
        // Tokens may be used again: only the first release after the loss is for what was lost.
        if lock(&self.lost).take_if(|lost| *lost == (at.id, token)).is_none() {
            at.settler.release(token, message);
        }
    }
}

/// A crash between the dead letter and the acknowledgement gives at most one copy more, with the same id.
pub async fn crash_before_ack(cx: Cx) {
    let twist = Arc::new(DiesBeforeAck::default());
    let fault = Arc::clone(&twist);
    let bus = cx.builder_around(cx.harness().url(None), |backend| Twisted::around(backend, fault)).connect().await;
    let bus = bus.expect("connect");
    let queue = cx.queue(&bus);
    queue.send_message(rich("doomed")).await.expect("send");
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Log::default()).route(queue.address().name(), fail).policy(retry_every(SHORT, 2));
    let running = start(consumers).await;
    eventually(PATIENCE, || async {
        let sent = twist.letters.load(Ordering::SeqCst);
        if twist.died.load(Ordering::SeqCst) && sent >= 2 { Ok(()) } else { Err(format!("{sent} dead letters")) }
    })
    .await;
    let mut letters = dead_letters(&bus, &queue).await;
    // One after the other: where keys are in order, the one that is held blocks the other, unless they came together.
    for which in ["the first", "its copy"] {
        let letter = next(&mut letters).await;
        assert_eq!(letter.message().id(), rich("doomed").id(), "{which} has the id of the message");
        letter.ack().await.expect("ack");
    }
    quiet(&mut letters).await;
    running.stop().await.expect("stop");
    quiet(&mut subscribe(&queue).await).await;
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Order {
    id: u64,
}

async fn typed(order: Order, log: State<Log>) {
    log.add(&Message::new(order.id.to_string()), 1);
}

/// Sends a good message, a bad one and a good one, with the bad one's fate being a dead letter, then again with its
/// fate being dropped; gives what the reason was.
async fn bad_between_good(
    cx: &Cx,
    bus: &Bus,
    bad: Message,
    drop: fn(&mut FailurePolicy),
    register: fn(&mut ConsumerFactory, &Channel, &Log, FailurePolicy),
) -> String {
    let mut reason = String::new();
    for fate in [Fate::DeadLetter, Fate::Drop] {
        let queue = cx.queue(bus);
        let mut policy = retry_every(Duration::from_secs(60), 5);
        if fate == Fate::Drop {
            drop(&mut policy);
        }
        let log = Log::default();
        let good = |id: u64| queue.message(&Order { id }).expect("encode").with_kind("order");
        let mut expected = bad.clone().with_id("the bad one");
        for message in [good(1), expected.clone(), good(2)] {
            queue.send_message(message).await.expect("send");
        }
        let mut consumers = ConsumerFactory::new(bus);
        register(&mut consumers, &queue, &log, policy);
        let running = start(consumers).await;
        counted(&running, queue.address().name(), "handled", 2).await;
        let what = if fate == Fate::Drop { "dropped" } else { "dead_lettered" };
        counted(&running, queue.address().name(), what, 1).await;
        running.stop().await.expect("stop");
        assert_eq!(in_order(cx, log.bodies()), ["1", "2"], "the good ones are handled, in order");
        let mut letters = dead_letters(bus, &queue).await;
        if fate == Fate::DeadLetter {
            let letter = next(&mut letters).await;
            expected = expected.without_expires_at();
            assert_same(letter.message(), &expected);
            let known = letter.message().system_headers();
            known.get(dead_letter::REASON).expect("a reason").clone_into(&mut reason);
            assert_eq!(known.get(dead_letter::ATTEMPTS), Some("1"), "it is not retried");
            letter.ack().await.expect("ack");
        }
        quiet(&mut letters).await;
        quiet(&mut subscribe(&queue).await).await;
    }
    reason
}

fn register_typed(consumers: &mut ConsumerFactory, queue: &Channel, log: &Log, policy: FailurePolicy) {
    consumers.state(log.clone()).route(queue.address().name(), typed).policy(policy);
}

/// A body that cannot be decoded goes its own way at once, between two good ones that are handled.
pub async fn undecodable(cx: Cx) {
    let bus = cx.bus().await;
    for bad in [
        Message::new("{\"id\": ").with_content_type("application/json"),
        Message::new("{\"id\": 3}"),
        Message::new("{\"id\": 3}").with_content_type("application/x-unknown"),
    ] {
        let reason = bad_between_good(&cx, &bus, bad, |policy| policy.undecodable = Fate::Drop, register_typed).await;
        assert!(reason.contains("undecodable"), "{reason}");
    }
}

/// A body above the limit of decoding goes its own way, undecoded.
pub async fn oversize(cx: Cx) {
    let limits = Limits { max_bytes: 64, ..Limits::default() };
    let bus = cx.builder().limits(limits).connect().await.expect("connect");
    let bad = Message::new(format!("{{\"id\": 3{}}}", " ".repeat(100))).with_content_type("application/json");
    let reason = bad_between_good(&cx, &bus, bad, |policy| policy.oversize = Fate::Drop, register_typed).await;
    assert!(reason.contains("undecodable"), "{reason}");
}

/// A kind that no handler takes goes its own way, and its body is not looked at.
pub async fn unknown_kind(cx: Cx) {
    let mut kinds = Kinds::new();
    kinds.bind::<Order>("order", None).expect("no conflict");
    let bus = cx.builder().kinds(kinds).connect().await.expect("connect");
    let bad = Message::new("not looked at").with_kind("invoice").with_version(2);
    let reason = bad_between_good(&cx, &bus, bad, |policy| policy.unwanted = Fate::Drop, register_typed).await;
    assert!(reason.contains("no handler") && reason.contains("invoice") && reason.contains('2'), "{reason}");
}

/// Does not believe messages whose signature is wrong; good ones have none in this test.
#[derive(Debug)]
struct Signed;

#[async_trait]
impl Layer for Signed {
    async fn handle(&self, message: Message, next: NextHandle<'_>) -> Outcome {
        match message.headers().get("signature") {
            None => next.handle(message).await,
            Some(_) => Outcome::untrusted("the signature is wrong"),
        }
    }
}

/// A message that a layer does not believe, such as one with a wrong signature, goes its own way and reaches no handler.
pub async fn wrong_signature(cx: Cx) {
    let bus = cx.builder().layer(Signed).connect().await.expect("connect");
    let bad = Message::new("{\"id\": 3}").with_content_type("application/json").with_header("signature", "forged");
    let reason = bad_between_good(&cx, &bus, bad, |policy| policy.untrusted = Fate::Drop, register_typed).await;
    assert!(reason.contains("not believed: the signature is wrong"), "{reason}");
}

/// A message whose time has passed reaches no handler and is a dead letter once; where the broker itself looks at the time, it
/// may have taken it away instead.
pub async fn expired(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let short = Message::new("short-lived").expires_in(Duration::from_secs(1));
    queue.send_message(short).await.expect("send");
    queue.send_message(Message::new("long-lived").expires_in(Duration::from_secs(600))).await.expect("send");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), accept);
    let running = start(consumers).await;
    counted(&running, queue.address().name(), "handled", 1).await;
    let by_the_broker = cx.capabilities().expiry == Support::Native;
    // Where the broker may have taken it away, none need come; if it comes, then soon, unless the order is not kept.
    let patience = match cx.capabilities().order {
        _ if !by_the_broker => PATIENCE,
        polymq_core::Order::None => Duration::from_secs(20),
        _ => Duration::from_secs(2),
    };
    let counted = try_eventually(patience, || async {
        let stats = running.stats(queue.address().name()).expect("stats");
        if stats.expired > 0 { Ok(()) } else { Err(format!("the expired one is not counted: {stats:?}")) }
    });
    let counted = counted.await;
    running.stop().await.expect("stop");
    assert_eq!(log.bodies(), ["long-lived"]);
    let stats = running.stats(queue.address().name()).expect("stats");
    assert!(stats.expired <= 1, "one has expired: {stats:?}");
    if !by_the_broker {
        counted.unwrap_or_else(|why| panic!("nobody else looks at the time: {why}"));
    }
    let mut letters = dead_letters(&bus, &queue).await;
    for _ in 0..stats.expired {
        let letter = next(&mut letters).await;
        assert_eq!((text(&letter).as_str(), letter.message().expires_at()), ("short-lived", None));
        assert_eq!(letter.message().system_headers().get(dead_letter::REASON), Some("expired"));
        letter.ack().await.expect("ack");
    }
    cx.note(if stats.expired == 0 {
        "the broker took the expired one away"
    } else {
        "it came and was counted as expired"
    });
    // A broker that takes it away may make it a dead letter itself.
    let theirs = letters.receive(10, QUIET).await.expect("receive");
    let most = usize::from(by_the_broker && stats.expired == 0);
    assert!(theirs.len() <= most && theirs.iter().all(|letter| text(letter) == "short-lived"), "{theirs:?}");
    for letter in theirs {
        letter.ack().await.expect("ack");
    }
    quiet(&mut subscribe(&queue).await).await;
}

/// Dead letters that are sent back are what they were, with attempt 1, and each leaves the dead letters once.
pub async fn replay(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), fail).policy(retry_every(SHORT, 2));
    let running = start(consumers).await;
    let sent: Vec<Message> = (0..5).map(|n| rich(&format!("doomed {n}"))).collect();
    for message in &sent {
        queue.send_message(message.clone()).await.expect("send");
    }
    counted(&running, queue.address().name(), "dead_lettered", 5).await;
    running.stop().await.expect("stop");
    for (most, patience) in [(2, PATIENCE), (3, PATIENCE), (100, Duration::from_secs(2))] {
        let replayed = replay_dead_letters(&bus, queue.address(), most, patience).await.expect("replay");
        assert_eq!(replayed, if most < 100 { most } else { 0 });
    }
    let mut subscription = subscribe(&queue).await;
    let mut bodies = Vec::new();
    for _ in 0..5 {
        let delivery = next(&mut subscription).await;
        let original =
            sent.iter().find(|message| message.id() == delivery.message().id()).expect("an id that was sent");
        assert_same(delivery.message(), original);
        assert_eq!(delivery.attempt(), 1, "attempts start afresh");
        let left: Vec<_> = delivery.message().system_headers().iter().map(|(name, _)| name).collect();
        assert_eq!(left, [dead_letter::REPLAYED_AT], "nothing of the dead letter is left");
        bodies.push(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    bodies.sort();
    bodies.dedup();
    assert_eq!(bodies.len(), 5, "each once");
    quiet(&mut subscription).await;
    quiet(&mut dead_letters(&bus, &queue).await).await;
    if cx.capabilities().topics {
        let topic = Address::topic(cx.topic_name(&[]));
        refused(replay_dead_letters(&bus, &topic, 1, PATIENCE).await, &[ErrorKind::Unsupported]);
    }
}
