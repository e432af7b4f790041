//! The answer to something that was handed over: at hand already, or awaited.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

use crate::{Error, ErrorKind, Result};

/// A future that costs nothing when the answer is at hand: an in-process backend answers without allocating.
///
/// What was handed over goes on when a completion is dropped; only the answer is lost. One made with
/// [`future`](Self::future) ends with it instead.
#[must_use = "the operation is handed over, but its answer is only in this future"]
pub struct Completion<T>(State<T>);

enum State<T> {
    Ready(Option<Result<T>>),
    Queued(oneshot::Receiver<Result<T>>, Arc<AtomicU8>),
    Future(BoxFuture<'static, Result<T>>),
}

const QUEUED: u8 = 0;
const HANDED_OVER: u8 = 1;
const CANCELLED: u8 = 2;

impl<T: Send + 'static> Completion<T> {
    /// The answer is at hand.
    pub fn ready(result: Result<T>) -> Self {
        Self(State::Ready(Some(result)))
    }

    /// The answer is what this future gives. It is polled by whoever waits for the answer and by nobody else: nothing happens
    /// before, and dropping the completion ends it where it is. What must go on by itself is a task with
    /// [`queued`](Self::queued).
    pub fn future(future: impl Future<Output = Result<T>> + Send + 'static) -> Self {
        Self(State::Future(Box::pin(future)))
    }

    /// An answer that a task of the backend will give, and the task's end of it.
    pub fn queued() -> (Completer<T>, Self) {
        let (sender, receiver) = oneshot::channel();
        let state = Arc::new(AtomicU8::new(QUEUED));
        (Completer { sender, state: Arc::clone(&state) }, Self(State::Queued(receiver, state)))
    }

    /// The answer, if it is at hand.
    pub fn try_take(&mut self) -> Option<Result<T>> {
        match &mut self.0 {
            State::Ready(result) => result.take(),
            _ => None,
        }
    }

    /// The answer, if it is at hand; the completion otherwise.
    #[inline]
    pub(crate) fn at_hand(self) -> std::result::Result<Result<T>, Self> {
        match self.0 {
            State::Ready(Some(result)) => Ok(result),
            state => Err(Self(state)),
        }
    }

    /// The answer, if it is at hand. What is not over goes on by itself, in a task of its own where it would stand still
    /// otherwise; what becomes of it is only in the log.
    pub(crate) fn answer_or_go_on(self) -> Option<Result<T>> {
        match self.0 {
            State::Ready(result) => result,
            State::Queued(..) => None,
            State::Future(future) => {
                tokio::spawn(async move {
                    if let Err(error) = future.await {
                        tracing::warn!(%error, "what nobody waited for has failed");
                    }
                });
                None
            }
        }
    }

    /// Withdraws what has not been handed over yet. `true`: it certainly never will be; `false`: it was
    /// handed over, and its effect is unknown until the answer comes.
    pub fn withdraw(&self) -> bool {
        match &self.0 {
            State::Queued(_, state) => {
                state.compare_exchange(QUEUED, CANCELLED, Ordering::AcqRel, Ordering::Acquire) != Err(HANDED_OVER)
            }
            State::Ready(_) | State::Future(_) => false,
        }
    }
}

impl<T> Future for Completion<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        match &mut self.0 {
            State::Ready(result) => Poll::Ready(result.take().unwrap_or_else(|| Err(gone()))),
            State::Future(future) => future.as_mut().poll(cx),
            State::Queued(receiver, state) => Pin::new(receiver).poll(cx).map(|answer| {
                answer.unwrap_or_else(|_| {
                    Err(if state.load(Ordering::Acquire) == HANDED_OVER { unknown() } else { gone() })
                })
            }),
        }
    }
}

// The only self-reference is inside the boxed future, which is pinned on its own.
impl<T> Unpin for Completion<T> {}

impl<T> fmt::Debug for Completion<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            State::Ready(_) => "Completion::ready",
            State::Queued(..) => "Completion::queued",
            State::Future(_) => "Completion::future",
        })
    }
}

#[cold]
fn unknown() -> Error {
    Error::new(ErrorKind::UnknownOutcome, "the connection ended before the broker answered")
}

#[cold]
fn gone() -> Error {
    Error::new(ErrorKind::Closed, "closed before it was handed over")
}

/// The backend's end of a queued [`Completion`].
#[derive(Debug)]
pub struct Completer<T> {
    sender: oneshot::Sender<Result<T>>,
    state: Arc<AtomicU8>,
}

impl<T> Completer<T> {
    /// To be called just before the operation is written to the wire. `false`: the caller has withdrawn it
    /// (its time-out has passed) and it must not be written.
    #[must_use]
    pub fn hand_over(&self) -> bool {
        self.state.compare_exchange(QUEUED, HANDED_OVER, Ordering::AcqRel, Ordering::Acquire) != Err(CANCELLED)
    }

    /// Takes the hand-over back, when it is certain that nothing reached the broker.
    pub fn take_back(&self) {
        let _ = self.state.compare_exchange(HANDED_OVER, QUEUED, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Gives the answer. A completer that is dropped without one answers "unknown outcome" when it was
    /// handed over, "closed" otherwise.
    pub fn complete(self, result: Result<T>) {
        // Nobody waits any more: the answer has no reader, which is the reader's choice.
        let _ = self.sender.send(result);
    }

    /// Whether nobody waits for the answer any more.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.state.load(Ordering::Acquire) == CANCELLED
    }
}
