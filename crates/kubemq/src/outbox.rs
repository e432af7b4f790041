//! Sends over one long stream a connection: what was handed over, and the task that sends it.
//!
//! A request starts as soon as there is something to send and few are on their way; further ones start beside them only for
//! large batches. So a lone message never waits for company, and a flood fills its batches by itself. Without any timer.

mod kinds;
mod stream;

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use polymq_core::{Completer, Error, MessageId, Receipt, Result};
use tokio::{sync::Notify, time::timeout};

pub(crate) use self::kinds::{Kind, ToQueues, ToTopics};
use crate::{error, link::Link};

/// Messages and bytes of one request.
const BATCH: (usize, usize) = (128, 1 << 20);
/// Requests without an answer, at most.
const REQUESTS: usize = 8;
/// From how many messages on a request starts beside others.
const ENOUGH: usize = 32;
/// How many messages may wait before those are looked for that were withdrawn.
const SWEEP_FROM: usize = 1024;
/// How often they are looked for while somebody waits for a flush.
const SWEEP_EVERY: Duration = Duration::from_millis(500);

/// Who hears of the outcome.
pub(crate) enum Answer {
    Receipt(MessageId, Completer<Receipt>),
    Done(Completer<()>),
    Then(Box<dyn FnOnce(Result<()>) + Send>),
}

impl Answer {
    /// `false`: it was withdrawn.
    fn hand_over(&self) -> bool {
        match self {
            Self::Receipt(_, completer) => completer.hand_over(),
            Self::Done(completer) => completer.hand_over(),
            Self::Then(_) => true,
        }
    }

    fn is_withdrawn(&self) -> bool {
        match self {
            Self::Receipt(_, completer) => completer.is_abandoned(),
            Self::Done(completer) => completer.is_abandoned(),
            Self::Then(_) => false,
        }
    }

    fn give(self, result: Result<()>) {
        match self {
            Self::Receipt(id, completer) => completer.complete(result.map(|()| Receipt { id, broker_id: None })),
            Self::Done(completer) => completer.complete(result),
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
    sweep_at: usize,
    closing: bool,
}

impl<I> State<I> {
    /// Drops what was withdrawn, which is its answer, so that an outage of an hour does not hold an hour of messages.
    fn sweep(&mut self) {
        let open = &mut self.open;
        self.waiting.retain(|entry| {
            let stays = !entry.answer.is_withdrawn();
            if !stays {
                open.remove(&entry.number);
            }
            stays
        });
        self.sweep_at = (self.waiting.len() * 2).max(SWEEP_FROM);
    }
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

impl<K: Kind> Outbox<K> {
    pub(crate) fn start(link: Arc<Link>) -> Arc<Self> {
        let state =
            State { waiting: VecDeque::new(), open: BTreeSet::new(), last: 0, sweep_at: SWEEP_FROM, closing: false };
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
            return answer.give(Err(self.link.ended("send")));
        }
        state.last += 1;
        let number = state.last;
        state.open.insert(number);
        state.waiting.push_back(Entry { number, item, answer });
        if state.waiting.len() >= state.sweep_at {
            state.sweep();
        }
        let wake = state.waiting.len() == 1 || state.waiting.len().is_multiple_of(ENOUGH);
        drop(state);
        if wake {
            self.work.notify_one();
        }
    }

    /// Hands a message over at once; the future waits for the answer, and can be withdrawn until a request takes it.
    pub(crate) fn hand_over(&self, item: K::Item) -> polymq_core::Completion<()> {
        let (completer, completion) = polymq_core::Completion::queued();
        self.push(item, Answer::Done(completer));
        completion
    }

    /// Sends a message and waits for the answer.
    pub(crate) async fn send(&self, item: K::Item) -> Result<()> {
        self.hand_over(item).await
    }

    /// Waits until everything before has been answered, or withdrawn.
    pub(crate) async fn flush(&self) {
        let last = self.lock().last;
        let mut sweep = true;
        loop {
            let answered = self.answered.notified();
            tokio::pin!(answered);
            // Registered before looking, or an answer in between would be missed.
            answered.as_mut().enable();
            {
                let mut state = self.lock();
                if sweep {
                    state.sweep();
                }
                if state.open.first().is_none_or(|first| *first > last) {
                    return;
                }
            }
            // Nobody tells of what is withdrawn while nothing is sent.
            sweep = timeout(SWEEP_EVERY, answered).await.is_err();
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
}
