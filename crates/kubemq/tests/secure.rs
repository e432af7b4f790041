//! Certificates both ways, in real handshakes with polymq's broker (mission row J4).

#![cfg(feature = "tls")]
#![allow(missing_docs)]

use std::time::Duration;

use polymq_broker::Broker;
use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, Message, ProduceOptions, Result, Settings};
use polymq_kubemq::{KubeMq, KubeMqConnection, Policy};
use polymq_testkit::{Certificates, TlsServer};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(30);
/// In every URL; in no error.
const TOKEN: &str = "the-token-of-the-test";

/// A broker that shows the certificate of `localhost` and, if asked to, wants one of its clients.
async fn broker(files: &Certificates, wants: bool) -> Broker {
    let builder = Broker::builder().listen("127.0.0.1:0").tls(files.path("server.pem"), files.path("server.key"));
    let builder = if wants { builder.client_ca(files.path("ca.pem")) } else { builder };
    builder.start().await.expect("a broker")
}

/// Settings that trust an authority and show a certificate.
fn settings(files: &Certificates, url: &str, ca: Option<&str>, shown: Option<&str>) -> Settings {
    let mut settings = Settings::from_url(url).expect("a URL");
    if let Some(ca) = ca {
        settings = settings.with("ca_file", files.path(ca));
    }
    if let Some(name) = shown {
        settings = settings.with("cert_file", files.path(&format!("{name}.pem")));
        settings = settings.with("key_file", files.path(&format!("{name}.key")));
    }
    settings
}

fn url(host: &str, broker: &Broker) -> String {
    format!("kubemqs://:{TOKEN}@{host}:{}?connect_timeout=30s", broker.address().port())
}

/// A message through the backend, and one through the typed client.
async fn works(settings: &Settings) {
    let connection = KubeMqConnection::connect(settings).await.expect("connect");
    let queue = Address::queue("secured");
    let producer = connection.producer(&queue, &ProduceOptions::default()).await.expect("a producer");
    producer.send(Message::new("over TLS").with_id("1")).await.expect("sent");
    let mut consumer = connection.consumer(&queue, &ConsumeOptions::default()).await.expect("a consumer");
    let mut received = Vec::new();
    timeout(PATIENCE, consumer.receive(1, &mut received)).await.expect("in time").expect("received");
    assert_eq!(&received[0].message.payload()[..], b"over TLS");
    consumer.settler().ack(received[0].token).await.expect("acknowledged");
    connection.close().await.expect("closed");

    let client = KubeMq::connect(settings).await.expect("connect");
    client.send("typed", &Message::new("over TLS"), &Policy::default()).await.expect("sent");
    let taken = client.receive("typed", 1, Duration::from_secs(5)).await.expect("received");
    assert_eq!(&taken[0].body[..], b"over TLS");
}

/// Neither gets in, and both say why in one sentence that holds nothing secret.
async fn refused(files: &Certificates, what: &str, settings: &Settings, said: &str) {
    let of_backend: Result<()> = KubeMqConnection::connect(settings).await.map(drop);
    let of_client: Result<()> = KubeMq::connect(settings).await.map(drop);
    for error in [of_backend, of_client].map(|refused| refused.expect_err(what)) {
        assert_eq!(error.kind(), ErrorKind::Disconnected, "{what}: {error:?}");
        let text = error.to_string();
        println!("{what}: {text}");
        assert!(text.contains(said), "{what}: {text}");
        assert!(!text.contains('\n') && text.len() < 300, "{what}: more than a sentence: {text}");
        let keys = ["client.key", "stranger.key"].map(|key| std::fs::read_to_string(files.path(key)).expect("a key"));
        let secrets = keys.iter().flat_map(|key| key.lines()).chain([TOKEN]);
        for secret in secrets.filter(|line| !line.starts_with('-')) {
            assert!(!text.contains(secret) && !format!("{error:?}").contains(secret), "{what}: {text}");
        }
    }
}

/// Whoever has a certificate of the broker's authority, trusts that authority and calls the broker by its name gets in, and
/// nobody else.
#[tokio::test(flavor = "multi_thread")]
async fn j4_kubemq_and_its_clients_prove_who_they_are() {
    let files = Certificates::make();
    let (asks, demands) = (broker(&files, false).await, broker(&files, true).await);
    works(&settings(&files, &url("localhost", &asks), Some("ca.pem"), None)).await;
    works(&settings(&files, &url("localhost", &demands), Some("ca.pem"), Some("client"))).await;
    // The name in the certificate counts, not how the broker was found.
    let named = settings(&files, &url("127.0.0.1", &demands), Some("ca.pem"), Some("client"));
    works(&named.with("server_name", "localhost")).await;

    for (what, host, ca, shown, said) in [
        ("an authority that is not trusted", "localhost", None, Some("client"), "check ca_file"),
        ("another authority", "localhost", Some("other-ca.pem"), Some("client"), "check ca_file"),
        ("another name of the host", "127.0.0.1", Some("ca.pem"), Some("client"), "certificate not valid for name"),
        ("no certificate of the client", "localhost", Some("ca.pem"), None, "check cert_file"),
        ("a certificate of another authority", "localhost", Some("ca.pem"), Some("stranger"), "check cert_file"),
    ] {
        refused(&files, what, &settings(&files, &url(host, &demands), ca, shown), said).await;
    }
    let (expired, old) = (files.serve("expired", &[]), files.serve("server", TlsServer::TLS_1_1));
    for (what, server, said) in
        [("a certificate of before", &expired, "expired"), ("a version that nobody accepts", &old, "ProtocolVersion")]
    {
        let url = format!("kubemqs://:{TOKEN}@localhost:{}?connect_timeout=30s", server.port());
        refused(&files, what, &settings(&files, &url, Some("ca.pem"), Some("client")), said).await;
    }
    let plain = Settings::from_url(&format!("kubemq://127.0.0.1:{}?connect_timeout=5s", demands.address().port()));
    refused(&files, "no TLS", &plain.expect("a URL"), "").await;
    asks.stop().await;
    demands.stop().await;
}

/// What is wrong with files is found before any connection, and the sentence names the setting.
#[tokio::test]
async fn j4_unusable_certificates_are_refused_by_name() {
    let files = Certificates::make();
    // Nobody listens there, and nobody is asked.
    let nowhere = "kubemqs://localhost:1";
    let missing = settings(&files, nowhere, Some("no-such-file.pem"), None);
    let alone = settings(&files, nowhere, Some("ca.pem"), None).with("cert_file", files.path("client.pem"));
    let without_tls = settings(&files, "kubemq://localhost:1", Some("ca.pem"), None);
    for (what, settings, said) in
        [("no such file", missing, "ca_file"), ("no key", alone, "key_file"), ("no TLS", without_tls, "without TLS")]
    {
        for error in [KubeMqConnection::connect(&settings).await.map(drop), KubeMq::connect(&settings).await.map(drop)]
        {
            let error = error.expect_err(what);
            assert_eq!(error.kind(), ErrorKind::Config, "{what}: {error:?}");
            assert!(error.to_string().contains(said), "{what}: {error}");
        }
    }
}
