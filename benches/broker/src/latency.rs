//! The beat at which messages are sent, and how long each is under way.

use std::{
    sync::{LazyLock, Mutex},
    time::{Duration, Instant},
};

use bytes::Bytes;
use harness::{
    Numbers, Options,
    broker::{LATCH, workers},
    percentile,
};

static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);
static TAKEN: Mutex<Vec<f64>> = Mutex::new(Vec::new());

/// A body of `size=` bytes that begins with the time of sending.
pub fn stamp(options: &Options) -> Bytes {
    let mut body = harness::broker::payload(options);
    body[..8].copy_from_slice(&(ZERO.elapsed().as_nanos() as u64).to_be_bytes());
    body.into()
}

pub fn arrived(body: &[u8]) {
    let sent_at = u64::from_be_bytes(body[..8].try_into().expect("eight bytes"));
    TAKEN.lock().expect("no panic").push((ZERO.elapsed().as_nanos() as u64 - sent_at) as f64);
    LATCH.arrived();
}

/// The moments at which one of the senders sends: all of them together a message a millisecond.
pub fn beat(options: &Options, sender: u64) -> tokio::time::Interval {
    let period = Duration::from_millis(workers(options));
    let first = tokio::time::Instant::now() + Duration::from_millis(sender);
    let mut beat = tokio::time::interval_at(first, period);
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Burst);
    beat
}

/// Before the first is sent: receivers have had the time to wait for it.
pub async fn prepared() {
    LazyLock::force(&ZERO);
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Waits until all have arrived.
pub async fn taken() -> Numbers {
    LATCH.wait().await;
    let mut taken = std::mem::take(&mut *TAKEN.lock().expect("no panic"));
    taken.sort_by(f64::total_cmp);
    let at = |percent| percentile(&taken, percent) / 1e3;
    vec![("p50_us", at(50.0)), ("p99_us", at(99.0)), ("p999_us", at(99.9))]
}
