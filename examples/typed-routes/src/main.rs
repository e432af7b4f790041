//! Several kinds and versions of messages on one queue, each with a function of its own. A kind that nobody handles
//! goes to the dead letters, where it is shown.

use polymq::{dead_letter, prelude::*};

#[derive(Debug, Message, Serialize, Deserialize)]
#[message(kind = "order.created", version = 1)]
struct OrderCreatedV1 {
    id: u64,
    total: f64,
}

#[derive(Debug, Message, Serialize, Deserialize)]
#[message(kind = "order.created", version = 2)]
struct OrderCreated {
    id: u64,
    cents: u64,
}

#[derive(Debug, Message, Serialize, Deserialize)] // its kind is "order.cancelled", in any version
struct OrderCancelled {
    id: u64,
}

#[derive(Debug, Message, Serialize)] // "order.shipped": nobody handles it
struct OrderShipped {
    id: u64,
}

#[consumer("order.events")]
async fn created_v1(order: OrderCreatedV1) {
    println!("created, version 1: order {} for {:.2}", order.id, order.total);
}

#[consumer("order.events")]
async fn created(order: OrderCreated) {
    println!("created, version 2: order {} for {} cents", order.id, order.cents);
}

#[consumer("order.events")]
async fn cancelled(order: OrderCancelled) {
    println!("cancelled: order {}", order.id);
}

#[consumer("order.events.dlq")]
async fn dead(message: Message) {
    let reason = message.system_headers().get(dead_letter::REASON).unwrap_or("unknown");
    println!("dead letter: {reason}");
}

#[polymq::main]
async fn main(bus: Bus) -> Result<()> {
    let events = bus.queue("order.events");
    events.send(&OrderCreatedV1 { id: 1, total: 9.5 }).await?;
    events.send(&OrderCreated { id: 2, cents: 2000 }).await?;
    events.send(&OrderCancelled { id: 1 }).await?;
    events.send(&OrderShipped { id: 2 }).await?;
    Ok(())
}
