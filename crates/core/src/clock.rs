//! Wall-clock time that follows a paused test clock.

use std::{
    sync::atomic::{AtomicI64, Ordering},
    time::{Duration, SystemTime},
};

/// By how many seconds a test has set the clock of this process forward.
static SET_FORWARD: AtomicI64 = AtomicI64::new(0);

/// Sets the wall clock of this process forward, or back, as a time server or an operator would; the monotonic clock
/// goes on. For tests.
#[doc(hidden)]
pub fn set_clock_forward(seconds: i64) {
    SET_FORWARD.fetch_add(seconds, Ordering::SeqCst);
}

/// The wall clock; under `tokio::time::pause` it moves with the paused clock, so that expiry and
/// delayed delivery are tested in milliseconds.
#[must_use]
pub fn now() -> SystemTime {
    let std_now = std::time::Instant::now();
    let tokio_now = tokio::time::Instant::now().into_std();
    // In production both read the same clock and differ by nanoseconds. A paused test clock stands still while the
    // process works, or runs ahead when it is advanced.
    let wall = match tokio_now.checked_duration_since(std_now) {
        Some(ahead) => SystemTime::now() + ahead,
        None => SystemTime::now() - std_now.duration_since(tokio_now),
    };
    match SET_FORWARD.load(Ordering::Relaxed) {
        0 => wall,
        set @ 1.. => wall + Duration::from_secs(set.unsigned_abs()),
        set => wall - Duration::from_secs(set.unsigned_abs()),
    }
}

/// How long until `time`; zero when it has passed.
#[must_use]
pub fn until(time: SystemTime) -> Duration {
    time.duration_since(now()).unwrap_or_default()
}
