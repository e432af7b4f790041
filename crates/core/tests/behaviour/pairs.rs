//! Queue tables, handler pairs and bridges.

use std::{sync::Mutex, time::Duration};

use crate::common::{Log, Order, assert_empty, bus, dead_letter, order};
use async_trait::async_trait;
use futures_util::FutureExt;
use polymq_core::{
    Address, Backend, Bus, ConsumeOptions, ConsumerFactory, ConsumerRunner, DeadLetters, Environment, Error, ErrorKind,
    FailurePolicy, HandlerFactory, HandlerPair, Layer, Message, NextSend, Outcome, ProduceOptions, QueueTable, Receipt,
    Registry, Result, Retry, Settings, State, dead_letter::REASON, memory::MemoryBackend,
};
use tokio::time::Instant;

fn table(text: &str) -> HandlerFactory {
    let table = QueueTable::from_toml(text).expect("a table");
    let registry = Registry::linked();
    HandlerFactory::new(table, registry, Environment::default()).expect("valid")
}

#[tokio::test(start_paused = true)]
async fn d5_the_pairs_producer_reaches_its_own_handler() {
    let factory = table(
        "[queues.orders]\nname = \"orders-v1\"\nconsumer = \"memory\"\nproducer = \"memory\"\n\
         [backends.memory]\nurl = \"memory://d5\"",
    );
    let pair = factory.queue("orders").expect("in the table");
    assert_eq!(pair.name(), "orders-v1");
    let log = Log::default();
    let seen = log.clone();
    let running = pair.handle(move |order: Order| {
        seen.add(order.id.to_string());
        async {}
    });
    let running = running.await.expect("connects").start().await.expect("starts");
    pair.producer().await.expect("connects").send(&order(5)).await.expect("sent");
    assert_eq!(log.wait(1).await, ["5"]);
    running.stop().await.expect("stops");
    let error = factory.queue("order").expect_err("not in the table");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains("did you mean \"orders\"?"), "{error}");
    factory.close().await.expect("closes");
}

/// Also where a close was given up, and where a pair was not used before.
#[tokio::test(start_paused = true)]
async fn a_closed_factory_connects_nothing_any_more() {
    let factory = table(
        "[queues.orders]\nconsumer = \"memory\"\nproducer = \"memory\"\n\
         [backends.memory]\nurl = \"memory://closed-factory\"",
    );
    let (used, unused) = (factory.queue("orders").expect("known"), factory.queue("orders").expect("known"));
    let producer = used.producer().await.expect("connects");
    let given_up = factory.close().now_or_never();
    factory.close().await.expect("waits for the same end");
    assert!(given_up.is_none(), "closing takes a turn of the runtime");
    assert_eq!(producer.send(&order(1)).await.expect_err("closed").kind(), ErrorKind::Closed);
    for pair in [used, unused] {
        assert_eq!(pair.producer().await.expect_err("closed").kind(), ErrorKind::Closed);
        assert_eq!(pair.consumer().await.expect_err("closed").kind(), ErrorKind::Closed);
    }
}

#[tokio::test(start_paused = true)]
async fn d7_a_bridge_acknowledges_its_source_only_when_the_target_has_accepted() {
    let (left, right) = (bus("d7-left").await, bus("d7-right?capacity=1").await);
    let pair = HandlerPair::new("orders", &left, &right);
    let running = pair.bridge().await.expect("two places").start().await.expect("starts");
    let first = Message::new("1").with_id("one").with_header("tenant", "acme").with_content_type("text/plain");
    left.queue("orders").send_message(first).await.expect("sent");
    let mut target = right.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let moved = target.next().await.expect("moved");
    let message = moved.message();
    assert_eq!(message.id().map(ToString::to_string).as_deref(), Some("one"));
    assert_eq!((message.headers().get("tenant"), message.content_type()), (Some("acme"), Some("text/plain")));
    moved.ack().await.expect("acked");
    assert_empty(&left, "orders").await;

    // The target takes nothing more: what is sent waits at the source.
    right.close().await.expect("closes");
    left.queue("orders").send_message(Message::new("2")).await.expect("sent");
    tokio::time::sleep(Duration::from_secs(60)).await;
    let stats = left.queue("orders").stats(None).await.expect("counts");
    assert_eq!(stats.ready + stats.unsettled.unwrap_or_default(), 1);
    running.stop().await.expect("stops");
    assert_eq!(left.queue("orders").stats(None).await.expect("counts").ready, 1);

    let error = HandlerPair::new("orders", &left, &left).bridge().await.expect_err("to itself");
    assert_eq!(error.kind(), ErrorKind::Config);
}

/// A bridge whose target is given up, or closed, is of no use: it says so and ends, and what it holds stays at the source.
#[tokio::test(start_paused = true)]
async fn a_bridge_ends_with_its_target() {
    let (left, right) = (bus("bridge-source").await, bus("bridge-target").await);
    let bridge = HandlerPair::new("orders", &left, &right).bridge().await.expect("two places");
    let running = bridge.start().await.expect("starts");
    assert!(running.is_ready() && running.buses().len() == 2);
    let ending = tokio::spawn(running.clone().until_signal());
    right.close().await.expect("closes");
    left.queue("orders").send_message(Message::new("1")).await.expect("sent");
    let ended = tokio::time::timeout(Duration::from_secs(60), ending).await.expect("in time").expect("no panic");
    assert_eq!(ended.expect_err("it is of no use").kind(), ErrorKind::Disconnected);
    assert!(!running.is_ready());
    assert_eq!(left.queue("orders").stats(None).await.expect("counts").ready, 1);
}

#[tokio::test(start_paused = true)]
async fn a7_one_process_consumes_from_several_connections() {
    let (one, two) = (bus("a7-one").await, bus("a7-two").await);
    let log = Log::default();
    let factory = |bus, name: &'static str| {
        let mut consumers = ConsumerFactory::new(bus);
        consumers.state(log.clone());
        consumers.route("orders", move |order: Order, log: State<Log>| {
            log.add(format!("{name} {}", order.id));
            async {}
        });
        consumers
    };
    let running = ConsumerRunner::new(factory(&one, "one")).and(factory(&two, "two")).start().await.expect("starts");
    one.queue("orders").send(&order(1)).await.expect("sent");
    two.queue("orders").send(&order(2)).await.expect("sent");
    let mut entries = log.wait(2).await;
    entries.sort();
    assert_eq!(entries, ["one 1", "two 2"]);
    let names: Vec<_> = running.all_stats().into_keys().collect();
    assert_eq!(names, ["memory:orders", "orders"]);
    let (first, second) = tokio::join!(running.stop(), running.stop());
    assert!(first.is_ok() && second.is_ok());
    assert_eq!(two.queue("orders").stats(None).await.expect("counts").consumers, 0);
}

/// Sends what another program has written.
async fn send_foreign(space: &str, message: Message) {
    let settings = Settings::from_url(&format!("memory://{space}")).expect("a URL");
    let connection = MemoryBackend.connect(&settings).await.expect("connects");
    let producer = connection.producer(&Address::queue("orders"), &ProduceOptions::default()).await.expect("opens");
    producer.send(message).await.expect("sent");
}

#[tokio::test(start_paused = true)]
async fn d7_a_bridge_carries_the_headers_of_other_programs() {
    let (left, right) = (bus("d7-foreign").await, bus("d7-foreign-target").await);
    let pair = HandlerPair::new("orders", &left, &right);
    let running = pair.bridge().await.expect("two places").start().await.expect("starts");
    let foreign = Message::new("1").with_header("cloudEvents:source", "shop").with_header("ce_specversion", "1.0");
    send_foreign("d7-foreign", foreign.with_header("trace", "x".repeat(5000))).await;
    let mut target = right.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let moved = target.next().await.expect("moved");
    let headers = moved.message().headers();
    assert_eq!((headers.get("cloudEvents:source"), headers.get("ce_specversion")), (Some("shop"), Some("1.0")));
    moved.ack().await.expect("acked");
    // What would end a connection of another protocol stays here.
    send_foreign("d7-foreign", Message::new("2").with_header("trace", "at a\nat b")).await;
    let letter = dead_letter(&left, "orders").await;
    let reason = letter.message().system_headers().get(REASON).expect("a reason");
    assert!(reason.contains("control character"), "{reason}");
    letter.ack().await.expect("acked");
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn r8_what_another_program_has_sent_is_replayed_as_it_was() {
    let bus = bus("r8-foreign").await;
    send_foreign("r8-foreign", Message::new("1").with_header("trace", "at a\nat b").with_header("ce_source", "s"))
        .await;
    let mut orders = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    orders.next().await.expect("there").reject("for the test").await.expect("a dead letter");
    let source = Address::queue("orders");
    let replayed = polymq_core::replay_dead_letters(&bus, &source, 10, Duration::from_secs(1)).await;
    assert_eq!(replayed.expect("replayed"), 1);
    let again = orders.next().await.expect("back");
    let headers = again.message().headers();
    assert_eq!((headers.get("trace"), headers.get("ce_source")), (Some("at a\nat b"), Some("s")));
    again.ack().await.expect("acked");
}

/// Answers what is sent with these errors, from the last to the first, and then takes it.
#[derive(Debug)]
struct Refusing(Mutex<Vec<Error>>);

#[async_trait]
impl Layer for Refusing {
    async fn send(&self, message: Message, next: NextSend<'_>) -> Result<Receipt> {
        let refusal = self.0.lock().expect("not poisoned").pop();
        match refusal {
            Some(error) => Err(error),
            None => next.send(message).await,
        }
    }
}

#[tokio::test(start_paused = true)]
async fn d7_what_the_target_never_takes_does_not_hold_up_what_is_behind_it() {
    let left = bus("d7-refused").await;
    let busy = Error::new(ErrorKind::Busy, "later").with_retry(Retry::After(Duration::from_secs(90)));
    let never = Error::new(ErrorKind::Refused, "no such customer").with_retry(Retry::Never);
    let builder = Bus::builder().url("memory://d7-refusing").environment(Environment::default());
    let right = builder.layer(Refusing(Mutex::new(vec![busy, never]))).connect().await.expect("connects");
    let pair = HandlerPair::new("orders", &left, &right);
    let running = pair.bridge().await.expect("two places").start().await.expect("starts");
    for body in ["bad", "good"] {
        left.queue("orders").send_message(Message::new(body)).await.expect("sent");
    }
    let started = Instant::now();
    let letter = dead_letter(&left, "orders").await;
    assert_eq!(&letter.message().payload()[..], b"bad");
    letter.ack().await.expect("acked");
    let mut target = right.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let moved = target.next().await.expect("moved");
    assert_eq!(&moved.message().payload()[..], b"good");
    assert!(started.elapsed() >= Duration::from_secs(90), "as long as the target has asked for");
    moved.ack().await.expect("acked");
    running.stop().await.expect("stops");
    assert_empty(&left, "orders").await;
}

#[tokio::test(start_paused = true)]
async fn d6_a_section_under_another_name_of_its_backend_counts() {
    let queues = "[queues.orders]\nconsumer = \"memory\"\nproducer = \"Memory\"\n";
    let factory = table(&format!("{queues}[backends.MEMORY]\nurl = \"memory://d6-alias\""));
    factory.queue("orders").expect("known").producer().await.expect("connects").send(&order(1)).await.expect("sent");
    assert_eq!(bus("d6-alias").await.queue("orders").stats(None).await.expect("counts").ready, 1);

    let text = format!("{queues}[backends.memory]\nurl = \"memory://a\"\n[backends.MEMORY]\nurl = \"memory://b\"");
    let twice = QueueTable::from_toml(&text).expect("a table");
    let error = HandlerFactory::new(twice, Registry::linked(), Environment::default()).expect_err("which one?");
    assert!(error.to_string().contains("two sections of the backend memory"), "{error}");

    let variables = [("POLYMQ_BACKEND", "MEMORY"), ("POLYMQ_URL", "memory://d6-chosen")];
    let queues = QueueTable::from_toml(queues).expect("a table");
    let factory = HandlerFactory::new(queues, Registry::linked(), Environment::from_iter(variables)).expect("valid");
    factory.queue("orders").expect("known").producer().await.expect("connects").send(&order(1)).await.expect("sent");
    assert_eq!(bus("d6-chosen").await.queue("orders").stats(None).await.expect("counts").ready, 1);
}

#[tokio::test(start_paused = true)]
async fn r8_letters_of_another_channel_are_left_where_they_are() {
    let bus = bus("r8-others").await;
    let letters = FailurePolicy { dead_letters: DeadLetters::To(Address::queue("orders.dlq")), ..Default::default() };
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Message| Outcome::reject("for the test"));
    consumers.route("others", async |_: Message| Outcome::reject("for the test")).policy(letters);
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for (queue, count) in [("others", 1), ("orders", 2), ("others", 3), ("orders", 4)] {
        bus.queue(queue).send_message(Message::new("1")).await.expect("sent");
        while bus.queue("orders.dlq").stats(None).await.expect("counts").ready < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    running.stop().await.expect("stops");
    let replay = async |max| {
        polymq_core::replay_dead_letters(&bus, &Address::queue("orders"), max, Duration::from_secs(1)).await
    };
    assert_eq!((replay(1).await.expect("replayed"), replay(10).await.expect("replayed")), (1, 1));
    let ready = async |name: &str| bus.queue(name).stats(None).await.expect("counts").ready;
    assert_eq!((ready("orders").await, ready("others").await, ready("orders.dlq").await), (2, 0, 2));
}
