//! `QueuesUpstream`: requests of messages, each answered with a result a message when all are on disk.

use std::sync::Arc;

use futures_util::StreamExt;
use polymq_kubemq_proto::{QueuesUpstreamRequest, QueuesUpstreamResponse, SendQueueMessageResult};
use prost::Message as _;
use tonic::Streaming;

use super::{Answers, in_flight, in_flight_room, readable, unary};
use crate::{access::Caller, broker::Shared};

/// Requests of one stream that wait for the disk at once.
const AT_ONCE: usize = 256;

#[allow(clippy::async_yields_async)] // entered in order, awaited beside each other
pub(super) fn serve(
    shared: Arc<Shared>,
    caller: Caller,
    requests: Streaming<QueuesUpstreamRequest>,
) -> Answers<QueuesUpstreamResponse> {
    let stopping = shared.stopping.clone();
    let requests = readable(requests).take_until(stopping.cancelled_owned());
    let room = in_flight_room();
    let answers = requests
        .then(move |request| in_flight(Arc::clone(&room), request.encoded_len(), request))
        // Entered one after the other, answered as the disk goes.
        .then(move |(request, room)| {
            let (shared, caller) = (Arc::clone(&shared), caller.clone());
            async move {
                let (id, empty) = (request.request_id, request.messages.is_empty());
                let results = unary::enter(&shared.queues, &caller, request.messages).await;
                async move {
                    let _room = room;
                    Ok(answer(id, empty, results.await))
                }
            }
        })
        .buffered(AT_ONCE);
    Box::pin(answers)
}

fn answer(ref_request_id: String, empty: bool, results: Vec<SendQueueMessageResult>) -> QueuesUpstreamResponse {
    let error = if empty { "no messages to send".to_owned() } else { String::new() };
    QueuesUpstreamResponse { ref_request_id, results, is_error: empty, error }
}
