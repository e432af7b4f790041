//! Handlers that join a service that runs: all of a factory or nothing, buses of their own, names.

use crate::common::{Log, Order, bus, order};
use polymq_core::{Bus, ConsumerFactory, ConsumerRunner, ErrorKind, Running, State};

async fn running(bus: &Bus) -> Running {
    let mut consumers = ConsumerFactory::new(bus);
    consumers.route("first", async |_: Order| {});
    ConsumerRunner::new(consumers).start().await.expect("starts")
}

fn names(running: &Running) -> Vec<String> {
    running.all_stats().into_keys().collect()
}

#[tokio::test(start_paused = true)]
async fn a_factory_is_attached_as_a_whole_or_not_at_all() {
    let bus = bus("attach-whole").await;
    let running = running(&bus).await;
    let two = || {
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.route("a", async |_: Order| {});
        consumers.route("b", async |_: Order| {}).existing();
        consumers
    };
    let missing = running.attach(two()).await.expect_err("b does not exist");
    assert_eq!(missing.kind(), ErrorKind::NotFound, "{missing}");
    assert_eq!(names(&running), ["first"]);
    bus.queue("b").send(&order(1)).await.expect("made by its first message");
    running.attach(two()).await.expect("attaches");
    assert_eq!(names(&running), ["a", "b", "first"]);
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn a_bus_that_is_attached_counts_until_its_handlers_are_detached() {
    let (own, other) = (bus("attach-own").await, bus("attach-other").await);
    let running = running(&own).await;
    let mut consumers = ConsumerFactory::new(&other);
    consumers.route("a", async |_: Order| {});
    consumers.route("b", async |_: Order| {});
    running.attach(consumers).await.expect("attaches");
    assert_eq!(running.buses().len(), 2);
    assert!(running.is_ready());
    other.close().await.expect("closes");
    assert!(!running.is_ready(), "its connection is closed");
    for name in ["a", "b"] {
        // How it ended is not what this is about.
        let _ = running.detach(name).await;
    }
    assert!(running.is_ready() && running.buses().len() == 1);
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn a_queue_and_a_topic_of_one_name_are_consumed_by_one_service() {
    let bus = bus("attach-name").await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("orders", async |order: Order, log: State<Log>| log.add(format!("queue {}", order.id)));
    let topic = async |order: Order, log: State<Log>| log.add(format!("topic {}", order.id));
    consumers.route("orders", topic).broadcast();
    consumers.check().expect("consistent");
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    log.wait(1).await;
    bus.topic("orders").send(&order(2)).await.expect("sent");
    assert_eq!(log.wait(2).await, ["queue 1", "topic 2"]);
    assert_eq!(names(&running), ["orders", "topic orders"]);
    running.detach("topic orders").await.expect("detached");
    running.stop().await.expect("stops");
}
