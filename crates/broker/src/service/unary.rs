//! The calls on queues that have one answer.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use polymq_kubemq_proto::{
    AckAllQueueMessagesRequest, AckAllQueueMessagesResponse, QueueInfo, QueueMessage, QueueMessagesBatchRequest,
    QueueMessagesBatchResponse, QueuesInfo, QueuesInfoRequest, QueuesInfoResponse, ReceiveQueueMessagesRequest,
    ReceiveQueueMessagesResponse, SendQueueMessageResult,
};
use tokio::time::Instant;
use tonic::Status;

use crate::{
    access::Caller,
    broker::Shared,
    limits::DEFAULT_WAIT,
    names,
    queue::{Lent, shown},
    queues::{Queues, within},
    refusal::Refusal,
    rules::{Action, Resource},
};

/// Hands over what the caller may send, to its queue and to the one of its dead letters; the future answers with a result
/// each when all are on disk.
pub(super) async fn enter(
    queues: &Arc<Queues>,
    caller: &Caller,
    messages: Vec<QueueMessage>,
) -> BoxFuture<'static, Vec<SendQueueMessageResult>> {
    queues.enter(messages, |message| may_send(caller, message)).await
}

/// Whether the caller may send a message, and have it end up where its policy says.
pub(super) fn may_send(caller: &Caller, message: &QueueMessage) -> Result<(), Refusal> {
    let dead = message.policy.as_ref().map_or("", |policy| &policy.max_receive_queue);
    let mut names = [message.channel.as_str(), dead].into_iter().filter(|name| !name.is_empty());
    names.try_for_each(|name| caller.may(Action::Write, Resource::Queues, &message.client_id, name))
}

async fn send(queues: &Arc<Queues>, caller: &Caller, messages: Vec<QueueMessage>) -> Vec<SendQueueMessageResult> {
    enter(queues, caller, messages).await.await
}

pub(super) async fn send_one(queues: &Arc<Queues>, caller: &Caller, message: QueueMessage) -> SendQueueMessageResult {
    send(queues, caller, vec![message]).await.pop().unwrap_or_default()
}

pub(super) async fn send_batch(
    queues: &Arc<Queues>,
    caller: &Caller,
    request: QueueMessagesBatchRequest,
) -> Result<QueueMessagesBatchResponse, Status> {
    if request.messages.is_empty() {
        return Err(Status::unknown("empty messages batch"));
    }
    let results = send(queues, caller, request.messages).await;
    let have_errors = results.iter().any(|result| result.is_error);
    Ok(QueueMessagesBatchResponse { batch_id: request.batch_id, results, have_errors })
}

pub(super) async fn receive(
    shared: &Shared,
    caller: &Caller,
    request: ReceiveQueueMessagesRequest,
) -> ReceiveQueueMessagesResponse {
    let (request_id, is_peak) = (request.request_id.clone(), request.is_peak);
    match received(shared, caller, &request).await {
        Ok((messages, expired)) => {
            let messages_received = i32::try_from(messages.len()).unwrap_or(i32::MAX);
            let messages_expired = i32::try_from(expired).unwrap_or(i32::MAX);
            ReceiveQueueMessagesResponse {
                request_id,
                messages,
                messages_received,
                messages_expired,
                is_peak,
                ..ReceiveQueueMessagesResponse::default()
            }
        }
        Err(refusal) => ReceiveQueueMessagesResponse {
            request_id,
            is_peak,
            is_error: true,
            error: refusal.to_string(),
            ..ReceiveQueueMessagesResponse::default()
        },
    }
}

/// Messages, and how many were found to be expired.
async fn received(
    shared: &Shared,
    caller: &Caller,
    request: &ReceiveQueueMessagesRequest,
) -> Result<(Vec<QueueMessage>, u64), Refusal> {
    let limits = shared.queues.limits();
    if request.client_id.is_empty() {
        return Err(Refusal::no_client());
    }
    names::check_queue(&request.channel)?;
    caller.may(Action::Read, Resource::Queues, &request.client_id, &request.channel)?;
    let most = usize::try_from(request.max_number_of_messages).unwrap_or(0);
    if !(1..=limits.receive).contains(&most) {
        return Err(Refusal::receive_count_of_request());
    }
    let wait = wait(request.wait_time_seconds, limits.wait)?;
    let queue = shared.queues.get(&request.channel)?;
    let until = Instant::now() + wait;
    let work = async {
        if request.is_peak {
            return Ok((queue.peek(most, until).await?.into_iter().map(shown).collect(), 0));
        }
        let taken = queue.take(most, until).await?;
        let messages = taken.messages.iter().map(Lent::message).collect();
        // A caller that is gone by now has dropped this future, and with it the loans.
        Lent::remove_all(taken.messages);
        Ok((messages, taken.expired))
    };
    tokio::select! {
        received = work => received,
        () = shared.stopping.cancelled() => Err(Refusal::shutdown()),
    }
}

pub(super) async fn ack_all(
    queues: &Queues,
    caller: &Caller,
    request: AckAllQueueMessagesRequest,
) -> AckAllQueueMessagesResponse {
    let result = async {
        if request.client_id.is_empty() {
            return Err(Refusal::no_client());
        }
        names::check_queue(&request.channel)?;
        caller.may(Action::Write, Resource::Queues, &request.client_id, &request.channel)?;
        wait(request.wait_time_seconds, queues.limits().wait)?;
        Ok(queues.get(&request.channel)?.purge().await?)
    };
    let request_id = request.request_id.clone();
    match result.await {
        Ok(affected_messages) => {
            AckAllQueueMessagesResponse { request_id, affected_messages, ..AckAllQueueMessagesResponse::default() }
        }
        Err(refusal) => AckAllQueueMessagesResponse {
            request_id,
            is_error: true,
            error: refusal.to_string(),
            ..AckAllQueueMessagesResponse::default()
        },
    }
}

/// Who asks for a queue by its name and may do nothing with it is told so; a list of all has those that may be read. What is in
/// it, is for those who may read it: a request does not say who asks, so without a token that does, anybody sees that a queue is there.
pub(super) fn info(
    queues: &Queues,
    caller: &Caller,
    request: QueuesInfoRequest,
) -> Result<QueuesInfoResponse, Refusal> {
    let names: Vec<_> = request.queue_name.split(';').filter(|name| !name.is_empty()).collect();
    if let Some(name) = names.iter().find(|name| !caller.sees(Resource::Queues, name)) {
        tracing::debug!(name, "refused: no rule shows this queue");
        return Err(caller.denied());
    }
    let queues: Vec<_> = queues
        .all()
        .into_iter()
        .filter(|queue| names.is_empty() || names.contains(&&*queue.name))
        .filter(|queue| match names.is_empty() {
            true => caller.can(Action::Read, Resource::Queues, "", &queue.name),
            false => caller.sees(Resource::Queues, &queue.name),
        })
        .map(|queue| {
            if !caller.can(Action::Read, Resource::Queues, "", &queue.name) {
                return QueueInfo { name: queue.name.clone(), ..QueueInfo::default() };
            }
            let stats = queue.stats();
            QueueInfo {
                name: queue.name.clone(),
                messages: signed(stats.messages),
                bytes: signed(stats.bytes),
                first_sequence: signed(stats.first),
                last_sequence: signed(stats.last),
                sent: signed(stats.incoming),
                delivered: signed(stats.outgoing),
                waiting: signed(stats.messages),
                subscribers: 0,
            }
        })
        .collect();
    let info = QueuesInfo {
        total_queue: i32::try_from(queues.len()).unwrap_or(i32::MAX),
        sent: queues.iter().map(|queue| queue.sent).sum(),
        delivered: queues.iter().map(|queue| queue.delivered).sum(),
        waiting: queues.iter().map(|queue| queue.waiting).sum(),
        queues,
    };
    Ok(QueuesInfoResponse { ref_request_id: request.request_id, info: Some(info) })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// How long to wait; a request that says nothing waits for a second.
pub(super) fn wait(seconds: i32, most: Duration) -> Result<Duration, Refusal> {
    match within(seconds, most) {
        Some(Duration::ZERO) => Ok(DEFAULT_WAIT),
        Some(wait) => Ok(wait),
        None => Err(Refusal::wait()),
    }
}
