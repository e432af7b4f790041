use serde::de::value::BorrowedStrDeserializer;
use serde::de::{Deserializer, Visitor};

use crate::shape::{ShapeError, refuse_deserialize};

/// Reads one scalar from text.
pub(crate) struct FromText<'de>(pub(crate) &'de str);

impl FromText<'_> {
    #[cold]
    fn refuse(wanted: &str) -> ShapeError {
        ShapeError::new(format!("text becomes a string, char, number, bool or unit variant, not {wanted}"))
    }
}

macro_rules! parse {
    ($($method:ident $visit:ident $ty:ident,)*) => { $(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
            let parsed = self.0.parse::<$ty>();
            visitor.$visit(parsed.map_err(|_| ShapeError::new(concat!("expected ", stringify!($ty), " as text")))?)
        }
    )* };
}

impl<'de> Deserializer<'de> for FromText<'de> {
    type Error = ShapeError;

    parse! {
        deserialize_bool visit_bool bool, deserialize_char visit_char char,
        deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16, deserialize_i32 visit_i32 i32,
        deserialize_i64 visit_i64 i64, deserialize_i128 visit_i128 i128,
        deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_u128 visit_u128 u128,
        deserialize_f32 visit_f32 f32, deserialize_f64 visit_f64 f64,
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_borrowed_str(self.0)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ShapeError> {
        visitor.visit_enum(BorrowedStrDeserializer::new(self.0))
    }

    refuse_deserialize! {
        deserialize_bytes() "bytes; use the format \"bytes\"";
        deserialize_byte_buf() "bytes; use the format \"bytes\"";
        deserialize_option() "an option";
        deserialize_unit() "a unit";
        deserialize_unit_struct(name: &'static str) "a unit struct";
        deserialize_seq() "a list; use \"json\" or \"msgpack\"";
        deserialize_tuple(len: usize) "a list; use \"json\" or \"msgpack\"";
        deserialize_tuple_struct(name: &'static str, len: usize) "a struct; use \"json\" or \"msgpack\"";
        deserialize_map() "a map; use \"json\" or \"msgpack\"";
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
            "a struct; use \"json\" or \"msgpack\"";
    }
}
