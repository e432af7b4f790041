//! Channels beside their messages: whether they exist, making, deleting and listing them, emptying queues and looking
//! into them.
//!
//! KubeMQ makes what is used. Making, deleting and listing are queries to a channel of the server's own; older servers
//! do not answer them.

use std::{collections::HashMap, sync::atomic::Ordering, time::Duration};

use polymq_core::{Error, ErrorKind, Message, Result};
use polymq_kubemq_proto::{
    AckAllQueueMessagesRequest, QueuesInfoRequest, ReceiveQueueMessagesRequest, Request, request::RequestType,
};
use serde::Deserialize;

use crate::{
    convert::Wire,
    error::{self, Effect},
    link::{Link, Live},
};

/// Where the server answers queries about channels.
const ADMIN: &str = "kubemq.cluster.internal.requests";
/// How long the server may take for one.
const ADMIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a look into a queue, or emptying it, waits for messages: servers know no less.
const WAIT_SECONDS: i32 = 1;
/// How long emptying and deleting may take: as long as there is much to remove. A connection that is lost ends it sooner.
const REMOVAL: Duration = Duration::from_secs(3600);
/// What to know when the server does not answer them.
const UNMANAGED: &str = "this server does not manage channels; the Community server does not";
/// The most messages that a look may ask for.
const PEEK: usize = 1024;

/// What a channel is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pattern {
    /// Events that are not kept.
    Events,
    /// Events that are kept.
    EventsStore,
    /// Requests that are answered with success or failure.
    Commands,
    /// Requests that are answered with data.
    Queries,
    /// Queues.
    Queues,
}

impl Pattern {
    /// Its name in the protocol.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Events => "events",
            Self::EventsStore => "events_store",
            Self::Commands => "commands",
            Self::Queries => "queries",
            Self::Queues => "queues",
        }
    }
}

/// A channel as the server lists it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ChannelInfo {
    /// Its name.
    pub name: String,
    /// When something happened in it last, in milliseconds since 1970.
    #[serde(default)]
    pub last_activity: i64,
    /// Whether somebody uses it.
    #[serde(default)]
    pub is_active: bool,
    /// What came in.
    #[serde(default)]
    pub incoming: ChannelTraffic,
    /// What went out.
    #[serde(default)]
    pub outgoing: ChannelTraffic,
}

/// Counts of a channel, since its server was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct ChannelTraffic {
    /// Messages.
    pub messages: i64,
    /// Bytes of them.
    pub volume: i64,
    /// Messages that wait; of queues.
    pub waiting: i64,
    /// Messages that expired; of queues.
    pub expired: i64,
}

/// Whether a queue exists. Nothing is made by asking.
pub(crate) async fn queue_exists(link: &Link, live: &Live, queue: &str) -> Result<bool> {
    let request = QueuesInfoRequest { request_id: request_id(), queue_name: queue.to_owned() };
    let mut client = live.client.clone();
    let limit = link.config.connect_timeout;
    let answer = link.call(live, "exists", Effect::Idempotent, limit, client.queues_info(request)).await?;
    Ok(answer.info.unwrap_or_default().queues.iter().any(|info| info.name == queue))
}

/// Whether a channel of another pattern exists.
pub(crate) async fn exists(link: &Link, live: &Live, pattern: Pattern, name: &str) -> Result<bool> {
    Ok(list(link, live, pattern, name).await?.iter().any(|channel| channel.name == name))
}

/// Makes a channel; harmless when it exists. A server that does not do that takes its whole time to say so, which is waited for
/// once a connection.
pub(crate) async fn create(link: &Link, live: &Live, pattern: Pattern, name: &str) -> Result<()> {
    if live.unmanaged.load(Ordering::Relaxed) {
        return Err(Error::unsupported(crate::NAME, "managing channels over this server").with_hint(UNMANAGED));
    }
    let made =
        ask(link, live, ("declare", ADMIN_TIMEOUT), "create-channel", pattern, [("channel", name)]).await.map(drop);
    if made.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unsupported) {
        live.unmanaged.store(true, Ordering::Relaxed);
    }
    made
}

/// Deletes a channel and what it holds; harmless when it does not exist.
pub(crate) async fn delete(link: &Link, live: &Live, pattern: Pattern, name: &str) -> Result<()> {
    match ask(link, live, ("delete", REMOVAL), "delete-channel", pattern, [("channel", name)]).await {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        answer => answer.map(drop),
    }
}

/// The channels of a pattern whose names contain a text; all of them, if it is empty.
pub(crate) async fn list(link: &Link, live: &Live, pattern: Pattern, search: &str) -> Result<Vec<ChannelInfo>> {
    let json = ask(link, live, ("list", ADMIN_TIMEOUT), "list-channels", pattern, [("channel_search", search)]).await?;
    serde_json::from_slice(&json).map_err(|cause| {
        Error::new(ErrorKind::Other, format!("the server's list of channels cannot be read: {cause}"))
            .with_backend(crate::NAME)
            .with_operation("list")
            .with_source(cause)
    })
}

/// What a server that does not manage channels is asked, it answers after [`ADMIN_TIMEOUT`]; one that does may take longer.
async fn ask(
    link: &Link,
    live: &Live,
    (operation, most): (&'static str, Duration),
    what: &str,
    pattern: Pattern,
    tags: [(&str, &str); 1],
) -> Result<bytes::Bytes> {
    let own = [("channel_type", pattern.as_str()), ("client_id", &link.client_id)];
    let tags: HashMap<String, String> =
        tags.into_iter().chain(own).map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let request = Request {
        request_id: request_id(),
        request_type_data: RequestType::Query.into(),
        client_id: link.client_id.clone(),
        channel: ADMIN.to_owned(),
        metadata: what.to_owned(),
        timeout: i32::try_from(ADMIN_TIMEOUT.as_millis()).unwrap_or(i32::MAX),
        tags,
        ..Request::default()
    };
    let mut client = live.client.clone();
    let limit = most + link.config.connect_timeout;
    let answer = link.call(live, operation, Effect::Idempotent, limit, client.send_request(request)).await;
    let answer = answer.map_err(|error| match error.kind() {
        ErrorKind::UnknownOutcome => error.with_kind(ErrorKind::Unsupported).with_hint(UNMANAGED),
        _ => error,
    })?;
    if answer.executed && answer.error.is_empty() {
        return Ok(answer.body);
    }
    Err(error::refused(operation, &answer.error))
}

/// Discards what waits in a queue, and says how many messages that were.
pub(crate) async fn purge(link: &Link, live: &Live, queue: &str) -> Result<u64> {
    let request = AckAllQueueMessagesRequest {
        request_id: request_id(),
        client_id: link.client_id.clone(),
        channel: queue.to_owned(),
        wait_time_seconds: WAIT_SECONDS,
    };
    let mut client = live.client.clone();
    let answer = link.call(live, "purge", Effect::Idempotent, REMOVAL, client.ack_all_queue_messages(request)).await?;
    if answer.is_error {
        return Err(error::refused("purge", &answer.error));
    }
    Ok(answer.affected_messages)
}

/// Up to `max` of the messages that wait, oldest first, without taking them.
pub(crate) async fn peek(link: &Link, live: &Live, queue: &str, max: usize) -> Result<Vec<Message>> {
    let request = ReceiveQueueMessagesRequest {
        request_id: request_id(),
        client_id: link.client_id.clone(),
        channel: queue.to_owned(),
        max_number_of_messages: i32::try_from(max.clamp(1, PEEK)).unwrap_or(i32::MAX),
        wait_time_seconds: WAIT_SECONDS,
        is_peak: true,
    };
    let mut client = live.client.clone();
    let limit = link.config.request_timeout;
    let answer = link.call(live, "peek", Effect::Idempotent, limit, client.receive_queue_messages(request)).await?;
    if answer.is_error {
        return Err(error::refused("peek", &answer.error));
    }
    Ok(answer.messages.into_iter().map(|message| Wire::from(message).message()).collect())
}

pub(crate) fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}
