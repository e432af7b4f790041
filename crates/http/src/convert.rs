//! A message as HTTP headers and back: CloudEvents 1.0, HTTP protocol binding, binary mode. The body is never touched.

use std::{borrow::Cow, fmt::Write, time::SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, header};
use percent_encoding::{AsciiSet, CONTROLS, percent_decode_str, utf8_percent_encode};
use polymq_core::{Error, ErrorKind, Message, Result, SYSTEM_PREFIX};

use crate::NAME;

const ID: &str = "ce-id";
const KIND: &str = "ce-type";
const TIME: &str = "ce-time";
const KEY: &str = "ce-partitionkey";
const VERSION: &str = "ce-dataversion";
const EXPIRES: &str = "ce-expirytime";
const CORRELATION: &str = "ce-correlationid";
const REPLY_TO: &str = "ce-replyto";
/// Headers of the user that HTTP cannot carry under their own name, or not unchanged: `name=value&…`, percent-encoded.
const ESCAPED: &str = "polymq-headers";

/// CloudEvents, HTTP binding, section 3.1.3.2: space, double quote, percent and what is not visible ASCII.
const ATTRIBUTE: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');
const PAIR: &AsciiSet = &ATTRIBUTE.add(b'&').add(b'=');

/// Writes everything but the body.
pub(crate) fn to_headers(message: &Message, headers: &mut HeaderMap) -> Result<()> {
    // Names that are known while compiling cost nothing when a message is sent.
    macro_rules! put {
        ($name:expr, $value:expr) => {
            headers.insert(const { HeaderName::from_static($name) }, $value)
        };
    }
    // Id and time, which nearly every message has, in one piece of memory.
    let mut texts = BytesMut::with_capacity(80);
    if let Some(id) = message.id() {
        let value = match id.as_uuid() {
            // Nothing in it has to be encoded.
            Some(uuid) => {
                texts.put_slice(uuid.hyphenated().encode_lower(&mut [0; 36]).as_bytes());
                shared(&mut texts)?
            }
            None => encoded(&id.to_string())?,
        };
        put!(ID, value);
    }
    if let Some(value) = message.kind() {
        put!(KIND, encoded(value)?);
        // Only what has a type is an event of CloudEvents; what says that it is one and has none is refused by others.
        put!("ce-specversion", const { HeaderValue::from_static("1.0") });
        put!("ce-source", const { HeaderValue::from_static(NAME) });
    }
    if let Some(value) = message.version() {
        put!(VERSION, HeaderValue::from(value));
    }
    if let Some(value) = message.key() {
        put!(KEY, encoded(value)?);
    }
    if let Some(value) = message.correlation_id() {
        put!(CORRELATION, encoded(value)?);
    }
    if let Some(value) = message.reply_to() {
        put!(REPLY_TO, encoded(value)?);
    }
    if let Some(time) = message.time() {
        put_time(&mut texts, time);
        put!(TIME, shared(&mut texts)?);
    }
    if let Some(at) = message.expires_at().filter(|at| *at >= SystemTime::UNIX_EPOCH) {
        put_time(&mut texts, at);
        put!(EXPIRES, shared(&mut texts)?);
    }
    if let Some(value) = message.content_type() {
        let value = HeaderValue::from_str(value).map_err(|_| {
            Error::new(ErrorKind::InvalidInput, format!("the content type {value:?} is no header value"))
                .with_backend(NAME)
        })?;
        headers.insert(header::CONTENT_TYPE, value);
    }
    for (name, value) in message.system_headers().iter() {
        headers.insert(header_name(name)?, encoded(value)?);
    }
    let mut escaped = String::new();
    for (name, value) in message.headers().iter() {
        if is_plain(name, value) {
            headers.insert(header_name(name)?, header_value(value.to_owned())?);
        } else {
            let separator = if escaped.is_empty() { "" } else { "&" };
            let (name, value) = (utf8_percent_encode(name, PAIR), utf8_percent_encode(value, PAIR));
            escaped += &format!("{separator}{name}={value}");
        }
    }
    if !escaped.is_empty() {
        headers.insert(HeaderName::from_static(ESCAPED), header_value(escaped)?);
    }
    Ok(())
}

/// The message of a request or of an answer; `Err` is what is wrong with it, for its sender. Whatever a sender that knows
/// nothing of polymq has left out, it is a message.
pub(crate) fn message(headers: &HeaderMap, body: Bytes) -> Result<Message, String> {
    let mut message = Message::new(body);
    for name in headers.keys() {
        let text = name.as_str();
        if is_of_http(text) {
            continue;
        }
        let value = joined(headers, name)?;
        message = match text {
            "content-type" => message.with_content_type(value),
            "idempotency-key" if !headers.contains_key(ID) && !value.is_empty() => message.with_id(value),
            ID if !value.is_empty() => message.with_id(decoded(text, &value)?),
            KIND => message.with_kind(decoded(text, &value)?),
            KEY => message.with_key(decoded(text, &value)?),
            CORRELATION => message.with_correlation_id(decoded(text, &value)?),
            REPLY_TO => message.with_reply_to(decoded(text, &value)?),
            VERSION => match decoded(text, &value)?.parse() {
                Ok(version) => message.with_version(version),
                Err(_) => message,
            },
            TIME => match humantime::parse_rfc3339(&decoded(text, &value)?) {
                Ok(time) => message.with_time(time),
                Err(_) => message,
            },
            EXPIRES => match humantime::parse_rfc3339(&decoded(text, &value)?) {
                Ok(at) => message.with_expires_at(at),
                Err(_) => message,
            },
            ESCAPED => {
                for pair in value.split('&') {
                    let (name, value) =
                        pair.split_once('=').ok_or_else(|| format!("{ESCAPED}: {pair:?} is no pair"))?;
                    message.add_wire_header(decoded(ESCAPED, name)?, decoded(ESCAPED, value)?);
                }
                message
            }
            // Attributes of CloudEvents that a message has no place for.
            _ if text.starts_with("ce-") => message,
            _ => {
                let value = if text.starts_with(SYSTEM_PREFIX) { decoded(text, &value)? } else { value };
                message.add_wire_header(text.to_owned(), value);
                message
            }
        };
    }
    Ok(message)
}

/// Whether a header arrives as it is under its own name: HTTP has no case in names and trims values.
fn is_plain(name: &str, value: &str) -> bool {
    !name.bytes().any(|byte| byte.is_ascii_uppercase())
        && !is_of_http(name)
        && !matches!(name, "content-type" | "idempotency-key")
        && value.trim() == value
        && value.bytes().all(|byte| (b' '..=b'~').contains(&byte))
}

/// Headers that steer HTTP itself or belong to the one connection; they are not the user's.
fn is_of_http(name: &str) -> bool {
    matches!(
        name,
        "accept"
            | "accept-charset"
            | "accept-encoding"
            | "accept-language"
            | "allow"
            | "authorization"
            | "cache-control"
            | "connection"
            | "content-encoding"
            | "content-length"
            | "cookie"
            | "date"
            | "expect"
            | "forwarded"
            | "from"
            | "host"
            | "keep-alive"
            | "origin"
            | "pragma"
            | "priority"
            | "proxy-authorization"
            | "proxy-connection"
            | "range"
            | "referer"
            | "retry-after"
            | "server"
            | "set-cookie"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "upgrade-insecure-requests"
            | "user-agent"
            | "vary"
            | "via"
            | "www-authenticate"
    ) || ["sec-", "if-", "x-forwarded-", "access-control-"].iter().any(|prefix| name.starts_with(prefix))
}

fn put_time(texts: &mut BytesMut, time: SystemTime) {
    // It has room for all there is to write.
    let _ = write!(texts, "{}", humantime::format_rfc3339(time));
}

/// What was written since the last call.
fn shared(texts: &mut BytesMut) -> Result<HeaderValue> {
    header_value(texts.split().freeze())
}

/// All values of a header; several are one list (RFC 9110, section 5.3).
fn joined(headers: &HeaderMap, name: &HeaderName) -> Result<String, String> {
    let mut text = String::new();
    for value in headers.get_all(name) {
        let value = std::str::from_utf8(value.as_bytes()).map_err(|_| format!("the header {name} is no UTF-8"))?;
        if !text.is_empty() {
            text += ", ";
        }
        text += value;
    }
    Ok(text)
}

pub(crate) fn encoded(text: &str) -> Result<HeaderValue> {
    // In one piece when nothing in it has to be encoded, which is nearly always so.
    header_value(Cow::from(utf8_percent_encode(text, ATTRIBUTE)).into_owned())
}

pub(crate) fn decoded(name: &str, text: &str) -> Result<String, String> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(Into::into).map_err(|_| format!("the header {name} is no percent-encoded UTF-8"))
}

fn header_name(name: &str) -> Result<HeaderName> {
    HeaderName::from_bytes(name.as_bytes())
        .map_err(|_| Error::new(ErrorKind::InvalidInput, format!("{name:?} is no name of a header")).with_backend(NAME))
}

fn header_value(value: impl Into<Bytes>) -> Result<HeaderValue> {
    HeaderValue::from_maybe_shared(value.into())
        .map_err(|_| Error::new(ErrorKind::InvalidInput, "a text is no value of a header").with_backend(NAME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use polymq_testkit::golden_message;

    fn there_and_back(message: &Message) -> Message {
        let mut headers = HeaderMap::new();
        to_headers(message, &mut headers).expect("carried");
        super::message(&headers, message.payload().clone()).expect("read")
    }

    #[test]
    fn a_full_message_has_these_headers() {
        let mut message = golden_message().with_header("Plain-Case", "x").with_header("plain", "a b=c&d%");
        message.set_system_header(polymq_core::ATTEMPT, "2");
        let mut headers = HeaderMap::new();
        to_headers(&message, &mut headers).expect("carried");
        let mut lines: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().expect("ASCII"))).collect();
        lines.sort();
        assert_eq!(
            lines,
            [
                "ce-correlationid: saga-1",
                "ce-dataversion: 2",
                "ce-id: 0190a0a0-0000-7000-8000-000000000007",
                "ce-partitionkey: customer-7",
                "ce-replyto: replies",
                "ce-source: http",
                "ce-specversion: 1.0",
                "ce-time: 2023-11-14T22:13:20.123000000Z",
                "ce-type: order.created",
                "content-type: application/json",
                "plain: a b=c&d%",
                "polymq-attempt: 2",
                "polymq-headers: tenant=acme%20%C3%A9&Plain-Case=x",
            ]
        );
        let back = there_and_back(&message);
        for name in ["tenant", "Plain-Case", "plain"] {
            assert_eq!(back.headers().get(name), message.headers().get(name));
        }
        assert_eq!((back.id(), back.time(), back.key()), (message.id(), message.time(), message.key()));
        assert_eq!(back.header_attempt(), 2);
    }

    #[test]
    fn attributes_are_percent_encoded() {
        let message = Message::new("").with_key("50 % \"é\"").with_kind("ä");
        let mut headers = HeaderMap::new();
        to_headers(&message, &mut headers).expect("carried");
        assert_eq!(headers[KEY], "50%20%25%20%22%C3%A9%22");
        assert_eq!(there_and_back(&message).key(), message.key());
    }

    #[test]
    fn what_steers_http_is_not_the_users_and_the_users_does_not_steer_http() {
        let names = ["host", "content-length", "transfer-encoding", "connection", "retry-after", "content-type", "te"];
        let message = names.iter().fold(Message::new("x"), |message, name| message.with_header(*name, "mine"));
        let mut headers = HeaderMap::new();
        to_headers(&message, &mut headers).expect("carried");
        assert!(names.iter().all(|name| !headers.contains_key(*name)), "{headers:?}");
        assert!(names.iter().all(|name| there_and_back(&message).headers().get(name) == Some("mine")));
        headers.insert("host", HeaderValue::from_static("example.org"));
        headers.insert("x-forwarded-for", HeaderValue::from_static("10.0.0.1"));
        let read = super::message(&headers, Bytes::new()).expect("read");
        assert_eq!((read.headers().len(), read.headers().get("host")), (names.len(), Some("mine")));
    }

    #[test]
    fn a_foreign_message_is_a_message_and_a_broken_one_says_why() {
        let mut headers = HeaderMap::new();
        headers.append("tags", HeaderValue::from_static("50%"));
        headers.append("tags", HeaderValue::from_static("b"));
        headers.insert("idempotency-key", HeaderValue::from_static("k-1"));
        headers.insert("ce-subject", HeaderValue::from_static("x"));
        headers.insert("ce-time", HeaderValue::from_static("yesterday"));
        let read = super::message(&headers, Bytes::from_static(b"\xff")).expect("read");
        assert_eq!((read.headers().len(), read.headers().get("tags")), (1, Some("50%, b")));
        assert_eq!(read.id().map(ToString::to_string).as_deref(), Some("k-1"));
        headers.insert("ce-type", HeaderValue::from_static("%ff"));
        let problem = super::message(&headers, Bytes::new()).expect_err("no UTF-8");
        assert!(problem.contains("ce-type"), "{problem}");
    }
}
