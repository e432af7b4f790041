//! The requests that send a batch: the broker's id, or the error, of each of its messages.

use std::time::Instant;

use aws_sdk_sqs::types::{MessageAttributeValue, SendMessageBatchRequestEntry};
use polymq_core::{Error, Result};

use crate::{
    clients::Live,
    convert,
    error::{self, Effect, native},
    outbox::Letter,
};

/// Entries are named by their place.
fn results(
    count: usize,
    good: impl Iterator<Item = (Option<String>, Option<String>)>,
    bad: impl Iterator<Item = (String, Error)>,
) -> Vec<Result<Box<str>>> {
    let unanswered = || Err(error::lost("send", Effect::Once, "the service said nothing about this message"));
    let mut results: Vec<Result<Box<str>>> = (0..count).map(|_| unanswered()).collect();
    let slot = |id: &str| id.parse::<usize>().ok();
    for (id, broker_id) in good {
        if let Some(slot) = id.as_deref().and_then(slot).and_then(|at| results.get_mut(at)) {
            *slot = Ok(broker_id.unwrap_or_default().into());
        }
    }
    for (id, error) in bad {
        if let Some(slot) = slot(&id).and_then(|at| results.get_mut(at)) {
            *slot = Err(error);
        }
    }
    results
}

/// To a queue.
pub(crate) async fn to_queue(
    live: &Live,
    url: &str,
    letters: impl Iterator<Item = &Letter>,
) -> Result<Vec<Result<Box<str>>>> {
    let mut request = live.sqs.send_message_batch().queue_url(url);
    let (mut count, mut effect) = (0, Effect::Once);
    for letter in letters {
        let mut entry = SendMessageBatchRequestEntry::builder().id(count.to_string()).message_body(&letter.wire.body);
        for (name, value) in &letter.wire.attributes {
            let value = MessageAttributeValue::builder().data_type("String").string_value(value).build();
            entry = entry.message_attributes(name, value.map_err(unbuilt)?);
        }
        match &letter.fifo {
            Some((group, once)) => {
                effect = Effect::Deduplicated;
                entry = entry.message_group_id(group).message_deduplication_id(once);
            }
            None => {
                let delay =
                    letter.deliver_at.map(|at| at.saturating_duration_since(Instant::now())).unwrap_or_default();
                if !delay.is_zero() {
                    entry = entry.delay_seconds(convert::seconds(delay));
                }
            }
        }
        request = request.entries(entry.build().map_err(unbuilt)?);
        count += 1;
    }
    let sent = request.send().await.map_err(|error| native("send", effect, error))?;
    let good = sent.successful.into_iter().map(|entry| (Some(entry.id), Some(entry.message_id)));
    let bad = sent.failed.into_iter().map(|entry| {
        let error = error::of_entry("send", &entry.code, entry.message.as_deref(), entry.sender_fault);
        (entry.id, error)
    });
    Ok(results(count, good, bad))
}

/// To a topic.
pub(crate) async fn to_topic(
    live: &Live,
    topic: &str,
    letters: impl Iterator<Item = &Letter>,
) -> Result<Vec<Result<Box<str>>>> {
    use aws_sdk_sns::types::{MessageAttributeValue, PublishBatchRequestEntry};
    let mut request = live.sns.publish_batch().topic_arn(topic);
    let (mut count, mut effect) = (0, Effect::Once);
    for letter in letters {
        let mut entry = PublishBatchRequestEntry::builder().id(count.to_string()).message(&letter.wire.body);
        for (name, value) in &letter.wire.attributes {
            let value = MessageAttributeValue::builder().data_type("String").string_value(value).build();
            entry = entry.message_attributes(name, value.map_err(unbuilt)?);
        }
        if let Some((group, once)) = &letter.fifo {
            effect = Effect::Deduplicated;
            entry = entry.message_group_id(group).message_deduplication_id(once);
        }
        entry = entry.set_subject(letter.subject.as_deref().map(str::to_owned));
        request = request.publish_batch_request_entries(entry.build().map_err(unbuilt)?);
        count += 1;
    }
    let sent = request.send().await.map_err(|error| native("send", effect, error))?;
    let good = sent.successful.unwrap_or_default().into_iter().map(|entry| (entry.id, entry.message_id));
    let bad = sent.failed.unwrap_or_default().into_iter().map(|entry| {
        let error = error::of_entry("send", &entry.code, entry.message.as_deref(), entry.sender_fault);
        (entry.id, error)
    });
    Ok(results(count, good, bad))
}

fn unbuilt(error: impl std::error::Error) -> Error {
    error::invalid(error.to_string())
}
