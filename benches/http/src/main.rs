//! Requests from senders to handlers over HTTP/1.1 with kept connections, in one process. On every path an answer of 2xx
//! comes after the message was handled, and [`WINDOW`](harness::broker::WINDOW) requests are on their way at a time.

mod latency;
mod mq_bridge;
mod plan;
mod polymq;
mod raw;

fn main() {
    harness::main(
        plan::plan,
        harness::scenarios![
            "raw-send" => raw::send,
            "raw-send-ids" => raw::send_with_ids,
            "raw-send-stream" => raw::send_stream,
            "polymq-send" => polymq::send,
            "mq-bridge-send" => mq_bridge::send,
            "raw-serve" => raw::serve,
            "polymq-serve" => polymq::serve,
            "mq-bridge-serve" => mq_bridge::serve,
            "polymq-both" => polymq::both,
            "mq-bridge-both" => mq_bridge::both,
            "raw-latency" => latency::raw,
            "polymq-latency" => latency::polymq,
            "mq-bridge-latency" => latency::mq_bridge,
            "polymq-idle" => polymq::idle,
        ],
    );
}
