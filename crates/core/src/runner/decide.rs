//! What becomes of the front by what its handler did: the failure policy.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use polymq_serializers::DecodeError;

use super::{
    HandlerError, Tried,
    settlement::Settlement,
    tried::panic_text,
    work::{DONE, Work},
};
use crate::{
    AckMode, Error, ErrorKind, Fate, Outcome, Result, RetryMode,
    dead_letter::Errors,
    handler::{Service, layered},
};

impl Work {
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
                    () = self.wait_in_place(delay) => {}
                }
                self.in_place += 1;
                if env.control.is_paused() {
                    // It stays at the front, for when the channel is resumed.
                    return;
                }
                let Some(_place) = self.retry_place(&env).await else { return };
                tried = self.guard(layered(service, self.view())).await;
            }
        })
    }

    /// Waits in place; a loan is extended meanwhile.
    async fn wait_in_place(&self, delay: Duration) {
        self.env.lent(&[self.token()], tokio::time::sleep(delay)).await;
    }

    /// Does what the policy says; `Some` is the delay before another attempt in place.
    async fn decide(&mut self, tried: Tried) -> Option<Duration> {
        let env = Arc::clone(&self.env);
        let counters = &env.control.counters;
        let attempt = self.attempt();
        let tried = match tried {
            Tried::Partly { done, failed } => {
                if let Some(front) = self.pending.front_mut() {
                    front.message.set_system_header(DONE, done);
                }
                *failed
            }
            other => other,
        };
        let tried = match tried {
            Tried::Undecodable(error) => {
                counters.undecodable.fetch_add(1, Ordering::Relaxed);
                let reason = format!("undecodable: {}", error.message());
                self.report(&reason, attempt);
                let fate = if is_oversize(&error) { env.policy.oversize } else { env.policy.undecodable };
                self.give_up(fate, &reason, None).await;
                return None;
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
            Outcome::Answer(answer) => match encoded(|| answer.message(&env.bus)) {
                Ok(reply) => {
                    env.control.succeeded(1);
                    self.finish(Settlement::Answer(&reply)).await;
                }
                Err(error) => self.cannot_send("its answer", &error, attempt).await,
            },
            Outcome::Send(sends) => match encoded(|| sends.messages(&env.bus)) {
                Ok(messages) => {
                    env.control.succeeded(1);
                    self.finish(Settlement::Send(&messages, &AtomicUsize::new(0))).await;
                }
                Err(error) => self.cannot_send("what it sends", &error, attempt).await,
            },
            Outcome::Drop { reason } => self.finish(Settlement::Drop(&reason)).await,
            Outcome::Reject { reason } => {
                env.control.failed(env.policy.pause_after_failures);
                self.report(&reason, attempt);
                self.give_up(env.policy.exhausted, &reason, Some(&reason)).await;
            }
            Outcome::Untrusted { reason } => {
                counters.untrusted.fetch_add(1, Ordering::Relaxed);
                let reason = format!("not believed: {reason}");
                self.report(&reason, attempt);
                self.give_up(env.policy.untrusted, &reason, None).await;
            }
            Outcome::Defer { after } => self.finish(Settlement::Defer(self.possible(after))).await,
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
                let acked = self.acked || env.ack_mode == AckMode::Always;
                if env.policy.mode == RetryMode::InPlace && !acked {
                    counters.retried.fetch_add(1, Ordering::Relaxed);
                    if self.in_place == 0 {
                        // Beside the message: some brokers take one back to its place only as they have given it.
                        self.first_error = Some(error);
                    }
                    return Some(delay);
                }
                self.finish(Settlement::Retry(self.possible(delay), &error)).await;
            }
        }
        None
    }

    /// The delay, or the longest that the backend can do: a handler that asks for more gets its message earlier, not never.
    fn possible(&self, delay: Duration) -> Duration {
        let delayed = &self.env.origin.capabilities.delayed_retry;
        let most = if delayed.support.is_available() { delayed.max.unwrap_or(Duration::MAX) } else { Duration::ZERO };
        if delay > most {
            let channel = self.env.origin.address.name();
            tracing::warn!(channel, asked = ?delay, given = ?most, "this backend cannot hold a message for so long");
        }
        delay.min(most)
    }

    /// What a handler has returned can never leave.
    async fn cannot_send(&mut self, what: &str, error: &Error, attempt: u32) {
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

    pub(super) fn give_up<'a>(&'a mut self, fate: Fate, reason: &'a str, last: Option<&'a str>) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let first = self.first_error.take().filter(|_| self.in_place > 0);
            let settlement = match fate {
                Fate::DeadLetter => Settlement::Bury(reason, Errors { first: first.as_deref(), last }),
                Fate::Drop => Settlement::Drop(reason),
            };
            self.finish(settlement).await;
        })
    }
}

/// Whether a body was not decoded for its size.
fn is_oversize(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<DecodeError>());
    matches!(source, Some(DecodeError::TooLarge { .. }))
}

/// Calls what is the user's: a value that panics where it is encoded is one that cannot be encoded.
fn encoded<T>(encode: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(encode)).unwrap_or_else(|panic| {
        let sentence = format!("encoding it panicked: {}", panic_text(panic.as_ref()));
        Err(Error::new(ErrorKind::Encode, sentence))
    })
}
