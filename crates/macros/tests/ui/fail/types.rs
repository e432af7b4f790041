use polymq::prelude::*;

struct Order;

#[consumer("orders")]
async fn not_deserializable(_order: Order) {}

#[consumer("orders")]
async fn wrong_result(_order: u64) -> u64 {
    1
}

#[consumer("orders", batch = 8)]
async fn not_a_batch(_order: u64) {}

const NAME: &str = "eight";

#[consumer("orders", concurrency = NAME)]
async fn wrong_constant() {}

fn main() {}
