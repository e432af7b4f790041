//! The failure policy: one object that says what becomes of a message that was not handled.

use std::time::Duration;

use tokio::sync::Semaphore;

use crate::{Address, ChannelKind, Error, ErrorKind, Result};

/// Where the retries of a failed message happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RetryMode {
    /// The message goes back to the broker and comes again after the backoff; others go on meanwhile. The
    /// attempt number survives a restart where the backend declares a delivery count.
    #[default]
    Redeliver,
    /// The message is kept and its key (or, without ordering by key, its worker) waits: order holds. The broker's
    /// loan is extended where it lends. The attempt number starts again after a restart.
    InPlace,
}

/// How much of the backoff is random.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Jitter {
    /// Nothing.
    None,
    /// One half is fixed, the other half random.
    #[default]
    Equal,
    /// Everything from zero to the full delay.
    Full,
}

/// Exponential backoff: `initial * factor^(attempt - 1)`, at most `max`, then jitter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// The delay after the first failure.
    pub initial: Duration,
    /// What each further failure multiplies it by.
    pub factor: f64,
    /// The longest delay.
    pub max: Duration,
    /// How much of it is random.
    pub jitter: Jitter,
}

impl Backoff {
    /// Always this delay, without jitter.
    #[must_use]
    pub const fn fixed(delay: Duration) -> Self {
        Self { initial: delay, factor: 1.0, max: delay, jitter: Jitter::None }
    }

    /// The delay before the attempt that follows `attempt` (1-based), with its random part drawn.
    #[must_use]
    pub fn delay(&self, attempt: u32) -> Duration {
        let full = self.full_delay(attempt);
        match self.jitter {
            Jitter::None => full,
            Jitter::Equal => full.mul_f64(0.5 + fastrand::f64() / 2.0),
            Jitter::Full => full.mul_f64(fastrand::f64()),
        }
    }

    /// The delay without its random part.
    #[must_use]
    pub fn full_delay(&self, attempt: u32) -> Duration {
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds = self.initial.as_secs_f64() * self.factor.powi(exponent);
        // Not finite after many attempts; the bound is meant then.
        if seconds.is_finite() && seconds < self.max.as_secs_f64() {
            Duration::from_secs_f64(seconds)
        } else {
            self.max
        }
    }
}

impl Default for Backoff {
    /// 500 ms, doubled up to 5 minutes, half of it random.
    fn default() -> Self {
        Self { initial: Duration::from_millis(500), factor: 2.0, max: Duration::from_secs(300), jitter: Jitter::Equal }
    }
}

/// What becomes of a message that no further attempt can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fate {
    /// To the dead-letter queue, with the reason.
    #[default]
    DeadLetter,
    /// Acknowledged and counted, never handled.
    Drop,
}

/// Where dead letters go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum DeadLetters {
    /// To the queue `<channel>.dlq` (`<topic>.<group>.dlq`), which is declared with the channel. Where nobody stands
    /// between sender and consumer, the sender is told and keeps the message.
    #[default]
    Own,
    /// To this queue, which is declared with the channel.
    To(Address),
}

/// What happens to messages that fail, cannot be decoded, are not believed, have expired or that nobody wants.
#[derive(Debug, Clone, PartialEq)]
pub struct FailurePolicy {
    /// How often a message is tried in all, the first time included.
    pub max_attempts: u32,
    /// The delays between attempts.
    pub backoff: Backoff,
    /// Where the retries happen.
    pub mode: RetryMode,
    /// Where dead letters go.
    pub dead_letters: DeadLetters,
    /// After the last attempt, or after an error that no retry can help.
    pub exhausted: Fate,
    /// A body that cannot be decoded.
    pub undecodable: Fate,
    /// A body above the limit of decoding ([`Limits::max_bytes`](polymq_serializers::Limits::max_bytes)).
    pub oversize: Fate,
    /// What a layer does not believe ([`Outcome::Untrusted`](crate::Outcome)): no signature, a wrong one, one of before.
    pub untrusted: Fate,
    /// A message whose time has passed.
    pub expired: Fate,
    /// A kind or version that no handler takes.
    pub unwanted: Fate,
    /// The most messages of this channel that are being tried again at the same moment.
    pub max_concurrent_retries: Option<usize>,
    /// After this many failures in a row the channel pauses until it is resumed.
    pub pause_after_failures: Option<u32>,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        Self {
            max_attempts: 5,
            backoff: Backoff::default(),
            mode: RetryMode::default(),
            dead_letters: DeadLetters::default(),
            exhausted: Fate::DeadLetter,
            undecodable: Fate::DeadLetter,
            oversize: Fate::DeadLetter,
            untrusted: Fate::DeadLetter,
            expired: Fate::DeadLetter,
            unwanted: Fate::DeadLetter,
            max_concurrent_retries: None,
            pause_after_failures: None,
        }
    }
}

impl FailurePolicy {
    /// The queue for the dead letters of `address`.
    #[must_use]
    pub fn dead_letter_address(&self, address: &Address, group: Option<&str>) -> Address {
        match &self.dead_letters {
            DeadLetters::Own => address.dead_letters(group),
            DeadLetters::To(queue) => queue.clone(),
        }
    }

    pub(crate) fn check(&self, address: &Address) -> Result<()> {
        let problem = if self.max_attempts == 0 {
            "max_attempts is 0; write 1 for a single attempt"
        } else if self.backoff.factor < 1.0 || !self.backoff.factor.is_finite() {
            "backoff.factor is below 1; delays would shrink"
        } else if self.max_concurrent_retries == Some(0) {
            "max_concurrent_retries is 0; nothing would be tried again"
        } else if self.max_concurrent_retries.is_some_and(|most| most > Semaphore::MAX_PERMITS) {
            "max_concurrent_retries is more than a program can count; leave it out for no limit"
        } else if matches!(&self.dead_letters, DeadLetters::To(queue) if queue == address) {
            "the dead-letter queue is the channel itself; dead letters would loop"
        } else if matches!(&self.dead_letters, DeadLetters::To(letters) if letters.kind() != ChannelKind::Queue) {
            "the place for dead letters is a topic, which keeps nothing for who comes later; name a queue"
        } else {
            return Ok(());
        };
        Err(Error::new(ErrorKind::Config, problem).with_operation("start").with_channel(address.name()))
    }
}
