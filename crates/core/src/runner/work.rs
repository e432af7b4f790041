//! Messages that were fetched, and how each is settled by the failure policy.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::future::BoxFuture;

use super::{Env, Handled, HandlerError, Tried};
use crate::{
    AckMode, Bus, Channel, Delivery, ErrorKind, Fate, Incoming, Message, Outcome, Result, RetryMode, SettleError,
    Token, View,
    delivery::attempt_of,
    handler::{Service, layered},
    request::ReplyAddress,
};

/// System header: the handlers of several that have succeeded with the message.
pub(crate) const DONE: &str = "polymq-done";

/// Messages that were fetched and not settled, in order; the front is the one being handled. What is left when
/// this is dropped returns to the broker, so that a cancelled handler is not a failed one.
#[derive(Debug)]
pub(crate) struct Work {
    env: Arc<Env>,
    pending: VecDeque<Incoming>,
    /// Memory for the tokens of a batch.
    tokens: Vec<Token>,
    /// Attempts of the front that were made in place.
    in_place: u32,
    /// The front was acknowledged before it was handled.
    acked: bool,
    /// To be given up for more workers when the limit is raised above one message at a time.
    alone: bool,
}

impl Work {
    pub(crate) fn new(env: Arc<Env>) -> Self {
        Self { env, pending: VecDeque::new(), tokens: Vec::new(), in_place: 0, acked: false, alone: false }
    }

    pub(crate) fn one(env: Arc<Env>, incoming: Incoming) -> Self {
        let mut work = Self::new(env);
        work.pending.push_back(incoming);
        work
    }

    pub(crate) fn extend(&mut self, fetched: impl Iterator<Item = Incoming>) {
        self.pending.extend(fetched);
    }

    /// Gives the memory of what is done for the next fetch: one buffer less that the processor's cache has to hold.
    pub(crate) fn lend(&mut self, fetched: &mut Vec<Incoming>) {
        if self.pending.is_empty() && fetched.capacity() == 0 {
            *fetched = std::mem::take(&mut self.pending).into();
        }
    }

    /// Adds what was fetched and leaves `fetched` empty. Nothing is moved when nothing was left.
    pub(crate) fn refill(&mut self, fetched: &mut Vec<Incoming>) {
        if self.pending.is_empty() && !fetched.is_empty() {
            self.pending = std::mem::take(fetched).into();
        } else {
            self.pending.extend(fetched.drain(..));
        }
    }

    pub(crate) fn take_all(&mut self) -> VecDeque<Incoming> {
        std::mem::take(&mut self.pending)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.pending.len()
    }

    pub(crate) fn env(&self) -> &Env {
        &self.env
    }

    pub(crate) fn token(&self) -> Token {
        self.pending.front().map(|front| front.token).unwrap_or_default()
    }

    /// The tokens of so many at the front, where the broker lends messages.
    pub(crate) fn lent_tokens(&self, count: usize) -> Vec<Token> {
        let count = if self.env.lease.is_some() { count } else { 0 };
        self.pending.iter().take(count).map(|pending| pending.token).collect()
    }

    /// What the handler of the front sees.
    pub(crate) fn view(&self) -> View<'_> {
        let front = &self.pending[0];
        View { attempt: attempt_of(front) + self.in_place, ..self.view_of(front) }
    }

    /// What the handler of a message sees that was not tried again in place.
    #[inline]
    fn view_of<'a>(&'a self, incoming: &'a Incoming) -> View<'a> {
        let env = &*self.env;
        View {
            message: &incoming.message,
            attempt: attempt_of(incoming),
            channel: incoming.channel.as_deref().unwrap_or(env.origin.address.name()),
            details: incoming.details.as_deref(),
            address: &env.origin.address,
            group: env.origin.group.as_deref(),
            bus: &env.bus,
            states: &env.states,
            accept: &env.accept,
            cancelled: &env.cancelled,
        }
    }

    /// What a handler of many sees of those at the front, up to the first that is not for the entry at `index`.
    pub(crate) fn views(&self, index: usize) -> impl Iterator<Item = View<'_>> {
        let mut tried = self.in_place;
        self.pending.iter().take_while(move |incoming| self.is_for(incoming, index)).map(move |incoming| {
            let view = self.view_of(incoming);
            View { attempt: view.attempt + std::mem::take(&mut tried), ..view }
        })
    }

    fn attempt(&self) -> u32 {
        self.pending.front().map_or(1, attempt_of) + self.in_place
    }

    /// Whether the message is for the entry at `index` and nothing else is to be decided about it.
    #[inline]
    fn is_for(&self, incoming: &Incoming, index: usize) -> bool {
        !incoming.message.is_expired()
            && attempt_of(incoming) <= self.env.policy.max_attempts
            && self.env.find(&incoming.message) == Some(index)
    }

    /// Whether the entry at `index` goes on with the front.
    pub(crate) fn starts(&mut self, index: usize) -> bool {
        self.pending.front().is_some_and(|front| self.is_for(front, index))
            && self.may_start()
            && (self.env.retries.is_none() || self.attempt() == 1)
    }

    fn may_start(&self) -> bool {
        let control = &self.env.control;
        !self.env.stop.is_said() && !control.is_paused() && (!self.alone || control.concurrency() == 1)
    }

    /// Handles everything, as long as handlers may start. Dropping the future keeps what is not settled.
    pub(crate) async fn process(&mut self) {
        while !self.pending.is_empty() && self.may_start() {
            self.process_front().await;
        }
    }

    /// As [`process`](Self::process), until the limit is raised above one message at a time.
    pub(crate) async fn process_alone(&mut self) {
        self.alone = true;
        self.process().await;
    }

    async fn process_front(&mut self) {
        let Some(front) = self.pending.front() else { return };
        if front.message.is_expired() {
            self.env.control.counters.expired.fetch_add(1, Ordering::Relaxed);
            return self.give_up(self.env.policy.expired, "expired", None).await;
        }
        let attempt = attempt_of(front);
        if attempt > self.env.policy.max_attempts {
            // Its last attempt ended without an answer: the process was killed, or the connection lost.
            let reason = format!("{} attempts were made without an answer", attempt - 1);
            return self.give_up(self.env.policy.exhausted, &reason, None).await;
        }
        let Some(index) = self.env.find(&front.message) else {
            self.env.control.counters.unwanted.fetch_add(1, Ordering::Relaxed);
            let reason = match (front.message.kind(), front.message.version()) {
                (Some(kind), Some(version)) => format!("no handler for the kind {kind} version {version}"),
                (Some(kind), None) => format!("no handler for the kind {kind}"),
                (None, _) => "no handler for a message without a kind".to_owned(),
            };
            return self.give_up(self.env.policy.unwanted, &reason, None).await;
        };
        if self.env.ack_mode != AckMode::AfterSuccess || (attempt > 1 && self.env.retries.is_some()) {
            return self.process_with_care(index, attempt).await;
        }
        let service = Arc::clone(&self.env.entries[index].service);
        service.drive(index, self).await;
    }

    /// The front, where it is acknowledged in another mode, or as one of a limited number of retries.
    fn process_with_care(&mut self, index: usize, attempt: u32) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let env = Arc::clone(&self.env);
            let service = &env.entries[index].service;
            let _retry_place = match &env.retries {
                Some(limit) if attempt > 1 => limit.acquire().await.ok(),
                _ => None,
            };
            if env.ack_mode == AckMode::OnReceipt {
                if let Err(error) = env.origin.settler.ack(self.token()).await {
                    tracing::warn!(channel = env.origin.address.name(), %error, "not acknowledged on receipt; it comes again");
                    self.pop();
                    return;
                }
                self.acked = true;
            }
            let tried = env.guard(self.token(), layered(service.as_ref(), self.view())).await;
            self.settle(service.as_ref(), tried).await;
        })
    }

    /// Acknowledges the front when the answer is at hand, which costs nothing. `false`: settle it the long way.
    pub(crate) fn ack_front(&mut self) -> bool {
        if self.env.callbacks.handled.is_some() {
            return false;
        }
        match self.env.origin.settler.ack(self.token()).at_hand() {
            Ok(Err(error)) => self.not_acknowledged(&error),
            // An answer that comes later can only be that the message comes again: nobody needs to wait for it.
            Ok(Ok(())) | Err(_) => self.env.control.succeeded(1),
        }
        (self.in_place, self.acked) = (0, false);
        // Dropped where it is: taken out, it would be moved once more.
        self.pending.drain(..self.pending.len().min(1));
        true
    }

    /// The same for `count` messages at the front.
    pub(crate) fn ack_fronts(&mut self, count: usize) -> bool {
        if self.env.callbacks.handled.is_some() {
            return false;
        }
        self.tokens.clear();
        self.tokens.extend(self.pending.iter().take(count).map(|front| front.token));
        match self.env.origin.settler.ack_many(&self.tokens).at_hand() {
            Ok(Err(error)) => self.not_acknowledged(&error),
            Ok(Ok(())) | Err(_) => self.env.control.succeeded(count as u64),
        }
        self.in_place = 0;
        self.pending.drain(..count);
        true
    }

    fn pop(&mut self) -> Option<Incoming> {
        self.in_place = 0;
        self.acked = false;
        self.pending.pop_front()
    }

    fn not_acknowledged(&self, error: &crate::Error) {
        tracing::warn!(channel = self.env.origin.address.name(), %error, "not acknowledged; the message comes again");
        self.env.callbacks.transport_error(&self.env.origin.address, error);
    }

    /// Settles the front by what its handler did, trying again in place as the policy says.
    ///
    /// Boxed, like all that is not the way of most messages: their future is made for every fetch and stays small.
    pub(crate) fn settle<'a, S: Service + ?Sized>(&'a mut self, service: &'a S, mut tried: Tried) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            while let Some(delay) = self.decide(tried).await {
                let env = Arc::clone(&self.env);
                tokio::select! {
                    biased;
                    // Not settled: it returns to the broker with what else is left.
                    () = env.stop.said() => return,
                    () = self.wait(delay) => {}
                }
                self.in_place += 1;
                if env.control.is_paused() {
                    // It stays at the front, for when the channel is resumed.
                    return;
                }
                let _place = match &env.retries {
                    Some(limit) => limit.acquire().await.ok(),
                    None => None,
                };
                tried = env.guard(self.token(), layered(service, self.view())).await;
            }
        })
    }

    /// Waits in place; a loan is extended meanwhile.
    async fn wait(&self, delay: Duration) {
        self.env.lent(&[self.token()], tokio::time::sleep(delay)).await;
    }

    /// Does what the policy says; `Some` is the delay before another attempt in place.
    async fn decide(&mut self, tried: Tried) -> Option<Duration> {
        let env = Arc::clone(&self.env);
        let counters = &env.control.counters;
        let attempt = self.attempt();
        let tried = match tried {
            Tried::Undecodable(error) => {
                counters.undecodable.fetch_add(1, Ordering::Relaxed);
                let reason = format!("undecodable: {}", error.message());
                self.report(&reason, attempt);
                self.give_up(env.policy.undecodable, &reason, None).await;
                return None;
            }
            Tried::Partly { done, failed } => {
                if let Some(front) = self.pending.front_mut() {
                    front.message.set_system_header(DONE, done);
                }
                *failed
            }
            other => other,
        };
        match &tried {
            Tried::Panicked(_) => counters.panicked.fetch_add(1, Ordering::Relaxed),
            Tried::TimedOut(_) => counters.timed_out.fetch_add(1, Ordering::Relaxed),
            _ => 0,
        };
        match tried.into_outcome() {
            Outcome::Ack => {
                env.control.succeeded(1);
                self.finish(Settlement::Ack).await;
            }
            Outcome::Answer(answer) => match answer.message(&env.bus) {
                Ok(reply) => {
                    env.control.succeeded(1);
                    self.finish(Settlement::Answer(&reply)).await;
                }
                Err(error) => self.cannot_send("its answer", &error, attempt).await,
            },
            Outcome::Send(sends) => match sends.messages(&env.bus) {
                Ok(messages) => {
                    env.control.succeeded(1);
                    self.finish(Settlement::Send(&messages)).await;
                }
                Err(error) => self.cannot_send("what it sends", &error, attempt).await,
            },
            Outcome::Drop { reason } => {
                counters.dropped.fetch_add(1, Ordering::Relaxed);
                self.finish(Settlement::Drop(&reason)).await;
            }
            Outcome::Reject { reason } => {
                env.control.failed(env.policy.pause_after_failures);
                self.report(&reason, attempt);
                self.give_up(env.policy.exhausted, &reason, Some(&reason)).await;
            }
            Outcome::Defer { after } => {
                counters.deferred.fetch_add(1, Ordering::Relaxed);
                self.finish(Settlement::Defer(after)).await;
            }
            Outcome::Retry { after, error } => {
                let error = error.to_string();
                if env.control.failed(env.policy.pause_after_failures) {
                    tracing::error!(channel = env.origin.address.name(), "paused after too many failures in a row");
                }
                self.report(&error, attempt);
                if attempt >= env.policy.max_attempts {
                    let reason = format!("{attempt} attempts failed, the last with: {error}");
                    self.give_up(env.policy.exhausted, &reason, Some(&error)).await;
                    return None;
                }
                let delay = after.unwrap_or_else(|| env.policy.backoff.delay(attempt));
                counters.retried.fetch_add(1, Ordering::Relaxed);
                if env.policy.mode == RetryMode::InPlace && !self.acked {
                    return Some(delay);
                }
                self.finish(Settlement::Retry(delay, &error)).await;
            }
        }
        None
    }

    /// What a handler has returned can never leave.
    async fn cannot_send(&mut self, what: &str, error: &crate::Error, attempt: u32) {
        let env = Arc::clone(&self.env);
        env.control.failed(env.policy.pause_after_failures);
        let reason = format!("{what} cannot be sent: {error}");
        self.report(&reason, attempt);
        self.give_up(env.policy.exhausted, &reason, Some(&reason)).await;
    }

    fn report(&self, error: &str, attempt: u32) {
        let Some(front) = self.pending.front() else { return };
        let (address, message) = (&self.env.origin.address, &front.message);
        tracing::warn!(channel = address.name(), id = ?message.id(), attempt, error, "message not handled");
        self.env.callbacks.handler_error(HandlerError { address, message, attempt, error });
    }

    fn give_up<'a>(&'a mut self, fate: Fate, reason: &'a str, last_error: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let env = Arc::clone(&self.env);
            let (settlement, counter) = match fate {
                Fate::DeadLetter => (Settlement::Bury(reason, last_error), &env.control.counters.dead_lettered),
                Fate::Drop => (Settlement::Drop(reason), &env.control.counters.dropped),
            };
            self.finish(settlement).await;
            counter.fetch_add(1, Ordering::Relaxed);
        })
    }

    /// Settles the front, trying for as long as it takes: the message stays unsettled meanwhile, so nothing is lost.
    async fn finish(&mut self, settlement: Settlement<'_>) {
        let (env, attempt, acked) = (Arc::clone(&self.env), self.attempt(), self.acked);
        if let Some(front) = self.pending.front() {
            let (address, message) = (&env.origin.address, &front.message);
            env.callbacks.handled(Handled { address, message, attempt, outcome: settlement.name() });
        }
        let Some(incoming) = self.pop() else { return };
        // Only a message that is given up or answered: nothing more on the way of all the others.
        let asking = settlement.ends_a_request().then(|| ReplyAddress::of(&incoming.message)).flatten();
        let mut delivery = Delivery::new(incoming, Arc::clone(&env.origin)).with_attempt(attempt);
        if acked || env.ack_mode == AckMode::Always {
            if let (Some(asking), Settlement::Answer(reply)) = (&asking, settlement)
                && let Err(error) = asking.send(&env.bus, reply.clone()).await
            {
                tracing::warn!(channel = env.origin.address.name(), %error, "not answered");
            }
            if let Settlement::Send(messages) = settlement {
                for (channel, message) in messages {
                    if let Err(error) = channel.send_message(message.clone()).await {
                        tracing::warn!(channel = env.origin.address.name(), %error, "not sent");
                    }
                }
            }
            // The mode says that the first settlement is the last, whatever the handler did.
            if acked {
                delivery.forget();
            } else if let Err(error) = delivery.ack().await {
                drop(crate::Error::from(error));
            }
            return;
        }
        let mut pause = Duration::from_millis(100);
        loop {
            let (error, again) = match settlement.apply(delivery, &env.bus).await {
                Ok(()) => {
                    if let (Some(asking), Settlement::Bury(reason, _) | Settlement::Drop(reason)) = (asking, settlement)
                    {
                        asking.send_error(&env.bus, reason).await;
                    }
                    return;
                }
                Err(error) => error.into_parts(),
            };
            env.callbacks.transport_error(&env.origin.address, &error);
            let (error, again) = match settlement {
                // It can never leave: what was to be answered with it is kept by the dead letters.
                Settlement::Send(_) if is_hopeless(&error) => {
                    let reason = format!("what it sends cannot be sent: {error}");
                    match again.bury(&reason, Some(&reason)).await {
                        Ok(()) => {
                            env.control.counters.dead_lettered.fetch_add(1, Ordering::Relaxed);
                            return;
                        }
                        Err(error) => error.into_parts(),
                    }
                }
                _ => (error, again),
            };
            if matches!(error.kind(), ErrorKind::Stale | ErrorKind::Closed) {
                tracing::warn!(channel = env.origin.address.name(), %error, "not settled; the message comes again");
                again.release();
                return;
            }
            tracing::warn!(channel = env.origin.address.name(), %error, "not settled yet; trying again");
            tokio::select! {
                biased;
                () = env.stop.said() => return again.release(),
                () = tokio::time::sleep(pause) => {}
            }
            pause = (pause * 2).min(Duration::from_secs(10));
            delivery = again;
        }
    }
}

/// Whether a message can never be sent to where it should go.
fn is_hopeless(error: &crate::Error) -> bool {
    use ErrorKind::{InvalidInput, PermissionDenied, Refused, TooLarge, Unroutable, Unsupported};
    matches!(error.kind(), InvalidInput | PermissionDenied | Refused | TooLarge | Unroutable | Unsupported)
}

/// What is to be done with a delivery.
#[derive(Clone, Copy)]
enum Settlement<'a> {
    Ack,
    Answer(&'a Message),
    Send(&'a [(Channel, Message)]),
    Drop(&'a str),
    Defer(Duration),
    Retry(Duration, &'a str),
    Bury(&'a str, Option<&'a str>),
}

impl Settlement<'_> {
    fn name(self) -> &'static str {
        match self {
            Self::Ack | Self::Answer(_) | Self::Send(_) => "acked",
            Self::Drop(_) => "dropped",
            Self::Defer(_) => "deferred",
            Self::Retry(..) => "retried",
            Self::Bury(..) => "dead-lettered",
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
            Self::Send(messages) => delivery.ack_with(messages).await,
            Self::Drop(reason) => delivery.drop_message(reason).await,
            Self::Defer(after) => delivery.again(attempt, after, None).await,
            Self::Retry(after, error) => delivery.again(attempt.saturating_add(1), after, Some(error)).await,
            Self::Bury(reason, last_error) => delivery.bury(reason, last_error).await,
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        for (at, incoming) in self.pending.drain(..).enumerate() {
            if !(at == 0 && self.acked) {
                self.env.origin.settler.release(incoming.token, incoming.message);
            }
        }
    }
}
