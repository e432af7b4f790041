//! Layers around a call of a handler, whatever kind of handler it is.

use std::{
    panic::AssertUnwindSafe,
    sync::{Mutex, PoisonError},
};

use futures_util::{FutureExt, future::BoxFuture};

use super::{Outcome, View, service::Service};
use crate::{Message, layer::NextHandle, runner::Tried};

/// Calls the handler once, through the layers of its bus.
pub(crate) fn layered<'a, S: Service + ?Sized>(service: &'a S, view: View<'a>) -> BoxFuture<'a, Tried> {
    if view.bus.parts().layers.is_empty() {
        return service.call(view);
    }
    Box::pin(async move {
        let calling = AssertUnwindSafe(through_layers(service, view)).catch_unwind();
        calling.await.unwrap_or_else(|panic| Tried::panicked(panic.as_ref()))
    })
}

async fn through_layers<S: Service + ?Sized>(service: &S, view: View<'_>) -> Tried {
    // The layers see an outcome only; what the policy must know besides is kept aside for it.
    let aside = Mutex::new(None::<Tried>);
    let last = |message: Message| -> BoxFuture<'_, Outcome> {
        let aside = &aside;
        Box::pin(async move {
            let outcome = match service.call(View { message: &message, ..view }).await {
                Tried::Outcome(outcome) => return outcome,
                Tried::Undecodable(error) => {
                    let outcome = Outcome::reject(error.to_string());
                    (Tried::Undecodable(error), outcome)
                }
                other => (other, Outcome::retry("the handler did not succeed")),
            };
            *aside.lock().unwrap_or_else(PoisonError::into_inner) = Some(outcome.0);
            outcome.1
        })
    };
    let layers = &view.bus.parts().layers;
    let next = NextHandle {
        address: view.address,
        channel: view.channel,
        group: view.group,
        subscription: view.subscription,
        attempt: view.attempt,
        layers,
        last: &last,
    };
    let outcome = next.handle(view.message.clone()).await;
    match (aside.into_inner().unwrap_or_else(PoisonError::into_inner), outcome) {
        // A layer may have made a success of it.
        (Some(tried), Outcome::Retry { .. } | Outcome::Reject { .. }) => tried,
        (_, outcome) => Tried::Outcome(outcome),
    }
}
