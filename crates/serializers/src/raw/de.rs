use serde::de::value::SeqDeserializer;
use serde::de::{Deserializer, IntoDeserializer, Visitor};

use crate::shape::{ShapeError, refuse_deserialize};

#[cold]
fn refused(wanted: &str) -> ShapeError {
    ShapeError::new(format!("bytes becomes bytes or a list of u8, not {wanted}"))
}

/// Reads bytes as they are, as bytes or as a list of `u8`.
pub(crate) struct FromBytes<'de>(pub(crate) &'de [u8]);

impl<'de> FromBytes<'de> {
    fn refuse(wanted: &str) -> ShapeError {
        refused(wanted)
    }

    fn list<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        let mut octets = SeqDeserializer::new(self.0.iter().map(|byte| Octet(*byte)));
        let value = visitor.visit_seq(&mut octets)?;
        octets.end()?;
        Ok(value)
    }
}

impl<'de> Deserializer<'de> for FromBytes<'de> {
    type Error = ShapeError;

    fn is_human_readable(&self) -> bool {
        false
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_borrowed_bytes(self.0)
    }

    fn deserialize_bytes<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_borrowed_bytes(self.0)
    }

    fn deserialize_byte_buf<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_byte_buf(self.0.to_vec())
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        self.list(visitor)
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, len: usize, visitor: V) -> Result<V::Value, ShapeError> {
        if self.0.len() != len {
            return Err(ShapeError::new(format!("expected {len} bytes, found {}", self.0.len())));
        }
        self.list(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_unit()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_newtype_struct(self)
    }

    refuse_deserialize! {
        deserialize_bool() "bool"; deserialize_char() "char";
        deserialize_i8() "i8"; deserialize_i16() "i16"; deserialize_i32() "i32"; deserialize_i64() "i64";
        deserialize_i128() "i128"; deserialize_u8() "u8"; deserialize_u16() "u16"; deserialize_u32() "u32";
        deserialize_u64() "u64"; deserialize_u128() "u128"; deserialize_f32() "f32"; deserialize_f64() "f64";
        deserialize_str() "a string; use the format \"text\"";
        deserialize_string() "a string; use the format \"text\"";
        deserialize_identifier() "an identifier";
        deserialize_option() "an option";
        deserialize_unit() "a unit";
        deserialize_unit_struct(name: &'static str) "a unit struct";
        deserialize_tuple_struct(name: &'static str, len: usize) "a struct; use \"json\" or \"msgpack\"";
        deserialize_map() "a map; use \"json\" or \"msgpack\"";
        deserialize_struct(name: &'static str, fields: &'static [&'static str])
            "a struct; use \"json\" or \"msgpack\"";
        deserialize_enum(name: &'static str, variants: &'static [&'static str])
            "an enum; use \"json\" or \"msgpack\"";
    }
}

/// One element of the list: a `u8` and nothing else, so that bytes are not mistaken for a `Vec<u16>`.
struct Octet(u8);

impl Octet {
    fn refuse(wanted: &str) -> ShapeError {
        refused(&format!("a list of {wanted}"))
    }
}

impl IntoDeserializer<'_, ShapeError> for Octet {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> Deserializer<'de> for Octet {
    type Error = ShapeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_u8(self.0)
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_u8(self.0)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ShapeError> {
        visitor.visit_u8(self.0)
    }

    refuse_deserialize! {
        deserialize_bool() "bool"; deserialize_char() "char";
        deserialize_i8() "i8"; deserialize_i16() "i16"; deserialize_i32() "i32"; deserialize_i64() "i64";
        deserialize_i128() "i128"; deserialize_u16() "u16"; deserialize_u32() "u32"; deserialize_u64() "u64";
        deserialize_u128() "u128"; deserialize_f32() "f32"; deserialize_f64() "f64";
        deserialize_str() "strings"; deserialize_string() "strings"; deserialize_identifier() "identifiers";
        deserialize_bytes() "bytes"; deserialize_byte_buf() "bytes";
        deserialize_option() "options"; deserialize_unit() "units";
        deserialize_unit_struct(name: &'static str) "unit structs";
        deserialize_newtype_struct(name: &'static str) "structs";
        deserialize_seq() "lists"; deserialize_tuple(len: usize) "lists";
        deserialize_tuple_struct(name: &'static str, len: usize) "structs";
        deserialize_map() "maps";
        deserialize_struct(name: &'static str, fields: &'static [&'static str]) "structs";
        deserialize_enum(name: &'static str, variants: &'static [&'static str]) "enums";
    }
}
