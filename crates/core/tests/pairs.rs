//! Queue tables, handler pairs and bridges.
#![allow(missing_docs)]

mod common;

use std::time::Duration;

use common::{Log, Order, assert_empty, bus, order};
use polymq_core::{
    ConsumeOptions, ConsumerFactory, ConsumerRunner, Environment, ErrorKind, HandlerFactory, HandlerPair, Message,
    QueueTable, Registry, State,
};

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
