//! Asking: commands and queries, alone or many at a time.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use futures_util::StreamExt;
use polymq_core::Result;
use polymq_kubemq_proto::{Request, request::RequestType, subscribe::SubscribeType};

use super::{KubeMq, check_name};
use crate::{
    error::{self, Effect},
    topology::request_id,
};

/// The two kinds of requests; the same channel name is another channel in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// Answered with success or failure, and tags.
    Command,
    /// Answered with data too, which the broker may keep.
    Query,
}

impl RequestKind {
    fn request(self) -> RequestType {
        match self {
            Self::Command => RequestType::Command,
            Self::Query => RequestType::Query,
        }
    }

    pub(super) fn subscribe(self) -> SubscribeType {
        match self {
            Self::Command => SubscribeType::Commands,
            Self::Query => SubscribeType::Queries,
        }
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
    /// How long an answer is waited for; 1 ms or more.
    pub timeout: Duration,
    /// Under which key the broker keeps the answer of a query, and for how long; whole seconds. Keys belong to their channel.
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
    /// The broker has answered from its cache. No responder can say so.
    pub from_cache: bool,
}

impl KubeMq {
    /// Asks a responder to do something.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownOutcome`](polymq_core::ErrorKind::UnknownOutcome) when no answer came in time, be it that nobody
    /// listens; a responder that failed is an answer, with `executed` false.
    pub async fn command(&self, ask: Ask) -> Result<Answered> {
        self.ask(RequestKind::Command, ask).await
    }

    /// Asks a responder for something; with a cache key, the broker may answer instead.
    ///
    /// # Errors
    /// As [`command`](Self::command).
    pub async fn query(&self, ask: Ask) -> Result<Answered> {
        self.ask(RequestKind::Query, ask).await
    }

    /// Asks many, no more than `limit` at a time (at least one), and gives the answers in the order of the requests. One that
    /// fails does not stop the others.
    pub async fn ask_many(
        &self,
        kind: RequestKind,
        asks: impl IntoIterator<Item = Ask>,
        limit: usize,
    ) -> Vec<Result<Answered>> {
        let asking = asks.into_iter().map(|ask| self.ask(kind, ask));
        futures_util::stream::iter(asking).buffered(limit.max(1)).collect().await
    }

    async fn ask(&self, kind: RequestKind, ask: Ask) -> Result<Answered> {
        check_name(&ask.channel)?;
        if kind == RequestKind::Command && ask.cache.is_some() {
            return Err(error::invalid("a command with a cache key: only queries have answers to keep"));
        }
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
            request_type_data: kind.request().into(),
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
}
