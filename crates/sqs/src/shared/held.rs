//! What a consumer holds, and what there is to tell SQS about it.

use std::{sync::Arc, time::Duration};

use polymq_core::{Completer, Headers, Incoming, Token};
use tokio::time::Instant;

use crate::{error, outbox::Letter};

/// A message that SQS has lent to us.
#[derive(Debug, Clone)]
pub(crate) struct Held {
    pub(crate) receipt: Arc<str>,
    pub(super) received: Instant,
    /// When SQS lends it to somebody else.
    pub(crate) deadline: Instant,
    pub(crate) attempt: u32,
    /// polymq's own headers as it came with them: others, a return must carry.
    pub(crate) system: Headers,
    /// SQS's own id, by which it is known again.
    pub(crate) native_id: Arc<str>,
    /// It has no key, so nothing waits behind it.
    pub(super) alone: bool,
    /// Reading has lost something of it, such as an attribute that is no string: no copy can take its place.
    pub(crate) lossy: bool,
    pub(super) bytes: usize,
    pub(super) extending: bool,
}

impl Held {
    pub(crate) fn new(receipt: &str, native_id: &str, incoming: &Incoming, lease: Duration) -> Self {
        let now = Instant::now();
        Self {
            receipt: receipt.into(),
            received: now,
            deadline: now + lease,
            attempt: incoming.attempt(),
            system: incoming.message.system_headers().clone(),
            native_id: native_id.into(),
            alone: incoming.message.key().is_none(),
            lossy: false,
            bytes: incoming.message.size(),
            extending: false,
        }
    }
}

/// An acknowledgement to be sent.
#[derive(Debug)]
pub(crate) struct Delete {
    pub(crate) receipt: Arc<str>,
    pub(crate) deadline: Instant,
}

/// A change of the time for which a message is hidden.
#[derive(Debug)]
pub(crate) struct Change {
    pub(crate) receipt: Arc<str>,
    pub(crate) seconds: i32,
    pub(crate) deadline: Instant,
    pub(crate) purpose: Purpose,
}

impl Change {
    /// The loan is over before SQS was told.
    pub(super) fn too_late(self) {
        if let Purpose::Retry(answer) | Purpose::Extend(_, Some(answer)) = self.purpose {
            answer.complete(Err(error::stale()));
        }
    }
}

/// Why it is changed, and who waits for it.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// It goes back; best effort.
    Release,
    /// It comes again later.
    Retry(Completer<()>),
    /// It stays here for longer.
    Extend(Token, Option<Completer<()>>),
}

/// A copy that takes a message's place, because what it must carry cannot be written on the original.
#[derive(Debug)]
pub(crate) struct Copied {
    pub(crate) letter: Letter,
    pub(crate) held: Held,
    /// Without one, it is returned as it is when the copy fails.
    pub(crate) answer: Option<(Token, Completer<()>)>,
}

/// Back to SQS at once.
pub(super) fn release(held: Held) -> Change {
    Change { receipt: held.receipt, seconds: 0, deadline: held.deadline, purpose: Purpose::Release }
}
