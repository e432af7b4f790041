use std::net::{Ipv4Addr, SocketAddr};

use polymq_amqp::AmqpConnection;
use polymq_core::{Address, Connection, ErrorKind, Settings};
use polymq_testkit::{Certificates, TlsFront};

use super::harness::*;

pub async fn connections_are_encrypted_and_certificates_checked() {
    let certificates = Certificates::make();
    let front = TlsFront::before(SocketAddr::from((Ipv4Addr::LOCALHOST, shared().port)), &certificates).await;
    let port = front.address().port();
    let settings =
        Settings::from_url(&format!("amqps://guest:guest@localhost:{port}?connect_timeout=60s")).expect("a URL");
    let error = AmqpConnection::connect(&settings).await.expect_err("an unknown authority");
    assert_eq!(error.kind(), ErrorKind::Disconnected);
    assert!(error.to_string().contains("certificate"), "{error}");

    let trusting = settings.clone().with("ca_file", certificates.path("ca.pem"));
    let connection = AmqpConnection::connect(&trusting).await.expect("encrypted");
    let queue = Address::queue(unique("encrypted"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let large = "x".repeat(1 << 20);
    for _ in 0..5 {
        send(&*producer, message(&large)).await.expect("sent");
    }
    for incoming in receive(&mut *consumer, 5).await {
        assert_eq!(text(&incoming), large);
        consumer.settler().ack(incoming.token).await.expect("acknowledged");
    }
    connection.close().await.expect("closed");

    let known = trusting.clone().with("cert_file", certificates.path("client.pem"));
    let known = known.with("key_file", certificates.path("client.key"));
    AmqpConnection::connect(&known).await.expect("with a certificate").ping().await.expect("an answer");
    for (key, value) in [("ca_file", "/nowhere.pem".to_owned()), ("ca_file", certificates.path("server.key"))] {
        let error =
            AmqpConnection::connect(&settings.clone().with(key, value)).await.expect_err("no certificate there");
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains(key), "{error}");
    }
    // Clear text to a port that expects TLS, and the other way round, end soon.
    let plain = Settings::from_url(&format!("amqp://localhost:{port}?connect_timeout=2s")).expect("a URL");
    assert_eq!(AmqpConnection::connect(&plain).await.expect_err("no TLS").kind(), ErrorKind::Disconnected);
    let wrong = format!("amqps://localhost:{}?connect_timeout=2s", shared().port);
    let wrong = Settings::from_url(&wrong).expect("a URL");
    assert_eq!(AmqpConnection::connect(&wrong).await.expect_err("no TLS there").kind(), ErrorKind::Disconnected);
}
