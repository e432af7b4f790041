//! Wall-clock time that follows a paused test clock.

use std::time::{Duration, SystemTime};

/// The wall clock; under `tokio::time::pause` it moves with the paused clock, so that expiry and
/// delayed delivery are tested in milliseconds.
#[must_use]
pub fn now() -> SystemTime {
    let std_now = std::time::Instant::now();
    let tokio_now = tokio::time::Instant::now().into_std();
    // In production both read the same clock and differ by nanoseconds. A paused test clock stands still while the
    // process works, or runs ahead when it is advanced.
    match tokio_now.checked_duration_since(std_now) {
        Some(ahead) => SystemTime::now() + ahead,
        None => SystemTime::now() - std_now.duration_since(tokio_now),
    }
}

/// How long until `time`; zero when it has passed.
#[must_use]
pub fn until(time: SystemTime) -> Duration {
    time.duration_since(now()).unwrap_or_default()
}
