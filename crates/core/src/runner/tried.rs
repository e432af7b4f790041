//! How one call of a handler ended.

use std::{any::Any, time::Duration};

use crate::{Error, Failure, Outcome};

/// How one call of a handler ended.
#[derive(Debug)]
pub(crate) enum Tried {
    /// It returned.
    Outcome(Outcome),
    /// Its arguments could not be made from the message.
    Undecodable(Error),
    /// It panicked with this text.
    Panicked(String),
    /// It did not end in its time.
    TimedOut(Duration),
    /// Some of several handlers succeeded.
    Partly {
        /// Their names.
        done: String,
        /// The failure among the others that decides.
        failed: Box<Self>,
    },
}

impl Tried {
    pub(crate) fn panicked(panic: &(dyn Any + Send)) -> Self {
        Self::Panicked(panic_text(panic).to_owned())
    }

    /// The outcome that the failure policy decides about; an undecodable body has its own way before.
    pub(crate) fn into_outcome(self) -> Outcome {
        match self {
            Self::Outcome(outcome) => outcome,
            Self::Undecodable(error) => Outcome::reject(error.to_string()),
            Self::Panicked(text) => Failure::new(format!("the handler panicked: {text}")).into(),
            Self::TimedOut(limit) => Failure::new(format!("the handler did not end within {limit:?}")).into(),
            Self::Partly { failed, .. } => failed.into_outcome(),
        }
    }
}

/// What a panic says.
pub(super) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no text")
}
