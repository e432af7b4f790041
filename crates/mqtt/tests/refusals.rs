//! What goes wrong outside of us is told in one sentence, with what to do about it.

mod harness;

use harness::{Broker, free_port};
use polymq_core::{Address, Backend, Connection, ConsumeOptions, Error, ErrorKind, Message, ProduceOptions, Settings};
use polymq_mqtt::MqttBackend;

/// One sentence without a secret, that holds these words.
#[track_caller]
fn says(error: &Error, kind: ErrorKind, words: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
    assert!(!text.contains('\n'), "{text}");
    for secret in ["s3cret", "wr0ng"] {
        assert!(!format!("{error:?} {error}").contains(secret), "a secret in: {error:?}");
    }
}

async fn refused(settings: &Settings) -> Error {
    MqttBackend.connect(settings).await.expect_err("refused")
}

/// Sends until the answer is known: mosquitto 2.0.11 ends the connection too, sometimes before its answer is read.
async fn refused_publish(bus: &dyn Connection, topic: &Address, qos: &str) -> Error {
    let options = ProduceOptions { extra: vec![("qos".into(), qos.into())], ..ProduceOptions::default() };
    let producer = bus.producer(topic, &options).await.expect("producer");
    loop {
        let error = producer.send(Message::new("")).await.expect_err("refused");
        if error.kind() != ErrorKind::UnknownOutcome {
            return error;
        }
    }
}

#[tokio::test]
async fn no_broker() {
    let port = free_port();
    let settings = Settings::from_url(&format!("mqtt://app:s3cret@127.0.0.1:{port}")).expect("a URL");
    let address = format!("127.0.0.1:{port}");
    says(&refused(&settings).await, ErrorKind::Disconnected, &["connect", &address, "check that the broker runs"]);
    // Something that accepts and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = silent.local_addr().expect("an address").to_string();
    let settings = Settings::from_url(&format!("mqtt://{address}")).expect("a URL").with("connect_timeout", "300ms");
    says(&refused(&settings).await, ErrorKind::Disconnected, &["connect", &address, "300ms", "mqtts://"]);
}

#[tokio::test]
async fn passwords_and_permissions() {
    let rules = "user app\ntopic readwrite allowed/#\ntopic readwrite $polymq/#\n";
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), rules).expect("written");
    let path = file.path().display().to_string();
    let broker = Broker::start_with(&["--user", "app", "--password", "s3cret", "--acl", &path, "--volatile"]).await;
    for protocol in ["5", "3.1.1"] {
        let wrong = broker.settings().with("user", "app").with("pass", "wr0ng").with("protocol", protocol);
        says(&refused(&wrong).await, ErrorKind::Unauthenticated, &["user \"app\"", "check user, password"]);
        let nobody = broker.settings().with("protocol", protocol);
        says(&refused(&nobody).await, ErrorKind::Unauthenticated, &["without a user", "check user, password"]);
    }
    let bus = broker.connect_with(&[("user", "app"), ("pass", "s3cret")]).await;
    let allowed = bus.producer(&Address::queue("allowed/x"), &ProduceOptions::default()).await.expect("producer");
    allowed.send(Message::new("")).await.expect("sent");
    for qos in ["1", "2"] {
        let error = refused_publish(&*bus, &Address::topic("forbidden"), qos).await;
        says(&error, ErrorKind::PermissionDenied, &["does not allow this topic", "write access", "access list"]);
    }
    bus.close().await.expect("closed");
    // Without the topics on which consumers agree, there is no consuming.
    let elsewhere = [("user", "app"), ("pass", "s3cret"), ("control", "$elsewhere")];
    let bus = broker.connect_with(&elsewhere).await;
    let error = bus.consumer(&Address::queue("allowed/x"), &ConsumeOptions::default()).await.expect_err("refused");
    says(&error, ErrorKind::PermissionDenied, &["consumers cannot agree", "allow this user", "control"]);
    bus.close().await.expect("closed");
}

/// Every size near the broker's limit is answered.
#[tokio::test]
async fn packets_at_the_limit() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "max_packet_size 1000\n").expect("written");
    let broker = Broker::start_with(&["--volatile", "--include", &file.path().display().to_string()]).await;
    let bus = broker.connect().await;
    let producer = bus.producer(&Address::queue("narrow"), &ProduceOptions::default()).await.expect("producer");
    let mut largest = None;
    for size in 900..=1000 {
        let send = producer.send(Message::new(vec![b'x'; size]));
        match tokio::time::timeout(harness::PATIENCE, send).await.unwrap_or_else(|_| panic!("{size} is not answered")) {
            Ok(_) => largest = Some(size),
            Err(error) => says(&error, ErrorKind::TooLarge, &["bytes", "broker takes"]),
        }
    }
    assert!(largest.is_some_and(|largest| largest < 1000), "{largest:?}");
    producer.send(Message::new("small")).await.expect("sent");
    bus.close().await.expect("closed");
}

/// What the broker does not do, and says so when it is connected to, is an error that says so too: for the settings at once, for
/// a producer's own options when it sends, and without an end of the connection.
#[tokio::test]
async fn what_the_broker_does_not_do() {
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), "max_qos 1\nretain_available false\n").expect("written");
    let broker = Broker::start_with(&["--volatile", "--include", &file.path().display().to_string()]).await;
    let twice = refused(&broker.settings().with("qos", "2")).await;
    says(&twice, ErrorKind::Unsupported, &["connect", "quality of service 1 at most", "not 2", "set qos=1"]);
    let retained = refused(&broker.settings().with("retain", "true")).await;
    says(&retained, ErrorKind::Unsupported, &["connect", "keeps no message", "set retain=false"]);
    let bus = broker.connect().await;
    let mut health = bus.health();
    let send = async |key: &str, value: &str| {
        let options = ProduceOptions { extra: vec![(key.into(), value.into())], ..ProduceOptions::default() };
        let producer = bus.producer(&Address::topic("limited"), &options).await.expect("producer");
        producer.send(Message::new("")).await
    };
    says(
        &send("qos", "2").await.expect_err("not taken"),
        ErrorKind::Unsupported,
        &["send", "quality of service 1 at most"],
    );
    says(&send("retain", "true").await.expect_err("not kept"), ErrorKind::Unsupported, &["send", "keeps no message"]);
    send("qos", "1").await.expect("sent");
    let lost = tokio::time::timeout(std::time::Duration::ZERO, health.changed()).await;
    assert!(lost.is_err(), "the connection was lost: {lost:?}");
    bus.close().await.expect("closed");
}

/// Whoever waits for the first connection is told why there is none.
#[tokio::test]
async fn the_reason_why_there_is_no_first_connection() {
    let broker = Broker::start_with(&["--user", "app", "--password", "s3cret", "--volatile"]).await;
    let wrong = broker.settings().with("user", "app").with("pass", "wr0ng").with("connect_retry", "true");
    let bus = MqttBackend.connect(&wrong.with("reconnect_max", "300ms")).await.expect("it waits");
    let mut health = bus.health();
    let told = async {
        while !health.now().reason.is_some_and(|reason| reason.contains("the broker refused the user \"app\"")) {
            health.changed().await.expect("not closed");
        }
    };
    let told = tokio::time::timeout(harness::PATIENCE, told).await;
    assert!(told.is_ok(), "{}", bus.health().now());
    bus.close().await.expect("closed");
}
