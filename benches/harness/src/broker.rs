//! What programs share that measure a broker: payloads, workers, and the clock of a consumer.

use std::{
    future::Future,
    hint::black_box,
    sync::OnceLock,
    time::{Duration, Instant},
};

use crate::{Latch, Numbers, Options, block_on, cpu_time, two_threads};

/// Unconfirmed publishes of a task; messages fetched ahead for a worker.
pub const WINDOW: usize = 128;

/// Counts the messages of a consumer.
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

/// A body of `size=` bytes.
pub fn payload(options: &Options) -> Vec<u8> {
    vec![1; options.get("size", 256)]
}

/// How many tasks send, or handlers run: `workers=`.
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

/// Runs a measurement as `#[tokio::main]` would on two cores.
pub fn on_two_threads<F>(measure: impl FnOnce(Options) -> F, options: &Options) -> Numbers
where
    F: Future<Output = Numbers> + Send + 'static,
{
    LATCH.expect(options.messages());
    block_on(two_threads(), measure(options.clone()))
}

/// Scenarios for [`main`](crate::main), made of `async fn(Options) -> Numbers`.
#[macro_export]
macro_rules! scenarios {
    ($($name:literal => $path:path),* $(,)?) => {
        &[$(($name, |options| $crate::broker::on_two_threads($path, options))),*]
    };
}
