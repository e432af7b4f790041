//! Functions as handlers.

use std::{any::TypeId, future::Future, marker::PhantomData};

use super::{FromDelivery, IntoOutcome, Outcome, View};
use crate::{Error, ErrorKind, Failure, Result};

/// An async function of up to eight arguments that implement [`FromDelivery`] and a result that implements [`IntoOutcome`].
///
/// Implemented for such functions and for [`Blocking`] ones; `Args` only tells the implementations apart.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler",
    note = "a handler is an async fn with at most eight arguments, each of which can be extracted from a delivery, \
            that returns (), Outcome or Result<(), E>; blocking functions go through polymq::blocking(f)"
)]
pub trait Handler<Args>: Send + Sync + 'static {
    /// Makes the arguments and calls the function.
    ///
    /// # Errors
    /// That of the first argument that cannot be made; the function is not called then.
    fn call(&self, view: &View<'_>) -> Result<impl Future<Output = Outcome> + Send + 'static + use<Self, Args>>;

    /// The type of the argument that is the body, if there is one.
    fn body_type() -> Option<TypeId>;

    /// The states that must be given before the runner starts: their types and names.
    fn needed_states() -> Vec<(TypeId, &'static str)>;
}

macro_rules! handlers {
    ($($argument:ident)*) => {
        impl<F, Fut, $($argument,)*> Handler<($($argument,)*)> for F
        where
            F: Fn($($argument),*) -> Fut + Send + Sync + 'static,
            Fut: Future + Send + 'static,
            Fut::Output: IntoOutcome,
            $($argument: FromDelivery + 'static,)*
        {
            #[allow(unused_variables)] // a function without arguments looks at nothing
            fn call(&self, view: &View<'_>) -> Result<impl Future<Output = Outcome> + Send + 'static + use<F, Fut, $($argument),*>> {
                let future = self($($argument::from_delivery(view)?),*);
                Ok(async move { future.await.into_outcome() })
            }

            fn body_type() -> Option<TypeId> {
                None$(.or($argument::body_type()))*
            }

            fn needed_states() -> Vec<(TypeId, &'static str)> {
                std::iter::empty()$(.chain($argument::needed_state()))*.collect()
            }
        }

        impl<F, Output, $($argument,)*> Handler<(Blocking<F>, $($argument,)*)> for Blocking<F>
        where
            F: Fn($($argument),*) -> Output + Clone + Send + Sync + 'static,
            Output: IntoOutcome + 'static,
            $($argument: FromDelivery + Send + 'static,)*
        {
            #[allow(unused_variables, non_snake_case)] // as above; arguments are named like their types
            fn call(&self, view: &View<'_>) -> Result<impl Future<Output = Outcome> + Send + 'static + use<F, Output, $($argument),*>> {
                let function = self.0.clone();
                $(let $argument = $argument::from_delivery(view)?;)*
                let running = tokio::task::spawn_blocking(move || function($($argument),*).into_outcome());
                Ok(async move {
                    match running.await {
                        Ok(outcome) => outcome,
                        Err(error) => match error.try_into_panic() {
                            Ok(panic) => std::panic::resume_unwind(panic),
                            Err(_) => Failure::from(Error::new(ErrorKind::Closed, "the runtime is shutting down")).into(),
                        },
                    }
                })
            }

            fn body_type() -> Option<TypeId> {
                None$(.or($argument::body_type()))*
            }

            fn needed_states() -> Vec<(TypeId, &'static str)> {
                std::iter::empty()$(.chain($argument::needed_state()))*.collect()
            }
        }
    };
}

handlers!();
handlers!(A1);
handlers!(A1 A2);
handlers!(A1 A2 A3);
handlers!(A1 A2 A3 A4);
handlers!(A1 A2 A3 A4 A5);
handlers!(A1 A2 A3 A4 A5 A6);
handlers!(A1 A2 A3 A4 A5 A6 A7);
handlers!(A1 A2 A3 A4 A5 A6 A7 A8);

/// A function that blocks its thread; made by [`blocking`].
#[derive(Debug, Clone)]
pub struct Blocking<F>(F, PhantomData<()>);

/// Makes a handler of an ordinary function that blocks: it runs on tokio's threads for blocking work, so that
/// other handlers are not held up. It cannot be cancelled while it runs; after a time-out its result is ignored.
#[must_use]
pub fn blocking<F>(function: F) -> Blocking<F> {
    Blocking(function, PhantomData)
}
