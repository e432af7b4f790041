//! TLS and mutual TLS, with real handshakes.

use std::time::Duration;

use polymq_broker::{Broker, BrokerError, Builder, Limits};
use polymq_kubemq_proto::{Empty, kubemq_client::KubemqClient};
use polymq_testkit::Certificates;
use tokio::io::AsyncReadExt as _;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

fn builder(certificates: &Certificates) -> Builder {
    let builder = Broker::builder().listen("127.0.0.1:0");
    builder.tls(certificates.path("server.pem"), certificates.path("server.key"))
}

fn read(certificates: &Certificates, file: &str) -> String {
    std::fs::read_to_string(certificates.path(file)).unwrap()
}

/// A ping of a client that trusts an authority and shows a certificate.
async fn ping(broker: &Broker, certificates: &Certificates, ca: &str, shows: Option<&str>) -> Result<String, String> {
    let mut tls =
        ClientTlsConfig::new().domain_name("localhost").ca_certificate(Certificate::from_pem(read(certificates, ca)));
    if let Some(name) = shows {
        let pem = |suffix: &str| read(certificates, &format!("{name}.{suffix}"));
        tls = tls.identity(Identity::from_pem(pem("pem"), pem("key")));
    }
    let channel = Channel::from_shared(format!("https://{}", broker.address())).unwrap();
    let channel = channel.tls_config(tls).unwrap().connect_timeout(Duration::from_secs(20)).connect_lazy();
    let answer = KubemqClient::new(channel).ping(Empty {}).await;
    answer.map(|answer| answer.into_inner().version).map_err(|status| status.to_string())
}

#[tokio::test]
async fn a_server_shows_its_certificate() {
    let certificates = Certificates::make();
    let broker = builder(&certificates).start().await.unwrap();
    assert!(ping(&broker, &certificates, "ca.pem", None).await.unwrap().starts_with("2.4.0"));
    assert!(
        ping(&broker, &certificates, "other-ca.pem", None).await.is_err(),
        "a client that trusts another authority"
    );
    let plain = Channel::from_shared(format!("http://{}", broker.address())).unwrap().connect_lazy();
    assert!(KubemqClient::new(plain).ping(Empty {}).await.is_err(), "not without TLS");
}

#[tokio::test]
async fn clients_must_show_a_certificate_of_the_authority() {
    let certificates = Certificates::make();
    let broker = builder(&certificates).client_ca(certificates.path("ca.pem")).start().await.unwrap();
    assert!(ping(&broker, &certificates, "ca.pem", Some("client")).await.is_ok());
    assert!(ping(&broker, &certificates, "ca.pem", None).await.is_err(), "nothing shown");
    assert!(ping(&broker, &certificates, "ca.pem", Some("stranger")).await.is_err(), "signed by another authority");
}

#[tokio::test]
async fn new_certificates_are_taken_while_the_broker_runs() {
    let (certificates, others) = (Certificates::make(), Certificates::make());
    let broker = builder(&certificates).start().await.unwrap();
    std::fs::copy(others.path("server.pem"), certificates.path("server.pem")).unwrap();
    let wrong = broker.reload().await.unwrap_err().to_string();
    assert!(wrong.contains("the key is not the one of the certificate in "), "{wrong}");
    assert!(ping(&broker, &certificates, "ca.pem", None).await.is_ok(), "wrong files change nothing");
    std::fs::copy(others.path("server.key"), certificates.path("server.key")).unwrap();
    broker.reload().await.unwrap();
    assert!(ping(&broker, &certificates, "ca.pem", None).await.is_err());
    assert!(ping(&broker, &others, "ca.pem", None).await.is_ok());
}

#[tokio::test]
async fn one_wrong_file_leaves_the_others_as_they_were() {
    let (certificates, others) = (Certificates::make(), Certificates::make());
    const ALL: &str = "[[rule]]\nallow = ['read', 'write']";
    let rules = certificates.path("rules.toml");
    std::fs::write(&rules, ALL).unwrap();
    let broker = builder(&certificates).rules(&rules).start().await.unwrap();
    for file in ["server.pem", "server.key"] {
        std::fs::copy(others.path(file), certificates.path(file)).unwrap();
    }
    std::fs::write(&rules, "nonsense").unwrap();
    let wrong = broker.reload().await.unwrap_err().to_string();
    assert!(wrong.contains("rules.toml"), "{wrong}");
    assert!(ping(&broker, &certificates, "ca.pem", None).await.is_ok(), "the certificate of before");
    std::fs::write(&rules, ALL).unwrap();
    broker.reload().await.unwrap();
    assert!(ping(&broker, &others, "ca.pem", None).await.is_ok());
}

#[tokio::test]
async fn wrong_files_are_told_at_the_start() {
    let certificates = Certificates::make();
    let path = |name: &str| certificates.path(name);
    std::fs::write(path("text"), "text").unwrap();
    std::fs::write(path("cut"), &read(&certificates, "server.pem")[..200]).unwrap();
    let plain = || Broker::builder().listen("127.0.0.1:0");
    for (builder, file, sentence) in [
        (plain().tls(path("none"), path("server.key")), "none", "it cannot be read: No such file"),
        (plain().tls(path("server.pem"), path("none")), "none", "it cannot be read: No such file"),
        (
            plain().tls(path("text"), path("server.key")),
            "text",
            "there is no certificate in it: expected PEM (BEGIN CERTIFICATE)",
        ),
        (plain().tls(path("cut"), path("server.key")), "cut", "it is not proper PEM"),
        (plain().tls(path("server.pem"), path("ca.pem")), "ca.pem", "there is no private key in it"),
        (
            plain().tls(path("server.pem"), path("client.key")),
            "client.key",
            "the key is not the one of the certificate in",
        ),
        (builder(&certificates).client_ca(path("text")), "text", "there is no certificate in it"),
        (plain().client_ca(path("ca.pem")), "ca.pem", "only with TLS: give the server's certificate and key too"),
    ] {
        let error = builder.start().await.unwrap_err();
        assert!(matches!(error, BrokerError::Option { .. }));
        let error = error.to_string();
        assert!(error.starts_with(&format!("{}: ", path(file))) && error.contains(sentence), "{error}");
    }
}

#[tokio::test]
async fn connections_beyond_the_limit_are_closed_at_once() {
    let limits = Limits { connections: 1, ..Limits::default() };
    let broker = Broker::builder().listen("127.0.0.1:0").limits(limits).start().await.unwrap();
    let mut first = crate::common::client(&broker).await;
    first.ping(Empty {}).await.unwrap();
    let mut second = tokio::net::TcpStream::connect(broker.address()).await.unwrap();
    assert_eq!(second.read(&mut [0; 16]).await.unwrap(), 0, "closed");
    first.ping(Empty {}).await.unwrap();
    drop(first);
    // Its place is free again once the server has seen that it went.
    while crate::common::pinged(&broker).await.is_err() {}
}
