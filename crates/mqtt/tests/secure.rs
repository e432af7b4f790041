//! Encrypted connections to Mosquitto's own TLS listeners (mission row J4), and passwords that are rotated (J5).
//!
//! The brokers are started by `scripts/brokers`; without them, these tests fail.

#![cfg(feature = "tls")]
#![allow(missing_docs)]

mod harness;

use std::{process::Command, sync::Arc, time::Duration};

use polymq_core::{Backend, Bus, ConsumeOptions, Environment, ErrorKind, Message, Registry, Subscription};
use polymq_mqtt::MqttBackend;
use polymq_testkit::{Broker, BrokerControl, Certificates, Proxy, TlsFront, TlsServer, eventually, free_port};

const PATIENCE: Duration = Duration::from_secs(60);

async fn connect(url: &str, settings: &[(&str, String)]) -> polymq_core::Result<Bus> {
    let mut registry = Registry::new();
    let backend: Arc<dyn Backend> = Arc::new(MqttBackend);
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

/// Whoever has a certificate of the broker's authority, trusts that authority and calls the broker by its name gets in
/// where certificates are wanted, and nobody else; under both protocol versions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j4_mosquitto_and_its_clients_prove_who_they_are() {
    let (certificates, asks, demands) = (Certificates::make(), free_port(), free_port());
    let file = |name: &str| certificates.path(name);
    let listener = |port: u16, required: bool| {
        format!(
            "listener {port} 127.0.0.1\ncafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate {required}\n",
            file("ca.pem"),
            file("server.pem"),
            file("server.key")
        )
    };
    let include = file("mosquitto.conf");
    std::fs::write(&include, listener(asks, false) + &listener(demands, true)).expect("written");
    let broker = Broker::mosquitto(&["--include", &include]);
    let trusting = || vec![("ca_file", file("ca.pem"))];
    let known = || [trusting(), vec![("cert_file", file("client.pem")), ("key_file", file("client.key"))]].concat();
    let url = |host: &str, port: u16| format!("mqtts://{host}:{port}?connect_timeout=60s");

    for (port, settings) in [(asks, trusting()), (demands, known())] {
        for protocol in ["5", "3.1.1"] {
            let settings = [settings.clone(), vec![("protocol", protocol.to_owned())]].concat();
            let bus = connect(&url("localhost", port), &settings).await.expect("everybody proves who they are");
            round_trip(&bus, protocol).await.expect("works");
            bus.close().await.expect("closed");
        }
    }
    // Mosquitto itself cannot be told to speak nothing newer.
    let front = TlsFront::of_1_2_before(broker.address(), &certificates).await;
    let old = front.address().port();
    let bus = connect(&url("localhost", old), &trusting()).await.expect("TLS 1.2 is the minimum by default");
    bus.close().await.expect("closed");
    let (expired, ancient) = (certificates.serve("expired", &[]), certificates.serve("server", TlsServer::TLS_1_1));
    let newest = [trusting(), vec![("tls_min", "1.3".to_owned())]].concat();
    let stranger = [trusting(), vec![("cert_file", file("stranger.pem")), ("key_file", file("stranger.key"))]].concat();
    for (what, url, settings, said) in [
        ("an authority that is not trusted", url("localhost", asks), vec![], "certificate"),
        ("another authority", url("localhost", asks), vec![("ca_file", file("other-ca.pem"))], "certificate"),
        ("another name of the host", url("127.0.0.1", asks), trusting(), "certificate"),
        ("a version below the minimum", url("localhost", old), newest, "version"),
        ("a version that nobody accepts", url("localhost", ancient.port()), trusting(), "version"),
        ("a certificate of before", url("localhost", expired.port()), trusting(), "expired"),
        ("no certificate of the client", url("localhost", demands), trusting(), ""),
        ("a certificate of a stranger", url("localhost", demands), stranger, ""),
    ] {
        let error = connect(&url, &settings).await.map(drop).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Disconnected, "{what}: {error}");
        assert!(error.to_string().to_lowercase().contains(said), "{what}: {error}");
    }
    let error = connect(&url("localhost", asks), &[("tls_min", "1.1".into())]).await.map(drop).expect_err("too old");
    assert_eq!(error.kind(), ErrorKind::Config, "{error}");
}

/// A certificate of the broker that expires while it is used (suite F12): who is connected stays so, who connects again is
/// refused and says why, and goes on by itself when there is a valid one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_expires_is_told_until_it_is_renewed() {
    let (certificates, broker) = (Certificates::make(), Broker::mosquitto(&[]));
    let front = TlsFront::before(broker.address(), &certificates).await;
    let proxy = Proxy::start(front.address()).await.expect("a proxy");
    let url = format!("mqtts://localhost:{}?connect_timeout=60s", proxy.address().port());
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

/// A password that is rotated in its file reaches every connection at its next connect: the one that sends and those that
/// consume; nothing is restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j5_a_rotated_password_reaches_every_connection() {
    let broker = harness::Broker::start_with(&["--user", "app", "--password", "the-first"]).await;
    let certificates = Certificates::make();
    let file = certificates.path("password");
    std::fs::write(&file, "the-first\n").expect("written");
    let direct = format!("127.0.0.1:{}", broker.port);
    let proxy = Proxy::start(direct.parse().expect("an address")).await.expect("a proxy");
    let url = format!("mqtt://app@{}?connect_timeout=60s", proxy.address());
    let settings = [("pass_file", file.clone()), ("reconnect_max", "500ms".into())];
    let bus = connect(&url, &settings).await.expect("with the first password");
    let mut held = bus.queue("held").subscribe(ConsumeOptions::default()).await.expect("a connection that consumes");
    round_trip(&bus, "before").await.expect("works");

    let passwords = broker.dir.join("passwd");
    let changed = Command::new("mosquitto_passwd").arg("-b").arg(&passwords).args(["app", "the-second"]).status();
    assert!(changed.expect("mosquitto_passwd is there").success());
    let pid = std::fs::read_to_string(broker.dir.join("pid")).expect("its pid");
    // It reads its passwords again.
    assert!(Command::new("kill").args(["-HUP", pid.trim()]).status().expect("kill").success());
    eventually(PATIENCE, || async {
        let old = connect(&format!("mqtt://app:the-first@{direct}?connect_timeout=60s"), &[]).await.map(drop);
        match old.map_err(|error| error.kind()) {
            Err(ErrorKind::Unauthenticated) => Ok(()),
            other => Err(format!("the old password: {other:?}")),
        }
    })
    .await;
    proxy.reset_all();
    // The file is written late, as it goes: until then all are refused, and go on trying.
    eventually(PATIENCE, || async {
        let health = bus.health().to_string();
        if health.contains("refused") || health.contains("uthori") { Ok(()) } else { Err(health) }
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
}
