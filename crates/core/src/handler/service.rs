//! Handlers behind one type. The erased boundary is passed once a batch, not once a message: a service drives all
//! consecutive messages that are for it, and inside it everything is known to the compiler.

use std::{
    any::TypeId,
    marker::PhantomData,
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use tokio::time::timeout;

use super::{Batch, BatchHandler, FromDelivery, Handler, Outcome, Sends, View, layered};
use crate::runner::{DONE, Tried, Work};

/// A handler of any type.
pub(crate) trait Service: Send + Sync {
    /// Handles and settles the front of `work`, which is for the service at `index`, and what follows for as long as
    /// that is for it too.
    /// Dropping the future leaves what is not settled in `work`.
    fn drive<'a>(&'a self, index: usize, work: &'a mut Work) -> BoxFuture<'a, ()>;

    /// Calls the handler once, outside of any settling and inside of all layers.
    fn call<'a>(&'a self, view: View<'a>) -> BoxFuture<'a, Tried>;

    /// The type that decides which kinds it takes.
    fn body_type(&self) -> Option<TypeId>;

    /// The states that must be given before it is called: their types and names.
    fn needed_states(&self) -> Vec<(TypeId, &'static str)>;

    /// The most messages that one call takes.
    fn max_batch(&self) -> usize {
        1
    }
}

/// One function, one message.
pub(crate) struct FunctionService<H, Args>(H, PhantomData<fn(Args)>);

impl<H, Args> FunctionService<H, Args> {
    pub(crate) fn new(handler: H) -> Self {
        Self(handler, PhantomData)
    }
}

impl<H: Handler<Args>, Args: 'static> FunctionService<H, Args> {
    async fn attempt(&self, view: View<'_>) -> Tried {
        let calling = AssertUnwindSafe(async {
            match self.0.call(&view) {
                Ok(running) => Tried::Outcome(running.await),
                Err(error) => Tried::Undecodable(error),
            }
        });
        calling.catch_unwind().await.unwrap_or_else(|panic| Tried::panicked(panic.as_ref()))
    }
}

impl<H: Handler<Args>, Args: 'static> Service for FunctionService<H, Args> {
    fn drive<'a>(&'a self, index: usize, work: &'a mut Work) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            loop {
                let tried = if work.env().is_plain() {
                    // The same as `attempt` in one piece, so that nothing of the message is moved.
                    match catch_unwind(AssertUnwindSafe(|| self.0.call(&work.view()))) {
                        Ok(Ok(running)) => match AssertUnwindSafe(running).catch_unwind().await {
                            Ok(outcome) => Tried::Outcome(outcome),
                            Err(panic) => Tried::panicked(panic.as_ref()),
                        },
                        Ok(Err(error)) => Tried::Undecodable(error),
                        Err(panic) => Tried::panicked(panic.as_ref()),
                    }
                } else {
                    // Boxed, so that the future of the plain way, which is made for every fetch, stays small.
                    Box::pin(work.guard(layered(self, work.view()))).await
                };
                if matches!(tried, Tried::Outcome(Outcome::Ack)) && work.ack_front() {
                    // There is nothing in it; to drop it would be to look for that in two calls.
                    mem::forget(tried);
                } else {
                    work.settle(self, tried).await;
                }
                if !work.starts(index) {
                    return;
                }
            }
        })
    }

    fn call<'a>(&'a self, view: View<'a>) -> BoxFuture<'a, Tried> {
        Box::pin(self.attempt(view))
    }

    fn body_type(&self) -> Option<TypeId> {
        H::body_type()
    }

    fn needed_states(&self) -> Vec<(TypeId, &'static str)> {
        H::needed_states()
    }
}

/// One function, many messages.
pub(crate) struct BatchService<H, T> {
    handler: H,
    max: usize,
    arguments: PhantomData<fn(T)>,
}

impl<H, T> BatchService<H, T> {
    pub(crate) fn new(handler: H, max: usize) -> Self {
        Self { handler, max: max.max(1), arguments: PhantomData }
    }
}

impl<H: BatchHandler<T>, T: FromDelivery + Send + 'static> BatchService<H, T> {
    /// Extracts from as many messages at the front as are for this service; `Err` when the first cannot be.
    fn extract(&self, index: usize, work: &Work) -> Result<Vec<T>, Tried> {
        let mut values = Vec::with_capacity(work.len().min(self.max));
        let mut refused = None;
        let extracting = catch_unwind(AssertUnwindSafe(|| {
            work.look_at(index, self.max, |view| match T::from_delivery(view) {
                Ok(value) => {
                    values.push(value);
                    true
                }
                Err(error) => {
                    refused = Some(Tried::Undecodable(error));
                    false
                }
            });
        }));
        if let Err(panic) = extracting {
            refused = Some(Tried::panicked(panic.as_ref()));
        }
        match refused {
            Some(tried) if values.is_empty() => Err(tried),
            // What was refused is the front of the next batch, where it goes its own way.
            _ => Ok(values),
        }
    }
}

impl<H: BatchHandler<T>, T: FromDelivery + Send + 'static> Service for BatchService<H, T> {
    fn drive<'a>(&'a self, index: usize, work: &'a mut Work) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            while work.starts(index) {
                if !work.env().bus.parts().layers.is_empty() {
                    // Layers are around single messages: one at a time, through all of them.
                    let tried = work.guard(layered(self, work.view())).await;
                    work.settle(self, tried).await;
                    continue;
                }
                let values = match self.extract(index, work) {
                    Ok(values) => values,
                    Err(tried) => {
                        work.settle(self, tried).await;
                        continue;
                    }
                };
                let count = values.len();
                let calling = AssertUnwindSafe(async { self.handler.call(Batch(values)).await }).catch_unwind();
                let calling = work.within_time(calling);
                let outcomes = match work.env().lent(&work.lent_tokens(count), calling).await {
                    Ok(Ok(outcome)) => outcome.each(count),
                    Ok(Err(panic)) => {
                        Some((0..count).map(|_| Tried::panicked(panic.as_ref()).into_outcome()).collect())
                    }
                    Err(limit) => Some((0..count).map(|_| Tried::TimedOut(limit).into_outcome()).collect()),
                };
                let outcomes = match outcomes {
                    None if work.ack_fronts(count) => continue,
                    None => (0..count).map(|_| Outcome::Ack).collect(),
                    Some(outcomes) => outcomes,
                };
                for outcome in outcomes {
                    let left = work.len();
                    work.settle(self, Tried::Outcome(outcome)).await;
                    if work.len() == left {
                        // Kept at the front, by a stop or a pause while it waited in place: what follows was for those
                        // behind it, which are handled again.
                        return;
                    }
                }
            }
        })
    }

    fn call<'a>(&'a self, view: View<'a>) -> BoxFuture<'a, Tried> {
        let calling = AssertUnwindSafe(async move {
            let value = match T::from_delivery(&view) {
                Ok(value) => value,
                Err(error) => return Tried::Undecodable(error),
            };
            let outcome = self.handler.call(Batch(vec![value])).await;
            Tried::Outcome(outcome.each(1).and_then(|mut outcomes| outcomes.pop()).unwrap_or(Outcome::Ack))
        });
        Box::pin(calling.catch_unwind().map(|tried| tried.unwrap_or_else(|panic| Tried::panicked(panic.as_ref()))))
    }

    fn body_type(&self) -> Option<TypeId> {
        T::body_type()
    }

    fn needed_states(&self) -> Vec<(TypeId, &'static str)> {
        T::needed_state().into_iter().collect()
    }

    fn max_batch(&self) -> usize {
        self.max
    }
}

/// Several handlers for each message, each with a success of its own: what has succeeded is remembered with the
/// message and not called again when the others are tried again.
pub(crate) struct Several {
    pub(crate) parts: Vec<(String, Arc<dyn Service>)>,
    /// The time that each of them has: one time for all would take the successes with it when it is over.
    pub(crate) timeout: Option<Duration>,
}

impl Several {
    async fn attempt(&self, view: View<'_>) -> Tried {
        let mut done: Vec<&str> = match view.message.system_headers().get(DONE) {
            Some(names) => names.split(',').collect(),
            None => Vec::new(),
        };
        let (mut failed, mut dropped, mut answer, mut sending) = (None::<Tried>, None, None, None::<Sends>);
        for (name, part) in &self.parts {
            if done.contains(&name.as_str()) {
                continue;
            }
            let called = match self.timeout {
                Some(limit) => timeout(limit, part.call(view)).await.unwrap_or(Tried::TimedOut(limit)),
                None => part.call(view).await,
            };
            match called {
                Tried::Outcome(Outcome::Ack) => done.push(name),
                Tried::Outcome(Outcome::Drop { reason }) => {
                    done.push(name);
                    dropped = dropped.or(Some(reason));
                }
                // Not done before it is sent: where another one fails, it is called again.
                Tried::Outcome(Outcome::Answer(value)) => answer = answer.or(Some(value)),
                Tried::Outcome(Outcome::Send(sends)) => sending.get_or_insert_default().extend(sends),
                other if failed.as_ref().is_some_and(|worst| hope(worst) >= hope(&other)) => {}
                other => failed = Some(other),
            }
        }
        if let Some(failed) = failed {
            return Tried::Partly { done: done.join(","), failed: Box::new(failed) };
        }
        Tried::Outcome(match (sending, answer, dropped) {
            (Some(_), Some(_), _) => Outcome::reject("one of its handlers answers and another one sends"),
            (Some(sends), None, _) => Outcome::Send(sends),
            (None, Some(answer), _) => Outcome::Answer(answer),
            (None, None, Some(reason)) => Outcome::Drop { reason },
            (None, None, None) => Outcome::Ack,
        })
    }
}

/// How much another attempt can help a handler that failed. One that nothing can help must not end the attempts of
/// the others: it decides when it is all that is left.
fn hope(tried: &Tried) -> u8 {
    match tried {
        Tried::Undecodable(_) | Tried::Outcome(Outcome::Reject { .. } | Outcome::Untrusted { .. }) => 0,
        Tried::Outcome(Outcome::Defer { .. }) => 1,
        _ => 2,
    }
}

impl Service for Several {
    fn drive<'a>(&'a self, index: usize, work: &'a mut Work) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            while work.starts(index) {
                let tried = work.guard(layered(self, work.view())).await;
                work.settle(self, tried).await;
            }
        })
    }

    fn call<'a>(&'a self, view: View<'a>) -> BoxFuture<'a, Tried> {
        Box::pin(self.attempt(view))
    }

    fn body_type(&self) -> Option<TypeId> {
        self.parts.iter().find_map(|(_, part)| part.body_type())
    }

    fn needed_states(&self) -> Vec<(TypeId, &'static str)> {
        self.parts.iter().flat_map(|(_, part)| part.needed_states()).collect()
    }
}
