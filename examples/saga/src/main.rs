//! A saga: order, payment and shipping, three services that share nothing but queues. The correlation id that an order
//! begins with is on every message of its saga, so what the three of them print can be put together again.
//!
//! What a service sends leaves with its acknowledgement ([`Sends`]): a crash between the two repeats a step and loses none.

use polymq::{Address, Sends, prelude::*};

const ORDERS: &str = "saga.orders";
const PAYMENTS: &str = "saga.payments";
const SHIPMENTS: &str = "saga.shipments";

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    id: u64,
    cents: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Payment {
    order: u64,
    cents: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Shipment {
    order: u64,
}

#[consumer("saga.orders")]
async fn order(order: Order, context: Context) -> Result<Sends> {
    println!("{}: order {} is taken", saga(&context)?, order.id);
    next(&context, PAYMENTS, &Payment { order: order.id, cents: order.cents })
}

#[consumer("saga.payments")]
async fn payment(payment: Payment, context: Context) -> Result<Sends> {
    println!("{}: order {} is paid, {} cents", saga(&context)?, payment.order, payment.cents);
    next(&context, SHIPMENTS, &Shipment { order: payment.order })
}

#[consumer("saga.shipments")]
async fn shipping(shipment: Shipment, context: Context) -> Result<()> {
    println!("{}: order {} is on its way", saga(&context)?, shipment.order);
    Ok(())
}

/// The saga that a message belongs to; one of none is a dead letter.
fn saga(context: &Context) -> Result<&str> {
    context.message().correlation_id().ok_or_else(|| Failure::permanent("a message without a correlation id"))
}

/// The next step of the same saga.
fn next<T: Serialize + 'static>(context: &Context, queue: &'static str, step: &T) -> Result<Sends> {
    let message = context.bus().queue(queue).message(step)?.with_correlation_id(saga(context)?.to_owned());
    Ok(Sends::new().message(Address::queue(queue), message))
}

#[polymq::main]
async fn main(bus: Bus) -> Result<()> {
    let orders = bus.queue(ORDERS);
    for (id, cents) in [(1, 950), (2, 2000), (3, 99)] {
        let message = orders.message(&Order { id, cents })?.with_correlation_id(format!("saga-{id}"));
        orders.send_message(message).await?;
    }
    Ok(())
}
