//! Handlers one message at a time, for tests and for loops of one's own.

use std::{fmt, sync::Arc, time::Duration};

use futures_util::future::{FutureExt, select_all};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{ConsumerRunner, Env, Stop, Work, supervise::Opening};
use crate::{Consumer, Error, ErrorKind, Incoming, Result};

/// The handlers of a service, called one message at a time when [`step`](Self::step) is, and never by themselves.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> polymq_core::Result<()> {
/// use std::time::Duration;
/// use polymq_core::{Bus, ConsumerFactory, ConsumerRunner};
///
/// let bus = Bus::connect("memory://stepping").await?;
/// let mut consumers = ConsumerFactory::new(&bus);
/// consumers.route("orders", async |order: u64| println!("order {order}"));
/// let mut stepper = ConsumerRunner::new(consumers).stepper().await?;
/// bus.queue("orders").send(&7_u64).await?;
/// assert!(stepper.step(Duration::from_secs(5)).await?);
/// assert!(!stepper.step(Duration::from_millis(10)).await?, "nothing is left");
/// # stepper.close().await }
/// ```
pub struct Stepper(Vec<Stepped>);

struct Stepped {
    env: Arc<Env>,
    consumer: Box<dyn Consumer>,
    /// Fetched and not handled; at most one, but for a call that was given up.
    received: Vec<Incoming>,
    /// What a step has paused over while it was tried in place: with the count of that, and since when.
    tried: Option<(Work, Instant)>,
}

impl ConsumerRunner {
    /// Opens every subscription, with a prefetch of one, for handlers to be called by [`Stepper::step`].
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn stepper(self) -> Result<Stepper> {
        let mut stepper = Stepper(Vec::new());
        for (bus, mut plan) in self.plans()? {
            // What waits stays with the broker, for others.
            plan.options.prefetch = 1;
            let (opening, consumer, origin) =
                Opening::open(bus, plan, Stop::default(), CancellationToken::new(), CancellationToken::new()).await?;
            stepper.0.push(Stepped { env: Arc::new(opening.env(origin)), consumer, received: Vec::new(), tried: None });
        }
        Ok(stepper)
    }
}

impl Stepper {
    /// Waits up to `wait` for a message, lets its handler have it and settles it by the failure policy. `false`: none came.
    /// A retry is a step of its own, unless the policy retries in place. Dropping the future returns the message.
    ///
    /// # Errors
    /// Those of receiving; they are final for their channel. [`ErrorKind::Handler`] when this step would have paused a
    /// subscription that runs (too many failures in a row, or a message that can be neither handled nor moved to the dead
    /// letters); the next step goes on with what is there, which may be the same message.
    pub async fn step(&mut self, wait: Duration) -> Result<bool> {
        let fetched = {
            let any = select_all(self.0.iter_mut().map(|stepped| stepped.fetch().boxed()));
            tokio::time::timeout(wait, any).await.map(|(fetched, _, _)| fetched)
        };
        match fetched {
            Ok(fetched) => fetched?,
            Err(_) => return Ok(false),
        }
        let Some(ready) = self.0.iter_mut().find(|stepped| stepped.has_work()) else { return Ok(false) };
        let next = || Work::one(Arc::clone(&ready.env), ready.received.remove(0));
        let mut work = ready.tried.take().map_or_else(next, |(work, _)| work);
        work.process().await;
        let control = &ready.env.control;
        if control.is_paused() {
            // Nobody else could resume it.
            control.set_paused(false);
            ready.tried = work.take_tried().map(|tried| (tried, Instant::now()));
            return Err(Error::new(ErrorKind::Handler, "paused by its failures; see the log for what has failed")
                .with_operation("step")
                .with_channel(ready.env.origin.address.name())
                .with_hint("remove the cause; the next step goes on"));
        }
        Ok(true)
    }

    /// Ends the subscriptions; what was fetched and not handled returns to the broker.
    ///
    /// # Errors
    /// The first one met; the others are closed all the same.
    pub async fn close(self) -> Result<()> {
        let mut outcome = Ok(());
        for mut stepped in self.0 {
            let settler = stepped.consumer.settler();
            drop(stepped.tried.take());
            stepped.received.drain(..).for_each(|incoming| settler.release(incoming.token, incoming.message));
            outcome = outcome.and(stepped.consumer.close().await);
        }
        outcome
    }
}

impl Stepped {
    fn has_work(&self) -> bool {
        self.tried.is_some() || !self.received.is_empty()
    }

    async fn fetch(&mut self) -> Result<()> {
        if let (Some((_, since)), Some((lease, _))) = (&self.tried, self.env.lease)
            && since.elapsed() >= lease / 3
        {
            // Nobody has extended the loan between two steps: it may be over, and the message with somebody else.
            self.tried = None;
        }
        while !self.has_work() {
            self.consumer.receive(1, &mut self.received).await?;
        }
        Ok(())
    }
}

impl fmt::Debug for Stepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.iter().map(|stepped| &stepped.env)).finish()
    }
}
