//! MessagePack through rmp_serde, with named fields so that fields may be added and reordered.

mod scan;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::error::{DecodeError, SerializeError};
use crate::limits::Limits;
use crate::scratch::Scratch;
use scan::Flaw;

pub(crate) const NAME: &str = "msgpack";
pub(crate) const CONTENT_TYPE: &str = "application/vnd.msgpack";

#[inline]
pub(crate) fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Bytes, SerializeError> {
    let mut scratch = Scratch::new();
    match rmp_serde::encode::write_named(&mut scratch, value) {
        Ok(()) => Ok(scratch.finish()),
        Err(source) => Err(SerializeError::unsupported::<T>(NAME, source)),
    }
}

#[inline]
pub(crate) fn decode<T: DeserializeOwned>(body: &[u8], limits: &Limits) -> Result<T, DecodeError> {
    // rmp_serde reserves memory for claimed lengths, counts no depth inside enums and ignores trailing bytes:
    // the scan goes first.
    scan::check(body, limits.max_containers()).map_err(|flaw| refuse::<T>(flaw, limits))?;
    rmp_serde::from_slice(body).map_err(|source| explain::<T>(source))
}

#[cold]
fn explain<T>(source: rmp_serde::decode::Error) -> DecodeError {
    use rmp_serde::decode::Error;

    let other = "a value does not fit the type";
    let detail = match &source {
        Error::TypeMismatch(_) => "a value is of another kind than the type takes".to_owned(),
        Error::OutOfRange => "a number is out of range".to_owned(),
        Error::LengthMismatch(_) => "a list or an enum has another length".to_owned(),
        Error::Utf8Error(_) => "a string is not valid UTF-8".to_owned(),
        Error::Syntax(message) => crate::detail::expectation(message).unwrap_or_else(|| other.to_owned()),
        _ => other.to_owned(),
    };
    DecodeError::malformed::<T>(NAME, detail, source)
}

#[cold]
fn refuse<T>(flaw: Flaw, limits: &Limits) -> DecodeError {
    match flaw {
        Flaw::TooDeep => {
            DecodeError::TooDeep { format: NAME.into(), max_depth: limits.max_depth.min(Limits::DEPTH_CEILING) }
        }
        flaw => DecodeError::malformed::<T>(NAME, flaw.to_string(), flaw),
    }
}
