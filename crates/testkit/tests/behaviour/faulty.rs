//! Mission row I8: each fault does what it says, and nothing else.

use std::{sync::Arc, time::Duration};

use polymq_core::{
    Bus, Channel, ConsumeOptions, Environment, ErrorKind, Message, Registry, Retry, memory::MemoryBackend,
};
use polymq_testkit::faulty::{FaultCounts, Faults};
use tokio::time::Instant;

async fn bus(space: &str, faults: &Faults) -> polymq_core::Result<Bus> {
    let mut registry = Registry::new();
    registry.add(faults.around(Arc::new(MemoryBackend))).expect("one backend");
    let builder = Bus::builder().registry(registry).environment(Environment::default());
    builder.url(format!("memory://{space}")).connect().await
}

async fn send(queue: &Channel, count: usize) {
    for result in queue.send_all((0..count).map(|n| Message::new(n.to_string()))).await {
        result.expect("accepted");
    }
}

async fn bodies(queue: &Channel) -> Vec<String> {
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let mut seen = Vec::new();
    loop {
        let batch = subscription.receive(64, Duration::from_secs(1)).await.expect("receives");
        if batch.is_empty() {
            return seen;
        }
        for delivery in batch {
            seen.push(String::from_utf8_lossy(delivery.message().payload()).into_owned());
            delivery.ack().await.expect("acked");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn i8_messages_are_dropped_doubled_reordered_and_late_as_asked() {
    let faults = Faults::new(7);
    let bus = bus("i8", &faults).await.expect("connects");
    let queue = bus.queue("orders");
    let plain: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    send(&queue, 100).await;
    assert_eq!(
        (bodies(&queue).await, faults.counts()),
        (plain.clone(), FaultCounts::default()),
        "nothing before asked"
    );

    faults.drop(0.3);
    send(&queue, 100).await;
    let dropped = faults.counts().dropped;
    assert!((10..60).contains(&dropped), "about 30 of 100: {dropped}");
    assert_eq!(bodies(&queue).await.len() as u64, 100 - dropped, "they were said to be accepted, and are lost");

    faults.heal();
    faults.duplicate(0.5);
    send(&queue, 100).await;
    let seen = bodies(&queue).await;
    let mut once = seen.clone();
    once.dedup();
    assert_eq!((once, seen.len() as u64), (plain.clone(), 100 + faults.counts().duplicated));
    assert!(faults.counts().duplicated > 20);

    faults.heal();
    faults.reorder(0.5);
    send(&queue, 100).await;
    let seen = bodies(&queue).await;
    let mut sorted = seen.clone();
    sorted.sort_by_key(|body| body.parse::<u32>().expect("a number"));
    assert_eq!(sorted, plain, "none is lost or doubled");
    assert_ne!(seen, plain);
    assert!(faults.counts().reordered > 10);

    faults.heal();
    faults.delay(Duration::from_secs(5));
    let started = Instant::now();
    queue.send(&"late").await.expect("sent");
    assert!((5..6).contains(&started.elapsed().as_secs()), "{:?}", started.elapsed());
    assert_eq!(faults.counts().delayed, 1);
}

#[tokio::test(start_paused = true)]
async fn i8_a_cut_line_refuses_holds_back_and_loses_nothing() {
    let faults = Faults::new(1);
    let bus = bus("i8-cut", &faults).await.expect("connects");
    let queue = bus.queue("orders");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    send(&queue, 1).await;
    faults.cut();
    let error = queue.send(&"refused").await.expect_err("the line is cut");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Disconnected, Retry::Now), "{error}");
    assert_eq!(self::bus("i8-cut", &faults).await.map(drop).expect_err("cut").kind(), ErrorKind::Disconnected);
    assert!(subscription.receive(1, Duration::from_secs(60)).await.expect("waits").is_empty());
    assert_eq!(faults.counts().cut, 2);
    faults.mend();
    let delivery = subscription.next().await.expect("it was kept");
    assert_eq!(delivery.message().payload(), "0");
    delivery.ack().await.expect("acked");
    queue.send(&"again").await.expect("mended");
}

/// The same seed makes the same choices.
#[tokio::test(start_paused = true)]
async fn i8_a_run_can_be_repeated() {
    let mut runs = Vec::new();
    for space in ["i8-one", "i8-two"] {
        let faults = Faults::new(42);
        let queue = bus(space, &faults).await.expect("connects").queue("orders");
        faults.drop(0.2);
        faults.duplicate(0.2);
        send(&queue, 200).await;
        runs.push(bodies(&queue).await);
    }
    assert_eq!(runs[0], runs[1]);
}
