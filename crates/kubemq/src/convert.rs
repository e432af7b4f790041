//! A message as KubeMQ carries it, and back.
//!
//! The body is the user's. The id is the message's own id; KubeMQ's metadata is the header `kubemq-metadata`; headers are
//! tags of their name, and attributes are tags named as in CloudEvents' binary mode.

use std::{
    collections::HashMap,
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use polymq_core::{Message, MessageId, now};
use polymq_kubemq_proto::{Event, EventReceive, QueueMessage, QueueMessagePolicy};

const CONTENT_TYPE: &str = "content-type";
const KIND: &str = "ce-type";
const KEY: &str = "ce-partitionkey";
const TIME: &str = "ce-time";
const VERSION: &str = "ce-dataversion";
const CORRELATION: &str = "ce-correlationid";
const REPLY_TO: &str = "ce-replyto";
const EXPIRES: &str = "ce-expirytime";

/// The header that is KubeMQ's metadata.
const METADATA: &str = "kubemq-metadata";
/// The metadata of a message without a body, which KubeMQ refuses without any.
const EMPTY: &str = "polymq: no body";
/// Before the name of a header that is called like one of ours; no header's own name holds a colon.
const HEADER: &str = "header:";

/// The longest delay and expiration that servers take.
pub(crate) const MAX_SECONDS: u64 = 43_200;

/// What both kinds of channel carry.
pub(crate) struct Wire {
    pub(crate) id: String,
    pub(crate) metadata: String,
    pub(crate) body: Bytes,
    pub(crate) tags: HashMap<String, String>,
}

impl Wire {
    pub(crate) fn of(message: &Message) -> Self {
        let mut tags = HashMap::new();
        let mut metadata = String::new();
        for (name, value) in message.wire_headers() {
            match name {
                METADATA => value.clone_into(&mut metadata),
                CONTENT_TYPE => drop(tags.insert(format!("{HEADER}{name}"), value.to_owned())),
                _ => drop(tags.insert(name.to_owned(), value.to_owned())),
            }
        }
        let mut put = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                tags.insert(name.to_owned(), value);
            }
        };
        put(CONTENT_TYPE, message.content_type().map(str::to_owned));
        put(KIND, message.kind().map(str::to_owned));
        put(KEY, message.key().map(str::to_owned));
        put(TIME, message.time().map(text_of_time));
        put(VERSION, message.version().map(|version| version.to_string()));
        put(CORRELATION, message.correlation_id().map(str::to_owned));
        put(REPLY_TO, message.reply_to().map(str::to_owned));
        put(EXPIRES, message.expires_at().filter(|at| *at >= SystemTime::UNIX_EPOCH).map(text_of_time));
        if message.payload().is_empty() && metadata.is_empty() {
            EMPTY.clone_into(&mut metadata);
        }
        let id = message.id().map(ToString::to_string).unwrap_or_default();
        Self { id, metadata, body: message.payload().clone(), tags }
    }

    pub(crate) fn message(self) -> Message {
        let mut message = Message::new(self.body);
        if !self.id.is_empty() {
            message = message.with_id(MessageId::parse(&self.id));
        }
        // Tags are in no order of their own.
        let mut tags: Vec<_> = self.tags.into_iter().collect();
        tags.sort_unstable();
        for (name, value) in tags {
            message = with_field(message, name, value);
        }
        if !self.metadata.is_empty() && self.metadata != EMPTY {
            message.add_wire_header(METADATA, self.metadata);
        }
        message
    }

    pub(crate) fn queued(self, queue: &str, client_id: &str, policy: QueueMessagePolicy) -> QueueMessage {
        QueueMessage {
            message_id: self.id,
            client_id: client_id.to_owned(),
            channel: queue.to_owned(),
            metadata: self.metadata,
            body: self.body,
            tags: self.tags,
            policy: Some(policy),
            ..QueueMessage::default()
        }
    }

    pub(crate) fn event(self, topic: &str, client_id: &str, store: bool) -> Event {
        Event {
            event_id: self.id,
            client_id: client_id.to_owned(),
            channel: topic.to_owned(),
            metadata: self.metadata,
            body: self.body,
            store,
            tags: self.tags,
        }
    }
}

impl From<QueueMessage> for Wire {
    fn from(message: QueueMessage) -> Self {
        Self { id: message.message_id, metadata: message.metadata, body: message.body, tags: message.tags }
    }
}

impl From<EventReceive> for Wire {
    fn from(event: EventReceive) -> Self {
        Self { id: event.event_id, metadata: event.metadata, body: event.body, tags: event.tags }
    }
}

/// A message for a queue, delivered no earlier than `after` from now.
pub(crate) fn queued(message: &Message, queue: &str, client_id: &str, after: Duration) -> QueueMessage {
    let expires = message.expires_at().map(|at| at.duration_since(now()).unwrap_or_default());
    // What expires later than servers take, and what has expired, is left to who receives it.
    let expiration = expires.map(seconds).filter(|seconds| (1..=MAX_SECONDS).contains(seconds)).unwrap_or(0);
    let policy = QueueMessagePolicy {
        expiration_seconds: i32::try_from(expiration).unwrap_or(0),
        delay_seconds: i32::try_from(seconds(after)).unwrap_or(i32::MAX),
        ..QueueMessagePolicy::default()
    };
    Wire::of(message).queued(queue, client_id, policy)
}

/// Whole seconds, rounded up: never too early.
fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

fn text_of_time(time: SystemTime) -> String {
    humantime::format_rfc3339(time).to_string()
}

fn with_field(mut message: Message, name: String, value: String) -> Message {
    match name.as_str() {
        CONTENT_TYPE => message.with_content_type(value),
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
            let name = name.strip_prefix(HEADER).map(str::to_owned).unwrap_or(name);
            message.add_wire_header(name, value);
            message
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(message: &Message) -> Message {
        Wire::from(queued(message, "q", "c", Duration::ZERO)).message()
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let mut message = Message::new(&b"\xff\x00"[..])
            .with_id("order-7")
            .with_content_type("application/json")
            .with_kind("order.created")
            .with_version(2)
            .with_key("customer-7")
            .with_time(SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123))
            .with_correlation_id("saga-1")
            .with_reply_to("replies")
            .with_header("content-type", "a header of this name")
            .with_header("kubemq-metadata", "of KubeMQ")
            .with_header("tenant", "acme é");
        message.set_system_header("polymq-attempt", "3");
        let back = there_and_back(&message);
        let sorted = |message: &Message| {
            let mut headers: Vec<_> =
                message.wire_headers().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            headers.sort();
            headers
        };
        assert_eq!(sorted(&back), sorted(&message));
        assert_eq!(back.with_headers(message.headers().clone()), message);
        assert_eq!(there_and_back(&Message::new("")), Message::new(""));
    }

    #[test]
    fn seconds_are_rounded_up() {
        let message = Message::new("x").expires_in(Duration::from_millis(61_500));
        let policy = queued(&message, "q", "c", Duration::from_millis(1001)).policy.expect("a policy");
        assert_eq!((policy.expiration_seconds, policy.delay_seconds), (62, 2));
        let never = Message::new("x").expires_in(Duration::from_secs(MAX_SECONDS * 2));
        assert_eq!(queued(&never, "q", "c", Duration::ZERO).policy.map(|policy| policy.expiration_seconds), Some(0));
    }
}
