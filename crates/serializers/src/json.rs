//! JSON through serde_json, whose own recursion limit is [`Limits::DEPTH_CEILING`].

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::error::Category;

use crate::error::{DecodeError, SerializeError};
use crate::limits::Limits;
use crate::scratch::Scratch;

pub(crate) const NAME: &str = "json";
pub(crate) const CONTENT_TYPE: &str = "application/json";

#[inline]
pub(crate) fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Bytes, SerializeError> {
    let mut scratch = Scratch::new();
    match serde_json::to_writer(&mut scratch, value) {
        Ok(()) => Ok(scratch.finish()),
        Err(source) => Err(SerializeError::unsupported::<T>(NAME, source)),
    }
}

#[inline]
pub(crate) fn decode<T: DeserializeOwned>(body: &[u8], limits: &Limits) -> Result<T, DecodeError> {
    if limits.max_depth < Limits::DEPTH_CEILING && nests_deeper(body, limits.max_containers()) {
        return Err(too_deep(limits));
    }
    serde_json::from_slice(body).map_err(|source| explain::<T>(source, body, limits))
}

#[cold]
fn explain<T>(source: serde_json::Error, body: &[u8], limits: &Limits) -> DecodeError {
    let what = match source.classify() {
        // serde_json reports its recursion limit as a syntax error and has no accessor for it.
        Category::Syntax if nests_deeper(body, limits.max_containers()) => return too_deep(limits),
        Category::Syntax => "it is not valid JSON",
        Category::Eof => "it ends too early",
        Category::Data | Category::Io => {
            let message = source.to_string();
            let place = format!(" at line {} column {}", source.line(), source.column());
            let message = message.strip_suffix(&place).unwrap_or(&message);
            let expected = crate::detail::expectation(message);
            let detail = format!("{}{place}", expected.as_deref().unwrap_or("a value does not fit the type"));
            return DecodeError::malformed::<T>(NAME, detail, source);
        }
    };
    let detail = format!("{what} at line {} column {}", source.line(), source.column());
    DecodeError::malformed::<T>(NAME, detail, source)
}

#[cold]
fn too_deep(limits: &Limits) -> DecodeError {
    DecodeError::TooDeep { format: NAME.into(), max_depth: limits.max_depth.min(Limits::DEPTH_CEILING) }
}

/// Whether more than `max` lists and objects enclose each other. Looks at brackets outside strings only; what
/// else is wrong with the body is left to the parser.
fn nests_deeper(body: &[u8], max: usize) -> bool {
    if body.len() <= max {
        return false;
    }
    let mut depth = 0usize;
    let mut bytes = body.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                depth += 1;
                if depth > max {
                    return true;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => {
                while let Some(byte) = bytes.next() {
                    match byte {
                        b'"' => break,
                        b'\\' => _ = bytes.next(),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    false
}
