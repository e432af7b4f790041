//! One error type for every backend: what happened, whether to try again, where, and what to do about it.
//!
//! No client library's error type appears in a signature; the native error stays reachable through
//! [`std::error::Error::source`]. Secrets never enter an error: URLs are redacted with
//! [`redact_url`](crate::config::redact_url) before they reach one.

use std::{borrow::Cow, error::Error as StdError, fmt, time::Duration};

/// Any error, boxed, as a source.
pub type BoxError = Box<dyn StdError + Send + Sync + 'static>;

/// The result of every operation in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, to match on. Backends map their native errors to these in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting is missing, malformed or contradicts another; found before any connection is made.
    Config,
    /// No backend of that name is linked into this program.
    UnknownBackend,
    /// A known backend whose feature was not compiled in.
    NotCompiledIn,
    /// The backend declares that it cannot do this.
    Unsupported,
    /// The caller's input breaks a rule that is the same on every backend (name, header, option).
    InvalidInput,
    /// The body or the headers exceed the limit of the backend.
    TooLarge,
    /// The queue, topic or group does not exist.
    NotFound,
    /// The name is taken, or exists with other properties.
    Conflict,
    /// The credentials were refused.
    Unauthenticated,
    /// The credentials are good but do not allow this.
    PermissionDenied,
    /// There is no connection, or it was lost before the operation was handed over.
    Disconnected,
    /// The operation did not finish in its time and certainly had no effect.
    Timeout,
    /// The operation was handed over and no answer came: it may or may not have had its effect.
    UnknownOutcome,
    /// The broker took the message but no queue or subscriber holds it.
    Unroutable,
    /// A bound is reached (messages in flight, a full queue, a broker's memory alarm).
    Busy,
    /// The broker refused the message.
    Refused,
    /// The handle, consumer or bus was closed before.
    Closed,
    /// The delivery is no longer ours to settle: its lease or its connection has ended.
    Stale,
    /// A body could not be decoded.
    Decode,
    /// A value could not be encoded.
    Encode,
    /// A handler failed.
    Handler,
    /// Anything a backend could not classify. Never retried, so that a poison message cannot loop.
    Other,
}

impl ErrorKind {
    /// The retry answer that errors of this kind carry unless told otherwise.
    const fn default_retry(self) -> Retry {
        match self {
            Self::Disconnected | Self::Timeout | Self::Busy | Self::Stale => Retry::Now,
            Self::UnknownOutcome => Retry::UnknownOutcome,
            _ => Retry::Never,
        }
    }
}

/// Whether the failed operation may be tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The same call will fail again.
    Never,
    /// The operation had no effect and may be repeated, after the caller's own backoff.
    Now,
    /// The operation had no effect; repeat it no earlier than this.
    After(Duration),
    /// The operation may have had its effect: repeat it only where a second effect does no harm
    /// (the message id stays the same, so a deduplicating receiver sees one message).
    UnknownOutcome,
}

/// An error with its kind, retry answer, operation, context, hint and source.
///
/// `Display` is one sentence; `Debug` shows every part. The size is one pointer.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    retry: Retry,
    message: Cow<'static, str>,
    backend: Option<Cow<'static, str>>,
    operation: Option<&'static str>,
    channel: Option<String>,
    hint: Option<Cow<'static, str>>,
    source: Option<BoxError>,
}

impl Error {
    /// An error of `kind` with a sentence that names the offending value, what was expected and what to do.
    #[cold]
    pub fn new(kind: ErrorKind, message: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            retry: kind.default_retry(),
            message: message.into(),
            backend: None,
            operation: None,
            channel: None,
            hint: None,
            source: None,
        }))
    }

    /// The backend declares that it cannot do `what`.
    #[cold]
    pub fn unsupported(backend: impl Into<Cow<'static, str>>, what: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Unsupported, format!("the backend cannot do this: {what}")).with_backend(backend)
    }

    /// The handle was closed before `operation`.
    #[cold]
    pub fn closed(operation: &'static str) -> Self {
        Self::new(ErrorKind::Closed, "already closed").with_operation(operation)
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether to try again.
    #[must_use]
    pub fn retry(&self) -> Retry {
        self.0.retry
    }

    /// The sentence alone, without backend, operation and channel.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The backend that reported it, when one did.
    #[must_use]
    pub fn backend(&self) -> Option<&str> {
        self.0.backend.as_deref()
    }

    /// What was being done: `connect`, `send`, `receive`, `settle`, `declare` and so on.
    #[must_use]
    pub fn operation(&self) -> Option<&'static str> {
        self.0.operation
    }

    /// The queue or topic concerned.
    #[must_use]
    pub fn channel(&self) -> Option<&str> {
        self.0.channel.as_deref()
    }

    /// What to do about it.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// Changes the kind, and the retry answer to the kind's own.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.0.kind = kind;
        self.0.retry = kind.default_retry();
        self
    }

    /// Changes the retry answer.
    #[must_use]
    pub fn with_retry(mut self, retry: Retry) -> Self {
        self.0.retry = retry;
        self
    }

    /// Names the backend.
    #[must_use]
    pub fn with_backend(mut self, backend: impl Into<Cow<'static, str>>) -> Self {
        self.0.backend = Some(backend.into());
        self
    }

    /// Names the operation.
    #[must_use]
    pub fn with_operation(mut self, operation: &'static str) -> Self {
        self.0.operation = Some(operation);
        self
    }

    /// Names the queue or topic.
    #[must_use]
    pub fn with_channel(mut self, channel: impl Into<String>) -> Self {
        self.0.channel = Some(channel.into());
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<Cow<'static, str>>) -> Self {
        self.0.hint = Some(hint.into());
        self
    }

    /// Keeps the native error.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        if let Some(backend) = &inner.backend {
            write!(f, "{backend}: ")?;
        }
        match (inner.operation, &inner.channel) {
            (Some(operation), Some(channel)) => write!(f, "{operation} \"{channel}\": ")?,
            (Some(operation), None) => write!(f, "{operation}: ")?,
            (None, Some(channel)) => write!(f, "\"{channel}\": ")?,
            (None, None) => {}
        }
        f.write_str(&inner.message)?;
        if let Some(hint) = &inner.hint {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        f.debug_struct("Error")
            .field("kind", &inner.kind)
            .field("retry", &inner.retry)
            .field("message", &inner.message)
            .field("backend", &inner.backend)
            .field("operation", &inner.operation)
            .field("channel", &inner.channel)
            .field("hint", &inner.hint)
            .field("source", &inner.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

impl From<polymq_serializers::DecodeError> for Error {
    fn from(error: polymq_serializers::DecodeError) -> Self {
        Self::new(ErrorKind::Decode, error.to_string()).with_source(error)
    }
}

impl From<polymq_serializers::SerializeError> for Error {
    fn from(error: polymq_serializers::SerializeError) -> Self {
        Self::new(ErrorKind::Encode, error.to_string()).with_source(error)
    }
}

impl From<polymq_serializers::RegistryError> for Error {
    fn from(error: polymq_serializers::RegistryError) -> Self {
        Self::new(ErrorKind::Config, error.to_string()).with_source(error)
    }
}
