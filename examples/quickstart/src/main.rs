//! Sends three orders and handles them until Ctrl-C. `POLYMQ_BACKEND` or `POLYMQ_URL` choose the broker.

use polymq::prelude::*;

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
    total: f64,
}

#[consumer("orders")]
async fn bill(order: Order) -> Result<()> {
    println!("billed order {} for {:.2}", order.id, order.total);
    Ok(())
}

#[polymq::main]
async fn main(bus: Bus) -> Result<()> {
    for (id, total) in [(1, 9.5), (2, 20.0), (3, 0.99)] {
        bus.queue("orders").send(&Order { id, total }).await?;
    }
    Ok(())
}
