//! Waiting for something to become true, without sleeping for a guessed time.

use std::{fmt, future::Future, time::Duration};

use tokio::time::{Instant, sleep};

/// Asks `probe` again and again until it answers `Ok`, and gives that answer.
///
/// ```
/// # #[tokio::main(flavor = "current_thread", start_paused = true)] async fn main() {
/// use std::time::Duration;
/// use polymq_testkit::eventually;
///
/// let mut calls = 0;
/// let seen = eventually(Duration::from_secs(1), || {
///     calls += 1;
///     let calls = calls;
///     async move { if calls == 3 { Ok("the third call") } else { Err(format!("{calls} calls so far")) } }
/// })
/// .await;
/// assert_eq!(seen, "the third call");
/// # }
/// ```
///
/// # Panics
/// When the deadline has passed, with the last `Err`.
#[track_caller]
pub fn eventually<T, E, F>(within: Duration, probe: impl FnMut() -> F) -> impl Future<Output = T>
where
    E: fmt::Display,
    F: Future<Output = Result<T, E>>,
{
    let caller = std::panic::Location::caller();
    async move {
        match try_eventually(within, probe).await {
            Ok(value) => value,
            Err(last) => panic!("not within {within:?} (probe at {caller}); last state: {last}"),
        }
    }
}

/// As [`eventually`], with the last state as the error.
///
/// # Errors
/// The last `Err` of the probe, when the deadline has passed.
pub async fn try_eventually<T, E, F>(within: Duration, mut probe: impl FnMut() -> F) -> Result<T, E>
where
    F: Future<Output = Result<T, E>>,
{
    let deadline = Instant::now() + within;
    let mut pause = Duration::from_millis(1);
    // Under a paused clock hours pass in a moment; asking every 50 ms of them would not.
    let longest = (within / 1000).max(Duration::from_millis(50));
    loop {
        match probe().await {
            Ok(value) => return Ok(value),
            Err(last) if Instant::now() >= deadline => return Err(last),
            Err(_) => sleep(pause).await,
        }
        pause = (pause * 2).min(longest);
    }
}
