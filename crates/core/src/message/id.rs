//! What a message is called.

use std::{fmt, sync::Arc};

use uuid::Uuid;

use super::Stamp;

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
    pub(super) fn at(now: Stamp) -> Self {
        now.uuid().into()
    }

    #[inline]
    pub(super) fn is_uuid(&self) -> bool {
        matches!(self.0, Id::Uuid(_))
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
