//! A disk that fails a sync, in a whole process: `strace` has the system refuse it, and nothing in the broker knows.
#![cfg(target_os = "linux")]

mod common;

use std::{
    io::{BufRead, BufReader, Lines, Read as _, Write as _},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
};

use common::*;
use polymq_broker::Broker;
use polymq_kubemq_proto::{Empty, subscribe::*};

const CHILD: &str = "POLYMQ_SYNC_CHILD";
/// What the child's lines begin with, among those of the test harness.
const SAYS: &str = "child: ";

/// Not a test of its own: the process whose disk fails. It stays until its starter goes away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Some(folder) = std::env::var_os(CHILD) else { return };
    let builder = Broker::builder().listen("127.0.0.1:0").http("127.0.0.1:0").data_dir(folder);
    let broker = builder.start().await.unwrap();
    println!("\n{SAYS}{} {}", broker.address(), broker.http_address().unwrap());
    println!("{SAYS}{}", broker.failed().await);
    std::io::stdout().flush().unwrap();
    tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await.unwrap().unwrap();
}

/// A broker in a process of its own, each of whose threads can sync a file four times.
struct Traced(Child, Lines<BufReader<ChildStdout>>);

impl Traced {
    fn start(folder: &Path) -> Self {
        let mut command = Command::new("strace");
        // The tracer stands aside: the child is the broker.
        command.args(["-D", "-f", "-qq", "-e", "trace=fdatasync", "-e", "signal=none"]);
        command.args(["-e", "inject=fdatasync:error=EIO:when=5+", "-o"]).arg(folder.join("trace"));
        command.arg(std::env::current_exe().unwrap()).args(["child", "--exact", "--nocapture"]);
        command.env(CHILD, folder.join("data")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("strace is installed: scripts/brokers install");
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self(child, lines)
    }

    /// What it says next.
    fn says(&mut self) -> String {
        self.1.find_map(|line| line.unwrap().strip_prefix(SAYS).map(str::to_owned)).expect("the child goes on")
    }
}

impl Drop for Traced {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test]
async fn after_a_sync_that_failed_health_tells_why_and_nothing_is_taken_or_given() {
    let folder = tempfile::tempdir().unwrap();
    let mut traced = Traced::start(folder.path());
    let said = traced.says();
    let (address, http) = said.split_once(' ').unwrap();
    let (mut caller, http) = (client_at(address.parse().unwrap()).await, http.parse().unwrap());
    assert_eq!(get(http, "/health/ready").await.0, 200);
    let mut answered = Vec::new();
    let refused = loop {
        let body = answered.len().to_string();
        let sent = send(&mut caller, message("orders", &*body)).await;
        if sent.is_error {
            break sent.error;
        }
        answered.push(body);
        assert!(answered.len() <= 4, "no sync failed");
    };
    let data = folder.path().join("data");
    assert!(refused.contains("cannot be synced: Input/output error"), "{refused}");
    assert!(answered.len() >= 2, "{answered:?}");
    assert_eq!(traced.says(), refused, "`Broker::failed` tells it");
    assert!(refused.contains(data.join("broker.sqlite").to_str().unwrap()), "{refused}");

    let (code, ready) = get(http, "/health/ready").await;
    let body: serde_json::Value = serde_json::from_str(&ready).unwrap();
    assert_eq!((code, body["store"]["failed"].as_str()), (503, Some(&*refused)), "{ready}");
    assert_eq!(get(http, "/health/live").await.0, 503);
    // As a broker that is not there: clients tell that they are not connected, and why.
    let sent = caller.send_queue_message(message("orders", "later")).await.map(drop);
    let received = caller.receive_queue_messages(receiving("orders", 10)).await.map(drop);
    for answer in [caller.ping(Empty {}).await.map(drop), sent, received] {
        let status = answer.expect_err("nothing is served any more");
        assert_eq!((status.code(), status.message()), (tonic::Code::Unavailable, &*refused));
    }
    drop(traced);

    let broker = Broker::builder().listen("127.0.0.1:0").data_dir(data).start().await.unwrap();
    let found = receive(&mut client(&broker).await, "orders", 10).await;
    // The one that was refused was written, and may be there.
    assert!(found.starts_with(&answered) && found.len() <= answered.len() + 1, "{found:?}, answered {answered:?}");
    broker.stop().await;
}

#[tokio::test]
async fn a_subscriber_is_told_of_a_sync_that_failed_and_gets_no_event_that_was_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut traced = Traced::start(folder.path());
    let said = traced.says();
    let mut caller = client_at(said.split_once(' ').unwrap().0.parse().unwrap()).await;
    let start = subscribe(SubscribeType::EventsStore, "log", EventsStoreType::StartFromFirst);
    let mut events = caller.subscribe_to_events(start).await.unwrap().into_inner();
    let mut answered = 0;
    let refused = loop {
        match caller.send_event(event("log", "x", true)).await {
            Ok(_) => answered += 1,
            Err(refused) => break refused,
        }
        assert!(answered <= 4, "no sync failed");
    };
    assert!(refused.message().contains("cannot be synced: Input/output error"), "{refused}");
    let in_time = std::time::Duration::from_secs(30);
    let mut read = 0;
    let told = loop {
        match tokio::time::timeout(in_time, events.message()).await.expect("it is told") {
            Ok(event) => {
                read += 1;
                assert_eq!(event.expect("no end without a word").sequence, read);
            }
            Err(told) => break told,
        }
    };
    assert_eq!(told.message(), refused.message());
    assert!(read <= answered, "{read} read, {answered} answered");
}
