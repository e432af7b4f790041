//! The attributes change what happens: each option reaches the route that a user would have written by hand.
#![cfg(feature = "macros")]

use std::{
    sync::{
        LazyLock, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq::{dead_letter, prelude::*};
use tokio::sync::mpsc;

type Calls = (mpsc::UnboundedSender<String>, Mutex<mpsc::UnboundedReceiver<String>>);

static CALLS: LazyLock<Calls> = LazyLock::new(|| {
    let (sender, receiver) = mpsc::unbounded_channel();
    (sender, Mutex::new(receiver))
});

fn called(what: impl Into<String>) {
    CALLS.0.send(what.into()).unwrap();
}

#[derive(Debug, Message, Serialize, Deserialize)]
#[message(kind = "order.created", version = 1)]
struct OrderV1 {
    id: u64,
}

#[derive(Debug, Message, Serialize, Deserialize)]
#[message(kind = "order.created", version = 2)]
struct OrderV2 {
    id: u64,
}

#[derive(Debug, Message, Serialize, Deserialize)]
#[message(kind = "order.created", version = 3)]
struct OrderV3 {
    id: u64,
}

#[consumer("typed")]
async fn first_version(order: OrderV1) {
    called(format!("v1 {}", order.id));
}

#[consumer("typed")]
async fn second_version(order: OrderV2) {
    called(format!("v2 {}", order.id));
}

#[consumer("typed.dlq")]
async fn unwanted(message: Message) {
    called(format!("dead {}", message.system_headers().get(dead_letter::REASON).unwrap_or_default()));
}

#[consumer("by.kind", kind = "by.hand", version = 7)]
async fn by_kind(_body: Body) {
    called("kind by hand");
}

#[consumer("topic", group = "audit")]
async fn grouped(text: String) {
    called(format!("audit {text}"));
}

#[consumer("topic", broadcast)]
async fn alone(text: String) {
    called(format!("broadcast {text}"));
}

#[consumer("batches", batch = 10)]
async fn batched(numbers: Batch<u64>) {
    called(format!("batch {}", numbers.iter().sum::<u64>()));
}

#[consumer("blocking", blocking)]
fn blocks(text: String) -> std::io::Result<()> {
    std::thread::sleep(Duration::from_millis(10));
    called(format!("blocking {text}"));
    Ok(())
}

#[consumer("once", attempts = 1, dead_letters = "once.failed")]
async fn fails(_text: String) -> Result<()> {
    called("failing");
    Err(Failure::new("it never works"))
}

#[consumer("once.failed")]
async fn failed(context: Context) {
    called(format!("failed: {}", context.message().system_headers().get(dead_letter::LAST_ERROR).unwrap_or_default()));
}

#[consumer("slow", timeout = "20ms", attempts = 1)]
async fn slow(_text: String) {
    tokio::time::sleep(Duration::from_secs(60)).await;
    called("never");
}

#[consumer("slow.dlq")]
async fn too_slow(message: Message) {
    called(format!("slow {}", message.system_headers().get(dead_letter::ATTEMPTS).unwrap_or_default()));
}

static RUNNING: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

#[consumer("parallel", concurrency = 3)]
async fn parallel(_number: u64) {
    let running = RUNNING.fetch_add(1, Ordering::SeqCst) + 1;
    MOST.fetch_max(running, Ordering::SeqCst);
    tokio::time::sleep(Duration::from_millis(20)).await;
    RUNNING.fetch_sub(1, Ordering::SeqCst);
    called("parallel");
}

/// One service with every consumer of this file, as `#[polymq::main]` runs them.
#[tokio::test]
async fn every_option_reaches_its_route() {
    let bus = Bus::connect("memory://attributes").await.unwrap();
    let running = ConsumerRunner::new(ConsumerFactory::linked(&bus)).start().await.unwrap();

    bus.queue("typed").send(&OrderV1 { id: 1 }).await.unwrap();
    expect(["v1 1"]).await;
    bus.queue("typed").send(&OrderV2 { id: 2 }).await.unwrap();
    expect(["v2 2"]).await;
    bus.queue("typed").send(&OrderV3 { id: 3 }).await.unwrap();
    expect(["dead no handler for the kind order.created version 3"]).await;

    bus.queue("by.kind").send_message(polymq::Message::new("x").with_kind("by.hand").with_version(7)).await.unwrap();
    expect(["kind by hand"]).await;

    bus.topic("topic").send(&"hello").await.unwrap();
    expect(["audit hello", "broadcast hello"]).await;

    bus.queue("batches").send(&7u64).await.unwrap();
    expect(["batch 7"]).await;

    bus.queue("blocking").send(&"hello").await.unwrap();
    expect(["blocking hello"]).await;

    bus.queue("once").send(&"hello").await.unwrap();
    expect(["failing", "failed: it never works"]).await;

    bus.queue("slow").send(&"hello").await.unwrap();
    expect(["slow 1"]).await;

    let numbers = (0..9u64).map(|number| bus.queue("parallel").message(&number).unwrap());
    for result in bus.queue("parallel").send_all(numbers).await {
        result.unwrap();
    }
    expect(["parallel"; 9]).await;
    assert_eq!(MOST.load(Ordering::SeqCst), 3);

    running.stop().await.unwrap();
}

async fn expect<const N: usize>(expected: [&str; N]) {
    let mut seen = Vec::new();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
    while seen.len() < N {
        let call = CALLS.1.lock().unwrap().try_recv();
        match call {
            Ok(call) => seen.push(call),
            Err(_) if tokio::time::Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(2)).await,
            Err(_) => break,
        }
    }
    seen.sort();
    let mut expected: Vec<_> = expected.to_vec();
    expected.sort();
    assert_eq!(seen, expected);
}
