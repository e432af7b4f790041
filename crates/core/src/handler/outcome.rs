//! What a handler decides about its message.

use std::{borrow::Cow, time::Duration};

use super::{Failure, Sends};
use crate::{Answer, Answered, Retry};

/// What becomes of a message.
#[derive(Debug)]
pub enum Outcome {
    /// It is done.
    Ack,
    /// It is done, and the one who asked gets this: what [`Answer`](crate::Answer) becomes.
    Answer(Answered),
    /// It is done, and these are sent with its acknowledgement.
    Send(Sends),
    /// It failed and is tried again by the failure policy; after the last attempt it is a dead letter.
    Retry {
        /// The delay, instead of the policy's backoff.
        after: Option<Duration>,
        /// Why.
        error: Failure,
    },
    /// It goes to the dead letters at once, with this reason.
    Reject {
        /// Why.
        reason: Cow<'static, str>,
    },
    /// It is not believed, such as one with a wrong signature: the policy's [`untrusted`](crate::FailurePolicy::untrusted)
    /// says where it goes. Not counted as a failure: who forges messages must not pause a channel.
    Untrusted {
        /// Why.
        reason: Cow<'static, str>,
    },
    /// It is acknowledged without having been handled; the reason is logged.
    Drop {
        /// Why.
        reason: Cow<'static, str>,
    },
    /// It goes behind the others, or comes again later, and no attempt is counted.
    Defer {
        /// The delay.
        after: Duration,
    },
}

impl Outcome {
    /// Tried again by the failure policy.
    #[must_use]
    pub fn retry(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Retry { after: None, error: Failure::new(reason) }
    }

    /// Tried again after `delay`.
    #[must_use]
    pub fn retry_after(delay: Duration, reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Retry { after: Some(delay), error: Failure::new(reason) }
    }

    /// To the dead letters.
    #[must_use]
    pub fn reject(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Reject { reason: reason.into() }
    }

    /// Not believed.
    #[must_use]
    pub fn untrusted(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Untrusted { reason: reason.into() }
    }

    /// Acknowledged without having been handled.
    #[must_use]
    pub fn drop(reason: impl Into<Cow<'static, str>>) -> Self {
        Self::Drop { reason: reason.into() }
    }

    /// Behind the others, after `delay`, without counting an attempt.
    #[must_use]
    pub fn defer(delay: Duration) -> Self {
        Self::Defer { after: delay }
    }
}

impl From<Failure> for Outcome {
    fn from(error: Failure) -> Self {
        match error.retry() {
            Retry::Never => Self::Reject { reason: error.to_string().into() },
            Retry::After(delay) => Self::Retry { after: Some(delay), error },
            Retry::Now | Retry::UnknownOutcome => Self::Retry { after: None, error },
        }
    }
}

/// What a handler may return: nothing, an [`Answer`], [`Sends`], an [`Outcome`], or a `Result` of these with any error.
#[diagnostic::on_unimplemented(
    message = "a handler cannot return `{Self}`",
    note = "return (), Answer(value), Sends, Outcome, or Result<(), E> where E is polymq's Failure or implements std::error::Error"
)]
pub trait IntoOutcome {
    /// The outcome.
    fn into_outcome(self) -> Outcome;
}

impl IntoOutcome for () {
    fn into_outcome(self) -> Outcome {
        Outcome::Ack
    }
}

impl<T: serde::Serialize + Send + 'static> IntoOutcome for Answer<T> {
    fn into_outcome(self) -> Outcome {
        Outcome::Answer(Answered::new(self.0))
    }
}

impl IntoOutcome for Outcome {
    fn into_outcome(self) -> Outcome {
        self
    }
}

impl<T: IntoOutcome, E: Into<Failure>> IntoOutcome for Result<T, E> {
    fn into_outcome(self) -> Outcome {
        match self {
            Ok(value) => value.into_outcome(),
            Err(error) => error.into().into(),
        }
    }
}
