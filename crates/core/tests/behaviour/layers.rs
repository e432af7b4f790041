//! Layers around sending and handling.

use crate::common::{Log, Order, order};
use async_trait::async_trait;
use polymq_core::{
    Batch, Bus, ConsumeOptions, ConsumerFactory, ConsumerRunner, Environment, Layer, Message, NextHandle, NextSend,
    Outcome, Receipt, Result, State,
};

#[derive(Debug)]
struct Numbered(u8, Log);

#[async_trait]
impl Layer for Numbered {
    async fn send(&self, message: Message, next: NextSend<'_>) -> Result<Receipt> {
        self.1.add(format!("send {} before", self.0));
        let result = next.send(message).await;
        self.1.add(format!("send {} after", self.0));
        result
    }

    async fn handle(&self, message: Message, next: NextHandle<'_>) -> Outcome {
        self.1.add(format!("handle {} before", self.0));
        let outcome = next.handle(message).await;
        self.1.add(format!("handle {} after", self.0));
        outcome
    }
}

/// Stands for encryption: the body is not readable on the wire.
#[derive(Debug)]
struct Inverting;

fn invert(message: Message) -> Message {
    let body: Vec<u8> = message.payload().iter().map(|byte| !byte).collect();
    message.with_payload(body)
}

#[async_trait]
impl Layer for Inverting {
    async fn send(&self, message: Message, next: NextSend<'_>) -> Result<Receipt> {
        next.send(invert(message)).await
    }

    async fn handle(&self, message: Message, next: NextHandle<'_>) -> Outcome {
        next.handle(invert(message)).await
    }
}

#[tokio::test(start_paused = true)]
async fn d15_layers_nest_in_the_documented_order() {
    let log = Log::default();
    let builder = Bus::builder().url("memory://d15").environment(Environment::default());
    let builder =
        builder.layer(Numbered(1, log.clone())).layer(Numbered(2, log.clone())).layer(Numbered(3, log.clone()));
    let bus = builder.connect().await.expect("connects");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    let sent: Vec<String> = log.entries();
    let expected = ["send 1 before", "send 2 before", "send 3 before", "send 3 after", "send 2 after", "send 1 after"];
    assert_eq!(sent, expected);

    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("orders", async |order: Order, log: State<Log>| log.add(format!("handler {}", order.id)));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let all = log.wait(13).await;
    let expected = [
        "handle 3 before",
        "handle 2 before",
        "handle 1 before",
        "handler 1",
        "handle 1 after",
        "handle 2 after",
        "handle 3 after",
    ];
    assert_eq!(all[6..], expected);
    running.stop().await.expect("stops");
}

#[tokio::test(start_paused = true)]
async fn d16_no_message_passes_before_the_stack_is_complete() {
    let plain = crate::common::bus("d16").await;
    let builder = Bus::builder().url("memory://d16").environment(Environment::default());
    let bus = builder.layer(Inverting).connect().await.expect("connects");
    bus.queue("orders").send(&order(1)).await.expect("sent");
    let mut wire = plain.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    let delivery = wire.next().await.expect("received");
    assert_eq!(delivery.message().payload()[0], !b'{', "f26: on the wire it is never bare");
    delivery.retry(std::time::Duration::ZERO).await.expect("returned");
    wire.close().await.expect("closed");

    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route("orders", async |order: Order, log: State<Log>| log.add(order.id.to_string()));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    assert_eq!(log.wait(1).await, ["1"]);
    running.stop().await.expect("stops");
}

/// Handlers of batches, and several handlers of one message, get nothing that has not passed the layers; each message
/// passes them once.
#[tokio::test(start_paused = true)]
async fn d15_layers_are_around_batches_and_several_handlers() {
    let log = Log::default();
    let builder = Bus::builder().url("memory://d15-batch").environment(Environment::default());
    let bus = builder.layer(Inverting).layer(Numbered(1, log.clone())).connect().await.expect("connects");
    for id in 1..=3 {
        bus.queue("batch").send(&order(id)).await.expect("sent");
    }
    bus.queue("several").send(&order(4)).await.expect("sent");
    let sends = log.entries().len();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    let of_batch = log.clone();
    consumers.route_batch("batch", 10, move |batch: Batch<Order>| {
        batch.iter().for_each(|order| of_batch.add(format!("batch {}", order.id)));
        std::future::ready(())
    });
    let handler = async |order: Order, log: State<Log>| log.add(format!("first {}", order.id));
    consumers.route("several", handler).also("second", async |order: Order, log: State<Log>| {
        log.add(format!("second {}", order.id));
    });
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let all = log.wait(sends + 13).await;
    let count = |text: &str| all[sends..].iter().filter(|entry| entry.starts_with(text)).count();
    assert_eq!((count("handle 1 before"), count("handle 1 after")), (4, 4), "{all:?}");
    assert_eq!((count("batch"), count("first 4"), count("second 4")), (3, 1, 1), "{all:?}");
    running.stop().await.expect("stops");
}
