//! Encrypted connections to RabbitMQ's own TLS listener (mission row J4), and passwords that are rotated (J5).
//!
//! The brokers are started by `scripts/brokers`; without them, these tests fail.

#![cfg(feature = "tls")]
#![allow(missing_docs)]

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use polymq_amqp::AmqpBackend;
use polymq_core::{Backend, Bus, ConsumeOptions, Environment, ErrorKind, Message, Registry, Subscription};
use polymq_testkit::{Broker, BrokerControl, Certificates, Proxy, TlsFront, TlsServer, eventually, free_port};

const PATIENCE: Duration = Duration::from_secs(60);

async fn connect(url: &str, settings: &[(&str, String)]) -> polymq_core::Result<Bus> {
    let mut registry = Registry::new();
    let backend: std::sync::Arc<dyn Backend> = std::sync::Arc::new(AmqpBackend);
    registry.add(backend).expect("one backend");
    let builder = Bus::builder().registry(registry).environment(Environment::default()).url(url);
    settings.iter().fold(builder, |builder, (key, value)| builder.with(*key, value)).connect().await
}

async fn round_trip(bus: &Bus, body: &'static str) -> Result<(), String> {
    let queue = bus.queue("secured").with_timeout(PATIENCE);
    queue.send_message(Message::new(body)).await.map_err(|error| error.to_string())?;
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.map_err(|error| error.to_string())?;
    loop {
        let taken = subscription.receive(1, PATIENCE).await.map_err(|error| error.to_string())?;
        let Some(delivery) = taken.into_iter().next() else { return Err("nothing came".into()) };
        let found = delivery.message().payload() == body;
        delivery.ack().await.map_err(|error| error.to_string())?;
        if found {
            return subscription.close().await.map_err(|error| error.to_string());
        }
    }
}

/// A broker that speaks TLS 1.2 and wants a certificate of every client: whoever has a certificate of its authority, trusts
/// that authority and calls the broker by its name gets in, and nobody else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j4_rabbitmq_and_its_clients_prove_who_they_are() {
    let (certificates, port) = (Certificates::make(), free_port());
    let include = certificates.path("rabbitmq.conf");
    let file = |name: &str| certificates.path(name);
    let lines = format!(
        "listeners.ssl.1 = 127.0.0.1:{port}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
         ssl_options.keyfile = {}\nssl_options.verify = verify_peer\nssl_options.fail_if_no_peer_cert = true\n\
         ssl_options.versions.1 = tlsv1.2\n",
        file("ca.pem"),
        file("server.pem"),
        file("server.key")
    );
    std::fs::write(&include, lines).expect("written");
    let _broker = Broker::rabbitmq_with(&["--include", &include]);
    let named = format!("amqps://guest:guest@localhost:{port}?connect_timeout=60s");
    let ours =
        || vec![("ca_file", file("ca.pem")), ("cert_file", file("client.pem")), ("key_file", file("client.key"))];
    let with = |mut settings: Vec<(&'static str, String)>, more: &[(&'static str, String)]| {
        settings.retain(|(key, _)| more.iter().all(|(other, _)| other != key));
        settings.extend_from_slice(more);
        settings
    };

    let bus = connect(&named, &ours()).await.expect("everybody proves who they are");
    round_trip(&bus, "over TLS 1.2").await.expect("works");
    bus.close().await.expect("closed");

    let address = format!("amqps://guest:guest@127.0.0.1:{port}?connect_timeout=60s");
    let (expired, old) = (certificates.serve("expired", &[]), certificates.serve("server", TlsServer::TLS_1_1));
    let [expired_url, old_url] =
        [&expired, &old].map(|server| named.replace(&port.to_string(), &server.port().to_string()));
    let without_ca: Vec<_> = ours().into_iter().filter(|(key, _)| *key != "ca_file").collect();
    let without_certificate: Vec<_> = ours().into_iter().filter(|(key, _)| *key == "ca_file").collect();
    let stranger = [("cert_file", file("stranger.pem")), ("key_file", file("stranger.key"))];
    for (what, url, settings, said) in [
        ("an authority that is not trusted", &named, without_ca, "certificate"),
        ("another authority", &named, with(ours(), &[("ca_file", file("other-ca.pem"))]), "certificate"),
        ("another name of the host", &address, ours(), "certificate"),
        ("a version below the minimum", &named, with(ours(), &[("tls_min", "1.3".into())]), "version"),
        ("a version that nobody accepts", &old_url, ours(), "version"),
        ("a certificate of before", &expired_url, ours(), "expired"),
        ("no certificate of the client", &named, without_certificate, ""),
        ("a certificate of a stranger", &named, with(ours(), &stranger), ""),
    ] {
        let error = connect(url, &settings).await.map(drop).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Disconnected, "{what}: {error}");
        assert!(error.to_string().to_lowercase().contains(said), "{what}: {error}");
    }
    let error = connect(&named, &with(ours(), &[("tls_min", "1.1".into())])).await.map(drop).expect_err("too old");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
}

/// A certificate of the broker that expires while it is used (suite F12): who is connected stays so, who connects again is
/// refused and says why, and goes on by itself when there is a valid one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_expires_is_told_until_it_is_renewed() {
    let (certificates, broker) = (Certificates::make(), Broker::rabbitmq());
    let front = TlsFront::before(broker.address(), &certificates).await;
    let proxy = Proxy::start(front.address()).await.expect("a proxy");
    let url = format!("amqps://guest:guest@localhost:{}?connect_timeout=60s", proxy.address().port());
    let settings = [("ca_file", certificates.path("ca.pem")), ("reconnect_max", "500ms".into())];
    let bus = connect(&url, &settings).await.expect("a valid certificate");
    let mut held = bus.queue("held").subscribe(ConsumeOptions::default()).await.expect("a connection that consumes");
    for body in ["connected", "still connected"] {
        bus.queue("held").with_timeout(PATIENCE).send(&body).await.expect("sent");
        next(&mut held).await;
        // Only a handshake looks at it.
        front.show("expired", &certificates);
    }
    proxy.reset_all();
    eventually(PATIENCE, || async {
        let health = bus.health().to_string();
        if health.to_lowercase().contains("expired") { Ok(()) } else { Err(health) }
    })
    .await;
    front.show("server", &certificates);
    eventually(PATIENCE, || async { bus.queue("held").send(&"after").await.map_err(|error| error.to_string()) }).await;
    next(&mut held).await;
    bus.close().await.expect("closed");
}

async fn next(held: &mut Subscription) {
    let delivery = tokio::time::timeout(PATIENCE, held.next()).await.expect("in time").expect("received");
    delivery.ack().await.expect("acknowledged");
}

/// One request to the management interface.
fn put(management: SocketAddr, path: &str, body: &str) {
    let mut stream = TcpStream::connect(management).expect("the management interface listens");
    let request = format!(
        "PUT {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("answered");
    assert!(answer.starts_with("HTTP/1.1 20"), "{path}: {answer}");
}

/// A password that is rotated in its file reaches both connections, the one that publishes and the one that consumes, at
/// their next connect; nothing is restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j5_a_rotated_password_reaches_every_connection() {
    let (broker, certificates) = (Broker::rabbitmq(), Certificates::make());
    let management = broker.management().expect("started with it");
    let set = |password: &str| {
        put(management, "/api/users/app", &format!(r#"{{"password": "{password}", "tags": ""}}"#));
        put(management, "/api/permissions/%2F/app", r#"{"configure": ".*", "write": ".*", "read": ".*"}"#);
    };
    let file = certificates.path("password");
    std::fs::write(&file, "the-first\n").expect("written");
    set("the-first");
    let proxy = Proxy::start(broker.address()).await.expect("a proxy");
    let url = format!("amqp://app@{}?connect_timeout=60s", proxy.address());
    let settings = [("pass_file", file.clone()), ("reconnect_max", "500ms".into())];
    let bus = connect(&url, &settings).await.expect("with the first password");
    let mut held = bus.queue("held").subscribe(ConsumeOptions::default()).await.expect("a connection that consumes");
    round_trip(&bus, "before").await.expect("works");

    set("the-second");
    let old = format!("amqp://app:the-first@{}?connect_timeout=60s", broker.address());
    assert_eq!(connect(&old, &[]).await.map(drop).expect_err("rotated").kind(), ErrorKind::Unauthenticated);
    proxy.reset_all();
    // The file is written late, as it goes: until then both are refused, and go on trying.
    eventually(PATIENCE, || async {
        let health = bus.health().to_string();
        if health.contains("refused") { Ok(()) } else { Err(health) }
    })
    .await;
    std::fs::write(&file, "the-second\n").expect("written");
    eventually(PATIENCE, || async { round_trip(&bus, "after").await }).await;
    eventually(PATIENCE, || async { bus.queue("held").send(&"x").await.map_err(|error| error.to_string()) }).await;
    next(&mut held).await;
    assert!(!format!("{:?} {}", bus, bus.health()).contains("the-second"));
    bus.close().await.expect("closed");

    let both = [("pass_file", file), ("pass", "x".into())];
    assert_eq!(connect(&url, &both).await.map(drop).expect_err("two passwords").kind(), ErrorKind::Config);
    let nowhere = [("pass_file", certificates.path("nowhere"))];
    let error = connect(&url, &nowhere).await.map(drop).expect_err("no file");
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains("pass_file"), "{error}");
}
