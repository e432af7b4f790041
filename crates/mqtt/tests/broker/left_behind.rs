//! Sessions that somebody has left behind, with messages in them, and connections that end while they are emptied.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use polymq_core::{Address, Backend, Connection, ConsumeOptions, Consumer, Message, ProduceOptions};
use polymq_mqtt::MqttBackend;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{broadcast, mpsc},
    time::{sleep, timeout},
};

use crate::{
    harness::{self, Broker, body, client},
    words::*,
};

/// A proxy that knows the connections of one session from the others.
#[derive(Clone)]
struct Proxy {
    port: u16,
    broker: u16,
    session: Arc<str>,
    /// Connections of the session so far, and at present.
    opened: Arc<AtomicUsize>,
    open: Arc<AtomicUsize>,
    /// How often the session was unsubscribed.
    unsubscribed: Arc<AtomicUsize>,
    /// The session's next UNSUBSCRIBE is lost, and its connection too.
    lose: Arc<AtomicBool>,
    /// Ends the session's connection.
    cuts: broadcast::Sender<()>,
}

impl Proxy {
    async fn start(broker: &Broker, session: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let proxy = Self {
            port: listener.local_addr().expect("bound").port(),
            broker: broker.port,
            session: session.into(),
            opened: Arc::default(),
            open: Arc::default(),
            unsubscribed: Arc::default(),
            lose: Arc::default(),
            cuts: broadcast::Sender::new(8),
        };
        let serving = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serving.clone().pass(client));
            }
        });
        proxy
    }

    async fn connect(&self, broker: &Broker) -> Arc<dyn Connection> {
        let settings = broker.settings().with("port", self.port.to_string()).with("reconnect_max", "500ms");
        let settings = settings.with("url", format!("mqtt://127.0.0.1:{}", self.port));
        MqttBackend.connect(&settings).await.expect("connected")
    }

    async fn pass(self, mut client: TcpStream) {
        let mut cuts = self.cuts.subscribe();
        let Ok(mut server) = TcpStream::connect(("127.0.0.1", self.broker)).await else { return };
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let (mut up, mut down, mut pending) = (vec![0; 65536], vec![0; 65536], Vec::new());
        let mut ours = None;
        loop {
            tokio::select! {
                count = from_client.read(&mut up) => {
                    let Ok(count @ 1..) = count else { break };
                    pending.extend_from_slice(&up[..count]);
                    let mut lost = false;
                    while let Some(length) = packet(&pending) {
                        let packet: Vec<_> = pending.drain(..length).collect();
                        // The first one is CONNECT.
                        let ours = *ours.get_or_insert_with(|| {
                            let id = self.session.as_bytes();
                            let ours = packet.windows(id.len()).any(|part| part == id);
                            self.opened.fetch_add(usize::from(ours), Ordering::SeqCst);
                            self.open.fetch_add(usize::from(ours), Ordering::SeqCst);
                            ours
                        });
                        let unsubscribes = ours && packet[0] >> 4 == 10;
                        if unsubscribes && self.lose.swap(false, Ordering::SeqCst) {
                            lost = true;
                            break;
                        }
                        if to_server.write_all(&packet).await.is_err() {
                            lost = true;
                            break;
                        }
                        self.unsubscribed.fetch_add(usize::from(unsubscribes), Ordering::SeqCst);
                    }
                    if lost {
                        break;
                    }
                }
                count = from_server.read(&mut down) => {
                    let Ok(count @ 1..) = count else { break };
                    if to_client.write_all(&down[..count]).await.is_err() {
                        break;
                    }
                }
                _ = cuts.recv() => if ours == Some(true) {
                    break;
                },
            }
        }
        self.open.fetch_sub(usize::from(ours == Some(true)), Ordering::SeqCst);
    }

    async fn until(&self, what: &str, holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < harness::PATIENCE, "not in time: {what}");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

fn count(of: &AtomicUsize) -> usize {
    of.load(Ordering::SeqCst)
}

/// How long the first packet is, when it is there.
fn packet(bytes: &[u8]) -> Option<usize> {
    let mut length = 0;
    for (at, byte) in bytes.iter().skip(1).take(4).enumerate() {
        length |= usize::from(byte & 127) << (7 * at);
        if byte & 128 == 0 {
            let whole = 2 + at + length;
            return (bytes.len() >= whole).then_some(whole);
        }
    }
    None
}

/// Sessions 0 and 1 of a queue, which nobody has; half of forty messages is in each.
async fn two_sessions(broker: &Broker, queue: &Address) {
    let (one, two) = (broker.connect().await, broker.connect().await);
    let first = one.consumer(queue, &consume()).await.expect("consumer");
    let second = two.consumer(queue, &consume()).await.expect("consumer");
    send_many(&*one, queue, "m", 40).await;
    drop((first, second));
    let (one, two) = tokio::join!(one.close(), two.close());
    one.and(two).expect("closed");
}

/// Handles what comes, for as long as the bus is open.
fn handle(mut consumer: Box<dyn Consumer>) -> mpsc::UnboundedReceiver<String> {
    let (handled, bodies) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        let (settler, mut got) = (consumer.settler(), Vec::new());
        while consumer.receive(1, &mut got).await.is_ok() {
            for incoming in got.drain(..) {
                let _ = handled.send(body(&incoming));
                let _ = settler.ack(incoming.token).await;
            }
        }
    });
    bodies
}

/// Waits for all forty, some of which may come again.
async fn gather(bodies: &mut mpsc::UnboundedReceiver<String>, prefix: &str) {
    let mut awaited: BTreeSet<_> = (0..40).map(|n| format!("{prefix}{n}")).collect();
    while !awaited.is_empty() {
        let body = timeout(harness::PATIENCE, bodies.recv()).await;
        awaited.remove(&body.unwrap_or_else(|_| panic!("stranded: {awaited:?}")).expect("open"));
    }
}

#[tokio::test]
async fn a_session_whose_connection_is_cut_is_emptied_all_the_same() {
    let broker = Broker::start().await;
    let queue = Address::queue("behind");
    two_sessions(&broker, &queue).await;
    let proxy = Proxy::start(&broker, ":q:behind:1").await;
    let bus = proxy.connect(&broker).await;
    let options = ConsumeOptions { prefetch: 1, ..consume() };
    let consumer = bus.consumer(&queue, &options).await.expect("consumer");
    proxy.until("the session is taken over", || count(&proxy.unsubscribed) == 1).await;
    let _ = proxy.cuts.send(());
    proxy.until("its connection is cut", || count(&proxy.open) == 0).await;
    gather(&mut handle(consumer), "m").await;
    bus.close().await.expect("closed");
}

/// A session as some consumer has left it: subscribed, and nobody's.
async fn left_by_someone(broker: &Broker, queue: &str, number: u16) {
    let (port, id, filter) = (broker.port, format!("polymq:q:{queue}:{number}"), format!("$share/polymq/{queue}"));
    let made = tokio::task::spawn_blocking(move || {
        let options = ["-V", "5", "-i", &id, "-c", "-x", "3600", "-q", "1", "-t", &filter, "-E"];
        client("mosquitto_sub", port, &options)
    });
    let made = made.await.expect("ran");
    assert!(made.status.success(), "{}", harness::text(&made.stderr));
}

/// One in the middle of a row that was emptied expires some day, while a consumer above it lives on.
#[tokio::test]
async fn sessions_above_a_gap_are_found() {
    let broker = Broker::start().await;
    let queue = Address::queue("gap");
    let bus = broker.connect().await;
    left_by_someone(&broker, "gap", 3).await;
    bus.declare(&queue, &consume()).await.expect("declared");
    send_many(&*bus, &queue, "m", 40).await;
    gather(&mut handle(bus.consumer(&queue, &consume()).await.expect("consumer")), "m").await;

    // Deleting the queue deletes them too.
    left_by_someone(&broker, "deleted", 3).await;
    let queue = Address::queue("deleted");
    bus.declare(&queue, &consume()).await.expect("declared");
    send_many(&*bus, &queue, "m", 40).await;
    bus.delete(&queue, None).await.expect("deleted");
    let port = broker.port;
    let kept = tokio::task::spawn_blocking(move || {
        let options = ["-V", "5", "-i", "polymq:q:deleted:3", "-c", "-x", "3600", "-t", "other", "-C", "1", "-W", "1"];
        client("mosquitto_sub", port, &options)
    });
    assert_eq!(harness::text(&kept.await.expect("ran").stdout), "", "it was forgotten with what it held");
    bus.close().await.expect("closed");
}

/// It would get its share of every message, with nobody there to fetch it.
#[tokio::test]
async fn a_session_is_not_left_while_it_is_subscribed() {
    let broker = Broker::start().await;
    let queue = Address::queue("unsubscribed");
    two_sessions(&broker, &queue).await;
    let proxy = Proxy::start(&broker, ":q:unsubscribed:1").await;
    proxy.lose.store(true, Ordering::SeqCst);
    let bus = proxy.connect(&broker).await;
    let mut bodies = handle(bus.consumer(&queue, &consume()).await.expect("consumer"));
    gather(&mut bodies, "m").await;
    let let_go = || count(&proxy.opened) > 1 && count(&proxy.open) == 0;
    proxy.until("the session is connected again and let go", let_go).await;
    send_many(&*bus, &queue, "late", 40).await;
    gather(&mut bodies, "late").await;
    bus.close().await.expect("closed");
}

/// A monitor takes every message, so that the broker never tells that no session of the queue holds it. Who declared the queue sees
/// to it that one does.
#[tokio::test]
async fn a_session_that_nobody_consumes_does_not_expire_while_its_process_lives() {
    let broker = Broker::start().await;
    let proxy = Proxy::start(&broker, ":q:revisited:0").await;
    let settings = broker.settings().with("url", format!("mqtt://127.0.0.1:{}", proxy.port));
    let bus = MqttBackend.connect(&settings.with("session_expiry", "6s")).await.expect("connected");
    let other = broker.connect().await;
    let queue = Address::queue("revisited");
    let _monitor = other.consumer(&Address::topic("#"), &consume()).await.expect("a monitor");
    let producer = bus.producer(&queue, &ProduceOptions::default()).await.expect("producer");
    proxy.until("it is visited again and again", || count(&proxy.opened) > 2).await;
    // As if it had expired.
    other.delete(&queue, None).await.expect("deleted");
    let before = count(&proxy.opened);
    proxy.until("it is made again", || count(&proxy.opened) > before + 1 && count(&proxy.open) == 0).await;
    producer.send(Message::new("held")).await.expect("confirmed");
    let mut consumer = other.consumer(&queue, &consume()).await.expect("consumer");
    assert_eq!(body(&harness::one(&mut *consumer).await), "held");
    bus.close().await.and(other.close().await).expect("closed");
}
