//! `QueuesUpstream`: requests of messages, each answered with a result a message when all are on disk.

use std::sync::Arc;

use futures_util::{StreamExt, stream};
use polymq_kubemq_proto::{QueuesUpstreamRequest, QueuesUpstreamResponse};
use tonic::{Status, Streaming};

use super::{Answers, unary};
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
    let requests = requests.take_until(stopping.cancelled_owned());
    // Entered one after the other, answered as the disk goes.
    let answers = requests
        .flat_map(stream::iter)
        .then(move |request| {
            let (shared, caller) = (Arc::clone(&shared), caller.clone());
            async move { enter(&shared, &caller, request).await }
        })
        .buffered(AT_ONCE);
    Box::pin(answers)
}

async fn enter(
    shared: &Shared,
    caller: &Caller,
    request: QueuesUpstreamRequest,
) -> impl Future<Output = Result<QueuesUpstreamResponse, Status>> + Send + use<> {
    let ref_request_id = request.request_id;
    let empty = request.messages.is_empty();
    let results = unary::enter_all(&shared.queues, caller, request.messages).await;
    async move {
        let results = results.await;
        let error = if empty { "no messages to send".to_owned() } else { String::new() };
        Ok(QueuesUpstreamResponse { ref_request_id, results, is_error: empty, error })
    }
}
