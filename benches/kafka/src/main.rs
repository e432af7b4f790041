//! Publishing to and consuming from a real Apache Kafka. A publish counts when its delivery report is there, of an
//! idempotent producer with `acks=all`; a message when it was handled, and its offset is committed after that.

mod latency;
mod mq_bridge;
mod plan;
mod polymq;
mod raw;
mod ruststream;
mod sea_streamer;

use harness::Options;

/// Partitions of each topic.
pub const PARTITIONS: i32 = 4;
/// Messages without a delivery report.
pub const WINDOW: usize = 1024;

/// A name of this process's own, so that nothing of an earlier run is in it.
pub fn topic() -> String {
    format!("bench-{}", std::process::id())
}

/// The topic that consumers read: filled once, and read by each run from the start.
pub fn filled(options: &Options) -> String {
    format!("bench-{}-{}", options.get("size", 256), options.messages())
}

fn main() {
    harness::main(
        plan::plan,
        harness::scenarios![
            "raw-publish" => raw::publish,
            "raw-publish-ids" => raw::publish_with_ids,
            "raw-publish-future" => raw::publish_with_futures,
            "raw-consume" => raw::consume,
            "raw-consume-defaults" => raw::consume_with_defaults,
            "raw-consume-headers" => raw::consume_with_headers,
            "raw-consume-copies" => raw::consume_with_copies,
            "raw-consume-stream" => raw::consume_stream,
            "raw-latency" => latency::raw,
            "polymq-publish" => polymq::publish,
            "polymq-consume" => polymq::consume,
            "polymq-latency" => latency::polymq,
            "polymq-resident" => polymq::resident,
            "polymq-idle" => polymq::idle,
            "ruststream-publish" => ruststream::publish,
            "ruststream-consume" => ruststream::consume,
            "sea-streamer-publish" => sea_streamer::publish,
            "sea-streamer-consume" => sea_streamer::consume,
            "mq-bridge-publish" => mq_bridge::publish,
            "mq-bridge-consume" => mq_bridge::consume,
        ],
    );
}
