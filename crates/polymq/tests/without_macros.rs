//! The second half of the first page: registry, consumer factory, runner and handler pair, without any macro.

use std::{sync::Arc, time::Duration};

use polymq::{ConsumeOptions, Environment, ErrorKind, QueueTable, prelude::*};
use tokio::sync::mpsc;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Order {
    id: u64,
    total: f64,
}

const ORDER: Order = Order { id: 1, total: 9.5 };

type Seen = mpsc::UnboundedSender<(&'static str, u64)>;

async fn bill(order: Order, seen: State<Seen>) -> Result<()> {
    seen.send(("bill", order.id))?;
    Ok(())
}

async fn audit(order: Order, seen: State<Seen>) -> Result<()> {
    seen.send(("audit", order.id))?;
    Ok(())
}

async fn next<T>(receiver: &mut mpsc::UnboundedReceiver<T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), receiver.recv()).await.expect("nothing came").unwrap()
}

#[tokio::test]
async fn factory_with_routes_and_runner() {
    let bus = Bus::connect("memory://factory").await.unwrap();
    let (seen, mut calls): (Seen, _) = mpsc::unbounded_channel();

    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(seen);
    consumers.route("orders", bill);
    consumers.route("orders.audit", audit).concurrency(8).group("audit");
    let running = ConsumerRunner::new(consumers).start().await.unwrap();

    bus.queue("orders").send(&ORDER).await.unwrap();
    assert_eq!(next(&mut calls).await, ("bill", 1));
    bus.topic("orders.audit").send(&Order { id: 2, ..ORDER }).await.unwrap();
    assert_eq!(next(&mut calls).await, ("audit", 2));

    running.stop().await.unwrap();
    assert!(calls.try_recv().is_err(), "each message reaches one route");
}

/// The lines of the design's first page, as they stand there.
mod first_page {
    use super::*;

    async fn bill(order: Order) -> Result<()> {
        println!("billed order {} for {:.2}", order.id, order.total);
        Ok(())
    }

    async fn audit(_order: Order) -> Result<()> {
        Ok(())
    }

    pub(super) async fn serves() -> Result<()> {
        let bus = Bus::from_env().await?;
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.route("orders", bill);
        consumers.route("orders.audit", audit).concurrency(8).group("audit");
        ConsumerRunner::new(consumers).bind("0.0.0.0:9000").run().await?;
        Ok(())
    }

    pub(super) async fn looks_up(config: Settings) -> Result<()> {
        let registry = Registry::linked();
        let producer = registry.backend("kafka")?.connect(config).await?.queue("orders");
        let pair = HandlerFactory::from_config("polymq.toml")?.queue("orders")?;
        drop((producer, pair));
        Ok(())
    }
}

#[tokio::test]
async fn the_first_page_compiles_and_says_what_is_missing() {
    let _serves = first_page::serves;
    let nowhere = Settings::new().with("url", "kafka://127.0.0.1:1").with("connect_timeout", "10s");
    let error = first_page::looks_up(nowhere).await.unwrap_err();
    let said =
        if cfg!(feature = "kafka") { "no connection: 127.0.0.1:1" } else { "backend \"kafka\" is not compiled in" };
    assert!(error.to_string().contains(said), "{error}");
}

#[tokio::test]
async fn registry_by_name() {
    let registry = Registry::linked();
    assert_eq!(registry.backend("memory").unwrap().name(), "memory");
    let config = Settings::new().with("url", "memory://registry");
    let producer = registry.backend("memory").unwrap().connect(&config).await.unwrap().queue("orders");
    producer.send(&ORDER).await.unwrap();
    let again = registry.backend("Memory").unwrap().connect(config).await.unwrap();
    assert_eq!(again.queue("orders").stats(None).await.unwrap().ready, 1, "it is the space of the settings");
    let error = registry.backend("memory").unwrap().connect(Settings::new().with("capacty", "1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
}

#[tokio::test]
async fn handler_pair_from_a_queue_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("polymq.toml");
    let table = "[queues.orders]\nname = \"pairs.orders\"\nconsumer = \"memory\"\nproducer = \"memory\"\n";
    std::fs::write(&path, table).unwrap();

    let factory = HandlerFactory::from_config(&path).unwrap();
    let pair = factory.queue("orders").unwrap();
    let (seen, mut orders) = mpsc::unbounded_channel();
    let seen = Arc::new(seen);
    let handler = move |order: Order| {
        let seen = Arc::clone(&seen);
        async move { seen.send(order) }
    };
    let running = pair.handle(handler).await.unwrap().start().await.unwrap();
    pair.producer().await.unwrap().send(&ORDER).await.unwrap();
    assert_eq!(next(&mut orders).await, ORDER);
    running.stop().await.unwrap();
    factory.close().await.unwrap();
}

/// A file in the older shape, of two queues, starts as it is, and messages come back through both pairs.
#[tokio::test]
async fn d6_a_table_in_the_older_shape_starts_and_round_trips() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("queues.json");
    let entry = |name: &str, consumer: &str| {
        format!("\"{name}\": {{\"name\": \"d6-{name}\", \"consumer_loop\": \"{consumer}\", \"producer\": \"memory\"}}")
    };
    std::fs::write(&path, format!("{{{}, {}}}", entry("queue_1", "memory"), entry("queue_2", "Memory"))).unwrap();
    let factory = HandlerFactory::from_config(&path).unwrap();
    for queue in ["queue_1", "queue_2"] {
        let pair = factory.queue(queue).unwrap();
        assert_eq!(pair.name(), format!("d6-{queue}"));
        let (seen, mut orders) = mpsc::unbounded_channel();
        let handler = move |order: Order| {
            let sent = seen.send(order);
            async move { sent }
        };
        let running = pair.handle(handler).await.unwrap().start().await.unwrap();
        pair.producer().await.unwrap().send(&ORDER).await.unwrap();
        assert_eq!(next(&mut orders).await, ORDER);
        running.stop().await.unwrap();
    }
    factory.close().await.unwrap();

    std::fs::write(&path, format!("{{{}}}", entry("queue_1", "memroy"))).unwrap();
    let error = HandlerFactory::from_config(&path).unwrap_err().to_string();
    assert!(error.contains("\"queue_1\"") && error.contains("unknown backend \"memroy\""), "{error}");
}

#[test]
fn a_queue_table_names_the_backend_that_it_cannot_have() {
    let table = QueueTable::from_toml("[queues.orders]\nconsumer = \"kubemq\"\nproducer = \"memory\"\n").unwrap();
    // Nothing is linked into it.
    let error = HandlerFactory::new(table, Registry::new(), Environment::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotCompiledIn);
    assert!(error.to_string().contains("\"orders\"") && error.to_string().contains("\"kubemq\""), "{error}");
}

/// The target refuses at first: everything stays at the source. Then each message is moved once.
#[tokio::test]
async fn a_bridge_acknowledges_when_the_target_has_accepted() {
    let left = Bus::connect("memory://bridge-left").await.unwrap();
    let right = Bus::connect("memory://bridge-right?capacity=1").await.unwrap();
    right.queue("orders").send(&Order { id: 0, ..ORDER }).await.unwrap(); // it is full now
    for id in 1..=3 {
        left.queue("orders").send(&Order { id, ..ORDER }).await.unwrap();
    }
    let bridge = polymq::HandlerPair::new("orders", &left, &right).bridge().await.unwrap().start().await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let waiting = left.queue("orders").stats(None).await.unwrap();
    assert_eq!(waiting.ready + waiting.unsettled.unwrap_or(0), 3, "nothing was acknowledged yet");

    let mut arrived = right.queue("orders").subscribe(ConsumeOptions::default()).await.unwrap();
    let mut ids = Vec::new();
    while ids.len() < 4 {
        let delivery = tokio::time::timeout(Duration::from_secs(30), arrived.next()).await.unwrap().unwrap();
        ids.push(serde_json::from_slice::<Order>(delivery.message().payload()).unwrap().id);
        delivery.ack().await.unwrap();
    }
    assert_eq!(ids, [0, 1, 2, 3]);
    bridge.stop().await.unwrap();
    let left_over = left.queue("orders").stats(None).await.unwrap();
    assert_eq!(left_over.ready + left_over.unsettled.unwrap_or(0), 0);
}
