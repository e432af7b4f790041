//! A message as a body with attributes, and back.
//!
//! SQS carries text: a body that is none (or is empty) travels in base64, and the attribute `polymq-body` says so. Ten
//! attributes are possible, with names and values under rules of their own; what is more, or does not fit these rules,
//! travels together as JSON in the attribute `polymq-packed`.

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use polymq_core::{Error, ErrorKind, Message, Result};
use serde_json::Value;

use crate::NAME;

const CONTENT_TYPE: &str = "content-type";
const ID: &str = "ce-id";
/// The attribute by which SNS filters kinds.
pub(crate) const KIND: &str = "ce-type";
const KEY: &str = "ce-partitionkey";
const TIME: &str = "ce-time";
const VERSION: &str = "ce-dataversion";
const CORRELATION: &str = "ce-correlationid";
const REPLY_TO: &str = "ce-replyto";
const EXPIRES: &str = "ce-expirytime";
/// How the body is written: `base64`, where it is not as it is.
pub(crate) const BODY: &str = "polymq-body";
const PACKED: &str = "polymq-packed";
const BASE64: &str = "base64";
/// An empty body: one character at least is asked for, and in base64 there is none.
const EMPTY: &str = "=";

/// Before the name of a packed header that is called like one of ours; no header's own name holds a colon.
const HEADER: &str = "header:";

/// From the service's own documents.
const MAX_ATTRIBUTES: usize = 10;

/// A message as it is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wire {
    pub(crate) body: String,
    pub(crate) attributes: Vec<(String, String)>,
}

impl Wire {
    /// What counts against the limits: the body, and names, types and values of the attributes.
    pub(crate) fn size(&self) -> usize {
        let attributes = self.attributes.iter().map(|(name, value)| name.len() + "String".len() + value.len());
        self.body.len() + attributes.sum::<usize>()
    }
}

/// Writes a message, unless it is larger than `max` then.
pub(crate) fn encode<'a>(message: &'a Message, max: usize) -> Result<Wire> {
    let (body, is_text) = match std::str::from_utf8(message.payload()) {
        Ok(text) if is_value(text) => (text.to_owned(), true),
        _ if message.payload().is_empty() => (EMPTY.to_owned(), false),
        _ => (BASE64_STANDARD.encode(message.payload()), false),
    };
    let mut fields: Vec<(Cow<'a, str>, String)> = Vec::new();
    if !is_text {
        fields.push((BODY.into(), BASE64.to_owned()));
    }
    let mut put = |name: &'static str, value: Option<String>| fields.extend(value.map(|value| (name.into(), value)));
    put(CONTENT_TYPE, message.content_type().map(str::to_owned));
    put(ID, message.id().map(ToString::to_string));
    put(KIND, message.kind().map(str::to_owned));
    put(KEY, message.key().map(str::to_owned));
    let first = fields.len();
    let mut put = |name: &'static str, value: Option<String>| fields.extend(value.map(|value| (name.into(), value)));
    put(TIME, message.time().map(text_of_time));
    put(VERSION, message.version().map(|version| version.to_string()));
    put(CORRELATION, message.correlation_id().map(str::to_owned));
    put(REPLY_TO, message.reply_to().map(str::to_owned));
    put(EXPIRES, message.expires_at().filter(|at| *at >= SystemTime::UNIX_EPOCH).map(text_of_time));
    // Before those that nobody filters by: the user's own, so that they stay visible to other clients.
    let header = |(name, value): (&'a str, &'a str)| {
        let name = if name == CONTENT_TYPE { Cow::Owned(format!("{HEADER}{name}")) } else { Cow::Borrowed(name) };
        (name, value.to_owned())
    };
    let headers: Vec<_> = message.wire_headers().map(header).collect();
    fields.splice(first..first, headers);
    let wire = Wire { body, attributes: pack(fields) };
    let size = wire.size();
    if size > max {
        let sentence = format!("a message of {size} bytes with its attributes, at most {max} are possible");
        return Err(Error::new(ErrorKind::TooLarge, sentence)
            .with_backend(NAME)
            .with_hint("send a reference to the data instead"));
    }
    Ok(wire)
}

/// As many fields as fit become attributes, the others one attribute together.
fn pack(fields: Vec<(Cow<'_, str>, String)>) -> Vec<(String, String)> {
    let plain: Vec<bool> = fields.iter().map(|(name, value)| is_name(name) && is_value(value)).collect();
    let rest = plain.iter().filter(|plain| !**plain).count();
    let room = if rest == 0 && fields.len() <= MAX_ATTRIBUTES { MAX_ATTRIBUTES } else { MAX_ATTRIBUTES - 1 };
    let (mut attributes, mut packed) = (Vec::new(), Vec::new());
    for ((name, value), plain) in fields.into_iter().zip(plain) {
        if plain && attributes.len() < room {
            attributes.push((name.into_owned(), value));
        } else {
            packed.push(Value::from(vec![name.into_owned(), value]));
        }
    }
    if !packed.is_empty() {
        attributes.push((PACKED.to_owned(), escaped(&Value::from(packed).to_string())));
    }
    attributes
}

/// What SQS and SNS take in bodies and values.
fn is_allowed(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

fn is_value(value: &str) -> bool {
    // Most texts are plain, which is seen without taking them apart.
    let plain = value.bytes().fold(true, |plain, byte| plain & matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r'));
    !value.is_empty() && (plain || value.chars().all(is_allowed))
}

fn is_name(name: &str) -> bool {
    let lower = name.to_ascii_lowercase();
    let reserved = lower.starts_with("aws.") || lower.starts_with("amazon.");
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    !reserved && name.bytes().all(allowed) && !name.starts_with('.') && !name.ends_with('.') && !name.contains("..")
}

/// JSON may hold more characters than SQS takes.
fn escaped(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        if is_allowed(c) { text.push(c) } else { text += &format!("\\u{:04x}", u32::from(c)) }
    }
    text
}

fn text_of_time(time: SystemTime) -> String {
    humantime::format_rfc3339(time).to_string()
}

/// Reads a message. Whatever a foreign producer left out or wrote in another way, it is a message.
pub(crate) fn decode(body: String, attributes: impl IntoIterator<Item = (String, String)>) -> Message {
    let mut message = Message::default();
    let mut in_base64 = false;
    let mut packed = None;
    for (name, value) in attributes {
        match name.as_str() {
            BODY => in_base64 = value == BASE64,
            PACKED => packed = Some(value),
            _ => message = with_field(message, name, value),
        }
    }
    let pairs: Vec<(String, String)> = packed.and_then(|json| serde_json::from_str(&json).ok()).unwrap_or_default();
    for (name, value) in pairs {
        match name.strip_prefix(HEADER) {
            Some(name) => message.add_wire_header(name.to_owned(), value),
            None => message = with_field(message, name, value),
        }
    }
    match body.as_str() {
        EMPTY if in_base64 => message,
        _ if in_base64 => match BASE64_STANDARD.decode(&body) {
            Ok(bytes) => message.with_payload(bytes),
            Err(_) => message.with_payload(body),
        },
        _ => message.with_payload(body),
    }
}

fn with_field(mut message: Message, name: String, value: String) -> Message {
    match name.as_str() {
        CONTENT_TYPE => message.with_content_type(value),
        ID => message.with_id(value),
        KIND => message.with_kind(value),
        KEY => message.with_key(value),
        CORRELATION => message.with_correlation_id(value),
        REPLY_TO => message.with_reply_to(value),
        VERSION => match value.parse() {
            Ok(version) => message.with_version(version),
            Err(_) => message,
        },
        TIME => match humantime::parse_rfc3339(&value) {
            Ok(time) => message.with_time(time),
            Err(_) => message,
        },
        EXPIRES => match humantime::parse_rfc3339(&value) {
            Ok(time) => message.with_expires_at(time),
            Err(_) => message,
        },
        _ => {
            message.add_wire_header(name, value);
            message
        }
    }
}

/// The seconds of a delay: never early, and SQS knows whole ones only.
pub(crate) fn seconds(delay: Duration) -> i32 {
    let whole = delay.as_secs().saturating_add((delay.subsec_nanos() > 0).into());
    i32::try_from(whole).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: usize = 1024 * 1024;

    fn round_trip(message: &Message) -> Message {
        let wire = encode(message, MAX).expect("fits");
        assert!(wire.attributes.len() <= MAX_ATTRIBUTES, "{:?}", wire.attributes);
        for (name, value) in &wire.attributes {
            assert!(is_name(name) && is_value(value), "{name} {value:?}");
        }
        assert!(!wire.body.is_empty() && wire.body.chars().all(is_allowed));
        decode(wire.body, wire.attributes)
    }

    fn full() -> Message {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_250_000);
        let mut message = Message::new("{}")
            .with_id("0190b5a3-6c1e-7d11-8f2b-7c0d3f1a2b3c")
            .with_content_type("application/json")
            .with_kind("order.created")
            .with_version(3)
            .with_time(time)
            .with_key("customer-7")
            .with_correlation_id("c-1")
            .with_reply_to("replies")
            .with_expires_at(time + Duration::from_secs(60))
            .with_header("tenant", "ácme");
        message.set_system_header(polymq_core::ATTEMPT, "2");
        message
    }

    #[test]
    fn an_expiry_far_away_is_written_too() {
        for time in [Duration::from_secs(1 << 40), Duration::from_secs(1 << 50)] {
            let lasting = Message::new("x").with_expires_at(SystemTime::UNIX_EPOCH + time);
            assert_eq!(round_trip(&lasting), lasting);
        }
    }

    #[test]
    fn a_full_message_is_written_like_this() {
        let wire = encode(&full(), MAX).expect("fits");
        let own = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        assert_eq!(wire.body, "{}");
        assert_eq!(
            wire.attributes,
            own(&[
                ("content-type", "application/json"),
                ("ce-id", "0190b5a3-6c1e-7d11-8f2b-7c0d3f1a2b3c"),
                ("ce-type", "order.created"),
                ("ce-partitionkey", "customer-7"),
                ("tenant", "ácme"),
                ("polymq-attempt", "2"),
                ("ce-time", "2023-11-14T22:13:20.250000000Z"),
                ("ce-dataversion", "3"),
                ("ce-correlationid", "c-1"),
                ("polymq-packed", r#"[["ce-replyto","replies"],["ce-expirytime","2023-11-14T22:14:20.250000000Z"]]"#),
            ])
        );
        assert_eq!(round_trip(&full()), full());
    }

    #[test]
    fn bodies_that_are_no_text_are_marked() {
        for body in [&b""[..], b"\0", b"\xff\xfe", b"=", "\u{fffe}".as_bytes(), b"plain text\r\n"] {
            let message = Message::new(body.to_vec());
            assert_eq!(round_trip(&message), message, "{body:?}");
        }
        assert_eq!(encode(&Message::new("text"), MAX).expect("fits").attributes, []);
    }

    #[test]
    fn headers_that_sqs_refuses_are_packed() {
        let mut message = Message::new("x").with_content_type("text/plain");
        for (name, value) in [
            ("empty", ""),
            ("ends.", "with a dot"),
            ("a..b", "dots"),
            ("aws.x", "reserved"),
            ("content-type", "the user's own"),
            ("noncharacter", "\u{ffff}"),
        ] {
            message = message.with_header(name, value);
        }
        assert_eq!(round_trip(&message), message);
        let many = (0..40).fold(full(), |message, n| message.with_header(format!("h-{n}"), format!("{n}")));
        let got = round_trip(&many);
        assert_eq!(got.headers().len(), 41);
        assert!(many.headers().iter().all(|(name, value)| got.headers().get(name) == Some(value)));
    }

    #[test]
    fn what_is_too_large_is_refused_and_foreign_attributes_are_headers() {
        assert_eq!(encode(&Message::new("xxxx"), 3).expect_err("too large").kind(), ErrorKind::TooLarge);
        let read = decode("body".into(), [("tenant".to_owned(), "acme".to_owned()), (TIME.into(), "yesterday".into())]);
        assert_eq!(read, Message::new("body").with_header("tenant", "acme"));
        // Not ours although it says so.
        assert_eq!(decode("%".into(), [(BODY.to_owned(), BASE64.to_owned())]), Message::new("%"));
    }

    #[test]
    fn delays_are_whole_seconds_and_never_early() {
        let of = |millis| seconds(Duration::from_millis(millis));
        assert_eq!([of(0), of(1), of(1000), of(1001), of(1500)], [0, 1, 1, 2, 2]);
        assert_eq!(seconds(Duration::MAX), i32::MAX);
    }
}
