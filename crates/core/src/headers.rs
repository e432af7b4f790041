//! Headers: UTF-8 names and values that travel beside the body, under rules that are the same on every backend.

use std::{borrow::Cow, collections::HashMap, fmt};

use crate::{Error, ErrorKind, Result};

/// A short text that is often a literal: a header name, a content type, a kind.
pub type Text = Cow<'static, str>;

/// Prefix of the headers in which polymq keeps its own state (attempt, dead-letter reason).
pub const SYSTEM_PREFIX: &str = "polymq-";

/// The most headers one message may carry.
pub const MAX_HEADERS: usize = 64;
/// The longest header name, in bytes.
const MAX_NAME_BYTES: usize = 128;
/// The longest header value, in bytes.
pub const MAX_VALUE_BYTES: usize = 4096;
/// Names and values together, in bytes; the smallest header area of the supported brokers.
pub const MAX_TOTAL_BYTES: usize = 16 * 1024;

/// Where each name is. Boxed as a whole: few messages have it, and all with headers are moved.
#[derive(Clone)]
struct Places(HashMap<Text, usize>);

/// Name-value pairs in the order of first insertion; a name occurs once.
///
/// Sending checks them with [`Headers::check`]; what breaks a rule is refused before anything is
/// sent, alike on all backends, because a set that only some brokers carry would tie a service to them.
#[derive(Clone, Default)]
pub struct Headers {
    pairs: Vec<(Text, Text)>,
    /// Where each name is, above [`MAX_HEADERS`]: what comes over a wire may have any number of them, and looking through all
    /// for each would take for ever.
    places: Option<Box<Places>>,
}

impl Headers {
    /// No headers; does not allocate.
    #[must_use]
    pub const fn new() -> Self {
        Self { pairs: Vec::new(), places: None }
    }

    /// Sets `name`; a second call for the same name replaces the value.
    pub fn insert(&mut self, name: impl Into<Text>, value: impl Into<Text>) {
        let (name, value) = (name.into(), value.into());
        if let Some(at) = self.place(&name) {
            self.pairs[at].1 = value;
            return;
        }
        let at = self.pairs.len();
        if at >= MAX_HEADERS {
            let all = || self.pairs.iter().enumerate().map(|(at, (name, _))| (name.clone(), at)).collect();
            self.places.get_or_insert_with(|| Box::new(Places(all()))).0.insert(name.clone(), at);
        }
        self.pairs.push((name, value));
    }

    fn place(&self, name: &str) -> Option<usize> {
        match &self.places {
            Some(places) => places.0.get(name).copied(),
            None => self.pairs.iter().position(|(known, _)| known == name),
        }
    }

    /// The value of `name` (case-sensitive).
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.place(name).map(|at| self.pairs[at].1.as_ref())
    }

    /// Removes `name` and returns its value.
    pub fn remove(&mut self, name: &str) -> Option<Text> {
        let at = self.place(name)?;
        self.places = None;
        Some(self.pairs.remove(at).1)
    }

    /// Every pair, in order of first insertion.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.pairs.iter().map(|(name, value)| (name.as_ref(), value.as_ref()))
    }

    /// How many pairs there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// Checks the rules that every backend shares.
    ///
    /// A name is 1 to 128 bytes of `a-z A-Z 0-9 - _ .`, not one of polymq's or CloudEvents' own
    /// (`polymq-`, `ce-`, `ce_`, `cloudEvents`), and differs from the others by more than case. A value is at
    /// most 4096 bytes of UTF-8 without control characters (MQTT 5, section 1.5.4, forbids them and HTTP
    /// cannot carry them). At most 64 headers and 16 KiB in all.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] naming the header and the rule.
    pub fn check(&self) -> Result<()> {
        if self.pairs.is_empty() {
            return Ok(());
        }
        if self.pairs.len() > MAX_HEADERS {
            return Err(refuse(format!("{} headers, at most {MAX_HEADERS} are allowed", self.pairs.len())));
        }
        let mut total = 0;
        for (at, (name, value)) in self.pairs.iter().enumerate() {
            check_name(name)?;
            check_value(name, value)?;
            total += name.len() + value.len();
            if let Some((other, _)) = self.pairs[..at].iter().find(|(other, _)| other.eq_ignore_ascii_case(name)) {
                return Err(refuse(format!("headers {other:?} and {name:?} differ only by case; use one of them")));
            }
        }
        if total > MAX_TOTAL_BYTES {
            return Err(refuse(format!("headers of {total} bytes, at most {MAX_TOTAL_BYTES} are allowed")));
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(allowed) {
        return Err(refuse(format!(
            "header name {:?}, expected 1 to {MAX_NAME_BYTES} characters of a-z A-Z 0-9 - _ .",
            shorten(name)
        )));
    }
    let reserved = ["polymq-", "ce-", "ce_", "cloudevents"];
    let lower = name.to_ascii_lowercase();
    if let Some(prefix) = reserved.iter().find(|prefix| lower.starts_with(**prefix)) {
        return Err(refuse(format!("header name {name:?} starts with the reserved {prefix:?}; choose another name")));
    }
    Ok(())
}

fn check_value(name: &str, value: &str) -> Result<()> {
    if value.len() > MAX_VALUE_BYTES {
        return Err(refuse(format!(
            "value of header {name:?} has {} bytes, at most {MAX_VALUE_BYTES} are allowed; put it in the body",
            value.len()
        )));
    }
    check_text(name, value)
}

/// Refuses what some protocols cannot carry, and what ends an MQTT connection.
pub(crate) fn check_text(name: &str, value: &str) -> Result<()> {
    if let Some(control) = value.chars().find(|c| c.is_control()) {
        return Err(refuse(format!(
            "value of header {name:?} holds the control character {control:?}, which brokers refuse; encode it"
        )));
    }
    Ok(())
}

fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cold]
fn refuse(sentence: String) -> Error {
    Error::new(ErrorKind::InvalidInput, sentence)
}

impl PartialEq for Headers {
    fn eq(&self, other: &Self) -> bool {
        self.pairs == other.pairs
    }
}

impl Eq for Headers {}

impl fmt::Debug for Headers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be personal data; names are enough to debug with.
        f.debug_set().entries(self.pairs.iter().map(|(name, _)| name)).finish()
    }
}

impl<N: Into<Text>, V: Into<Text>> FromIterator<(N, V)> for Headers {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        let mut headers = Self::new();
        for (name, value) in pairs {
            headers.insert(name, value);
        }
        headers
    }
}
