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
    // Entered one after the other, answered as the disk goes.
    let answers = requests
        .then(move |request| {
            let (shared, caller, room) = (Arc::clone(&shared), caller.clone(), Arc::clone(&room));
            async move {
                let entered = match request {
                    Ok(request) => {
                        let (request, room) = in_flight(room, request.encoded_len(), request).await;
                        let (id, empty) = (request.request_id, request.messages.is_empty());
                        Ok((id, empty, unary::enter(&shared.queues, &caller, request.messages).await, room))
                    }
                    Err(status) => Err(status),
                };
                async move {
                    let (id, empty, results, _room) = entered?;
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
