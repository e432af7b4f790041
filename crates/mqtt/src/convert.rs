//! Messages to PUBLISH packets and back.
//!
//! MQTT 5's own properties come first: content type, response topic (`reply_to`), correlation data, message expiry
//! and the payload format indicator. The other attributes are user properties under their CloudEvents names:
//! `id`, `type`, `dataversion`, `time`, `partitionkey`, `expirytime`. Headers are user properties under their own
//! names; a header that is called like an attribute travels as `polymq-header-<name>`, so that a foreign `id` can
//! only be an id. MQTT 3.1.1 carries the body alone.

use std::{sync::Arc, time::Duration, time::SystemTime};

use bytes::Bytes;
use polymq_core::{Details, ErrorKind, Message, Result, Text, until};
use rumqttc::v5::mqttbytes::{
    QoS,
    v5::{Publish, PublishProperties},
};

use crate::{config::Protocol, error::error, topology::check_text};

const ID: &str = "id";
const KIND: &str = "type";
const VERSION: &str = "dataversion";
const TIME: &str = "time";
const KEY: &str = "partitionkey";
const EXPIRES: &str = "expirytime";
const ATTRIBUTES: [&str; 6] = [ID, KIND, VERSION, TIME, KEY, EXPIRES];

/// Before the name of a header that is called like an attribute.
const HEADER: &str = "polymq-header-";

/// Before the bytes of a correlation id that are no text, in hexadecimal digits. They are bytes again where it is sent.
const BINARY: &str = "polymq-hex:";

/// System header of a retry's copy: the time before which nobody handles it.
pub(crate) const DUE: &str = "polymq-due";

/// How a producer publishes.
#[derive(Debug, Clone)]
pub(crate) struct Style {
    pub(crate) topic: Bytes,
    pub(crate) qos: QoS,
    pub(crate) retain: bool,
    pub(crate) protocol: Protocol,
}

/// The packet of a message, without packet id.
pub(crate) fn to_publish(message: &Message, style: &Style) -> Result<Publish> {
    if message.deliver_at().is_some() {
        return Err(polymq_core::Error::unsupported(crate::NAME, "delivering later"));
    }
    let properties = match style.protocol {
        Protocol::V5 => Some(properties(message)?),
        Protocol::V311 => {
            check_bare(message)?;
            None
        }
    };
    Ok(Publish {
        dup: false,
        qos: style.qos,
        retain: style.retain,
        topic: style.topic.clone(),
        // Lent when it is written; what is measured until then counts it.
        pkid: u16::from(style.qos != QoS::AtMostOnce),
        payload: message.payload().clone(),
        properties,
    })
}

/// MQTT 3.1.1 has no place for these, and without them the receiver would do something else.
fn check_bare(message: &Message) -> Result<()> {
    let lost = [
        ("a reply address", message.reply_to().is_some()),
        ("a correlation id", message.correlation_id().is_some()),
        ("an expiry time", message.expires_at().is_some()),
        ("headers", !message.headers().is_empty()),
    ];
    match lost.iter().find(|(_, present)| *present) {
        Some((what, _)) => Err(polymq_core::Error::unsupported(crate::NAME, format_args!("{what} under MQTT 3.1.1"))
            .with_hint("use protocol=5")),
        None => Ok(()),
    }
}

fn properties(message: &Message) -> Result<PublishProperties> {
    let headers = message.headers().len() + message.system_headers().len();
    let mut user = Vec::with_capacity(headers + 3);
    let mut add = |name: &str, value: String| {
        check_text(name, &value)?;
        user.push((name.to_owned(), value));
        Ok::<(), polymq_core::Error>(())
    };
    if let Some(id) = message.id() {
        add(ID, id.to_string())?;
    }
    if let Some(kind) = message.kind() {
        add(KIND, kind.to_owned())?;
    }
    if let Some(version) = message.version() {
        add(VERSION, version.to_string())?;
    }
    if let Some(time) = message.time().and_then(rfc_3339) {
        add(TIME, time)?;
    }
    if let Some(key) = message.key() {
        add(KEY, key.to_owned())?;
    }
    let expires = message.expires_at();
    if let Some(at) = expires.and_then(rfc_3339) {
        add(EXPIRES, at)?;
    }
    for (name, value) in message.headers().iter() {
        check_text("a header's name", name)?;
        match ATTRIBUTES.contains(&name) {
            true => add(&format!("{HEADER}{name}"), value.to_owned())?,
            false => add(name, value.to_owned())?,
        }
    }
    for (name, value) in message.system_headers().iter() {
        add(name, value.to_owned())?;
    }
    if let Some(content_type) = message.content_type() {
        check_text("the content type", content_type)?;
    }
    if let Some(queue) = message.reply_to() {
        check_text("the reply address", queue)?;
        if queue.is_empty() || queue.contains(['+', '#']) {
            return Err(error(ErrorKind::InvalidInput, format!("the reply address {queue:?} is no topic name")));
        }
    }
    let correlation = message.correlation_id().map(correlation_data);
    if correlation.as_ref().is_some_and(|data| data.len() > usize::from(u16::MAX)) {
        return Err(error(ErrorKind::TooLarge, "the correlation id has more than 65535 bytes"));
    }
    Ok(PublishProperties {
        payload_format_indicator: is_text(message).then_some(1),
        message_expiry_interval: expires.map(|at| expiry_interval(until(at))),
        topic_alias: None,
        response_topic: message.reply_to().map(str::to_owned),
        correlation_data: correlation,
        user_properties: user,
        subscription_identifiers: Vec::new(),
        content_type: message.content_type().map(str::to_owned),
    })
}

/// Years before 1970 or after 9999 have no text.
fn rfc_3339(time: SystemTime) -> Option<String> {
    use std::fmt::Write;
    let mut text = String::with_capacity(30);
    write!(text, "{}", humantime::format_rfc3339(time)).ok()?;
    Some(text)
}

/// Rounded up: the broker must not drop a message early, and `expirytime` has the exact moment.
fn expiry_interval(left: Duration) -> u32 {
    let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
    u32::try_from(seconds).unwrap_or(u32::MAX).max(1)
}

/// A body that claims to be text must be UTF-8, or the broker may refuse it.
fn is_text(message: &Message) -> bool {
    let Some(content_type) = message.content_type() else { return false };
    let claims =
        content_type.starts_with("text/") || content_type == "application/json" || content_type.ends_with("+json");
    claims && std::str::from_utf8(message.payload()).is_ok()
}

/// A packet as a message; what the broker tells beside it.
pub(crate) fn from_publish(publish: Publish) -> (Message, Option<Box<Details>>) {
    let details = (publish.dup || publish.retain)
        .then(|| Box::new(Details { redelivered: publish.dup, retained: publish.retain, ..Details::default() }));
    let mut message = Message::new(publish.payload);
    let Some(properties) = publish.properties else { return (message, details) };
    if let Some(content_type) = properties.content_type {
        message = message.with_content_type(content_type);
    }
    if let Some(topic) = properties.response_topic {
        message = message.with_reply_to(topic);
    }
    if let Some(data) = properties.correlation_data {
        message = message.with_correlation_id(correlation_id(data));
    }
    let mut expires = None;
    for (name, value) in properties.user_properties {
        message = match name.as_str() {
            ID if message.id().is_none() && !value.is_empty() => message.with_id(value),
            KIND if message.kind().is_none() => message.with_kind(value),
            KEY if message.key().is_none() => message.with_key(value),
            VERSION => match value.parse() {
                Ok(version) if message.version().is_none() => message.with_version(version),
                _ => header(message, name, value),
            },
            TIME => match humantime::parse_rfc3339(&value) {
                Ok(time) if message.time().is_none() => message.with_time(time),
                _ => header(message, name, value),
            },
            EXPIRES => match humantime::parse_rfc3339(&value) {
                Ok(at) if expires.is_none() => {
                    expires = Some(at);
                    message
                }
                _ => header(message, name, value),
            },
            _ => match name.strip_prefix(HEADER) {
                Some(own) => header(message, own.to_owned(), value),
                None => header(message, name, value),
            },
        };
    }
    // A broker counts the interval down while it holds the message, so that what is left holds from now on.
    let left = properties.message_expiry_interval.map(|left| polymq_core::now() + Duration::from_secs(left.into()));
    if let Some(at) = expires.or(left) {
        message = message.with_expires_at(at);
    }
    (message, details)
}

/// The protocol knows bytes, and a message text.
fn correlation_id(data: Bytes) -> String {
    use std::fmt::Write;
    String::from_utf8(data.into()).unwrap_or_else(|data| {
        data.as_bytes().iter().fold(BINARY.to_owned(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    })
}

/// Only what [`correlation_id`] writes is read back: each id stays what it is, also one that looks alike.
fn correlation_data(id: &str) -> Bytes {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let binary = id.strip_prefix(BINARY).filter(|digits| digits.len().is_multiple_of(2)).and_then(|digits| {
        let pairs = digits.as_bytes().chunks_exact(2);
        pairs.map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect::<Option<Vec<u8>>>()
    });
    match binary {
        Some(bytes) if std::str::from_utf8(&bytes).is_err() => bytes.into(),
        _ => Bytes::copy_from_slice(id.as_bytes()),
    }
}

fn header(mut message: Message, name: impl Into<Text>, value: String) -> Message {
    message.add_wire_header(name, value);
    message
}

/// Makes a message wait wherever it is received.
pub(crate) fn set_due_in(message: &mut Message, wait: Duration) {
    message.set_system_header(DUE, polymq_core::due_in(wait));
}

/// How long a message has to wait.
pub(crate) fn due_in(message: &Message) -> Option<Duration> {
    polymq_core::time_left(message.system_headers().get(DUE)?).filter(|wait| !wait.is_zero())
}

/// The concrete topic, where it is not the one that was asked for.
pub(crate) fn concrete_topic(publish: &Publish, asked: &str) -> Option<Arc<str>> {
    let differs = publish.topic != asked.as_bytes();
    differs.then(|| String::from_utf8_lossy(&publish.topic).into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BytesMut;

    fn style(protocol: Protocol) -> Style {
        Style { topic: Bytes::from_static(b"orders"), qos: QoS::AtLeastOnce, retain: false, protocol }
    }

    fn full() -> Message {
        let moment = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_250);
        let mut message = Message::new("{}")
            .with_id("a1")
            .with_kind("order.created")
            .with_version(3)
            .with_time(moment)
            .with_key("k-1")
            .with_content_type("application/json")
            .with_correlation_id("c9")
            .with_reply_to("answers")
            .with_header("tenant", "acme")
            .with_header("time", "noon");
        message.set_system_header(polymq_core::ATTEMPT, "2");
        message
    }

    fn bytes(message: &Message, protocol: Protocol) -> BytesMut {
        let mut publish = to_publish(message, &style(protocol)).expect("can be sent");
        publish.pkid = 7;
        let mut bytes = BytesMut::new();
        let packet = crate::wire::Packet::Publish(publish);
        tokio_util::codec::Encoder::encode(&mut crate::wire::Codec::new(protocol), packet, &mut bytes)
            .expect("encodes");
        bytes
    }

    fn back(mut bytes: BytesMut, protocol: Protocol) -> Publish {
        let mut codec = crate::wire::Codec::new(protocol);
        match tokio_util::codec::Decoder::decode(&mut codec, &mut bytes).expect("decodes").expect("whole") {
            crate::wire::Packet::Publish(publish) => publish,
            other => panic!("{other:?}"),
        }
    }

    fn property(name: &str, value: &str) -> Vec<u8> {
        let mut bytes = vec![0x26];
        for text in [name, value] {
            bytes.extend((text.len() as u16).to_be_bytes());
            bytes.extend(text.as_bytes());
        }
        bytes
    }

    #[test]
    fn golden_bytes() {
        let mut properties = vec![0x01, 1];
        properties.extend(b"\x08\x00\x07answers");
        properties.extend(b"\x09\x00\x02c9");
        for (name, value) in [
            ("id", "a1"),
            ("type", "order.created"),
            ("dataversion", "3"),
            ("time", "2023-11-14T22:13:20.250000000Z"),
            ("partitionkey", "k-1"),
            ("tenant", "acme"),
            ("polymq-header-time", "noon"),
            ("polymq-attempt", "2"),
        ] {
            properties.extend(property(name, value));
        }
        properties.extend(b"\x03\x00\x10application/json");
        let mut rest = b"\x00\x06orders\x00\x07".to_vec();
        assert!((128..16384).contains(&properties.len()));
        rest.extend([(properties.len() % 128) as u8 | 0x80, (properties.len() / 128) as u8]);
        rest.extend(&properties);
        rest.extend(b"{}");
        let mut expected = vec![0x32, (rest.len() % 128) as u8 | 0x80, (rest.len() / 128) as u8];
        expected.extend(rest);
        assert_eq!(bytes(&full(), Protocol::V5), expected);
        let (message, details) = from_publish(back(BytesMut::from(&expected[..]), Protocol::V5));
        assert_eq!(message, full());
        assert_eq!(details, None);
    }

    #[test]
    fn a_bare_foreign_message_is_a_message() {
        for (protocol, packet) in
            [(Protocol::V5, &b"\x30\x06\x00\x01t\x00hi"[..]), (Protocol::V311, &b"\x30\x05\x00\x01thi"[..])]
        {
            let (message, _) = from_publish(back(BytesMut::from(packet), protocol));
            assert_eq!(message, Message::new("hi"), "{protocol:?}");
        }
    }

    #[test]
    fn version_3_1_1_carries_the_body_alone() {
        let message = Message::new("{}").with_id("a1").with_content_type("application/json");
        assert_eq!(bytes(&message, Protocol::V311), &b"\x32\x0c\x00\x06orders\x00\x07{}"[..]);
        for lost in [
            Message::new("").with_reply_to("q"),
            Message::new("").with_correlation_id("c"),
            Message::new("").expires_in(Duration::from_secs(9)),
            Message::new("").with_header("a", "b"),
        ] {
            let error = to_publish(&lost, &style(Protocol::V311)).expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
    }

    #[test]
    fn a_reply_carries_the_bytes_that_its_request_had() {
        for data in
            [&b"plain"[..], b"", b"\xff\x00\x9c", b"polymq-hex:ff", b"polymq-hex:61", b"polymq-hex:f", b"polymq-hex:FF"]
        {
            let properties =
                PublishProperties { correlation_data: Some(Bytes::from_static(data)), ..PublishProperties::default() };
            let publish = Publish { properties: Some(properties), ..Publish::default() };
            let request = from_publish(publish).0;
            let reply = Message::new("").with_correlation_id(request.correlation_id().expect("carried").to_owned());
            let sent = to_publish(&reply, &style(Protocol::V5)).expect("can be sent").properties;
            let sent = sent.and_then(|properties| properties.correlation_data).expect("carried");
            // A text that looks like bytes is bytes; whatever came as bytes goes as such.
            let expected = if data == b"polymq-hex:ff" { &b"\xff"[..] } else { data };
            assert_eq!(sent, expected, "{data:?}");
        }
        let longest = Message::new("").with_correlation_id(format!("{BINARY}{}", "ff".repeat(65_535)));
        to_publish(&longest, &style(Protocol::V5)).expect("as long as the protocol allows");
    }

    #[test]
    fn unreadable_attributes_stay_headers() {
        let user = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let publish = Publish {
            topic: Bytes::from_static(b"t"),
            properties: Some(PublishProperties {
                user_properties: vec![
                    user("time", "yesterday"),
                    user("dataversion", "v2"),
                    user("id", "1"),
                    user("id", "2"),
                ],
                ..PublishProperties::default()
            }),
            ..Publish::default()
        };
        let (message, _) = from_publish(publish);
        assert_eq!(message.headers().get("time"), Some("yesterday"));
        assert_eq!(message.headers().get("dataversion"), Some("v2"));
        assert_eq!(message.id().map(ToString::to_string).as_deref(), Some("1"));
        assert_eq!(message.headers().get("id"), Some("2"));
    }

    #[test]
    fn expiry_travels_as_interval_and_as_moment() {
        let message = Message::new("x").expires_in(Duration::from_millis(1500));
        let publish = to_publish(&message, &style(Protocol::V5)).expect("can be sent");
        let properties = publish.properties.clone().expect("properties");
        assert_eq!(properties.message_expiry_interval, Some(2));
        assert_eq!(from_publish(publish).0.expires_at(), message.expires_at());
        assert_eq!(expiry_interval(Duration::ZERO), 1);
    }

    #[test]
    fn only_text_claims_to_be_text() {
        for (content_type, body, text) in [
            ("application/json", &b"{}"[..], true),
            ("text/plain; charset=utf-8", b"hi", true),
            ("application/cloudevents+json", b"{}", true),
            ("text/plain", b"\xff", false),
            ("application/octet-stream", b"hi", false),
        ] {
            let message = Message::new(body).with_content_type(content_type);
            assert_eq!(is_text(&message), text, "{content_type} {body:?}");
        }
    }

    #[test]
    fn what_would_break_the_connection_is_refused() {
        for message in [
            Message::new("").with_kind("a\u{0}b"),
            Message::new("").with_content_type("a\nb"),
            Message::new("").with_key("x".repeat(70_000)),
            Message::new("").with_reply_to("a/#"),
            Message::new("").with_header("h", "\u{fffe}"),
        ] {
            to_publish(&message, &style(Protocol::V5)).expect_err("refused");
        }
    }
}
