//! Sends over one long stream a connection: what was handed over, and the task that sends it.
//!
//! A request starts as soon as there is something to send and few are on their way; further ones start beside them only for
//! large batches. So a lone message never waits for company, and a flood fills its batches by itself. Without any timer.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use futures_util::{FutureExt, StreamExt};
use polymq_core::{Completer, Error, MessageId, Receipt, Result};
use polymq_kubemq_proto::{
    Event, QueueMessage, QueuesUpstreamRequest, QueuesUpstreamResponse, Result as Sent, SendQueueMessageResult,
};
use tokio::{
    sync::{Notify, mpsc},
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use crate::{
    error::{self, Effect},
    link::{Link, Live},
    transport::Client,
};

/// Messages and bytes of one request.
const BATCH: (usize, usize) = (128, 1 << 20);
/// Requests without an answer, at most.
const REQUESTS: usize = 8;
/// From how many messages on a request starts beside others.
const ENOUGH: usize = 32;

/// How one kind of message is sent and answered.
#[async_trait]
pub(crate) trait Kind: Send + Sync + 'static {
    type Item: Send + Sync + 'static;
    type Request: Send + 'static;
    type Response: Send + 'static;
    /// Whether a good message is answered.
    const ANSWERS: bool;

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

/// Who hears of the outcome.
pub(crate) enum Answer {
    Receipt(MessageId, Completer<Receipt>),
    Then(Box<dyn FnOnce(Result<()>) + Send>),
}

impl Answer {
    /// `false`: it was withdrawn.
    fn hand_over(&self) -> bool {
        match self {
            Self::Receipt(_, completer) => completer.hand_over(),
            Self::Then(_) => true,
        }
    }

    fn give(self, result: Result<()>) {
        match self {
            Self::Receipt(id, completer) => completer.complete(result.map(|()| Receipt { id, broker_id: None })),
            Self::Then(then) => then(result),
        }
    }
}

struct Entry<I> {
    number: u64,
    item: I,
    answer: Answer,
}

struct State<I> {
    waiting: VecDeque<Entry<I>>,
    /// Numbers of messages without an answer.
    open: BTreeSet<u64>,
    last: u64,
    closing: bool,
}

/// What producers and the task share.
pub(crate) struct Outbox<K: Kind> {
    link: Arc<Link>,
    state: Mutex<State<K::Item>>,
    work: Notify,
    answered: Notify,
}

impl<K: Kind> std::fmt::Debug for Outbox<K> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Outbox")
    }
}

type Flight = BTreeMap<u64, VecDeque<(u64, Answer)>>;

impl<K: Kind> Outbox<K> {
    pub(crate) fn start(link: Arc<Link>) -> Arc<Self> {
        let state = State { waiting: VecDeque::new(), open: BTreeSet::new(), last: 0, closing: false };
        let outbox = Arc::new(Self {
            link: Arc::clone(&link),
            state: Mutex::new(state),
            work: Notify::new(),
            answered: Notify::new(),
        });
        link.spawn(Arc::clone(&outbox).run());
        outbox
    }

    fn lock(&self) -> MutexGuard<'_, State<K::Item>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands a message over; messages leave in the order of these calls.
    pub(crate) fn push(&self, item: K::Item, answer: Answer) {
        let mut state = self.lock();
        if state.closing {
            drop(state);
            return answer.give(Err(error::closed("send")));
        }
        state.last += 1;
        let number = state.last;
        state.open.insert(number);
        state.waiting.push_back(Entry { number, item, answer });
        let wake = state.waiting.len() == 1 || state.waiting.len().is_multiple_of(ENOUGH);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    /// Hands a message over at once; the future waits for the answer.
    pub(crate) fn hand_over(&self, item: K::Item) -> polymq_core::Completion<()> {
        let (completer, completion) = polymq_core::Completion::queued();
        self.push(item, Answer::Then(Box::new(move |result| completer.complete(result))));
        completion
    }

    /// Sends a message and waits for the answer.
    pub(crate) async fn send(&self, item: K::Item) -> Result<()> {
        self.hand_over(item).await
    }

    /// Waits until everything before has been answered.
    pub(crate) async fn flush(&self) {
        let last = self.lock().last;
        loop {
            let answered = self.answered.notified();
            tokio::pin!(answered);
            // Registered before looking, or an answer in between would be missed.
            answered.as_mut().enable();
            if self.lock().open.first().is_none_or(|first| *first > last) {
                return;
            }
            answered.await;
        }
    }

    /// Takes nothing any more; the task ends when everything is answered, or the link is closed.
    pub(crate) fn close(&self) {
        self.lock().closing = true;
        self.work.notify_one();
    }

    fn answer(&self, number: u64, answer: Answer, result: Result<()>) {
        answer.give(result);
        self.lock().open.remove(&number);
        self.answered.notify_waiters();
    }

    fn is_finished(&self) -> bool {
        let state = self.lock();
        state.closing && state.waiting.is_empty()
    }

    /// Whether a request may start beside so many others.
    fn may_send(&self, running: usize) -> bool {
        let waiting = self.lock().waiting.len();
        running < REQUESTS && waiting >= if running < 2 || !K::ANSWERS { 1 } else { ENOUGH }
    }

    /// The next batch; what was withdrawn is left out.
    fn take(&self) -> (Vec<K::Item>, VecDeque<(u64, Answer)>) {
        let mut state = self.lock();
        let (mut items, mut answers, mut size) = (Vec::new(), VecDeque::new(), 0);
        let most = if K::ANSWERS { BATCH.0 } else { 1 };
        while items.len() < most
            && let Some(entry) = state.waiting.front()
        {
            size += K::size(&entry.item);
            if size > BATCH.1 && !items.is_empty() {
                break;
            }
            let Some(Entry { number, item, answer }) = state.waiting.pop_front() else { break };
            if answer.hand_over() {
                items.push(item);
                answers.push_back((number, answer));
            } else {
                // Nobody waits for it; to drop it is the answer.
                state.open.remove(&number);
            }
        }
        (items, answers)
    }

    fn fail_waiting(&self, error: &Error) {
        let waiting = std::mem::take(&mut self.lock().waiting);
        for Entry { number, answer, .. } in waiting {
            self.answer(number, answer, Err(error::copy(error).with_operation("send")));
        }
    }

    async fn run(self: Arc<Self>) {
        loop {
            while !self.may_send(0) && !self.is_finished() {
                tokio::select! {
                    () = self.work.notified() => {}
                    () = self.link.closed() => break,
                }
            }
            if self.is_finished() {
                return;
            }
            match self.link.live().await {
                Ok(live) => self.stream(&live).await,
                Err(error) => {
                    self.lock().closing = true;
                    return self.fail_waiting(&error);
                }
            }
        }
    }

    /// Sends over one stream until it ends.
    async fn stream(&self, live: &Live) {
        let (requests, receiver) = mpsc::channel(BATCH.0 * REQUESTS);
        let mut client = live.client.clone();
        let opening = async move { K::open(&mut client, ReceiverStream::new(receiver)).await }.fuse();
        tokio::pin!(opening);
        let mut answers: Option<Streaming<K::Response>> = None;
        let mut flight = Flight::new();
        let mut number = 0;
        let mut deadline = Instant::now();
        let limit = self.link.config.request_timeout;
        let reason = loop {
            if flight.is_empty() && self.is_finished() {
                break None;
            }
            tokio::select! {
                // Some servers answer the opening with the first answer only.
                opened = &mut opening, if answers.is_none() => match opened {
                    Ok(opened) => answers = Some(opened.into_inner()),
                    Err(status) => break Some(error::native("send", Effect::Once, status)),
                },
                answer = next(&mut answers) => match answer {
                    Some(Ok(answer)) => {
                        self.link.answered();
                        self.answered(&mut flight, answer);
                        deadline = Instant::now() + limit;
                    }
                    Some(Err(status)) => break Some(error::native("send", Effect::Once, status)),
                    None => break Some(error::lost("send", Effect::Once, "the broker ended the stream")),
                },
                permit = requests.reserve(), if self.may_send(flight.len()) => {
                    let Ok(permit) = permit else {
                        break Some(error::lost("send", Effect::Once, "the stream has ended"));
                    };
                    if flight.is_empty() {
                        deadline = Instant::now() + limit;
                    }
                    let (items, waiting) = self.take();
                    if items.is_empty() {
                        continue;
                    }
                    number += 1;
                    let mut batch = K::requests(number, items).into_iter();
                    if let Some(first) = batch.next() {
                        permit.send(first);
                    }
                    // There is room for all of them: as many as may be on their way.
                    batch.for_each(|request| drop(requests.try_send(request)));
                    if K::ANSWERS {
                        flight.insert(number, waiting);
                    } else {
                        waiting.into_iter().for_each(|(number, answer)| self.answer(number, answer, Ok(())));
                    }
                }
                () = self.work.notified() => {}
                () = sleep_until(deadline), if !flight.is_empty() => {
                    break Some(error::lost("send", Effect::Once, "the broker did not answer in time"));
                }
                () = self.link.over(live) => {
                    break Some(error::lost("send", Effect::Once, &self.link.reason()));
                }
            }
        };
        let Some(error) = reason else { return };
        self.link.failed(live, &error);
        for (number, answer) in flight.into_values().flatten() {
            self.answer(number, answer, Err(error::copy(&error).with_operation("send")));
        }
        if error::is_final(error.kind()) {
            self.fail_waiting(&error);
        }
    }

    fn answered(&self, flight: &mut Flight, response: K::Response) {
        let (number, results) = K::results(response);
        let Some(mut batch) = (match number {
            Some(number) => flight.remove(&number),
            None => flight.pop_first().map(|(number, batch)| {
                if batch.len() > results.len() {
                    // Its other messages are answered one by one.
                    let mut batch = batch;
                    let answered = batch.drain(..results.len()).collect();
                    flight.insert(number, batch);
                    answered
                } else {
                    batch
                }
            }),
        }) else {
            if let Some(Err(error)) = results.into_iter().find(Result::is_err) {
                tracing::warn!(%error, "what was sent without waiting for an answer was refused");
            }
            return;
        };
        for result in results {
            let Some((number, answer)) = batch.pop_front() else { break };
            self.answer(number, answer, result);
        }
        for (number, answer) in batch {
            self.answer(number, answer, Err(error::lost("send", Effect::Once, "the broker said nothing about it")));
        }
    }
}

/// The next answer of a stream that may not be open yet.
async fn next<T>(answers: &mut Option<Streaming<T>>) -> Option<std::result::Result<T, Status>> {
    match answers {
        Some(answers) => answers.next().await,
        None => std::future::pending().await,
    }
}
