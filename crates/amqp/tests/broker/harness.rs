//! A real RabbitMQ of our own, a proxy that counts and cuts, and the management API.

use std::{
    future::Future,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use polymq_amqp::AmqpConnection;
use polymq_core::{
    Address, Connection, ConsumeOptions, Consumer, Incoming, Message, ProduceOptions, Producer, Receipt, Result,
    Settings,
};
use polymq_testkit::free_port;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::broadcast,
};

/// The largest body that the broker takes.
pub const LARGEST: usize = 1024 * 1024;

/// A broker process.
#[derive(Debug)]
pub struct Broker {
    dir: PathBuf,
    pub port: u16,
    management: u16,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

impl Broker {
    pub fn start(name: &str) -> Self {
        // Too little for some of ours: what the broker itself says to a body that is too large.
        Self::start_with(name, &format!("max_message_size = {LARGEST}\n"))
    }

    /// With these lines in its configuration.
    pub fn start_with(name: &str, lines: &str) -> Self {
        let base = std::env::var_os("POLYMQ_TEST_DIR").map_or_else(|| root().join("target/brokers"), PathBuf::from);
        std::fs::create_dir_all(&base).expect("a directory for brokers");
        let dir =
            base.canonicalize().expect("an existing directory").join(format!("amqp-{name}-{}", std::process::id()));
        std::fs::write(dir.with_extension("conf"), lines).expect("written");
        let broker = Self { dir, port: free_port(), management: free_port() };
        broker.up();
        broker
    }

    fn script(&self, arguments: &[&str]) {
        let output = Command::new(root().join("scripts/brokers"))
            .args(arguments)
            .args(["--dir", &self.dir.to_string_lossy()])
            .output()
            .expect("scripts/brokers can be run");
        assert!(
            output.status.success(),
            "these tests need a real RabbitMQ, and scripts/brokers {} failed: {}\nrun scripts/brokers install",
            arguments[0],
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Starts it, or starts it again on the same data.
    pub fn up(&self) {
        let (port, management) = (self.port.to_string(), self.management.to_string());
        let conf = self.dir.with_extension("conf");
        let conf = conf.to_string_lossy();
        self.script(&["up", "rabbitmq", "--port", &port, "--management-port", &management, "--include", &conf]);
    }

    pub fn kill(&self, signal: &str) {
        self.script(&["kill", "--signal", signal]);
    }

    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}", self.port)
    }

    /// A call of the management API.
    pub async fn management(&self, method: &str, path: &str, body: &str) -> serde_json::Value {
        let mut stream = TcpStream::connect(("127.0.0.1", self.management)).await.expect("the management API");
        let request = format!(
            "{method} /api/{path} HTTP/1.0\r\nAuthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).await.expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("HTTP");
        assert!(head.split(' ').nth(1).is_some_and(|code| code.starts_with('2')), "{method} {path}: {answer}");
        serde_json::from_str(body).unwrap_or_default()
    }

    /// Ends the process and removes its data.
    pub fn stop(&self) {
        self.script(&["down", "--now"]);
        let _ = std::fs::remove_dir_all(&self.dir);
        let _ = std::fs::remove_file(self.dir.with_extension("conf"));
    }
}

/// The broker that tests share, and the one that they take turns to break.
pub static SHARED: OnceLock<Broker> = OnceLock::new();
pub static BREAKABLE: OnceLock<Broker> = OnceLock::new();
pub static TURN: Mutex<()> = Mutex::new(());

pub fn shared() -> &'static Broker {
    SHARED.get().expect("started by main")
}

pub fn breakable() -> &'static Broker {
    BREAKABLE.get().expect("started by main")
}

/// A name that no other test uses.
pub fn unique(name: &str) -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    format!("{name}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

pub async fn connect(url: &str) -> AmqpConnection {
    let mut settings = Settings::from_url(url).expect("a URL");
    // Of a busy machine; what a test is about it says itself.
    if settings.get("connect_timeout").is_none() {
        settings = settings.with("connect_timeout", "60s");
    }
    AmqpConnection::connect(&settings).await.expect("a connection")
}

pub async fn raw(broker: &Broker) -> lapin::Channel {
    let connection =
        lapin::Connection::connect(&broker.url(), lapin::ConnectionProperties::default()).await.expect("lapin");
    connection.create_channel().await.expect("a channel")
}

pub async fn producer(connection: &AmqpConnection, address: &Address) -> Box<dyn Producer> {
    connection.producer(address, &ProduceOptions::default()).await.expect("a producer")
}

pub async fn consumer(connection: &AmqpConnection, address: &Address) -> Box<dyn Consumer> {
    connection.consumer(address, &ConsumeOptions::default()).await.expect("a consumer")
}

/// What the handle of core does before it hands a message to a backend.
pub fn message(text: &str) -> Message {
    let now = std::time::SystemTime::now();
    Message::new(text.to_owned()).with_id(polymq_core::MessageId::new()).with_time(now)
}

pub fn text(incoming: &Incoming) -> String {
    String::from_utf8_lossy(incoming.message.payload()).into_owned()
}

pub async fn send(producer: &dyn Producer, message: Message) -> Result<Receipt> {
    within(60, producer.send(message)).await
}

/// Messages until there are `count`.
pub async fn receive(consumer: &mut dyn Consumer, count: usize) -> Vec<Incoming> {
    let mut all = Vec::new();
    let _: () = within(60, async {
        while all.len() < count {
            consumer.receive(count - all.len(), &mut all).await.expect("messages");
        }
    })
    .await;
    all
}

/// Asserts that nothing comes for a while.
pub async fn silence(consumer: &mut dyn Consumer, millis: u64) {
    let mut none = Vec::new();
    let waited = tokio::time::timeout(Duration::from_millis(millis), consumer.receive(1, &mut none)).await;
    assert!(waited.is_err(), "expected nothing, got {none:?}");
}

pub async fn within<T>(seconds: u64, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), future).await.expect("an answer in time")
}

/// Waits for something that becomes true by itself.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let start = Instant::now();
    while !holds().await {
        assert!(start.elapsed() < Duration::from_secs(60), "not within 60 s: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A TCP proxy that counts acknowledgement frames, cuts every connection, and speaks for a broker out of memory.
#[derive(Debug, Clone)]
pub struct Proxy {
    pub port: u16,
    pub acks: Arc<AtomicU64>,
    refuse: Arc<AtomicBool>,
    /// Keep what clients say to yourself, and how many bytes that is.
    pub hold: Arc<AtomicBool>,
    pub kept: Arc<AtomicU64>,
    /// The method of a client's with which that begins.
    trap: Arc<AtomicU32>,
    orders: broadcast::Sender<Order>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Order {
    Cut,
    /// Tell the client this, and read from it no more or again.
    Tell(Vec<u8>, bool),
}

impl Proxy {
    pub async fn start(target: u16) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let orders = broadcast::channel(8).0;
        let proxy = Self {
            port,
            acks: Arc::default(),
            refuse: Arc::default(),
            hold: Arc::default(),
            kept: Arc::default(),
            trap: Arc::default(),
            orders,
        };
        let serving = proxy.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if serving.refuse.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else { continue };
                tokio::spawn(serving.clone().pass(client, server));
            }
        });
        proxy
    }

    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}?reconnect_initial=50ms&reconnect_max=200ms", self.port)
    }

    /// Ends every connection; while `refuse`, new ones end at once.
    pub fn cut(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::SeqCst);
        let _ = self.orders.send(Order::Cut);
    }

    pub fn mend(&self) {
        self.refuse.store(false, Ordering::SeqCst);
    }

    /// Lets the broker hear nothing any more from the first such method on.
    pub fn hold_from(&self, method: u32) {
        self.trap.store(method, Ordering::SeqCst);
    }

    /// `connection.blocked` (class 10, method 60), after which a broker reads no more.
    pub fn block(&self) {
        let reason = b"low on memory";
        let mut payload = vec![0, 10, 0, 60, reason.len() as u8];
        payload.extend_from_slice(reason);
        let _ = self.orders.send(Order::Tell(frame(&payload), true));
    }

    /// `connection.unblocked` (class 10, method 61). What was kept passes first.
    pub fn unblock(&self) {
        self.hold.store(false, Ordering::SeqCst);
        let _ = self.orders.send(Order::Tell(frame(&[0, 10, 0, 61]), false));
    }

    async fn pass(self, mut client: TcpStream, mut server: TcpStream) {
        let mut orders = self.orders.subscribe();
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let (mut up, mut down) = (Frames::new(8), Frames::new(0));
        let (mut sent, mut answered) = (vec![0; 65536], vec![0; 65536]);
        let mut held = false;
        let mut kept = Vec::new();
        loop {
            let done = tokio::select! {
                count = from_client.read(&mut sent), if !held => {
                    let count = count.unwrap_or(0);
                    let whole = up.whole(&sent[..count]);
                    self.acks.fetch_add(up.count(BASIC_ACK), Ordering::SeqCst);
                    let trap = self.trap.load(Ordering::SeqCst);
                    if trap != 0 && up.count(trap) > 0 {
                        self.trap.store(0, Ordering::SeqCst);
                        self.hold.store(true, Ordering::SeqCst);
                    }
                    kept.extend_from_slice(&whole);
                    if self.hold.load(Ordering::SeqCst) {
                        self.kept.fetch_add(count as u64, Ordering::SeqCst);
                    } else if to_server.write_all(&std::mem::take(&mut kept)).await.is_err() {
                        return;
                    }
                    count == 0
                }
                count = from_server.read(&mut answered) => {
                    let count = count.unwrap_or(0);
                    count == 0 || to_client.write_all(&down.whole(&answered[..count])).await.is_err()
                }
                order = orders.recv() => match order {
                    Ok(Order::Tell(bytes, hold)) => {
                        held = hold;
                        if !hold && to_server.write_all(&std::mem::take(&mut kept)).await.is_err() {
                            return;
                        }
                        to_client.write_all(&bytes).await.is_err()
                    }
                    _ => true,
                },
            };
            if done {
                return;
            }
        }
    }
}

/// A way to the broker that puts bytes which are no UTF-8 in the place of [`MARK`]: our client library cannot say them.
pub async fn garbling(target: u16) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        let (client, _) = listener.accept().await.expect("a client");
        let server = TcpStream::connect(("127.0.0.1", target)).await.expect("the broker");
        let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
            (client.into_split(), server.into_split());
        tokio::spawn(async move { tokio::io::copy(&mut from_server, &mut to_client).await });
        let (mut up, mut bytes) = (Frames::new(8), vec![0; 65536]);
        while let Ok(count @ 1..) = from_client.read(&mut bytes).await {
            let mut whole = up.whole(&bytes[..count]);
            while let Some(at) = whole.windows(MARK.len()).position(|part| part == MARK.as_bytes()) {
                whole[at..at + MARK.len()].fill(0xff);
            }
            to_server.write_all(&whole).await.expect("written");
        }
    });
    port
}

pub const MARK: &str = "no-utf-8";

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![1, 0, 0];
    frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    frame.extend_from_slice(payload);
    frame.push(0xce);
    frame
}

/// Class and method.
pub const BASIC_CONSUME: u32 = 60 << 16 | 20;
pub const QUEUE_PURGE: u32 = 50 << 16 | 30;
const BASIC_ACK: u32 = 60 << 16 | 80;

/// Cuts a stream into whole frames, and tells the methods among them.
struct Frames {
    pending: Vec<u8>,
    /// Bytes of the greeting, which is no frame.
    skip: usize,
    /// Of the last frames.
    methods: Vec<u32>,
}

impl Frames {
    fn new(skip: usize) -> Self {
        Self { pending: Vec::new(), skip, methods: Vec::new() }
    }

    fn count(&self, method: u32) -> u64 {
        self.methods.iter().filter(|seen| **seen == method).count() as u64
    }

    fn whole(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.methods.clear();
        self.pending.extend_from_slice(bytes);
        let mut at = self.skip;
        while self.pending.len() >= at + 7 {
            let head = &self.pending[at..];
            let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
            if head.len() < size + 8 {
                break;
            }
            if head[0] == 1 && size >= 4 {
                self.methods.push(u32::from_be_bytes([head[7], head[8], head[9], head[10]]));
            }
            at += size + 8;
        }
        if self.pending.len() < at {
            return Vec::new();
        }
        self.skip = 0;
        self.pending.drain(..at).collect()
    }
}
