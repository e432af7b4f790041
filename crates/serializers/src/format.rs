use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{DecodeError, SerializeError};
use crate::limits::Limits;
use crate::serializer::Serializer;
use crate::{content_type, custom, json, message_pack, raw, text};

/// A handle to one serializer: cheap to clone, safe to share.
///
/// The built-in formats are called directly, without dynamic dispatch on the way; third-party ones go through
/// [`Serializer`]. Two formats are equal when they are the same serializer.
///
/// ```
/// use polymq_serializers::{Format, Limits};
///
/// let limits = Limits::default();
/// let body = Format::MESSAGE_PACK.encode(&("paid", 7), &limits)?;
/// let value: (String, u32) = Format::MESSAGE_PACK.decode(&body, &limits)?;
/// assert_eq!(value, ("paid".to_owned(), 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Format(Repr);

#[derive(Clone)]
enum Repr {
    Json,
    MessagePack,
    Text,
    Bytes,
    Custom(Arc<dyn Serializer>),
}

impl Format {
    /// JSON: name `json`, `application/json`, id 1. Also read from `text/json` and `application/*+json`. A
    /// float that is not finite becomes `null`, which does not decode into a float again.
    pub const JSON: Self = Self(Repr::Json);
    /// MessagePack with named fields: name `msgpack`, `application/vnd.msgpack`, id 2. Also read from
    /// `application/msgpack` and `application/x-msgpack`.
    pub const MESSAGE_PACK: Self = Self(Repr::MessagePack);
    /// Plain UTF-8 text: name `text`, `text/plain; charset=utf-8`, id 3. Carries a string, char, number, bool
    /// or unit variant; structs, lists, maps and options are refused. Nothing is trimmed.
    pub const TEXT: Self = Self(Repr::Text);
    /// Bytes as they are: name `bytes`, `application/octet-stream`, id 4. Carries bytes (`Bytes`, `ByteBuf`)
    /// and lists of `u8` (`Vec<u8>`, `[u8; N]`); all else is refused.
    pub const BYTES: Self = Self(Repr::Bytes);

    /// A format that calls a third-party serializer, for use without a registry.
    pub fn custom(serializer: Arc<dyn Serializer>) -> Self {
        Self(Repr::Custom(serializer))
    }

    /// Short name, as in configuration.
    pub fn name(&self) -> &str {
        match &self.0 {
            Repr::Json => json::NAME,
            Repr::MessagePack => message_pack::NAME,
            Repr::Text => text::NAME,
            Repr::Bytes => raw::NAME,
            Repr::Custom(serializer) => serializer.name(),
        }
    }

    /// Content type that labels its bodies.
    pub fn content_type(&self) -> &str {
        match &self.0 {
            Repr::Json => json::CONTENT_TYPE,
            Repr::MessagePack => message_pack::CONTENT_TYPE,
            Repr::Text => text::CONTENT_TYPE,
            Repr::Bytes => raw::CONTENT_TYPE,
            Repr::Custom(serializer) => serializer.content_type(),
        }
    }

    /// Content type, if it is one of the built-in ones and needs no copy to live as long as the program.
    pub fn static_content_type(&self) -> Option<&'static str> {
        match &self.0 {
            Repr::Json => Some(json::CONTENT_TYPE),
            Repr::MessagePack => Some(message_pack::CONTENT_TYPE),
            Repr::Text => Some(text::CONTENT_TYPE),
            Repr::Bytes => Some(raw::CONTENT_TYPE),
            Repr::Custom(_) => None,
        }
    }

    /// Number that stands for it on the wire.
    pub fn id(&self) -> u16 {
        match &self.0 {
            Repr::Json => 1,
            Repr::MessagePack => 2,
            Repr::Text => 3,
            Repr::Bytes => 4,
            Repr::Custom(serializer) => serializer.id(),
        }
    }

    /// Turns `value` into a body.
    ///
    /// # Errors
    ///
    /// [`SerializeError::Unsupported`] if the format cannot express the value, [`SerializeError::TooLarge`]
    /// if the body exceeds `limits`.
    #[inline]
    pub fn encode<T: Serialize + ?Sized>(&self, value: &T, limits: &Limits) -> Result<Bytes, SerializeError> {
        let body = match &self.0 {
            Repr::Json => json::encode(value),
            Repr::MessagePack => message_pack::encode(value),
            Repr::Text => text::encode(value),
            Repr::Bytes => raw::encode(value),
            Repr::Custom(serializer) => custom::encode(&**serializer, value),
        }?;
        if body.len() > limits.max_bytes {
            return Err(SerializeError::TooLarge {
                format: self.name().into(),
                type_name: std::any::type_name::<T>(),
                len: body.len(),
                max_bytes: limits.max_bytes,
            });
        }
        Ok(body)
    }

    /// Turns `body` into a value; all of the body must belong to it.
    ///
    /// # Errors
    ///
    /// [`DecodeError::TooLarge`] before the body is looked at, [`DecodeError::TooDeep`], and
    /// [`DecodeError::Malformed`] for everything else that is wrong with it.
    #[inline]
    pub fn decode<T: DeserializeOwned>(&self, body: &[u8], limits: &Limits) -> Result<T, DecodeError> {
        if body.len() > limits.max_bytes {
            return Err(DecodeError::TooLarge { len: body.len(), max_bytes: limits.max_bytes });
        }
        match &self.0 {
            Repr::Json => json::decode(body, limits),
            Repr::MessagePack => message_pack::decode(body, limits),
            Repr::Text => text::decode(body),
            Repr::Bytes => raw::decode(body),
            Repr::Custom(serializer) => custom::decode(&**serializer, body, limits),
        }
    }

    /// Whether bodies labelled `content_type` are of this format, by its own content type or an older one.
    pub(crate) fn reads(&self, content_type: &str) -> bool {
        let same = |known: &&str| content_type::same(known, content_type);
        match &self.0 {
            Repr::Text => same(&text::CONTENT_TYPE) && content_type::is_utf8(content_type),
            Repr::Json => [json::CONTENT_TYPE, "text/json"].iter().any(same),
            Repr::MessagePack => {
                [message_pack::CONTENT_TYPE, "application/msgpack", "application/x-msgpack"].iter().any(same)
            }
            Repr::Bytes | Repr::Custom(_) => same(&self.content_type()),
        }
    }

    /// Name, content type and id, for messages about it.
    pub(crate) fn describe(&self) -> Box<str> {
        format!("\"{}\" ({}, id {})", self.name(), self.content_type(), self.id()).into()
    }
}

impl PartialEq for Format {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Repr::Custom(one), Repr::Custom(other)) => Arc::ptr_eq(one, other),
            (one, other) => std::mem::discriminant(one) == std::mem::discriminant(other),
        }
    }
}

impl Eq for Format {}

impl fmt::Debug for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Format").field(&self.name()).finish()
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
