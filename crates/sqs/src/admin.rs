//! What can be asked of queues and topics beside their messages: to exist, to be listed, to be emptied.

use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, Message};
use polymq_core::{Address, Error, ErrorKind, Listed, Result};

use crate::{
    backend::BATCH,
    clients::Live,
    error::{self, Effect, native, of_entry},
    link::Link,
    names::{self, Name},
    topology,
};

/// How long a poll waits that empties a queue: one that does not wait may miss messages that are there.
const PURGE_WAIT: i32 = 1;
/// Queues a request lists.
const PAGE: i32 = 1000;

/// Whether a queue, a topic or a group's share of one is there.
pub(crate) async fn exists(live: &Live, topic: Option<&Name>, queue: Option<&Name>) -> Result<bool> {
    let topic_is_there = match topic {
        Some(topic) => topology::find_topic(live, topic).await?.is_some(),
        None => true,
    };
    let queue_is_there = match queue {
        Some(queue) if topic_is_there => topology::find_queue(live, queue).await?.is_some(),
        _ => true,
    };
    Ok(topic_is_there && queue_is_there)
}

/// Queues and topics whose names are polymq's; others cannot be used under any name.
pub(crate) async fn list(live: &Live, fifo: bool) -> Result<Vec<Listed>> {
    let mut found = Vec::new();
    let mut pages = live.sqs.list_queues().max_results(PAGE).into_paginator().items().send();
    while let Some(url) = pages.next().await {
        let url = url.map_err(|error| native("list", Effect::Idempotent, error))?;
        found.extend(url.rsplit('/').next().and_then(|name| names::of_queue(name, fifo)));
    }
    let mut pages = live.sns.list_topics().into_paginator().items().send();
    while let Some(topic) = pages.next().await {
        let topic = topic.map_err(|error| native("list", Effect::Idempotent, error))?;
        let name = topic.topic_arn.as_deref().and_then(|arn| names::of_topic(arn.rsplit(':').next()?, fifo));
        found.extend(name.map(|name| (Address::topic(name), None)));
    }
    Ok(found.into_iter().map(|(address, group)| Listed { address, group, stats: None }).collect())
}

/// Takes and deletes what waits, until nothing comes any more. `PurgeQueue` would not say how much it was, would take a
/// minute, and would take along what is sent in the meantime.
pub(crate) async fn purge(link: &Link, url: &str) -> Result<u64> {
    let workers = (0..link.config.polls).map(|_| purge_alone(link, url));
    let counts = futures_util::future::try_join_all(workers).await?;
    Ok(counts.into_iter().sum())
}

async fn purge_alone(link: &Link, url: &str) -> Result<u64> {
    let mut gone = 0;
    loop {
        let live = link.live_soon("purge").await?;
        let limit = link.config.request_timeout;
        let messages = link.call(&live, "purge", Effect::Idempotent, limit, take(&live, url)).await?;
        if messages.is_empty() {
            return Ok(gone);
        }
        gone += link.call(&live, "purge", Effect::Idempotent, limit, delete(&live, url, messages)).await?;
    }
}

async fn take(live: &Live, url: &str) -> Result<Vec<Message>> {
    let request = live.sqs.receive_message().queue_url(url).wait_time_seconds(PURGE_WAIT);
    let taken = request.max_number_of_messages(i32::try_from(BATCH).unwrap_or(1)).send().await;
    Ok(taken.map_err(|error| native("purge", Effect::Idempotent, error))?.messages.unwrap_or_default())
}

/// How many of them are gone.
async fn delete(live: &Live, url: &str, messages: Vec<Message>) -> Result<u64> {
    let mut request = live.sqs.delete_message_batch().queue_url(url);
    for (at, message) in messages.into_iter().enumerate() {
        let entry = DeleteMessageBatchRequestEntry::builder().id(at.to_string());
        let entry = entry.set_receipt_handle(message.receipt_handle).build();
        request = request.entries(entry.map_err(|problem| error::invalid(problem.to_string()))?);
    }
    let deleted = request.send().await.map_err(|error| native("purge", Effect::Idempotent, error))?;
    let refused = deleted
        .failed
        .first()
        .map(|entry| -> Error { of_entry("purge", &entry.code, entry.message.as_deref(), entry.sender_fault) });
    match refused {
        Some(error) if error.kind() != ErrorKind::Stale => Err(error),
        _ => Ok(u64::try_from(deleted.successful.len()).unwrap_or_default()),
    }
}
