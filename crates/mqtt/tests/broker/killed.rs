//! A broker or a consumer that is killed in the middle of its work.

use std::{collections::BTreeSet, time::Duration};

use polymq_core::{Address, Backend, ConsumeOptions, ErrorKind, HealthState, Message};
use polymq_mqtt::MqttBackend;
use tokio::time::{sleep, timeout};

use crate::{
    harness::{self, Broker, body},
    words::*,
};

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
        // Mosquitto answers first and saves then, both before it reads what comes next.
        bus.ping().await.expect("it has saved");
        let several = |numbers: std::ops::Range<u32>| {
            let bodies = numbers.map(|n| format!("{round}-{n}"));
            bodies.map(|body| (body.clone(), producer.send(Message::new(body)))).collect::<Vec<_>>()
        };
        let mut sends = several(0..400);
        let mut seen = harness::take(&mut *consumer, 50).await.iter().map(body).collect::<Vec<_>>();
        got.append(&mut seen);
        // Some are under way for certain when it is killed: they are written, and nobody answers.
        broker.signal("STOP").await;
        sends.append(&mut several(400..800));
        sleep(Duration::from_millis(300)).await;
        broker.kill().await;
        while health.now().state != HealthState::Down {
            timeout(harness::PATIENCE, health.changed()).await.expect("it is noticed").expect("not closed");
        }
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
        assert!(health.now().reconnects > 0, "{}", health.now());
    }
    assert!(unknown > 0, "the broker was killed while messages were under way");
    let mut buffer = Vec::new();
    let settler = consumer.settler();
    let mut awaited: BTreeSet<_> = sent.into_iter().filter(|body| !got.contains(body)).collect();
    while !awaited.is_empty() {
        let received = timeout(harness::PATIENCE, consumer.receive(100, &mut buffer)).await;
        received.unwrap_or_else(|_| panic!("lost ({unknown} unknown): {awaited:?}")).expect("messages");
        for incoming in buffer.drain(..) {
            awaited.remove(&body(&incoming));
            let _ = settler.ack(incoming.token).await;
        }
    }
    send_many(&*bus, &topic, "t", 3).await;
    bus.close().await.expect("closed");
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
        child.args(["--exact", "killed::child_that_holds_messages", "--nocapture"]).kill_on_drop(true);
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
