//! A message as AMQP properties and back. The body is never touched.

use std::time::{Duration, SystemTime};

use lapin::{
    BasicProperties,
    types::{AMQPValue, FieldTable, ShortString},
};
use polymq_core::{Message, MessageId, Result, until};

use crate::error;

const KEY: &str = "cloudEvents:partitionkey";
const VERSION: &str = "cloudEvents:dataversion";
/// AMQP's own timestamp has whole seconds only.
const TIME: &str = "cloudEvents:time";
/// Tells the consumer what `expiration`, a duration, cannot: when a message in its prefetch window expires.
const EXPIRES: &str = "cloudEvents:expirytime";

/// Properties of AMQP that no attribute of a message stands for: headers of these names, so that copies keep them.
const ENCODING: &str = "amqp-content-encoding";
const PRIORITY: &str = "amqp-priority";
const APP: &str = "amqp-app-id";

/// System header: the routing key under which a message reached a wildcard subscription. A copy that is sent
/// straight to the queue would lose it.
pub(crate) const CHANNEL: &str = "polymq-channel";

/// In front of a user's header whose name the broker keeps for itself; no header's own name holds a colon.
const ESCAPE: &str = "polymq:";

/// Longest text of a property, from the protocol's one length byte.
const MAX_SHORT: usize = 255;

/// Checks what the protocol cannot carry, before anything is sent.
pub(crate) fn check(message: &Message) -> Result<()> {
    let fields = [
        ("content type", message.content_type()),
        ("kind", message.kind()),
        ("correlation id", message.correlation_id()),
        ("reply address", message.reply_to()),
        ("message id", message.id().and_then(MessageId::as_text)),
    ];
    for (name, value) in fields {
        if let Some(value) = value.filter(|value| value.len() > MAX_SHORT) {
            return Err(error::invalid(format!("the {name} has {} bytes, AMQP carries {MAX_SHORT}", value.len())));
        }
    }
    Ok(())
}

/// The properties of a message; `expires` says whether the broker is told to drop it in time.
pub(crate) fn properties(message: &Message, persistent: bool, expires: bool) -> Result<BasicProperties> {
    let mut properties = BasicProperties::default().with_delivery_mode(if persistent { 2 } else { 1 });
    if let Some(value) = message.content_type() {
        properties = properties.with_content_type(short(value)?);
    }
    if let Some(value) = message.kind() {
        properties = properties.with_type(short(value)?);
    }
    if let Some(value) = message.correlation_id() {
        properties = properties.with_correlation_id(short(value)?);
    }
    if let Some(value) = message.reply_to() {
        properties = properties.with_reply_to(short(value)?);
    }
    if let Some(value) = message.id() {
        properties = properties.with_message_id(short(value.to_string())?);
    }
    let mut table = FieldTable::default();
    let mut put = |name: &str, value: &str| -> Result<()> {
        table.insert(short(name)?, AMQPValue::LongString(value.into()));
        Ok(())
    };
    for (name, value) in message.wire_headers() {
        let priority = if name == PRIORITY { value.parse().ok() } else { None };
        match (name, priority) {
            (_, Some(priority)) => properties = properties.with_priority(priority),
            (ENCODING, _) if value.len() <= MAX_SHORT => properties = properties.with_content_encoding(short(value)?),
            (APP, _) if value.len() <= MAX_SHORT => properties = properties.with_app_id(short(value)?),
            _ if is_brokers_own(name) => put(&format!("{ESCAPE}{name}"), value)?,
            _ => put(name, value)?,
        }
    }
    if let Some(value) = message.key() {
        put(KEY, value)?;
    }
    if let Some(value) = message.version() {
        put(VERSION, &value.to_string())?;
    }
    if let Some(time) = message.time()
        && let Ok(since) = time.duration_since(SystemTime::UNIX_EPOCH)
    {
        properties = properties.with_timestamp(since.as_secs());
        // A table of headers costs the broker a tenth of its work on a message, so it is not there for this alone: an id
        // that polymq made has the milliseconds in it.
        if message.id().and_then(made_at) != Some(since.as_millis()) {
            put(TIME, &humantime::format_rfc3339(time).to_string())?;
        }
    }
    if let Some(at) = message.expires_at() {
        if at >= SystemTime::UNIX_EPOCH {
            put(EXPIRES, &humantime::format_rfc3339(at).to_string())?;
        }
        if expires {
            let millis = until(at).as_millis().min(u128::from(u32::MAX));
            properties = properties.with_expiration(short(millis.to_string())?);
        }
    }
    if !table.inner().is_empty() {
        properties = properties.with_headers(table);
    }
    Ok(properties)
}

/// The message of a delivery. Whatever a foreign producer left out or wrote in another way, it is a message.
pub(crate) fn message(properties: &BasicProperties, body: Vec<u8>) -> Message {
    let mut message = Message::new(body);
    let mut precise = None;
    for (name, value) in properties.headers().iter().flatten() {
        let name = name.as_str();
        let Some(value) = text(value).filter(|_| !is_brokers_own(name)) else { continue };
        message = match name {
            KEY => message.with_key(value),
            VERSION => match value.parse() {
                Ok(version) => message.with_version(version),
                Err(_) => message,
            },
            TIME => {
                precise = humantime::parse_rfc3339(&value).ok();
                message
            }
            EXPIRES => match humantime::parse_rfc3339(&value) {
                Ok(at) => message.with_expires_at(at),
                Err(_) => message,
            },
            _ => {
                let escaped = name.strip_prefix(ESCAPE).filter(|name| is_brokers_own(name));
                message.add_wire_header(escaped.unwrap_or(name).to_owned(), value);
                message
            }
        };
    }
    let owned = |value: &Option<ShortString>| value.as_ref().map(|value| value.as_str().to_owned());
    if let Some(value) = owned(properties.content_type()) {
        message = message.with_content_type(value);
    }
    if let Some(value) = owned(properties.kind()) {
        message = message.with_kind(value);
    }
    if let Some(value) = owned(properties.correlation_id()) {
        message = message.with_correlation_id(value);
    }
    if let Some(value) = owned(properties.reply_to()) {
        message = message.with_reply_to(value);
    }
    if let Some(id) = properties.message_id() {
        message = message.with_id(id.as_str());
    }
    if let Some(value) = owned(properties.content_encoding()) {
        message.add_wire_header(ENCODING, value);
    }
    if let Some(value) = properties.priority() {
        message.add_wire_header(PRIORITY, value.to_string());
    }
    if let Some(value) = owned(properties.app_id()) {
        message.add_wire_header(APP, value);
    }
    match precise.or_else(|| coarse(properties, &message)) {
        Some(time) => message.with_time(time),
        None => message,
    }
}

/// The time of a message without a precise one.
fn coarse(properties: &BasicProperties, message: &Message) -> Option<SystemTime> {
    let seconds = (*properties.timestamp())?;
    let made = message.id().and_then(made_at).filter(|millis| millis / 1000 == u128::from(seconds));
    let since = match made.and_then(|millis| u64::try_from(millis).ok()) {
        Some(millis) => Duration::from_millis(millis),
        None => Duration::from_secs(seconds),
    };
    SystemTime::UNIX_EPOCH.checked_add(since)
}

/// The milliseconds in a UUID of version 7 (RFC 9562, section 5.7).
fn made_at(id: &MessageId) -> Option<u128> {
    let bits = id.as_uuid()?.as_u128();
    (bits >> 76 & 0xf == 7).then_some(bits >> 80)
}

/// Headers by which the broker steers or in which it keeps its own history: `CC` and `BCC` route, the others
/// tell of dead-lettering, which polymq's delay queues use. A user's header of such a name travels [escaped](ESCAPE).
fn is_brokers_own(name: &str) -> bool {
    matches!(name, "CC" | "BCC" | "x-death" | "x-delivery-count" | "x-acquired-count")
        || name.starts_with("x-first-death-")
        || name.starts_with("x-last-death-")
}

/// A header of a foreign producer as text, where it is one or has an obvious one.
fn text(value: &AMQPValue) -> Option<String> {
    Some(match value {
        AMQPValue::LongString(text) => std::str::from_utf8(text.as_bytes()).ok()?.to_owned(),
        AMQPValue::ShortString(text) => text.as_str().to_owned(),
        AMQPValue::Boolean(value) => value.to_string(),
        AMQPValue::ShortShortInt(value) => value.to_string(),
        AMQPValue::ShortShortUInt(value) => value.to_string(),
        AMQPValue::ShortInt(value) => value.to_string(),
        AMQPValue::ShortUInt(value) => value.to_string(),
        AMQPValue::LongInt(value) => value.to_string(),
        AMQPValue::LongUInt(value) => value.to_string(),
        AMQPValue::LongLongInt(value) => value.to_string(),
        AMQPValue::Timestamp(value) => value.to_string(),
        AMQPValue::Float(value) => value.to_string(),
        AMQPValue::Double(value) => value.to_string(),
        _ => return None,
    })
}

pub(crate) fn short(text: impl Into<String>) -> Result<ShortString> {
    let text = text.into();
    let bytes = text.len();
    ShortString::try_new(text)
        .map_err(|_| error::invalid(format!("a text of {bytes} bytes, AMQP carries {MAX_SHORT} here")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use polymq_core::ErrorKind;

    const ID: &str = "0190b5a3-6c1e-7d11-8f2b-7c0d3f1a2b3c";

    fn full() -> Message {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_250_000);
        let mut message = Message::new("{}")
            .with_id(ID)
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
    fn a_full_message_has_these_properties() {
        let written = properties(&full(), true, false).expect("fits");
        let mut table = FieldTable::default();
        for (name, value) in [
            ("tenant", "ácme"),
            ("polymq-attempt", "2"),
            ("cloudEvents:partitionkey", "customer-7"),
            ("cloudEvents:dataversion", "3"),
            ("cloudEvents:time", "2023-11-14T22:13:20.250000000Z"),
            ("cloudEvents:expirytime", "2023-11-14T22:14:20.250000000Z"),
        ] {
            table.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        let golden = BasicProperties::default()
            .with_content_type("application/json".into())
            .with_headers(table)
            .with_delivery_mode(2)
            .with_correlation_id("c-1".into())
            .with_reply_to("replies".into())
            .with_message_id(ID.into())
            .with_timestamp(1_700_000_000)
            .with_type("order.created".into());
        assert_eq!(written, golden);
        assert_eq!(message(&golden, b"{}".to_vec()), full());
    }

    #[test]
    fn the_time_of_an_id_needs_no_header() {
        let millis = 0x0190_b5a3_6c1e;
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(millis);
        let sent = Message::new("").with_id(ID).with_time(time);
        let written = properties(&sent, true, true).expect("fits");
        let golden =
            BasicProperties::default().with_delivery_mode(2).with_message_id(ID.into()).with_timestamp(millis / 1000);
        assert_eq!(written, golden);
        assert_eq!(message(&golden, Vec::new()), sent);
        // Any other time is exact, and of a foreign producer in whole seconds.
        let own = sent.with_time(time + Duration::from_nanos(1_000_001));
        assert_eq!(message(&properties(&own, true, true).expect("fits"), Vec::new()), own);
        let other = golden.with_timestamp(5);
        assert_eq!(message(&other, Vec::new()).time(), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(5)));
    }

    #[test]
    fn the_broker_is_told_how_long_a_message_lives() {
        let soon = Message::new("").expires_in(Duration::from_secs(5));
        let written = properties(&soon, false, true).expect("fits");
        let millis: u64 = written.expiration().as_ref().and_then(|text| text.as_str().parse().ok()).expect("a number");
        assert!((4_000..=5_000).contains(&millis), "{millis}");
        assert_eq!(written.delivery_mode(), &Some(1));
        let late = Message::new("").with_expires_at(SystemTime::UNIX_EPOCH);
        assert_eq!(properties(&late, true, true).expect("fits").expiration(), &Some("0".into()));
    }

    #[test]
    fn a_message_without_any_property_is_a_message() {
        let read = message(&BasicProperties::default(), vec![0, 159, 255]);
        assert_eq!(read, Message::new(vec![0, 159, 255]));
        let written = properties(&read, true, true).expect("fits");
        assert_eq!(written, BasicProperties::default().with_delivery_mode(2));
    }

    #[test]
    fn foreign_headers_are_read_as_text_where_they_have_one() {
        let mut table = FieldTable::default();
        table.insert("n".into(), AMQPValue::LongInt(-7));
        table.insert("b".into(), AMQPValue::Boolean(true));
        table.insert("t".into(), AMQPValue::LongString("text".into()));
        table.insert("raw".into(), AMQPValue::LongString(vec![0xff, 0xfe].into()));
        table.insert("deep".into(), AMQPValue::FieldTable(FieldTable::default()));
        table.insert("x-death".into(), AMQPValue::LongString("x".into()));
        table.insert("x-first-death-queue".into(), AMQPValue::LongString("x".into()));
        table.insert(TIME.into(), AMQPValue::LongString("yesterday".into()));
        let properties = BasicProperties::default().with_headers(table).with_timestamp(5);
        let read = message(&properties, Vec::new());
        assert_eq!(read.headers().iter().collect::<Vec<_>>(), [("b", "true"), ("n", "-7"), ("t", "text")]);
        assert_eq!(read.time(), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(5)));
    }

    #[test]
    fn properties_without_an_attribute_are_headers_and_come_back_in_a_copy() {
        let foreign = BasicProperties::default()
            .with_delivery_mode(2)
            .with_content_encoding("gzip".into())
            .with_priority(7)
            .with_app_id("billing".into());
        let read = message(&foreign, Vec::new());
        let headers = [("amqp-content-encoding", "gzip"), ("amqp-priority", "7"), ("amqp-app-id", "billing")];
        assert_eq!(read.headers().iter().collect::<Vec<_>>(), headers);
        assert!(read.headers().check().is_ok(), "they can be sent on");
        assert_eq!(properties(&read, true, true).expect("fits"), foreign);
        // What the properties cannot hold is a header like others.
        let long = "x".repeat(MAX_SHORT + 1);
        let sent = Message::new("").with_header(APP, long).with_header(PRIORITY, "high");
        let written = properties(&sent, true, true).expect("fits");
        assert_eq!((written.priority(), written.app_id()), (&None, &None));
        assert_eq!(message(&written, Vec::new()), sent);
    }

    #[test]
    fn headers_that_steer_the_broker_travel_under_another_name() {
        let sent = Message::new("").with_header("CC", "a").with_header("x-death", "b").with_header("x-delay", "c");
        assert!(check(&sent).is_ok());
        let mut table = FieldTable::default();
        for (name, value) in [("polymq:CC", "a"), ("polymq:x-death", "b"), ("x-delay", "c")] {
            table.insert(name.into(), AMQPValue::LongString(value.into()));
        }
        let golden = BasicProperties::default().with_delivery_mode(2).with_headers(table);
        assert_eq!(properties(&sent, true, true).expect("fits"), golden);
        let mut read: Vec<_> =
            message(&golden, Vec::new()).headers().iter().map(|(name, value)| format!("{name}={value}")).collect();
        read.sort();
        assert_eq!(read, ["CC=a", "x-death=b", "x-delay=c"]);
    }

    #[test]
    fn what_the_protocol_cannot_carry_is_refused() {
        let long = "x".repeat(256);
        for message in [Message::new("").with_kind(long.clone()), Message::new("").with_id(long.as_str())] {
            assert_eq!(check(&message).expect_err("too long").kind(), ErrorKind::InvalidInput);
        }
        assert!(check(&full()).is_ok());
    }
}
