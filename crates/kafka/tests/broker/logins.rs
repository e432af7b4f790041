//! Logins, in real handshakes.

use std::time::Instant;

use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, Message, Settings};
use polymq_kafka::KafkaConnection;

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
