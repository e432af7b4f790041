//! The end of a message at its broker, tried for as long as it takes.

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::{Env, Handled, control::Counters, work::Work};
use crate::{
    AckMode, Bus, Channel, Delivery, Error, ErrorKind, HealthState, Message, Result, Retry, SettleError,
    dead_letter::Errors, request::ReplyAddress,
};

impl Work {
    /// Settles the front, trying for as long as it takes: the message stays unsettled meanwhile, so nothing is lost. What is
    /// counted is what became of it.
    pub(super) async fn finish(&mut self, settlement: Settlement<'_>) {
        let (env, attempt, acked) = (Arc::clone(&self.env), self.attempt(), self.acked);
        // The mode says that its acknowledgement is its end, whatever the handler did.
        let at_once = acked || env.ack_mode == AckMode::Always;
        if let Some(front) = self.pending.front() {
            let (address, message) = (&env.origin.address, &front.message);
            let outcome = if at_once && settlement.failure().is_some() { "dropped" } else { settlement.name() };
            env.callbacks.handled(Handled { address, message, attempt, outcome });
        }
        let Some(incoming) = self.pop() else { return };
        // Only a message that is given up or answered: nothing more on the way of all the others.
        let ends = settlement.ends_a_request() || at_once && settlement.failure().is_some();
        let asking = ends.then(|| ReplyAddress::of(&incoming.message)).flatten();
        let delivery = Delivery::new(incoming, Arc::clone(&env.origin)).with_attempt(attempt);
        if at_once {
            end_at_once(&env, delivery, acked, settlement, asking).await;
        } else {
            insist(&env, delivery, settlement, asking).await;
        }
    }
}

/// Acknowledges, and sends what is to be sent once.
async fn end_at_once(
    env: &Env,
    delivery: Delivery,
    acked: bool,
    settlement: Settlement<'_>,
    asking: Option<ReplyAddress>,
) {
    let channel = env.origin.address.name();
    // Before anything is waited for: what is cut off then must not give the message back.
    let unsettled = if acked {
        delivery.forget();
        None
    } else {
        Some(delivery)
    };
    // The answer is the acknowledgement there.
    let answers = unsettled.is_some() && env.origin.capabilities.direct;
    match (settlement, &asking) {
        (Settlement::Answer(reply), Some(asking)) if !answers => {
            if let Err(error) = asking.send(&env.bus, reply.clone()).await {
                tracing::warn!(channel, %error, "not answered");
            }
        }
        (Settlement::Send(messages, _), _) => {
            for (to, message) in messages {
                if let Err(error) = to.send_message(message.clone()).await {
                    tracing::warn!(channel, %error, "not sent");
                }
            }
        }
        _ => {}
    }
    if let Some(delivery) = unsettled {
        let settled = match settlement {
            Settlement::Answer(_) if answers => match settlement.apply(delivery, &env.bus).await {
                // It is acknowledged whatever becomes of its answer.
                Err(refused) if !refused.is_over() => {
                    let (error, delivery) = refused.into_parts();
                    tracing::warn!(channel, %error, "not answered");
                    delivery.ack().await
                }
                answered => answered,
            },
            _ => delivery.ack().await,
        };
        if let Err(error) = settled {
            let error = Error::from(error);
            tracing::warn!(channel, %error, "not acknowledged; the message comes again");
            return env.callbacks.transport_error(&env.origin.address, &error);
        }
    }
    let Some(reason) = settlement.failure() else { return };
    env.control.counters.dropped.fetch_add(1, Ordering::Relaxed);
    if let Some(asking) = asking {
        asking.send_error(&env.bus, reason).await;
    }
}

/// Settles, trying for as long as it takes: the message stays unsettled meanwhile. What can never be done goes to the dead
/// letters instead; where even those cannot take it, the subscription is paused with the message at its broker.
async fn insist(env: &Env, mut delivery: Delivery, settlement: Settlement<'_>, mut asking: Option<ReplyAddress>) {
    let channel = env.origin.address.name();
    let hopeless = OnceLock::new();
    let (mut settlement, mut brief) = (settlement, false);
    let mut pause = FIRST_PAUSE;
    loop {
        let settled = match settlement {
            Settlement::Bury(reason, _) if brief => delivery.bury_briefly(reason).await,
            _ => settlement.apply(delivery, &env.bus).await,
        };
        let (error, again, over) = match settled {
            Ok(()) => {
                if let Some(counter) = settlement.counter(&env.control.counters) {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                if let (Some(asking), Settlement::Bury(reason, _) | Settlement::Drop(reason)) = (asking, settlement) {
                    asking.send_error(&env.bus, reason).await;
                }
                return;
            }
            Err(error) => {
                let over = error.is_over();
                let (error, again) = error.into_parts();
                (error, again, over)
            }
        };
        env.callbacks.transport_error(&env.origin.address, &error);
        if settlement.can_never_be(&error) || pause == LONGEST_PAUSE && settlement.is_not_allowed(&error) {
            tracing::warn!(channel, %error, "not settled, and it never can be in this way");
            match settlement {
                Settlement::Bury(..) if brief => {
                    tracing::error!(channel, %error, "paused: a message can be neither handled nor moved to the dead letters");
                    env.control.set_paused(true);
                    return again.release();
                }
                // What is told about its failure may be what makes it too large.
                Settlement::Bury(..) => brief = true,
                _ => {
                    asking = asking.or_else(|| ReplyAddress::of(again.message()));
                    let reason: &String = hopeless.get_or_init(|| format!("{}: {error}", settlement.what()));
                    settlement = Settlement::Bury(
                        reason,
                        Errors { first: None, last: Some(settlement.failure().unwrap_or(reason)) },
                    );
                }
            }
            delivery = again;
            continue;
        }
        // Nothing settles a message of a bus that is closed; the target of a send may be, and the message's own not.
        if over || env.bus.health().state == HealthState::Closed {
            tracing::warn!(channel, %error, "not settled; the message comes again");
            return again.release();
        }
        tracing::warn!(channel, %error, "not settled yet; trying again");
        tokio::select! {
            biased;
            () = env.stop.said() => return again.release(),
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
        delivery = again;
    }
}

/// How long it waits between two tries; 13 s have passed when it is the longest for the first time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What is to be done with a delivery.
#[derive(Clone, Copy)]
pub(super) enum Settlement<'a> {
    Ack,
    Answer(&'a Message),
    /// With how many of them were accepted already.
    Send(&'a [(Channel, Message)], &'a AtomicUsize),
    Drop(&'a str),
    Defer(Duration),
    Retry(Duration, &'a str),
    Bury(&'a str, Errors<'a>),
}

impl<'a> Settlement<'a> {
    fn name(self) -> &'static str {
        match self {
            Self::Ack | Self::Answer(_) | Self::Send(..) => "acked",
            Self::Drop(_) => "dropped",
            Self::Defer(_) => "deferred",
            Self::Retry(..) => "retried",
            Self::Bury(..) => "dead-lettered",
        }
    }

    /// What it is that can never be, in a sentence.
    fn what(self) -> &'static str {
        match self {
            Self::Answer(_) => "its answer cannot be sent",
            Self::Send(..) => "what it sends cannot be sent",
            _ => "it cannot come again",
        }
    }

    /// Whether no further try can help.
    fn can_never_be(self, error: &Error) -> bool {
        use ErrorKind::{
            Config, Decode, Encode, Handler, InvalidInput, Other, PermissionDenied, Refused, TooLarge, Unroutable,
            Unsupported,
        };
        error.retry() == Retry::Never
            && match (self, error.kind()) {
                // It is the message itself.
                (Self::Ack | Self::Drop(_), _) => false,
                (_, Config | Decode | Encode | InvalidInput | TooLarge | Unsupported) => true,
                // It is where it should go, or a layer on the way.
                (Self::Answer(_) | Self::Send(..), Handler | Other | PermissionDenied | Refused | Unroutable) => true,
                _ => false,
            }
    }

    /// Whether the place where the message should wait, or what it sends should go, is not there, or not for us. It may be about to
    /// come, as while a broker starts; when it does not, the dead letters are better than a queue that stands still.
    fn is_not_allowed(self, error: &Error) -> bool {
        use ErrorKind::{Conflict, NotFound, PermissionDenied, Refused, Unroutable};
        match self {
            Self::Retry(..) | Self::Defer(_) => {
                matches!(error.kind(), NotFound | PermissionDenied | Refused | Unroutable)
            }
            Self::Send(..) => matches!(error.kind(), Conflict | NotFound) && error.retry() == Retry::Never,
            _ => false,
        }
    }

    /// Why the message was not handled.
    fn failure(self) -> Option<&'a str> {
        match self {
            Self::Ack | Self::Answer(_) | Self::Send(..) => None,
            Self::Drop(reason) | Self::Bury(reason, _) | Self::Retry(_, reason) => Some(reason),
            Self::Defer(_) => Some("its handler has put it off"),
        }
    }

    /// What counts it. That a handler has succeeded is counted when it has.
    fn counter(self, counters: &Counters) -> Option<&AtomicU64> {
        match self {
            Self::Ack | Self::Answer(_) | Self::Send(..) => None,
            Self::Drop(_) => Some(&counters.dropped),
            Self::Defer(_) => Some(&counters.deferred),
            Self::Retry(..) => Some(&counters.retried),
            Self::Bury(..) => Some(&counters.dead_lettered),
        }
    }

    fn ends_a_request(self) -> bool {
        matches!(self, Self::Answer(_) | Self::Bury(..) | Self::Drop(_))
    }

    async fn apply(self, delivery: Delivery, bus: &Bus) -> Result<(), SettleError> {
        let attempt = delivery.attempt();
        match self {
            Self::Ack => delivery.ack().await,
            Self::Answer(reply) => delivery.answer(bus, reply.clone()).await,
            Self::Send(messages, accepted) => delivery.ack_with(messages, accepted).await,
            Self::Drop(reason) => delivery.drop_message(reason).await,
            Self::Defer(after) => delivery.again(attempt, after, None).await,
            Self::Retry(after, error) => delivery.again(attempt.saturating_add(1), after, Some(error)).await,
            Self::Bury(reason, errors) => delivery.bury(reason, errors).await,
        }
    }
}
