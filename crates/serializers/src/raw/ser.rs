use bytes::Bytes;
use serde::ser::{Impossible, Serialize, SerializeSeq, SerializeTuple, Serializer};

use crate::shape::{ShapeError, refuse_serialize};

#[cold]
fn refused(found: &str) -> ShapeError {
    ShapeError::new(format!("bytes carries bytes or a list of u8, not {found}; use \"json\" or \"msgpack\""))
}

/// Writes bytes, or a list of `u8`, as they are.
pub(crate) struct ToBytes;

impl ToBytes {
    fn refuse(found: &str) -> ShapeError {
        refused(found)
    }
}

impl Serializer for ToBytes {
    type Ok = Bytes;
    type Error = ShapeError;
    type SerializeSeq = Octets;
    type SerializeTuple = Octets;
    type SerializeTupleStruct = Impossible<Bytes, ShapeError>;
    type SerializeTupleVariant = Impossible<Bytes, ShapeError>;
    type SerializeMap = Impossible<Bytes, ShapeError>;
    type SerializeStruct = Impossible<Bytes, ShapeError>;
    type SerializeStructVariant = Impossible<Bytes, ShapeError>;

    fn is_human_readable(&self) -> bool {
        false
    }

    fn serialize_bytes(self, value: &[u8]) -> Result<Bytes, ShapeError> {
        Ok(Bytes::copy_from_slice(value))
    }

    fn serialize_seq(self, len: Option<usize>) -> Result<Octets, ShapeError> {
        Ok(Octets(Vec::with_capacity(len.unwrap_or_default())))
    }

    fn serialize_tuple(self, len: usize) -> Result<Octets, ShapeError> {
        Ok(Octets(Vec::with_capacity(len)))
    }

    fn serialize_newtype_struct<T: ?Sized + Serialize>(self, _: &'static str, value: &T) -> Result<Bytes, ShapeError> {
        value.serialize(self)
    }

    refuse_serialize! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str none some unit unit_variant compound
    }
}

/// The bytes of a list so far.
pub(crate) struct Octets(Vec<u8>);

impl SerializeSeq for Octets {
    type Ok = Bytes;
    type Error = ShapeError;

    fn serialize_element<T: ?Sized + Serialize>(&mut self, value: &T) -> Result<(), ShapeError> {
        self.0.push(value.serialize(Octet)?);
        Ok(())
    }

    fn end(self) -> Result<Bytes, ShapeError> {
        Ok(Bytes::from(self.0))
    }
}

impl SerializeTuple for Octets {
    type Ok = Bytes;
    type Error = ShapeError;

    fn serialize_element<T: ?Sized + Serialize>(&mut self, value: &T) -> Result<(), ShapeError> {
        SerializeSeq::serialize_element(self, value)
    }

    fn end(self) -> Result<Bytes, ShapeError> {
        SerializeSeq::end(self)
    }
}

/// Takes one element of a list: a `u8` and nothing else, so that `Vec<u16>` is not cut short.
struct Octet;

impl Octet {
    fn refuse(found: &str) -> ShapeError {
        refused(&format!("a list of {found}"))
    }
}

impl Serializer for Octet {
    type Ok = u8;
    type Error = ShapeError;
    type SerializeSeq = Impossible<u8, ShapeError>;
    type SerializeTuple = Impossible<u8, ShapeError>;
    type SerializeTupleStruct = Impossible<u8, ShapeError>;
    type SerializeTupleVariant = Impossible<u8, ShapeError>;
    type SerializeMap = Impossible<u8, ShapeError>;
    type SerializeStruct = Impossible<u8, ShapeError>;
    type SerializeStructVariant = Impossible<u8, ShapeError>;

    fn serialize_u8(self, value: u8) -> Result<u8, ShapeError> {
        Ok(value)
    }

    refuse_serialize! {
        bool i8 i16 i32 i64 i128 u16 u32 u64 u128 f32 f64 char str bytes none some unit unit_variant
        newtype_struct seq tuple compound
    }
}
