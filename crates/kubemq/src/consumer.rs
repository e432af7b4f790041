//! Receiving from a queue: a background task per consumer that polls, settles, and begins again after a loss.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt};
use polymq_core::{Consumer, Error, ErrorKind, Incoming, Result, Settler};
use polymq_kubemq_proto::{QueuesDownstreamRequest, QueuesDownstreamRequestType as Kind, QueuesDownstreamResponse};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    error::{self, Effect, native},
    group::Mover,
    held::read,
    link::{Link, Live},
    producer::CLOSE_TIMEOUT,
    settle::KubeMqSettler,
    shared::{Order, Shared, Verb},
};

/// Wait after an answer that says "not now".
const PAUSE: Duration = Duration::from_secs(1);
/// Bytes that one poll should bring at most, going by the largest message of the one before.
const POLL_BYTES: usize = 32 << 20;
/// The messages of a first poll, of which nobody knows how large they are.
const FIRST_POLL: usize = 16;
/// How long a consumer that is closed keeps what goes back unhandled for the end of its stream.
const KEPT: Duration = Duration::from_secs(10);
/// Requests that wait for the connection.
const REQUESTS: usize = 64;

/// A consumer of a queue.
#[derive(Debug)]
pub(crate) struct KubeMqConsumer {
    shared: Arc<Shared>,
    settler: Arc<KubeMqSettler>,
    handle: ConsumerHandle,
    /// Fills the queue, where it is a group's.
    mover: Option<Arc<Mover>>,
}

/// What the connection needs to close a consumer that is still open.
#[derive(Debug, Clone)]
pub(crate) struct ConsumerHandle {
    shared: Arc<Shared>,
    /// How far the task has come.
    stage: watch::Receiver<Stage>,
}

/// How far a consumer's task has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Reading,
    /// Nothing is fetched any more, and what was not received is back.
    Returned,
    Ended,
}

impl ConsumerHandle {
    pub(crate) fn is_gone(&self) -> bool {
        *self.stage.borrow() == Stage::Ended
    }

    /// Ends it, settled or not.
    pub(crate) async fn close(mut self) {
        self.shared.start_close();
        self.reaches(Stage::Returned).await;
        self.shared.abandon();
        self.reaches(Stage::Ended).await;
    }

    async fn reaches(&mut self, stage: Stage) {
        // Bounded for a broker that does not answer: what is not returned then, returns with the connection.
        let _ = timeout(CLOSE_TIMEOUT, async {
            let _ = self.stage.wait_for(|now| *now >= stage).await;
            self.shared.all_told().await;
            if self.shared.is_settled() {
                let _ = self.stage.wait_for(|now| *now == Stage::Ended).await;
            }
        })
        .await;
    }
}

impl KubeMqConsumer {
    pub(crate) fn start(link: Arc<Link>, shared: Arc<Shared>, mover: Option<Arc<Mover>>) -> Self {
        let (stage, stages) = watch::channel(Stage::Reading);
        let task =
            Task { link: Arc::clone(&link), shared: Arc::clone(&shared), stage, largest: POLL_BYTES / FIRST_POLL };
        link.spawn(task.run());
        let handle = ConsumerHandle { shared: Arc::clone(&shared), stage: stages };
        Self { settler: Arc::new(KubeMqSettler(Arc::clone(&shared))), shared, handle, mover }
    }

    pub(crate) fn mover(&self) -> Option<&Arc<Mover>> {
        self.mover.as_ref()
    }

    pub(crate) fn handle(&self) -> ConsumerHandle {
        self.handle.clone()
    }
}

#[async_trait]
impl Consumer for KubeMqConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        loop {
            // Nothing is taken while this waits, so dropping the future loses nothing.
            if let Some(result) = self.shared.take(max, into) {
                return result;
            }
            self.shared.arrived.notified().await;
        }
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.settler) as Arc<dyn Settler>
    }

    async fn close(&mut self) -> Result<()> {
        self.shared.start_close();
        if let Some(mover) = &self.mover {
            mover.close().await;
        }
        self.handle.reaches(Stage::Returned).await;
        Ok(())
    }
}

impl Drop for KubeMqConsumer {
    fn drop(&mut self) {
        self.shared.start_close();
    }
}

struct Task {
    link: Arc<Link>,
    shared: Arc<Shared>,
    stage: watch::Sender<Stage>,
    /// Bytes of the largest message that came lately.
    largest: usize,
}

/// How a stream ended.
enum End {
    Lost,
    Refused(Error),
    Done,
}

impl Task {
    async fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        loop {
            let live = tokio::select! {
                live = self.link.live() => live,
                () = closing(&shared) => break,
            };
            let live = match live {
                Ok(live) => live,
                Err(error) => {
                    shared.fail(&error);
                    break;
                }
            };
            shared.begin(live.returns);
            let end = self.feed(&live).await;
            shared.lose();
            match end {
                End::Done => break,
                End::Lost => {}
                End::Refused(error) if error::is_final(error.kind()) => {
                    shared.fail(&error);
                    break;
                }
                End::Refused(error) => {
                    tracing::warn!(queue = %shared.queue, %error, "a poll was refused, trying again");
                    tokio::select! {
                        () = sleep(PAUSE) => {}
                        () = closing(&shared) => break,
                    }
                }
            }
        }
        shared.seal(&error::closed("receive"));
        self.stage.send_replace(Stage::Ended);
    }

    /// Works over one stream until it ends.
    async fn feed(&mut self, live: &Live) -> End {
        let shared = Arc::clone(&self.shared);
        let (requests, receiver) = mpsc::channel(REQUESTS);
        let mut client = live.client.clone();
        let opening = async move { client.queues_downstream(ReceiverStream::new(receiver)).await }.fuse();
        tokio::pin!(opening);
        let mut answers: Option<Streaming<QueuesDownstreamResponse>> = None;
        let mut outgoing = VecDeque::new();
        let mut number = 0_u64;
        // The poll that is on its way, and when it must have been answered.
        let mut poll: Option<(String, Instant)> = None;
        // When there may be another one after one that was refused.
        let mut again: Option<Instant> = None;
        // The settlements that the broker has when it answers this.
        let mut barrier: Option<(String, usize)> = None;
        let mut unconfirmed = 0;
        // Something was written since the last barrier.
        let mut written = false;
        // What goes back unhandled returns to its place with the end of the stream, when all else is settled by then.
        let mut kept_until: Option<Instant> = None;
        loop {
            let ending = shared.is_closing();
            if ending && kept_until.is_none() {
                kept_until = Some(Instant::now() + KEPT);
            }
            for order in shared.orders() {
                unconfirmed += order.sequences.len();
                outgoing.push_back(self.request(order));
            }
            written |= unconfirmed > 0;
            if ending {
                if outgoing.is_empty() && written && barrier.is_none() {
                    written = false;
                    number += 1;
                    let id = format!("barrier {number}");
                    outgoing.push_back(self.status(&id));
                    barrier = Some((id, std::mem::take(&mut unconfirmed)));
                }
                if shared.is_told() && !written && barrier.is_none() {
                    if shared.is_settled() {
                        // Told, not left to the end of the stream: whoever reads next finds them in their places.
                        outgoing.extend(shared.give_back().into_iter().map(|order| self.request(order)));
                        if outgoing.is_empty() {
                            return End::Done;
                        }
                        written = true;
                    }
                    self.stage.send_if_modified(|stage| {
                        *stage < Stage::Returned && {
                            *stage = Stage::Returned;
                            true
                        }
                    });
                }
            } else {
                if outgoing.is_empty() && unconfirmed > 0 {
                    shared.taken_are_told(std::mem::take(&mut unconfirmed));
                }
                if poll.is_none()
                    && again.is_none()
                    && let Some(room) = shared.room()
                {
                    number += 1;
                    let id = number.to_string();
                    outgoing.push_back(self.get(&id, room));
                    poll = Some((id, Instant::now() + self.link.config.poll_wait + self.link.config.request_timeout));
                    // One that comes late would make a queue anew that is deleted after the end of this.
                    written = true;
                }
            }
            let deadline = poll.as_ref().map_or_else(Instant::now, |(_, deadline)| *deadline);
            tokio::select! {
                // Some servers answer the opening with the first answer only.
                opened = &mut opening, if answers.is_none() => match opened {
                    Ok(opened) => answers = Some(opened.into_inner()),
                    Err(status) => return self.ended(live, native("receive", Effect::Idempotent, status)),
                },
                answer = next(&mut answers) => match answer {
                    Some(Ok(answer)) => {
                        self.link.answered();
                        if poll.as_ref().is_some_and(|(id, _)| *id == answer.ref_request_id) {
                            poll = None;
                            if answer.is_error {
                                let error = error::refused("receive", &answer.error);
                                // A new token needs a new stream. For anything else this one stays, and what it holds with it.
                                if error::is_final(error.kind()) || error.kind() == ErrorKind::Unauthenticated {
                                    return End::Refused(error);
                                }
                                tracing::warn!(queue = %shared.queue, %error, "a poll was refused, trying again");
                                again = Some(Instant::now() + PAUSE);
                            }
                            outgoing.extend(self.arrived(answer));
                        } else if let Some((_, told)) = barrier.take_if(|(id, _)| *id == answer.ref_request_id) {
                            shared.taken_are_told(told);
                        } else if answer.is_error {
                            tracing::warn!(queue = %shared.queue, error = answer.error, "a settlement was refused; the message comes again");
                        }
                    }
                    Some(Err(status)) => return self.ended(live, native("receive", Effect::Idempotent, status)),
                    None => return self.ended(live, error::disconnected("receive", "the broker ended the stream")),
                },
                permit = requests.reserve(), if !outgoing.is_empty() => match (permit, outgoing.pop_front()) {
                    (Ok(permit), Some(request)) => permit.send(request),
                    // The stream's own end says why.
                    _ => sleep(Duration::from_millis(1)).await,
                },
                () = shared.work.notified() => {}
                () = sleep_until(again.unwrap_or(deadline)), if again.is_some() => again = None,
                () = sleep_until(deadline), if poll.is_some() => {
                    return self.ended(live, error::disconnected("receive", "the broker did not answer in time"));
                }
                () = sleep_until(kept_until.unwrap_or(deadline)), if kept_until.is_some() => {
                    kept_until = Some(Instant::now() + KEPT);
                    shared.return_kept();
                }
                () = self.link.over(live) => return End::Lost,
            }
        }
    }

    fn ended(&self, live: &Live, error: Error) -> End {
        self.link.failed(live, &error);
        if error::is_of_connection(error.kind()) { End::Lost } else { End::Refused(error) }
    }

    fn get(&self, id: &str, (count, bytes): (usize, usize)) -> QueuesDownstreamRequest {
        let items = count.min(bytes.min(POLL_BYTES) / self.largest.max(1)).max(1);
        QueuesDownstreamRequest {
            request_id: id.to_owned(),
            client_id: self.shared.client_id.to_string(),
            request_type_data: Kind::Get.into(),
            channel: self.shared.queue.to_string(),
            max_items: i32::try_from(items.min(1024)).unwrap_or(i32::MAX),
            wait_timeout: i32::try_from(self.link.config.poll_wait.as_millis()).unwrap_or(i32::MAX),
            ..QueuesDownstreamRequest::default()
        }
    }

    fn request(&self, order: Order) -> QueuesDownstreamRequest {
        let kind = match order.verb {
            Verb::Ack => Kind::AckRange,
            Verb::Nack => Kind::NAckRange,
            Verb::Requeue => Kind::ReQueueRange,
            Verb::Close | Verb::Return => Kind::CloseByClient,
        };
        let target = if order.verb == Verb::Requeue { self.shared.queue.to_string() } else { String::new() };
        QueuesDownstreamRequest {
            request_id: "settle".to_owned(),
            client_id: self.shared.client_id.to_string(),
            request_type_data: kind.into(),
            channel: self.shared.queue.to_string(),
            re_queue_channel: target,
            sequence_range: if order.verb == Verb::Close { Vec::new() } else { order.sequences },
            ref_transaction_id: order.transaction.to_string(),
            ..QueuesDownstreamRequest::default()
        }
    }

    /// A request that is answered whatever it finds, after everything before it was done.
    fn status(&self, id: &str) -> QueuesDownstreamRequest {
        QueuesDownstreamRequest {
            request_id: id.to_owned(),
            client_id: self.shared.client_id.to_string(),
            request_type_data: Kind::TransactionStatus.into(),
            channel: self.shared.queue.to_string(),
            ref_transaction_id: id.to_owned(),
            ..QueuesDownstreamRequest::default()
        }
    }

    /// What a poll has brought; the request that gives it back when nobody reads any more.
    fn arrived(&mut self, answer: QueuesDownstreamResponse) -> Option<QueuesDownstreamRequest> {
        if answer.messages.is_empty() {
            return None;
        }
        let transaction: Arc<str> = answer.transaction_id.into();
        let largest = answer.messages.iter().map(|message| message.body.len() + message.metadata.len() + 1024).max();
        self.largest = largest.unwrap_or(self.largest);
        let messages = answer.messages.into_iter().map(|message| read(message, &transaction)).collect();
        let taken = self.shared.arrive(messages);
        (!taken).then(|| self.request(Order { verb: Verb::Close, transaction, sequences: Vec::new() }))
    }
}

/// The next answer of a stream that may not be open yet.
async fn next<T>(answers: &mut Option<Streaming<T>>) -> Option<std::result::Result<T, tonic::Status>> {
    match answers {
        Some(answers) => answers.next().await,
        None => std::future::pending().await,
    }
}

async fn closing(shared: &Shared) {
    while !shared.is_closing() {
        shared.work.notified().await;
    }
}
