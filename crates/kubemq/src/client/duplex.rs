//! A stream in both directions: requests go, answers come, and it ends when it is dropped.

use std::{future::Future, sync::Arc, time::Duration};

use polymq_core::Result;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use crate::{
    error::Effect,
    link::{Link, Live},
    transport::Client,
};

/// Requests that the connection has not taken yet.
const WAITING: usize = 4;

#[derive(Debug)]
pub(super) struct Duplex<Q, A> {
    pub(super) link: Arc<Link>,
    live: Live,
    requests: mpsc::Sender<Q>,
    answers: Streaming<A>,
}

impl<Q, A> Duplex<Q, A> {
    /// Opens it with its first request: some servers answer nothing before they have one.
    pub(super) async fn open<F>(
        link: Arc<Link>,
        first: Q,
        limit: Duration,
        open: impl FnOnce(Client, ReceiverStream<Q>) -> F,
    ) -> Result<Self>
    where
        F: Future<Output = std::result::Result<Response<Streaming<A>>, Status>>,
    {
        let live = link.live_soon("receive").await?;
        let (requests, stream) = mpsc::channel(WAITING);
        // There is room: it is the first.
        let _ = requests.try_send(first);
        let opening = open(live.client.clone(), ReceiverStream::new(stream));
        let answers = link.call(&live, "receive", Effect::Idempotent, limit, opening).await?;
        Ok(Self { link, live, requests, answers })
    }

    /// Sends a request. A stream that is over says why in its answers, so nobody hears of it here.
    pub(super) async fn tell(&self, request: Q) {
        let _ = self.requests.send(request).await;
    }

    /// The next answer; `None` when the server has ended the stream.
    pub(super) async fn hear(&mut self, operation: &'static str, effect: Effect, limit: Duration) -> Result<Option<A>> {
        let Self { link, live, answers, .. } = self;
        let next = async { answers.message().await.map(Response::new) };
        link.call(live, operation, effect, limit, next).await
    }
}
