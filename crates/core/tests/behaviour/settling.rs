//! What settling does at the broker: a mode that always acknowledges, answers on the same exchange, a queue that is gone.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use crate::common::{Log, Order, assert_empty, bus, order};
use async_trait::async_trait;
use polymq_core::{
    AckMode, Address, Answer, Backend, Backoff, Batch, Bus, Capabilities, Completion, Connection, ConsumeOptions,
    Consumer, ConsumerFactory, ConsumerRunner, Environment, Error, ErrorKind, Failure, FailurePolicy, HealthWatch,
    Incoming, Key, Message, Outcome, ProduceOptions, Producer, Registry, Result, Running, Settings, Settler, State,
    Token, memory::MemoryBackend,
};

const SECOND: Duration = Duration::from_secs(1);

fn fixed(delay: Duration) -> FailurePolicy {
    FailurePolicy { backoff: Backoff::fixed(delay), ..FailurePolicy::default() }
}

#[tokio::test(start_paused = true)]
async fn c4_what_is_always_acknowledged_is_handled_once_also_in_the_order_of_keys() {
    let bus = bus("always").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    async fn fails(order: Order, log: State<Log>) -> Result<(), Failure> {
        log.add(order.id.to_string());
        Err(Failure::new("as planned"))
    }
    let route = consumers.state(log.clone()).route("orders", fails);
    route.ordered_by_key().ack_mode(AckMode::Always).policy(fixed(SECOND));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for id in [1, 2] {
        let message = bus.queue("orders").message(&order(id)).expect("encodes").with_key("k");
        bus.queue("orders").send_message(message).await.expect("sent");
    }
    assert_eq!(log.wait(2).await, ["1", "2"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.failed, stats.retried, stats.dropped), (2, 0, 2));
}

/// What cannot be acknowledged on receipt is not handled, and given back: somebody else gets it.
#[tokio::test(start_paused = true)]
async fn what_is_not_acknowledged_on_receipt_is_given_back() {
    let (ours, theirs) = (bus("receipt").await, bus("receipt").await);
    let log = Log::default();
    let seen = log.clone();
    let mut consumers = ConsumerFactory::new(&ours);
    let route = consumers.route("orders", move |order: Order| {
        seen.add(order.id.to_string());
        tokio::time::sleep(SECOND)
    });
    route.ack_mode(AckMode::OnReceipt);
    for id in 1..=5 {
        theirs.queue("orders").send(&order(id)).await.expect("sent");
    }
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    assert_eq!(log.wait(1).await, ["1"]);
    ours.close().await.expect("closes");
    let mut others = theirs.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    for id in 2..=5 {
        let delivery = tokio::time::timeout(60 * SECOND, others.next()).await.expect("in time").expect("a message");
        assert_eq!(delivery.message().payload(), format!("{{\"id\":{id}}}").as_str());
        delivery.ack().await.expect("acked");
    }
    assert_eq!(log.entries(), ["1"]);
    assert!(!running.is_ready());
}

/// The memory backend, where an answer travels back on the exchange that brought the message, as with HTTP.
#[derive(Debug, Clone, Default)]
struct Direct(Arc<Mutex<Vec<String>>>);

#[derive(Debug)]
struct DirectConnection(Direct, Arc<dyn Connection>, Capabilities);

#[derive(Debug)]
struct DirectConsumer(Direct, Box<dyn Consumer>);

#[derive(Debug)]
struct DirectSettler(Direct, Arc<dyn Settler>);

impl Direct {
    fn tell(&self, answer: &str) {
        self.0.lock().expect("not poisoned").push(answer.to_owned());
    }
}

#[async_trait]
impl Backend for Direct {
    fn name(&self) -> &'static str {
        "direct"
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["direct"]
    }

    fn keys(&self) -> &'static [Key] {
        &[]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { direct: true, ..MemoryBackend.capabilities() }
    }

    fn check(&self, _: &Settings) -> Result<()> {
        Ok(())
    }

    async fn connect(&self, _: &Settings) -> Result<Arc<dyn Connection>> {
        let memory = MemoryBackend.connect(&Settings::from_url("memory://settling-direct")?).await?;
        Ok(Arc::new(DirectConnection(self.clone(), memory, self.capabilities())))
    }
}

#[async_trait]
impl Connection for DirectConnection {
    fn backend(&self) -> &'static str {
        "direct"
    }

    fn capabilities(&self) -> &Capabilities {
        &self.2
    }

    fn health(&self) -> HealthWatch {
        self.1.health()
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        self.1.producer(address, options).await
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        Ok(Box::new(DirectConsumer(self.0.clone(), self.1.consumer(address, options).await?)))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.1.declare(address, options).await
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.1.delete(address, group).await
    }

    async fn ping(&self) -> Result<()> {
        self.1.ping().await
    }

    async fn close(&self) -> Result<()> {
        self.1.close().await
    }
}

#[async_trait]
impl Consumer for DirectConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        self.1.receive(max, into).await
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::new(DirectSettler(self.0.clone(), self.1.settler()))
    }

    async fn close(&mut self) -> Result<()> {
        self.1.close().await
    }
}

impl Settler for DirectSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        self.0.tell("nothing");
        let settler = Arc::clone(&self.1);
        // Nothing happens until somebody polls it.
        Completion::future(async move { settler.ack(token).await })
    }

    fn release(&self, token: Token, message: Message) {
        self.1.release(token, message);
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        self.1.retry(token, message, attempt, after)
    }

    fn answer(&self, token: Token, answer: &Message) -> Option<Completion<()>> {
        if **answer.payload() == *b"0" {
            return Some(Completion::ready(Err(Error::new(ErrorKind::Refused, "nobody is told of nothing"))));
        }
        self.0.tell(&String::from_utf8_lossy(answer.payload()));
        Some(self.1.ack(token))
    }
}

async fn direct_bus(direct: &Direct) -> Bus {
    let mut registry = Registry::new();
    registry.add(Arc::new(direct.clone())).expect("free");
    let builder = Bus::builder().registry(registry).backend("direct").environment(Environment::default());
    builder.connect().await.expect("connects")
}

/// What the sender is told when a handler that is always acknowledged answers twice the number, and how often it was called.
async fn doubled(n: u64) -> (Vec<String>, usize) {
    let direct = Direct::default();
    let (bus, log) = (direct_bus(&direct).await, Log::default());
    let mut consumers = ConsumerFactory::new(&bus);
    async fn doubles(n: u64, log: State<Log>) -> Answer<u64> {
        log.add("handled");
        Answer(n * 2)
    }
    consumers.state(log.clone()).route("double", doubles).ack_mode(AckMode::Always);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("double").send(&n).await.expect("sent");
    log.wait(1).await;
    tokio::time::sleep(60 * SECOND).await;
    running.stop().await.expect("stops");
    let told = direct.0.lock().expect("not poisoned").clone();
    (told, log.entries().len())
}

#[tokio::test(start_paused = true)]
async fn what_is_always_acknowledged_is_answered_on_the_same_exchange() {
    assert_eq!(doubled(21).await, (vec!["42".to_owned()], 1));
}

#[tokio::test(start_paused = true)]
async fn what_is_always_acknowledged_is_so_although_its_answer_is_refused() {
    assert_eq!(doubled(0).await, (vec!["nothing".to_owned()], 1));
}

/// Nobody waits for the answer to an acknowledgement; it is made all the same, also where it is a future that somebody must poll.
#[tokio::test(start_paused = true)]
async fn an_acknowledgement_that_nobody_waits_for_is_made() {
    let (bus, memory) = (direct_bus(&Direct::default()).await, bus("settling-direct").await);
    let log = Log::default();
    let (one, many) = (log.clone(), log.clone());
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("alone", move |order: Order| {
        one.add(order.id.to_string());
        async {}
    });
    consumers.route_batch("together", 10, move |orders: Batch<Order>| {
        orders.iter().for_each(|order| many.add(order.id.to_string()));
        async {}
    });
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for queue in ["alone", "together"] {
        for id in 1..=5 {
            bus.queue(queue).send(&order(id)).await.expect("sent");
        }
    }
    log.wait(10).await;
    running.stop().await.expect("stops");
    for queue in ["alone", "together"] {
        assert_empty(&memory, queue).await;
    }
}

/// Its handler fails when the queue of its message has been deleted, and made anew, meanwhile.
async fn handling_while_its_queue_is_deleted(bus: &Bus, log: &Log) -> Running {
    async fn fails_first(order: Order, log: State<Log>) -> Outcome {
        log.add(order.id.to_string());
        tokio::time::sleep(10 * SECOND).await;
        if order.id == 1 { Outcome::retry("not now") } else { Outcome::Ack }
    }
    let mut consumers = ConsumerFactory::new(bus);
    consumers.state(log.clone()).route("orders", fails_first).policy(fixed(SECOND));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let queue = bus.queue("orders");
    queue.send(&order(1)).await.expect("sent");
    log.wait(1).await;
    queue.delete(None).await.expect("deleted");
    queue.declare(ConsumeOptions::default()).await.expect("declared again");
    running
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_is_deleted_while_a_handler_fails_is_consumed_when_it_is_made_anew() {
    let bus = bus("settling-deleted").await;
    let log = Log::default();
    let running = handling_while_its_queue_is_deleted(&bus, &log).await;
    bus.queue("orders").send(&order(2)).await.expect("sent");
    assert_eq!(log.wait(2).await, ["1", "2"]);
    running.stop().await.expect("stops");
    assert_empty(&bus, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn a_retry_to_a_queue_that_is_gone_is_stale() {
    let bus = bus("settling-stale").await;
    let queue = bus.queue("orders");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    queue.send(&order(1)).await.expect("sent");
    let delivery = subscription.next().await.expect("a delivery");
    queue.delete(None).await.expect("deleted");
    let refused = delivery.retry(SECOND).await.expect_err("it is gone");
    assert_eq!(refused.error().kind(), ErrorKind::Stale, "{refused}");
}
