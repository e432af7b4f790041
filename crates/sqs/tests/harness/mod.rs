//! Emulators of SQS and SNS, a bare client, and a gate that knows credentials, which no emulator does.

#![allow(dead_code, unreachable_pub)] // each test binary uses its part

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use polymq_core::{Address, Backend, Capabilities, Delay, Order, RedeliveryOrder};
use polymq_sqs::{
    SqsBackend,
    aws_sdk_sqs::{
        Client,
        config::{BehaviorVersion, Credentials, Region},
        types::{Message, MessageAttributeValue},
    },
};
use polymq_testkit::{
    BareClient, BareMessage, BareReceiver, Broker, BrokerControl, Denied, Harness, Heartbeat, Passwords, Switch, Tool,
    Use,
    twist::{Twist, Twisted},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
};

/// An emulator and what is around it.
#[derive(Debug)]
pub struct Emulated {
    broker: Broker,
    gate: SocketAddr,
    turnstile: Turnstile,
    counter: Counter,
    bare: Bare,
    fifo: bool,
}

impl Emulated {
    /// ministack for the cases that leave it alone; for those that kill it ElasticMQ, which keeps what it has taken and
    /// has no SNS.
    pub fn start(purpose: Use) -> Self {
        let broker = Broker::sqs(if purpose == Use::Kill { "elasticmq" } else { "ministack" });
        let gate = gate(broker.address());
        let (turnstile, counter) = (Turnstile::before(broker.address()), Counter::before(broker.address()));
        let bare = Bare { endpoint: format!("http://{}", broker.address()), fifo: false };
        Self { broker, gate, turnstile, counter, bare, fifo: false }
    }

    /// Every queue and topic is a FIFO one.
    pub fn fifo(self) -> Self {
        let (turnstile, counter) = (Turnstile { fifo: true, ..self.turnstile }, Counter { fifo: true, ..self.counter });
        Self { fifo: true, bare: Bare { fifo: true, ..self.bare }, turnstile, counter, ..self }
    }
}

impl Harness for Emulated {
    fn backend(&self) -> Arc<dyn Backend> {
        if self.fifo { Twisted::around(Arc::new(SqsBackend), Arc::new(Fifo)) } else { Arc::new(SqsBackend) }
    }

    fn url(&self, at: Option<SocketAddr>) -> String {
        let at = at.unwrap_or(self.broker.address());
        // A poll that waits for long makes closing wait: SQS has no way to take one back.
        format!("sqs://test:test@{at}?poll_wait=1s&fifo={}", self.fifo)
    }

    fn broker(&self) -> Option<&dyn BrokerControl> {
        Some(&self.broker)
    }

    fn bare(&self) -> Option<&dyn BareClient> {
        Some(&self.bare)
    }

    fn wrong_password(&self) -> Option<String> {
        Some(format!("sqs://unknown:not-the-secret@{}?fifo={}", self.gate, self.fifo))
    }

    fn denied(&self) -> Option<Denied> {
        let url = format!("sqs://limited:limited@{}?fifo={}", self.gate, self.fifo);
        Some(Denied { url, address: Address::queue("forbidden"), consumers_are_told: true })
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        // Declared: asked after one heartbeat without an answer, and waited for as long.
        Some(Heartbeat { settings: vec![("heartbeat".into(), "2s".into())], bound: Duration::from_secs(4) })
    }

    fn recovery(&self) -> Duration {
        // What an answer that was cut off had brought comes again when its loan of 30 s is over.
        Duration::from_secs(60)
    }

    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        Ok(&self.turnstile)
    }

    fn alarm(&self) -> Tool<'_, dyn Switch> {
        Err("SQS has no alarm: what it cannot take it throttles")
    }

    fn throttle(&self) -> Tool<'_, dyn Switch> {
        Ok(&self.counter)
    }

    fn bad_names(&self) -> Vec<(Address, &'static str)> {
        vec![
            (Address::queue("a b"), "expected letters"),
            (Address::queue("a--b"), "a dot is written"),
            (Address::topic("a/b"), "expected letters"),
            (Address::queue("a-"), "begins or ends"),
            (Address::queue("n".repeat(81)), "at most 80"),
        ]
    }

    fn time_outs(&self) -> Vec<&'static str> {
        vec!["connect_timeout", "request_timeout"]
    }

    fn backlog(&self) -> usize {
        // The emulators go through a list for each message.
        4_000
    }

    fn at_once(&self) -> usize {
        // The same list: 5000 messages of 50 senders take ministack half a minute on two cores.
        10
    }
}

/// What the backend declares without a setting, as the setting `fifo=true` changes it.
#[derive(Debug)]
struct Fifo;

impl Twist for Fifo {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities {
            order: Order::PerKey,
            redelivery: RedeliveryOrder::Front,
            delayed_send: Delay::default(),
            deduplication: true,
            ..own
        }
    }
}

/// The one thing that emulators leave out: the access key `test` may do everything, `limited` everything but what has
/// to do with the queue `forbidden`, and nobody else is let in. Answers as SQS does, and passes everything else on.
fn gate(target: SocketAddr) -> SocketAddr {
    front(target, |request| {
        let is = |key: &str| request.head.contains(&format!("Credential={key}/"));
        if !is("test") && !is("limited") {
            Some(request.refused(403, "UnrecognizedClientException", "The security token in the request is invalid."))
        } else if is("limited") && request.text().contains("forbidden") {
            Some(request.refused(403, "AccessDenied", "User limited is not authorized to perform this on forbidden"))
        } else {
            None
        }
    })
}

/// Lets in whoever has the access key of the moment; its name stands for the password, which only signs.
#[derive(Debug)]
struct Turnstile {
    address: SocketAddr,
    key: Arc<Mutex<String>>,
    fifo: bool,
}

impl Turnstile {
    fn before(target: SocketAddr) -> Self {
        let key = Arc::new(Mutex::new(String::new()));
        let known = Arc::clone(&key);
        let address = front(target, move |request| {
            let is_known = request.head.contains(&format!("Credential={}/", known.lock().expect("a lock")));
            let refused =
                || request.refused(403, "InvalidClientTokenId", "The security token in the request is invalid");
            (!is_known).then(refused)
        });
        Self { address, key, fifo: false }
    }
}

#[async_trait]
impl Passwords for Turnstile {
    fn address(&self) -> SocketAddr {
        self.address
    }

    fn url(&self, password: &str, at: SocketAddr) -> String {
        format!("sqs://{password}:secret@{at}?poll_wait=1s&fifo={}", self.fifo)
    }

    async fn set(&self, password: &str) {
        password.clone_into(&mut self.key.lock().expect("a lock"));
    }
}

/// Says "not so fast" to every send while it is switched on.
#[derive(Debug)]
struct Counter {
    address: SocketAddr,
    is_busy: Arc<AtomicBool>,
    fifo: bool,
}

impl Counter {
    fn before(target: SocketAddr) -> Self {
        let is_busy = Arc::new(AtomicBool::new(false));
        let busy = Arc::clone(&is_busy);
        let address = front(target, move |request| {
            let is_throttled = busy.load(Ordering::SeqCst) && request.action() == "SendMessageBatch";
            is_throttled.then(|| request.refused(400, "RequestThrottled", "Rate exceeded"))
        });
        Self { address, is_busy, fifo: false }
    }
}

#[async_trait]
impl Switch for Counter {
    fn url(&self) -> String {
        format!("sqs://test:test@{}?poll_wait=1s&fifo={}", self.address, self.fifo)
    }

    async fn turn(&self, on: bool) {
        self.is_busy.store(on, Ordering::SeqCst);
    }
}

/// A request on its way.
#[derive(Debug)]
pub struct Request {
    pub head: String,
    pub body: Vec<u8>,
}

impl Request {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// What SQS is asked for; SNS is asked in another way.
    fn target(&self) -> Option<String> {
        self.head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("x-amz-target")
                .then(|| value.split('.').nth(1).map(|action| action.trim().to_owned()))?
        })
    }

    /// An error, as SQS or SNS would write it.
    pub fn refused(&self, status: u16, code: &str, text: &str) -> Answer {
        let body = if self.target().is_some() {
            format!("{{\"__type\":\"com.amazonaws.sqs#{code}\",\"message\":\"{text}\"}}")
        } else {
            format!(
                "<ErrorResponse><Error><Type>Sender</Type><Code>{code}</Code><Message>{text}</Message></Error></ErrorResponse>"
            )
        };
        Answer { status, body }
    }

    /// What is asked for, such as `SendMessageBatch`.
    pub fn action(&self) -> String {
        // SNS is asked with a form.
        let form = || self.text().split('&').find_map(|field| field.strip_prefix("Action=").map(str::to_owned));
        self.target().or_else(form).unwrap_or_default()
    }
}

/// An answer in the server's place.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub body: String,
}

/// Stands before a server and answers what `decide` answers; the rest is passed on.
pub fn front(target: SocketAddr, decide: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static) -> SocketAddr {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
    front_at(listener, target, decide)
}

/// The same where it is listened already.
pub fn front_at(
    listener: std::net::TcpListener,
    target: SocketAddr,
    decide: impl Fn(&Request) -> Option<Answer> + Send + Sync + 'static,
) -> SocketAddr {
    let address = listener.local_addr().expect("an address");
    listener.set_nonblocking(true).expect("nonblocking");
    let decide = Arc::new(decide);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            while let Ok((client, _)) = listener.accept().await {
                let decide = Arc::clone(&decide);
                tokio::spawn(async move { pass(client, target, |request| decide(request)).await });
            }
        });
    });
    address
}

async fn pass(
    client: TcpStream,
    target: SocketAddr,
    decide: impl Fn(&Request) -> Option<Answer>,
) -> std::io::Result<()> {
    let mut client = BufReader::new(client);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if client.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap_or_default();
        }
        if line == "\r\n" {
            head += "connection: close\r\n\r\n";
            break;
        }
        if !lower.starts_with("connection:") {
            head += &line;
        }
    }
    let mut body = vec![0; length];
    client.read_exact(&mut body).await?;
    let request = Request { head, body };
    match decide(&request) {
        Some(Answer { status, body }) => {
            let answer = format!(
                "HTTP/1.1 {status} Answer\r\ncontent-type: application/x-amz-json-1.0\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            client.write_all(answer.as_bytes()).await
        }
        None => {
            let mut server = TcpStream::connect(target).await?;
            server.write_all(request.head.as_bytes()).await?;
            server.write_all(&request.body).await?;
            tokio::io::copy(&mut server, &mut client).await.map(drop)
        }
    }
}

/// The client library alone.
#[derive(Debug)]
pub struct Bare {
    endpoint: String,
    fifo: bool,
}

pub fn native(endpoint: &str) -> Client {
    let config = polymq_sqs::aws_sdk_sqs::Config::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new("us-east-1"))
        .credentials_provider(Credentials::new("test", "test", None, None, "bare"))
        .http_client(aws_smithy_http_client::Builder::new().build_http())
        .endpoint_url(endpoint);
    Client::from_conf(config.build())
}

async fn queue_url(client: &Client, queue: &str, fifo: bool) -> String {
    let name = queue.replace('.', "--") + if fifo { ".fifo" } else { "" };
    client.get_queue_url().queue_name(name).send().await.expect("the queue").queue_url.expect("its URL")
}

#[async_trait]
impl BareClient for Bare {
    async fn send(&self, queue: &str, message: BareMessage) {
        let client = native(&self.endpoint);
        let url = queue_url(&client, queue, self.fifo).await;
        let mut properties = message.properties;
        // SQS itself carries text only: whoever sends something else follows the convention.
        let body = String::from_utf8(message.body).unwrap_or_else(|error| {
            properties.insert("polymq-body".into(), "base64".into());
            BASE64_STANDARD.encode(error.into_bytes())
        });
        let mut request = client.send_message().queue_url(url).message_body(body);
        if self.fifo {
            let once = format!("{:x}", fastrand::u128(..));
            request = request.message_group_id(&once).message_deduplication_id(once);
        }
        for (name, value) in properties {
            let value = MessageAttributeValue::builder().data_type("String").string_value(value).build();
            request = request.message_attributes(name, value.expect("a value"));
        }
        request.send().await.expect("sent");
    }

    async fn listen(&self, queue: &str) -> Box<dyn BareReceiver> {
        let client = native(&self.endpoint);
        let url = queue_url(&client, queue, self.fifo).await;
        Box::new(BareQueue { client, url })
    }

    fn golden(&self) -> BareMessage {
        BareMessage::new(
            b"{\"id\": 7}",
            [
                ("ce-correlationid", "saga-1"),
                ("ce-dataversion", "2"),
                ("ce-id", "0190a0a0-0000-7000-8000-000000000007"),
                ("ce-partitionkey", "customer-7"),
                ("ce-replyto", "replies"),
                ("ce-time", "2023-11-14T22:13:20.123000000Z"),
                ("ce-type", "order.created"),
                ("content-type", "application/json"),
                ("tenant", "acme é"),
            ],
        )
    }

    fn foreign(&self) -> BareMessage {
        BareMessage::new(b"{\"id\": 1}", [("content-type", "application/json"), ("tenant", "acme")])
    }
}

#[derive(Debug)]
struct BareQueue {
    client: Client,
    url: String,
}

#[async_trait]
impl BareReceiver for BareQueue {
    async fn next(&mut self, wait: Duration) -> Option<BareMessage> {
        let seconds = i32::try_from(wait.as_secs().min(20)).expect("few seconds");
        let request = self.client.receive_message().queue_url(&self.url).message_attribute_names("All");
        let got = request.wait_time_seconds(seconds).send().await.expect("an answer");
        got.messages.unwrap_or_default().pop().map(bare)
    }
}

fn bare(message: Message) -> BareMessage {
    let text = |(name, value): (String, MessageAttributeValue)| (name, value.string_value.unwrap_or_default());
    let mut properties: BTreeMap<String, String> =
        message.message_attributes.unwrap_or_default().into_iter().map(text).collect();
    let body = message.body.unwrap_or_default();
    let body = match properties.remove("polymq-body").as_deref() {
        Some("base64") => BASE64_STANDARD.decode(body).expect("base64"),
        _ => body.into_bytes(),
    };
    BareMessage { body, properties }
}
