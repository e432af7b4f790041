//! `QueuesUpstream`: requests of messages, each answered with a result a message when all are on disk.

use std::sync::Arc;

use futures_util::{StreamExt, future::join_all, stream};
use polymq_kubemq_proto::{QueuesUpstreamRequest, QueuesUpstreamResponse};
use tonic::{Status, Streaming};

use super::{Answers, unary};
use crate::{access::Caller, broker::Shared};

/// Requests of one stream that wait for the disk at once.
const AT_ONCE: usize = 256;

pub(super) fn serve(
    shared: Arc<Shared>,
    caller: Caller,
    requests: Streaming<QueuesUpstreamRequest>,
) -> Answers<QueuesUpstreamResponse> {
    let stopping = shared.stopping.clone();
    let requests = requests.take_until(stopping.cancelled_owned());
    let answers = requests
        .flat_map(stream::iter)
        .map(move |request| answer(Arc::clone(&shared), caller.clone(), request))
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
    let results =
        join_all(request.messages.into_iter().map(|message| unary::send(&shared.queues, &caller, message))).await;
    Ok(QueuesUpstreamResponse { ref_request_id, results, is_error: false, error: String::new() })
}
