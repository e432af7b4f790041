//! Sessions that the broker has forgotten, or that another program has deleted, are made again.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use polymq_core::{Address, Backend, Connection, ConsumeOptions, ErrorKind, HealthState, Message, Producer};
use polymq_mqtt::MqttBackend;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::timeout,
};

use crate::{
    harness::{self, Broker, body},
    words::*,
};

/// A proxy that turns some connections away.
struct Proxy {
    port: u16,
    /// Connections whose first packet holds this text are turned away, and cut where they are open; an empty one means all.
    barred: watch::Sender<Option<&'static str>>,
    /// How many were turned away.
    refused: Arc<AtomicUsize>,
}

impl Proxy {
    async fn start(broker: &Broker) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let (barred, refused) = (watch::Sender::new(None), Arc::<AtomicUsize>::default());
        let proxy = Self {
            port: listener.local_addr().expect("bound").port(),
            barred: barred.clone(),
            refused: Arc::clone(&refused),
        };
        let broker = broker.port;
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, broker, barred.subscribe(), Arc::clone(&refused)));
            }
        });
        proxy
    }

    async fn connect(&self, broker: &Broker, settings: &[(&str, &str)]) -> Arc<dyn Connection> {
        let mut all = broker.settings().with("url", format!("mqtt://127.0.0.1:{}", self.port));
        for (key, value) in settings {
            all = all.with(*key, *value);
        }
        MqttBackend.connect(&all).await.expect("connected")
    }

    /// Waits until this many more were turned away.
    async fn refuses(&self, more: usize) {
        let before = self.refused.load(Ordering::SeqCst);
        let refused = async {
            while self.refused.load(Ordering::SeqCst) < before + more {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        };
        timeout(harness::PATIENCE, refused).await.expect("it is tried");
    }
}

async fn pass(
    mut client: TcpStream,
    broker: u16,
    mut barred: watch::Receiver<Option<&'static str>>,
    refused: Arc<AtomicUsize>,
) {
    let mut first = vec![0; 4096];
    let Ok(count @ 1..) = client.read(&mut first).await else { return };
    first.truncate(count);
    let text = harness::text(&first);
    let is_barred = |barred: &Option<&'static str>| barred.is_some_and(|part| text.contains(part));
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", broker)).await else { return };
    if is_barred(&barred.borrow()) {
        refused.fetch_add(1, Ordering::SeqCst);
        return;
    }
    if server.write_all(&first).await.is_err() {
        return;
    }
    tokio::select! {
        _ = tokio::io::copy_bidirectional(&mut client, &mut server) => {}
        _ = barred.wait_for(is_barred) => {}
    }
}

/// While enough is here nothing is read, until it is looked whether the connection still holds after the other one was lost.
#[tokio::test]
async fn what_comes_while_a_connection_is_looked_at_is_handed_out() {
    let broker = Broker::start().await;
    let proxy = Proxy::start(&broker).await;
    let bus = proxy.connect(&broker, &[("client_id", "the-sender"), ("reconnect_max", "300ms")]).await;
    let queue = Address::queue("looked-at");
    let options = ConsumeOptions { prefetch: 4, prefetch_bytes: 50, ..consume() };
    let mut busy = bus.consumer(&queue, &options).await.expect("consumer");
    let mut idle = bus.consumer(&queue, &options).await.expect("consumer");
    let other = broker.connect().await;
    let producer = other.producer(&queue, &produce()).await.expect("producer");
    producer.send(Message::new("large".repeat(100))).await.expect("held");
    // More than both may have: nothing is read any more.
    let large = harness::one(&mut *busy).await;
    producer.send(Message::new("small")).await.expect("held");
    let mut got = Vec::new();
    let receive = timeout(harness::PATIENCE, idle.receive(1, &mut got));
    let outage = async {
        proxy.barred.send_replace(Some("the-sender"));
        proxy.refuses(1).await;
        proxy.barred.send_replace(None);
    };
    let (received, ()) = tokio::join!(receive, outage);
    received.expect("it is handed out").expect("received");
    assert_eq!(got.iter().map(body).collect::<Vec<_>>(), ["small"]);
    for taken in [&large, &got[0]] {
        busy.settler().ack(taken.token).await.expect("acknowledged");
    }
    bus.close().await.and(other.close().await).expect("closed");
}

async fn refused(producer: &dyn Producer, kind: ErrorKind) {
    let send = timeout(harness::PATIENCE * 2, producer.send(Message::new("refused"))).await;
    let error = send.expect("answered").expect_err("nobody holds it");
    assert_eq!(error.kind(), kind, "{error}");
}

#[tokio::test]
async fn a_queue_that_is_gone_is_declared_again_before_the_next_message() {
    let broker = Broker::start().await;
    let (bus, other) = (broker.connect().await, broker.connect().await);
    let queue = Address::queue("expired");
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    let undeclared = polymq_core::ProduceOptions { declare: false, ..produce() };
    let existing = bus.producer(&queue, &undeclared).await.expect("it exists");
    // To this connection, it is as if the session had expired.
    other.delete(&queue, None).await.expect("deleted");
    for _ in 0..2 {
        refused(&*existing, ErrorKind::Unroutable).await;
    }
    assert!(!other.exists(&queue, None).await.expect("answered"), "who must not declare it has not");
    refused(&*producer, ErrorKind::Unroutable).await;
    producer.send(Message::new("held")).await.expect("it was declared again");
    // Who declares means it.
    other.delete(&queue, None).await.expect("deleted");
    bus.declare(&queue, &consume()).await.expect("declared");
    assert!(other.exists(&queue, None).await.expect("answered"));
    producer.send(Message::new("held too")).await.expect("somebody holds it");
    let mut consumer = other.consumer(&queue, &consume()).await.expect("consumer");
    assert_eq!(body(&harness::one(&mut *consumer).await), "held too");
    bus.close().await.and(other.close().await).expect("closed");
}

/// One queue that cannot be declared after a reconnect holds up the others for a time only, and is tried on.
#[tokio::test]
async fn what_cannot_be_declared_after_a_reconnect_is_declared_when_it_can_be() {
    // Where the broker does not tell that nobody holds a message, it must not be sent meanwhile.
    for (settings, kind) in [
        ([("protocol", "5"), ("qos", "1")], ErrorKind::Unroutable),
        ([("protocol", "5"), ("qos", "2")], ErrorKind::Disconnected),
        ([("protocol", "3.1.1"), ("qos", "1")], ErrorKind::Disconnected),
    ] {
        let broker = Broker::start_with(&["--volatile"]).await;
        let proxy = Proxy::start(&broker).await;
        let mut all = settings.to_vec();
        all.extend([("operation_timeout", "5s"), ("reconnect_max", "300ms")]);
        let bus = proxy.connect(&broker, &all).await;
        let (stuck, fine) = (Address::queue("stuck"), Address::queue("fine"));
        let producer = bus.producer(&stuck, &produce()).await.expect("producer");
        let others = bus.producer(&fine, &produce()).await.expect("producer");
        let mut health = bus.health();
        broker.kill().await;
        while health.now().state != HealthState::Down {
            timeout(harness::PATIENCE, health.changed()).await.expect("the loss is seen").expect("not closed");
        }
        proxy.barred.send_replace(Some(":q:stuck:0"));
        let waiting = others.send(Message::new("waited"));
        broker.up().await;
        timeout(harness::PATIENCE, waiting).await.expect("answered").expect("held");
        refused(&*producer, kind).await;
        proxy.refuses(2).await;
        proxy.barred.send_replace(None);
        let sent = async {
            while producer.send(Message::new("held")).await.is_err() {
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        };
        timeout(harness::PATIENCE, sent).await.expect("it was declared again");
        for (queue, expected) in [(&fine, "waited"), (&stuck, "held")] {
            let mut consumer = bus.consumer(queue, &consume()).await.expect("consumer");
            assert_eq!(body(&harness::one(&mut *consumer).await), expected, "{settings:?}");
        }
        bus.close().await.expect("closed");
    }
}

/// A consumer that looks for a session asks over the connection that sends.
#[tokio::test]
async fn a_consumer_without_a_session_ends_with_the_connection_that_is_given_up() {
    let broker = Broker::start().await;
    let proxy = Proxy::start(&broker).await;
    let bus = proxy.connect(&broker, &[("reconnect_limit", "2"), ("reconnect_max", "300ms")]).await;
    let mut consumer = bus.consumer(&Address::queue("given-up"), &consume()).await.expect("consumer");
    // It takes this for someone else who has the session, and looks for one.
    proxy.barred.send_replace(Some(":q:given-up:"));
    proxy.refuses(2).await;
    proxy.barred.send_replace(Some(""));
    let told = timeout(harness::PATIENCE * 2, consumer.receive(1, &mut Vec::new())).await;
    assert_eq!(told.expect("it is told").expect_err("it has ended").kind(), ErrorKind::Disconnected);
}

/// The connection that sends is there all the time: nothing else says that the consumer gets nothing.
#[tokio::test]
async fn a_consumer_without_a_session_is_not_healthy() {
    let broker = Broker::start().await;
    let proxy = Proxy::start(&broker).await;
    let bus = proxy.connect(&broker, &[("reconnect_max", "300ms")]).await;
    let queue = Address::queue("sessionless");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let mut health = bus.health();
    proxy.barred.send_replace(Some(":q:sessionless:"));
    // The second try begins when the first one has failed.
    proxy.refuses(2).await;
    let now = health.now();
    let named = now.reason.as_deref().is_some_and(|reason| reason.contains("sessionless"));
    assert!(now.state == HealthState::Down && named, "{now}");
    proxy.barred.send_replace(None);
    while health.now().state == HealthState::Down {
        timeout(harness::PATIENCE, health.changed()).await.expect("it has a session again").expect("not closed");
    }
    bus.producer(&queue, &produce()).await.expect("producer").send(Message::new("held")).await.expect("held");
    assert_eq!(body(&harness::one(&mut *consumer).await), "held");
    bus.close().await.expect("closed");
}
