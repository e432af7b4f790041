//! Wall-clock time that follows a paused test clock.

use std::time::{Duration, SystemTime};

/// The wall clock; under `tokio::time::pause` it moves with the paused clock, so that expiry and
/// delayed delivery are tested in milliseconds.
#[must_use]
pub fn now() -> SystemTime {
    let std_now = std::time::Instant::now();
    let tokio_now = tokio::time::Instant::now().into_std();
    // In production both read the same clock and differ by nanoseconds; only a paused or advanced
    // test clock runs ahead by more.
    match tokio_now.checked_duration_since(std_now) {
        Some(ahead) if ahead > Duration::from_millis(1) => SystemTime::now() + ahead,
        _ => SystemTime::now(),
    }
}

/// How long until `time`; zero when it has passed.
#[must_use]
pub fn until(time: SystemTime) -> Duration {
    time.duration_since(now()).unwrap_or_default()
}
