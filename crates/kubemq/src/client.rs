//! What only KubeMQ has, typed: messages with a policy, receiving at once, peeking, emptying with a count, commands and
//! queries, and channels.

use std::{collections::HashMap, sync::Arc, time::Duration};

use bytes::Bytes;
use polymq_core::{Message, Result, Settings};
use polymq_kubemq_proto::{
    QueueMessage, QueueMessagePolicy, ReceiveQueueMessagesRequest, Request, SendQueueMessageResult,
    request::RequestType,
};

use crate::{
    config::KubeMqConfig,
    connect::Target,
    connection::ServerInfo,
    convert::{MAX_SECONDS, Wire},
    error::{self, Effect},
    link::{Link, LinkHandle},
    topology::{self, ChannelInfo, Pattern, request_id},
};

/// The most messages of one call.
const MAX_MESSAGES: usize = 1024;
/// The most deliveries of a message.
const MAX_RECEIVES: u32 = 1024;

/// A client for what only KubeMQ has; everything else goes over a `Bus`.
#[derive(Debug)]
pub struct KubeMq {
    link: LinkHandle,
}

/// What the broker does with a message of a queue; nothing of it unless said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// It is gone after this, counted from when its delay has ended; whole seconds, at most 12 h.
    pub expires_in: Option<Duration>,
    /// It enters its queue after this; whole seconds, at most 12 h.
    pub delay: Option<Duration>,
    /// After so many deliveries that were not acknowledged, it goes to the queue of this name.
    pub dead_letters: Option<(u32, String)>,
}

impl Policy {
    fn checked(&self) -> Result<QueueMessagePolicy> {
        let seconds = |what: &str, time: Option<Duration>| match time {
            None => Ok(0),
            Some(time) if time.subsec_nanos() == 0 && (1..=MAX_SECONDS).contains(&time.as_secs()) => {
                Ok(i32::try_from(time.as_secs()).unwrap_or(i32::MAX))
            }
            Some(time) => {
                Err(error::invalid(format!("the {what} is {time:?}, expected whole seconds, 1 s to {MAX_SECONDS} s")))
            }
        };
        let mut policy = QueueMessagePolicy {
            expiration_seconds: seconds("expiration", self.expires_in)?,
            delay_seconds: seconds("delay", self.delay)?,
            ..QueueMessagePolicy::default()
        };
        if let Some((count, queue)) = &self.dead_letters {
            if !(1..=MAX_RECEIVES).contains(count) {
                return Err(error::invalid(format!("{count} deliveries, expected 1 to {MAX_RECEIVES}")));
            }
            check_name(queue)?;
            policy.max_receive_count = i32::try_from(*count).unwrap_or(i32::MAX);
            policy.max_receive_queue.clone_from(queue);
        }
        Ok(policy)
    }
}

/// A request that is a command or a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    /// Where responders listen.
    pub channel: String,
    /// Text beside the body.
    pub metadata: String,
    /// The body.
    pub body: Bytes,
    /// Names with values.
    pub tags: HashMap<String, String>,
    /// How long an answer is waited for.
    pub timeout: Duration,
    /// Under which key the broker keeps the answer of a query, and for how long; whole seconds.
    pub cache: Option<(String, Duration)>,
}

/// An answer to a command or a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answered {
    /// Whether the responder did what it was asked for.
    pub executed: bool,
    /// Why not.
    pub error: String,
    /// Text beside the body; of queries.
    pub metadata: String,
    /// The body; of queries.
    pub body: Bytes,
    /// Names with values.
    pub tags: HashMap<String, String>,
    /// The broker has answered from its cache.
    pub from_cache: bool,
}

impl KubeMq {
    /// Connects with the settings of the backend `kubemq`.
    ///
    /// # Errors
    /// As [`KubeMqConnection::connect`](crate::KubeMqConnection::connect).
    pub async fn connect(settings: &Settings) -> Result<Self> {
        let config = Arc::new(KubeMqConfig::parse(settings)?);
        Ok(Self { link: Link::start(config, Target::Network).await? })
    }

    /// A round trip, and what the server says about itself.
    ///
    /// # Errors
    /// [`ErrorKind::Disconnected`](polymq_core::ErrorKind::Disconnected) when nobody answers in time.
    pub async fn ping(&self) -> Result<ServerInfo> {
        self.link.ping().await.map(ServerInfo::from)
    }

    /// Sends a message to a queue; returns when the broker has it. A message is refused before any call when it has neither
    /// body nor header `kubemq-metadata`, or a policy out of its bounds.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](polymq_core::ErrorKind::InvalidInput) as above, and what the broker says.
    pub async fn send(&self, queue: &str, message: &Message, policy: &Policy) -> Result<()> {
        check_name(queue)?;
        if message.payload().is_empty() && message.headers().get("kubemq-metadata").is_none_or(str::is_empty) {
            return Err(error::invalid(
                "the message has neither a body nor a header \"kubemq-metadata\", expected one",
            ));
        }
        let native = Wire::of(message).queued(queue, &self.link.client_id, policy.checked()?);
        let live = self.link.live_soon("send").await?;
        let mut client = live.client.clone();
        let limit = self.link.config.request_timeout;
        let sent: SendQueueMessageResult =
            self.link.call(&live, "send", Effect::Once, limit, client.send_queue_message(native)).await?;
        if sent.is_error { Err(error::refused("send", &sent.error)) } else { Ok(()) }
    }

    /// Takes up to `max` messages (1 to 1024), oldest first, waiting up to `wait` (whole seconds, 1 s to 1 h) for them. They are
    /// gone from the queue: for acknowledgements, consume over a `Bus`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](polymq_core::ErrorKind::InvalidInput) for bounds and names, and what the broker says.
    pub async fn receive(&self, queue: &str, max: usize, wait: Duration) -> Result<Vec<QueueMessage>> {
        self.look(queue, max, wait, false).await
    }

    /// The same without taking them: they stay as they are, in their order and uncounted.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub async fn peek(&self, queue: &str, max: usize, wait: Duration) -> Result<Vec<QueueMessage>> {
        self.look(queue, max, wait, true).await
    }

    async fn look(&self, queue: &str, max: usize, wait: Duration, peek: bool) -> Result<Vec<QueueMessage>> {
        check_name(queue)?;
        if !(1..=MAX_MESSAGES).contains(&max) {
            return Err(error::invalid(format!("{max} messages, expected 1 to {MAX_MESSAGES}")));
        }
        if !(1..=3600).contains(&wait.as_secs()) || wait.subsec_nanos() > 0 {
            return Err(error::invalid(format!("a wait of {wait:?}, expected whole seconds, 1 s to 1 h")));
        }
        let request = ReceiveQueueMessagesRequest {
            request_id: request_id(),
            client_id: self.link.client_id.clone(),
            channel: queue.to_owned(),
            max_number_of_messages: i32::try_from(max).unwrap_or(i32::MAX),
            wait_time_seconds: i32::try_from(wait.as_secs()).unwrap_or(i32::MAX),
            is_peak: peek,
        };
        let live = self.link.live_soon("receive").await?;
        let mut client = live.client.clone();
        let limit = wait + self.link.config.request_timeout;
        // What is taken is gone: an answer that is lost is not asked for again.
        let effect = if peek { Effect::Idempotent } else { Effect::Once };
        let answer = self.link.call(&live, "receive", effect, limit, client.receive_queue_messages(request)).await?;
        if answer.is_error { Err(error::refused("receive", &answer.error)) } else { Ok(answer.messages) }
    }

    /// Discards what waits in a queue, and says how many messages that were. What others hold stays.
    ///
    /// # Errors
    /// What the broker says.
    pub async fn ack_all(&self, queue: &str) -> Result<u64> {
        check_name(queue)?;
        let live = self.link.live_soon("purge").await?;
        topology::purge(&self.link, &live, queue).await
    }

    /// Asks a responder to do something.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownOutcome`](polymq_core::ErrorKind::UnknownOutcome) when no answer came in time, be it that nobody
    /// listens; a responder that failed is an answer, with `executed` false.
    pub async fn command(&self, ask: Ask) -> Result<Answered> {
        if ask.cache.is_some() {
            return Err(error::invalid("a command with a cache key: only queries have answers to keep"));
        }
        self.ask(ask, RequestType::Command).await
    }

    /// Asks a responder for something; with a cache key, the broker may answer instead.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub async fn query(&self, ask: Ask) -> Result<Answered> {
        self.ask(ask, RequestType::Query).await
    }

    async fn ask(&self, ask: Ask, kind: RequestType) -> Result<Answered> {
        check_name(&ask.channel)?;
        if ask.metadata.is_empty() && ask.body.is_empty() {
            return Err(error::invalid("the request has neither metadata nor a body, expected one"));
        }
        let timeout = i32::try_from(ask.timeout.as_millis()).ok().filter(|millis| *millis > 0);
        let timeout =
            timeout.ok_or_else(|| error::invalid(format!("a time-out of {:?}, expected 1 ms or more", ask.timeout)))?;
        let (cache_key, ttl) = ask.cache.unwrap_or_default();
        let cache_ttl = i32::try_from(ttl.as_secs()).unwrap_or(i32::MAX);
        if !cache_key.is_empty() && cache_ttl == 0 {
            return Err(error::invalid(format!("the answer would be kept for {ttl:?}, expected 1 s or more")));
        }
        let request = Request {
            request_id: request_id(),
            request_type_data: kind.into(),
            client_id: self.link.client_id.clone(),
            channel: ask.channel,
            metadata: ask.metadata,
            body: ask.body,
            tags: ask.tags,
            timeout,
            cache_key,
            cache_ttl,
            ..Request::default()
        };
        let live = self.link.live_soon("request").await?;
        let mut client = live.client.clone();
        let limit = ask.timeout + self.link.config.connect_timeout;
        let answer = self.link.call(&live, "request", Effect::Once, limit, client.send_request(request)).await?;
        Ok(Answered {
            executed: answer.executed,
            error: answer.error,
            metadata: answer.metadata,
            body: answer.body,
            tags: answer.tags,
            from_cache: answer.cache_hit,
        })
    }

    /// Makes a channel; harmless when it exists.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](polymq_core::ErrorKind::Unsupported) where the server does not manage channels.
    pub async fn create_channel(&self, pattern: Pattern, name: &str) -> Result<()> {
        let live = self.link.live_soon("declare").await?;
        topology::create(&self.link, &live, pattern, name).await
    }

    /// Deletes a channel and what it holds; harmless when it does not exist.
    ///
    /// # Errors
    /// As [`create_channel`](Self::create_channel).
    pub async fn delete_channel(&self, pattern: Pattern, name: &str) -> Result<()> {
        let live = self.link.live_soon("delete").await?;
        topology::delete(&self.link, &live, pattern, name).await
    }

    /// The channels of a pattern whose names contain a text; all of them, if it is empty.
    ///
    /// # Errors
    /// As [`create_channel`](Self::create_channel).
    pub async fn list_channels(&self, pattern: Pattern, search: &str) -> Result<Vec<ChannelInfo>> {
        let live = self.link.live_soon("list").await?;
        topology::list(&self.link, &live, pattern, search).await
    }
}

fn check_name(name: &str) -> Result<()> {
    crate::names::check(&polymq_core::Address::queue(name), crate::config::Topics::Store)
}
