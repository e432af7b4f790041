//! What a broker leaves open: settlements without an answer, channels that do not open, messages that are refused at first.

use std::{
    mem,
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::common::{Log, dead_letter};
use async_trait::async_trait;
use polymq_core::{
    AckMode, Address, Backend, Backoff, Bus, Capabilities, Completer, Completion, Connection, ConsumeOptions, Consumer,
    ConsumerFactory, ConsumerRunner, Delivery, Environment, Error, ErrorKind, HandlerPair, HealthWatch, Incoming, Key,
    Message, Outcome, ProduceOptions, Producer, Receipt, Registry, Result, SendStats, Settings, SettleError, Settler,
    State, Stats, Token, memory::MemoryBackend,
};
use tokio::{task::yield_now, time::timeout};

const SECOND: Duration = Duration::from_secs(1);
/// A channel that never opens.
const NEVER: &str = "z-never";
/// A message with this header comes as one that another program has sent: without an id.
const FOREIGN: &str = "foreign";

/// The memory backend, with a broker before it that answers settlements when the test does.
#[derive(Debug, Clone, Default)]
struct Open(Arc<Script>);

#[derive(Debug, Default)]
struct Script {
    space: String,
    /// What the settlers were told.
    told: Log,
    /// What they have not answered.
    open: Mutex<Vec<Completer<()>>>,
    /// Messages that producers refuse before they take the next one.
    refuses: Mutex<usize>,
    /// The ids of those and of the one that was taken.
    ids: Log,
}

#[derive(Debug)]
struct OpenConnection(Open, Arc<dyn Connection>);

#[derive(Debug)]
struct OpenConsumer(Open, Box<dyn Consumer>);

#[derive(Debug)]
struct OpenSettler(Open, Arc<dyn Settler>);

#[derive(Debug)]
struct OpenProducer(Open, Box<dyn Producer>);

impl Open {
    fn new(space: &str) -> Self {
        Self(Arc::new(Script { space: space.to_owned(), ..Script::default() }))
    }

    async fn bus(&self) -> Bus {
        let mut registry = Registry::new();
        registry.add(Arc::new(self.clone())).expect("free");
        let builder = Bus::builder().registry(registry).backend("open").environment(Environment::default());
        builder.connect().await.expect("connects")
    }

    fn leave_open(&self, what: &str) -> Completion<()> {
        self.0.told.add(what);
        let (completer, completion) = Completion::queued();
        self.0.open.lock().expect("not poisoned").push(completer);
        completion
    }

    /// Answers what was left open, and lets whoever waits for that go on.
    async fn answer(&self, with: impl Fn() -> Result<()>) {
        for completer in mem::take(&mut *self.0.open.lock().expect("not poisoned")) {
            completer.complete(with());
        }
        for _ in 0..100 {
            yield_now().await;
        }
    }

    fn told(&self) -> Vec<String> {
        self.0.told.entries()
    }

    fn refuse(&self, messages: usize) {
        *self.0.refuses.lock().expect("not poisoned") = messages;
    }
}

#[async_trait]
impl Backend for Open {
    fn name(&self) -> &'static str {
        "open"
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["open"]
    }

    fn keys(&self) -> &'static [Key] {
        &[]
    }

    fn capabilities(&self) -> Capabilities {
        MemoryBackend.capabilities()
    }

    fn check(&self, _: &Settings) -> Result<()> {
        Ok(())
    }

    async fn connect(&self, _: &Settings) -> Result<Arc<dyn Connection>> {
        let memory = MemoryBackend.connect(&Settings::from_url(&format!("memory://{}", self.0.space))?).await?;
        Ok(Arc::new(OpenConnection(self.clone(), memory)))
    }
}

#[async_trait]
impl Connection for OpenConnection {
    fn backend(&self) -> &'static str {
        "open"
    }

    fn capabilities(&self) -> &Capabilities {
        self.1.capabilities()
    }

    fn health(&self) -> HealthWatch {
        self.1.health()
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        Ok(Box::new(OpenProducer(self.0.clone(), self.1.producer(address, options).await?)))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        if address.name() == NEVER {
            std::future::pending::<()>().await;
        }
        Ok(Box::new(OpenConsumer(self.0.clone(), self.1.consumer(address, options).await?)))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.1.declare(address, options).await
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.1.delete(address, group).await
    }

    async fn stats(&self, address: &Address, group: Option<&str>) -> Result<Stats> {
        self.1.stats(address, group).await
    }

    async fn ping(&self) -> Result<()> {
        self.1.ping().await
    }

    async fn close(&self) -> Result<()> {
        self.1.close().await
    }
}

#[async_trait]
impl Consumer for OpenConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        self.1.receive(max, into).await?;
        for incoming in into.iter_mut().filter(|incoming| incoming.message.headers().get(FOREIGN).is_some()) {
            incoming.message = Message::new(incoming.message.payload().clone());
        }
        Ok(())
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::new(OpenSettler(self.0.clone(), self.1.settler()))
    }

    async fn close(&mut self) -> Result<()> {
        self.1.close().await
    }
}

impl Settler for OpenSettler {
    fn ack(&self, _: Token) -> Completion<()> {
        self.0.leave_open("ack")
    }

    fn release(&self, token: Token, message: Message) {
        self.0.0.told.add("release");
        self.1.release(token, message);
    }

    fn retry(&self, _: Token, _: &Message, _: u32, _: Duration) -> Completion<()> {
        self.0.leave_open("retry")
    }
}

#[async_trait]
impl Producer for OpenProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        let script = &self.0.0;
        script.ids.add(message.id().map(ToString::to_string).unwrap_or_default());
        let mut refuses = script.refuses.lock().expect("not poisoned");
        if *refuses > 0 {
            *refuses -= 1;
            return Completion::ready(Err(Error::new(ErrorKind::Busy, "not now")));
        }
        self.1.send(message)
    }

    async fn flush(&self) -> Result<()> {
        self.1.flush().await
    }

    async fn close(&self) -> Result<()> {
        self.1.close().await
    }
}

fn lost() -> Result<()> {
    Err(Error::new(ErrorKind::Disconnected, "the wire was cut"))
}

/// What the settler is told when this is given up before there is an answer, which then is this one.
async fn given_up<F>(space: &str, settle: impl Fn(Delivery) -> F, answer: fn() -> Result<()>) -> Vec<String>
where
    F: Future<Output = Result<(), SettleError>>,
{
    let open = Open::new(space);
    let bus = open.bus().await;
    let mut subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    bus.queue("orders").send_message(Message::new("x")).await.expect("sent");
    let delivery = subscription.next().await.expect("a delivery");
    timeout(SECOND, settle(delivery)).await.expect_err("no answer");
    assert_eq!(open.told().len(), 1, "nothing more before the answer: {:?}", open.told());
    open.answer(answer).await;
    open.told()
}

#[tokio::test(start_paused = true)]
async fn settling_that_is_given_up_goes_on_and_the_message_is_released_only_when_it_fails() {
    let retry = |delivery: Delivery| delivery.retry(SECOND);
    assert_eq!(given_up("open-retry", retry, || Ok(())).await, ["retry"]);
    assert_eq!(given_up("open-retry-fails", retry, lost).await, ["retry", "release"]);
    assert_eq!(given_up("open-ack", Delivery::ack, || Ok(())).await, ["ack"]);
    assert_eq!(given_up("open-ack-fails", Delivery::ack, lost).await, ["ack", "release"]);
}

/// What the settler of a service is told that is stopped by force while it settles a message, as it is handled here.
async fn cut_off(space: &str, mode: AckMode, outcome: fn() -> Outcome) -> Vec<String> {
    let open = Open::new(space);
    let bus = open.bus().await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", move |_: Message| std::future::ready(outcome())).ack_mode(mode);
    let running = ConsumerRunner::new(consumers).drain_timeout(SECOND).start().await.expect("starts");
    bus.queue("orders").send_message(Message::new("x")).await.expect("sent");
    open.0.told.wait(1).await;
    running.stop().await.expect("stops");
    let told = open.told();
    open.answer(|| Ok(())).await;
    assert_eq!(open.told(), told);
    told
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_takes_too_long_settles_nothing_twice() {
    let retry = || Outcome::retry("as planned");
    assert_eq!(cut_off("open-drain", AckMode::AfterSuccess, retry).await, ["retry"]);
    let answer = || Outcome::Drop { reason: "not for us".into() };
    assert_eq!(cut_off("open-drain-drop", AckMode::AfterSuccess, answer).await, ["ack"]);
    assert_eq!(cut_off("open-drain-receipt", AckMode::OnReceipt, || Outcome::Ack).await, ["ack"]);
}

/// Waits until nobody consumes the queue.
async fn abandoned(bus: &Bus) -> Stats {
    for _ in 0..6000 {
        let stats = bus.queue("orders").stats(None).await.expect("counts");
        if stats.consumers == 0 {
            return stats;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("it is still consumed");
}

#[tokio::test(start_paused = true)]
async fn starting_that_is_given_up_leaves_no_consumer() {
    let bus = Open::new("open-start").bus().await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Message| {});
    consumers.route(NEVER, async |_: Message| {});
    let starting = ConsumerRunner::new(consumers).start();
    timeout(SECOND, starting).await.expect_err("one of them never opens");
    abandoned(&bus).await;
}

#[tokio::test(start_paused = true)]
async fn a_service_whose_future_is_dropped_ends_and_returns_its_messages() {
    let bus = Open::new("open-run").bus().await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    async fn stuck(log: State<Log>) {
        log.add("begun");
        std::future::pending::<()>().await;
    }
    consumers.state(log.clone()).route("orders", stuck);
    bus.queue("orders").send_message(Message::new("x")).await.expect("sent");
    let running = tokio::spawn(ConsumerRunner::new(consumers).run());
    log.wait(1).await;
    running.abort();
    let stats = abandoned(&bus).await;
    assert_eq!((stats.ready, stats.unsettled), (1, Some(0)));
}

async fn send_foreign(bus: &Bus) {
    bus.queue("orders").send_message(Message::new("x").with_header(FOREIGN, "yes")).await.expect("sent");
}

#[tokio::test(start_paused = true)]
async fn a_dead_letter_without_an_id_gets_one_however_often_it_is_tried() {
    let open = Open::new("open-letters");
    let bus = open.bus().await;
    send_foreign(&bus).await;
    open.refuse(3);
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Message| Outcome::reject("bad"));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let letter = dead_letter(&bus, "orders").await;
    let id = letter.message().id().expect("an id").to_string();
    assert_eq!(open.0.ids.entries()[1..], vec![id; 4]);
    running.force();
}

#[tokio::test(start_paused = true)]
async fn a_bridge_gives_a_message_without_an_id_one_however_often_it_is_tried() {
    let (source, target) = (Open::new("open-bridge"), Open::new("open-bridge-target"));
    let left = source.bus().await;
    for _ in 0..2 {
        send_foreign(&left).await;
    }
    target.refuse(2);
    let pair = HandlerPair::new("orders", &left, &target.bus().await);
    let running = pair.bridge().await.expect("two places").start().await.expect("starts");
    source.0.told.wait(1).await;
    source.answer(|| Ok(())).await;
    let ids = target.0.ids.wait(4).await;
    running.force();
    assert!(ids[0] == ids[1] && ids[1] == ids[2], "one message: {ids:?}");
    assert_ne!(ids[2], ids[3], "and another one like it");
}

#[tokio::test(start_paused = true)]
async fn many_messages_are_repeated_as_one_is() {
    let open = Open::new("open-repeats");
    let bus = open.bus().await;
    let queue = bus.queue("orders").with_repeats(2, Backoff::fixed(SECOND));
    let messages = || (0..5).map(|n| Message::new(n.to_string()));
    // Three are refused, and two of those once more.
    open.refuse(3 + 2);
    let answers = queue.send_all(messages()).await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    let mut ids = open.0.ids.entries();
    assert_eq!(ids.len(), 5 + 3 + 2);
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 5, "each under its id");
    let receipts: Vec<_> = answers.into_iter().flatten().map(|receipt| receipt.id.to_string()).collect();
    assert_eq!(receipts, open.0.ids.entries()[..5], "answers in the order of messages");
    // A message counts once, by its last answer.
    assert_eq!(queue.sent(), SendStats { accepted: 5, failed: 0, unknown: 0 });
    open.refuse(100);
    let answers = queue.send_all(messages()).await;
    assert!(answers.iter().all(|answer| answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy)));
    assert_eq!(queue.sent(), SendStats { accepted: 5, failed: 5, unknown: 0 });
    assert_eq!(open.0.ids.entries().len(), 10 + 15);
}
