//! Publishing to and consuming from a real Mosquitto with MQTT 5 and QoS 1. On every path a shared subscription with a
//! persistent session holds the messages, and a message is acknowledged after it was handled.

mod polymq;
mod raw;

use std::{
    hint::black_box,
    sync::OnceLock,
    time::{Duration, Instant},
};

use harness::{Latch, Numbers, Options, cpu_time};

/// Unanswered publishes; messages fetched ahead.
pub const WINDOW: usize = 128;

pub static LATCH: Latch = Latch::new();
static FIRST: OnceLock<(Instant, Duration)> = OnceLock::new();

/// What every handler does. The first one starts the clock, so that connecting is in nobody's number.
pub fn handled(body: &[u8]) {
    FIRST.get_or_init(|| (Instant::now(), cpu_time()));
    black_box(body.first());
    LATCH.arrived();
}

/// Waits until all are handled and tells how fast.
pub async fn all_handled(messages: u64) -> Numbers {
    LATCH.wait().await;
    let (wall, cpu) = FIRST.get().expect("something was handled");
    let (wall, cpu) = (wall.elapsed(), cpu_time() - *cpu);
    vec![
        ("per_second", (messages - 1) as f64 / wall.as_secs_f64()),
        ("cpu_ns", cpu.as_nanos() as f64 / messages as f64),
    ]
}

pub fn payload(options: &Options) -> Vec<u8> {
    vec![1; options.get("size", 256)]
}

/// A name of this process's own, so that nothing of an earlier run is in it.
pub fn queue() -> String {
    format!("bench/{}", std::process::id())
}

fn on_two_threads<F>(measure: impl FnOnce(Options) -> F, options: &Options) -> Numbers
where
    F: Future<Output = Numbers> + Send + 'static,
{
    LATCH.expect(options.messages());
    harness::block_on(harness::two_threads(), measure(options.clone()))
}

macro_rules! scenarios {
    ($($name:literal => $path:path),* $(,)?) => {
        &[$(($name, |options| on_two_threads($path, options))),*]
    };
}

fn main() {
    harness::main(scenarios![
        "raw-publish" => raw::publish,
        "raw-consume" => raw::consume,
        "polymq-publish" => polymq::publish,
        "polymq-consume" => polymq::consume,
        "polymq-resident" => polymq::resident,
        "polymq-idle" => polymq::idle,
    ]);
}
