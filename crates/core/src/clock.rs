//! Wall-clock time that follows a paused test clock.

use std::{
    sync::{
        LazyLock,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, SystemTime},
};

use tokio::time::Instant;

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
    // In this order: in production both read the same clock, and a thread that is stopped between the two must not see the
    // future, or what is delayed would come too early. A paused test clock stands still while the process works, or runs
    // ahead when it is advanced.
    let tokio_now = tokio::time::Instant::now().into_std();
    let std_now = std::time::Instant::now();
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

/// What the wall clock shows where it is read coarsely: it stands still for some milliseconds, and is read in a tenth of the time.
#[cfg(target_os = "linux")]
pub(crate) type Tick = nix::sys::time::TimeSpec;
/// Only Linux has such a clock.
#[cfg(not(target_os = "linux"))]
pub(crate) type Tick = ();

/// The present tick, where there is such a clock.
#[inline]
pub(crate) fn tick() -> Option<Tick> {
    #[cfg(target_os = "linux")]
    return nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME_COARSE).ok();
    #[cfg(not(target_os = "linux"))]
    None
}

/// What "for ever" comes to: much more can be added to the present neither by every clock nor by every broker.
pub(crate) const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// How long until `time`; zero when it has passed, and 30 years for all that is further away.
#[must_use]
pub fn until(time: SystemTime) -> Duration {
    time.duration_since(now()).unwrap_or_default().min(FAR)
}

/// The wall clock in so long; in 30 years for all that is longer.
pub(crate) fn wall_in(wait: Duration) -> SystemTime {
    now() + wait.min(FAR)
}

/// The same by the monotonic clock.
pub(crate) fn instant_in(wait: Duration) -> Instant {
    Instant::now() + wait.min(FAR)
}

/// A mark of this process, and from when on its monotonic clock counts.
static PROCESS: LazyLock<(u64, Instant)> = LazyLock::new(|| (fastrand::u64(..), Instant::now()));

/// When a message is due that waits beside its queue, as text for [`time_left`] to read, in this process or another.
///
/// The wall clock alone would not do: it may be set while the message waits. The process that has written this goes by
/// its monotonic clock; another one by the wall clock, but waits no longer than was asked for.
#[must_use]
pub fn due_in(wait: Duration) -> String {
    let (process, start) = &*PROCESS;
    let due = (now() + wait).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    // Rounded up: never too early.
    let millis = |time: Duration| time.as_nanos().div_ceil(1_000_000);
    format!("{};{};{process};{}", millis(due), millis(wait), millis(start.elapsed() + wait))
}

/// How long a message has to wait still, from what [`due_in`] wrote; `None` for any other text.
#[must_use]
pub fn time_left(due: &str) -> Option<Duration> {
    let mut numbers = due.split(';').map(|number| number.parse::<u64>().ok());
    let (due, wait, writer, here) = (numbers.next()??, numbers.next()??, numbers.next()??, numbers.next()??);
    let (process, start) = &*PROCESS;
    if writer == *process {
        return Some(Duration::from_millis(here).saturating_sub(start.elapsed()));
    }
    let due = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(due))?;
    Some(until(due).min(Duration::from_millis(wait)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_goes_on_in_this_process_and_in_another() {
        let wait = Duration::from_secs(60);
        let text = due_in(wait);
        let is_a_minute = |left: Option<Duration>| {
            left.is_some_and(|left| left <= wait + Duration::from_millis(1) && left > wait / 2)
        };
        assert!(is_a_minute(time_left(&text)), "{text}");
        let of_another = |due: u64| {
            let mut parts: Vec<String> = text.split(';').map(str::to_owned).collect();
            (parts[0], parts[2]) = (due.to_string(), "1".into());
            time_left(&parts.join(";"))
        };
        let due: u64 = text.split(';').next().and_then(|due| due.parse().ok()).expect("a number");
        assert!(is_a_minute(of_another(due)));
        assert!(is_a_minute(of_another(due + 7_200_000)), "a clock that was set back");
        assert_eq!(of_another(due - 61_000), Some(Duration::ZERO));
        for text in ["", "1;2;3", "1;2;3;x", "2023-11-14T22:13:20Z"] {
            assert_eq!(time_left(text), None, "{text}");
        }
    }
}
