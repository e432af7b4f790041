//! The gRPC service: one method a call of the protocol, each a few lines over what does the work.

mod admin;
mod downstream;
mod events;
mod requests;
mod transaction;
mod unary;
mod upstream;

pub(crate) use downstream::Transactions;

use std::{future::ready, pin::Pin, sync::Arc};

use futures_util::{Stream, StreamExt};
use polymq_kubemq_proto::{self as proto, kubemq_server::Kubemq};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status, Streaming};

use crate::{access::Caller, broker::Shared};

/// What a client sends until its stream ends or cannot be read any more, which its client is told: after its first error a
/// stream gives the same error for ever.
fn readable<T>(requests: Streaming<T>) -> impl Stream<Item = Result<T, Status>> {
    requests.scan(true, |goes, request| {
        let request = goes.then_some(request);
        *goes = matches!(request, Some(Ok(_)));
        ready(request)
    })
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Bytes of one stream's requests that are worked on at a time, or one request that has more.
const IN_FLIGHT: usize = 32 << 20;

fn in_flight_room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(IN_FLIGHT))
}

/// Waits until a stream has room for a request; the room is taken until the second value is dropped.
async fn in_flight<T>(room: Arc<Semaphore>, size: usize, request: T) -> (T, Option<OwnedSemaphorePermit>) {
    let size = u32::try_from(size.clamp(1, IN_FLIGHT)).unwrap_or(u32::MAX);
    (request, room.acquire_many_owned(size).await.ok())
}

/// What a connection of any client talks to.
#[derive(Debug, Clone)]
pub(crate) struct Service(pub(crate) Arc<Shared>);

impl Service {
    /// While the broker stops, clients are told to come again, and so they are when its store has failed: then it must be
    /// started anew, and whoever looks after it sees that a ping is refused.
    fn ready(&self) -> Result<(), Status> {
        if let Some(cause) = self.0.store.failed() {
            return Err(Status::unavailable(cause.to_string()));
        }
        if self.0.stopping.is_cancelled() {
            return Err(Status::unavailable("grpc server is not ready to accept requests"));
        }
        Ok(())
    }

    /// Who calls. Asked at the start of every call but a ping; what came over a connection was asked before its body was read.
    fn caller<T>(&self, request: &Request<T>) -> Result<Caller, Status> {
        self.ready()?;
        match request.extensions().get::<Caller>() {
            Some(caller) => Ok(caller.clone()),
            None => self.0.access.caller(&request.metadata().clone().into_headers()),
        }
    }
}

#[tonic::async_trait]
impl Kubemq for Service {
    type SendEventsStreamStream = Answers<proto::Result>;
    type SubscribeToEventsStream = Answers<proto::EventReceive>;
    type SubscribeToRequestsStream = Answers<proto::Request>;
    type StreamQueueMessageStream = Answers<proto::StreamQueueMessagesResponse>;
    type QueuesDownstreamStream = Answers<proto::QueuesDownstreamResponse>;
    type QueuesUpstreamStream = Answers<proto::QueuesUpstreamResponse>;

    async fn ping(&self, _: Request<proto::Empty>) -> Result<Response<proto::PingResult>, Status> {
        self.ready()?;
        Ok(Response::new(self.0.about()))
    }

    async fn send_event(&self, request: Request<proto::Event>) -> Result<Response<proto::Result>, Status> {
        let caller = self.caller(&request)?;
        match events::send(&self.0, &caller, request.into_inner()).await {
            Ok(event_id) => Ok(Response::new(proto::Result { event_id, sent: true, error: String::new() })),
            Err((_, refusal)) => Err(refusal.status()),
        }
    }

    async fn send_events_stream(
        &self,
        request: Request<Streaming<proto::Event>>,
    ) -> Result<Response<Self::SendEventsStreamStream>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(events::send_stream(Arc::clone(&self.0), caller, request.into_inner())))
    }

    async fn subscribe_to_events(
        &self,
        request: Request<proto::Subscribe>,
    ) -> Result<Response<Self::SubscribeToEventsStream>, Status> {
        let caller = self.caller(&request)?;
        events::subscribe(&self.0, caller, request.into_inner()).await.map(Response::new)
    }

    async fn subscribe_to_requests(
        &self,
        request: Request<proto::Subscribe>,
    ) -> Result<Response<Self::SubscribeToRequestsStream>, Status> {
        let caller = self.caller(&request)?;
        requests::subscribe(&self.0, &caller, &request.into_inner()).map(Response::new)
    }

    async fn send_request(&self, request: Request<proto::Request>) -> Result<Response<proto::Response>, Status> {
        let caller = self.caller(&request)?;
        requests::ask(&self.0, &caller, request.into_inner()).await.map(Response::new)
    }

    async fn send_response(&self, request: Request<proto::Response>) -> Result<Response<proto::Empty>, Status> {
        // To a responder, the address of an answer is the right to give it: it cannot be guessed.
        self.caller(&request)?;
        let answered = self.0.requests.answer(request.into_inner());
        answered.map(|()| Response::new(proto::Empty {})).map_err(|refusal| refusal.status())
    }

    async fn send_queue_message(
        &self,
        request: Request<proto::QueueMessage>,
    ) -> Result<Response<proto::SendQueueMessageResult>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(unary::send_one(&self.0.queues, &caller, request.into_inner()).await))
    }

    async fn send_queue_messages_batch(
        &self,
        request: Request<proto::QueueMessagesBatchRequest>,
    ) -> Result<Response<proto::QueueMessagesBatchResponse>, Status> {
        let caller = self.caller(&request)?;
        unary::send_batch(&self.0.queues, &caller, request.into_inner()).await.map(Response::new)
    }

    async fn receive_queue_messages(
        &self,
        request: Request<proto::ReceiveQueueMessagesRequest>,
    ) -> Result<Response<proto::ReceiveQueueMessagesResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(unary::receive(&self.0, &caller, request.into_inner()).await))
    }

    async fn ack_all_queue_messages(
        &self,
        request: Request<proto::AckAllQueueMessagesRequest>,
    ) -> Result<Response<proto::AckAllQueueMessagesResponse>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(unary::ack_all(&self.0.queues, &caller, request.into_inner()).await))
    }

    async fn stream_queue_message(
        &self,
        request: Request<Streaming<proto::StreamQueueMessagesRequest>>,
    ) -> Result<Response<Self::StreamQueueMessageStream>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(transaction::serve(Arc::clone(&self.0), caller, request.into_inner())))
    }

    async fn queues_downstream(
        &self,
        request: Request<Streaming<proto::QueuesDownstreamRequest>>,
    ) -> Result<Response<Self::QueuesDownstreamStream>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(downstream::serve(Arc::clone(&self.0), caller, request.into_inner())))
    }

    async fn queues_upstream(
        &self,
        request: Request<Streaming<proto::QueuesUpstreamRequest>>,
    ) -> Result<Response<Self::QueuesUpstreamStream>, Status> {
        let caller = self.caller(&request)?;
        Ok(Response::new(upstream::serve(Arc::clone(&self.0), caller, request.into_inner())))
    }

    async fn queues_info(
        &self,
        request: Request<proto::QueuesInfoRequest>,
    ) -> Result<Response<proto::QueuesInfoResponse>, Status> {
        let caller = self.caller(&request)?;
        let answer = unary::info(&self.0.queues, &caller, request.into_inner());
        answer.map(Response::new).map_err(|refusal| refusal.status())
    }
}
