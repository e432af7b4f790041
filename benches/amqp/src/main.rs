//! Publishing to and consuming from a real RabbitMQ. Queues are durable, messages persistent; a publish counts when it
//! is confirmed, a message when it was handled, and it is acknowledged after that. What cannot do that says so.

mod omniqueue;
mod polymq;
mod raw;
mod ruststream;

use std::{
    hint::black_box,
    sync::OnceLock,
    time::{Duration, Instant},
};

use harness::{Latch, Numbers, Options, cpu_time};

/// Unconfirmed publishes of a task; messages fetched ahead for a worker.
pub const WINDOW: usize = 128;

/// Queues of the polymq paths, which it declares itself, and of all others.
pub const POLYMQ_QUEUE: &str = "bench.polymq";
pub const QUEUE: &str = "bench.plain";

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

pub fn workers(options: &Options) -> u64 {
    options.get("workers", 1)
}

/// Runs `task` once a worker, each with its share of the messages, and waits for all of them.
pub async fn spread<F>(options: &Options, task: impl Fn(u64) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let share = options.messages() / workers(options);
    let tasks: Vec<_> = (0..workers(options)).map(|_| tokio::spawn(task(share))).collect();
    for task in tasks {
        task.await.expect("no panic");
    }
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
        "raw-publish-ids" => raw::publish_with_ids,
        "raw-consume" => raw::consume,
        "raw-consume-cumulative" => raw::consume_cumulative,
        "polymq-publish" => polymq::publish,
        "polymq-consume" => polymq::consume,
        "polymq-resident" => polymq::resident,
        "polymq-idle" => polymq::idle,
        "ruststream-publish" => ruststream::publish,
        "ruststream-consume" => ruststream::consume,
        "omniqueue-publish" => omniqueue::publish,
        "omniqueue-consume" => omniqueue::consume,
    ]);
}
