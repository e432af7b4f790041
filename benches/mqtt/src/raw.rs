//! The best loops that can be written on rumqttc by hand.

use std::{sync::Arc, time::Duration};

use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, WINDOW, all_handled, handled, payload},
};
use rumqttc::v5::{
    AsyncClient, ConnectionError, Event, EventLoop, MqttOptions,
    mqttbytes::{
        QoS,
        v5::{Packet, PubAckReason},
    },
};
use tokio::sync::{Semaphore, oneshot};

use crate::queue;

/// A client with its event loop; `session` names a persistent one.
fn client(options: &Options, name: &str, session: bool) -> (AsyncClient, EventLoop) {
    let address = options.need("url").trim_start_matches("mqtt://");
    let (host, port) = address.split_once(':').expect("host:port");
    let mut settings = MqttOptions::new(format!("{name}-{}", std::process::id()), host, port.parse().expect("a port"));
    settings.set_keep_alive(Duration::from_secs(20)).set_manual_acks(true).set_clean_start(!session);
    settings.set_session_expiry_interval(session.then_some(60));
    settings.set_receive_maximum(Some(1000));
    settings.set_max_packet_size(Some(1 << 20));
    AsyncClient::new(settings, 1 << 16)
}

/// Makes the session that holds the messages, and leaves.
async fn declare(options: &Options, filter: &str) {
    let (client, mut events) = client(options, "consumer", true);
    client.subscribe(filter, QoS::AtLeastOnce).await.expect("asked");
    loop {
        if let Event::Incoming(Packet::SubAck(_)) = events.poll().await.expect("connected") {
            break;
        }
    }
    client.disconnect().await.expect("asked");
    while events.poll().await.is_ok() {}
}

/// Ends that session with what it holds: until it expired, the next measurement would find a broker that has to ask the
/// system for fresh memory.
async fn forget(options: &Options) {
    let (client, mut events) = client(options, "consumer", false);
    while !matches!(events.poll().await.expect("connected"), Event::Incoming(Packet::ConnAck(_))) {}
    client.disconnect().await.expect("asked");
    while events.poll().await.is_ok() {}
}

/// Publishes with a sliding window, until the last PUBACK.
async fn publish_window(client: AsyncClient, mut events: EventLoop, topic: String, body: Vec<u8>, messages: u64) {
    let window = Arc::new(Semaphore::new(WINDOW));
    let (done, all) = oneshot::channel();
    let room = Arc::clone(&window);
    tokio::spawn(async move {
        let mut answered = 0;
        while answered < messages {
            if let Event::Incoming(Packet::PubAck(answer)) = events.poll().await.expect("connected") {
                assert_eq!(answer.reason, PubAckReason::Success, "somebody keeps it");
                answered += 1;
                room.add_permits(1);
            }
        }
        let _ = done.send(());
        drive(events).await;
    });
    for _ in 0..messages {
        window.acquire().await.expect("open").forget();
        client.publish(topic.as_str(), QoS::AtLeastOnce, false, body.clone()).await.expect("queued");
    }
    all.await.expect("answered");
}

/// Keeps a connection going until it ends.
async fn drive(mut events: EventLoop) {
    loop {
        match events.poll().await {
            Ok(_) => {}
            Err(ConnectionError::RequestsDone) => return,
            Err(_) => return,
        }
    }
}

/// Puts messages where a consumer will find them.
pub async fn fill(options: &Options, topic: &str) {
    let (client, events) = client(options, "filler", false);
    publish_window(client, events, topic.to_owned(), payload(options), options.messages()).await;
}

pub async fn publish(options: Options) -> Numbers {
    let topic = queue();
    declare(&options, &format!("$share/bench/{topic}")).await;
    let (client, mut events) = client(&options, "publisher", false);
    while !matches!(events.poll().await.expect("connected"), Event::Incoming(Packet::ConnAck(_))) {}
    let meter = Meter::start(&options);
    publish_window(client, events, topic, payload(&options), options.messages()).await;
    let numbers = meter.stop(options.messages());
    forget(&options).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let topic = queue();
    let (client, mut events) = client(&options, "consumer", true);
    client.subscribe(format!("$share/bench/{topic}"), QoS::AtLeastOnce).await.expect("asked");
    while !matches!(events.poll().await.expect("connected"), Event::Incoming(Packet::SubAck(_))) {}
    let connection = tokio::spawn(async move {
        while LATCH.remaining() > 0 {
            if let Event::Incoming(Packet::Publish(publish)) = events.poll().await.expect("connected") {
                handled(&publish.payload);
                client.try_ack(&publish).expect("room");
            }
        }
        drive(events).await;
    });
    fill(&options, &topic).await;
    let numbers = all_handled(options.messages()).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    connection.abort();
    forget(&options).await;
    numbers
}
