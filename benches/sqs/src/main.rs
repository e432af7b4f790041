//! Sending to and receiving from SQS, emulated by ElasticMQ in memory, the fastest of the local emulators. A send counts when
//! its answer is there; a message when it was handled, and it is deleted after that. What cannot do that says so.

mod latency;
mod mq_bridge;
mod omniqueue;
mod plan;
mod polymq;
mod raw;
mod ruststream;

use harness::Options;

/// Messages in one request, from SQS's own documents.
pub const BATCH: usize = 10;
/// Requests on their way at a time; polls of a consumer at a time.
pub const REQUESTS: usize = 8;

/// A name of this process's own, so that nothing of an earlier run is in it.
pub fn queue() -> String {
    format!("bench-{}", std::process::id())
}

/// Where the emulator is, for clients that are given an endpoint.
pub fn endpoint(options: &Options) -> String {
    let address = options.need("url").rsplit('@').next().expect("an address");
    format!("http://{address}")
}

/// A body of `size=` characters: SQS carries text.
pub fn text(options: &Options) -> String {
    "x".repeat(options.get("size", 256))
}

fn main() {
    harness::main(
        plan::plan,
        harness::scenarios![
            "raw-publish" => raw::publish,
            "raw-publish-ids" => raw::publish_with_ids,
            "raw-consume" => raw::consume,
            "raw-latency" => latency::raw,
            "polymq-publish" => polymq::publish,
            "polymq-consume" => polymq::consume,
            "polymq-latency" => latency::polymq,
            "polymq-resident" => polymq::resident,
            "polymq-idle" => polymq::idle,
            "ruststream-publish" => ruststream::publish,
            "ruststream-consume" => ruststream::consume,
            "omniqueue-publish" => omniqueue::publish,
            "omniqueue-consume" => omniqueue::consume,
            "mq-bridge-publish" => mq_bridge::publish,
            "mq-bridge-consume" => mq_bridge::consume,
        ],
    );
}
