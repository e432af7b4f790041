//! One producer, one consumer, in one process. Every path sends the same payload, counts each handled message down on
//! the same latch, and acknowledges after handling where it can acknowledge at all.

mod latency;
mod mpsc;
mod mq_bridge;
mod omniqueue;
mod plan;
mod polymq;
mod resident;
mod ruststream;

use std::hint::black_box;

use harness::{Latch, Numbers, Options};
use serde::{Deserialize, Serialize};

/// What a queue holds before senders wait, where it can be bounded.
pub const CAPACITY: usize = 1024;
/// How many messages a batch has; how often a producer of an unbounded queue lets others run.
pub const BATCH: usize = 128;

pub static LATCH: Latch = Latch::new();

/// The JSON message: numbers only, so that decoding allocates nothing and what is measured is the framework. It is
/// what RustStream's own benchmarks decode.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ::ruststream::Outgoing)]
#[outgoing(name = "orders")]
pub struct Order {
    pub id: u64,
    pub quantity: u32,
}

pub const ORDER: Order = Order { id: 1_000_000, quantity: 37 };

/// A payload of `size` bytes in an allocation of its own.
pub fn payload(size: usize) -> Vec<u8> {
    vec![1; size]
}

pub fn size(options: &Options) -> usize {
    options.get("size", 256)
}

/// What a handler of raw bytes does.
pub fn handled(bytes: &[u8]) {
    black_box(bytes.first());
    LATCH.arrived();
}

/// What a handler of an order does.
pub fn handled_order(order: &Order) {
    black_box((order.id, order.quantity));
    LATCH.arrived();
}

fn on_one_thread<F>(measure: impl FnOnce(Options) -> F, options: &Options) -> Numbers
where
    F: Future<Output = Numbers> + Send + 'static,
{
    LATCH.expect(options.messages());
    harness::block_on(harness::one_thread(), measure(options.clone()))
}

macro_rules! scenarios {
    ($($name:literal => $path:path),* $(,)?) => {
        &[$(($name, |options| on_one_thread($path, options))),*]
    };
}

fn main() {
    harness::main(
        plan::plan,
        scenarios![
            "mpsc" => mpsc::single,
            "mpsc-many" => mpsc::many,
            "mpsc-vectors" => mpsc::vectors,
            "mpsc-json" => mpsc::json,
            "mpsc-latency" => latency::mpsc,
            "polymq" => polymq::single,
            "polymq-bytes" => polymq::single_bytes,
            "polymq-batch" => polymq::batch,
            "polymq-batch-bytes" => polymq::batch_bytes,
            "polymq-dyn" => polymq::by_hand,
            "polymq-json" => polymq::json,
            "polymq-json-batch" => polymq::json_batch,
            "polymq-latency" => latency::polymq,
            "polymq-resident" => resident::polymq,
            "ruststream" => ruststream::single,
            "ruststream-batch" => ruststream::batch,
            "ruststream-traits" => ruststream::by_hand,
            "ruststream-json" => ruststream::json,
            "ruststream-json-batch" => ruststream::json_batch,
            "ruststream-latency" => latency::ruststream,
            "omniqueue-dyn" => omniqueue::by_hand,
            "mq-bridge-batch" => mq_bridge::batch,
            "mq-bridge-batch-nack" => mq_bridge::batch_nack,
        ],
    );
}
