//! Sending: what `Ok` means, what each error means, and what bounds it. A stub stands for brokers that misbehave.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::common::{bus, order};
use async_trait::async_trait;
use polymq_core::{
    Address, Answer, Backend, Backoff, Bus, Capabilities, Completion, Connection, ConsumeOptions, Consumer,
    ConsumerFactory, ConsumerRunner, Environment, Error, ErrorKind, Failure, FailurePolicy, HealthReporter,
    HealthWatch, Identity, Key, Message, ProduceOptions, Producer, Receipt, Registry, Result, Retry, SENDER_CLIENT,
    SENDER_COMPONENT, SENDER_VERSION, SendStats, Settings, WhenFull,
};

/// What the stub does with a message.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Behaviour {
    /// Takes it and never answers.
    Silent,
    /// Never takes it, as while a connection is down.
    Stuck,
    /// Takes the first one, then loses the connection; answers later ones. Knows ids, like a broker that deduplicates.
    CutsAfterReceipt,
    /// Answers after a second.
    Slow,
    /// Is built on another backend, whose errors name that one.
    Borrowed,
    /// Answers after as many milliseconds as the body says, or never; half of a window is best waited for at once.
    Together,
}

#[derive(Debug)]
struct Stub {
    behaviour: Behaviour,
    health: HealthReporter,
    state: Arc<State>,
}

#[derive(Debug, Default)]
struct State {
    taken: Mutex<Vec<String>>,
    in_flight: AtomicUsize,
    most: AtomicUsize,
}

#[derive(Debug)]
struct StubProducer(Behaviour, Arc<State>);

#[async_trait]
impl Producer for StubProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        if self.0 == Behaviour::Borrowed {
            return Completion::ready(Err(of_another("refused")));
        }
        let (completer, completion) = Completion::queued();
        let id = message.id().cloned().expect("an id was given");
        let millis: Option<u64> = String::from_utf8_lossy(message.payload()).parse().ok();
        let (behaviour, state) = (self.0, Arc::clone(&self.1));
        let now = state.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        state.most.fetch_max(now, Ordering::SeqCst);
        tokio::spawn(async move {
            if behaviour == Behaviour::Stuck {
                tokio::time::sleep(Duration::from_secs(3600)).await;
            }
            if !completer.hand_over() {
                return;
            }
            let mut known = true;
            let first = {
                let mut taken = state.taken.lock().expect("not poisoned");
                if !taken.contains(&id.to_string()) {
                    taken.push(id.to_string());
                    known = false;
                }
                taken.len() == 1 && !known
            };
            match behaviour {
                Behaviour::Silent => std::future::pending().await,
                // Dropping the completer after the hand-over is what a lost connection does.
                Behaviour::CutsAfterReceipt if first => return,
                Behaviour::Slow => tokio::time::sleep(Duration::from_secs(1)).await,
                Behaviour::Together => match millis {
                    Some(millis) => tokio::time::sleep(Duration::from_millis(millis)).await,
                    None => std::future::pending().await,
                },
                Behaviour::CutsAfterReceipt | Behaviour::Stuck | Behaviour::Borrowed => {}
            }
            state.in_flight.fetch_sub(1, Ordering::SeqCst);
            completer.complete(Ok(Receipt { id, broker_id: Some("7".into()) }));
        });
        completion
    }

    fn answered_together(&self, window: usize) -> usize {
        if self.0 == Behaviour::Together { window / 2 } else { 1 }
    }

    async fn flush(&self) -> Result<()> {
        if self.0 == Behaviour::Borrowed { Err(of_another("not flushed")) } else { Ok(()) }
    }

    async fn close(&self) -> Result<()> {
        self.flush().await
    }
}

fn of_another(what: &'static str) -> Error {
    Error::new(ErrorKind::Refused, what).with_backend("another")
}

impl Stub {
    fn answer(&self) -> Result<()> {
        if self.behaviour == Behaviour::Borrowed { Err(of_another("asked")) } else { Ok(()) }
    }
}

#[async_trait]
impl Connection for Stub {
    fn backend(&self) -> &'static str {
        "stub"
    }

    fn capabilities(&self) -> &Capabilities {
        static CAPABILITIES: std::sync::LazyLock<Capabilities> =
            std::sync::LazyLock::new(|| Capabilities { queues: true, ..Capabilities::default() });
        &CAPABILITIES
    }

    fn health(&self) -> HealthWatch {
        self.health.watch()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        if address.name().contains('?') { Err(of_another("a name with a question mark")) } else { Ok(()) }
    }

    async fn producer(&self, _: &Address, _: &ProduceOptions) -> Result<Box<dyn Producer>> {
        Ok(Box::new(StubProducer(self.behaviour, Arc::clone(&self.state))))
    }

    async fn consumer(&self, _: &Address, _: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        Err(Error::unsupported("stub", "consuming"))
    }

    async fn declare(&self, _: &Address, _: &ConsumeOptions) -> Result<()> {
        self.answer()
    }

    async fn delete(&self, _: &Address, _: Option<&str>) -> Result<()> {
        self.answer()
    }

    async fn ping(&self) -> Result<()> {
        self.answer()
    }

    async fn close(&self) -> Result<()> {
        self.answer()
    }
}

#[derive(Debug)]
struct StubBackend(Behaviour, Arc<State>);

#[async_trait]
impl Backend for StubBackend {
    fn name(&self) -> &'static str {
        "stub"
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["stub"]
    }

    fn keys(&self) -> &'static [Key] {
        &[]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn check(&self, _: &Settings) -> Result<()> {
        Ok(())
    }

    async fn connect(&self, _: &Settings) -> Result<Arc<dyn Connection>> {
        let health = HealthReporter::new();
        if self.0 != Behaviour::Stuck {
            health.up();
        }
        Ok(Arc::new(Stub { behaviour: self.0, health, state: Arc::clone(&self.1) }))
    }
}

async fn stub(behaviour: Behaviour) -> (Bus, Arc<State>) {
    let state = Arc::new(State::default());
    let mut registry = Registry::new();
    registry.add(Arc::new(StubBackend(behaviour, Arc::clone(&state)))).expect("free");
    let builder = Bus::builder().registry(registry).backend("stub").environment(Environment::default());
    (builder.connect().await.expect("connects"), state)
}

#[tokio::test(start_paused = true)]
async fn b3_while_the_broker_is_away_nothing_is_reported_sent() {
    let (bus, state) = stub(Behaviour::Stuck).await;
    let queue = bus.queue("orders").with_timeout(Duration::from_secs(2));
    let started = tokio::time::Instant::now();
    let error = queue.send(&order(1)).await.expect_err("not sent");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Disconnected, Retry::Now));
    assert!(started.elapsed() < Duration::from_secs(3));
    let text = error.to_string();
    assert_eq!(text, "stub: send \"orders\": not sent within 2s (down: not connected yet)");
    tokio::time::sleep(Duration::from_secs(7200)).await;
    assert!(state.taken.lock().expect("not poisoned").is_empty(), "what was reported as not sent is never sent");
}

#[tokio::test(start_paused = true)]
async fn b4_no_answer_is_an_unknown_outcome() {
    let (bus, state) = stub(Behaviour::Silent).await;
    let error = bus.queue("orders").with_timeout(Duration::from_secs(2)).send(&order(1)).await.expect_err("no answer");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::UnknownOutcome, Retry::UnknownOutcome));
    assert_eq!(state.taken.lock().expect("not poisoned").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn f23_an_unknown_outcome_is_repeated_only_under_an_id_of_the_callers() {
    let backoff = Backoff::fixed(Duration::from_millis(10));
    let (bus, state) = stub(Behaviour::CutsAfterReceipt).await;
    let error = bus.queue("orders").with_repeats(3, backoff).send(&order(1)).await.expect_err("not repeated");
    assert_eq!(error.kind(), ErrorKind::UnknownOutcome);
    assert_eq!(state.taken.lock().expect("not poisoned").len(), 1);

    let (bus, state) = stub(Behaviour::CutsAfterReceipt).await;
    let queue = bus.queue("orders").with_repeats(3, backoff);
    let message = queue.message(&order(1)).expect("encodes").with_id("order-1");
    let receipt = queue.send_message(message).await.expect("sent at the second attempt");
    assert_eq!(receipt.id.to_string(), "order-1");
    assert_eq!(*state.taken.lock().expect("not poisoned"), ["order-1"], "one copy");
}

#[tokio::test(start_paused = true)]
async fn b18_the_window_bounds_what_is_in_flight() {
    let (bus, state) = stub(Behaviour::Slow).await;
    let queue = bus.queue("orders").with_window(8, WhenFull::Wait);
    let sends = (0..40).map(|id| {
        let queue = queue.clone();
        tokio::spawn(async move { queue.send(&order(id)).await })
    });
    for send in sends.collect::<Vec<_>>() {
        send.await.expect("no panic").expect("sent");
    }
    assert_eq!(state.most.load(Ordering::SeqCst), 8);

    let refusing = bus.queue("orders").with_window(2, WhenFull::Refuse);
    let results = futures_util::future::join_all((0..5).map(|id| {
        let refusing = refusing.clone();
        async move { refusing.send(&order(id)).await }
    }))
    .await;
    let refused = results.iter().filter(|result| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy));
    assert_eq!(refused.count(), 3);

    state.most.store(0, Ordering::SeqCst);
    let messages = (0..40).map(|id| queue.message(&order(id)).expect("encodes"));
    assert!(queue.send_all(messages).await.iter().all(Result::is_ok));
    assert_eq!(state.most.load(Ordering::SeqCst), 8, "a sliding window");
}

#[tokio::test]
async fn b16_an_oversize_body_is_refused_with_both_sizes() {
    let bus = Bus::builder().url("memory://b16?max_payload=1000").environment(Environment::default());
    let bus = bus.connect().await.expect("connects");
    let queue = bus.queue("orders");
    queue.send_message(Message::new(vec![0; 1000])).await.expect("fits");
    let error = queue.send_message(Message::new(vec![0; 1001])).await.expect_err("too large");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::TooLarge, Retry::Never));
    assert!(error.to_string().contains("1001 bytes, at most 1000 bytes"), "{error}");
    assert_eq!(queue.stats(None).await.expect("counts").ready, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn b19_many_tasks_share_one_producer() {
    let bus = bus("b19").await;
    let queue = bus.queue("orders");
    let tasks = (0..64).map(|task| {
        let queue = queue.clone();
        tokio::spawn(async move {
            for n in 0..100 {
                queue.send(&order(task * 100 + n)).await.expect("sent");
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("no panic");
    }
    let mut subscription =
        queue.subscribe(ConsumeOptions { prefetch: 10_000, ..Default::default() }).await.expect("subscribes");
    let mut ids = std::collections::BTreeSet::new();
    while ids.len() < 6_400 {
        for delivery in subscription.receive(1000, Duration::from_secs(5)).await.expect("works") {
            ids.insert(delivery.message().payload().to_vec());
            delivery.ack().await.expect("acked");
        }
    }
    assert_eq!(queue.stats(None).await.expect("counts").ready, 0);
}

#[tokio::test]
async fn b20_the_sender_is_on_every_message() {
    let identity = Identity { component: "billing".into(), version: "1.2".into(), client_id: "billing-0".into() };
    let bus = Bus::builder().url("memory://b20").environment(Environment::default()).identity(identity);
    let bus = bus.connect().await.expect("connects");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    let mut subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let delivery = subscription.next().await.expect("received");
    let headers = delivery.message().headers();
    assert_eq!(headers.get(SENDER_COMPONENT), Some("billing"));
    assert_eq!(headers.get(SENDER_VERSION), Some("1.2"));
    assert_eq!(headers.get(SENDER_CLIENT), Some("billing-0"));
    delivery.ack().await.expect("acked");
}

#[tokio::test]
async fn a10_an_option_that_the_backend_cannot_honour_is_refused() {
    let (bus, state) = stub(Behaviour::Slow).await;
    let queue = bus.queue("orders");
    let later = queue.message(&order(1)).expect("encodes").deliver_in(Duration::from_secs(5));
    let error = queue.send_message(later).await.expect_err("no delay");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().starts_with("stub: send \"orders\": the backend cannot do this: "), "{error}");
    let options = ConsumeOptions { group: Some("g".into()), ..ConsumeOptions::default() };
    let error = bus.topic("t").subscribe(options).await.expect_err("no topics");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(state.taken.lock().expect("not poisoned").is_empty());
}

#[tokio::test]
async fn a6_code_overrides_the_environment() {
    let environment: Environment = [("POLYMQ_BACKEND", "stub"), ("POLYMQ_URL", "stub://nowhere")].into_iter().collect();
    let bus = Bus::builder().backend("memory").environment(environment).connect().await.expect("connects");
    assert_eq!(bus.backend(), "memory");
}

#[tokio::test]
async fn a8_the_default_bus_is_injectable() {
    let error = Bus::current().expect_err("none is set");
    assert_eq!(error.kind(), ErrorKind::Config);
    Bus::set_current(Some(bus("a8").await));
    Bus::current().expect("set").queue("orders").send(&order(1)).await.expect("sent");
    assert_eq!(bus("a8").await.queue("orders").stats(None).await.expect("counts").ready, 1);
    Bus::set_current(None);
    assert!(Bus::current().is_err());
}

#[tokio::test]
async fn l4_after_close_everything_is_a_typed_error() {
    let bus = bus("l4").await;
    let queue = bus.queue("orders");
    queue.send(&order(1)).await.expect("sent");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let delivery = subscription.next().await.expect("received");
    bus.close().await.expect("closes");
    bus.close().await.expect("a second call does nothing");
    assert_eq!(queue.send(&order(2)).await.expect_err("closed").kind(), ErrorKind::Closed);
    assert_eq!(subscription.next().await.expect_err("closed").kind(), ErrorKind::Closed);
    assert_eq!(delivery.ack().await.expect_err("closed").error().kind(), ErrorKind::Closed);
    assert_eq!(queue.subscribe(ConsumeOptions::default()).await.expect_err("closed").kind(), ErrorKind::Closed);
}

fn stats(accepted: u64, failed: u64, unknown: u64) -> SendStats {
    SendStats { accepted, failed, unknown }
}

#[tokio::test]
async fn j14_every_message_counts_once_by_its_answer() {
    let bus = bus("j14").await;
    let queue = bus.queue("orders");
    let bad = || Message::new("x").with_header("no\nheader", "x");
    queue.send(&order(1)).await.expect("sent");
    queue.with_timeout(Duration::from_secs(1)).send(&order(2)).await.expect("sent by another handle");
    queue.send_message(bad()).await.expect_err("refused");
    assert_eq!(queue.sent(), stats(2, 1, 0));

    let batch = (0..300).map(|n| if n % 100 == 7 { bad() } else { Message::new("y") });
    let refused = queue.send_all(batch).await.iter().filter(|result| result.is_err()).count();
    assert_eq!((queue.sent(), refused), (stats(2 + 297, 1 + 3, 0), 3));

    queue.enqueue(Message::new("z")).await.expect("handed over").await.expect("sent");
    drop(queue.enqueue(Message::new("z")).await.expect("handed over"));
    drop(queue.enqueue(bad()).await.expect_err("refused"));
    assert_eq!(queue.sent(), stats(301, 5, 0));

    bus.topic("orders").send(&order(3)).await.expect("sent");
    bus.queue("not sent to").stats(None).await.ok();
    let all = [(Address::queue("orders"), stats(301, 5, 0)), (Address::topic("orders"), stats(1, 0, 0))];
    assert_eq!(bus.sent(), all.into_iter().collect());
    assert_eq!(queue.stats(None).await.expect("counts").ready, 301, "what is counted as accepted is there");
}

#[tokio::test]
async fn j14_copies_of_the_runner_are_not_sent_by_the_program() {
    let bus = bus("j14-copies").await;
    let mut consumers = ConsumerFactory::new(&bus);
    let twice = FailurePolicy { max_attempts: 2, backoff: Backoff::fixed(Duration::ZERO), ..FailurePolicy::default() };
    consumers.route("orders", async |_: Message| Err::<(), _>(Failure::new("as the test wants"))).policy(twice);
    consumers.route("questions", async |n: u64| Ok::<_, Error>(Answer(n * 2)));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    let answer: u64 = bus.request("questions", &4_u64).await.expect("answered").decode().expect("a number");
    assert_eq!(answer, 8);
    crate::common::dead_letter(&bus, "orders").await.ack().await.expect("acked");
    running.stop().await.expect("stops");
    let sent: Vec<_> = bus.sent().into_iter().map(|(address, stats)| (address.to_string(), stats)).collect();
    let once = |name: &str| (name.to_owned(), stats(1, 0, 0));
    assert_eq!(sent, [once("queue orders"), once("queue polymq-replies"), once("queue questions")]);
}

#[tokio::test(start_paused = true)]
async fn j14_what_is_not_certain_is_counted_apart() {
    let second = Duration::from_secs(1);
    let (bus, _) = stub(Behaviour::Stuck).await;
    bus.queue("orders").with_timeout(second).send(&order(1)).await.expect_err("not sent");
    assert_eq!(bus.queue("orders").sent(), stats(0, 1, 0), "certainly not sent");

    let (bus, _) = stub(Behaviour::Silent).await;
    let queue = bus.queue("orders").with_timeout(second);
    queue.send(&order(1)).await.expect_err("no answer");
    drop(queue.enqueue(queue.message(&order(2)).expect("encodes")).await.expect("handed over"));
    tokio::time::sleep(2 * second).await;
    assert_eq!(queue.sent(), stats(0, 0, 2));

    let (bus, _) = stub(Behaviour::CutsAfterReceipt).await;
    let queue = bus.queue("orders").with_repeats(3, Backoff::fixed(Duration::from_millis(10)));
    let message = queue.message(&order(1)).expect("encodes").with_id("order-1");
    queue.send_message(message).await.expect("sent at the second attempt");
    assert_eq!(queue.sent(), stats(1, 0, 0), "one message, however often it was tried");

    let (bus, _) = stub(Behaviour::Slow).await;
    let queue = bus.queue("orders").with_window(8, WhenFull::Wait);
    let given_up = Duration::from_millis(2500);
    tokio::time::timeout(second / 2, queue.send(&order(1))).await.expect_err("given up");
    assert_eq!(queue.sent(), stats(0, 0, 1));
    let messages = (0..40).map(|id| queue.message(&order(id)).expect("encodes"));
    tokio::time::timeout(given_up, queue.send_all(messages)).await.expect_err("given up");
    assert_eq!(queue.sent(), stats(16, 0, 1 + 8), "two windows were answered, one was not, the rest never left");
}

#[tokio::test]
async fn j17_errors_name_the_backend_that_was_chosen() {
    let (bus, _) = stub(Behaviour::Borrowed).await;
    let queue = bus.queue("orders");
    let message = || Message::new("x");
    let mut errors = vec![
        queue.send_message(message()).await.expect_err("refused"),
        queue.with_repeats(1, Backoff::default()).send_message(message()).await.expect_err("refused"),
        queue.enqueue(message()).await.expect("handed over").await.expect_err("refused"),
        queue.flush().await.expect_err("refused"),
        queue.delete(None).await.expect_err("refused"),
        queue.declare(ConsumeOptions::default()).await.expect_err("refused"),
        bus.queue("orders?").send_message(message()).await.expect_err("refused"),
        bus.queue("orders?").subscribe(ConsumeOptions::default()).await.expect_err("refused"),
        bus.ping().await.expect_err("refused"),
        bus.flush().await.expect_err("refused"),
        queue.close().await.expect_err("refused"),
        bus.close().await.expect_err("refused"),
    ];
    errors.extend(queue.send_all([message(), message()]).await.into_iter().map(|result| result.expect_err("refused")));
    for error in errors {
        assert_eq!(error.backend(), Some("stub"), "{error}");
    }
}

/// Whichever answer is awaited, each message has its own time, and answers are in the order of the messages.
#[tokio::test(start_paused = true)]
async fn answers_that_are_awaited_together_are_each_messages_own() {
    let never = "never";
    for (bodies, unanswered, millis) in [
        (["10", "10", "10", "10", "10", "10"], None, 20),
        (["1000", "10", "10", "10", "10", "10"], None, 1010),
        ([never, "10", "10", "10", "10", "10"], Some(0), 2010),
        (["10", never, "10", "10", "10", "10"], Some(1), 2010),
        (["10", "10", "10", "10", "10", never], Some(5), 2010),
    ] {
        let (bus, _) = stub(Behaviour::Together).await;
        let queue = bus.queue("orders").with_window(4, WhenFull::Wait).with_timeout(Duration::from_secs(2));
        let began = tokio::time::Instant::now();
        let named = |(at, body): (usize, &str)| Message::new(body.to_owned()).with_id(at.to_string());
        let answers = queue.send_all(bodies.into_iter().enumerate().map(named)).await;
        assert!(began.elapsed() <= Duration::from_millis(millis + 5), "{bodies:?}: {:?}", began.elapsed());
        for (at, answer) in answers.iter().enumerate() {
            match answer {
                Ok(receipt) => assert_eq!(receipt.id.to_string(), at.to_string(), "{bodies:?}"),
                Err(error) => {
                    assert_eq!(
                        (error.kind(), Some(at)),
                        (ErrorKind::UnknownOutcome, unanswered),
                        "{bodies:?}: {error}"
                    );
                }
            }
        }
        assert_eq!(answers.iter().filter(|answer| answer.is_err()).count(), unanswered.iter().count(), "{bodies:?}");
    }
}

/// What was answered while another one was awaited is known, also when the call is given up.
#[tokio::test(start_paused = true)]
async fn answers_that_came_while_others_were_awaited_are_counted() {
    let (bus, _) = stub(Behaviour::Together).await;
    let queue = bus.queue("orders").with_window(4, WhenFull::Wait);
    let sending = queue.send_all(["10", "never", "10", "10", "10"].map(|body| Message::new(body.to_owned())));
    tokio::time::timeout(Duration::from_secs(1), sending).await.expect_err("one is never answered");
    assert_eq!(queue.sent(), stats(3, 0, 1));
}

/// However batches and single messages of a thread follow each other, each message has an id of its own.
#[tokio::test]
async fn batches_and_single_messages_share_no_id() {
    let bus = Bus::connect("memory://ids").await.expect("connect");
    let queue = bus.queue("orders");
    let mut ids = std::collections::HashSet::new();
    for _ in 0..1000 {
        let batch = queue.send_all((0..3).map(|_| Message::new("x"))).await;
        let single = [queue.send_message(Message::new("x")).await];
        for sent in batch.into_iter().chain(single) {
            assert!(ids.insert(sent.expect("sent").id), "given twice");
        }
    }
}
