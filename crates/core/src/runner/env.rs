//! The surroundings of one running subscription, shared by all its calls.

use std::{future::Future, sync::Arc, time::Duration};

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::{Callbacks, Control, Stop};
use crate::{
    AckMode, Bus, ErrorKind, FailurePolicy, Message, Token, delivery::Origin, factory::Entry, handler::States,
    serializers::Accept,
};

/// The surroundings of one running subscription.
pub(crate) struct Env {
    pub(crate) bus: Bus,
    pub(crate) origin: Arc<Origin>,
    pub(crate) entries: Vec<Entry>,
    pub(crate) policy: FailurePolicy,
    pub(crate) ack_mode: AckMode,
    /// A handler has a time-out.
    pub(crate) timed: bool,
    /// Where the broker lends messages: for how long at a time, and in all.
    pub(crate) lease: Option<(Duration, Duration)>,
    pub(crate) states: States,
    pub(crate) accept: Accept,
    pub(crate) callbacks: Callbacks,
    pub(crate) control: Arc<Control>,
    pub(crate) retries: Option<Arc<Semaphore>>,
    /// No further handler starts.
    pub(crate) stop: Stop,
    /// Handlers that run are dropped.
    pub(crate) cancelled: CancellationToken,
}

impl Env {
    /// The index of the entry that takes this message: exact version first, then any version, then any kind.
    #[inline]
    pub(crate) fn find(&self, message: &Message) -> Option<usize> {
        match self.entries.as_slice() {
            [only] if only.kind.is_none() => Some(0),
            _ => self.find_by_kind(message),
        }
    }

    fn find_by_kind(&self, message: &Message) -> Option<usize> {
        let kind = message.kind();
        let position = |test: &dyn Fn(&Entry) -> bool| self.entries.iter().position(test);
        let named = |entry: &Entry| entry.kind.as_ref().map(|kind| kind.name.as_ref()) == kind && kind.is_some();
        let version = |entry: &Entry| entry.kind.as_ref().and_then(|kind| kind.version);
        position(&|entry| named(entry) && version(entry).is_some() && version(entry) == message.version())
            .or_else(|| position(&|entry| named(entry) && version(entry).is_none()))
            .or_else(|| {
                // A version that nobody takes must not reach a handler of anything.
                let known = self.entries.iter().any(named);
                if known { None } else { position(&|entry| entry.kind.is_none()) }
            })
    }

    /// Whether handlers need nothing around them: no time-out, no lease, no limit of retries, no layer.
    pub(crate) fn is_plain(&self) -> bool {
        !self.timed && self.lease.is_none() && self.retries.is_none() && self.bus.parts().layers.is_empty()
    }

    /// Extends the loans of messages, where they are lent, until `until` is done.
    pub(crate) async fn lent<T>(&self, tokens: &[Token], until: impl Future<Output = T>) -> T {
        let Some((lease, at_most)) = self.lease else { return until.await };
        tokio::select! {
            biased;
            done = until => done,
            never = self.keep(tokens.to_vec(), lease, at_most) => match never {},
        }
    }

    async fn keep(&self, mut tokens: Vec<Token>, lease: Duration, at_most: Duration) -> std::convert::Infallible {
        let channel = self.origin.address.name();
        let lent = tokio::time::Instant::now();
        while !tokens.is_empty() {
            tokio::time::sleep(lease / 3).await;
            let left = at_most.saturating_sub(lent.elapsed());
            if left.is_zero() {
                tracing::warn!(channel, limit = ?at_most, "a handler takes longer than a message is lent in all");
                break;
            }
            let mut held = Vec::with_capacity(tokens.len());
            for token in tokens {
                let extended = self.origin.settler.extend(token, lease.min(left)).await;
                if let Err(error) = &extended {
                    tracing::warn!(channel, %error, "the loan of a message could not be extended");
                    self.callbacks.transport_error(&self.origin.address, error);
                }
                if !extended.is_err_and(|error| error.kind() == ErrorKind::Stale) {
                    held.push(token);
                }
            }
            tokens = held;
        }
        std::future::pending().await
    }
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Env").field("address", &self.origin.address).finish_non_exhaustive()
    }
}
