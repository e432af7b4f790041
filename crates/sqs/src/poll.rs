//! One poll: its request, and messages as SQS delivers them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use aws_sdk_sqs::types::{Message as Native, MessageSystemAttributeName as Name};
use polymq_core::{Details, Incoming, Message, Result, Token};

use crate::{
    clients::Live,
    convert,
    error::{Effect, native},
    link::Link,
    producer::fifo_id,
    shared::Held,
    wrapped,
};

/// What SQS tells of a message and is looked at here; the rest would only be carried and decoded.
const KNOWN: [Name; 4] =
    [Name::ApproximateReceiveCount, Name::SentTimestamp, Name::MessageGroupId, Name::SequenceNumber];

/// The type of the attributes that a message has a place for.
pub(crate) const TEXT: &str = "String";

/// How the messages of a queue are read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    pub(crate) lease: Duration,
    /// Bodies may be SNS's JSON.
    pub(crate) unwrap: bool,
}

/// Asks for messages, and waits for them as long as the settings say.
pub(crate) async fn poll(
    link: &Link,
    live: &Live,
    url: &str,
    count: usize,
    reading: Reading,
) -> Result<Vec<(Incoming, Held)>> {
    let wait = link.config.poll_wait;
    let request = live
        .sqs
        .receive_message()
        .queue_url(url)
        .max_number_of_messages(i32::try_from(count).unwrap_or(i32::MAX))
        .wait_time_seconds(convert::seconds(wait))
        .visibility_timeout(convert::seconds(reading.lease))
        .message_attribute_names("All")
        .set_message_system_attribute_names(Some(KNOWN.to_vec()));
    let request = async { request.send().await.map_err(|error| native("receive", Effect::Idempotent, error)) };
    let limit = wait + link.config.request_timeout;
    let answer = link.call(live, "receive", Effect::Idempotent, limit, request).await?;
    Ok(answer.messages.unwrap_or_default().into_iter().filter_map(|found| read(found, reading)).collect())
}

fn read(found: Native, reading: Reading) -> Option<(Incoming, Held)> {
    // Without a receipt it can neither be settled nor returned: its loan ends by itself.
    let receipt = found.receipt_handle?;
    let native_id = found.message_id.unwrap_or_default();
    let mut lossy = false;
    let attributes: Vec<(String, String)> = found
        .message_attributes
        .unwrap_or_default()
        .into_iter()
        .filter_map(|(name, value)| {
            lossy |= value.data_type != TEXT;
            let text = value.string_value.or_else(|| String::from_utf8(value.binary_value?.into_inner()).ok());
            text.map(|text| (name, text))
        })
        .collect();
    let body = found.body.unwrap_or_default();
    let inner = (reading.unwrap && attributes.is_empty()).then(|| wrapped::unwrap(&body)).flatten();
    let (body, mut attributes) = match inner {
        Some(inner) => {
            lossy |= inner.lossy;
            (inner.body, inner.attributes)
        }
        None => (body, attributes),
    };
    // SQS tells them in no order of its own.
    attributes.sort();
    let system = found.attributes.unwrap_or_default();
    let number = |name: Name| system.get(&name).and_then(|text| text.parse::<u64>().ok());
    let message = with_group(convert::decode(body, attributes), system.get(&Name::MessageGroupId));
    let deliveries = number(Name::ApproximateReceiveCount).unwrap_or(1).max(1);
    let earlier = u32::try_from(deliveries - 1).unwrap_or(u32::MAX);
    let details = Details {
        attempt: Some(message.header_attempt().saturating_add(earlier)),
        broker_time: number(Name::SentTimestamp).map(|millis| SystemTime::UNIX_EPOCH + Duration::from_millis(millis)),
        sequence: number(Name::SequenceNumber),
        redelivered: deliveries > 1,
        ..Details::default()
    };
    let incoming = Incoming { message, token: Token::default(), details: Some(Box::new(details)) };
    let mut held = Held::new(&receipt, &native_id, &incoming, reading.lease);
    held.lossy = lossy;
    Some((incoming, held))
}

/// The group of a foreign producer is the key; one that stands for a key, or for none, is not.
fn with_group(message: Message, group: Option<&String>) -> Message {
    match group {
        Some(group) if message.key().is_none() => {
            let own = message.id().is_some_and(|id| fifo_id(&id.to_string()) == **group);
            if own { message } else { message.with_key(group.clone()) }
        }
        _ => message,
    }
}

/// The URL of a queue that may be made again.
pub(crate) type Url = Arc<str>;
