use bytes::Bytes;
use serde::ser::{Impossible, Serialize, Serializer};

use crate::shape::{ShapeError, refuse_serialize};

/// Writes one scalar as text.
pub(crate) struct ToText;

impl ToText {
    #[cold]
    fn refuse(found: &str) -> ShapeError {
        ShapeError::new(format!(
            "text carries a string, char, number, bool or unit variant, not {found}; use \"json\" or \"msgpack\""
        ))
    }
}

macro_rules! display {
    ($($method:ident $ty:ty,)*) => { $(
        fn $method(self, value: $ty) -> Result<Bytes, ShapeError> {
            Ok(Bytes::from(value.to_string()))
        }
    )* };
}

impl Serializer for ToText {
    type Ok = Bytes;
    type Error = ShapeError;
    type SerializeSeq = Impossible<Bytes, ShapeError>;
    type SerializeTuple = Impossible<Bytes, ShapeError>;
    type SerializeTupleStruct = Impossible<Bytes, ShapeError>;
    type SerializeTupleVariant = Impossible<Bytes, ShapeError>;
    type SerializeMap = Impossible<Bytes, ShapeError>;
    type SerializeStruct = Impossible<Bytes, ShapeError>;
    type SerializeStructVariant = Impossible<Bytes, ShapeError>;

    display! {
        serialize_bool bool, serialize_char char,
        serialize_i8 i8, serialize_i16 i16, serialize_i32 i32, serialize_i64 i64, serialize_i128 i128,
        serialize_u8 u8, serialize_u16 u16, serialize_u32 u32, serialize_u64 u64, serialize_u128 u128,
        serialize_f32 f32, serialize_f64 f64,
    }

    fn serialize_str(self, value: &str) -> Result<Bytes, ShapeError> {
        Ok(Bytes::copy_from_slice(value.as_bytes()))
    }

    fn serialize_unit_variant(self, _: &'static str, _: u32, variant: &'static str) -> Result<Bytes, ShapeError> {
        Ok(Bytes::from_static(variant.as_bytes()))
    }

    fn serialize_newtype_struct<T: ?Sized + Serialize>(self, _: &'static str, value: &T) -> Result<Bytes, ShapeError> {
        value.serialize(self)
    }

    refuse_serialize! { bytes none some unit seq tuple compound }
}
