//! The way to a third-party serializer, over `erased_serde`.

use std::cell::Cell;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use crate::depth::Guard;
use crate::error::{DecodeError, SerializeError};
use crate::limits::Limits;
use crate::serializer::Serializer;

pub(crate) fn encode<T: Serialize + ?Sized>(serializer: &dyn Serializer, value: &T) -> Result<Bytes, SerializeError> {
    match serializer.encode(&value) {
        Ok(body) => Ok(Bytes::from(body)),
        Err(source) => Err(SerializeError::unsupported::<T>(serializer.name(), source)),
    }
}

pub(crate) fn decode<T: DeserializeOwned>(
    serializer: &dyn Serializer,
    body: &[u8],
    limits: &Limits,
) -> Result<T, DecodeError> {
    let tripped = Cell::new(false);
    let mut decoded = None;
    let outcome = serializer.decode(body, &mut |deserializer| {
        decoded = Some(T::deserialize(Guard::new(deserializer, limits.max_containers(), &tripped))?);
        Ok(())
    });
    let name = serializer.name();
    match (outcome, decoded) {
        _ if tripped.get() => {
            let max_depth = limits.max_depth.min(Limits::DEPTH_CEILING);
            Err(DecodeError::TooDeep { format: name.into(), max_depth })
        }
        (Ok(()), Some(value)) => Ok(value),
        (Ok(()), None) => {
            let detail = "the serializer read no value";
            Err(DecodeError::malformed::<T>(name, detail, detail))
        }
        (Err(source), _) => {
            let expected = crate::detail::expectation(&source.to_string());
            let detail = expected.unwrap_or_else(|| "the serializer refused it".to_owned());
            Err(DecodeError::malformed::<T>(name, detail, source))
        }
    }
}
