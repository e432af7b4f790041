//! A disk that fails a sync under a service that is its own broker: `strace` has the system refuse it.
#![cfg(target_os = "linux")]
#![allow(missing_docs)]

use std::process::Command;

use polymq_core::{Bus, HealthState, Message};
use polymq_embedded as _;

const CHILD: &str = "POLYMQ_SYNC_CHILD";

/// Not a test of its own: the service whose disk fails. It says what it is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Some(folder) = std::env::var_os(CHILD) else { return };
    let bus = Bus::connect(&format!("embedded://{}", folder.to_string_lossy())).await.expect("opened");
    let queue = bus.queue("orders");
    while queue.send_message(Message::new("x")).await.is_ok() {}
    println!("\nping: {}", bus.connection().ping().await.is_ok());
    println!("health: {}", bus.health());
    println!("down: {}", bus.health().state == HealthState::Down);
}

#[test]
fn a_disk_that_fails_is_no_healthy_connection() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-e", "trace=fdatasync", "-e", "signal=none"]);
    command.args(["-e", "inject=fdatasync:error=EIO:when=5+", "-o"]).arg(folder.path().join("trace"));
    command.arg(std::env::current_exe().expect("a path")).args(["child", "--exact", "--nocapture"]);
    let ended = command.env(CHILD, folder.path().join("data")).output().expect("strace is installed");
    let said = String::from_utf8_lossy(&ended.stdout);
    let line = |start: &str| said.lines().find_map(|line| line.strip_prefix(start)).unwrap_or_else(|| panic!("{said}"));
    assert_eq!((line("ping: "), line("down: ")), ("false", "true"), "{said}");
    assert!(line("health: ").contains("cannot be synced: Input/output error"), "{said}");
}
