//! Passwords, headers and bodies never reach the logs, not even when everything is logged.

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq::{Backoff, Environment, FailurePolicy, dead_letter, prelude::*};
use tokio::sync::mpsc;

const MARKER: &str = "s3cr3t-marker";

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    card: String,
}

/// Fails once for each message, without telling what is in it.
async fn bill(_order: Order, attempt: polymq::Attempt, done: State<mpsc::UnboundedSender<()>>) -> Result<()> {
    if attempt.0 == 1 {
        return Err(Failure::new("not today"));
    }
    done.send(())?;
    Ok(())
}

async fn dead(message: Message, done: State<mpsc::UnboundedSender<()>>) -> Result<()> {
    assert!(message.system_headers().get(dead_letter::REASON).is_some_and(|reason| !reason.contains(MARKER)));
    done.send(())?;
    Ok(())
}

#[tokio::test]
async fn nothing_secret_is_logged() {
    let log = Log::default();
    let writer = log.clone();
    tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).init();

    // A service: a success after a retry, an undecodable body, an unwanted kind, a dead letter, a delivery given back.
    let bus = Bus::connect("memory://secrets").await.unwrap();
    let (sender, mut done) = mpsc::unbounded_channel::<()>();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(sender);
    consumers.route("orders", bill).policy(FailurePolicy {
        max_attempts: 2,
        backoff: Backoff::fixed(Duration::from_millis(1)),
        ..FailurePolicy::default()
    });
    consumers.route("orders.dlq", dead);
    let running = ConsumerRunner::new(consumers).start().await.unwrap();
    let orders = bus.queue("orders");
    orders.send(&Order { card: MARKER.into() }).await.unwrap();
    let body = format!("{{\"card\": {MARKER}");
    orders
        .send_message(Message::new(body).with_header("token", MARKER).with_content_type("application/json"))
        .await
        .unwrap();
    for _ in 0..2 {
        tokio::time::timeout(Duration::from_secs(30), done.recv()).await.unwrap().unwrap();
    }
    running.stop().await.unwrap();
    orders.send(&Order { card: MARKER.into() }).await.unwrap();
    let mut subscription = orders.subscribe(polymq::ConsumeOptions::default()).await.unwrap();
    let delivery = subscription.next().await.unwrap();
    let shown = format!("{delivery:?} {:?} {bus:?}", delivery.message());
    drop(delivery);

    // Brokers that are not there, with passwords in every place that takes one.
    let mut errors = vec![shown];
    for pairs in [
        vec![("POLYMQ_URL", "amqp://user:s3cr3t-marker@127.0.0.1:1/%2f?heartbeat=5s")],
        vec![("POLYMQ_BACKEND", "amqp"), ("RMQ_HOST", "127.0.0.1"), ("RMQ_PORT", "1"), ("RMQ_PASS", MARKER)],
        vec![("POLYMQ_BACKEND", "amqp"), ("POLYMQ_AMQP_PASS", MARKER), ("POLYMQ_AMQP_PASSS", MARKER)],
        vec![("POLYMQ_URL", "mqtt://user:s3cr3t-marker@127.0.0.1:1")],
        vec![("POLYMQ_BACKEND", "mqtt"), ("POLYMQ_MQTT_PASS", MARKER), ("POLYMQ_MQTT_PORT", "none")],
        vec![("POLYMQ_URL", "mqtt://user:s3cr3t-marker@[")],
        vec![("POLYMQ_URL", "user:s3cr3t-marker@host")],
        vec![("POLYMQ_URL", "memory://user:s3cr3t-marker@host")],
        vec![("POLYMQ_URL", "memory://?password=s3cr3t-marker")],
    ] {
        let environment: Environment = pairs.iter().copied().collect();
        let builder = Bus::builder().environment(environment.clone());
        errors.push(format!("{builder:?} {environment:?}"));
        let error = builder.connect().await.unwrap_err();
        errors.push(format!("{error} {error:?}"));
    }
    for text in errors {
        assert!(!text.contains(MARKER), "{text}");
    }

    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(log.contains("message not handled"), "the log was taken: {log}");
    let lines: Vec<_> = log.lines().filter(|line| line.contains(MARKER)).collect();
    assert!(lines.is_empty(), "{lines:#?}");
}
