//! A broker in a process of its own, which can be killed: this test binary, started again.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Address, Backend};
use polymq_kubemq::KubeMqBackend;
use polymq_kubemq_proto::{
    Empty, QueueMessage, ReceiveQueueMessagesRequest, kubemq_client::KubemqClient,
};
use polymq_testkit::{
    BareClient, BareMessage, BareReceiver, BrokerControl, Denied, Harness, Heartbeat, Passwords, Switch, Tool, Use,
    eventually,
};
use tempfile::TempDir;
use tokio::io::AsyncReadExt;
use tonic::transport::Channel;

const LISTEN: &str = "POLYMQ_TEST_BROKER_LISTEN";
const DATA: &str = "POLYMQ_TEST_BROKER_DATA";
/// How long a broker may take to start or to stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// In a process that was started for it: is the broker, and never returns.
pub fn serve_if_asked() {
    let (Ok(listen), Ok(data)) = (std::env::var(LISTEN), std::env::var(DATA)) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let broker = polymq_broker::Broker::builder().listen(listen).data_dir(data).start().await.expect("the broker");
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("a signal");
        let mut nothing = [0];
        let mut stdin = tokio::io::stdin();
        tokio::select! {
            _ = terminate.recv() => broker.stop().await,
            // Whoever has started it is gone.
            _ = stdin.read(&mut nothing) => {}
        }
    });
    std::process::exit(0);
}

/// A broker and what is around it.
#[derive(Debug)]
pub struct Served {
    broker: Process,
    bare: Bare,
}

impl Served {
    pub fn start(_: Use) -> Self {
        let broker = Process::start();
        let bare = Bare { url: format!("http://{}", broker.address) };
        Self { broker, bare }
    }
}

impl Harness for Served {
    fn backend(&self) -> Arc<dyn Backend> {
        Arc::new(KubeMqBackend)
    }

    fn url(&self, at: Option<SocketAddr>) -> String {
        format!("kubemq://{}", at.unwrap_or(self.broker.address))
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

    fn denied(&self) -> Option<Denied> {
        None
    }

    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        Err("todo")
    }

    fn alarm(&self) -> Tool<'_, dyn Switch> {
        Err("todo")
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

/// A broker's process.
#[derive(Debug)]
pub struct Process {
    address: SocketAddr,
    data: PathBuf,
    child: Mutex<Option<Child>>,
    _folder: TempDir,
}

impl Process {
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = free.local_addr().expect("an address");
        drop(free);
        let process =
            Self { address, data: folder.path().join("data"), child: Mutex::default(), _folder: folder };
        // The suite starts its surroundings on a thread without a runtime.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(BrokerControl::start(&process));
        process
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
                .env(DATA, &self.data)
                .stdin(Stdio::piped())
                .spawn();
            *child = Some(started.expect("the test binary starts again as a broker"));
        }
        let url = format!("http://{}", self.address);
        eventually(PATIENCE, || async {
            let mut client = KubemqClient::connect(url.clone()).await.map_err(|error| error.to_string())?;
            client.ping(Empty {}).await.map_err(|error| error.to_string())
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
pub struct Bare {
    url: String,
}

impl Bare {
    async fn client(&self) -> KubemqClient<Channel> {
        KubemqClient::connect(self.url.clone()).await.expect("connect")
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

#[derive(Debug)]
struct BareQueue {
    client: KubemqClient<Channel>,
    queue: String,
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
