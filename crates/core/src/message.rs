//! The message: a body that is the user's own, and attributes beside it.

use std::{
    fmt,
    num::NonZeroU64,
    sync::Arc,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use uuid::Uuid;

use crate::{
    Error, ErrorKind, Result, clock,
    headers::{Headers, SYSTEM_PREFIX, Text},
};

/// Identity of a message: stable across resend, restart and redelivery. A UUID, or whatever text another producer
/// or the caller chose.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct MessageId(Id);

#[derive(Clone, PartialEq, Eq, Hash)]
enum Id {
    Uuid(AlignedUuid),
    Text(Arc<str>),
}

/// A UUID's own alignment is one byte: beside the enum's tag it would lie across words, and every move of a message
/// would stall on it. Measured: a third of the cost of sending in memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
#[repr(align(8))]
struct AlignedUuid(Uuid);

impl MessageId {
    /// A new UUIDv7 (RFC 9562, section 5.7) for this moment.
    #[must_use]
    pub fn new() -> Self {
        Self::at(Stamp::now())
    }

    #[inline]
    fn at(now: Stamp) -> Self {
        Uuid::from_u64_pair(now.id, (0b10 << 62) | (now.random >> 2)).into()
    }

    /// Reads an id as it came over a wire: a UUID where it is one, the text otherwise.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        // Only the canonical form: any other spelling must come back as it was written.
        match Uuid::try_parse(text) {
            Ok(uuid) if text.len() == 36 && !text.bytes().any(|byte| byte.is_ascii_uppercase()) => uuid.into(),
            _ => Self(Id::Text(text.into())),
        }
    }

    /// The UUID, if it is one.
    #[must_use]
    pub fn as_uuid(&self) -> Option<Uuid> {
        match &self.0 {
            Id::Uuid(AlignedUuid(uuid)) => Some(*uuid),
            Id::Text(_) => None,
        }
    }

    /// The text, if it is no UUID.
    #[must_use]
    pub fn as_text(&self) -> Option<&str> {
        match &self.0 {
            Id::Uuid(_) => None,
            Id::Text(text) => Some(text),
        }
    }
}

impl Default for MessageId {
    fn default() -> Self {
        Self::new()
    }
}

impl From<&str> for MessageId {
    fn from(text: &str) -> Self {
        Self::parse(text)
    }
}

impl From<String> for MessageId {
    fn from(text: String) -> Self {
        Self::parse(&text)
    }
}

impl From<Uuid> for MessageId {
    fn from(uuid: Uuid) -> Self {
        Self(Id::Uuid(AlignedUuid(uuid)))
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Id::Uuid(AlignedUuid(uuid)) => fmt::Display::fmt(uuid, f),
            Id::Text(text) => f.write_str(text),
        }
    }
}

impl fmt::Debug for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

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
#[derive(Clone, Default, PartialEq)]
pub struct Message {
    id: Option<MessageId>,
    payload: Bytes,
    content_type: Option<Text>,
    kind: Option<Text>,
    version: Option<u32>,
    /// Nanoseconds since 1970: half the size of a `SystemTime`, and a message fits two cache lines.
    time: Option<NonZeroU64>,
    // Boxed: most messages have none of these and stay small to move.
    rest: Option<Box<Rest>>,
}

#[derive(Clone, Default, PartialEq)]
struct Rest {
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
        self.content_type.as_deref()
    }

    /// The logical type name (`order.created`).
    #[must_use]
    pub fn kind(&self) -> Option<&str> {
        self.kind.as_deref()
    }

    /// The schema version of the kind.
    #[must_use]
    pub fn version(&self) -> Option<u32> {
        self.version
    }

    /// When the producer made the message.
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

    /// Adds a header as a backend read it, to the user's or to the system's by its name.
    pub fn add_wire_header(&mut self, name: impl Into<Text>, value: impl Into<Text>) {
        let name = name.into();
        let rest = self.rest_mut();
        if name.starts_with(SYSTEM_PREFIX) { rest.system.insert(name, value) } else { rest.headers.insert(name, value) }
    }

    /// Whether `expires_at` has passed.
    #[must_use]
    #[inline]
    pub fn is_expired(&self) -> bool {
        self.expires_at().is_some_and(|at| at <= clock::now())
    }

    /// Sets the id; without it, sending gives a UUIDv7.
    #[must_use]
    pub fn with_id(mut self, id: impl Into<MessageId>) -> Self {
        self.id = Some(id.into());
        self
    }

    /// Replaces the body.
    #[must_use]
    pub fn with_payload(mut self, payload: impl Into<Bytes>) -> Self {
        self.payload = payload.into();
        self
    }

    /// Sets the media type of the body.
    #[must_use]
    pub fn with_content_type(mut self, content_type: impl Into<Text>) -> Self {
        self.content_type = Some(content_type.into());
        self
    }

    /// Sets the logical type name.
    #[must_use]
    pub fn with_kind(mut self, kind: impl Into<Text>) -> Self {
        self.kind = Some(kind.into());
        self
    }

    /// Sets the schema version of the kind.
    #[must_use]
    pub fn with_version(mut self, version: u32) -> Self {
        self.version = Some(version);
        self
    }

    /// Sets when the message was made; without it, sending sets the present time. Times from 1970 to 2554 can be
    /// told, to the nanosecond; any other becomes none.
    #[must_use]
    pub fn with_time(mut self, time: SystemTime) -> Self {
        self.time = NonZeroU64::new(Stamp::from(time).nanos);
        self
    }

    /// Sets the ordering and partition key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<Text>) -> Self {
        self.rest_mut().key = Some(key.into());
        self
    }

    /// Sets the correlation id.
    #[must_use]
    pub fn with_correlation_id(mut self, id: impl Into<Text>) -> Self {
        self.rest_mut().correlation_id = Some(id.into());
        self
    }

    /// Sets the queue where a reply is awaited.
    #[must_use]
    pub fn with_reply_to(mut self, queue: impl Into<Text>) -> Self {
        self.rest_mut().reply_to = Some(queue.into());
        self
    }

    /// From `at` on the message is not handled any more.
    #[must_use]
    pub fn with_expires_at(mut self, at: SystemTime) -> Self {
        self.rest_mut().expires_at = Some(at);
        self
    }

    /// The message is not handled later than `ttl` from now.
    #[must_use]
    pub fn expires_in(self, ttl: Duration) -> Self {
        let at = clock::now() + ttl;
        self.with_expires_at(at)
    }

    /// The message is not delivered before `at`; a backend without delay refuses to send it.
    #[must_use]
    pub fn with_deliver_at(mut self, at: SystemTime) -> Self {
        self.rest_mut().deliver_at = Some(at);
        self
    }

    /// The message is not delivered before `delay` from now.
    #[must_use]
    pub fn deliver_in(self, delay: Duration) -> Self {
        let at = clock::now() + delay;
        self.with_deliver_at(at)
    }

    /// Takes the delivery time away, as a backend does that has kept it.
    #[must_use]
    pub fn without_deliver_at(mut self) -> Self {
        if let Some(rest) = &mut self.rest {
            rest.deliver_at = None;
        }
        self
    }

    /// Takes the expiry away.
    #[must_use]
    pub fn without_expires_at(mut self) -> Self {
        if let Some(rest) = &mut self.rest {
            rest.expires_at = None;
        }
        self
    }

    /// Sets one header; the rules of [`Headers::check`] are applied when the message is sent.
    #[must_use]
    pub fn with_header(mut self, name: impl Into<Text>, value: impl Into<Text>) -> Self {
        self.rest_mut().headers.insert(name, value);
        self
    }

    /// Replaces the headers.
    #[must_use]
    pub fn with_headers(mut self, headers: Headers) -> Self {
        if !headers.is_empty() || self.rest.is_some() {
            self.rest_mut().headers = headers;
        }
        self
    }

    /// Sets one of polymq's own headers. For backends and layers.
    pub fn set_system_header(&mut self, name: &'static str, value: impl Into<Text>) {
        debug_assert!(name.starts_with(SYSTEM_PREFIX));
        self.rest_mut().system.insert(name, value);
    }

    /// Removes polymq's own headers, so that the message starts afresh.
    pub fn clear_system_headers(&mut self) {
        if let Some(rest) = &mut self.rest {
            rest.system = Headers::new();
        }
    }

    /// The attempt that a redelivered copy carries in its header; 1 without one.
    #[must_use]
    pub fn header_attempt(&self) -> u32 {
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

    /// Whether it has nothing that [`check`](Self::check) or a backend could refuse, but its size.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        // A literal of the program is known good; a text may have come from anywhere.
        matches!(self.id, Some(MessageId(Id::Uuid(_))))
            && self.kind.is_none()
            && self.rest.is_none()
            && !matches!(self.content_type, Some(Text::Owned(_)))
    }

    /// Checks what every backend refuses alike. Attributes travel in short fields: the tightest is AMQP's short string
    /// (0-9-1, section 4.2.5.3).
    pub(crate) fn check(&self) -> Result<()> {
        let short = |what: &str, text: Option<&str>| match text {
            Some(text) if text.len() > MAX_ATTRIBUTE_BYTES || text.is_empty() || text.chars().any(char::is_control) => {
                let sentence = format!(
                    "the {what} has {} bytes, expected 1 to {MAX_ATTRIBUTE_BYTES} without control characters",
                    text.len()
                );
                Err(Error::new(ErrorKind::InvalidInput, sentence))
            }
            _ => Ok(()),
        };
        short("message id", self.id.as_ref().and_then(MessageId::as_text))?;
        if matches!(self.content_type, Some(Text::Owned(_))) {
            short("content type", self.content_type())?;
        }
        if self.kind.is_some() {
            short("kind", self.kind())?;
        }
        let Some(rest) = &self.rest else { return Ok(()) };
        short("key", rest.key.as_deref())?;
        short("correlation id", rest.correlation_id.as_deref())?;
        short("reply address", rest.reply_to.as_deref())?;
        rest.headers.check()
    }

    /// Gives the message its id and time where they are missing.
    #[inline]
    pub(crate) fn stamp(&mut self, now: impl FnOnce() -> Stamp) {
        if self.id.is_none() || self.time.is_none() {
            let now = now();
            if self.id.is_none() {
                self.id = Some(MessageId::at(now));
            }
            self.time = self.time.or(NonZeroU64::new(now.nanos));
        }
    }

    fn rest_mut(&mut self) -> &mut Rest {
        self.rest.get_or_insert_with(Box::default)
    }
}

/// A moment. What the clock gives is converted once for id and time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stamp {
    /// Since 1970; 0 where that cannot be told.
    nanos: u64,
    /// The first half of a UUIDv7: milliseconds, version, and the quarter of a microsecond (section 6.2, method 3).
    id: u64,
    /// Of which the second half takes 62 bits.
    random: u64,
}

impl Stamp {
    pub(crate) fn now() -> Self {
        SystemTime::now().into()
    }

    /// The same moment for another message, whose id comes after (RFC 9562, section 6.2, method 2).
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        let next = Self { random: self.random.wrapping_add(1 << 2), ..*self };
        std::mem::replace(self, next)
    }
}

impl From<SystemTime> for Stamp {
    #[inline]
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let nanos = since.as_secs().checked_mul(1_000_000_000);
        let nanos = nanos.and_then(|nanos| nanos.checked_add(u64::from(since.subsec_nanos()))).unwrap_or(0);
        let (millis, rest) = (nanos / 1_000_000, nanos % 1_000_000);
        // The generator is seeded by the operating system once a thread.
        Self { nanos, id: (millis << 16) | (7 << 12) | ((rest << 12) / 1_000_000), random: fastrand::u64(..) }
    }
}

/// The longest id, content type, kind, key, correlation id and reply address, in bytes.
pub const MAX_ATTRIBUTE_BYTES: usize = 255;

// What is sent and received is moved several times; growing it costs every backend.
const _: () = assert!(size_of::<Message>() <= 128 && size_of::<MessageId>() <= 24);

/// System header: the number of this attempt, 1-based, on a copy that was sent again.
pub const ATTEMPT: &str = "polymq-attempt";

impl fmt::Debug for Message {
    /// Shows names and sizes, never the body or a header's value.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Message")
            .field("id", &self.id)
            .field("bytes", &self.payload.len())
            .field("content_type", &self.content_type)
            .field("kind", &self.kind)
            .field("version", &self.version)
            .field("headers", self.headers())
            .finish_non_exhaustive()
    }
}

impl From<Bytes> for Message {
    fn from(payload: Bytes) -> Self {
        Self::new(payload)
    }
}
