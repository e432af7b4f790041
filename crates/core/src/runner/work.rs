//! Messages that were fetched: who handles each, and the short way to its acknowledgement.

use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::sync::SemaphorePermit;

use super::{Env, Tried};
use crate::{AckMode, Incoming, Token, View, handler::layered};

/// System header: the handlers of several that have succeeded with the message.
pub(crate) const DONE: &str = "polymq-done";

/// Messages that were fetched and not settled, in order; the front is the one being handled. What is left when
/// this is dropped returns to the broker, so that a cancelled handler is not a failed one.
#[derive(Debug)]
pub(crate) struct Work {
    pub(super) env: Arc<Env>,
    pub(super) pending: VecDeque<Incoming>,
    /// Memory for the tokens of a batch.
    tokens: Vec<Token>,
    /// Attempts of the front that were made in place.
    pub(super) in_place: u32,
    /// What the first of them failed with.
    pub(super) first_error: Option<String>,
    /// The front was acknowledged before it was handled.
    pub(super) acked: bool,
    /// To be given up for more workers when the limit is raised above one message at a time.
    alone: bool,
}

impl Work {
    pub(crate) fn new(env: Arc<Env>) -> Self {
        Self {
            env,
            pending: VecDeque::new(),
            tokens: Vec::new(),
            in_place: 0,
            first_error: None,
            acked: false,
            alone: false,
        }
    }

    /// To be handled one message at a time, for as long as that is the limit.
    pub(crate) fn alone(env: Arc<Env>) -> Self {
        let mut work = Self::new(env);
        work.alone = true;
        work
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

    /// The front as work of its own, when it was tried in place: with the count of that.
    pub(crate) fn take_tried(&mut self) -> Option<Self> {
        if self.in_place == 0 {
            return None;
        }
        let mut tried = Self::one(Arc::clone(&self.env), self.pending.pop_front()?);
        tried.in_place = std::mem::take(&mut self.in_place);
        tried.first_error = self.first_error.take();
        Some(tried)
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

    /// What the handler of the front sees. Written out where it is called, most of it is never looked at.
    #[inline(always)]
    pub(crate) fn view(&self) -> View<'_> {
        let front = &self.pending[0];
        View { attempt: front.attempt() + self.in_place, ..self.view_of(front) }
    }

    /// What the handler of a message sees that was not tried again in place.
    #[inline(always)]
    fn view_of<'a>(&'a self, incoming: &'a Incoming) -> View<'a> {
        let env = &*self.env;
        View {
            message: &incoming.message,
            attempt: incoming.attempt(),
            channel: incoming.channel().unwrap_or(env.origin.address.name()),
            details: incoming.details.as_deref(),
            address: &env.origin.address,
            group: env.origin.group.as_deref(),
            subscription: env.control.number,
            bus: &env.bus,
            states: &env.states,
            accept: &env.accept,
            cancelled: &env.cancelled,
        }
    }

    /// Shows `look` what a handler of many sees of the front, which [`starts`](Self::starts), and of those behind it up to the
    /// first that is not for the entry at `index`, or until it says `false`. Not an iterator: it would make and move the whole of each view.
    #[inline(always)]
    pub(crate) fn look_at(&self, index: usize, most: usize, mut look: impl FnMut(&View<'_>) -> bool) {
        let mut tried = self.in_place;
        for (at, incoming) in self.pending.iter().take(most).enumerate() {
            // The front is not looked at twice: it may expire in between, and its batch be empty.
            if at > 0 && !self.is_for(incoming, index) {
                return;
            }
            let view = self.view_of(incoming);
            if !look(&View { attempt: view.attempt + std::mem::take(&mut tried), ..view }) {
                return;
            }
        }
    }

    pub(super) fn attempt(&self) -> u32 {
        self.pending.front().map_or(1, Incoming::attempt) + self.in_place
    }

    /// Whether the message is for the entry at `index` and nothing else is to be decided about it.
    #[inline]
    fn is_for(&self, incoming: &Incoming, index: usize) -> bool {
        !incoming.message.is_expired()
            && incoming.attempt() <= self.env.policy.max_attempts
            // Each of a limited number of retries is a call of its own, with a place among them.
            && (self.env.retries.is_none() || incoming.attempt() == 1)
            && self.env.find(&incoming.message) == Some(index)
    }

    /// Whether the entry at `index` goes on with the front.
    pub(crate) fn starts(&mut self, index: usize) -> bool {
        self.pending.front().is_some_and(|front| self.is_for(front, index))
            && self.may_start()
            && (self.env.retries.is_none() || self.in_place == 0)
    }

    fn may_start(&self) -> bool {
        let control = &self.env.control;
        !self.env.stop.is_said() && !control.is_paused() && (!self.alone || control.concurrency() == 1)
    }

    /// Handles everything, as long as handlers may start. Dropping the future keeps what is not settled.
    pub(crate) async fn process(&mut self) {
        while !self.pending.is_empty() && self.may_start() {
            match self.pending.front().and_then(|front| self.plain_entry(front)) {
                Some(index) => Arc::clone(&self.env.entries[index].service).drive(index, self).await,
                None => self.process_front().await,
            }
        }
    }

    /// The entry that takes the message, where its service may drive it: what is said of most messages, found without a wait.
    #[inline]
    fn plain_entry(&self, front: &Incoming) -> Option<usize> {
        let (env, attempt) = (&*self.env, front.attempt() + self.in_place);
        let is_plain = env.ack_mode == AckMode::AfterSuccess
            && (env.retries.is_none() || attempt == 1)
            && attempt <= env.policy.max_attempts
            && !front.message.is_expired();
        if is_plain { env.find(&front.message) } else { None }
    }

    /// The front, whatever is to be done with it.
    fn process_front(&mut self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let Some(front) = self.pending.front() else { return };
            if front.message.is_expired() {
                self.env.control.counters.expired.fetch_add(1, Ordering::Relaxed);
                return self.give_up(self.env.policy.expired, "expired", None).await;
            }
            let attempt = front.attempt() + self.in_place;
            if attempt > self.env.policy.max_attempts {
                // Its last attempt ended without an answer: the process was killed, or the connection lost.
                let reason = format!("{} attempts were made without an answer", attempt - 1);
                return self.give_up(self.env.policy.exhausted, &reason, None).await;
            }
            match self.env.find(&front.message) {
                Some(index) => self.process_with_care(index).await,
                None => {
                    self.env.control.counters.unwanted.fetch_add(1, Ordering::Relaxed);
                    let reason = match (front.message.kind(), front.message.version()) {
                        (Some(kind), Some(version)) => format!("no handler for the kind {kind} version {version}"),
                        (Some(kind), None) => format!("no handler for the kind {kind}"),
                        (None, _) => "no handler for a message without a kind".to_owned(),
                    };
                    self.give_up(self.env.policy.unwanted, &reason, None).await;
                }
            }
        })
    }

    /// The front, where it is acknowledged in another mode, or as one of a limited number of retries.
    async fn process_with_care(&mut self, index: usize) {
        let env = Arc::clone(&self.env);
        let service = &env.entries[index].service;
        let Some(place) = self.retry_place(&env).await else { return };
        if env.ack_mode == AckMode::OnReceipt {
            // Before its answer: what is cut off then is acknowledged still, and must not be given back too.
            self.acked = true;
            if let Err(error) = env.origin.settler.ack(self.token()).await {
                tracing::warn!(channel = env.origin.address.name(), %error, "not acknowledged on receipt; it comes again");
                // It was not handled: given back, it is handled once at most.
                if let Some(front) = self.pop() {
                    env.origin.settler.release(front.token, front.message);
                }
                return;
            }
        }
        let tried = self.guard(layered(service.as_ref(), self.view())).await;
        // Settling may try again in place, which takes a place of its own.
        drop(place);
        self.settle(service.as_ref(), tried).await;
    }

    /// A place among the retries, where their number is limited; a loan is extended meanwhile. `None`: no handler may start
    /// any more, and the front stays.
    pub(super) async fn retry_place<'a>(&self, env: &'a Env) -> Option<Option<SemaphorePermit<'a>>> {
        let Some(limit) = env.retries.as_ref().filter(|_| self.attempt() > 1) else { return Some(None) };
        let lent = [self.token()];
        let place = tokio::select! {
            biased;
            () = env.stop.said() => return None,
            place = env.lent(&lent, limit.acquire()) => place,
        };
        if self.may_start() { Some(place.ok()) } else { None }
    }

    /// Runs a call for the front with what is around it.
    pub(crate) async fn guard(&self, call: impl Future<Output = Tried>) -> Tried {
        let call = async {
            match self.within_time(call).await {
                Ok(tried) => tried,
                Err(limit) => Tried::TimedOut(limit),
            }
        };
        self.env.lent(&[self.token()], call).await
    }

    /// A call for the front in the time of its handler; `Err` is the limit that has passed.
    pub(crate) async fn within_time<T>(&self, call: impl Future<Output = T>) -> Result<T, Duration> {
        match self.limit() {
            None => Ok(call.await),
            Some(limit) => tokio::time::timeout(limit, call).await.map_err(|_| limit),
        }
    }

    fn limit(&self) -> Option<Duration> {
        let front = self.pending.front().filter(|_| self.env.timed)?;
        self.env.entries[self.env.find(&front.message)?].timeout
    }

    /// Acknowledges the front when the answer is at hand, which costs nothing. `false`: settle it the long way.
    pub(crate) fn ack_front(&mut self) -> bool {
        if self.env.callbacks.handled.is_some() {
            return false;
        }
        // What is counted is that it was handled; an answer that comes later can only be that the message comes again, and
        // nobody needs to wait for it.
        self.env.control.succeeded(1);
        if let Some(Err(error)) = self.env.origin.settler.ack(self.token()).answer_or_go_on() {
            self.not_acknowledged(&error);
        }
        self.pop();
        true
    }

    /// The same for `count` messages at the front.
    pub(crate) fn ack_fronts(&mut self, count: usize) -> bool {
        if self.env.callbacks.handled.is_some() {
            return false;
        }
        self.tokens.clear();
        self.tokens.extend(self.pending.iter().take(count).map(|front| front.token));
        self.env.control.succeeded(count as u64);
        if let Some(Err(error)) = self.env.origin.settler.ack_many(&self.tokens).answer_or_go_on() {
            self.not_acknowledged(&error);
        }
        self.in_place = 0;
        self.pending.drain(..count);
        true
    }

    pub(super) fn pop(&mut self) -> Option<Incoming> {
        self.in_place = 0;
        self.acked = false;
        self.pending.pop_front()
    }

    fn not_acknowledged(&self, error: &crate::Error) {
        tracing::warn!(channel = self.env.origin.address.name(), %error, "not acknowledged; the message comes again");
        self.env.callbacks.transport_error(&self.env.origin.address, error);
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
