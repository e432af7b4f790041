//! Answering: handlers of commands and queries.

use std::{collections::HashMap, fmt, future::Future, panic::AssertUnwindSafe, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::FutureExt;
use polymq_core::{Result, now};
use polymq_kubemq_proto::{Request, Response, Subscribe};
use tokio::{
    sync::oneshot,
    task::{JoinHandle, JoinSet},
};

use super::{
    KubeMq, RequestKind, check_name,
    events::checked_group,
    feed::{Call, Feed},
};
use crate::{error::Effect, link::Link, topology::request_id};

/// A request as its responder gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Who asks, by its client id.
    pub client_id: String,
    /// The channel.
    pub channel: String,
    /// Text beside the body.
    pub metadata: String,
    /// The body.
    pub body: Bytes,
    /// Names with values.
    pub tags: HashMap<String, String>,
    /// How long the asker waits for an answer; later ones reach nobody.
    pub timeout: Duration,
}

/// What a handler answers. Of a command, only the tags reach who asked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reply {
    /// Text beside the body.
    pub metadata: String,
    /// The body.
    pub body: Bytes,
    /// Names with values.
    pub tags: HashMap<String, String>,
}

/// A handler at work. Dropped, it has ended at once: what its handlers had begun is cancelled, and who asked hears of a
/// time-out. Other responders go on.
#[derive(Debug)]
pub struct Responder {
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl KubeMq {
    /// Answers the requests of a channel; returns when the server has the subscription, which is made again when the connection
    /// was lost. Up to `concurrency` handlers (at least one) run at a time. Of the members of a group, one gets a request;
    /// without one (empty), everyone does, and the first answer counts.
    ///
    /// The handler's error is the text that who asked gets, at once; a handler that panics is answered with an error too.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](polymq_core::ErrorKind::InvalidInput) for names, and what the broker says.
    pub async fn respond<H, F, E>(
        &self,
        kind: RequestKind,
        channel: &str,
        group: &str,
        concurrency: usize,
        handler: H,
    ) -> Result<Responder>
    where
        H: Fn(Asked) -> F + Send + Sync + 'static,
        F: Future<Output = std::result::Result<Reply, E>> + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        check_name(channel)?;
        let subscribe = Subscribe {
            subscribe_type_data: kind.subscribe().into(),
            client_id: self.link.client_id.clone(),
            channel: channel.to_owned(),
            group: checked_group(group)?,
            ..Subscribe::default()
        };
        let feed = Feed::start(self.link.link(), subscribe, SUBSCRIBE).await?;
        let (stop, stopped) = oneshot::channel();
        let task = self.link.spawn(run(feed, stopped, concurrency.max(1), Arc::new(handler)));
        Ok(Responder { stop: Some(stop), task })
    }
}

const SUBSCRIBE: Call<Request> =
    |mut client, subscribe| async move { client.subscribe_to_requests(subscribe).await }.boxed();

impl Responder {
    /// Takes no more requests, and returns when those that were begun are answered.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        // It was not cancelled, and what panics in it was caught.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn run<H, F, E>(mut feed: Feed<Request>, mut stopped: oneshot::Receiver<()>, concurrency: usize, handler: Arc<H>)
where
    H: Fn(Asked) -> F + Send + Sync + 'static,
    F: Future<Output = std::result::Result<Reply, E>> + Send + 'static,
    E: fmt::Display + Send + 'static,
{
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(_) = running.join_next() => {}
            request = feed.next(), if running.len() < concurrency => match request {
                Ok(request) => drop(running.spawn(answer(Arc::clone(&feed.link), Arc::clone(&handler), request))),
                Err(error) => {
                    tracing::warn!(channel = feed.subscribe.channel, %error, "responder ended");
                    break;
                }
            },
        }
    }
    drop(feed);
    while running.join_next().await.is_some() {}
}

/// Handles one request and tells the outcome, whatever it is.
async fn answer<H, F, E>(link: Arc<Link>, handler: Arc<H>, request: Request)
where
    H: Fn(Asked) -> F,
    F: Future<Output = std::result::Result<Reply, E>>,
    E: fmt::Display,
{
    let mut response = Response {
        client_id: link.client_id.clone(),
        request_id: if request.request_id.is_empty() { request_id() } else { request.request_id },
        reply_channel: request.reply_channel,
        ..Response::default()
    };
    let asked = Asked {
        client_id: request.client_id,
        channel: request.channel,
        metadata: request.metadata,
        body: request.body,
        tags: request.tags,
        timeout: Duration::from_millis(u64::try_from(request.timeout).unwrap_or_default()),
    };
    let channel = asked.channel.clone();
    match AssertUnwindSafe(async { handler(asked).await }).catch_unwind().await {
        Ok(Ok(reply)) => {
            response.executed = true;
            (response.metadata, response.body, response.tags) = (reply.metadata, reply.body, reply.tags);
        }
        Ok(Err(error)) => response.error = error.to_string(),
        Err(_) => {
            // What it panicked with may be a secret, and is in this program's own log.
            tracing::error!(channel, "the handler of a request panicked");
            "the handler panicked".clone_into(&mut response.error);
        }
    }
    let nanos = now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_nanos();
    response.timestamp = i64::try_from(nanos).unwrap_or(i64::MAX);
    if let Err(error) = tell(&link, response).await {
        tracing::warn!(channel, %error, "the answer to a request did not reach the broker; who asked hears of a time-out");
    }
}

async fn tell(link: &Link, response: Response) -> Result<()> {
    let live = link.live_soon("answer").await?;
    let mut client = live.client.clone();
    let limit = link.config.request_timeout;
    link.call(&live, "answer", Effect::Once, limit, client.send_response(response)).await.map(drop)
}
