//! What the broker allows, in one place.

use std::{collections::HashMap, time::Duration};

use crate::refusal::Refusal;

/// What is beyond these is refused; with the protocol's error where it has one. The defaults are KubeMQ's where it has
/// them.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Messages of one receive.
    pub receive: usize,
    /// Longest wait of a receive.
    pub wait: Duration,
    /// Longest expiration of a message.
    pub expiration: Duration,
    /// Longest delay of a message.
    pub delay: Duration,
    /// Longest visibility time of a transaction.
    pub visibility: Duration,
    /// Most deliveries of a message; a message that asks for none gets these.
    pub receive_count: i32,
    /// Bytes of a message, an event or a request: of metadata, body and tags.
    pub message: usize,
    /// Messages of a queue, without delayed ones; then sending to it is refused. Many that send at once can exceed it a little.
    pub queue_count: Option<u64>,
    /// Bytes of a queue's messages as stored; then sending to it is refused.
    pub queue_bytes: Option<u64>,
    /// How long stored events are kept.
    pub event_age: Option<Duration>,
    /// Stored events of a channel that are kept; then the oldest ones go.
    pub event_count: Option<u64>,
    /// Bytes of a channel's stored events that are kept; then the oldest ones go.
    pub event_bytes: Option<u64>,
    /// How long is remembered where a reader of stored events was that does not come back.
    pub reader_age: Option<Duration>,
    /// Bytes of all that is stored; then sending is refused, and receiving and settling go on. In memory, too.
    pub store_bytes: Option<u64>,
    /// Bytes of the disk that are kept free for settling: with less, sending is refused.
    pub free_disk: u64,
    /// Queues, and as many channels of each other kind that has any here; requests for another one are refused.
    pub channels: usize,
    /// Bytes of messages in one answer to a receive or a poll; one message may have more. Clients take 4 MiB by default.
    pub answer: usize,
    /// Messages that a stream of polls may hold unsettled; then it is refused more.
    pub held_count: usize,
    /// Bytes of messages that a stream of polls may hold unsettled; then it is refused more.
    pub held_bytes: usize,
    /// Bytes that wait for one subscriber that is slow; then events are lost for it, and stored events wait on disk.
    pub waiting: usize,
    /// Bytes of cached answers to queries.
    pub cache: usize,
    /// Connections at a time; more are closed at once.
    pub connections: usize,
    /// Calls and streams of one connection at a time; more wait at their client.
    pub streams: u32,
    /// Bytes of requests of all connections that have come in part or are worked on; what needs more is refused.
    pub requests: usize,
    /// How long the rest of a request may stay away of which a part has come; then it is refused, and nothing of it was done,
    /// if more than half of `requests` is taken.
    pub request_idle: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            receive: 1024,
            wait: Duration::from_secs(3600),
            expiration: Duration::from_secs(43_200),
            delay: Duration::from_secs(43_200),
            visibility: Duration::from_secs(43_200),
            receive_count: 1024,
            message: 100 << 20,
            queue_count: None,
            queue_bytes: None,
            event_age: Some(Duration::from_secs(24 * 3600)),
            event_count: None,
            event_bytes: None,
            reader_age: Some(Duration::from_secs(30 * 24 * 3600)),
            store_bytes: None,
            free_disk: 64 << 20,
            channels: 100_000,
            answer: (4 << 20) - (64 << 10),
            held_count: 100_000,
            held_bytes: 256 << 20,
            waiting: 64 << 20,
            cache: 64 << 20,
            connections: 10_000,
            streams: 2_000,
            requests: 1 << 30,
            request_idle: Duration::from_secs(30),
        }
    }
}

impl Limits {
    /// Whether something may be sent. What is passed on, such as an event to a queue, has the same size there.
    pub(crate) fn check_size(
        &self,
        metadata: &str,
        body: &[u8],
        tags: &HashMap<String, String>,
    ) -> Result<(), Refusal> {
        let tags: usize = tags.iter().map(|(name, value)| name.len() + value.len()).sum();
        let (size, most) = (metadata.len() + body.len() + tags, self.message);
        if size <= most {
            return Ok(());
        }
        Err(Refusal::because(format_args!(
            "the message has {size} bytes, this broker takes {most} at most: send less, or raise the limit"
        )))
    }
}

/// How long a receive waits that does not say.
pub(crate) const DEFAULT_WAIT: Duration = Duration::from_secs(1);
/// How long a message is held for a transaction that does not say.
pub(crate) const DEFAULT_VISIBILITY: Duration = Duration::from_secs(60);
