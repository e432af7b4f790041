//! Messages that the broker has lent to us.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, SystemTime},
};

use polymq_core::{Details, Headers, Incoming, Token};
use polymq_kubemq_proto::{QueueMessage, QueueMessagePolicy};

use crate::{
    convert::Wire,
    outbox::{Kind, ToQueues},
};

/// A message that the broker has lent to us.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) transaction: Arc<str>,
    pub(crate) sequence: i64,
    pub(crate) attempt: u32,
    /// The broker's own count of its deliveries.
    pub(crate) count: u32,
    /// Its bytes.
    pub(crate) size: usize,
    /// polymq's own headers as it came with them: others, a return must carry.
    pub(crate) system: Headers,
    /// What its sender wants to happen after so many deliveries, if anything.
    pub(crate) policy: Option<Box<QueueMessagePolicy>>,
    /// After how many deliveries the broker drops it, because it has no queue for what has failed; 0 when that is not known.
    pub(crate) dropped_after: u32,
    /// Which stream has lent it.
    pub(crate) generation: u64,
}

/// A message of a poll: for its reader, and for who settles it.
pub(crate) fn read(mut message: QueueMessage, transaction: &Arc<str>) -> (Incoming, Held) {
    let size = ToQueues::size(&message);
    let attributes = message.attributes.take().unwrap_or_default();
    let policy = message.policy.take();
    let count = u32::try_from(attributes.receive_count).unwrap_or(1).max(1);
    let dropped_after = policy
        .as_ref()
        .filter(|policy| policy.max_receive_queue.is_empty())
        .and_then(|policy| u32::try_from(policy.max_receive_count).ok())
        .unwrap_or(0);
    let mut message = Wire::from(message).message();
    if message.expires_at().is_none()
        && let Some(at) = time(attributes.expiration_at)
    {
        // What another client has sent says it to the broker only, and a copy of it must say it anew.
        message = message.with_expires_at(at);
    }
    let details = Details {
        attempt: Some(message.header_attempt().saturating_add(count - 1)),
        broker_time: time(attributes.timestamp),
        sequence: Some(attributes.sequence),
        redelivered: count > 1,
        ..Details::default()
    };
    let incoming = Incoming { message, token: Token::default(), details: Some(Box::new(details)) };
    let held = Held {
        transaction: Arc::clone(transaction),
        sequence: attributes.sequence.cast_signed(),
        attempt: incoming.attempt(),
        count,
        size,
        system: incoming.message.system_headers().clone(),
        dropped_after,
        policy: policy.filter(|policy| !policy.max_receive_queue.is_empty()).map(Box::new),
        generation: 0,
    };
    (incoming, held)
}

/// A time of the broker's, if it tells one.
fn time(nanos: i64) -> Option<SystemTime> {
    let nanos = u64::try_from(nanos).ok().filter(|nanos| *nanos > 0)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(nanos))
}

/// What is held and unsettled, and how large that is.
#[derive(Debug, Default)]
pub(crate) struct Loans {
    held: HashMap<Token, Held>,
    bytes: usize,
}

impl Loans {
    pub(crate) fn insert(&mut self, token: Token, held: Held) {
        self.bytes += held.size;
        self.held.insert(token, held);
    }

    pub(crate) fn remove(&mut self, token: Token) -> Option<Held> {
        let held = self.held.remove(&token)?;
        self.bytes -= held.size;
        Some(held)
    }

    pub(crate) fn contains(&self, token: Token) -> bool {
        self.held.contains_key(&token)
    }

    pub(crate) fn count(&self) -> usize {
        self.held.len()
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// All of them, which are held no more.
    pub(crate) fn take(&mut self) -> impl Iterator<Item = Held> + use<> {
        std::mem::take(self).held.into_values()
    }
}
