//! Reads texts into typed settings, with errors that name the key, the value and where it came from.

use std::{cell::RefCell, fmt};

use serde::{
    Deserializer,
    de::{self, DeserializeOwned, IntoDeserializer, value::MapDeserializer},
    forward_to_deserialize_any,
};

use super::{Origin, redact::is_secret};
use crate::{Error, ErrorKind, Result};

pub(super) fn parse<'a, T: DeserializeOwned>(
    pairs: impl Iterator<Item = (&'a str, &'a str, &'a Origin)>,
    backend: &str,
) -> Result<T> {
    let current = RefCell::new(None);
    let entries = pairs.map(|(key, text, origin)| {
        let value = Value { key, text, origin };
        (Name { value, current: &current }, value)
    });
    T::deserialize(MapDeserializer::new(entries)).map_err(|Problem(problem)| {
        let sentence = match *current.borrow() {
            Some(Value { origin, .. }) if problem.starts_with("unknown setting") => format!("{problem} {origin}"),
            // What a field reads with a function of its own does not know where the text came from.
            Some(value) => value.annotate(Problem(problem)).0,
            None => problem,
        };
        Error::new(ErrorKind::Config, sentence).with_backend(backend.to_owned())
    })
}

/// `#[serde(with = "polymq_core::config::duration")]`: texts such as `250ms`, `2s`, `5m`.
pub mod duration {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// Reads a duration with its unit.
    ///
    /// # Errors
    /// When the text is no duration; a bare number is refused because its unit would be a guess.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(deserializer)?;
        humantime::parse_duration(&text)
            .map_err(|_| D::Error::custom("expected a duration with its unit, such as 250ms, 2s or 5m"))
    }

    /// Writes a duration the same way.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*duration))
    }
}

type Current<'a> = RefCell<Option<Value<'a>>>;

struct Name<'a, 'c> {
    value: Value<'a>,
    current: &'c Current<'a>,
}

impl<'de> IntoDeserializer<'de, Problem> for Name<'_, '_> {
    type Deserializer = de::value::StringDeserializer<Problem>;

    fn into_deserializer(self) -> Self::Deserializer {
        *self.current.borrow_mut() = Some(self.value);
        self.value.key.to_owned().into_deserializer()
    }
}

#[derive(Clone, Copy)]
struct Value<'a> {
    key: &'a str,
    text: &'a str,
    origin: &'a Origin,
}

impl<'de> IntoDeserializer<'de, Problem> for Value<'_> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl Value<'_> {
    fn problem(self, expected: impl fmt::Display) -> Problem {
        let value =
            if is_secret(self.key) || self.key == "url" { "its value".to_owned() } else { format!("{:?}", self.text) };
        Problem(format!("setting {:?} {}: {value} is not valid, {expected}", self.key, self.origin))
    }

    fn number<T: std::str::FromStr>(self) -> std::result::Result<T, Problem> {
        self.text.parse().map_err(|_| self.problem("expected a number in range"))
    }

    fn annotate(self, problem: Problem) -> Problem {
        if problem.0.starts_with("setting ") { problem } else { self.problem(problem.0) }
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident),* $(,)?) => {$(
        fn $method<V: de::Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, Problem> {
            visitor.$visit(self.number()?).map_err(|problem: Problem| self.annotate(problem))
        }
    )*};
}

impl<'de> Deserializer<'de> for Value<'_> {
    type Error = Problem;

    numbers!(
        deserialize_u8 visit_u8, deserialize_u16 visit_u16, deserialize_u32 visit_u32, deserialize_u64 visit_u64,
        deserialize_i8 visit_i8, deserialize_i16 visit_i16, deserialize_i32 visit_i32, deserialize_i64 visit_i64,
        deserialize_f32 visit_f32, deserialize_f64 visit_f64,
    );

    fn deserialize_bool<V: de::Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, Problem> {
        match self.text.to_ascii_lowercase().as_str() {
            "true" | "yes" | "on" | "1" => visitor.visit_bool(true),
            "false" | "no" | "off" | "0" => visitor.visit_bool(false),
            _ => Err(self.problem("expected true or false")),
        }
    }

    fn deserialize_option<V: de::Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, Problem> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: de::Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> std::result::Result<V::Value, Problem> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: de::Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> std::result::Result<V::Value, Problem> {
        if !variants.contains(&self.text) {
            return Err(self.problem(format_args!("expected one of {}", variants.join(", "))));
        }
        visitor.visit_enum(self.text.into_deserializer()).map_err(|problem: Problem| self.annotate(problem))
    }

    fn deserialize_any<V: de::Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, Problem> {
        visitor.visit_str(self.text).map_err(|problem: Problem| self.annotate(problem))
    }

    fn deserialize_string<V: de::Visitor<'de>>(self, visitor: V) -> std::result::Result<V::Value, Problem> {
        visitor.visit_str(self.text).map_err(|problem: Problem| self.annotate(problem))
    }

    forward_to_deserialize_any! {
        i128 u128 char str bytes byte_buf unit unit_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

/// A sentence about one setting.
#[derive(Debug)]
pub(super) struct Problem(String);

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Problem {}

impl de::Error for Problem {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self(match crate::config::nearest(field, expected.iter().copied()) {
            Some(near) => format!("unknown setting {field:?}, did you mean {near:?}? known: {}", expected.join(", ")),
            None => format!("unknown setting {field:?}; known: {}", expected.join(", ")),
        })
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("setting {field:?} is missing"))
    }
}
