//! What one consumer's reader, handlers and background task share: messages that are held, and what is to be told SQS
//! about them.

mod held;
mod leases;

pub(crate) use held::{Change, Copied, Delete, Held, Purpose};

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use polymq_core::{Error, ErrorKind, Incoming, Result, Token};
use tokio::{sync::Notify, time::Instant};

use self::held::release;
use crate::{NAME, backend::BATCH, error, producer::CLOSE_TIMEOUT};

#[derive(Debug, Default)]
struct State {
    held: HashMap<Token, Held>,
    /// Those of them, by SQS's id.
    loans: HashMap<Arc<str>, Token>,
    buffer: VecDeque<Incoming>,
    bytes: usize,
    last: u64,
    /// Messages that polls on their way may bring.
    reserved: usize,
    /// Somebody waits for messages and there are none.
    starving: bool,
    deletes: VecDeque<Delete>,
    changes: VecDeque<Change>,
    /// Receipts whose extension is on its way: what is told about them next must not be overtaken by it.
    extending: HashSet<Arc<str>>,
    copies: VecDeque<Copied>,
    /// Messages that were claimed and are not among these yet, and requests about them that are on their way.
    untold: usize,
    closing: bool,
    /// When closing began.
    closing_since: Option<Instant>,
    /// Nobody can settle any more.
    abandoned: bool,
    /// Why reading is over.
    end: Option<Error>,
    /// Headers of messages that were returned as they are, by SQS's id.
    notes: HashMap<Arc<str>, Vec<(String, String)>>,
}

/// The most messages whose notes are kept; more are forgotten, which costs the first error of a dead letter.
const MAX_NOTES: usize = 10_000;

/// Shared by a consumer, its settler and its task.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Something arrived, or reading is over.
    pub(crate) arrived: Notify,
    /// The task has something to do.
    pub(crate) work: Notify,
    /// Something was told.
    told: Notify,
    prefetch: usize,
    prefetch_bytes: usize,
    lease: Duration,
    lease_cap: Duration,
    pub(crate) fifo: bool,
    /// SQS itself counts what is too often.
    redrive: bool,
    pub(crate) max_message: usize,
}

impl Shared {
    pub(crate) fn new(
        (prefetch, prefetch_bytes): (usize, usize),
        (lease, lease_cap): (Duration, Duration),
        fifo: bool,
        redrive: bool,
        max_message: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            arrived: Notify::new(),
            work: Notify::new(),
            told: Notify::new(),
            prefetch,
            prefetch_bytes,
            lease,
            lease_cap,
            fifo,
            redrive,
            max_message,
        })
    }

    /// Whether a message is only returned as it is: a copy would lose its place before others of its key, SQS's count, or what
    /// was not read of it.
    pub(crate) fn keeps_place(&self, held: &Held) -> bool {
        self.redrive || held.lossy || (self.fifo && !held.alone)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many messages the next poll may ask for.
    pub(crate) fn reserve(&self) -> Option<usize> {
        let mut state = self.lock();
        let free = self.prefetch.saturating_sub(state.held.len() + state.reserved);
        // A poll for one message costs as much as one for ten: while nobody has to wait for it, it can wait too.
        let enough = if state.starving { 1 } else { (self.prefetch / 4).clamp(1, BATCH) };
        if state.closing || state.end.is_some() || free < enough || state.bytes >= self.prefetch_bytes {
            return None;
        }
        let count = free.min(BATCH);
        state.reserved += count;
        Some(count)
    }

    /// What a poll has brought for its reservation; what came too late is to be returned.
    pub(crate) fn arrive(&self, reserved: usize, messages: Vec<(Incoming, Held)>) {
        let mut state = self.lock();
        state.reserved = state.reserved.saturating_sub(reserved);
        state.starving &= messages.is_empty();
        for (mut incoming, held) in messages {
            state.last += 1;
            incoming.token = Token(state.last);
            if let Some(notes) = state.notes.remove(&held.native_id) {
                notes.into_iter().for_each(|(name, value)| incoming.message.add_wire_header(name, value));
            }
            state.lend(incoming.token, held);
            state.buffer.push_back(incoming);
        }
        drop(state);
        self.arrived.notify_one();
    }

    /// Up to `max` messages; `None` when there is none yet.
    pub(crate) fn take(&self, max: usize, into: &mut Vec<Incoming>) -> Option<Result<()>> {
        let mut state = self.lock();
        if let Some(error) = &state.end {
            return Some(Err(error::copy(error).with_operation("receive")));
        }
        if state.closing {
            return Some(Err(error::closed("receive")));
        }
        if state.buffer.is_empty() {
            let poll = !std::mem::replace(&mut state.starving, true);
            drop(state);
            if poll {
                self.work.notify_one();
            }
            return None;
        }
        let count = max.max(1).min(state.buffer.len());
        into.extend(state.buffer.drain(..count));
        let poll = state.buffer.len() < self.prefetch / 2;
        drop(state);
        if poll {
            self.work.notify_one();
        }
        Some(Ok(()))
    }

    /// Reading is over for good.
    pub(crate) fn fail(&self, error: &Error) {
        self.lock().end.get_or_insert_with(|| error::copy(error));
        self.arrived.notify_one();
    }

    /// Asks the task to stop fetching.
    pub(crate) fn start_close(&self) {
        self.lock().close();
        self.arrived.notify_one();
        self.work.notify_one();
    }

    /// When closing has waited for long polls as long as it may.
    pub(crate) fn polls_end(&self) -> Option<Instant> {
        self.lock().closing_since.map(|since| since + CLOSE_TIMEOUT)
    }

    /// Nobody settles any more: everything that is held goes back.
    pub(crate) fn abandon(&self) {
        let mut state = self.lock();
        state.close();
        state.abandoned = true;
        let held: Vec<Held> = state.held.drain().map(|(_, held)| held).collect();
        state.forget_extensions(|_| true);
        state.loans.clear();
        state.buffer.clear();
        state.bytes = 0;
        state.changes.extend(held.into_iter().map(release));
        drop(state);
        self.work.notify_one();
    }

    pub(crate) fn is_closing(&self) -> bool {
        let state = self.lock();
        state.closing || state.end.is_some()
    }

    /// Takes what was fetched and not received, to be returned.
    pub(crate) fn unread(&self) -> Vec<Incoming> {
        self.lock().buffer.drain(..).collect()
    }

    /// Waits until everything that was settled is told.
    pub(crate) async fn all_told(&self) {
        loop {
            let told = self.told.notified();
            tokio::pin!(told);
            // Registered before looking, or what is told in between would be missed.
            told.as_mut().enable();
            if self.lock().is_told() {
                return;
            }
            told.await;
        }
    }

    /// Nothing waits to be told.
    pub(crate) fn is_told(&self) -> bool {
        self.lock().is_told()
    }

    /// Nothing is left to settle or to tell.
    pub(crate) fn is_finished(&self) -> bool {
        let state = self.lock();
        state.is_told() && state.held.is_empty()
    }

    /// A request of [`next_deletes`](Self::next_deletes) and the like is over.
    pub(crate) fn request_is_over(&self) {
        let mut state = self.lock();
        state.untold = state.untold.saturating_sub(1);
        drop(state);
        self.told.notify_waiters();
    }

    /// The task has ended: whoever reads or settles is told so.
    pub(crate) fn seal(&self, error: &Error) {
        let mut state = self.lock();
        let mut rest = std::mem::take(&mut *state);
        *state = State { abandoned: true, closing: true, end: rest.end.take(), ..State::default() };
        state.end.get_or_insert_with(|| error::copy(error));
        drop(state);
        self.arrived.notify_one();
        self.told.notify_waiters();
        // Those who wait for one of these learn that it was not done.
        drop(rest.changes);
        drop(rest.copies);
    }

    /// Takes messages that are ours and unsettled, and gives them up; an error is that of one of them.
    pub(crate) fn acknowledge(&self, tokens: &[Token]) -> Result<()> {
        let mut state = self.lock();
        let mut result = Ok(());
        for token in tokens {
            match state.claim(*token) {
                Ok(Held { receipt, deadline, .. }) => state.deletes.push_back(Delete { receipt, deadline }),
                Err(error) => result = Err(error),
            }
        }
        drop(state);
        self.work.notify_one();
        result
    }

    /// Takes a message that is ours and unsettled, and does with it what `settle` says. It counts as not yet told as long.
    pub(crate) fn settle<T>(&self, token: Token, settle: impl FnOnce(Held) -> T) -> Result<T> {
        let mut state = self.lock();
        let held = state.claim(token)?;
        state.untold += 1;
        drop(state);
        let done = settle(held);
        self.request_is_over();
        self.work.notify_one();
        Ok(done)
    }

    /// Takes a message that nobody has received, to be returned, even when nobody can settle any more: a poll that was on its
    /// way may have brought it after that. It counts as not yet told until [`request_is_over`](Self::request_is_over).
    pub(crate) fn unhold(&self, token: Token) -> Option<Held> {
        let mut state = self.lock();
        let held = state.take_back(token)?;
        state.untold += 1;
        Some(held)
    }

    /// Gives a message back that could not be settled.
    pub(crate) fn unclaim(&self, token: Token, held: Held) {
        let mut state = self.lock();
        if state.abandoned {
            state.changes.push_back(release(held));
        } else if !state.loans.contains_key(&held.native_id) {
            // Not when it has come again meanwhile.
            state.lend(token, held);
        }
    }

    pub(crate) fn delete(&self, held: &Held) {
        self.later(|state| {
            state.deletes.push_back(Delete { receipt: Arc::clone(&held.receipt), deadline: held.deadline });
        });
    }

    pub(crate) fn change(&self, held: &Held, seconds: i32, purpose: Purpose) {
        let (receipt, deadline) = (Arc::clone(&held.receipt), held.deadline);
        self.later(|state| state.changes.push_back(Change { receipt, seconds, deadline, purpose }));
    }

    pub(crate) fn copy(&self, copy: Copied) {
        self.later(|state| state.copies.push_back(copy));
    }

    fn later(&self, add: impl FnOnce(&mut State)) {
        add(&mut self.lock());
        self.work.notify_one();
    }

    /// Puts back what could not be told; it is told again.
    pub(crate) fn again(&self, deletes: Vec<Delete>, changes: Vec<Change>) {
        let now = Instant::now();
        let mut state = self.lock();
        for delete in deletes.into_iter().filter(|delete| delete.deadline > now) {
            state.deletes.push_back(delete);
        }
        for change in changes {
            let mut is_wanted = change.deadline > now;
            if let Purpose::Extend(token, _) = &change.purpose {
                state.extending.remove(&change.receipt);
                // Not when it was settled meanwhile.
                is_wanted &= state.held.contains_key(token);
            }
            if is_wanted {
                state.changes.push_back(change);
            } else {
                change.too_late();
            }
        }
    }

    /// Keeps headers that a message cannot carry while it stays in its queue; this consumer may see it again.
    pub(crate) fn note(&self, held: &Held, headers: Vec<(String, String)>) {
        let mut state = self.lock();
        if state.notes.len() < MAX_NOTES {
            state.notes.insert(Arc::clone(&held.native_id), headers);
        }
    }

    /// The next batches, if requests may start: the first one at once, further ones only when they are full.
    pub(crate) fn next_deletes(&self, running: usize) -> Vec<Delete> {
        let mut state = self.lock();
        let taken = batch(&mut state.deletes, running);
        state.untold += usize::from(!taken.is_empty());
        taken
    }

    /// None for a loan that is over, as after an outage: SQS would take it for a mistake of ours.
    pub(crate) fn next_changes(&self, running: usize) -> Vec<Change> {
        let now = Instant::now();
        let mut state = self.lock();
        if running > 0 && state.changes.len() < BATCH {
            return Vec::new();
        }
        let (mut taken, mut over, mut later) = (Vec::new(), Vec::new(), VecDeque::new());
        while taken.len() < BATCH
            && let Some(change) = state.changes.pop_front()
        {
            if change.deadline <= now {
                over.push(change);
            } else if state.extending.contains(&change.receipt) {
                later.push_back(change);
            } else {
                if matches!(change.purpose, Purpose::Extend(..)) {
                    state.extending.insert(Arc::clone(&change.receipt));
                }
                taken.push(change);
            }
        }
        later.append(&mut state.changes);
        state.changes = later;
        state.untold += usize::from(!taken.is_empty());
        drop(state);
        if !over.is_empty() {
            over.into_iter().for_each(Change::too_late);
            self.told.notify_waiters();
        }
        taken
    }

    /// None whose original SQS shows again meanwhile: there would be two messages.
    pub(crate) fn next_copies(&self, running: usize) -> Vec<Copied> {
        let now = Instant::now();
        let mut state = self.lock();
        if running > 0 && state.copies.len() < BATCH {
            return Vec::new();
        }
        let (mut taken, mut size, mut over) = (Vec::new(), 0, Vec::new());
        while taken.len() < BATCH
            && let Some(copy) = state.copies.pop_front()
        {
            if copy.held.deadline <= now {
                over.push(copy);
                continue;
            }
            size += copy.letter.wire.size();
            if size > self.max_message && !taken.is_empty() {
                state.copies.push_front(copy);
                break;
            }
            taken.push(copy);
        }
        state.untold += usize::from(!taken.is_empty());
        drop(state);
        if !over.is_empty() {
            for (_, answer) in over.into_iter().filter_map(|copy| copy.answer) {
                answer.complete(Err(error::stale()));
            }
            self.told.notify_waiters();
        }
        taken
    }
}

impl State {
    fn is_told(&self) -> bool {
        self.untold == 0 && self.deletes.is_empty() && self.changes.is_empty() && self.copies.is_empty()
    }

    fn close(&mut self) {
        self.closing = true;
        self.closing_since.get_or_insert_with(Instant::now);
    }

    fn claim(&mut self, token: Token) -> Result<Held> {
        if self.abandoned {
            return Err(error::closed("settle"));
        }
        let held = self.take_back(token).ok_or_else(error::stale)?;
        if held.deadline <= Instant::now() { Err(error::stale()) } else { Ok(held) }
    }
}

fn batch<T>(queue: &mut VecDeque<T>, running: usize) -> Vec<T> {
    let enough = if running == 0 { 1 } else { BATCH };
    if queue.len() < enough {
        return Vec::new();
    }
    let count = queue.len().min(BATCH);
    queue.drain(..count).collect()
}

/// A final error, for reading.
pub(crate) fn final_error(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::PermissionDenied | ErrorKind::Closed | ErrorKind::Unsupported)
}

/// The queue is gone and may not be made again.
pub(crate) fn queue_gone(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the queue {name:?} does not exist any more")).with_backend(NAME)
}

#[cfg(test)]
mod tests {
    use polymq_core::{Completion, Message};

    use super::*;

    /// After an outage some loans are over and others are not.
    #[tokio::test]
    async fn sqs_is_told_nothing_about_loans_that_are_over() {
        const LEASE: Duration = Duration::from_secs(600);
        let shared = Shared::new((10, 1000), (LEASE, LEASE), false, false, 1000);
        let held = |receipt: &str, lease| {
            let incoming = Incoming::new(Message::new("body"), Token::default());
            Held::new(receipt, receipt, &incoming, lease)
        };
        let (retried, retrying) = Completion::queued();
        let (extended, extending) = Completion::queued();
        for (receipt, lease, purpose) in [
            ("retried", Duration::ZERO, Purpose::Retry(retried)),
            ("returned", Duration::ZERO, Purpose::Release),
            ("ours", LEASE, Purpose::Release),
            ("extended", Duration::ZERO, Purpose::Extend(Token(1), Some(extended))),
        ] {
            shared.change(&held(receipt, lease), 5, purpose);
        }
        let told: Vec<_> = shared.next_changes(0).into_iter().map(|change| change.receipt).collect();
        assert_eq!(told, ["ours".into()]);
        for answer in [retrying, extending] {
            assert_eq!(answer.await.expect_err("too late").kind(), ErrorKind::Stale);
        }
        shared.request_is_over();
        assert!(shared.is_told());
    }
}
