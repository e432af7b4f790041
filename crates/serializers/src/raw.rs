//! Bytes as they are.

mod de;
mod ser;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{DecodeError, SerializeError};

pub(crate) const NAME: &str = "bytes";
pub(crate) const CONTENT_TYPE: &str = "application/octet-stream";

#[inline]
pub(crate) fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Bytes, SerializeError> {
    value.serialize(ser::ToBytes).map_err(|source| SerializeError::unsupported::<T>(NAME, source))
}

#[inline]
pub(crate) fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, DecodeError> {
    T::deserialize(de::FromBytes(body))
        .map_err(|source| DecodeError::malformed::<T>(NAME, source.detail("the bytes do not fit the type"), source))
}
