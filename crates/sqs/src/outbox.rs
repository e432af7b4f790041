//! Sends in batches of ten: what a producer has handed over, and the task that sends it.
//!
//! A request starts as soon as there is something to send and none is on its way; further ones start beside it only for
//! whole batches. So a lone message never waits for company, and a flood fills its batches by itself. Without any timer.

use std::{
    collections::{BTreeSet, VecDeque},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{StreamExt, future::Either, stream::FuturesUnordered};
use polymq_core::{Completer, Error, ErrorKind, MessageId, Receipt, Result};
use tokio::{
    sync::{Notify, OnceCell},
    time::timeout,
};

use crate::{
    backend::BATCH,
    clients::Live,
    convert::Wire,
    error::{self, Effect},
    link::Link,
    names::Name,
    sends, topology,
};

/// Waits between attempts to send what the service was too busy for.
const BUSY_FIRST: Duration = Duration::from_millis(100);
const BUSY_MOST: Duration = Duration::from_secs(5);

/// How many messages may wait before withdrawn ones are looked for among them.
const SWEEP_FROM: usize = 1024;
/// How often they are looked for while somebody waits for a flush, or a batch for the service.
const SWEEP_EVERY: Duration = Duration::from_millis(500);

/// Where messages go.
#[derive(Debug)]
pub(crate) enum Target {
    Queue(Name),
    Topic(Name),
}

/// One message to be sent.
#[derive(Debug)]
pub(crate) struct Letter {
    pub(crate) id: MessageId,
    pub(crate) wire: Wire,
    /// By a clock that is not set: the delay that SQS is told is what is left of it.
    pub(crate) deliver_at: Option<Instant>,
    /// Group and deduplication id of a FIFO channel.
    pub(crate) fifo: Option<(String, String)>,
    pub(crate) subject: Option<Arc<str>>,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    letter: Letter,
    completer: Completer<Receipt>,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Entry>,
    /// Numbers of messages without an answer.
    open: BTreeSet<u64>,
    last: u64,
    closing: bool,
    /// How many may wait before the next sweep, beyond [`SWEEP_FROM`].
    sweep_at: usize,
}

impl State {
    /// Drops what was withdrawn, so that an outage of an hour does not hold an hour of messages.
    fn sweep(&mut self) {
        let open = &mut self.open;
        self.waiting.retain(|entry| {
            let withdrawn = entry.completer.is_abandoned();
            if withdrawn {
                open.remove(&entry.number);
            }
            !withdrawn
        });
        self.sweep_at = self.waiting.len() * 2;
    }
}

/// What a producer and its task share.
#[derive(Debug)]
pub(crate) struct Outbox {
    link: Arc<Link>,
    target: Target,
    declare: bool,
    max_batch: usize,
    slots: usize,
    /// The queue's URL or the topic's ARN.
    place: OnceCell<Arc<str>>,
    /// The place that was found again after the first one was gone.
    moved: Mutex<Option<Arc<str>>>,
    state: Mutex<State>,
    work: Notify,
    answered: Notify,
}

impl Outbox {
    pub(crate) fn start(link: Arc<Link>, target: Target, declare: bool, max_batch: usize) -> Arc<Self> {
        // Requests that overtake each other would break the order of a group.
        let (Target::Queue(name) | Target::Topic(name)) = &target;
        let slots = if name.fifo { 1 } else { link.config.requests };
        let outbox = Arc::new(Self {
            target,
            declare,
            max_batch,
            slots,
            place: OnceCell::new(),
            moved: Mutex::default(),
            state: Mutex::default(),
            work: Notify::new(),
            answered: Notify::new(),
            link: Arc::clone(&link),
        });
        link.spawn(run(Arc::clone(&outbox)));
        outbox
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn push(&self, letter: Letter, completer: Completer<Receipt>) {
        let mut state = self.lock();
        if state.closing {
            drop(state);
            return completer.complete(Err(error::closed("send")));
        }
        state.last += 1;
        let number = state.last;
        state.open.insert(number);
        state.waiting.push_back(Entry { number, letter, completer });
        if state.waiting.len() >= state.sweep_at.max(SWEEP_FROM) {
            state.sweep();
        }
        let wake = state.waiting.len() == 1 || state.waiting.len().is_multiple_of(BATCH);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    /// Waits until everything before has been answered or withdrawn.
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
            // Nobody tells of a message that is withdrawn.
            if timeout(SWEEP_EVERY, answered).await.is_err() {
                self.lock().sweep();
            }
        }
    }

    /// The task ends when everything is answered.
    pub(crate) fn close(&self) {
        self.lock().closing = true;
        self.work.notify_one();
    }

    fn answer(&self, entry: Entry, result: Result<Receipt>) {
        entry.completer.complete(result);
        self.lock().open.remove(&entry.number);
        self.answered.notify_waiters();
    }

    /// The next batch, if a request may start.
    fn next(&self, running: usize) -> Option<Vec<Entry>> {
        let mut state = self.lock();
        let enough = if running == 0 { 1 } else { BATCH };
        if running >= self.slots || state.waiting.len() < enough {
            return None;
        }
        let (mut batch, mut size) = (Vec::with_capacity(BATCH), 0);
        while batch.len() < BATCH
            && let Some(entry) = state.waiting.front()
        {
            size += entry.letter.wire.size();
            if size > self.max_batch && !batch.is_empty() {
                break;
            }
            batch.extend(state.waiting.pop_front());
        }
        Some(batch)
    }

    fn is_finished(&self) -> bool {
        let state = self.lock();
        state.closing && state.waiting.is_empty()
    }

    /// Finds or makes the queue or topic.
    pub(crate) async fn ensure(&self, live: &Live) -> Result<Arc<str>> {
        let found = self.place.get_or_try_init(|| self.locate(live)).await?;
        let moved = self.moved.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(moved.unwrap_or_else(|| Arc::clone(found)))
    }

    async fn locate(&self, live: &Live) -> Result<Arc<str>> {
        let locating = async {
            match &self.target {
                Target::Queue(name) => topology::ensure_queue(live, name, self.declare, &[]).await,
                Target::Topic(name) => topology::ensure_topic(live, name, self.declare).await,
            }
        };
        self.call(live, "declare", Effect::Idempotent, self.link.config.connect_timeout, locating).await
    }

    /// Asks the service that the target belongs to.
    fn call<T>(
        &self,
        live: &Live,
        operation: &'static str,
        effect: Effect,
        limit: Duration,
        request: impl Future<Output = Result<T>>,
    ) -> impl Future<Output = Result<T>> {
        match &self.target {
            Target::Queue(_) => Either::Left(self.link.call(live, operation, effect, limit, request)),
            Target::Topic(_) => Either::Right(self.link.call_with_sns(live, operation, effect, limit, request)),
        }
    }

    /// Sends a batch; every entry is answered.
    async fn send(&self, mut batch: Vec<Entry>) {
        let mut pause = BUSY_FIRST;
        let mut declared_again = false;
        let mut renewed = false;
        loop {
            let (withdrawn, rest) = batch.into_iter().partition(|entry| entry.completer.is_abandoned());
            self.forget(withdrawn);
            batch = rest;
            if batch.is_empty() {
                return;
            }
            let live = match timeout(SWEEP_EVERY, self.link.live()).await {
                Ok(Ok(live)) => live,
                Ok(Err(error)) => return self.fail(batch, &error),
                Err(_) => continue,
            };
            let place = match self.ensure(&live).await {
                Ok(place) => place,
                Err(error) if error.kind() == ErrorKind::Disconnected => {
                    self.wait_for_sns(&error, &mut pause).await;
                    continue;
                }
                Err(error) if !renewed && self.may_renew(&error) => {
                    renewed = true;
                    continue;
                }
                Err(error) => return self.fail(batch, &error),
            };
            let (now, withdrawn): (Vec<_>, Vec<_>) = batch.into_iter().partition(|entry| entry.completer.hand_over());
            self.forget(withdrawn);
            if now.is_empty() {
                return;
            }
            let request = self.request(&live, &place, &now);
            let sent = self.call(&live, "send", Effect::Once, self.link.config.request_timeout, request).await;
            match sent {
                Ok(results) => {
                    batch = self.answer_all(now, results);
                    if !batch.is_empty() {
                        rest_a_while(&mut pause).await;
                    }
                }
                // Nothing of it had an effect: these wait until it goes on, or until they are withdrawn.
                Err(error) if matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::Busy) => {
                    now.iter().for_each(|entry| entry.completer.take_back());
                    batch = now;
                    if error.kind() == ErrorKind::Busy {
                        tracing::debug!(%error, ?pause, "the service is busy");
                        rest_a_while(&mut pause).await;
                    } else {
                        self.wait_for_sns(&error, &mut pause).await;
                    }
                }
                // The credentials have expired: once more with those that are found next.
                Err(error) if !renewed && self.may_renew(&error) => {
                    renewed = true;
                    now.iter().for_each(|entry| entry.completer.take_back());
                    batch = now;
                }
                // A topic that is made again has none of its groups, and what is sent to it would be lost.
                Err(error) if error.kind() == ErrorKind::NotFound && matches!(self.target, Target::Topic(_)) => {
                    let hint = "its groups went with it: declare them again, or start their consumers anew";
                    return self.fail(now, &error::copy(&error).with_hint(hint));
                }
                Err(error) if error.kind() == ErrorKind::NotFound && self.declare && !declared_again => {
                    declared_again = true;
                    now.iter().for_each(|entry| entry.completer.take_back());
                    batch = now;
                    match self.locate(&live).await {
                        Ok(place) => *self.moved.lock().unwrap_or_else(PoisonError::into_inner) = Some(place),
                        Err(error) => return self.fail(batch, &error),
                    }
                }
                Err(error) => return self.fail(now, &error),
            }
        }
    }

    /// Answers what the service has taken or refused for good. What it was too busy for had no effect and is returned, to be
    /// sent again; but not behind a later one of its group.
    fn answer_all(&self, batch: Vec<Entry>, results: Vec<Result<Box<str>>>) -> Vec<Entry> {
        let (mut again, mut passed) = (Vec::new(), BTreeSet::new());
        for (entry, result) in batch.into_iter().zip(results).rev() {
            let group = entry.letter.fifo.as_ref().map(|(group, _)| group);
            if result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy)
                && group.is_none_or(|group| !passed.contains(group))
            {
                entry.completer.take_back();
                again.push(entry);
                continue;
            }
            passed.extend(group.cloned());
            let receipt = result.map(|id| Receipt { id: entry.letter.id.clone(), broker_id: Some(id) });
            self.answer(entry, receipt);
        }
        again.reverse();
        again
    }

    /// A lost SQS is waited for by everybody; SNS is not watched, and is asked again after a pause.
    async fn wait_for_sns(&self, error: &Error, pause: &mut Duration) {
        if let Target::Topic(name) = &self.target {
            tracing::warn!(topic = name.text, %error, "SNS cannot be reached, trying again");
            rest_a_while(pause).await;
        }
    }

    /// Whether the credentials have expired, and others may be found.
    fn may_renew(&self, error: &Error) -> bool {
        error.kind() == ErrorKind::Unauthenticated && self.link.config.may_renew()
    }

    fn fail(&self, batch: Vec<Entry>, error: &Error) {
        batch.into_iter().for_each(|entry| self.answer(entry, Err(error::copy(error).with_operation("send"))));
    }

    fn forget(&self, withdrawn: Vec<Entry>) {
        withdrawn.into_iter().for_each(|entry| self.answer(entry, Err(error::closed("send"))));
    }

    /// One request; the broker's id, or the error, of each entry.
    async fn request(&self, live: &Live, place: &str, batch: &[Entry]) -> Result<Vec<Result<Box<str>>>> {
        let letters = batch.iter().map(|entry| &entry.letter);
        match &self.target {
            Target::Queue(_) => sends::to_queue(live, place, letters).await,
            Target::Topic(_) => sends::to_topic(live, place, letters).await,
        }
    }
}

async fn rest_a_while(pause: &mut Duration) {
    tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
    *pause = (*pause * 2).min(BUSY_MOST);
}

async fn run(outbox: Arc<Outbox>) {
    let mut requests = FuturesUnordered::new();
    loop {
        while let Some(batch) = outbox.next(requests.len()) {
            requests.push(outbox.send(batch));
        }
        if requests.is_empty() && outbox.is_finished() {
            return;
        }
        tokio::select! {
            Some(()) = requests.next(), if !requests.is_empty() => {}
            // Whoever sends many at once has the time to hand over the rest of them.
            () = outbox.work.notified() => tokio::task::yield_now().await,
        }
    }
}
