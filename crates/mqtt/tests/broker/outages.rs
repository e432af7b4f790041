//! A broker that is away, silent or forgetful.

use std::{sync::Arc, time::Duration};

use polymq_core::{Address, Backend, Connection, ErrorKind, HealthState, Message, Retry};
use polymq_mqtt::MqttBackend;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Notify,
    time::{sleep, timeout},
};

use crate::{
    harness::{self, Broker, body},
    words::*,
};

/// What is withdrawn while there is no broker is given up at once, and nobody waits for it.
#[tokio::test]
async fn what_is_withdrawn_during_an_outage_is_not_kept() {
    let broker = Broker::start().await;
    let bus = broker.connect_with(&[("reconnect_max", "500ms")]).await;
    let queue = Address::queue("outage");
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    send_many(&*bus, &queue, "before", 1).await;
    let mut health = bus.health();
    broker.kill().await;
    while health.now().state != HealthState::Down {
        timeout(harness::PATIENCE, health.changed()).await.expect("the loss is seen");
    }
    timeout(harness::PATIENCE, producer.flush()).await.expect("nothing to wait for").expect("flushed");
    let withdrawn = producer.send(Message::new("withdrawn"));
    let mut flush = std::pin::pin!(producer.flush());
    assert!(timeout(Duration::from_millis(100), &mut flush).await.is_err(), "it waits for a message");
    assert!(withdrawn.withdraw());
    timeout(harness::PATIENCE, flush).await.expect("nothing is left to wait for").expect("flushed");
    let kept = producer.send(Message::new("kept"));
    let (mut given_up, mut sends) = (0, Vec::new());
    for _ in 0..5_000 {
        let send = producer.send(Message::new("withdrawn"));
        assert!(send.withdraw());
        sends.push(send);
        tokio::task::yield_now().await;
    }
    for send in sends {
        given_up += usize::from(timeout(Duration::ZERO, send).await.is_ok());
    }
    assert!(given_up >= 3_000, "of 5000 withdrawn messages {given_up} are gone");
    broker.up().await;
    timeout(harness::PATIENCE, kept).await.expect("in time").expect("sent after all");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let mut seen: Vec<_> = harness::take(&mut *consumer, 2).await.iter().map(body).collect();
    seen.sort();
    assert_eq!(seen, ["before0", "kept"]);
    harness::nothing(&mut *consumer, Duration::from_millis(200)).await;
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn a_broker_that_forgets_everything_is_told_again() {
    let broker = Broker::start_with(&["--volatile"]).await;
    let bus = broker.connect_with(&[("reconnect_max", "500ms")]).await;
    let (held, consumed) = (Address::queue("held"), Address::queue("consumed"));
    let producer = bus.producer(&held, &produce()).await.expect("producer");
    let mut consumer = bus.consumer(&consumed, &consume()).await.expect("consumer");
    let mut health = bus.health();
    broker.kill().await;
    // What is written before the loss is seen has an unknown outcome.
    while health.now().state != HealthState::Down {
        timeout(harness::PATIENCE, health.changed()).await.expect("the loss is seen").expect("not closed");
    }
    let waiting = producer.send(Message::new("waited"));
    broker.up().await;
    timeout(harness::PATIENCE, waiting).await.expect("answered").expect("its session was made before it was sent");
    send_many(&*bus, &consumed, "m", 5).await;
    each_once(harness::take(&mut *consumer, 5).await.iter().map(body), "m", 5);
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn a_silent_broker_is_found_within_the_keep_alive() {
    let broker = Broker::start().await;
    // More than a machine stalls; the loss is found after five to six quarters.
    let bus =
        broker.connect_with(&[("keep_alive", "9s"), ("operation_timeout", "15s"), ("reconnect_max", "500ms")]).await;
    let mut consumer = bus.consumer(&Address::queue("silence"), &consume()).await.expect("consumer");
    bus.ping().await.expect("answers");
    broker.signal("STOP").await;
    let mut health = bus.health();
    let found = async {
        while health.now().state != HealthState::Down {
            health.changed().await.expect("not closed");
        }
    };
    let (ping, found) = tokio::join!(bus.ping(), timeout(harness::PATIENCE, found));
    let error = ping.expect_err("silent");
    assert!(matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Disconnected), "{error}");
    found.expect("found");
    broker.signal("CONT").await;
    send_many(&*bus, &Address::queue("silence"), "m", 3).await;
    each_once(harness::take(&mut *consumer, 3).await.iter().map(body), "m", 3);
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn an_answer_that_never_comes_is_never_success() {
    // Answers CONNECT, and nothing else.
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    let asked = Arc::new(Notify::new());
    let told = Arc::clone(&asked);
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut socket, _) = listener.accept().await.expect("a client");
        let mut buffer = vec![0; 4096];
        let _ = socket.read(&mut buffer).await;
        let _ = socket.write_all(&[0x20, 3, 0, 0, 0]).await;
        while let Ok(count @ 1..) = socket.read(&mut buffer).await {
            // Not of a ping.
            if buffer[..count].windows(4).any(|found| found == b"void") {
                told.notify_one();
            }
        }
    });
    let settings = polymq_core::Settings::from_url(&format!("mqtt://127.0.0.1:{port}")).expect("a URL");
    let settings = settings.with("keep_alive", "9s").with("operation_timeout", "500ms").with("connect_timeout", "60s");
    let bus = MqttBackend.connect(&settings).await.expect("connected");
    let producer = bus.producer(&Address::topic("void"), &produce()).await.expect("producer");
    let send = producer.send(Message::new("?"));
    timeout(harness::PATIENCE, asked.notified()).await.expect("something was written");
    assert!(!send.withdraw(), "it was written");
    let error = timeout(harness::PATIENCE, send).await.expect("the silence is noticed").expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::UnknownOutcome);
    // Now there is no connection at all: what waits can be taken back.
    let send = producer.send(Message::new("?"));
    sleep(Duration::from_millis(50)).await;
    assert!(send.withdraw(), "it waits");
    assert_eq!(bus.close().await.map_err(|error| error.kind()), Ok(()));
    assert_eq!(producer.send(Message::new("?")).await.expect_err("closed").kind(), ErrorKind::Closed);
}

/// Something ends each connection as soon as it is made: those are attempts that have failed, and with a limit they have an end.
#[tokio::test]
async fn connections_that_are_lost_at_once_count_for_the_limit() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("mqtt://{}", listener.local_addr().expect("bound"));
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        while let Ok((mut socket, _)) = listener.accept().await {
            let _ = socket.read(&mut [0; 4096]).await;
            let _ = socket.write_all(&[0x20, 3, 0, 0, 0]).await;
        }
    });
    let settings = polymq_core::Settings::from_url(&url).expect("a URL").with("connect_timeout", "60s");
    let settings =
        settings.with("reconnect_limit", "3").with("reconnect_initial", "10ms").with("reconnect_max", "20ms");
    let bus = MqttBackend.connect(&settings).await.expect("connected");
    let (topic, queue) = (Address::topic("short"), Address::queue("short"));
    let producer = bus.producer(&topic, &produce()).await.expect("producer");
    let mut health = bus.health();
    while health.now().state != HealthState::Closed {
        timeout(harness::PATIENCE, health.changed()).await.expect("it is given up");
    }
    let now = health.now().to_string();
    assert!(now.contains("given up after 3 attempts: 4 connections in a row were lost"), "{now}");
    // What nobody can do any more is not to be repeated.
    let send = producer.send(Message::new("never")).await.map(drop);
    let opened = bus.producer(&queue, &produce()).await.map(drop);
    let consumer = bus.consumer(&queue, &consume()).await.map(drop);
    for (what, outcome) in [("send", send), ("producer", opened), ("consumer", consumer)] {
        let error = outcome.expect_err(what);
        assert_eq!((error.kind(), error.retry()), (ErrorKind::Disconnected, Retry::Never), "{what}: {error}");
        assert!(error.message().contains("given up after 3 attempts"), "{what}: {error}");
    }
}

/// Passes on what a client says, and to one session no answer but CONNACK.
async fn mute(mut client: TcpStream, broker: u16, session: Arc<str>, answered: Arc<Notify>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional};
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", broker)).await else { return };
    let mut buffer = vec![0; 4096];
    let Ok(count @ 1..) = client.read(&mut buffer).await else { return };
    let ours = harness::text(&buffer[..count]).contains(&*session);
    if server.write_all(&buffer[..count]).await.is_err() {
        return;
    }
    if !ours {
        let _ = copy_bidirectional(&mut client, &mut server).await;
        return;
    }
    let Ok(count @ 1..) = server.read(&mut buffer).await else { return };
    if client.write_all(&buffer[..count]).await.is_err() {
        return;
    }
    let (mut from_client, _to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let asks = async {
        let _ = copy(&mut from_client, &mut to_server).await;
        let _ = to_server.shutdown().await;
    };
    let answers = async {
        while let Ok(1..) = from_server.read(&mut buffer).await {
            answered.notify_one();
        }
    };
    tokio::join!(asks, answers);
}

/// Declares a queue, or consumes it, without an answer to SUBSCRIBE; and sends to it meanwhile.
async fn late(broker: &Broker, other: &dyn Connection, name: &str, consumes: bool) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("mqtt://{}", listener.local_addr().expect("bound"));
    let (session, answered) = (Arc::<str>::from(format!(":q:{name}:0")), Arc::new(Notify::new()));
    let (port, told) = (broker.port, Arc::clone(&answered));
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(mute(client, port, Arc::clone(&session), Arc::clone(&told)));
        }
    });
    let settings = broker.settings().with("url", url).with("operation_timeout", "5s");
    let bus = MqttBackend.connect(&settings).await.expect("connected");
    let queue = Address::queue(name);
    let options = consume();
    let asks = async {
        match consumes {
            true => bus.consumer(&queue, &options).await.map(|_| ()),
            false => bus.declare(&queue, &options).await,
        }
    };
    let sends = async {
        timeout(harness::PATIENCE, answered.notified()).await.expect("it is subscribed");
        // To the topic of that name, since a producer of the queue waits until nobody else looks at the session.
        let producer = other.producer(&Address::topic(name), &produce()).await.expect("producer");
        producer.send(Message::new("held")).await.expect("confirmed");
    };
    let (asked, ()) = tokio::join!(asks, sends);
    // A declaration may have had its effect. That there is no consumer is certain.
    let kind = if consumes { ErrorKind::Timeout } else { ErrorKind::UnknownOutcome };
    assert_eq!(asked.expect_err("no answer").kind(), kind, "{name}");
    let mut consumer = other.consumer(&queue, &options).await.expect("consumer");
    assert_eq!(body(&harness::one(&mut *consumer).await), "held", "{name}");
    bus.close().await.expect("closed");
}

/// Nobody has refused anything: what was confirmed to others meanwhile is in the session.
#[tokio::test]
async fn an_answer_that_is_late_ends_no_session() {
    let broker = Broker::start().await;
    let other = broker.connect().await;
    tokio::join!(late(&broker, &*other, "late-declare", false), late(&broker, &*other, "late-consume", true));
    other.close().await.expect("closed");
}
