//! Damaged, truncated and foreign files, and two brokers at one folder: found at the start, told in a sentence.

mod common;

use std::{
    io::{Read, Seek, SeekFrom, Write},
    path::Path,
    process::{Command, Stdio},
};

use common::*;
use polymq_broker::{Broker, BrokerError};
use polymq_kubemq_proto::{QueueMessage, QueueMessagePolicy};
use tempfile::TempDir;

async fn start(folder: &Path) -> Result<Broker, BrokerError> {
    Broker::builder().listen("127.0.0.1:0").data_dir(folder).start().await
}

/// A folder with messages, of a broker that was stopped.
async fn filled() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let broker = start(folder.path()).await.unwrap();
    let mut caller = client(&broker).await;
    for number in 0..200 {
        assert!(!send(&mut caller, message("orders", format!("{number} {}", "x".repeat(500)))).await.is_error);
    }
    drop(caller);
    broker.stop().await;
    folder
}

fn flip(file: &Path, at: u64) {
    let mut file = std::fs::File::options().read(true).write(true).open(file).unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[byte[0] ^ 0x55]).unwrap();
}

async fn refused(folder: &Path, file: &str) -> String {
    let error = start(folder).await.expect_err("a damaged file is found").to_string();
    let named = folder.join(file).display().to_string();
    assert!(error.starts_with(&format!("{named} is damaged: ")), "{error}");
    assert!(error.ends_with("; restore it from a backup, or move it away to begin empty"), "{error}");
    error
}

#[tokio::test]
async fn a_flipped_byte_is_found_wherever_it_is() {
    let folder = filled().await;
    let file = folder.path().join("broker.sqlite");
    let whole = std::fs::read(&file).unwrap();
    // In the head, in the tree of the messages, and inside of a body.
    let body = whole.windows(20).rposition(|window| window == [b'x'; 20]).unwrap() as u64;
    for at in [3, 100, body] {
        flip(&file, at);
        refused(folder.path(), "broker.sqlite").await;
        flip(&file, at);
    }
    let (mut found, mut unused) = (0, Vec::new());
    for at in (4096..whole.len() as u64).step_by(1531) {
        flip(&file, at);
        match start(folder.path()).await {
            Err(BrokerError::Store(_)) => found += 1,
            Err(other) => panic!("{other}"),
            // Where nothing is stored, nothing is damaged: every message is as it was.
            Ok(broker) => {
                let mut caller = client(&broker).await;
                assert_eq!(receive_peek(&mut caller).await, 200, "byte {at}");
                unused.push(at);
                drop(caller);
                broker.stop().await;
            }
        }
        std::fs::write(&file, &whole).unwrap();
    }
    assert!(found > 50 && unused.len() < found / 2, "{found} found, unused: {unused:?}");
    let broker = start(folder.path()).await.unwrap();
    assert_eq!(receive(&mut client(&broker).await, "orders", 200).await.len(), 200, "and whole again it is served");
}

async fn receive_peek(client: &mut Client) -> usize {
    let peek = polymq_kubemq_proto::ReceiveQueueMessagesRequest { is_peak: true, ..receiving("orders", 1000) };
    let answer = client.receive_queue_messages(peek).await.unwrap().into_inner();
    let right = |(number, message): (usize, &polymq_kubemq_proto::QueueMessage)| {
        *message.body == *format!("{number} {}", "x".repeat(500)).as_bytes()
    };
    answer.messages.iter().enumerate().filter(|found| right((found.0, found.1))).count()
}

fn later() -> QueueMessage {
    let policy = QueueMessagePolicy { delay_seconds: 1000, ..QueueMessagePolicy::default() };
    QueueMessage { policy: Some(policy), ..message("orders", "y".repeat(500)) }
}

/// A folder with a delayed message, of a broker that was stopped.
async fn delayed() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let broker = start(folder.path()).await.unwrap();
    let mut caller = client(&broker).await;
    assert!(!send(&mut caller, later()).await.is_error);
    drop(caller);
    broker.stop().await;
    folder
}

#[tokio::test]
async fn a_flipped_byte_of_a_delayed_message_is_found() {
    let folder = delayed().await;
    let file = folder.path().join("broker.sqlite");
    let whole = std::fs::read(&file).unwrap();
    let body = whole.windows(20).rposition(|window| window == [b'y'; 20]).unwrap() as u64;
    flip(&file, body);
    let why = refused(folder.path(), "broker.sqlite").await;
    assert!(why.contains("delayed message 1 is not what was stored"), "{why}");
    flip(&file, body);
    start(folder.path()).await.unwrap().stop().await;
}

#[tokio::test]
async fn a_delayed_message_that_is_damaged_while_the_broker_runs_is_not_given() {
    let folder = delayed().await;
    let broker = start(folder.path()).await.unwrap();
    let mut caller = client(&broker).await;
    let file = rusqlite::Connection::open(folder.path().join("broker.sqlite")).unwrap();
    assert_eq!(file.execute("UPDATE delayed SET due = 0, value = CAST(substr(value, 2) AS BLOB)", []).unwrap(), 1);
    // The clock looks when something is delayed.
    assert!(!send(&mut caller, later()).await.is_error);
    let left = || file.query_row("SELECT count(*) FROM delayed", [], |row| row.get::<_, u64>(0)).unwrap();
    while left() > 1 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(receive(&mut caller, "orders", 1).await.is_empty());
    drop(caller);
    broker.stop().await;
}

#[tokio::test]
async fn delayed_messages_of_the_release_before_get_their_checksums() {
    let folder = delayed().await;
    let file = rusqlite::Connection::open(folder.path().join("broker.sqlite")).unwrap();
    let sum = || file.query_row("SELECT sum FROM delayed", [], |row| row.get::<_, u32>(0)).unwrap();
    let before = sum();
    file.execute_batch("ALTER TABLE delayed DROP COLUMN sum; PRAGMA user_version = 3").unwrap();
    start(folder.path()).await.unwrap().stop().await;
    assert_eq!(sum(), before);
    file.execute_batch("UPDATE delayed SET due = 0").unwrap();
    let broker = start(folder.path()).await.unwrap();
    let mut caller = client(&broker).await;
    let mut came = Vec::new();
    while came.is_empty() {
        came = receive(&mut caller, "orders", 1).await;
    }
    assert_eq!(came, ["y".repeat(500)]);
    drop(caller);
    broker.stop().await;
}

#[tokio::test]
async fn a_truncated_file_is_found() {
    let folder = filled().await;
    let file = folder.path().join("broker.sqlite");
    let size = std::fs::metadata(&file).unwrap().len();
    for left in [size / 2, size - 4096, 100, 0] {
        let whole = std::fs::read(&file).unwrap();
        std::fs::File::options().write(true).open(&file).unwrap().set_len(left).unwrap();
        let why = refused(folder.path(), "broker.sqlite").await;
        assert!(left > 0 || why.contains("it is empty, and it was not"), "{why}");
        std::fs::write(&file, whole).unwrap();
    }
}

#[tokio::test]
async fn foreign_files_are_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("broker.sqlite");
    let text = "this is a text and no database at all. ".repeat(100);
    std::fs::write(&file, &text).unwrap();
    refused(folder.path(), "broker.sqlite").await;
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
}

#[tokio::test]
async fn two_brokers_cannot_have_one_folder() {
    let folder = filled().await;
    let broker = start(folder.path()).await.unwrap();
    let error = start(folder.path()).await.unwrap_err().to_string();
    let named = folder.path().display();
    assert_eq!(error, format!("{named} is in use by another broker: stop that one, or give this one another folder"));
    broker.stop().await;
    start(folder.path()).await.unwrap().stop().await;
}

const CHILD: &str = "POLYMQ_DAMAGE_CHILD";

/// Not a test of its own: the process that is killed, so that the engine's log is left behind.
#[tokio::test]
async fn child() {
    let Ok(folder) = std::env::var(CHILD) else { return };
    let broker = start(Path::new(&folder)).await.unwrap();
    let mut caller = client(&broker).await;
    for number in 0..100 {
        assert!(!send(&mut caller, message("orders", format!("{number} {}", "x".repeat(500)))).await.is_error);
    }
    println!("all are answered");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_damaged_or_cut_log_of_the_engine_is_found_and_an_unfinished_end_is_no_damage() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child", "--exact", "--nocapture"]).env(CHILD, folder.path());
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    assert!(lines.map_while(Result::ok).any(|line| line.contains("all are answered")));
    // SIGKILL on Unix.
    child.kill().unwrap();
    child.wait().unwrap();

    let log = folder.path().join("broker.sqlite-wal");
    let whole = std::fs::read(&log).unwrap();
    for at in [16, 32 + 24 + 1000, whole.len() as u64 / 2, whole.len() as u64 / 2 + 40] {
        flip(&log, at);
        refused(folder.path(), "broker.sqlite-wal").await;
        flip(&log, at);
    }
    assert_eq!(std::fs::read(&log).unwrap(), whole, "and nothing was written to it");
    for left in [whole.len() as u64 - 100, whole.len() as u64 / 2, 10] {
        std::fs::File::options().write(true).open(&log).unwrap().set_len(left).unwrap();
        assert!(refused(folder.path(), "broker.sqlite-wal").await.contains(": it is cut: "));
        std::fs::write(&log, &whole).unwrap();
    }
    // What was begun and never answered may be anything, as a power cut leaves it.
    std::fs::write(&log, [&whole[..], &whole[whole.len() - 5000..]].concat()).unwrap();
    let broker = start(folder.path()).await.unwrap();
    let received = receive(&mut client(&broker).await, "orders", 200).await;
    assert_eq!(received.len(), 100);
}
