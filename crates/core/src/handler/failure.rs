//! Why a handler failed.

use std::{borrow::Cow, error::Error as StdError, fmt, time::Duration};

use crate::{BoxError, Error, ErrorKind, Retry};

/// The error of a handler: anything that implements [`std::error::Error`] becomes one with `?`, and is tried again
/// unless it is an [`Error`](enum@crate::ErrorKind) whose retry answer is "never" or it was made by [`Failure::permanent`].
///
/// Like `anyhow::Error` it does not implement the trait itself, which is what makes that conversion possible.
pub struct Failure(Box<Inner>); // boxed, so that the outcome of a success is small

struct Inner {
    message: Cow<'static, str>,
    retry: Retry,
    source: Option<BoxError>,
}

impl Failure {
    fn of(message: Cow<'static, str>, retry: Retry, source: Option<BoxError>) -> Self {
        Self(Box::new(Inner { message, retry, source }))
    }

    /// A failure that another attempt may help.
    #[must_use]
    pub fn new(message: impl Into<Cow<'static, str>>) -> Self {
        Self::of(message.into(), Retry::Now, None)
    }

    /// A failure that no attempt can help: the message goes to the dead letters at once.
    #[must_use]
    pub fn permanent(message: impl Into<Cow<'static, str>>) -> Self {
        Self::of(message.into(), Retry::Never, None)
    }

    /// No attempt can help.
    #[must_use]
    pub fn never_retry(mut self) -> Self {
        self.0.retry = Retry::Never;
        self
    }

    /// The next attempt comes after `delay` instead of the policy's backoff.
    #[must_use]
    pub fn retry_after(mut self, delay: Duration) -> Self {
        self.0.retry = Retry::After(delay);
        self
    }

    /// Whether to try again.
    #[must_use]
    pub fn retry(&self) -> Retry {
        self.0.retry
    }

    /// What made it fail.
    #[must_use]
    pub fn source(&self) -> Option<&(dyn StdError + Send + Sync + 'static)> {
        self.0.source.as_deref()
    }
}

impl<E: StdError + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        let message = error.to_string();
        let source: BoxError = Box::new(error);
        let retry = match source.downcast_ref::<Error>() {
            // What the handler needs is gone, as another bus that was closed first: the message is not at fault.
            Some(error) if matches!(error.kind(), ErrorKind::Closed | ErrorKind::Disconnected) => Retry::Now,
            // An unsupported or invalid operation fails the same way every time.
            Some(error) => error.retry(),
            None => Retry::Now,
        };
        Self::of(message.into(), retry, Some(source))
    }
}

impl From<Failure> for BoxError {
    fn from(failure: Failure) -> Self {
        match failure.0.source {
            Some(source) => source,
            None => failure.0.message.into(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        let mut source = self.0.source.as_deref().and_then(|error| error.source());
        while let Some(error) = source {
            write!(f, "\ncaused by: {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
