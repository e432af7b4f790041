//! Encryption, in real handshakes.

use std::net::SocketAddr;

use polymq_core::ErrorKind;
use polymq_testkit::{Broker, Certificates, TlsServer};
use tokio::net::{TcpListener, TcpStream};

use crate::logins::{refused, round_trip, settings};

/// The certificate of the broker, its name, and what this client shows of itself.
pub async fn j4_certificates_are_checked() {
    let certificates = Certificates::make();
    let at = SocketAddr::from(([127, 0, 0, 1], polymq_testkit::free_port()));
    let tls = format!("{}:{}", at.port(), certificates.directory().display());
    // The name that its certificate has.
    let called = format!("localhost:{}", at.port());
    let called = called.as_str();
    let broker = tokio::task::block_in_place(|| Broker::kafka_with(&["--tls", &tls]));
    let trusting = |login: &str, at: &str| settings("kafkas", login, at).with("ca_file", certificates.path("ca.pem"));
    round_trip(&trusting("admin:secret", called)).await;
    round_trip(&trusting("admin:secret", called).with("mechanism", "scram-sha-512")).await;
    let known = trusting("admin:secret", called).with("cert_file", certificates.path("client.pem"));
    round_trip(&known.with("key_file", certificates.path("client.key"))).await;

    let error = refused(&trusting("admin:s3cret", called)).await;
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    for wrong in [
        settings("kafkas", "admin:secret", called),
        settings("kafkas", "admin:secret", called).with("ca_file", certificates.path("other-ca.pem")),
    ] {
        let error = refused(&wrong).await;
        assert!(error.kind() == ErrorKind::Disconnected && error.to_string().contains("certificate"), "{error}");
    }
    let (expired, old) = (certificates.serve("expired", &[]), certificates.serve("server", TlsServer::TLS_1_1));
    for (server, said) in [(&expired, "certificate"), (&old, "")] {
        let there = trusting("admin:secret", &format!("localhost:{}", server.port())).with("connect_timeout", "15s");
        let error = refused(&there).await;
        assert!(error.kind() == ErrorKind::Disconnected && error.to_string().contains(said), "{error}");
    }
    // The same server under a name that its certificate does not have.
    let elsewhere = TcpListener::bind("127.0.0.2:0").await.expect("a port");
    let named = elsewhere.local_addr().expect("an address");
    let forwarding = tokio::spawn(async move {
        while let Ok((mut client, _)) = elsewhere.accept().await {
            tokio::spawn(async move {
                let mut server = TcpStream::connect(at).await.expect("the broker");
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    });
    let error = refused(&trusting("admin:secret", &named.to_string())).await;
    assert!(error.kind() == ErrorKind::Disconnected && error.to_string().contains("certificate"), "{error}");
    forwarding.abort();
    for (key, file) in [("ca_file", "/nowhere.pem".to_owned()), ("ca_file", certificates.path("server.key"))] {
        let error = refused(&settings("kafkas", "admin:secret", called).with(key, file)).await;
        assert!(error.kind() == ErrorKind::Config && error.to_string().contains(key), "{error}");
    }
    // Clear text to a port that expects TLS.
    let error = refused(&settings("kafka", "admin:secret", called)).await;
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
    tokio::task::block_in_place(|| drop(broker));
}
