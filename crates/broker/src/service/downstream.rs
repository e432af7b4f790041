//! `QueuesDownstream`: polls, and the settlement of what they gave.
//!
//! What a poll gave is a transaction, found by its id from every stream: one SDK settles over a second one. A
//! settlement that succeeds is not answered; SDKs take whatever comes next for the answer to their next poll. When the
//! stream of a poll ends, what is not settled goes back to its place, uncounted.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, future::join_all, stream::FuturesUnordered};
use polymq_kubemq_proto::{QueuesDownstreamRequest, QueuesDownstreamRequestType as Kind, QueuesDownstreamResponse};
use prost::Message as _;
use tokio::{
    sync::mpsc,
    time::{Instant, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::Answers;
use crate::{
    access::Caller,
    broker::Shared,
    limits::Limits,
    names,
    queue::Lent,
    refusal::Refusal,
    rules::{Action, Resource},
    under_way::Taken,
};

/// Answers of a stream that wait for its client.
const ANSWERS: usize = 16;

/// When the broker stops: how long settlements that were sent already are taken, and after which silence there are none.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(2);
pub(super) const SILENCE: Duration = Duration::from_millis(100);

/// Polls of a stream that wait at a time.
const POLLS: usize = 1000;

/// Every open transaction by its id.
#[derive(Debug, Default)]
pub(crate) struct Transactions(Mutex<HashMap<String, Open>>);

/// What a poll gave and is not settled.
#[derive(Debug)]
struct Open {
    messages: BTreeMap<u64, Lent>,
    stream: Arc<Holds>,
}

/// What a stream holds, of all its polls.
#[derive(Debug, Default)]
struct Holds {
    count: AtomicUsize,
    bytes: AtomicUsize,
}

impl Holds {
    fn add(&self, lent: &Lent) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(lent.size(), Ordering::Relaxed);
    }

    fn remove(&self, lent: &Lent) {
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.bytes.fetch_sub(lent.size(), Ordering::Relaxed);
    }

    /// How many more it may hold.
    fn room(&self, limits: &Limits) -> usize {
        if self.bytes.load(Ordering::Relaxed) >= limits.held_bytes {
            return 0;
        }
        limits.held_count.saturating_sub(self.count.load(Ordering::Relaxed))
    }

    fn check(&self, limits: &Limits) -> Result<(), Refusal> {
        let (count, bytes) = (self.count.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed));
        if self.room(limits) > 0 {
            return Ok(());
        }
        Err(Refusal::because(format_args!(
            "this stream holds {count} messages of {bytes} bytes, the most this broker allows: settle some first"
        )))
    }
}

impl Transactions {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many are open.
    pub(crate) fn count(&self) -> usize {
        self.lock().len()
    }

    fn open(&self, id: &str, messages: Vec<Lent>, stream: &Arc<Holds>) {
        messages.iter().for_each(|lent| stream.add(lent));
        let messages = messages.into_iter().map(|lent| (lent.sequence(), lent)).collect();
        self.lock().insert(id.to_owned(), Open { messages, stream: Arc::clone(stream) });
    }

    /// Gives back what is left of a transaction.
    fn close(&self, id: &str) -> bool {
        let Some(left) = self.lock().remove(id) else { return false };
        left.messages.values().for_each(|lent| left.stream.remove(lent));
        true
    }

    fn offsets(&self, id: &str) -> Option<Vec<i64>> {
        let transactions = self.lock();
        let open = transactions.get(id)?;
        Some(open.messages.keys().map(|sequence| sequence.cast_signed()).collect())
    }

    /// Takes messages out of a transaction: those of a range, or all.
    fn take(&self, id: &str, range: Option<&[i64]>, verb: &str) -> Result<Vec<Lent>, Refusal> {
        let mut transactions = self.lock();
        let gone = || Refusal::because("transaction is completed or transaction id not found");
        let open = transactions.get_mut(id).ok_or_else(gone)?;
        let held = &mut open.messages;
        let taken: Vec<Lent> = match range {
            None => std::mem::take(held).into_values().collect(),
            Some([]) => return Err(Refusal::because(format_args!("cannot {verb} empty list of offsets"))),
            Some(range) => {
                let unknown = range.iter().find(|sequence| !held.contains_key(&sequence.cast_unsigned()));
                if let Some(unknown) = unknown {
                    return Err(Refusal::because(format_args!("invalid {verb} sequence id {unknown}")));
                }
                let mut range: Vec<_> = range.iter().map(|sequence| sequence.cast_unsigned()).collect();
                range.sort_unstable();
                range.iter().filter_map(|sequence| held.remove(sequence)).collect()
            }
        };
        taken.iter().for_each(|lent| open.stream.remove(lent));
        if open.messages.is_empty() {
            transactions.remove(id);
        }
        Ok(taken)
    }
}

/// The polls of one stream: gone with it.
struct Opened {
    shared: Arc<Shared>,
    ids: Vec<String>,
    holds: Arc<Holds>,
}

impl Drop for Opened {
    fn drop(&mut self) {
        for id in &self.ids {
            self.shared.transactions.close(id);
        }
    }
}

pub(super) fn serve(
    shared: Arc<Shared>,
    caller: Caller,
    mut requests: Streaming<QueuesDownstreamRequest>,
) -> Answers<QueuesDownstreamResponse> {
    let (answers, stream) = mpsc::channel(ANSWERS);
    tokio::spawn(async move {
        let mut opened = Opened { shared: Arc::clone(&shared), ids: Vec::new(), holds: Arc::default() };
        let mut polls = FuturesUnordered::new();
        let mut open = true;
        loop {
            tokio::select! {
                request = requests.next(), if open => match request {
                    Some(Ok(request)) if request.request_type_data() == Kind::Get => {
                        let room = room(&shared, &opened.holds, polls.len(), &request);
                        let holds = Arc::clone(&opened.holds);
                        polls.push(poll(Arc::clone(&shared), caller.clone(), request, (room, holds)));
                    }
                    Some(Ok(request)) => {
                        if let Some(answer) = settle(&shared, &caller, request).await
                            && answers.send(Ok(answer)).await.is_err()
                        {
                            return;
                        }
                    }
                    // A connection that broke takes its polls with it; a half-closed one has them finished.
                    Some(Err(status)) => {
                        let _ = answers.try_send(Err(status));
                        return;
                    }
                    None => open = false,
                },
                Some((answer, messages)) = polls.next() => {
                    if !messages.is_empty() {
                        shared.transactions.open(&answer.transaction_id, messages, &opened.holds);
                        opened.ids.push(answer.transaction_id.clone());
                        opened.ids.retain(|id| shared.transactions.lock().contains_key(id));
                    }
                    if answers.send(Ok(answer)).await.is_err() {
                        return;
                    }
                }
                () = answers.closed() => return,
                () = shared.stopping.cancelled() => break,
                else => return,
            }
            if !open && polls.is_empty() {
                return;
            }
        }
        // The broker stops: no more polls, but settlements that are on their way still count.
        drop(polls);
        let bound = tokio::time::sleep(LAST_WORDS);
        tokio::pin!(bound);
        while let Ok(Some(Ok(request))) = tokio::select! {
            request = timeout(SILENCE, requests.next()) => request,
            () = &mut bound => return,
        } {
            let answer = if request.request_type_data() == Kind::Get {
                let refused = (Err(Refusal::shutdown()), Arc::default());
                Some(poll(Arc::clone(&shared), caller.clone(), request, refused).await.0)
            } else {
                settle(&shared, &caller, request).await
            };
            if let Some(answer) = answer
                && answers.try_send(Ok(answer)).is_err()
            {
                return;
            }
        }
    });
    Box::pin(ReceiverStream::new(stream))
}

/// Whether a stream may have one more poll. What the poll was asked with waits as long as it does, and is counted.
fn room(shared: &Shared, holds: &Holds, polls: usize, request: &QueuesDownstreamRequest) -> Result<Taken, Refusal> {
    if polls >= POLLS {
        return Err(Refusal::because(format_args!(
            "{POLLS} polls of this stream wait already: wait for their answers first"
        )));
    }
    holds.check(shared.queues.limits())?;
    shared.under_way.take(request.encoded_len()).map_err(|status| Refusal::because(status.message()))
}

/// Exactly one answer, before the wait that was asked for is over.
async fn poll(
    shared: Arc<Shared>,
    caller: Caller,
    request: QueuesDownstreamRequest,
    (room, holds): (Result<Taken, Refusal>, Arc<Holds>),
) -> (QueuesDownstreamResponse, Vec<Lent>) {
    let mut answer = QueuesDownstreamResponse {
        transaction_id: uuid::Uuid::new_v4().to_string(),
        ref_request_id: request.request_id.clone(),
        request_type_data: Kind::Get.into(),
        ..QueuesDownstreamResponse::default()
    };
    let taken = match room {
        Ok(_counted) => taken(&shared, &caller, &request, &holds).await,
        Err(refusal) => Err(refusal),
    };
    match taken {
        Ok(taken) => {
            answer.messages = taken.iter().map(Lent::message).collect();
            if request.auto_ack {
                answer.transaction_complete = true;
                Lent::remove_all(taken);
                return (answer, Vec::new());
            }
            (answer, taken)
        }
        Err(refusal) => {
            answer.is_error = true;
            answer.error = refusal.to_string();
            (answer, Vec::new())
        }
    }
}

async fn taken(
    shared: &Shared,
    caller: &Caller,
    request: &QueuesDownstreamRequest,
    holds: &Holds,
) -> Result<Vec<Lent>, Refusal> {
    if request.client_id.is_empty() {
        return Err(Refusal::no_client());
    }
    names::check_queue(&request.channel)?;
    caller.may(Action::Read, Resource::Queues, &request.client_id, &request.channel)?;
    let limits = shared.queues.limits();
    let wait = u64::try_from(request.wait_timeout).map(Duration::from_millis).map_err(|_| Refusal::wait())?;
    if wait > limits.wait {
        return Err(Refusal::wait());
    }
    let most = usize::try_from(request.max_items).ok().filter(|most| *most > 0).unwrap_or(limits.receive);
    let queue = shared.queues.get(&request.channel)?;
    let most = most.min(limits.receive);
    // Other polls of its stream have taken something since this one was asked for.
    let room = || if request.auto_ack { most } else { most.min(holds.room(limits)) };
    let taken = queue.take_up_to(room, Instant::now() + wait).await?;
    if taken.messages.is_empty() && room() == 0 {
        holds.check(limits)?;
    }
    Ok(taken.messages)
}

/// Only what failed or was asked for has an answer.
async fn settle(
    shared: &Shared,
    caller: &Caller,
    request: QueuesDownstreamRequest,
) -> Option<QueuesDownstreamResponse> {
    let kind = request.request_type_data();
    let id = &request.ref_transaction_id;
    let range = Some(&*request.sequence_range);
    let transactions = &shared.transactions;
    let mut answer = QueuesDownstreamResponse {
        transaction_id: id.clone(),
        ref_request_id: request.request_id.clone(),
        request_type_data: kind.into(),
        ..QueuesDownstreamResponse::default()
    };
    let result = match kind {
        Kind::AckAll => transactions.take(id, None, "ack").map(Lent::remove_all),
        Kind::AckRange => transactions.take(id, range, "ack").map(Lent::remove_all),
        Kind::NAckAll => nack(shared, transactions.take(id, None, "nack")).await,
        Kind::NAckRange => nack(shared, transactions.take(id, range, "nack")).await,
        Kind::ReQueueAll | Kind::ReQueueRange => {
            let range = if kind == Kind::ReQueueAll { None } else { range };
            requeue(shared, caller, &request, range).await
        }
        // Who asks hears of settlements before: they are written by then.
        Kind::ActiveOffsets => match (transactions.offsets(id), shared.store.written().await) {
            (Some(offsets), Ok(())) => {
                answer.active_offsets = offsets;
                return Some(answer);
            }
            (_, Err(cause)) => Err(cause.into()),
            (None, _) => Err(Refusal::because("transaction is completed or transaction id not found")),
        },
        Kind::TransactionStatus => {
            answer.transaction_complete = transactions.offsets(id).is_none();
            match shared.store.written().await {
                Ok(()) => return Some(answer),
                Err(cause) => Err(cause.into()),
            }
        }
        // Ours: with sequences, only these go back to their places.
        Kind::CloseByClient if !request.sequence_range.is_empty() => transactions.take(id, range, "close").map(drop),
        Kind::CloseByClient if transactions.close(id) => Ok(()),
        Kind::CloseByClient => Err(Refusal::because("transaction is completed or transaction id not found")),
        Kind::Get | Kind::PollRequestTypeUnknown | Kind::CloseByServer => Err(Refusal::because("request unknown")),
    };
    let refusal = result.err()?;
    answer.is_error = true;
    answer.error = refusal.to_string();
    Some(answer)
}

async fn nack(shared: &Shared, messages: Result<Vec<Lent>, Refusal>) -> Result<(), Refusal> {
    // They are handed to the store in their order, and share its answer.
    let rejected = join_all(messages?.into_iter().map(|lent| shared.queues.reject(lent))).await;
    rejected.into_iter().collect()
}

async fn requeue(
    shared: &Shared,
    caller: &Caller,
    request: &QueuesDownstreamRequest,
    range: Option<&[i64]>,
) -> Result<(), Refusal> {
    let target = &request.re_queue_channel;
    if target.is_empty() {
        return Err(Refusal::because("cannot requeue messages with empty channel destination"));
    }
    names::check_queue(target)?;
    caller.may(Action::Write, Resource::Queues, &request.client_id, target)?;
    let messages = shared.transactions.take(&request.ref_transaction_id, range, "requeue")?;
    let moved = join_all(messages.into_iter().map(|lent| shared.queues.requeue(lent, target, true))).await;
    moved.into_iter().collect()
}
