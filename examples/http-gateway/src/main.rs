//! Orders come in over HTTP and go out to another backend. Whoever posts one is answered 204 when the other backend has
//! accepted it, and 503 with the time to come again when it has not: nothing is lost between the two.
//!
//! Without an argument the other side is a queue in this process. With a queue table, it is what that says:
//!
//! ```sh
//! cargo run -p http-gateway
//! cargo run -p http-gateway -- examples/http-gateway/gateway.toml                     # out to RabbitMQ
//! ```

use polymq::{Environment, QueueTable, prelude::*};

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
        Some(path) => by_table(&path).await,
        None => in_this_process().await,
    }
}

async fn by_table(path: &str) -> Result<()> {
    let table = HandlerFactory::from_config(path)?;
    println!("taking orders over HTTP");
    table.queue("orders")?.bridge().await?.run().await?;
    Ok(table.close().await?)
}

const HERE: &str = r#"
    [queues.orders]
    consumer = "http"
    producer = "memory"
    [backends.http]
    url = "http://127.0.0.1:18417"
    [backends.memory]
    url = "memory://other-side"
"#;

async fn in_this_process() -> Result<()> {
    let other_side = Bus::connect("memory://other-side").await?;
    let mut consumers = ConsumerFactory::new(&other_side);
    consumers.route("orders", arrived);
    let target = ConsumerRunner::new(consumers).start().await?;

    let table = HandlerFactory::new(QueueTable::from_toml(HERE)?, Registry::linked(), Environment::default())?;
    let gateway = table.queue("orders")?.bridge().await?.start().await?;

    // What any HTTP client does: POST http://127.0.0.1:18417/orders with a JSON body.
    let client = Bus::connect("http://127.0.0.1:18417").await?;
    for id in 1..=3 {
        client.queue("orders").send(&Order { id }).await?;
        println!("order {id} was answered with success");
    }
    gateway.until_signal().await?;
    target.stop().await?;
    Ok(table.close().await?)
}
