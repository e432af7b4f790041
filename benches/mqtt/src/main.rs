//! Publishing to and consuming from a real Mosquitto with MQTT 5 and QoS 1. On every path a shared subscription with a
//! persistent session holds the messages, and a message is acknowledged after it was handled.

mod plan;
mod polymq;
mod raw;

/// A name of this process's own, so that nothing of an earlier run is in it.
pub fn queue() -> String {
    format!("bench/{}", std::process::id())
}

fn main() {
    harness::main(
        plan::plan,
        harness::scenarios![
            "raw-publish" => raw::publish,
            "raw-consume" => raw::consume,
            "polymq-publish" => polymq::publish,
            "polymq-consume" => polymq::consume,
            "polymq-resident" => polymq::resident,
            "polymq-idle" => polymq::idle,
        ],
    );
}
