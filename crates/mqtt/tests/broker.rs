//! What is special about MQTT, against a real Mosquitto. The contract that all backends share is in the
//! conformance suite.

mod harness;

use std::{collections::BTreeMap, time::Duration};

use harness::{Broker, body, client, text};
use polymq_core::{
    Address, Backend, Completion, Connection, ConsumeOptions, ErrorKind, HealthState, Message, ProduceOptions, Receipt,
};
use polymq_mqtt::MqttBackend;
use tokio::time::{Instant, sleep, timeout};

fn consume() -> ConsumeOptions {
    ConsumeOptions::default()
}

fn group(name: &str) -> ConsumeOptions {
    ConsumeOptions { group: Some(name.into()), ..consume() }
}

fn produce() -> ProduceOptions {
    ProduceOptions::default()
}

fn with(extra: &[(&str, &str)]) -> ProduceOptions {
    let extra = extra.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    ProduceOptions { extra, ..produce() }
}

/// Sends bodies `prefix0`, `prefix1`, and so on, all at once, and waits for every answer.
async fn send_many(bus: &dyn Connection, queue: &Address, prefix: &str, count: usize) {
    let producer = bus.producer(queue, &produce()).await.expect("producer");
    let sends: Vec<Completion<Receipt>> =
        (0..count).map(|n| producer.send(Message::new(format!("{prefix}{n}")))).collect();
    for send in sends {
        send.await.expect("sent");
    }
}

fn counts(bodies: impl IntoIterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for body in bodies {
        *counts.entry(body).or_default() += 1;
    }
    counts
}

fn each_once(bodies: impl IntoIterator<Item = String>, prefix: &str, count: usize) {
    let counts = counts(bodies);
    let expected: Vec<_> = (0..count).map(|n| format!("{prefix}{n}")).collect();
    let missing: Vec<_> = expected.iter().filter(|body| !counts.contains_key(*body)).collect();
    let twice: Vec<_> = counts.iter().filter(|(_, times)| **times > 1).map(|(body, _)| body).collect();
    assert!(missing.is_empty() && twice.is_empty(), "missing {missing:?}, more than once {twice:?}");
    assert_eq!(counts.len(), count, "foreign messages among {counts:?}");
}

#[tokio::test]
async fn a_message_is_sent_received_and_acknowledged() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("orders");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    let receipt = producer.send(Message::new("hello").with_id("m1").with_header("tenant", "acme")).await.expect("sent");
    assert_eq!(receipt.id.to_string(), "m1");
    let got = harness::one(&mut *consumer).await;
    assert_eq!(body(&got), "hello");
    assert_eq!(got.message.headers().get("tenant"), Some("acme"));
    assert_eq!(got.details, None);
    consumer.settler().ack(got.token).await.expect("acknowledged");
    bus.close().await.expect("closed");
    let bus = broker.connect().await;
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    harness::nothing(&mut *consumer, Duration::from_millis(300)).await;
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn a_queue_without_a_session_is_unroutable() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("nobody");
    let undeclared = ProduceOptions { declare: false, ..produce() };
    let error = bus.producer(&queue, &undeclared).await.expect_err("there is no session");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let error = bus.consumer(&queue, &ConsumeOptions { declare: false, ..consume() }).await.expect_err("no session");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let producer = bus.producer(&queue, &produce()).await.expect("declared");
    producer.send(Message::new("kept")).await.expect("the declared session holds it");
    bus.producer(&queue, &undeclared).await.expect("there is a session");
    bus.delete(&queue, None).await.expect("deleted");
    let error = producer.send(Message::new("lost")).await.expect_err("nobody holds it");
    assert_eq!(error.kind(), ErrorKind::Unroutable, "{error}");
    let topic = bus.producer(&Address::topic("nobody"), &produce()).await.expect("producer");
    topic.send(Message::new("fine")).await.expect("a topic needs no subscriber");
    let error = producer.send(Message::new("lost")).await.expect_err("nobody holds it");
    assert_eq!(error.kind(), ErrorKind::Unroutable, "{error}");
}

#[tokio::test]
async fn what_is_sent_while_nobody_consumes_is_delivered_later() {
    for protocol in ["5", "3.1.1"] {
        let broker = Broker::start().await;
        let queue = Address::queue("later");
        let bus = broker.connect_with(&[("protocol", protocol)]).await;
        bus.declare(&queue, &consume()).await.expect("declared");
        send_many(&*bus, &queue, "m", 50).await;
        bus.close().await.expect("closed");
        let bus = broker.connect_with(&[("protocol", protocol)]).await;
        let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
        let got = harness::take(&mut *consumer, 50).await;
        let bodies: Vec<_> = got.iter().map(body).collect();
        assert_eq!(bodies, (0..50).map(|n| format!("m{n}")).collect::<Vec<_>>(), "in order");
        assert!(got.iter().all(|incoming| incoming.details.is_none()), "delivered for the first time");
        // The group of a topic keeps messages too, once it has been there.
        let topic = Address::topic("news");
        let mut member = bus.consumer(&topic, &group("audit")).await.expect("consumer");
        member.close().await.expect("closed");
        send_many(&*bus, &topic, "t", 5).await;
        let mut member = bus.consumer(&topic, &group("audit")).await.expect("consumer");
        each_once(harness::take(&mut *member, 5).await.iter().map(body), "t", 5);
        bus.close().await.expect("closed");
    }
}

#[tokio::test]
async fn consumers_of_one_queue_split_its_messages() {
    let broker = Broker::start().await;
    let queue = Address::queue("shared");
    let (one, two) = (broker.connect().await, broker.connect().await);
    // Two on one connection, one on another.
    let mut consumers = Vec::new();
    for bus in [&one, &one, &two] {
        consumers.push(bus.consumer(&queue, &ConsumeOptions { prefetch: 8, ..consume() }).await.expect("consumer"));
    }
    let (found, mut finds) = tokio::sync::mpsc::unbounded_channel();
    for (n, mut consumer) in consumers.into_iter().enumerate() {
        let found = found.clone();
        tokio::spawn(async move {
            let settler = consumer.settler();
            let mut got = Vec::new();
            while consumer.receive(4, &mut got).await.is_ok() {
                for incoming in got.drain(..) {
                    let _ = found.send((n, body(&incoming)));
                    settler.ack(incoming.token).await.expect("acknowledged");
                }
            }
        });
    }
    send_many(&*one, &queue, "m", 300).await;
    let mut seen = Vec::new();
    while seen.len() < 300 {
        seen.push(timeout(harness::PATIENCE, finds.recv()).await.expect("in time").expect("found"));
    }
    sleep(Duration::from_millis(200)).await;
    assert!(finds.try_recv().is_err(), "a message came twice");
    each_once(seen.iter().map(|(_, body)| body.clone()), "m", 300);
    let of_two = seen.iter().filter(|(n, _)| *n == 2).count();
    assert!((100..200).contains(&of_two), "the broker deals out half of 300 to each connection, not {of_two}");
    one.close().await.expect("closed");
    two.close().await.expect("closed");
}

#[tokio::test]
async fn a_consumer_that_leaves_leaves_nothing_behind() {
    let broker = Broker::start().await;
    let queue = Address::queue("leaving");
    let (stays, leaves) = (broker.connect().await, broker.connect().await);
    for (first, second) in [(&stays, &leaves), (&leaves, &stays)] {
        let first = (*first).consumer(&queue, &consume()).await.expect("consumer");
        let second = (*second).consumer(&queue, &consume()).await.expect("consumer");
        send_many(&*stays, &queue, "m", 100).await;
        drop((first, second));
        // Both have let go; whoever comes next gets the part of each.
        let mut next = stays.consumer(&queue, &consume()).await.expect("consumer");
        each_once(harness::take(&mut *next, 100).await.iter().map(body), "m", 100);
        next.close().await.expect("closed");
    }
    // One leaves while the other goes on.
    let mut goes_on = stays.consumer(&queue, &consume()).await.expect("consumer");
    let mut other = leaves.consumer(&queue, &ConsumeOptions { prefetch: 4, ..consume() }).await.expect("consumer");
    send_many(&*stays, &queue, "m", 100).await;
    let held = harness::one(&mut *other).await;
    leaves.close().await.expect("closed");
    each_once(harness::take(&mut *goes_on, 100).await.iter().map(body), "m", 100);
    drop(held);
    stays.close().await.expect("closed");
}

#[tokio::test]
async fn every_group_gets_every_message_and_its_members_share() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let topic = Address::topic("events/eu");
    let mut audit = bus.consumer(&topic, &group("audit")).await.expect("consumer");
    let mut billing = bus.consumer(&topic, &group("billing")).await.expect("consumer");
    let mut one = bus.consumer(&Address::topic("events/+"), &consume()).await.expect("consumer");
    let mut many = bus.consumer(&Address::topic("#"), &consume()).await.expect("consumer");
    let mut other = bus.consumer(&Address::topic("events/us"), &consume()).await.expect("consumer");
    send_many(&*bus, &topic, "e", 20).await;
    for consumer in [&mut audit, &mut billing, &mut one, &mut many] {
        each_once(harness::take(&mut **consumer, 20).await.iter().map(body), "e", 20);
    }
    harness::nothing(&mut *other, Duration::from_millis(200)).await;
    // What consumers say to each other is no message of a user's.
    harness::nothing(&mut *many, Duration::from_millis(200)).await;
    bus.producer(&Address::topic("events/us"), &produce())
        .await
        .expect("producer")
        .send(Message::new("x"))
        .await
        .expect("sent");
    let got = harness::one(&mut *one).await;
    assert_eq!(got.channel.as_deref(), Some("events/us"));
    // Handed out again, it still knows where it came from.
    one.settler().release(got.token, got.message);
    assert_eq!(harness::one(&mut *one).await.channel.as_deref(), Some("events/us"));
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn wildcards_follow_the_table() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    for (filter, hits, misses) in [
        ("a/+", vec!["a/b", "a/"], vec!["a", "a/b/c", "b/b"]),
        ("+/b", vec!["a/b", "/b"], vec!["b", "a/b/b"]),
        ("a/#", vec!["a", "a/b", "a/b/c"], vec!["b", "ab"]),
        ("+", vec!["a", "grün"], vec!["a/b"]),
        ("a/+/c", vec!["a/b/c", "a//c"], vec!["a/c", "a/b/d"]),
    ] {
        let mut consumer = bus.consumer(&Address::topic(filter), &consume()).await.expect(filter);
        for topic in hits.iter().chain(&misses) {
            let producer = bus.producer(&Address::topic(*topic), &produce()).await.expect("producer");
            producer.send(Message::new(*topic)).await.expect("sent");
        }
        let got = harness::take(&mut *consumer, hits.len()).await;
        assert_eq!(got.iter().map(body).collect::<Vec<_>>(), hits, "{filter}");
        harness::nothing(&mut *consumer, Duration::from_millis(50)).await;
        consumer.close().await.expect("closed");
    }
    for (address, word) in
        [(Address::topic("a/+"), "wildcard"), (Address::queue("#"), "wildcard"), (Address::queue("$a"), "$")]
    {
        let error = bus.producer(&address, &produce()).await.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().contains(word), "{error}");
    }
}

#[tokio::test]
async fn a_retry_counts_and_waits_and_gives_the_original_up_last() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("retry");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let settler = consumer.settler();
    send_many(&*bus, &queue, "m", 1).await;
    let first = harness::one(&mut *consumer).await;
    assert_eq!(first.message.header_attempt(), 1);
    let began = Instant::now();
    settler.retry(first.token, &first.message, 2, Duration::from_millis(300)).await.expect("will happen");
    let second = harness::one(&mut *consumer).await;
    assert!(began.elapsed() >= Duration::from_millis(300) && began.elapsed() < Duration::from_secs(2));
    assert_eq!((second.message.header_attempt(), body(&second).as_str()), (2, "m0"));
    assert_eq!(second.message.id(), first.message.id());
    settler.retry(second.token, &second.message, 3, Duration::ZERO).await.expect("sent again");
    let third = harness::one(&mut *consumer).await;
    assert_eq!(third.message.header_attempt(), 3);
    // The number survives a restart of the consumer.
    drop(third);
    bus.close().await.expect("closed");
    let bus = broker.connect().await;
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let again = harness::one(&mut *consumer).await;
    assert_eq!(again.message.header_attempt(), 3);
    assert!(again.details.as_ref().is_some_and(|details| details.redelivered));
    consumer.settler().ack(again.token).await.expect("acknowledged");
    harness::nothing(&mut *consumer, Duration::from_millis(200)).await;

    // The members of other groups must not see the retry of one.
    let topic = Address::topic("retries");
    let mut one = bus.consumer(&topic, &group("one")).await.expect("consumer");
    let mut two = bus.consumer(&topic, &group("two")).await.expect("consumer");
    send_many(&*bus, &topic, "t", 1).await;
    let first = harness::one(&mut *one).await;
    one.settler().retry(first.token, &first.message, 2, Duration::from_millis(50)).await.expect("will happen");
    assert_eq!(harness::one(&mut *one).await.attempt, Some(2));
    harness::take(&mut *two, 1).await;
    harness::nothing(&mut *two, Duration::from_millis(200)).await;
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn every_quality_of_service_is_delivered() {
    let broker = Broker::start().await;
    for protocol in ["5", "3.1.1"] {
        let bus = broker.connect_with(&[("protocol", protocol)]).await;
        let queue = Address::queue("quality");
        let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
        for qos in ["0", "1", "2"] {
            let producer = bus.producer(&queue, &with(&[("qos", qos)])).await.expect("producer");
            let sends: Vec<_> = (0..500).map(|n| producer.send(Message::new(format!("{qos}-{n}")))).collect();
            for send in sends {
                send.await.expect("sent");
            }
            producer.flush().await.expect("flushed");
            each_once(harness::take(&mut *consumer, 500).await.iter().map(body), &format!("{qos}-"), 500);
        }
        for (key, value) in [("qos", "3"), ("retain", "maybe"), ("exchange", "x")] {
            let error = bus.producer(&queue, &with(&[(key, value)])).await.expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.to_string().contains(key), "{error}");
        }
        bus.close().await.expect("closed");
    }
}

#[tokio::test]
async fn a_retained_message_meets_a_new_subscriber() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let topic = Address::topic("state/door");
    let producer = bus.producer(&topic, &with(&[("retain", "true")])).await.expect("producer");
    producer.send(Message::new("open")).await.expect("sent");
    let mut consumer = bus.consumer(&topic, &consume()).await.expect("consumer");
    let got = harness::one(&mut *consumer).await;
    assert!(got.details.as_ref().is_some_and(|details| details.retained));
    producer.send(Message::new("closed")).await.expect("sent");
    let got = harness::one(&mut *consumer).await;
    assert_eq!((body(&got).as_str(), got.details.is_none()), ("closed", true));
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn foreign_clients_read_and_write_the_same_channels() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("interop");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    for version in ["311", "5"] {
        let port = broker.port;
        let sent = tokio::task::spawn_blocking(move || {
            client("mosquitto_pub", port, &["-V", version, "-t", "interop", "-q", "1", "-m", "from afar"])
        });
        assert!(sent.await.expect("ran").status.success());
        let got = harness::one(&mut *consumer).await;
        assert_eq!(got.message, Message::new("from afar"));
        consumer.settler().ack(got.token).await.expect("acknowledged");
    }
    let port = broker.port;
    let listening = tokio::task::spawn_blocking(move || {
        client("mosquitto_sub", port, &["-V", "5", "-t", "interop", "-C", "1", "-W", "10", "-F", "%P|%C|%p"])
    });
    let heard = loop {
        let producer = bus.producer(&queue, &produce()).await.expect("producer");
        let message = Message::new("{}")
            .with_time(std::time::SystemTime::now())
            .with_id("i1")
            .with_kind("k")
            .with_content_type("application/json");
        producer.send(message.with_header("tenant", "acme")).await.expect("sent");
        if listening.is_finished() {
            break text(&listening.await.expect("ran").stdout);
        }
        sleep(Duration::from_millis(50)).await;
    };
    assert!(heard.starts_with("id:i1 type:k time:"), "{heard}");
    assert!(heard.trim_end().ends_with("tenant:acme|application/json|{}"), "{heard}");
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn a_killed_broker_loses_nothing_that_was_acknowledged() {
    let broker = Broker::start().await;
    let bus = broker.connect_with(&[("reconnect_max", "500ms")]).await;
    let queue = Address::queue("durable");
    let topic = Address::topic("durable");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    let mut health = bus.health();
    let mut sent = Vec::new();
    let mut unknown = 0;
    let mut got = Vec::new();
    for round in 0..2 {
        send_many(&*bus, &queue, &format!("early{round}-"), 100).await;
        sent.extend((0..100).map(|n| format!("early{round}-{n}")));
        // Mosquitto answers first and saves then: what it answers in its last moment may be lost.
        sleep(Duration::from_millis(300)).await;
        let sends: Vec<_> =
            (0..400).map(|n| (format!("{round}-{n}"), producer.send(Message::new(format!("{round}-{n}"))))).collect();
        let mut seen = harness::take(&mut *consumer, 50).await.iter().map(body).collect::<Vec<_>>();
        got.append(&mut seen);
        broker.kill().await;
        sleep(Duration::from_millis(100)).await;
        assert_eq!(health.now().state, HealthState::Down);
        let late: Vec<_> = (0..50)
            .map(|n| (format!("late{round}-{n}"), producer.send(Message::new(format!("late{round}-{n}")))))
            .collect();
        broker.up().await;
        for (body, send) in sends.into_iter().chain(late) {
            match timeout(harness::PATIENCE, send).await.expect("answered") {
                Ok(_) if body.starts_with("late") => sent.push(body),
                Ok(_) => {}
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error}");
                    assert!(!body.starts_with("late"), "what waited for the connection was not handed over");
                    unknown += 1;
                }
            }
        }
        while health.now().state == HealthState::Down {
            timeout(harness::PATIENCE, health.changed()).await.expect("up again");
        }
        assert_eq!(health.now().state, HealthState::Degraded);
        sleep(Duration::from_millis(300)).await;
    }
    assert!(unknown > 0, "the broker was killed while messages were under way");
    let mut buffer = Vec::new();
    let settler = consumer.settler();
    while timeout(Duration::from_secs(2), consumer.receive(100, &mut buffer)).await.is_ok() {
        for incoming in buffer.drain(..) {
            got.push(body(&incoming));
            let _ = settler.ack(incoming.token).await;
        }
    }
    let got = counts(got);
    let lost: Vec<_> = sent.iter().filter(|body| !got.contains_key(*body)).collect();
    assert!(lost.is_empty(), "{} of {} are lost ({unknown} unknown): {lost:?}", lost.len(), sent.len());
    send_many(&*bus, &topic, "t", 3).await;
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn a_broker_that_forgets_everything_is_told_again() {
    let broker = Broker::start_with(&["--volatile"]).await;
    let bus = broker.connect_with(&[("reconnect_max", "500ms")]).await;
    let (held, consumed) = (Address::queue("held"), Address::queue("consumed"));
    let producer = bus.producer(&held, &produce()).await.expect("producer");
    let mut consumer = bus.consumer(&consumed, &consume()).await.expect("consumer");
    broker.kill().await;
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
    let bus =
        broker.connect_with(&[("keep_alive", "2s"), ("operation_timeout", "1s"), ("connect_timeout", "1s")]).await;
    let mut consumer = bus.consumer(&Address::queue("silence"), &consume()).await.expect("consumer");
    bus.ping().await.expect("answers");
    broker.signal("STOP").await;
    let began = Instant::now();
    assert_eq!(bus.ping().await.expect_err("silent").kind(), ErrorKind::Timeout);
    let mut health = bus.health();
    while health.now().state != HealthState::Down {
        timeout(Duration::from_secs(4), health.changed()).await.expect("found").expect("not closed");
    }
    assert!(began.elapsed() <= Duration::from_millis(3200), "found after {:?}", began.elapsed());
    broker.signal("CONT").await;
    send_many(&*bus, &Address::queue("silence"), "m", 3).await;
    each_once(harness::take(&mut *consumer, 3).await.iter().map(body), "m", 3);
    bus.close().await.expect("closed");
}

#[tokio::test]
async fn an_answer_that_never_comes_is_never_success() {
    // Answers CONNECT, and nothing else.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut socket, _) = listener.accept().await.expect("a client");
        let mut buffer = vec![0; 4096];
        let _ = socket.read(&mut buffer).await;
        let _ = socket.write_all(&[0x20, 3, 0, 0, 0]).await;
        while socket.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
    });
    let settings = polymq_core::Settings::from_url(&format!("mqtt://127.0.0.1:{port}")).expect("a URL");
    let settings = settings.with("keep_alive", "2s").with("operation_timeout", "500ms");
    let bus = MqttBackend.connect(&settings).await.expect("connected");
    let producer = bus.producer(&Address::topic("void"), &produce()).await.expect("producer");
    let mut send = producer.send(Message::new("?"));
    assert!(timeout(Duration::from_millis(500), &mut send).await.is_err(), "no answer, no result");
    assert!(!send.withdraw(), "it was written");
    let error = timeout(Duration::from_secs(5), send).await.expect("the silence is noticed").expect_err("unknown");
    assert_eq!(error.kind(), ErrorKind::UnknownOutcome);
    // Now there is no connection at all: what waits can be taken back.
    let send = producer.send(Message::new("?"));
    sleep(Duration::from_millis(50)).await;
    assert!(send.withdraw(), "it waits");
    assert_eq!(bus.close().await.map_err(|error| error.kind()), Ok(()));
    assert_eq!(producer.send(Message::new("?")).await.expect_err("closed").kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn closing_is_bounded_idempotent_and_leaves_nothing() {
    let broker = Broker::start().await;
    let bus = broker.connect().await;
    let queue = Address::queue("closing");
    for _ in 0..50 {
        let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
        consumer.close().await.expect("closed");
        consumer.close().await.expect("closed twice");
        let mut got = Vec::new();
        assert_eq!(consumer.receive(1, &mut got).await.expect_err("closed").kind(), ErrorKind::Closed);
    }
    send_many(&*bus, &queue, "m", 10).await;
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let held = harness::one(&mut *consumer).await;
    consumer.close().await.expect("closed");
    consumer.settler().ack(held.token).await.expect("settled after closing");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    assert_eq!(harness::take(&mut *consumer, 9).await.len(), 9);
    let blocked = tokio::spawn(async move { consumer.receive(1, &mut Vec::new()).await });
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    let sends: Vec<_> = (0..100).map(|n| producer.send(Message::new(format!("{n}")))).collect();
    let (first, second) = tokio::join!(bus.close(), bus.close());
    first.and(second).expect("closed");
    for send in sends {
        send.await.expect("closing flushes");
    }
    let _ = blocked.await.expect("not a panic");
    assert_eq!(bus.health().now().state, HealthState::Closed);
    assert_eq!(producer.send(Message::new("")).await.expect_err("closed").kind(), ErrorKind::Closed);
    assert_eq!(bus.ping().await.expect_err("closed").kind(), ErrorKind::Closed);
}

/// What the child process of the next test does.
#[tokio::test]
async fn child_that_holds_messages() {
    let (Ok(url), Ok(count)) = (std::env::var("POLYMQ_CHILD_URL"), std::env::var("POLYMQ_CHILD_COUNT")) else { return };
    let settings = polymq_core::Settings::from_url(&url).expect("a URL");
    let bus = MqttBackend.connect(&settings).await.expect("connected");
    let options = ConsumeOptions { prefetch: 20, ..consume() };
    let mut consumer = bus.consumer(&Address::queue("killed"), &options).await.expect("consumer");
    println!("ready");
    let mut got = Vec::new();
    for _ in 0..count.parse().expect("a number") {
        consumer.receive(1, &mut got).await.expect("a message");
    }
    println!("holding");
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_killed_consumer_loses_nothing() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let broker = Broker::start().await;
    let queue = Address::queue("killed");
    // Alone, and beside another consumer that must take over.
    for beside in [false, true] {
        let bus = broker.connect().await;
        let mut survivor = match beside {
            true => Some(bus.consumer(&queue, &consume()).await.expect("consumer")),
            false => None,
        };
        bus.declare(&queue, &consume()).await.expect("declared");
        let mut child = tokio::process::Command::new(std::env::current_exe().expect("this test"));
        child.args(["--exact", "child_that_holds_messages", "--nocapture"]).kill_on_drop(true);
        child.env("POLYMQ_CHILD_URL", broker.url()).env("POLYMQ_CHILD_COUNT", "10");
        let mut child = child.stdout(std::process::Stdio::piped()).spawn().expect("started");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut wait_for = async |word: &str| {
            while !timeout(harness::PATIENCE, lines.next_line())
                .await
                .expect("in time")
                .expect("read")
                .expect("alive")
                .contains(word)
            {}
        };
        wait_for("ready").await;
        send_many(&*bus, &queue, "m", 100).await;
        wait_for("holding").await;
        child.kill().await.expect("killed");
        let mut consumer = match survivor.take() {
            Some(survivor) => survivor,
            None => bus.consumer(&queue, &consume()).await.expect("consumer"),
        };
        each_once(harness::take(&mut *consumer, 100).await.iter().map(body), "m", 100);
        harness::nothing(&mut *consumer, Duration::from_millis(300)).await;
        bus.close().await.expect("closed");
    }
}

#[tokio::test]
async fn attempts_and_bodies_survive_version_3_1_1() {
    let broker = Broker::start().await;
    let bus = broker.connect_with(&[("protocol", "3.1.1")]).await;
    let queue = Address::queue("old");
    let mut consumer = bus.consumer(&queue, &consume()).await.expect("consumer");
    let mut second =
        broker.connect_with(&[("protocol", "3.1.1")]).await.consumer(&queue, &consume()).await.expect("consumer");
    let producer = bus.producer(&queue, &produce()).await.expect("producer");
    for n in 0..4 {
        producer.send(Message::new(format!("m{n}")).with_id("dropped")).await.expect("sent");
    }
    let first = harness::one(&mut *consumer).await;
    assert_eq!(first.message.id(), None, "MQTT 3.1.1 carries the body alone");
    consumer.settler().retry(first.token, &first.message, 2, Duration::ZERO).await.expect("again");
    let mut got = harness::take(&mut *consumer, 2).await;
    assert!(got.iter().any(|incoming| incoming.attempt == Some(2)));
    got.extend(harness::take(&mut *second, 2).await);
    each_once(got.iter().map(body), "m", 4);
    bus.close().await.expect("closed");
}
