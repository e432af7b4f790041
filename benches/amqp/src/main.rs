//! Publishing to and consuming from a real RabbitMQ. Queues are durable, messages persistent; a publish counts when it
//! is confirmed, a message when it was handled, and it is acknowledged after that. What cannot do that says so.

mod omniqueue;
mod plan;
mod polymq;
mod raw;
mod ruststream;

/// Queues of the polymq paths, which it declares itself, and of all others.
pub const POLYMQ_QUEUE: &str = "bench.polymq";
pub const QUEUE: &str = "bench.plain";

fn main() {
    harness::main(
        plan::plan,
        harness::scenarios![
            "raw-publish" => raw::publish,
            "raw-publish-ids" => raw::publish_with_ids,
            "raw-consume" => raw::consume,
            "raw-consume-cumulative" => raw::consume_cumulative,
            "raw-consume-unacknowledged" => raw::consume_unacknowledged,
            "polymq-publish" => polymq::publish,
            "polymq-consume" => polymq::consume,
            "polymq-resident" => polymq::resident,
            "polymq-idle" => polymq::idle,
            "ruststream-publish" => ruststream::publish,
            "ruststream-consume" => ruststream::consume,
            "omniqueue-publish" => omniqueue::publish,
            "omniqueue-consume" => omniqueue::consume,
        ],
    );
}
