//! The message: a body that is the user's own, and attributes beside it.

mod check;
mod content_type;
mod id;
mod set;
mod stamp;

use std::{
    fmt,
    num::NonZeroU64,
    time::{Duration, SystemTime},
};

use bytes::Bytes;

use self::content_type::Known;
pub(crate) use self::stamp::Stamp;
pub use self::{check::MAX_ATTRIBUTE_BYTES, id::MessageId};
use crate::{
    clock,
    headers::{Headers, Text},
};

/// A message: id, body, content type, kind and the attributes of section 3 of the design.
///
/// The body on the wire is these bytes, untouched: there is no envelope. Attributes travel in the
/// protocol's own properties where it has them. Every attribute is optional, so that a message from a
/// foreign producer is a message too.
///
/// ```
/// use polymq_core::Message;
///
/// let message = Message::new("hello").with_content_type("text/plain").with_key("customer-7").with_header("tenant", "acme");
/// assert_eq!(message.headers().get("tenant"), Some("acme"));
/// ```
#[derive(Clone, Default)]
pub struct Message {
    id: Option<MessageId>,
    payload: Bytes,
    /// One that is not known is with the rest.
    content_type: Option<Known>,
    /// Whether `version` is one: an option would take another word.
    has_version: bool,
    version: u32,
    kind: Option<Text>,
    /// Nanoseconds since 1970: half the size of a `SystemTime`.
    time: Option<NonZeroU64>,
    // Boxed: most messages have none of these and stay small to move.
    rest: Option<Box<Rest>>,
}

#[derive(Clone, Default)]
struct Rest {
    content_type: Option<Text>,
    key: Option<Text>,
    correlation_id: Option<Text>,
    reply_to: Option<Text>,
    expires_at: Option<SystemTime>,
    deliver_at: Option<SystemTime>,
    headers: Headers,
    system: Headers,
}

static NO_HEADERS: Headers = Headers::new();

impl Message {
    /// A message with this body and no attribute.
    #[must_use]
    pub fn new(payload: impl Into<Bytes>) -> Self {
        Self { payload: payload.into(), ..Self::default() }
    }

    /// The id; `None` only before it was sent, or when a foreign producer gave none.
    #[must_use]
    pub fn id(&self) -> Option<&MessageId> {
        self.id.as_ref()
    }

    /// The body.
    #[must_use]
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The media type of the body.
    #[must_use]
    pub fn content_type(&self) -> Option<&str> {
        match self.content_type {
            Some(known) => Some(known.as_str()),
            None => self.rest.as_ref()?.content_type.as_deref(),
        }
    }

    /// The logical type name (`order.created`).
    #[must_use]
    pub fn kind(&self) -> Option<&str> {
        self.kind.as_deref()
    }

    /// The schema version of the kind.
    #[must_use]
    pub fn version(&self) -> Option<u32> {
        self.has_version.then_some(self.version)
    }

    /// When the producer made the message. Messages that one thread makes within a tick of the system's coarse clock (4 ms or less
    /// on Linux) may have the time of the first of them.
    #[must_use]
    pub fn time(&self) -> Option<SystemTime> {
        self.time.map(|nanos| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos.get()))
    }

    /// The ordering and partition key.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.rest.as_ref()?.key.as_deref()
    }

    /// What ties a reply to its request, or the messages of one saga together.
    #[must_use]
    pub fn correlation_id(&self) -> Option<&str> {
        self.rest.as_ref()?.correlation_id.as_deref()
    }

    /// The queue where the sender waits for a reply.
    #[must_use]
    pub fn reply_to(&self) -> Option<&str> {
        self.rest.as_ref()?.reply_to.as_deref()
    }

    /// From when on the message must not be handled any more.
    #[must_use]
    pub fn expires_at(&self) -> Option<SystemTime> {
        self.rest.as_ref()?.expires_at
    }

    /// Before when the message must not be delivered.
    #[must_use]
    pub fn deliver_at(&self) -> Option<SystemTime> {
        self.rest.as_ref()?.deliver_at
    }

    /// The user's headers.
    #[must_use]
    pub fn headers(&self) -> &Headers {
        self.rest.as_ref().map_or(&NO_HEADERS, |rest| &rest.headers)
    }

    /// The headers in which polymq keeps its own state, all named `polymq-…`: the attempt of a
    /// redelivery and the fields of a dead letter.
    #[must_use]
    pub fn system_headers(&self) -> &Headers {
        self.rest.as_ref().map_or(&NO_HEADERS, |rest| &rest.system)
    }

    /// User headers and system headers, as a backend writes them.
    pub fn wire_headers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.headers().iter().chain(self.system_headers().iter())
    }

    /// Whether `expires_at` has passed.
    #[must_use]
    #[inline]
    pub fn is_expired(&self) -> bool {
        self.expires_at().is_some_and(|at| at <= clock::now())
    }

    /// The attempt that a redelivered copy carries in its header; 1 without one.
    #[must_use]
    #[inline]
    pub fn header_attempt(&self) -> u32 {
        // Most messages have nothing there, and this is asked of every one.
        if self.rest.is_none() { 1 } else { self.told_attempt() }
    }

    fn told_attempt(&self) -> u32 {
        self.system_headers().get(ATTEMPT).and_then(|text| text.parse().ok()).unwrap_or(1).max(1)
    }

    /// Body, headers, key and names together, in bytes: what counts against a prefetch limit.
    #[must_use]
    pub fn size(&self) -> usize {
        let rest = self.rest.as_ref().map_or(0, |rest| {
            let pairs = rest.headers.iter().chain(rest.system.iter());
            pairs.map(|(name, value)| name.len() + value.len()).sum::<usize>()
                + rest.key.as_ref().map_or(0, |key| key.len())
        });
        size_of::<Self>() + self.payload.len() + rest
    }

    /// Gives the message its id and time where they are missing.
    #[inline]
    pub(crate) fn stamp(&mut self, now: impl FnOnce() -> Stamp) {
        if self.id.is_none() || self.time.is_none() {
            let now = now();
            if self.id.is_none() {
                self.id = Some(MessageId::at(now));
            }
            self.time = self.time.or(now.nanos());
        }
    }

    fn rest_mut(&mut self) -> &mut Rest {
        self.rest.get_or_insert_with(Box::default)
    }
}

impl PartialEq for Message {
    /// By what each of them says, wherever it keeps that.
    fn eq(&self, other: &Self) -> bool {
        (&self.id, &self.payload, &self.kind, self.time) == (&other.id, &other.payload, &other.kind, other.time)
            && (self.content_type(), self.version()) == (other.content_type(), other.version())
            && (self.key(), self.correlation_id(), self.reply_to())
                == (other.key(), other.correlation_id(), other.reply_to())
            && (self.expires_at(), self.deliver_at()) == (other.expires_at(), other.deliver_at())
            && self.headers() == other.headers()
            && self.system_headers() == other.system_headers()
    }
}

// What is sent and received is moved several times; growing it costs every backend.
const _: () = assert!(size_of::<Message>() <= 104 && size_of::<MessageId>() <= 24);

/// System header: the number of this attempt, 1-based, on a copy that was sent again.
pub const ATTEMPT: &str = "polymq-attempt";

impl fmt::Debug for Message {
    /// Shows names and sizes, never the body or a header's value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("id", &self.id)
            .field("bytes", &self.payload.len())
            .field("content_type", &self.content_type())
            .field("kind", &self.kind)
            .field("version", &self.version())
            .field("headers", self.headers())
            .finish_non_exhaustive()
    }
}

impl From<Bytes> for Message {
    fn from(payload: Bytes) -> Self {
        Self::new(payload)
    }
}
