//! A broker in a process of its own, which can be killed: this test binary, started again.

#![allow(dead_code)] // each test binary uses its part

use std::{
    collections::BTreeMap,
    io::Write,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use polymq_broker::{Broker, TokenAlgorithm};
use polymq_core::{Address, Backend, Capabilities, Wildcards};
use polymq_kubemq::KubeMqBackend;
use polymq_kubemq_proto::{
    Empty, QueueMessage, QueuesInfoRequest, ReceiveQueueMessagesRequest, kubemq_client::KubemqClient,
};
use polymq_testkit::{
    BareClient, BareMessage, BareReceiver, BrokerControl, Denied, Harness, Heartbeat, Passwords, Switch, Tool, Use,
    eventually,
    twist::{Twist, Twisted},
};
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};
use tonic::{Request, Status, service::interceptor::InterceptedService, transport::Channel};

const LISTEN: &str = "POLYMQ_TEST_BROKER_LISTEN";
/// The folder of data, key and rules.
const FOLDER: &str = "POLYMQ_TEST_BROKER_FOLDER";
/// How long a broker may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// With what the tokens of the tests are signed.
const SECRET: &str = "the-secret-of-the-tests";
/// `limited` may use queues whose names begin with "allowed", `all` everything.
const RULES: &str = r#"
[[rule]]
client = "all"
allow = ["read", "write"]

[[rule]]
client = "limited"
channel = "allowed.*"
allow = ["read", "write"]
"#;

/// In a process that was started for it: is the broker, and never returns.
pub(crate) fn serve_if_asked() {
    let (Ok(listen), Ok(folder)) = (std::env::var(LISTEN), std::env::var(FOLDER)) else { return };
    let folder = PathBuf::from(folder);
    let (lines, mut said) = tokio::sync::mpsc::unbounded_channel();
    // Ends with the process that has started it.
    std::thread::spawn(move || std::io::stdin().lines().map_while(Result::ok).all(|line| lines.send(line).is_ok()));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let builder = Broker::builder().listen(listen).data_dir(folder.join("data"));
        let builder = builder.token_key(TokenAlgorithm::HS256, folder.join("key")).rules(folder.join("rules.toml"));
        let broker = builder.start().await.expect("the broker");
        let mut terminate = signal(SignalKind::terminate()).expect("a signal");
        loop {
            tokio::select! {
                _ = terminate.recv() => break drop(broker.stop().await),
                line = said.recv() => match line {
                    Some(_) => broker.reload().await.expect("a new key"),
                    None => break,
                }
            }
        }
    });
    std::process::exit(0);
}

/// A JSON web token for a client, signed with a secret (RFC 7519, RFC 7515).
fn token(client: &str, secret: &str) -> String {
    let part = |json: String| BASE64_URL_SAFE_NO_PAD.encode(json);
    let signed =
        format!("{}.{}", part(r#"{"alg":"HS256","typ":"JWT"}"#.into()), part(format!(r#"{{"ClientID":"{client}"}}"#)));
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, secret.as_bytes());
    let signature = BASE64_URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, signed.as_bytes()));
    format!("{signed}.{signature}")
}

/// A broker and what is around it.
#[derive(Debug)]
pub(crate) struct Served {
    broker: Process,
    bare: Bare,
    passwords: Turnstile,
    /// Topics are events that are not kept.
    events: bool,
}

/// What `topics=events` changes: the backend itself declares what it does without settings.
#[derive(Debug)]
struct Events;

impl Twist for Events {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        let wildcards = Some(Wildcards { one: "*", many: ">", separator: "." });
        Capabilities { at_most_once_topics: true, replay: false, wildcards, ..own }
    }
}

impl Served {
    pub(crate) fn start(_: Use) -> Self {
        let broker = Process::start(SECRET);
        let bare = Bare { address: broker.address };
        Self { broker, bare, passwords: Turnstile::default(), events: false }
    }

    pub(crate) fn with_events(self) -> Self {
        Self { events: true, ..self }
    }
}

impl Harness for Served {
    fn backend(&self) -> Arc<dyn Backend> {
        let backend: Arc<dyn Backend> = Arc::new(KubeMqBackend);
        if self.events { Twisted::around(backend, Arc::new(Events)) } else { backend }
    }

    fn url(&self, at: Option<SocketAddr>) -> String {
        let topics = if self.events { "events" } else { "store" };
        format!("kubemq://:{}@{}?topics={topics}", token("all", SECRET), at.unwrap_or(self.broker.address))
    }

    fn broker(&self) -> Option<&dyn BrokerControl> {
        Some(&self.broker)
    }

    fn bare(&self) -> Option<&dyn BareClient> {
        Some(&self.bare)
    }

    fn heartbeat(&self) -> Option<Heartbeat> {
        // Declared: asked after one heartbeat without an answer, and waited for as long.
        Some(Heartbeat { settings: vec![("heartbeat".into(), "2s".into())], bound: Duration::from_secs(4) })
    }

    fn wrong_password(&self) -> Option<String> {
        Some(format!("kubemq://:{}@{}", token("all", "another secret"), self.broker.address))
    }

    fn denied(&self) -> Option<Denied> {
        let url = format!("kubemq://:{}@{}", token("limited", SECRET), self.broker.address);
        Some(Denied { url, address: Address::queue("forbidden"), consumers_are_told: true })
    }

    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        Ok(&self.passwords)
    }

    fn alarm(&self) -> Tool<'_, dyn Switch> {
        Err("the protocol has no alarm: a broker whose disk is full refuses each message with a sentence")
    }

    fn throttle(&self) -> Tool<'_, dyn Switch> {
        Err("the protocol has no throttling reply")
    }

    fn bad_names(&self) -> Vec<(Address, &'static str)> {
        vec![
            (Address::queue("a b"), "white space"),
            (Address::queue("a.*"), "wildcards"),
            (Address::topic("a..b"), "two in a row"),
            (Address::queue("queues:a"), "routes"),
            (Address::topic("a.polymq-group.b"), "keeps for its groups"),
        ]
    }

    fn time_outs(&self) -> Vec<&'static str> {
        vec!["connect_timeout", "request_timeout"]
    }
}

/// A broker whose key is the password of the moment: tokens that were signed with another one are refused.
#[derive(Debug, Default)]
struct Turnstile(OnceLock<Process>);

impl Turnstile {
    fn broker(&self) -> &Process {
        self.0.get_or_init(|| tokio::task::block_in_place(|| Process::start("nobody's")))
    }
}

#[async_trait]
impl Passwords for Turnstile {
    fn address(&self) -> SocketAddr {
        self.broker().address
    }

    fn url(&self, password: &str, at: SocketAddr) -> String {
        format!("kubemq://:{}@{at}", token("all", password))
    }

    async fn set(&self, password: &str) {
        self.broker().set_key(password);
        eventually(PATIENCE, || async {
            let mut client = bare_client(self.address(), token("all", password)).await;
            client.queues_info(QueuesInfoRequest::default()).await.map_err(|status| status.to_string())
        })
        .await;
    }
}

/// A broker's process.
#[derive(Debug)]
pub(crate) struct Process {
    address: SocketAddr,
    child: Mutex<Option<Child>>,
    folder: TempDir,
}

impl Process {
    fn start(secret: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("rules.toml"), RULES).expect("the rules");
        std::fs::write(folder.path().join("key"), secret).expect("the key");
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, polymq_testkit::free_port()));
        let process = Self { address, child: Mutex::default(), folder };
        // On a thread of its own: the caller may be inside a runtime.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(BrokerControl::start(&process));
            });
        });
        process
    }

    fn set_key(&self, secret: &str) {
        std::fs::write(self.folder.path().join("key"), secret).expect("the key");
        let mut child = self.child.lock().expect("a lock");
        let stdin = child.as_mut().and_then(|child| child.stdin.as_mut()).expect("the broker runs");
        stdin.write_all(b"reload\n").expect("told");
    }

    fn signal(&self, name: &str) {
        let child = self.child.lock().expect("a lock").take();
        let Some(mut child) = child else { return };
        let status = Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status();
        assert!(status.is_ok_and(|status| status.success()), "kill -{name} of the broker");
        child.wait().expect("the broker is our child");
    }
}

#[async_trait]
impl BrokerControl for Process {
    fn address(&self) -> SocketAddr {
        self.address
    }

    async fn start(&self) {
        {
            let mut child = self.child.lock().expect("a lock");
            if child.is_some() {
                return;
            }
            let itself = PathBuf::from("/proc/self/exe");
            let program = if itself.exists() { itself } else { std::env::current_exe().expect("a path") };
            let started = Command::new(program)
                .env(LISTEN, self.address.to_string())
                .env(FOLDER, self.folder.path())
                .stdin(Stdio::piped())
                .spawn();
            *child = Some(started.expect("the test binary starts again as a broker"));
        }
        eventually(PATIENCE, || async {
            let endpoint = Channel::from_shared(format!("http://{}", self.address)).expect("a URL");
            let channel = endpoint.connect().await.map_err(|error| error.to_string())?;
            KubemqClient::new(channel).ping(Empty {}).await.map_err(|error| error.to_string())
        })
        .await;
    }

    async fn stop(&self) {
        tokio::task::block_in_place(|| self.signal("TERM"));
    }

    async fn kill(&self) {
        tokio::task::block_in_place(|| self.signal("KILL"));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.lock().expect("a lock").take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The protocol's stub alone.
#[derive(Debug)]
pub(crate) struct Bare {
    address: SocketAddr,
}

type Stub =
    KubemqClient<InterceptedService<Channel, Box<dyn FnMut(Request<()>) -> Result<Request<()>, Status> + Send>>>;

async fn bare_client(address: SocketAddr, token: String) -> Stub {
    let endpoint = Channel::from_shared(format!("http://{address}")).expect("a URL");
    let channel = endpoint.connect().await.expect("connect");
    let with_token = move |mut request: Request<()>| {
        request.metadata_mut().insert("authorization", token.parse().expect("a token"));
        Ok(request)
    };
    KubemqClient::with_interceptor(channel, Box::new(with_token))
}

impl Bare {
    async fn client(&self) -> Stub {
        bare_client(self.address, token("all", SECRET)).await
    }
}

#[async_trait]
impl BareClient for Bare {
    async fn send(&self, queue: &str, message: BareMessage) {
        let mut native = QueueMessage {
            client_id: "bare".into(),
            channel: queue.into(),
            body: message.body.into(),
            ..QueueMessage::default()
        };
        for (name, value) in message.properties {
            match name.as_str() {
                "message_id" => native.message_id = value,
                "metadata" => native.metadata = value,
                tag => {
                    let tag = tag.strip_prefix("tag ").unwrap_or_else(|| panic!("no property {tag}"));
                    native.tags.insert(tag.to_owned(), value);
                }
            }
        }
        let result = self.client().await.send_queue_message(native).await.expect("sent").into_inner();
        assert!(!result.is_error, "{}", result.error);
    }

    async fn listen(&self, queue: &str) -> Box<dyn BareReceiver> {
        Box::new(BareQueue { client: self.client().await, queue: queue.to_owned() })
    }

    fn golden(&self) -> BareMessage {
        BareMessage::new(
            b"{\"id\": 7}",
            [
                ("message_id", "0190a0a0-0000-7000-8000-000000000007"),
                ("tag ce-correlationid", "saga-1"),
                ("tag ce-dataversion", "2"),
                ("tag ce-partitionkey", "customer-7"),
                ("tag ce-replyto", "replies"),
                ("tag ce-time", "2023-11-14T22:13:20.123000000Z"),
                ("tag ce-type", "order.created"),
                ("tag content-type", "application/json"),
                ("tag tenant", "acme é"),
            ],
        )
    }

    fn foreign(&self) -> BareMessage {
        BareMessage::new(b"{\"id\": 1}", [("tag content-type", "application/json"), ("tag tenant", "acme")])
    }
}

struct BareQueue {
    client: Stub,
    queue: String,
}

impl std::fmt::Debug for BareQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BareQueue")
    }
}

#[async_trait]
impl BareReceiver for BareQueue {
    async fn next(&mut self, wait: Duration) -> Option<BareMessage> {
        let request = ReceiveQueueMessagesRequest {
            request_id: "bare".into(),
            client_id: "bare".into(),
            channel: self.queue.clone(),
            max_number_of_messages: 1,
            wait_time_seconds: i32::try_from(wait.as_secs().max(1)).expect("few seconds"),
            is_peak: false,
        };
        let answer = self.client.receive_queue_messages(request).await.expect("an answer").into_inner();
        answer.messages.into_iter().next().map(bare)
    }
}

fn bare(message: QueueMessage) -> BareMessage {
    let mut properties = BTreeMap::new();
    let mut put = |name: String, value: String| {
        if !value.is_empty() {
            properties.insert(name, value);
        }
    };
    put("message_id".into(), message.message_id);
    put("metadata".into(), message.metadata);
    message.tags.into_iter().for_each(|(name, value)| put(format!("tag {name}"), value));
    BareMessage { body: message.body.to_vec(), properties }
}
