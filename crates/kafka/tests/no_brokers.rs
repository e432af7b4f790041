//! A cluster that tells of no broker, as one of KRaft does while it is being stopped, and has one again later. The client
//! library may be left without anybody to ask; `metadata.recovery.strategy=none` makes that certain. It is a cluster in this
//! process that speaks just enough of Kafka's protocol: a real one gives that answer in a moment that nobody can choose.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq_core::{
    Address, Backend, Connection, ConsumeOptions, ErrorKind, HealthState, HealthWatch, Message, ProduceOptions, Retry,
    Settings,
};
use polymq_kafka::KafkaBackend;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// Longer than a client takes to be given up, and a machine that stands still besides.
const PATIENCE: Duration = Duration::from_secs(120);

const PRODUCE: i16 = 0;
const FETCH: i16 = 1;
const LIST_OFFSETS: i16 = 2;
const METADATA: i16 = 3;
const FIND_COORDINATOR: i16 = 10;
const API_VERSIONS: i16 = 18;
const INIT_PRODUCER_ID: i16 = 22;

/// A cluster of one broker.
#[derive(Debug, Default)]
struct Cluster {
    port: u16,
    /// Whether it tells of no broker.
    is_empty: AtomicBool,
    /// How often it has told of none.
    told_of_none: AtomicUsize,
    /// How often a consumer has asked who coordinates its group.
    asked: AtomicUsize,
    /// Whether messages are taken. Until then nobody hears what became of them.
    takes: AtomicBool,
    /// How often messages were sent.
    sent: AtomicUsize,
    /// Whether it goes away with the first message that is sent, without a word.
    is_mortal: AtomicBool,
    /// The offset of the next message of every partition.
    end: AtomicI64,
    /// From where messages were asked for.
    fetched_from: Mutex<Vec<i64>>,
}

/// What a request gets.
enum Said {
    Answer(Answer),
    Nothing,
    /// Not a request that is known here.
    Goodbye,
}

impl Cluster {
    async fn start() -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let cluster = Arc::new(Self { port, ..Self::default() });
        let serving = Arc::clone(&cluster);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Arc::clone(&serving).serve(stream));
            }
        });
        cluster
    }

    fn settings(&self) -> Settings {
        let options = "metadata.recovery.strategy%3Dnone%3Btopic.metadata.refresh.interval.ms%3D1000";
        let url = format!("kafka://127.0.0.1:{}?heartbeat=1s&options={options}", self.port);
        Settings::from_url(&url).expect("a URL")
    }

    async fn serve(self: Arc<Self>, mut stream: TcpStream) {
        let is_gone = || self.is_mortal.load(Ordering::Acquire) && self.sent.load(Ordering::Acquire) > 0;
        while !is_gone()
            && let Ok(length) = stream.read_i32().await
        {
            let mut request = vec![0; usize::try_from(length).expect("a length")];
            if stream.read_exact(&mut request).await.is_err() {
                return;
            }
            if request.starts_with(&FETCH.to_be_bytes()) {
                // As a broker that waits for messages.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            let body = match self.answer(&request) {
                Said::Answer(Answer(body)) => body,
                Said::Nothing => continue,
                Said::Goodbye => return,
            };
            let mut answer = u32::try_from(body.len() + 4).expect("a length").to_be_bytes().to_vec();
            answer.extend(&request[4..8]);
            answer.extend(body);
            if stream.write_all(&answer).await.is_err() {
                return;
            }
        }
    }

    fn answer(&self, request: &[u8]) -> Said {
        let mut answer = Answer::default();
        match i16::from_be_bytes([request[0], request[1]]) {
            API_VERSIONS => {
                // Version 3: a compact array, each with tags.
                answer = answer.i16(0);
                let known = [
                    (PRODUCE, 3, 7),
                    (FETCH, 4, 4),
                    (LIST_OFFSETS, 1, 1),
                    (METADATA, 0, 4),
                    (FIND_COORDINATOR, 0, 0),
                    (API_VERSIONS, 0, 3),
                    (INIT_PRODUCER_ID, 0, 1),
                ];
                answer = answer.bytes(&[u8::try_from(known.len() + 1).expect("a few")]);
                for (key, from, to) in known {
                    answer = answer.i16(key).i16(from).i16(to).bytes(&[0]);
                }
                answer = answer.i32(0).bytes(&[0]);
            }
            METADATA => {
                let is_empty = self.is_empty.load(Ordering::Acquire);
                answer = answer.i32(0);
                answer = match is_empty {
                    true => answer.i32(0),
                    false => answer.i32(1).i32(1).string("127.0.0.1").i32(self.port.into()).i16(-1),
                };
                // No cluster's name, the controller, and each topic that was asked for with one partition.
                let topics = topics(request);
                answer = answer.i16(-1).i32(1).i32(i32::try_from(topics.len()).expect("a few"));
                for topic in topics {
                    answer = answer.i16(0).string(&topic).bytes(&[0]).i32(1);
                    answer = answer.i16(0).i32(0).i32(1).i32(1).i32(1).i32(1).i32(1);
                }
                if is_empty {
                    self.told_of_none.fetch_add(1, Ordering::AcqRel);
                }
            }
            FIND_COORDINATOR => {
                self.asked.fetch_add(1, Ordering::AcqRel);
                // Not available yet.
                answer = answer.i16(15).i32(-1).string("").i32(-1);
            }
            INIT_PRODUCER_ID => answer = answer.i32(0).i16(0).i64(1).i16(0),
            PRODUCE => {
                self.sent.fetch_add(1, Ordering::AcqRel);
                if self.is_mortal.load(Ordering::Acquire) {
                    return Said::Goodbye;
                }
                if !self.takes.load(Ordering::Acquire) {
                    return Said::Nothing;
                }
                // One topic with one partition, at its end; without a time of the broker's.
                let end = self.end.fetch_add(1, Ordering::AcqRel);
                answer = answer.i32(1).string("orders").i32(1).i32(0).i16(0).i64(end).i64(-1).i64(0).i32(0);
            }
            LIST_OFFSETS => {
                let end = self.end.load(Ordering::Acquire);
                answer = answer.i32(1).string("events").i32(1).i32(0).i16(0).i64(-1).i64(end);
            }
            FETCH => {
                // The replica, how long, how little, how much, isolation; the one topic and its one partition, and the offset.
                let at = body(request) + 4 * 4 + 1 + 4 + (2 + "events".len()) + 4 + 4;
                if let Some(offset) = request.get(at..at + 8) {
                    let offset = i64::from_be_bytes(offset.try_into().expect("eight bytes"));
                    self.fetched_from.lock().expect("no panic").push(offset);
                }
                // Nothing new: the end of the partition, twice, no transactions and no records.
                let end = self.end.load(Ordering::Acquire);
                answer = answer.i32(0).i32(1).string("events").i32(1);
                answer = answer.i32(0).i16(0).i64(end).i64(end).i32(0).i32(0);
            }
            _ => return Said::Goodbye,
        }
        Said::Answer(answer)
    }

    /// Where a consumer has asked for messages since this was asked before.
    fn fetches(&self) -> Vec<i64> {
        std::mem::take(&mut self.fetched_from.lock().expect("no panic"))
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let so = async {
            while !is_so(self) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, so).await.unwrap_or_else(|_| panic!("{what}: {self:?}"));
    }
}

/// Where a request begins to say what it wants. What is before that is the head: key, version, number and client.
fn body(request: &[u8]) -> usize {
    10 + usize::from(u16::from_be_bytes([request[8], request[9]]))
}

/// The names in a request for metadata.
fn topics(request: &[u8]) -> Vec<String> {
    let number = |at: usize| usize::from(u16::from_be_bytes([request[at], request[at + 1]]));
    let mut at = body(request);
    let count = i32::from_be_bytes([request[at], request[at + 1], request[at + 2], request[at + 3]]);
    at += 4;
    let mut topics = Vec::new();
    for _ in 0..count {
        let end = at + 2 + number(at);
        topics.push(String::from_utf8_lossy(&request[at + 2..end]).into_owned());
        at = end;
    }
    topics
}

#[derive(Default)]
struct Answer(Vec<u8>);

impl Answer {
    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn i16(self, number: i16) -> Self {
        self.bytes(&number.to_be_bytes())
    }

    fn i32(self, number: i32) -> Self {
        self.bytes(&number.to_be_bytes())
    }

    fn i64(self, number: i64) -> Self {
        self.bytes(&number.to_be_bytes())
    }

    fn string(self, text: &str) -> Self {
        self.i16(i16::try_from(text.len()).expect("short")).bytes(text.as_bytes())
    }
}

async fn becomes(health: &mut HealthWatch, up: bool) {
    let changed = async {
        while (health.now().state == HealthState::Down) == up {
            health.changed().await;
        }
    };
    timeout(PATIENCE, changed).await.unwrap_or_else(|_| panic!("up: {up}, not {:?}", health.now()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_whose_cluster_told_of_no_broker_comes_back() {
    let cluster = Cluster::start().await;
    let connection = KafkaBackend.connect(&cluster.settings()).await.expect("connected");
    let mut health = connection.health();
    becomes(&mut health, true).await;

    cluster.is_empty.store(true, Ordering::Release);
    cluster.until("told of none", |cluster| cluster.told_of_none.load(Ordering::Acquire) > 0).await;
    becomes(&mut health, false).await;

    cluster.is_empty.store(false, Ordering::Release);
    becomes(&mut health, true).await;
    // It may give up waiting; closing is not what this is about.
    let _ = connection.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_whose_cluster_told_of_no_broker_comes_back() {
    let cluster = Cluster::start().await;
    let connection = KafkaBackend.connect(&cluster.settings()).await.expect("connected");
    let consumer =
        connection.consumer(&Address::queue("orders"), &ConsumeOptions::default()).await.expect("a consumer");
    cluster.until("asked", |cluster| cluster.asked.load(Ordering::Acquire) > 0).await;

    cluster.is_empty.store(true, Ordering::Release);
    let mut health = connection.health();
    becomes(&mut health, false).await;
    silence(|| cluster.asked.swap(0, Ordering::AcqRel)).await;

    cluster.is_empty.store(false, Ordering::Release);
    becomes(&mut health, true).await;
    cluster.until("asked again", |cluster| cluster.asked.load(Ordering::Acquire) > 0).await;
    drop(consumer);
    drop(connection);
}

/// A subscription of its own has no group that remembers where it was: it goes on where it was, and not at the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_without_a_group_goes_on_where_it_was() {
    let cluster = Cluster::start().await;
    cluster.end.store(5, Ordering::Release);
    let connection = KafkaBackend.connect(&cluster.settings()).await.expect("connected");
    let consumer =
        connection.consumer(&Address::topic("events"), &ConsumeOptions::default()).await.expect("a consumer");
    let fetched = |cluster: &Cluster| !cluster.fetched_from.lock().expect("no panic").is_empty();
    cluster.until("fetched", fetched).await;
    assert!(cluster.fetches().iter().all(|from| *from == 5), "from the end, as a new subscription does");

    outage(&cluster, &*connection).await;
    silence(|| cluster.fetches().len()).await;
    // Where a new subscription would begin now.
    cluster.end.store(9, Ordering::Release);
    cluster.is_empty.store(false, Ordering::Release);
    cluster.until("fetched again", fetched).await;
    let from = cluster.fetches();
    assert!(from.iter().all(|from| *from == 5), "{from:?}: what came meanwhile is left out");
    drop(consumer);
    drop(connection);
}

/// What a client had handed over when it was given up may have arrived; what is sent later is taken by the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_send_on_its_way_has_an_unknown_outcome_and_later_ones_are_accepted() {
    let cluster = Cluster::start().await;
    let connection = KafkaBackend.connect(&cluster.settings()).await.expect("connected");
    let orders = connection.producer(&Address::queue("orders"), &ProduceOptions::default()).await.expect("a producer");
    let first = orders.send(Message::new("1").with_id("first"));
    cluster.until("sent", |cluster| cluster.sent.load(Ordering::Acquire) > 0).await;

    outage(&cluster, &*connection).await;
    let error = timeout(PATIENCE, first).await.expect("answered").expect_err("nobody knows");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::UnknownOutcome, Retry::UnknownOutcome), "{error}");

    cluster.takes.store(true, Ordering::Release);
    cluster.is_empty.store(false, Ordering::Release);
    let accepted = async {
        // The next client may have been told of no broker too, and be given up as well.
        loop {
            match orders.send(Message::new("2").with_id("second")).await {
                Ok(receipt) => return receipt,
                Err(error) => assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error}"),
            }
        }
    };
    assert_eq!(timeout(PATIENCE, accepted).await.expect("accepted").id, "second".into());
    drop(orders);
    drop(connection);
}

/// The broker has gone while it had a message, and the connection is closed: what was sent once and put back may be stored, and
/// what was never handed over is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_once_has_an_unknown_outcome_when_it_is_closed() {
    let cluster = Cluster::start().await;
    let connection = KafkaBackend.connect(&cluster.settings()).await.expect("connected");
    let orders = connection.producer(&Address::queue("orders"), &ProduceOptions::default()).await.expect("a producer");
    cluster.is_mortal.store(true, Ordering::Release);
    let sent = orders.send(Message::new("1").with_id("first"));
    cluster.until("sent", |cluster| cluster.sent.load(Ordering::Acquire) > 0).await;
    becomes(&mut connection.health(), false).await;
    let kept = orders.send(Message::new("2").with_id("second"));
    let _ = connection.close().await;
    for (send, expected) in [(sent, ErrorKind::UnknownOutcome), (kept, ErrorKind::Closed)] {
        let error = timeout(PATIENCE, send).await.expect("answered").expect_err("nobody has taken it");
        assert_eq!(error.kind(), expected, "{error}");
    }
}

/// No broker is told of until somebody has heard so and the connection knows that it is lost.
async fn outage(cluster: &Cluster, connection: &dyn Connection) {
    let told = cluster.told_of_none.load(Ordering::Acquire);
    cluster.is_empty.store(true, Ordering::Release);
    cluster.until("told of none", |cluster| cluster.told_of_none.load(Ordering::Acquire) > told).await;
    becomes(&mut connection.health(), false).await;
}

/// Waits until nobody asks any more: a client does twice a second at least, for as long as it knows anybody.
async fn silence(mut asked: impl FnMut() -> usize) {
    let silent = async {
        loop {
            asked();
            tokio::time::sleep(Duration::from_secs(3)).await;
            if asked() == 0 {
                return;
            }
        }
    };
    timeout(PATIENCE, silent).await.expect("the client knows nobody");
}
