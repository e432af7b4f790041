//! Records that were fetched, where the client library has them.
//!
//! What makes a message of a record (its headers are parsed, its body is copied) is most of the work of receiving. So it is
//! done by whoever handles the message, and not by the one thread that fetches for all consumers of a channel. A large body is
//! not copied at all: the message has it where the client library has put it, and the client ends after it.

use std::{
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use polymq_core::Message;
use rdkafka::message::{BorrowedMessage, Message as _};
use self_cell::self_cell;

use crate::{context::Native, convert};

/// Bodies above this size are not copied. Below, memory that is kept for each other's sake costs more than the copy.
const LENT: usize = 4 * 1024;

type Borrowed<'a> = Vec<BorrowedMessage<'a>>;

/// A client, for as long as there is a record of it.
struct Kept(Option<Arc<Native>>);

impl Drop for Kept {
    fn drop(&mut self) {
        // Whoever has kept a body beyond the end of its consumer does not wait until the client's threads have ended.
        if let Some(last) = self.0.take().and_then(Arc::into_inner) {
            let _ = thread::Builder::new().name("polymq-kafka-end".into()).spawn(move || drop(last));
        }
    }
}

self_cell!(
    /// Records that were fetched together. The client keeps their memory: it ends after them.
    struct Lent {
        owner: Kept,
        #[covariant]
        dependent: Borrowed,
    }
);

/// One of the records that were fetched together.
#[derive(Clone)]
pub(crate) struct Record {
    lent: Arc<Lent>,
    at: usize,
}

/// Fetches records, by what `poll` does with the client.
pub(crate) fn fetch(native: &Arc<Native>, poll: impl for<'a> FnOnce(&'a Native, &mut Borrowed<'a>)) -> Vec<Record> {
    let lent = Arc::new(Lent::new(Kept(Some(Arc::clone(native))), |kept| {
        let mut records = Vec::new();
        if let Some(native) = &kept.0 {
            poll(native, &mut records);
        }
        records
    }));
    (0..lent.borrow_dependent().len()).map(|at| Record { lent: Arc::clone(&lent), at }).collect()
}

/// What a record takes of the memory for messages, but for its headers, which are not parsed yet.
pub(crate) fn bytes(record: &BorrowedMessage<'_>) -> usize {
    size_of::<Message>() + record.payload_len() + record.key_len()
}

impl Record {
    pub(crate) fn get(&self) -> &BorrowedMessage<'_> {
        &self.lent.borrow_dependent()[self.at]
    }

    /// When it is due, if it has to wait, as those of a delay topic have.
    pub(crate) fn due(&self) -> Option<Instant> {
        let left = convert::left(self.get()).filter(|left| *left > Duration::ZERO)?;
        Some(Instant::now() + left)
    }
}

/// A body where the client library has it.
struct Body(Record);

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self.0.get().payload().unwrap_or_default()
    }
}

impl std::fmt::Debug for Record {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Record").field("at", &self.at).finish_non_exhaustive()
    }
}

/// A message that waits for a consumer.
#[derive(Debug)]
pub(crate) enum Content {
    /// As it was fetched.
    Record(Record),
    /// What waits for its time, or was returned.
    Message {
        message: Message,
        /// Milliseconds since 1970 when the broker took it; not known any more of what was returned.
        taken_at: Option<u64>,
    },
}

impl Content {
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Record(record) => bytes(record.get()),
            Self::Message { message, .. } => message.size(),
        }
    }

    /// The message, and when the broker took it; `copy` copies the body of a record, where it is copied.
    pub(crate) fn read(self, copy: impl FnOnce(&[u8]) -> Bytes) -> (Message, Option<u64>) {
        match self {
            Self::Record(record) => {
                let (borrowed, taken_at) = (record.get(), convert::taken_at(record.get()));
                let body = match borrowed.payload().unwrap_or_default() {
                    large if large.len() > LENT => Bytes::from_owner(Body(record.clone())),
                    small => copy(small),
                };
                (convert::message(borrowed, body, taken_at), taken_at)
            }
            Self::Message { message, taken_at } => (message, taken_at),
        }
    }

    /// The same in memory of its own, to wait for long.
    pub(crate) fn alone(self) -> Self {
        let (message, taken_at) = self.read(Bytes::copy_from_slice);
        let own = Bytes::copy_from_slice(message.payload());
        Self::Message { message: message.with_payload(own), taken_at }
    }
}
