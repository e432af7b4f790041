//! What a program does on the real brokers, told by its environment or by a queue table: mission rows A7, C22,
//! D7, J9, J13 and J20. Each test starts its own RabbitMQ and Mosquitto.
#![cfg(all(unix, feature = "amqp", feature = "mqtt", feature = "macros", feature = "ops"))]

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq::{BusBuilder, ConsumeOptions, Environment, HandlerPair, HealthState, QueueTable, prelude::*};
use polymq_testkit::{Broker, BrokerControl, closes, eventually, free_port};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc::{UnboundedSender, unbounded_channel},
};

const PATIENCE: Duration = Duration::from_secs(90);

fn url(scheme: &str, broker: &Broker) -> String {
    format!("{scheme}://{}", broker.address())
}

/// With time for a broker that has just begun.
fn patient(url: &str) -> BusBuilder {
    Bus::builder().environment(Environment::default()).url(url).with("connect_timeout", "60s")
}

async fn connect(url: &str) -> Bus {
    patient(url).with("reconnect_max", "500ms").connect().await.unwrap()
}

/// One queue comes in over AMQP and goes out over MQTT, another is on AMQP both ways, in one process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a7_each_queue_and_direction_has_its_own_backend() {
    let (rabbitmq, mosquitto) = (Broker::rabbitmq(), Broker::mosquitto(&[]));
    let (amqp, mqtt) = (url("amqp", &rabbitmq), url("mqtt", &mosquitto));
    let table = format!(
        "[queues.one]\nconsumer = \"amqp\"\nproducer = \"mqtt\"\n[queues.two]\nconsumer = \"amqp\"\nproducer = \"amqp\"\n\
         [backends.amqp]\nurl = \"{amqp}\"\n[backends.mqtt]\nurl = \"{mqtt}\"\n"
    );
    let table = QueueTable::from_toml(&table).unwrap();
    let factory = HandlerFactory::new(table, Registry::linked(), Environment::default()).unwrap();
    let (one, two) = (factory.queue("one").unwrap(), factory.queue("two").unwrap());

    let out = one.producer().await.unwrap();
    let double = move |n: u64| {
        let out = out.clone();
        async move { out.send(&(n * 2)).await.map(drop) }
    };
    let first = one.handle(double).await.unwrap().start().await.unwrap();
    let mut answers = connect(&mqtt).await.queue("one").subscribe(ConsumeOptions::default()).await.unwrap();
    connect(&amqp).await.queue("one").send(&21_u64).await.unwrap();
    let answer = tokio::time::timeout(PATIENCE, answers.next()).await.unwrap().unwrap();
    assert_eq!(answer.message().payload(), "42");
    answer.ack().await.unwrap();

    let (sender, mut seen) = unbounded_channel();
    let handler = move |n: u64| {
        let sent = sender.send(n);
        async move { sent }
    };
    let second = two.handle(handler).await.unwrap().start().await.unwrap();
    two.producer().await.unwrap().send(&7_u64).await.unwrap();
    assert_eq!(tokio::time::timeout(PATIENCE, seen.recv()).await.unwrap(), Some(7));
    first.stop().await.unwrap();
    second.stop().await.unwrap();
    factory.close().await.unwrap();
}

/// What RabbitMQ's own management interface says.
async fn managed(broker: &Broker, path: &str) -> serde_json::Value {
    let mut stream = tokio::net::TcpStream::connect(broker.management().unwrap()).await.unwrap();
    let login = "authorization: Basic Z3Vlc3Q6Z3Vlc3Q=";
    stream.write_all(format!("GET {path} HTTP/1.0\r\nhost: test\r\n{login}\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{head}");
    serde_json::from_str(body).unwrap()
}

/// How many messages a queue holds, ready or not acknowledged; it is counted now and then.
async fn messages(broker: &Broker, queue: &str) -> Option<u64> {
    let queues = managed(broker, "/api/queues?disable_stats=true&enable_queue_totals=true").await;
    let queue = queues.as_array().unwrap().iter().find(|found| found["name"] == queue)?;
    queue["messages"].as_u64()
}

/// While the target is down, everything stays at the source; when it is there again, each message is moved once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn d7_a_bridge_keeps_what_its_target_has_not_accepted() {
    const COUNT: u64 = 5;
    let (rabbitmq, mosquitto) = (Broker::rabbitmq(), Broker::mosquitto(&[]));
    let (source, target) = (connect(&url("amqp", &rabbitmq)).await, connect(&url("mqtt", &mosquitto)).await);
    let waiting = source.queue("orders");
    let bridge = HandlerPair::new("orders", &source, &target).bridge().await.unwrap().start().await.unwrap();
    let mut arrived = target.queue("orders").subscribe(ConsumeOptions::default()).await.unwrap();
    mosquitto.kill().await;
    eventually(PATIENCE, || async {
        if target.health().state == HealthState::Down { Ok(()) } else { Err(target.health()) }
    })
    .await;
    for n in 0..COUNT {
        waiting.send(&n).await.unwrap();
    }
    let at_the_source = async |count| match messages(&rabbitmq, "orders").await {
        Some(left) if left == count => Ok(()),
        other => Err(format!("{other:?} messages are at the source")),
    };
    eventually(PATIENCE, || at_the_source(COUNT)).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(messages(&rabbitmq, "orders").await, Some(COUNT), "nothing was acknowledged");

    mosquitto.start().await;
    let mut moved = Vec::new();
    while moved.len() < 5 {
        let delivery = tokio::time::timeout(PATIENCE, arrived.next()).await.expect("it is moved").unwrap();
        moved.push(String::from_utf8_lossy(delivery.message().payload()).into_owned());
        delivery.ack().await.unwrap();
    }
    assert_eq!(moved.iter().collect::<BTreeSet<_>>().len(), 5, "each once: {moved:?}");
    assert!(arrived.receive(1, Duration::from_secs(2)).await.unwrap().is_empty(), "and no more");
    eventually(PATIENCE, || at_the_source(0)).await;
    bridge.stop().await.unwrap();
}

async fn get(address: &str, path: &str) -> String {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer
}

async fn answers(address: &str, path: &str, expected: &str) {
    eventually(PATIENCE, || async {
        let answer = get(address, path).await;
        if answer.starts_with(&format!("HTTP/1.1 {expected}")) { Ok(()) } else { Err(answer) }
    })
    .await;
}

/// A killed broker makes the service not ready and a ping fail; when it is back, the consumer goes on, and callbacks
/// that were registered before connecting have seen the states in order.
async fn follows(broker: Broker, url: String) {
    async fn handle(n: u64, seen: State<UnboundedSender<u64>>) -> Result<()> {
        Ok(seen.send(n)?)
    }
    let states = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&states);
    let builder = patient(&url).with("reconnect_max", "500ms");
    let bus = builder.on_health(move |health| told.lock().unwrap().push(health.state)).connect().await.unwrap();
    let (sender, mut seen) = unbounded_channel::<u64>();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(sender).route("numbers", handle);
    let address = format!("127.0.0.1:{}", free_port());
    let running = ConsumerRunner::new(consumers).bind(&address).start().await.unwrap();
    bus.queue("numbers").send(&1_u64).await.unwrap();
    let first = tokio::time::timeout(PATIENCE, seen.recv()).await;
    assert_eq!(first, Ok(Some(1)), "{:?} {:?}", running.stats("numbers"), bus.health());
    answers(&address, "/ready", "200").await;
    eventually(PATIENCE, || async { bus.ping().await.map_err(|error| error.to_string()) }).await;

    broker.kill().await;
    answers(&address, "/ready", "503").await;
    bus.ping().await.expect_err("there is no broker");
    answers(&address, "/health", "200").await;

    broker.start().await;
    answers(&address, "/ready", "200").await;
    eventually(PATIENCE, || async { bus.ping().await.map_err(|error| error.to_string()) }).await;
    // A broker that has just begun may refuse once more.
    eventually(PATIENCE, || async { bus.queue("numbers").send(&2_u64).await.map_err(|error| error.to_string()) }).await;
    let second = async { while seen.recv().await.expect("the handler runs") != 2 {} };
    tokio::time::timeout(PATIENCE, second).await.unwrap();
    running.stop().await.unwrap();
    closes(&bus).await;
    eventually(PATIENCE, || async {
        let states = states.lock().unwrap().clone();
        let down = states.iter().position(|state| *state == HealthState::Down).unwrap_or_default();
        let up_again = states[down..].iter().any(|state| matches!(state, HealthState::Up | HealthState::Degraded));
        let in_order = states.first() == Some(&HealthState::Up) && down > 0 && up_again;
        if in_order && states.last() == Some(&HealthState::Closed) { Ok(()) } else { Err(format!("{states:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j9_j13_health_follows_rabbitmq() {
    let broker = Broker::rabbitmq();
    let url = url("amqp", &broker);
    follows(broker, url).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j9_j13_health_follows_mosquitto() {
    let broker = Broker::mosquitto(&[]);
    let url = url("mqtt", &broker);
    follows(broker, url).await;
}

/// However many producers there are, they share the connection and as many channels as the settings say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j20_producers_share_as_many_channels_as_were_asked_for() {
    let broker = Broker::rabbitmq();
    let bus = patient(&url("amqp", &broker)).with("channels", "3").connect().await.unwrap();
    for n in 0..20 {
        bus.queue(format!("shared-{n}")).send(&n).await.unwrap();
    }
    // The broker's statistics are some seconds old.
    eventually(PATIENCE, || async {
        let channels = managed(&broker, "/api/channels").await;
        let confirming: Vec<_> =
            channels.as_array().unwrap().iter().filter(|channel| channel["confirm"] == true).collect();
        let connections: BTreeSet<_> =
            confirming.iter().filter_map(|channel| channel["connection_details"]["name"].as_str()).collect();
        if (confirming.len(), connections.len()) == (3, 1) { Ok(()) } else { Err(format!("{channels:?}")) }
    })
    .await;
    closes(&bus).await;
}

/// What RabbitMQ itself says after a close with messages in hand: no consumer, and nothing that is not acknowledged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn c22_after_a_close_rabbitmq_shows_no_consumer_and_nothing_unsettled() {
    const NAME: &str = "held";
    // The first request is made from the broker's own tables, not from its statistics, which are some seconds old.
    async fn shown(broker: &Broker) -> (u64, u64, usize) {
        let queues = managed(broker, "/api/queues?disable_stats=true&enable_queue_totals=true").await;
        let queue = queues.as_array().unwrap().iter().find(|queue| queue["name"] == NAME).cloned().unwrap_or_default();
        let consumers = managed(broker, "/api/consumers").await;
        let of_queue = |consumer: &&serde_json::Value| consumer["queue"]["name"] == NAME;
        let consumers = consumers.as_array().unwrap().iter().filter(of_queue).count();
        let count = |name: &str| queue[name].as_u64().unwrap_or(u64::MAX);
        (count("messages_ready"), count("messages_unacknowledged"), consumers)
    }
    async fn shows(broker: &Broker, expected: (u64, u64, usize)) {
        eventually(PATIENCE, || async {
            let shown = shown(broker).await;
            if shown == expected { Ok(()) } else { Err(format!("{shown:?}, not {expected:?}")) }
        })
        .await;
    }
    let broker = Broker::rabbitmq();
    let bus = connect(&url("amqp", &broker)).await;
    let queue = bus.queue(NAME);
    for n in 0..5 {
        queue.send(&n).await.unwrap();
    }
    let options = ConsumeOptions { prefetch: 3, ..ConsumeOptions::default() };
    let mut subscription = queue.subscribe(options).await.unwrap();
    let mut held = Vec::new();
    while held.len() < 3 {
        held.extend(subscription.receive(3 - held.len(), PATIENCE).await.unwrap());
    }
    shows(&broker, (2, 3, 1)).await;
    // What is held is settled or returned over the connection; it ends with it, though it is in hand still.
    closes(&bus).await;
    shows(&broker, (5, 0, 0)).await;
    drop((held, subscription));
}

/// Subscriptions without a group leave no queue behind at the broker, whether they are closed or dropped; only the
/// topic's queue for dead letters stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn l6_subscriptions_without_a_group_leave_no_queue() {
    async fn queues(broker: &Broker) -> Vec<String> {
        let queues = managed(broker, "/api/queues?disable_stats=true&enable_queue_totals=true").await;
        queues.as_array().unwrap().iter().filter_map(|queue| Some(queue["name"].as_str()?.to_owned())).collect()
    }
    let broker = Broker::rabbitmq();
    let bus = connect(&url("amqp", &broker)).await;
    let topic = bus.topic("prices");
    for round in 0..50 {
        let mut subscription = topic.subscribe(ConsumeOptions::default()).await.unwrap();
        if round == 0 {
            assert_eq!(queues(&broker).await.len(), 2, "one for the subscription, one for dead letters");
        }
        if round % 2 == 0 {
            subscription.close().await.unwrap();
        }
    }
    eventually(PATIENCE, || async {
        let left = queues(&broker).await;
        if left == ["prices.dlq"] { Ok(()) } else { Err(format!("{left:?} are left")) }
    })
    .await;
    closes(&bus).await;
}
