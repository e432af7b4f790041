//! The time between telling the broker what becomes of a delivery and its answer.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::runtime::Handle;

use crate::{Completion, Delivery, SettleError};

/// A delivery whose settlement is on its way. Dropped before the answer is there, as by a time-out or a drain that has taken too
/// long, it must not be released: the message would be at the broker twice when the settlement has its effect still.
pub(crate) struct Settling(Option<(Delivery, Completion<()>)>);

impl Settling {
    pub(crate) fn new(delivery: Delivery, answer: Completion<()>) -> Self {
        Self(Some((delivery, answer)))
    }
}

impl Future for Settling {
    type Output = Result<(), SettleError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = match &mut self.0 {
            Some((_, answer)) => ready!(Pin::new(answer).poll(cx)),
            None => return Poll::Pending,
        };
        self.0.take().map_or(Poll::Pending, |(delivery, _)| Poll::Ready(delivery.settled(answer)))
    }
}

impl Drop for Settling {
    fn drop(&mut self) {
        let Some((mut delivery, answer)) = self.0.take() else { return };
        delivery.keep();
        // Without a runtime the connection has none either: what was not settled returns when that ends.
        let Ok(runtime) = Handle::try_current() else { return };
        runtime.spawn(async move {
            if let Err(error) = answer.await {
                let channel = delivery.channel();
                tracing::warn!(channel, %error, "not settled after all; the message returns to the broker");
                delivery.release();
            }
        });
    }
}
