//! A broker of the test's own, and short words for what tests do often.

#![allow(dead_code)] // each test uses some of it

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Arc,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use polymq_core::{Backend, Connection, Consumer, Incoming, Settings};
use polymq_mqtt::MqttBackend;
pub(crate) use polymq_testkit::free_port;
use tokio::time::timeout;

/// A Mosquitto that nobody else uses, gone with the test.
pub(crate) struct Broker {
    pub(crate) port: u16,
    pub(crate) dir: PathBuf,
    extra: Vec<String>,
}

impl Broker {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    pub(crate) async fn start_with(extra: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // RUST_LOG=polymq_mqtt=debug shows what the connections do.
        let filter = tracing_subscriber::EnvFilter::from_default_env();
        let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::var_os("POLYMQ_TEST_DIR").map_or_else(|| root().join("target/brokers"), PathBuf::from);
        let dir = root.join(format!("mqtt-{}-{count}", std::process::id()));
        let broker = Self { port: free_port(), dir, extra: extra.iter().map(|text| (*text).to_owned()).collect() };
        broker.up().await;
        broker
    }

    /// Starts it, or starts it again with the data that it had.
    pub(crate) async fn up(&self) {
        let mut arguments = vec!["up".to_owned(), "mosquitto".to_owned()];
        arguments.extend(["--port".to_owned(), self.port.to_string()]);
        arguments.extend(self.extra.clone());
        self.script(arguments).await;
    }

    pub(crate) async fn kill(&self) {
        self.script(vec!["kill".into()]).await;
    }

    pub(crate) async fn signal(&self, name: &str) {
        self.script(vec!["kill".into(), "--signal".into(), name.into()]).await;
    }

    async fn script(&self, mut arguments: Vec<String>) {
        arguments.extend(["--dir".to_owned(), self.dir.display().to_string()]);
        let output = tokio::task::spawn_blocking(move || run(&arguments)).await.expect("not cancelled");
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "this test needs a Mosquitto of its own; scripts/brokers says: {told}");
    }

    pub(crate) fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// Nothing gives up while the machine stalls.
    pub(crate) fn settings(&self) -> Settings {
        let settings = Settings::from_url(&self.url()).expect("a URL");
        settings.with("connect_timeout", "60s").with("operation_timeout", "60s")
    }

    pub(crate) async fn connect(&self) -> Arc<dyn Connection> {
        self.connect_with(&[]).await
    }

    pub(crate) async fn connect_with(&self, settings: &[(&str, &str)]) -> Arc<dyn Connection> {
        let mut all = self.settings();
        for (key, value) in settings {
            all = all.with(*key, *value);
        }
        MqttBackend.connect(&all).await.expect("connected")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let dir = self.dir.display().to_string();
        run(&["down".into(), "--now".into(), "--dir".into(), dir]);
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).canonicalize().expect("exists").join("../..")
}

fn run(arguments: &[String]) -> Output {
    let script = root().join("scripts/brokers");
    Command::new(&script)
        .args(arguments)
        .output()
        .unwrap_or_else(|cause| panic!("cannot run {}: {cause}", script.display()))
}

/// A client of the broker's own package.
pub(crate) fn client(name: &str, port: u16, arguments: &[&str]) -> Output {
    let output = Command::new(name).args(["-h", "127.0.0.1", "-p", &port.to_string()]).args(arguments).output();
    output.unwrap_or_else(|cause| panic!("this test needs {name} of the package mosquitto-clients: {cause}"))
}

pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for one message.
pub(crate) async fn one(consumer: &mut dyn Consumer) -> Incoming {
    let mut got = Vec::new();
    timeout(PATIENCE, consumer.receive(1, &mut got)).await.expect("a message in time").expect("a message");
    got.pop().expect("one")
}

/// Waits for as many messages, and keeps them.
pub(crate) async fn hold(consumer: &mut dyn Consumer, count: usize) -> Vec<Incoming> {
    let mut got = Vec::new();
    while got.len() < count {
        let before = got.len();
        let received = timeout(PATIENCE, consumer.receive(count - before, &mut got)).await;
        received.unwrap_or_else(|_| panic!("only {before} of {count} messages came")).expect("messages");
    }
    got
}

/// Waits for as many messages, and acknowledges each as it comes.
pub(crate) async fn take(consumer: &mut dyn Consumer, count: usize) -> Vec<Incoming> {
    let mut got = Vec::new();
    let settler = consumer.settler();
    while got.len() < count {
        let before = got.len();
        let received = timeout(PATIENCE, consumer.receive(count - before, &mut got)).await;
        received.unwrap_or_else(|_| panic!("only {before} of {count} messages came")).expect("messages");
        for incoming in &got[before..] {
            settler.ack(incoming.token).await.expect("acknowledged");
        }
    }
    got
}

/// Makes sure that nothing comes.
pub(crate) async fn nothing(consumer: &mut dyn Consumer, span: Duration) {
    let mut got = Vec::new();
    if timeout(span, consumer.receive(9, &mut got)).await.is_ok() {
        panic!("nothing was expected, and this came: {got:?}");
    }
}

pub(crate) fn body(incoming: &Incoming) -> String {
    text(incoming.message.payload())
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
