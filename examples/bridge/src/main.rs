//! Moves every message of the queue `orders` from one backend to another; a message is acknowledged at its source
//! only when the target has accepted it.
//!
//! Without an argument, both sides are in this process. With a queue table, they are what it says:
//!
//! ```sh
//! cargo run -p bridge                                  # memory://left to memory://right
//! cargo run -p bridge -- examples/bridge/bridge.toml   # RabbitMQ to Mosquitto
//! ```

use polymq::{HandlerPair, prelude::*};

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
}

async fn arrived(order: Order) {
    println!("order {} reached the other side", order.id);
}

#[tokio::main]
async fn main() -> Result<()> {
    match std::env::args().nth(1) {
        Some(table) => bridge_by_table(&table).await,
        None => bridge_in_this_process().await,
    }
}

async fn bridge_by_table(path: &str) -> Result<()> {
    let table = HandlerFactory::from_config(path)?;
    let pair = table.queue("orders")?;
    println!("bridging the queue {}", pair.name());
    pair.bridge().await?.run().await?;
    Ok(table.close().await?)
}

async fn bridge_in_this_process() -> Result<()> {
    let (left, right) = (Bus::connect("memory://left").await?, Bus::connect("memory://right").await?);
    let pair = HandlerPair::new("orders", &left, &right);
    println!("bridging the queue {}", pair.name());

    let mut consumers = ConsumerFactory::new(&right);
    consumers.route("orders", arrived);
    let target = ConsumerRunner::new(consumers).start().await?;
    let bridge = pair.bridge().await?.start().await?;
    for id in 1..=3 {
        left.queue("orders").send(&Order { id }).await?;
    }
    bridge.until_signal().await?;
    Ok(target.stop().await?)
}
