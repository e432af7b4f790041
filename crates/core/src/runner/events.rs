//! Callbacks of a running service.

use std::{fmt, panic::AssertUnwindSafe, sync::Arc};

use crate::{Address, Error, Message};

/// A handler failed.
#[derive(Debug, Clone, Copy)]
pub struct HandlerError<'a> {
    /// The channel consumed.
    pub address: &'a Address,
    /// The message.
    pub message: &'a Message,
    /// The number of the attempt that failed.
    pub attempt: u32,
    /// Why.
    pub error: &'a str,
}

/// A message was settled.
#[derive(Debug, Clone, Copy)]
pub struct Handled<'a> {
    /// The channel consumed.
    pub address: &'a Address,
    /// The message.
    pub message: &'a Message,
    /// The number of the attempt.
    pub attempt: u32,
    /// `acked`, `retried`, `deferred`, `dead-lettered` or `dropped`.
    pub outcome: &'static str,
}

type HandlerErrorCallback = Arc<dyn Fn(HandlerError<'_>) + Send + Sync>;
type TransportErrorCallback = Arc<dyn Fn(&Address, &Error) + Send + Sync>;
type HandledCallback = Arc<dyn Fn(Handled<'_>) + Send + Sync>;

/// What the user wants to be told. A callback that panics harms nothing.
#[derive(Clone, Default)]
pub(crate) struct Callbacks {
    pub(crate) handler_error: Option<HandlerErrorCallback>,
    pub(crate) transport_error: Option<TransportErrorCallback>,
    pub(crate) handled: Option<HandledCallback>,
}

impl Callbacks {
    pub(crate) fn handler_error(&self, event: HandlerError<'_>) {
        if let Some(callback) = &self.handler_error {
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| callback(event)));
        }
    }

    pub(crate) fn transport_error(&self, address: &Address, error: &Error) {
        if let Some(callback) = &self.transport_error {
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| callback(address, error)));
        }
    }

    pub(crate) fn handled(&self, event: Handled<'_>) {
        if let Some(callback) = &self.handled {
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| callback(event)));
        }
    }
}

impl fmt::Debug for Callbacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Callbacks")
    }
}
