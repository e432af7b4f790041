//! Logins, in real handshakes.

use std::time::{Duration, Instant};

use polymq_core::{Address, Bus, Connection, ConsumeOptions, ErrorKind, Message, Settings};
use polymq_kafka::KafkaConnection;
use polymq_testkit::{Broker, BrokerControl};

use crate::harness::{PATIENCE, bare, body, closed, connect, consumer, name, producer, take};

pub fn settings(scheme: &str, login: &str, at: &str) -> Settings {
    let url = format!("{scheme}://{login}@{at}?connect_timeout=30s&session_timeout=30s");
    Settings::from_url(&url).expect("a URL")
}

pub async fn refused(settings: &Settings) -> polymq_core::Error {
    let began = Instant::now();
    let error = KafkaConnection::connect(settings).await.expect_err("refused");
    assert!(began.elapsed() < PATIENCE * 2, "{error} after {:?}", began.elapsed());
    assert!(!error.to_string().contains("s3cret"), "{error}");
    error
}

pub async fn round_trip(settings: &Settings) {
    let (queue, connection) = (Address::queue(name("login")), connect(settings).await);
    producer(&connection, &queue).await.send(Message::new("in")).await.expect("accepted");
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    assert_eq!(body(&take(&mut *reader, 1).await[0]), "in");
    closed(connection.close().await);
}

/// PLAIN and SCRAM, right and wrong.
pub async fn j5_logins_are_checked_by_each_mechanism() {
    let at = &*bare().servers;
    for mechanism in ["plain", "scram-sha-256", "scram-sha-512"] {
        round_trip(&settings("kafka", "admin:secret", at).with("mechanism", mechanism)).await;
        let error = refused(&settings("kafka", "admin:s3cret", at).with("mechanism", mechanism)).await;
        assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{mechanism}: {error}");
    }
}

/// A password that is rotated in its file reaches every client, the one that sends and the one that receives, once the broker
/// refuses the old one; nothing is restarted but the broker.
pub async fn j5_a_rotated_password_reaches_every_connection() {
    let broker = Broker::kafka_with(&["--also", "rotating:the-first"]);
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("password");
    std::fs::write(&file, "the-first\n").expect("written");
    let url = format!("kafka://rotating@{}?connect_timeout=60s&session_timeout=10s", broker.address());
    let path = file.to_str().expect("a path");
    let connect = || Bus::builder().url(&url).with("pass_file", path).connect();
    let bus = connect().await.expect("with the first password");
    let queue = bus.queue("rotated").with_timeout(PATIENCE * 2);
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("a consumer");
    let mut received = async |body: &str| {
        loop {
            let next = tokio::time::timeout(PATIENCE * 2, subscription.next()).await.expect("received in time");
            let delivery = next.expect("received");
            let found = delivery.message().payload() == body.as_bytes();
            // One that was not committed before the broker ended comes again.
            let _ = delivery.ack().await;
            if found {
                break;
            }
        }
    };
    queue.send_message(Message::new("before")).await.expect("sent");
    received("before").await;

    broker.restart_with("--also", "rotating:the-second").await;
    // The file is written late, as it goes: until then both are refused, and go on trying.
    let began = Instant::now();
    while !bus.health().to_string().contains("uthentication") {
        // Told when a probe has ended in vain, which may take as long as connecting may.
        assert!(began.elapsed() < PATIENCE * 3, "{}", bus.health());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    std::fs::write(&file, "the-second\n").expect("written");
    // One that a client had taken which is given up has an unknown outcome.
    let after = || async { queue.send_message(Message::new("after")).await.map_err(|error| error.to_string()) };
    polymq_testkit::eventually(PATIENCE * 2, after).await;
    received("after").await;
    assert!(!format!("{bus:?} {}", bus.health()).contains("the-second"));
    closed(bus.close().await);

    closed(connect().await.expect("with the second password").close().await);
    let two = Bus::builder().url(&url).with("pass_file", path).with("pass", "x").connect().await;
    assert_eq!(two.map(drop).expect_err("two passwords").kind(), ErrorKind::Config);
    let nowhere =
        Bus::builder().url(&url).with("pass_file", "/nowhere").connect().await.map(drop).expect_err("no file");
    assert!(nowhere.kind() == ErrorKind::Config && nowhere.to_string().contains("pass_file"), "{nowhere}");
}
