//! Plain text: one string, character, number, truth value or variant name, in UTF-8.

mod de;
mod ser;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{DecodeError, SerializeError};

pub(crate) const NAME: &str = "text";
pub(crate) const CONTENT_TYPE: &str = "text/plain; charset=utf-8";

#[inline]
pub(crate) fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Bytes, SerializeError> {
    value.serialize(ser::ToText).map_err(|source| SerializeError::unsupported::<T>(NAME, source))
}

#[inline]
pub(crate) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, DecodeError> {
    let text = std::str::from_utf8(body)
        .map_err(|source| DecodeError::malformed::<T>(NAME, "it is not valid UTF-8", source))?;
    T::deserialize(de::FromText(text))
        .map_err(|source| DecodeError::malformed::<T>(NAME, source.detail("the text does not fit the type"), source))
}
