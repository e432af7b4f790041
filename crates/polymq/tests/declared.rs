//! Types that name their channels: made and consumed all at once.
#![cfg(feature = "macros")]
#![allow(missing_docs)]

use std::time::Duration;

use polymq::{Address, Environment, StepState, Topology, prelude::*};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

#[derive(Debug, Message, Serialize, Deserialize)]
#[message(topic = "declared.created")]
struct OrderCreated {
    id: u64,
}

#[derive(Debug, Message, Serialize, Deserialize)]
#[message(topic = "declared.created")]
struct OrderChanged {
    id: u64,
}

#[derive(Debug, Message, Serialize, Deserialize)]
#[message(kind = "job", version = 2, queue = "declared.jobs")]
struct Job {
    id: u64,
}

/// Names no channel.
#[derive(Debug, Message, Serialize, Deserialize)]
struct Loose {
    id: u64,
}

async fn bus(space: &str) -> Bus {
    let builder = Bus::builder().environment(Environment::default()).url(format!("memory://{space}"));
    builder.connect().await.unwrap()
}

/// One call makes the channels of every declared type; the second makes none.
#[tokio::test]
async fn h8_the_channels_of_declared_types_are_made_once() {
    let bus = bus("declared-made").await;
    let plan = Topology::linked().plan(&bus).await.unwrap();
    let missing = ["queue declared.jobs", "queue declared.jobs.dlq", "topic declared.created"];
    assert_eq!(plan.to_string(), missing.map(|missing| format!("missing: {missing}\n")).concat());
    assert_eq!(Topology::linked().apply(&bus).await.unwrap(), plan);
    let again = Topology::linked().apply(&bus).await.unwrap();
    assert!(again.steps.iter().all(|step| step.state == StepState::Present), "{again}");
    assert!(bus.channel(Address::topic("declared.created")).exists(None).await.unwrap());
}

/// One call consumes every declared type.
#[tokio::test]
async fn c24_one_call_receives_a_message_of_each_declared_type() {
    async fn note(message: polymq::Message, seen: State<UnboundedSender<String>>) -> Result<()> {
        Ok(seen.send(message.kind().unwrap_or("none").to_owned())?)
    }
    let bus = bus("declared-consumed").await;
    let (sender, mut seen) = unbounded_channel::<String>();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(sender).route_declared("audit", note).unwrap();
    assert_eq!(consumers.addresses().len(), 2, "each channel once");
    let running = ConsumerRunner::new(consumers).start().await.unwrap();
    bus.topic("declared.created").send(&OrderCreated { id: 1 }).await.unwrap();
    bus.topic("declared.created").send(&OrderChanged { id: 2 }).await.unwrap();
    bus.queue("declared.jobs").send(&Job { id: 3 }).await.unwrap();
    bus.queue("loose").send(&Loose { id: 4 }).await.unwrap();
    let mut kinds = Vec::new();
    for _ in 0..3 {
        kinds.push(tokio::time::timeout(Duration::from_secs(30), seen.recv()).await.unwrap().unwrap());
    }
    kinds.sort();
    assert_eq!(kinds, ["job", "order.changed", "order.created"]);
    running.stop().await.unwrap();
    assert!(seen.try_recv().is_err(), "each once");
}
