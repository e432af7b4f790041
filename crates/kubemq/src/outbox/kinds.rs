//! What is sent: messages for queues and events, each kind with its call.

use async_trait::async_trait;
use polymq_core::Result;
use polymq_kubemq_proto::{
    Event, QueueMessage, QueuesUpstreamRequest, QueuesUpstreamResponse, Result as Sent, SendQueueMessageResult,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::BATCH;
use crate::{error, transport::Client};

/// How one kind of message is sent and answered.
#[async_trait]
pub(crate) trait Kind: Send + Sync + 'static {
    type Item: Send + Sync + 'static;
    type Request: Send + 'static;
    type Response: Send + 'static;
    /// Whether a good message is answered.
    const ANSWERS: bool;
    /// Whether a batch is one request; else each message is.
    const WHOLE: bool;

    async fn open(
        client: &mut Client,
        requests: ReceiverStream<Self::Request>,
    ) -> std::result::Result<Response<Streaming<Self::Response>>, Status>;

    fn size(item: &Self::Item) -> usize;

    /// The requests of a batch, of which there are as many as messages or one.
    fn requests(number: u64, items: Vec<Self::Item>) -> Vec<Self::Request>;

    /// The number of the batch that is answered, without one the first, and how each of its messages went.
    fn results(response: Self::Response) -> (Option<u64>, Vec<Result<()>>);
}

/// Messages for queues.
#[derive(Debug)]
pub(crate) struct ToQueues;

#[async_trait]
impl Kind for ToQueues {
    type Item = QueueMessage;
    type Request = QueuesUpstreamRequest;
    type Response = QueuesUpstreamResponse;
    const ANSWERS: bool = true;
    const WHOLE: bool = true;

    async fn open(
        client: &mut Client,
        requests: ReceiverStream<Self::Request>,
    ) -> std::result::Result<Response<Streaming<Self::Response>>, Status> {
        client.queues_upstream(requests).await
    }

    fn size(item: &QueueMessage) -> usize {
        item.body.len() + item.metadata.len() + tags(&item.tags)
    }

    fn requests(number: u64, messages: Vec<QueueMessage>) -> Vec<Self::Request> {
        vec![QueuesUpstreamRequest { request_id: number.to_string(), messages }]
    }

    fn results(response: Self::Response) -> (Option<u64>, Vec<Result<()>>) {
        let number = response.ref_request_id.parse().ok();
        let result = |result: SendQueueMessageResult| match result.is_error {
            true => Err(error::refused("send", &result.error)),
            false => Ok(()),
        };
        let mut results: Vec<_> = response.results.into_iter().map(result).collect();
        if response.is_error && results.is_empty() {
            // Some servers say it once for all.
            results = (0..BATCH.0).map(|_| Err(error::refused("send", &response.error))).collect();
        }
        (number, results)
    }
}

/// Events, stored (`true`) or not.
#[derive(Debug)]
pub(crate) struct ToTopics<const STORE: bool>;

#[async_trait]
impl<const STORE: bool> Kind for ToTopics<STORE> {
    type Item = Event;
    type Request = Event;
    type Response = Sent;
    const ANSWERS: bool = STORE;
    const WHOLE: bool = false;

    async fn open(
        client: &mut Client,
        requests: ReceiverStream<Event>,
    ) -> std::result::Result<Response<Streaming<Sent>>, Status> {
        client.send_events_stream(requests).await
    }

    fn size(item: &Event) -> usize {
        item.body.len() + item.metadata.len() + tags(&item.tags)
    }

    fn requests(_: u64, events: Vec<Event>) -> Vec<Event> {
        events
    }

    fn results(response: Sent) -> (Option<u64>, Vec<Result<()>>) {
        let result = if response.sent { Ok(()) } else { Err(error::refused("send", &response.error)) };
        (None, vec![result])
    }
}

fn tags(tags: &std::collections::HashMap<String, String>) -> usize {
    tags.iter().map(|(name, value)| name.len() + value.len()).sum()
}
