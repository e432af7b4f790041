//! A message as a Kafka record and back. The body is never touched.
//!
//! The key is the record's key. Everything else is in headers: `content-type`, the attributes under CloudEvents'
//! names for Kafka's binary mode (`ce_id`, `ce_type`, ...), and the user's own by their names. The record's
//! timestamp stays the broker's affair: retention counts from it, and a message may be older than that.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use polymq_core::{Message, MessageId};
use rdkafka::message::{Header, Headers as _, OwnedHeaders};

const CONTENT_TYPE: &str = "content-type";
const ID: &str = "ce_id";
const KIND: &str = "ce_type";
const VERSION: &str = "ce_dataversion";
const TIME: &str = "ce_time";
const EXPIRES: &str = "ce_expirytime";
const CORRELATION: &str = "ce_correlationid";
const REPLY_TO: &str = "ce_replyto";

/// Before a user's header of the name of the content type, so that each keeps its own.
const ESCAPE: &str = "polymq:";

/// On records of a delay topic only: when the message is due. Never a header of a message.
const DUE: &str = "polymq-due";

/// The headers of a record; `due` is when a message in a delay topic is to be delivered, by a clock that nobody sets while
/// it waits to be sent.
pub(crate) fn headers(message: &Message, due: Option<Instant>) -> Option<OwnedHeaders> {
    let mut headers = None;
    let mut put = |name: &str, value: &str| {
        let known = headers.take().unwrap_or_else(|| OwnedHeaders::new_with_capacity(8));
        headers = Some(known.insert(Header { key: name, value: Some(value) }));
    };
    if let Some(value) = message.content_type() {
        put(CONTENT_TYPE, value);
    }
    if let Some(value) = message.id() {
        match value.as_uuid() {
            Some(uuid) => put(ID, uuid.hyphenated().encode_lower(&mut [0; 36])),
            None => put(ID, value.as_text().unwrap_or_default()),
        }
    }
    if let Some(value) = message.kind() {
        put(KIND, value);
    }
    if let Some(value) = message.version() {
        put(VERSION, &value.to_string());
    }
    if let Some(time) = message.time()
        && let Ok(since) = time.duration_since(SystemTime::UNIX_EPOCH)
        // An id that polymq made has the milliseconds in it already.
        && message.id().and_then(made_at).is_none_or(|made| made.as_millis() != since.as_millis())
    {
        put(TIME, &humantime::format_rfc3339(time).to_string());
    }
    if let Some(at) = message.expires_at().filter(|at| *at >= SystemTime::UNIX_EPOCH) {
        put(EXPIRES, &humantime::format_rfc3339(at).to_string());
    }
    if let Some(value) = message.correlation_id() {
        put(CORRELATION, value);
    }
    if let Some(value) = message.reply_to() {
        put(REPLY_TO, value);
    }
    if let Some(due) = due {
        put(DUE, &polymq_core::due_in(due.saturating_duration_since(Instant::now())));
    }
    for (name, value) in message.wire_headers() {
        if name.eq_ignore_ascii_case(CONTENT_TYPE) {
            put(&format!("{ESCAPE}{name}"), value);
        } else {
            put(name, value);
        }
    }
    headers
}

/// What the client library reads as text; `None` where another program wrote something else, at which it panics and for which
/// it has no other way to ask.
pub(crate) fn legible<T>(read: impl FnOnce() -> T) -> Option<T> {
    // It only looks.
    catch_unwind(AssertUnwindSafe(read)).ok()
}

/// When the broker took a record, or its producer made it, as the topic is set up: milliseconds since 1970.
pub(crate) fn taken_at(record: &impl rdkafka::message::Message) -> Option<u64> {
    u64::try_from(record.timestamp().to_millis()?).ok()
}

/// How long a record of a delay topic has to wait still, if it has to.
pub(crate) fn left(record: &impl rdkafka::message::Message) -> Option<Duration> {
    let headers = record.headers()?;
    let due = |at| legible(|| headers.try_get(at)).flatten().filter(|header| header.key == DUE)?.value;
    polymq_core::time_left(std::str::from_utf8((0..headers.count()).find_map(due)?).ok()?)
}

/// The message of a record with this body that was [`taken_at`] then. Whatever a foreign producer left out or wrote in another
/// way, it is a message.
pub(crate) fn message(record: &impl rdkafka::message::Message, body: Bytes, taken_at: Option<u64>) -> Message {
    let mut message = Message::new(body);
    if let Some(key) = record.key().and_then(|key| std::str::from_utf8(key).ok()) {
        message = message.with_key(key.to_owned());
    }
    let mut time = None;
    if let Some(headers) = record.headers() {
        for header in (0..headers.count()).filter_map(|at| legible(|| headers.try_get(at)).flatten()) {
            // Names and values of other producers that are no text are left out.
            let Some(Ok(value)) = header.value.map(std::str::from_utf8) else { continue };
            message = match header.key {
                CONTENT_TYPE => message.with_content_type(value.to_owned()),
                ID => message.with_id(value),
                KIND => message.with_kind(value.to_owned()),
                VERSION => match value.parse() {
                    Ok(version) => message.with_version(version),
                    Err(_) => message,
                },
                TIME => {
                    time = humantime::parse_rfc3339(value).ok();
                    message
                }
                EXPIRES => match humantime::parse_rfc3339(value) {
                    Ok(at) => message.with_expires_at(at),
                    Err(_) => message,
                },
                CORRELATION => message.with_correlation_id(value.to_owned()),
                REPLY_TO => message.with_reply_to(value.to_owned()),
                DUE => message,
                name => {
                    let own = name.strip_prefix(ESCAPE).filter(|own| own.eq_ignore_ascii_case(CONTENT_TYPE));
                    message.add_wire_header(own.unwrap_or(name).to_owned(), value.to_owned());
                    message
                }
            };
        }
    }
    let made = || message.id().and_then(made_at).map(|since| SystemTime::UNIX_EPOCH + since);
    let taken = || Some(SystemTime::UNIX_EPOCH + Duration::from_millis(taken_at?));
    if let Some(time) = time.or_else(made).or_else(taken) {
        message = message.with_time(time);
    }
    message
}

/// The time in a UUID of version 7 (RFC 9562, section 5.7).
fn made_at(id: &MessageId) -> Option<Duration> {
    let bits = id.as_uuid()?.as_u128();
    let millis = u64::try_from(bits >> 80).ok()?;
    (bits >> 76 & 0xf == 7).then_some(Duration::from_millis(millis))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rdkafka::message::{Message as _, OwnedMessage, Timestamp};

    const UUID: &str = "0190b5a3-6c1e-7d11-8f2b-7c0d3f1a2b3c";

    fn full() -> Message {
        let time = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_250_000);
        let mut message = Message::new("{}")
            .with_id(UUID)
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

    fn read(record: &OwnedMessage) -> Message {
        message(record, Bytes::copy_from_slice(record.payload().unwrap_or_default()), taken_at(record))
    }

    fn pairs(headers: Option<&OwnedHeaders>) -> Vec<(String, String)> {
        let text = |value: Option<&[u8]>| String::from_utf8(value.expect("a value").to_vec()).expect("text");
        headers.into_iter().flat_map(|headers| headers.iter()).map(|h| (h.key.to_owned(), text(h.value))).collect()
    }

    fn record(message: &Message, due: Option<Instant>) -> OwnedMessage {
        OwnedMessage::new(
            Some(message.payload().to_vec()),
            message.key().map(|key| key.as_bytes().to_vec()),
            "orders".into(),
            Timestamp::CreateTime(5_000),
            0,
            7,
            headers(message, due),
        )
    }

    #[test]
    fn a_full_message_has_these_headers() {
        let golden = [
            ("content-type", "application/json"),
            ("ce_id", UUID),
            ("ce_type", "order.created"),
            ("ce_dataversion", "3"),
            ("ce_time", "2023-11-14T22:13:20.250000000Z"),
            ("ce_expirytime", "2023-11-14T22:14:20.250000000Z"),
            ("ce_correlationid", "c-1"),
            ("ce_replyto", "replies"),
            ("tenant", "ácme"),
            ("polymq-attempt", "2"),
        ];
        let golden: Vec<_> = golden.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let record = record(&full(), None);
        assert_eq!(pairs(record.headers()), golden);
        assert_eq!((read(&record), left(&record)), (full(), None));
    }

    #[test]
    fn the_time_of_an_id_needs_no_header() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(0x0190_b5a3_6c1e);
        let sent = Message::new("").with_id(UUID).with_time(time);
        let written = record(&sent, None);
        assert_eq!(pairs(written.headers()), [("ce_id".to_owned(), UUID.to_owned())]);
        assert_eq!(read(&written), sent);
        let own = sent.with_time(time + Duration::from_nanos(1_000_001));
        assert_eq!(read(&record(&own, None)), own);
    }

    #[test]
    fn a_delay_is_told_and_taken_away_again() {
        let wait = Duration::from_secs(60);
        let record = record(&full(), Some(Instant::now() + wait));
        assert_eq!(read(&record), full());
        let left = left(&record);
        assert!(left.is_some_and(|left| left > wait / 2 && left <= wait + Duration::from_millis(1)), "{left:?}");
    }

    #[test]
    fn a_record_without_anything_is_a_message() {
        let bare = OwnedMessage::new(None, None, "orders".into(), Timestamp::CreateTime(5_000), 0, 7, None);
        assert_eq!(read(&bare), Message::new("").with_time(SystemTime::UNIX_EPOCH + Duration::from_secs(5)));
        assert_eq!(left(&bare), None);
        assert!(headers(&Message::new("x"), None).is_none());
    }

    #[test]
    fn what_is_no_text_is_left_out() {
        let foreign = OwnedHeaders::new()
            .insert(Header { key: "raw", value: Some(&[0xff, 0xfe][..]) })
            .insert(Header { key: "none", value: None::<&[u8]> })
            .insert(Header { key: "ce_source", value: Some("/shop") })
            .insert(Header { key: "ce_time", value: Some("yesterday") })
            .insert(Header { key: "ce_dataversion", value: Some("two") });
        let key = Some(vec![0, 159, 146]);
        let bare =
            OwnedMessage::new(Some(b"x".to_vec()), key, "t".into(), Timestamp::NotAvailable, 0, 7, Some(foreign));
        let found = read(&bare);
        assert_eq!(found.headers().iter().collect::<Vec<_>>(), [("ce_source", "/shop")]);
        assert_eq!((found.key(), found.version(), found.time()), (None, None, None));
    }

    #[test]
    fn a_header_of_the_name_of_the_content_type_stays_itself() {
        for name in ["content-type", "Content-Type"] {
            let sent = full().with_header(name, "text/plain");
            assert_eq!(read(&record(&sent, None)), sent, "{name}");
        }
    }
}
