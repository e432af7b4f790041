//! `QueuesUpstream`: requests of messages, each answered with a result a message when all are on disk.

use std::sync::Arc;

use futures_util::StreamExt;
use polymq_kubemq_proto::{QueuesUpstreamRequest, QueuesUpstreamResponse};
use prost::Message as _;
use tonic::{Status, Streaming};

use super::{Answers, in_flight, in_flight_room, readable, unary};
use crate::{access::Caller, broker::Shared};

/// Requests of one stream that wait for the disk at once.
const AT_ONCE: usize = 256;

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
        .map(move |(request, room)| {
            let (shared, caller) = (Arc::clone(&shared), caller.clone());
            async move {
                let _room = room;
                answer(shared, caller, request).await
            }
        })
        .buffered(AT_ONCE);
    Box::pin(answers)
}

async fn answer(
    shared: Arc<Shared>,
    caller: Caller,
    request: QueuesUpstreamRequest,
) -> Result<QueuesUpstreamResponse, Status> {
    let ref_request_id = request.request_id;
    if request.messages.is_empty() {
        let error = "no messages to send".to_owned();
        return Ok(QueuesUpstreamResponse { ref_request_id, results: Vec::new(), is_error: true, error });
    }
    let results = unary::send(&shared.queues, &caller, request.messages).await;
    Ok(QueuesUpstreamResponse { ref_request_id, results, is_error: false, error: String::new() })
}
