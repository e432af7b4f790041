//! The error of the text and bytes formats, whose only difficulty is the shape of the value.

use std::fmt::Display;

/// Why a value does not fit a format without structure.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ShapeError {
    message: String,
    /// Whether the message was written here, so that it holds nothing from a body.
    ours: bool,
}

impl ShapeError {
    #[cold]
    pub(crate) fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), ours: true }
    }

    /// What may be shown of it.
    pub(crate) fn detail(&self, otherwise: &str) -> String {
        if self.ours {
            return self.message.clone();
        }
        crate::detail::expectation(&self.message).unwrap_or_else(|| otherwise.to_owned())
    }
}

impl serde::ser::Error for ShapeError {
    #[cold]
    fn custom<T: Display>(message: T) -> Self {
        Self { message: message.to_string(), ours: false }
    }
}

impl serde::de::Error for ShapeError {
    #[cold]
    fn custom<T: Display>(message: T) -> Self {
        Self { message: message.to_string(), ours: false }
    }
}

/// Serializer methods that answer with `Self::refuse`, by the kind of value they take.
macro_rules! refuse_serialize {
    ($($kind:ident)*) => { $( $crate::shape::refuse_serialize!(@ $kind); )* };
    (@ bool) => { $crate::shape::refuse_serialize!(@scalar serialize_bool bool); };
    (@ i8) => { $crate::shape::refuse_serialize!(@scalar serialize_i8 i8); };
    (@ i16) => { $crate::shape::refuse_serialize!(@scalar serialize_i16 i16); };
    (@ i32) => { $crate::shape::refuse_serialize!(@scalar serialize_i32 i32); };
    (@ i64) => { $crate::shape::refuse_serialize!(@scalar serialize_i64 i64); };
    (@ i128) => { $crate::shape::refuse_serialize!(@scalar serialize_i128 i128); };
    (@ u8) => { $crate::shape::refuse_serialize!(@scalar serialize_u8 u8); };
    (@ u16) => { $crate::shape::refuse_serialize!(@scalar serialize_u16 u16); };
    (@ u32) => { $crate::shape::refuse_serialize!(@scalar serialize_u32 u32); };
    (@ u64) => { $crate::shape::refuse_serialize!(@scalar serialize_u64 u64); };
    (@ u128) => { $crate::shape::refuse_serialize!(@scalar serialize_u128 u128); };
    (@ f32) => { $crate::shape::refuse_serialize!(@scalar serialize_f32 f32); };
    (@ f64) => { $crate::shape::refuse_serialize!(@scalar serialize_f64 f64); };
    (@ char) => { $crate::shape::refuse_serialize!(@scalar serialize_char char); };
    (@ str) => { $crate::shape::refuse_serialize!(@scalar serialize_str &str, "a string"); };
    (@ bytes) => { $crate::shape::refuse_serialize!(@scalar serialize_bytes &[u8], "bytes"); };
    (@scalar $method:ident $ty:ident) => {
        $crate::shape::refuse_serialize!(@scalar $method $ty, stringify!($ty));
    };
    (@scalar $method:ident $ty:ty, $what:expr) => {
        fn $method(self, _: $ty) -> Result<Self::Ok, Self::Error> {
            Err(Self::refuse($what))
        }
    };
    (@ none) => {
        fn serialize_none(self) -> Result<Self::Ok, Self::Error> { Err(Self::refuse("an absent option")) }
    };
    (@ some) => {
        fn serialize_some<T: ?Sized + serde::Serialize>(self, _: &T) -> Result<Self::Ok, Self::Error> {
            Err(Self::refuse("an option"))
        }
    };
    (@ unit) => {
        fn serialize_unit(self) -> Result<Self::Ok, Self::Error> { Err(Self::refuse("a unit")) }
        fn serialize_unit_struct(self, _: &'static str) -> Result<Self::Ok, Self::Error> {
            Err(Self::refuse("a unit struct"))
        }
    };
    (@ unit_variant) => {
        fn serialize_unit_variant(
            self, _: &'static str, _: u32, _: &'static str,
        ) -> Result<Self::Ok, Self::Error> {
            Err(Self::refuse("an enum"))
        }
    };
    (@ newtype_struct) => {
        fn serialize_newtype_struct<T: ?Sized + serde::Serialize>(
            self, _: &'static str, _: &T,
        ) -> Result<Self::Ok, Self::Error> {
            Err(Self::refuse("a struct"))
        }
    };
    (@ seq) => {
        fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, Self::Error> {
            Err(Self::refuse("a list"))
        }
    };
    (@ tuple) => {
        fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, Self::Error> {
            Err(Self::refuse("a list"))
        }
    };
    (@ compound) => {
        fn serialize_newtype_variant<T: ?Sized + serde::Serialize>(
            self, _: &'static str, _: u32, _: &'static str, _: &T,
        ) -> Result<Self::Ok, Self::Error> {
            Err(Self::refuse("an enum with data"))
        }
        fn serialize_tuple_struct(
            self, _: &'static str, _: usize,
        ) -> Result<Self::SerializeTupleStruct, Self::Error> {
            Err(Self::refuse("a struct"))
        }
        fn serialize_tuple_variant(
            self, _: &'static str, _: u32, _: &'static str, _: usize,
        ) -> Result<Self::SerializeTupleVariant, Self::Error> {
            Err(Self::refuse("an enum with data"))
        }
        fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, Self::Error> {
            Err(Self::refuse("a map"))
        }
        fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeStruct, Self::Error> {
            Err(Self::refuse("a struct"))
        }
        fn serialize_struct_variant(
            self, _: &'static str, _: u32, _: &'static str, _: usize,
        ) -> Result<Self::SerializeStructVariant, Self::Error> {
            Err(Self::refuse("an enum with data"))
        }
    };
}

/// Deserializer methods that answer with `Self::refuse`.
macro_rules! refuse_deserialize {
    ($($method:ident ( $($arg:ident: $ty:ty),* ) $what:literal;)*) => { $(
        fn $method<V: serde::de::Visitor<'de>>(self, $($arg: $ty,)* _: V) -> Result<V::Value, Self::Error> {
            $(let _ = $arg;)*
            Err(Self::refuse($what))
        }
    )* };
}

pub(crate) use {refuse_deserialize, refuse_serialize};
