//! What every backend refuses alike.

use super::{Message, MessageId};
use crate::{Error, ErrorKind, Result, headers};

/// The longest id, content type, kind, key, correlation id and reply address, in bytes.
pub const MAX_ATTRIBUTE_BYTES: usize = 255;

impl Message {
    /// Whether it has nothing that [`check`](Self::check) or a backend could refuse, but its size.
    #[inline]
    pub(crate) fn is_plain(&self) -> bool {
        // A content type that is known was checked when it became so.
        self.id.as_ref().is_some_and(MessageId::is_uuid) && self.kind.is_none() && self.rest.is_none()
    }

    /// Checks what every backend refuses alike. Attributes travel in short fields: the tightest is AMQP's short string
    /// (0-9-1, section 4.2.5.3).
    pub(crate) fn check(&self) -> Result<()> {
        self.check_attributes()?;
        self.rest.as_ref().map_or(Ok(()), |rest| rest.headers.check())
    }

    /// Checks what came over a broker: the names of another program's headers, and how many there are, are its own affair.
    pub(crate) fn check_carried(&self) -> Result<()> {
        self.check_attributes()?;
        self.headers().iter().try_for_each(|(name, value)| {
            check_short("name of a header", Some(name))?;
            headers::check_text(name, value)
        })
    }

    fn check_attributes(&self) -> Result<()> {
        check_short("message id", self.id.as_ref().and_then(MessageId::as_text))?;
        check_short("kind", self.kind())?;
        let Some(rest) = &self.rest else { return Ok(()) };
        if self.content_type.is_none() {
            check_short("content type", rest.content_type.as_deref())?;
        }
        check_short("key", rest.key.as_deref())?;
        check_short("correlation id", rest.correlation_id.as_deref())?;
        check_short("reply address", rest.reply_to.as_deref())
    }
}

/// Refuses an attribute that not every backend can carry.
pub(super) fn check_short(what: &str, text: Option<&str>) -> Result<()> {
    match text {
        Some(text) if text.len() > MAX_ATTRIBUTE_BYTES || text.is_empty() || text.chars().any(char::is_control) => {
            let sentence = format!(
                "the {what} has {} bytes, expected 1 to {MAX_ATTRIBUTE_BYTES} without control characters",
                text.len()
            );
            Err(Error::new(ErrorKind::InvalidInput, sentence))
        }
        _ => Ok(()),
    }
}
