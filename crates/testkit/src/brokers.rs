//! Real brokers for tests, through the repository's `scripts/brokers`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    },
};

use async_trait::async_trait;

use crate::{BrokerControl, free_port};

/// Names the script that starts brokers; without it, `scripts/brokers` above the crate under test.
pub const SCRIPT_VARIABLE: &str = "POLYMQ_BROKERS_SCRIPT";
/// Names the directory below which brokers keep their files; without it, `target/brokers`.
pub const DIRECTORY_VARIABLE: &str = "POLYMQ_TEST_DIR";

/// A server of our own, on a port and in a directory of its own. It is stopped when this is dropped, and nothing
/// else is.
#[derive(Debug)]
pub struct Broker {
    script: PathBuf,
    arguments: Mutex<Vec<String>>,
    directory: PathBuf,
    address: SocketAddr,
    management: Option<SocketAddr>,
}

impl Broker {
    /// Starts RabbitMQ, with its management interface; `guest` is the administrator.
    ///
    /// # Panics
    /// When it cannot be started, with what the script says: a broker that is missing is a failure.
    #[must_use]
    pub fn rabbitmq() -> Self {
        Self::rabbitmq_with(&[])
    }

    /// The same with further options of the script, such as `--user` and `--password`.
    ///
    /// # Panics
    /// As [`rabbitmq`](Self::rabbitmq).
    #[must_use]
    pub fn rabbitmq_with(options: &[&str]) -> Self {
        Self::start_blocking("rabbitmq", true, options)
    }

    /// Starts Mosquitto with further options of the script, such as `--volatile`.
    ///
    /// # Panics
    /// As [`rabbitmq`](Self::rabbitmq).
    #[must_use]
    pub fn mosquitto(options: &[&str]) -> Self {
        Self::start_blocking("mosquitto", false, options)
    }

    /// Starts Apache Kafka, whose user `admin` (password `secret`) may do everything, and whose user `limited` (password
    /// `limited`) may connect and nothing else.
    ///
    /// # Panics
    /// As [`rabbitmq`](Self::rabbitmq).
    #[must_use]
    pub fn kafka() -> Self {
        Self::kafka_with(&[])
    }

    /// The same with further options of the script, such as `--also`.
    ///
    /// # Panics
    /// As [`rabbitmq`](Self::rabbitmq).
    #[must_use]
    pub fn kafka_with(options: &[&str]) -> Self {
        let options: Vec<_> = ["--user", "admin", "--password", "secret"].iter().chain(options).copied().collect();
        Self::start_blocking("kafka", false, &options)
    }

    /// Starts what speaks SQS: `ministack`, which speaks SNS too and forgets everything when it ends, or `elasticmq`, which
    /// keeps what it has accepted.
    ///
    /// # Panics
    /// As [`rabbitmq`](Self::rabbitmq).
    #[must_use]
    pub fn sqs(emulator: &str) -> Self {
        Self::start_blocking("sqs", false, &["--emulator", emulator])
    }

    /// Starts so many nodes of one Kafka, with the users of [`kafka`](Self::kafka); most of them must be up for it to work.
    /// What is stored is on each of them.
    ///
    /// # Panics
    /// As [`rabbitmq`](Self::rabbitmq).
    #[must_use]
    pub fn kafka_cluster(nodes: usize) -> Vec<Self> {
        let ports: Vec<u16> = (0..nodes).map(|_| free_port()).collect();
        let list = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(",");
        let options = ["--user", "admin", "--password", "secret", "--cluster", &list];
        // At once: a node is ready when it has found the others.
        std::thread::scope(|scope| {
            let start = |port| scope.spawn(move || Self::start_at(port, "kafka", false, &options));
            let starting: Vec<_> = ports.into_iter().map(start).collect();
            starting.into_iter().map(|node| node.join().expect("a node")).collect()
        })
    }

    fn start_blocking(kind: &str, with_management: bool, options: &[&str]) -> Self {
        Self::start_at(free_port(), kind, with_management, options)
    }

    fn start_at(port: u16, kind: &str, with_management: bool, options: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = base().join(format!("{kind}-{}-{number}", std::process::id()));
        let mut arguments =
            vec!["up".to_owned(), kind.to_owned(), "--dir".into(), directory.display().to_string(), "--port".into()];
        arguments.push(port.to_string());
        let management = with_management.then(free_port);
        if let Some(port) = management {
            arguments.extend(["--management-port".to_owned(), port.to_string()]);
        }
        arguments.extend(options.iter().map(|option| (*option).to_owned()));
        let local = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let broker = Self {
            script: script(),
            directory,
            address: local(port),
            management: management.map(local),
            arguments: Mutex::new(arguments),
        };
        broker.call(&broker.arguments());
        broker
    }

    /// Where its management interface listens, if it has one.
    #[must_use]
    pub fn management(&self) -> Option<SocketAddr> {
        self.management
    }

    fn arguments(&self) -> Vec<String> {
        crate::cx::lock(&self.arguments).clone()
    }

    /// Gives an option of its start another value, and restarts it in order.
    ///
    /// # Panics
    /// When it was started without that option, or cannot be restarted.
    pub async fn restart_with(&self, option: &str, value: &str) {
        {
            let mut arguments = crate::cx::lock(&self.arguments);
            let at = arguments.iter().position(|argument| argument == option);
            let at = at.unwrap_or_else(|| panic!("the broker was started without {option}"));
            arguments[at + 1] = value.to_owned();
        }
        self.stop().await;
        self.start().await;
    }

    /// RabbitMQ: its alarm is raised, so that it takes nothing, or ends.
    ///
    /// # Panics
    /// When the script says no.
    pub async fn alarm(&self, on: bool) {
        let state = if on { "on" } else { "off" };
        self.call_async(&["alarm", "--dir", &self.directory_text(), "--state", state]).await;
    }

    fn call(&self, arguments: &[String]) {
        let output = Command::new(&self.script).args(arguments).output();
        let output = output.unwrap_or_else(|error| panic!("{} cannot be run: {error}", self.script.display()));
        assert!(
            output.status.success(),
            "scripts/brokers {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }

    async fn call_async(&self, arguments: &[&str]) {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        // One command of a second at most a few times a case; the case waits for it anyway.
        tokio::task::block_in_place(|| self.call(&arguments));
    }

    fn directory_text(&self) -> String {
        self.directory.display().to_string()
    }
}

#[async_trait]
impl BrokerControl for Broker {
    fn address(&self) -> SocketAddr {
        self.address
    }

    async fn start(&self) {
        let arguments = self.arguments();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.call_async(&arguments).await;
    }

    async fn stop(&self) {
        self.call_async(&["down", "--dir", &self.directory_text()]).await;
    }

    async fn kill(&self) {
        self.call_async(&["kill", "--dir", &self.directory_text()]).await;
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let arguments = ["down", "--dir", &self.directory_text(), "--now"];
        // The test has its result; `scripts/test` stops what is left over.
        let _ = Command::new(&self.script).args(arguments).output();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn manifest() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from)
}

fn script() -> PathBuf {
    if let Some(script) = std::env::var_os(SCRIPT_VARIABLE) {
        return script.into();
    }
    let found = manifest().ancestors().map(|above| above.join("scripts/brokers")).find(|script| script.is_file());
    found.unwrap_or_else(|| panic!("there is no scripts/brokers above {}: set {SCRIPT_VARIABLE}", manifest().display()))
}

fn base() -> PathBuf {
    match std::env::var_os(DIRECTORY_VARIABLE) {
        Some(directory) => directory.into(),
        None => script()
            .parent()
            .and_then(|scripts| scripts.parent())
            .map(|root| root.join("target/brokers"))
            .unwrap_or_default(),
    }
}
