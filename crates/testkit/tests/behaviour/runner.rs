//! The runner over a backend that misbehaves: each fault is bounded, told, and loses nothing.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Address, Answer, Attempt, Backoff, Bus, Capabilities, Completion, Connection, ConsumeOptions, Consumer,
    ConsumerFactory, ConsumerRunner, DeadLetters, Environment, Error, ErrorKind, Failure, FailurePolicy, Incoming,
    Layer, Message, NextSend, Outcome, Receipt, Registry, Result, Running, State, Token,
    dead_letter::{LAST_ERROR, REASON, SOURCE},
    memory::MemoryBackend,
};
use polymq_testkit::{
    eventually,
    twist::{Receiving, Sending, Twist, Twisted},
};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

/// A bus on a memory space of the test's own, with a fault around it.
async fn bus(space: &str, twist: impl Twist) -> Bus {
    built(space, twist, |builder| builder).await
}

async fn built(
    space: &str,
    twist: impl Twist,
    change: impl FnOnce(polymq_core::BusBuilder) -> polymq_core::BusBuilder,
) -> Bus {
    let mut registry = Registry::new();
    registry.add(Twisted::around(Arc::new(MemoryBackend), Arc::new(twist))).expect("one backend");
    let builder = Bus::builder().registry(registry).environment(Environment::default());
    change(builder.url(format!("memory://runner-{space}"))).connect().await.expect("connects")
}

#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn add(&self, entry: impl Into<String>) {
        self.0.lock().expect("no panic").push(entry.into());
    }

    fn len(&self) -> usize {
        self.0.lock().expect("no panic").len()
    }

    async fn wait(&self, count: usize) -> Vec<String> {
        eventually(24 * HOUR, || async {
            let entries = self.0.lock().expect("no panic").clone();
            if entries.len() >= count { Ok(entries) } else { Err(format!("{count} entries awaited: {entries:?}")) }
        })
        .await
    }
}

async fn log_body(message: Message, log: State<Log>) {
    log.add(String::from_utf8_lossy(message.payload()));
}

async fn send(bus: &Bus, queue: &str, body: &'static str) {
    bus.queue(queue).send_message(Message::new(body)).await.expect("sent");
}

async fn start(consumers: ConsumerFactory) -> Running {
    ConsumerRunner::new(consumers).drain_timeout(2 * SECOND).start().await.expect("starts")
}

/// A flush that is never done, as while a broker is down.
#[derive(Debug)]
struct NeverFlushes;

#[async_trait]
impl Twist for NeverFlushes {
    async fn flush(&self, _: &Sending) -> Result<()> {
        std::future::pending().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_does_not_wait_for_ever_for_a_broker_that_is_down() {
    let bus = bus("flush", NeverFlushes).await;
    let log = Log::default();
    let consumers = || {
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.state(log.clone()).route("orders", log_body);
        ConsumerRunner::new(consumers)
    };
    let running = consumers().drain_timeout(2 * SECOND).start().await.expect("starts");
    send(&bus, "orders", "one").await;
    log.wait(1).await;
    let (stopping, stopped) = (Instant::now(), timeout(HOUR, running.stop()).await);
    let error = stopped.expect("it is over some time").expect_err("nothing was flushed");
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(stopping.elapsed() < 8 * SECOND, "{:?}", stopping.elapsed());

    let running = consumers().drain_timeout(HOUR).start().await.expect("starts");
    let stopping = Instant::now();
    let force = async {
        tokio::time::sleep(SECOND).await;
        running.force();
    };
    let (stopped, ()) = tokio::join!(timeout(2 * HOUR, running.stop()), force);
    stopped.expect("it is over some time").expect_err("nothing was flushed");
    assert!(stopping.elapsed() < 8 * SECOND, "forced, and it took {:?}", stopping.elapsed());
}

/// No delay above an hour.
#[derive(Debug)]
struct ShortDelays;

impl Twist for ShortDelays {
    fn capabilities(&self, mut own: Capabilities) -> Capabilities {
        own.delayed_retry.max = Some(HOUR);
        own
    }
}

#[tokio::test(start_paused = true)]
async fn a_delay_that_the_backend_cannot_do_is_its_longest() {
    async fn handle(attempt: Attempt, calls: State<Log>) -> Outcome {
        calls.add(attempt.0.to_string());
        match calls.len() {
            1 => Outcome::retry_after(24 * HOUR, "tomorrow"),
            2 => Outcome::defer(13 * HOUR),
            _ => Outcome::Ack,
        }
    }
    let bus = bus("delays", ShortDelays).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route("orders", handle);
    let running = start(consumers).await;
    let started = Instant::now();
    send(&bus, "orders", "one").await;
    assert_eq!(log.wait(3).await, ["1", "2", "2"]);
    assert!((2 * HOUR..3 * HOUR).contains(&started.elapsed()), "{:?}", started.elapsed());
    running.stop().await.expect("stops");
}

/// A queue for dead letters that takes no copy, or none that tells an error.
#[derive(Debug)]
struct SmallLetters {
    none_at_all: bool,
}

#[async_trait]
impl Twist for SmallLetters {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        let tells = message.system_headers().get(LAST_ERROR).is_some();
        if at.address.name().ends_with(".dlq") && (self.none_at_all || tells) {
            return Completion::ready(Err(Error::new(ErrorKind::TooLarge, "too large")));
        }
        at.producer.send(message)
    }
}

async fn gives_up(_: Message, log: State<Log>) -> Result<(), Failure> {
    log.add("called");
    Err(Failure::permanent("bad customer"))
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_that_is_too_large_tells_less() {
    let bus = bus("small-letters", SmallLetters { none_at_all: false }).await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Log::default()).route("orders", gives_up);
    let running = start(consumers).await;
    send(&bus, "orders", "one").await;
    let mut letters = bus.queue("orders.dlq").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let letter = timeout(HOUR, letters.next()).await.expect("a dead letter").expect("works");
    let system = letter.message().system_headers();
    assert_eq!((system.get(REASON), system.get(SOURCE)), (Some("bad customer"), Some("queue orders")));
    letter.ack().await.expect("acked");
    running.stop().await.expect("stops");
    assert_eq!(running.stats("orders").expect("known").dead_lettered, 1);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_cannot_even_be_a_dead_letter_pauses_its_channel() {
    let bus = bus("no-letters", SmallLetters { none_at_all: true }).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route("orders", gives_up);
    let running = start(consumers).await;
    send(&bus, "orders", "one").await;
    log.wait(1).await;
    tokio::time::sleep(HOUR).await;
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.paused, stats.dead_lettered), (true, 0));
    assert_eq!(log.len(), 1, "and it is not called again and again");
    let counts = bus.queue("orders").stats(None).await.expect("counts");
    assert_eq!(counts.ready + counts.unsettled.unwrap_or(0), 1, "the message is there");
    running.stop().await.expect("stops");
}

/// Answers on the exchange itself, as HTTP does.
#[derive(Debug)]
struct Direct;

impl Twist for Direct {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities { direct: true, ..own }
    }
}

/// A layer that refuses answers for good.
#[derive(Debug)]
struct NoAnswers;

#[async_trait]
impl Layer for NoAnswers {
    async fn send(&self, message: Message, next: NextSend<'_>) -> Result<Receipt> {
        if message.payload() == &b"\"no\""[..] {
            return Err(Error::new(ErrorKind::Encode, "this may not leave"));
        }
        next.send(message).await
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_can_never_leave_does_not_stop_the_others() {
    let bus = built("answers", Direct, |builder| builder.layer(NoAnswers)).await;
    let mut consumers = ConsumerFactory::new(&bus);
    let dead_letters = DeadLetters::To(Address::queue("letters"));
    let policy = FailurePolicy { dead_letters, ..FailurePolicy::default() };
    consumers.route("questions", async |_: Message| Answer("no")).policy(policy);
    let running = start(consumers).await;
    send(&bus, "questions", "one").await;
    let mut letters = bus.queue("letters").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let letter = timeout(HOUR, letters.next()).await.expect("a dead letter").expect("works");
    let reason = letter.message().system_headers().get(REASON).unwrap_or_default();
    assert!(reason.starts_with("its answer cannot be sent") && reason.contains("this may not leave"), "{reason}");
    letter.ack().await.expect("acked");
    running.stop().await.expect("stops");
}

/// The first acknowledgement panics: an error of a backend, which no handler made.
#[derive(Debug, Default)]
struct PanicsOnce(AtomicBool);

impl Twist for PanicsOnce {
    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        assert!(self.0.swap(true, Ordering::SeqCst), "as planned");
        at.settler.ack(token)
    }
}

#[tokio::test(start_paused = true)]
async fn a_panic_outside_of_handlers_opens_the_subscription_again() {
    for concurrency in [1, 4] {
        let bus = bus(&format!("panics-{concurrency}"), PanicsOnce::default()).await;
        let log = Log::default();
        let errors = Log::default();
        let mut consumers = ConsumerFactory::new(&bus);
        let told = errors.clone();
        consumers.on_transport_error(move |_, error| told.add(error.to_string()));
        consumers.state(log.clone()).route("orders", log_body).concurrency(concurrency).ordered_by_key();
        let running = start(consumers).await;
        let queue = bus.queue("orders");
        for body in ["one", "two"] {
            queue.send_message(Message::new(body).with_key("k")).await.expect("sent");
        }
        let entries = log.wait(3).await;
        assert_eq!(
            entries,
            ["one", "one", "two"],
            "{concurrency}: not acknowledged, it comes again, and its key goes on"
        );
        let told = errors.wait(1).await;
        assert!(told[0].contains("the subscription broke off: as planned"), "{told:?}");
        running.stop().await.expect("stops");
    }
}

/// A subscription that is ended by the broker when asked to be.
#[derive(Debug, Default)]
struct Ends(Arc<Notify>);

#[async_trait]
impl Twist for Ends {
    async fn receive(
        &self,
        _: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        tokio::select! {
            biased;
            () = self.0.notified() => Err(Error::new(ErrorKind::Disconnected, "ended by the broker")),
            received = consumer.receive(max, into) => received,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscription_is_opened_again_while_a_handler_hangs() {
    async fn handle(message: Message, log: State<Log>) {
        log.add(String::from_utf8_lossy(message.payload()));
        if message.payload() == &b"hangs"[..] {
            std::future::pending::<()>().await;
        }
    }
    let end = Ends::default();
    let ends = Arc::clone(&end.0);
    let bus = bus("hangs", end).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route("orders", handle).concurrency(2);
    let running = start(consumers).await;
    send(&bus, "orders", "hangs").await;
    log.wait(1).await;
    ends.notify_one();
    tokio::time::sleep(SECOND).await;
    send(&bus, "orders", "two").await;
    send(&bus, "orders", "three").await;
    assert_eq!(timeout(HOUR, log.wait(3)).await.expect("opened again"), ["hangs", "two", "three"]);
    assert_eq!(running.stats("orders").expect("known").running, 1, "the one that hangs still has its place");
    running.stop().await.expect("stops");
}

/// Opening takes its time; that of "broken" fails, and so does each flush.
#[derive(Debug)]
struct SlowToOpen;

#[async_trait]
impl Twist for SlowToOpen {
    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        tokio::time::sleep(SECOND).await;
        if address.name() == "broken" {
            return Err(Error::new(ErrorKind::PermissionDenied, "not for you"));
        }
        connection.consumer(address, options).await
    }

    async fn flush(&self, _: &Sending) -> Result<()> {
        Err(Error::new(ErrorKind::Disconnected, "not flushed"))
    }
}

#[tokio::test(start_paused = true)]
async fn a_channel_is_attached_once_however_many_try() {
    let bus = bus("attach", SlowToOpen).await;
    let log = Log::default();
    let consumers = |queue: &'static str| {
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.state(log.clone()).route(queue, log_body);
        consumers
    };
    let running = start(consumers("others")).await;
    let outcomes = tokio::join!(running.attach(consumers("orders")), running.attach(consumers("orders")));
    let errors: Vec<_> =
        [outcomes.0, outcomes.1].into_iter().filter_map(Result::err).map(|error| error.kind()).collect();
    assert_eq!(errors, [ErrorKind::Conflict]);
    assert_eq!(bus.queue("orders").stats(None).await.expect("counts").consumers, 1, "no other is left behind");
    running.stop().await.expect("stops");
    assert_eq!(bus.queue("orders").stats(None).await.expect("counts").consumers, 0);
}

#[tokio::test(start_paused = true)]
async fn a_start_that_fails_tells_why() {
    let bus = bus("start", SlowToOpen).await;
    send(&bus, "orders", "one").await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Log::default());
    consumers.route("all", log_body);
    consumers.route("broken", log_body);
    let error = ConsumerRunner::new(consumers).start().await.expect_err("one of them is broken");
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
}

/// The first message that is returned for another attempt was taken back by the broker before.
#[derive(Debug, Default)]
struct StaleOnce(AtomicBool);

impl Twist for StaleOnce {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if self.0.swap(true, Ordering::SeqCst) {
            return at.settler.retry(token, message, attempt, after);
        }
        Completion::ready(Err(Error::new(ErrorKind::Stale, "taken back")))
    }
}

#[tokio::test(start_paused = true)]
async fn a_retry_that_did_not_happen_is_not_counted() {
    async fn fails_twice(log: State<Log>) -> Result<(), Failure> {
        log.add("called");
        if log.len() < 3 { Err(Failure::new("not yet")) } else { Ok(()) }
    }
    let bus = bus("stale", StaleOnce::default()).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let policy = FailurePolicy { backoff: Backoff::fixed(SECOND), ..FailurePolicy::default() };
    consumers.state(log.clone()).route("orders", fails_twice).policy(policy);
    let running = start(consumers).await;
    send(&bus, "orders", "one").await;
    log.wait(3).await;
    running.stop().await.expect("stops");
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.failed, stats.retried, stats.handled), (2, 1, 1));
}

/// Where messages should wait for their next attempt may not be made, or only later.
#[derive(Debug)]
struct NowhereToWait {
    refused: AtomicUsize,
    most: usize,
}

impl Twist for NowhereToWait {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if self.refused.fetch_add(1, Ordering::SeqCst) < self.most {
            return Completion::ready(Err(Error::new(ErrorKind::PermissionDenied, "not for you")));
        }
        at.settler.retry(token, message, attempt, after)
    }
}

/// A queue does not stand still for ever because of one message.
#[tokio::test(start_paused = true)]
async fn what_may_never_be_tried_again_is_a_dead_letter_and_what_may_later_is_tried_again() {
    async fn fails_once(message: Message, log: State<Log>) -> Result<(), Failure> {
        log.add(String::from_utf8_lossy(message.payload()).into_owned());
        if log.len() == 1 { Err(Failure::new("not yet")) } else { Ok(()) }
    }
    for (space, most, handled) in [("nowhere", usize::MAX, ["one", "two"]), ("later", 3, ["one", "one"])] {
        let bus = bus(space, NowhereToWait { refused: AtomicUsize::new(0), most }).await;
        let log = Log::default();
        let mut consumers = ConsumerFactory::new(&bus);
        let policy = FailurePolicy { backoff: Backoff::fixed(SECOND), ..FailurePolicy::default() };
        consumers.state(log.clone()).route("orders", fails_once).policy(policy);
        let running = start(consumers).await;
        send(&bus, "orders", "one").await;
        if most == usize::MAX {
            send(&bus, "orders", "two").await;
        }
        assert_eq!(timeout(HOUR, log.wait(2)).await.expect("goes on"), handled, "{space}");
        running.stop().await.expect("stops");
        let letters = bus.queue("orders.dlq").peek(None, 10).await.expect("looks");
        let bodies: Vec<_> = letters.iter().map(|letter| letter.payload().to_vec()).collect();
        let expected: &[&[u8]] = if most == usize::MAX { &[b"one"] } else { &[] };
        assert_eq!(bodies, expected, "{space}");
    }
}
