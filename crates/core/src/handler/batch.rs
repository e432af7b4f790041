//! Handlers of many messages at once.

use std::{future::Future, ops::Deref};

use super::{Failure, FromDelivery, IntoOutcome, Outcome};

/// What was extracted from several messages, in their order: decoded bodies, or any other argument of a handler.
#[derive(Debug)]
pub struct Batch<T>(pub(crate) Vec<T>);

impl<T> Batch<T> {
    /// The values themselves.
    #[must_use]
    pub fn into_vec(self) -> Vec<T> {
        self.0
    }
}

impl<T> Deref for Batch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T> IntoIterator for Batch<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// An async function of one [`Batch`]. A body that cannot be decoded goes its own way and is not in the batch.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler of batches",
    note = "such a handler is an async fn(Batch<T>) that returns (), Result<(), E> or Vec<Outcome>"
)]
pub trait BatchHandler<T>: Send + Sync + 'static {
    /// Calls the function.
    fn call(&self, batch: Batch<T>) -> impl Future<Output = BatchOutcome> + Send + 'static;
}

impl<F, Fut, T> BatchHandler<T> for F
where
    F: Fn(Batch<T>) -> Fut + Send + Sync + 'static,
    Fut: Future + Send + 'static,
    Fut::Output: IntoBatchOutcome,
    T: FromDelivery,
{
    fn call(&self, batch: Batch<T>) -> impl Future<Output = BatchOutcome> + Send + 'static {
        let future = self(batch);
        async move { future.await.into_batch_outcome() }
    }
}

/// One outcome for all, or one each.
#[derive(Debug)]
pub enum BatchOutcome {
    /// All are done.
    Ack,
    /// All failed the same way.
    Failed(Failure),
    /// One outcome for each, in order; a wrong number fails all of them.
    Each(Vec<Outcome>),
}

/// What a handler of batches may return.
#[diagnostic::on_unimplemented(
    message = "a handler of batches cannot return `{Self}`",
    note = "return () or Result<(), E> for all messages alike, or Vec<Outcome> with one outcome for each"
)]
pub trait IntoBatchOutcome {
    /// The outcomes.
    fn into_batch_outcome(self) -> BatchOutcome;
}

impl IntoBatchOutcome for () {
    fn into_batch_outcome(self) -> BatchOutcome {
        BatchOutcome::Ack
    }
}

impl IntoBatchOutcome for Vec<Outcome> {
    fn into_batch_outcome(self) -> BatchOutcome {
        BatchOutcome::Each(self)
    }
}

impl<T: IntoBatchOutcome, E: Into<Failure>> IntoBatchOutcome for Result<T, E> {
    fn into_batch_outcome(self) -> BatchOutcome {
        match self {
            Ok(value) => value.into_batch_outcome(),
            Err(error) => BatchOutcome::Failed(error.into()),
        }
    }
}

impl BatchOutcome {
    /// The outcome of each of `count` messages, or `None` when all are done.
    pub(crate) fn each(self, count: usize) -> Option<Vec<Outcome>> {
        match self {
            Self::Ack => None,
            Self::Each(outcomes) if outcomes.len() == count => Some(outcomes),
            Self::Each(outcomes) => {
                let reason = format!("the handler gave {} outcomes for {count} messages", outcomes.len());
                Some((0..count).map(|_| Failure::new(reason.clone()).into_outcome()).collect())
            }
            Self::Failed(failure) => {
                let again = |retry| {
                    let copy = Failure::new(failure.to_string());
                    match retry {
                        crate::Retry::Never => copy.never_retry(),
                        crate::Retry::After(delay) => copy.retry_after(delay),
                        crate::Retry::Now | crate::Retry::UnknownOutcome => copy,
                    }
                };
                Some((0..count).map(|_| again(failure.retry()).into_outcome()).collect())
            }
        }
    }
}

impl IntoOutcome for Failure {
    fn into_outcome(self) -> Outcome {
        self.into()
    }
}
