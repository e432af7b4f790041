//! One membership in a consumer group, shared by all consumers of this connection that read the same channel.
//!
//! The thread of [`poller`](crate::poller) fetches and commits; consumers take what has come, each up to its own
//! prefetch, and settle it. So consumers of one process share a partition, and only other processes need others.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Condvar, Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use polymq_core::{ATTEMPT, Error, ErrorKind, Incoming, Message, Result, Token};
use rdkafka::{Offset, TopicPartitionList};
use tokio::sync::{Notify, watch};

use crate::{
    NAME, error,
    link::lock,
    partition::{Entry, Partition, Place},
    poller::Native,
    topology::Names,
    transactions::Transactions,
};

/// Offsets in a token; the rest is the number of the assignment, so that a partition that has gone and come back
/// has other tokens.
const OFFSET_BITS: u32 = 40;
/// The most messages and bytes of one partition that wait here for their time. What is behind them waits with the broker.
const MAX_HELD: usize = 1000;
const MAX_HELD_BYTES: usize = 16 * 1024 * 1024;

/// What consumers, handlers and the polling thread share.
#[derive(Debug)]
pub(crate) struct Hub {
    pub(crate) names: Names,
    state: Mutex<State>,
    /// There is room for more messages, or something is settled that somebody waits for.
    changed: Condvar,
    ended: watch::Sender<bool>,
    /// Commits positions in the place of plain commits, where what handlers send is part of them.
    transactions: OnceLock<Arc<Transactions>>,
}

#[derive(Default)]
struct State {
    slots: BTreeMap<u32, Partition>,
    next_slot: u32,
    /// Where the latest message belonged: the next one most likely does too.
    latest: Option<(u32, (bool, i32))>,
    /// Nobody has received these.
    ready: VecDeque<Incoming>,
    /// By the time at which they are due.
    held: BTreeMap<(Instant, u64), Incoming>,
    next_held: u64,
    shares: BTreeMap<u32, Share>,
    next_share: u32,
    /// Ready or with a consumer.
    fetched: usize,
    fetched_bytes: usize,
    /// With a consumer.
    unsettled: usize,
    /// The polling thread waits for room.
    wants_room: bool,
    /// The polling thread waits for the end of handlers.
    wants_rest: bool,
    /// No consumer can join any more.
    leaving: bool,
    end: Option<(ErrorKind, String)>,
    native: Option<Arc<Native>>,
}

/// One consumer.
#[derive(Debug)]
struct Share {
    prefetch: usize,
    bytes: usize,
    taken: usize,
    taken_bytes: usize,
    arrived: Arc<Notify>,
}

/// A message as it was fetched.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) is_delay: bool,
    pub(crate) partition: i32,
    pub(crate) offset: i64,
    pub(crate) incoming: Incoming,
    pub(crate) due: Option<Instant>,
}

/// What the polling thread is to do next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Fetch this many at most; something is due at that time.
    Fetch(usize, Option<Instant>),
    /// Everything that may be fetched is.
    Full,
    /// Nobody is left.
    Leave,
}

impl Hub {
    pub(crate) fn new(names: Names) -> Arc<Self> {
        Arc::new(Self {
            names,
            state: Mutex::default(),
            changed: Condvar::new(),
            ended: watch::Sender::new(false),
            transactions: OnceLock::new(),
        })
    }

    pub(crate) fn set_transactions(&self, transactions: Arc<Transactions>) {
        let _ = self.transactions.set(transactions);
    }

    pub(crate) fn transactions(&self) -> Option<&Arc<Transactions>> {
        self.transactions.get()
    }

    // ---- consumers ----------------------------------------------------------------------------

    /// Adds a consumer; `None` when it is too late.
    pub(crate) fn join(&self, prefetch: usize, bytes: usize) -> Option<(u32, Arc<Notify>)> {
        let mut state = lock(&self.state);
        if state.leaving || state.end.is_some() {
            return None;
        }
        let number = state.next_share;
        state.next_share += 1;
        let arrived = Arc::new(Notify::new());
        let share = Share {
            prefetch: prefetch.max(1),
            bytes: bytes.max(1),
            taken: 0,
            taken_bytes: 0,
            arrived: Arc::clone(&arrived),
        };
        state.shares.insert(number, share);
        state.notify();
        self.changed.notify_all();
        Some((number, arrived))
    }

    /// Takes a consumer away. What it has received can still be settled.
    pub(crate) fn part(&self, share: u32) {
        let mut state = lock(&self.state);
        if let Some(share) = state.shares.remove(&share) {
            // Its reader, if it is waiting, learns that it is closed.
            share.arrived.notify_one();
        }
        // What this one was woken for is the others'.
        state.notify();
        self.changed.notify_all();
    }

    /// Takes what has come; `None` when there is nothing.
    pub(crate) fn take(&self, number: u32, max: usize, into: &mut Vec<Incoming>) -> Option<Result<()>> {
        let mut state = lock(&self.state);
        let State { shares, ready, slots, unsettled, end, .. } = &mut *state;
        let Some(share) = shares.get_mut(&number) else {
            return Some(Err(match end {
                Some((kind, text)) => Error::new(*kind, text.clone()).with_backend(NAME).with_operation("receive"),
                None => error::closed("receive"),
            }));
        };
        let before = into.len();
        while into.len() - before < max
            && share.taken < share.prefetch
            && (share.taken == 0 || share.taken_bytes < share.bytes)
            && let Some(incoming) = ready.pop_front()
        {
            let (slot, number_in) = parts(incoming.token);
            let Some(entry) = slots.get_mut(&slot).and_then(|slot| slot.entry(slot.base + number_in)) else {
                continue;
            };
            entry.place = Place::With(number);
            share.taken += 1;
            share.taken_bytes += entry.bytes();
            *unsettled += 1;
            into.push(incoming);
        }
        if into.len() > before {
            return Some(Ok(()));
        }
        let (kind, text) = end.as_ref()?;
        Some(Err(Error::new(*kind, text.clone()).with_backend(NAME).with_operation("receive")))
    }

    // ---- settling -----------------------------------------------------------------------------

    /// The messages are done; the error is that of one of them.
    pub(crate) fn ack(&self, tokens: &[Token]) -> Result<()> {
        let mut state = lock(&self.state);
        let mut result = Ok(());
        for token in tokens {
            result = result.and(state.finish(*token));
        }
        self.settled(&state);
        result
    }

    /// The message is part of a transaction: nobody else settles it, and the position to be committed passes it.
    pub(crate) fn claim(&self, token: Token) -> Result<()> {
        let mut state = lock(&self.state);
        let (slot, offset) = state.locate(token)?;
        let partition = state.slots.get_mut(&slot).ok_or_else(error::stale)?;
        if let Some(entry) = partition.entry(offset)
            && let Place::With(share) = entry.place
        {
            entry.place = Place::Finishing(share);
        }
        partition.dirty = true;
        partition.touched = true;
        Ok(())
    }

    /// The transaction is given up: they are with their consumers as before.
    pub(crate) fn unclaim(&self, tokens: &[Token]) {
        let mut state = lock(&self.state);
        for token in tokens {
            if let Some(entry) = state.claimed(*token)
                && let Place::Finishing(share) = entry.place
            {
                entry.place = Place::With(share);
            }
        }
        self.settled(&state);
    }

    /// The transaction has happened: they are done.
    pub(crate) fn settle_claimed(&self, tokens: &[Token]) {
        let mut state = lock(&self.state);
        for token in tokens {
            let (slot, number) = parts(*token);
            // Gone meanwhile: its next owner begins behind it.
            let Some(partition) = state.slots.get_mut(&slot) else { continue };
            let dirty = partition.dirty;
            let Some(entry) = partition.finish(partition.base + number) else { continue };
            // It is committed already.
            partition.dirty = dirty;
            state.give_up(entry);
        }
        self.settled(&state);
    }

    /// Whether anything has changed since the last commit.
    pub(crate) fn has_changes(&self) -> bool {
        lock(&self.state).slots.values().any(|partition| partition.dirty)
    }

    /// Whether the message is still ours.
    pub(crate) fn check(&self, token: Token) -> Result<()> {
        lock(&self.state).locate(token).map(drop)
    }

    /// Back to those that wait, in its place.
    pub(crate) fn release(&self, token: Token, message: Message) {
        let mut state = lock(&self.state);
        // Gone: another consumer has it already.
        let Ok((slot, offset)) = state.locate(token) else { return };
        let Some(entry) = state.slots.get_mut(&slot).and_then(|slot| slot.entry(offset)) else { return };
        let copy = *entry;
        entry.place = Place::Ready;
        state.give_up(copy);
        (state.fetched, state.fetched_bytes) = (state.fetched + 1, state.fetched_bytes + copy.bytes());
        let incoming = Incoming { message, token, ..Incoming::default() };
        let same = |waiting: &&Incoming| parts(waiting.token).0 == slot;
        // Tokens of one slot are in the order of their offsets.
        let before = state.ready.iter().position(|waiting| same(&waiting) && waiting.token.0 > token.0);
        let last = state.ready.len()
            - state.ready.iter().rev().position(|waiting| same(&waiting)).unwrap_or(state.ready.len());
        let at = before.unwrap_or(last);
        state.ready.insert(at, incoming);
        state.notify();
        self.settled(&state);
    }

    /// Another attempt of a subscription that nobody shares: the message waits here.
    pub(crate) fn hold(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Result<()> {
        let mut state = lock(&self.state);
        let (slot, offset) = state.locate(token)?;
        let partition = state.slots.get_mut(&slot).ok_or_else(error::stale)?;
        let entry = partition.entry(offset).ok_or_else(error::stale)?;
        let copy = *entry;
        entry.place = Place::Held;
        partition.held += 1;
        partition.held_bytes += copy.bytes();
        state.give_up(copy);
        let mut message = message.clone();
        message.set_system_header(ATTEMPT, attempt.to_string());
        state.keep(Instant::now() + after, Incoming { message, token, ..Incoming::default() });
        self.changed.notify_all();
        Ok(())
    }

    /// Something is settled: whoever waits for that hears of it, and not of each single message.
    fn settled(&self, state: &State) {
        if state.wants_rest || (state.wants_room && state.is_worth_fetching()) {
            self.changed.notify_all();
        }
    }

    // ---- the polling thread -------------------------------------------------------------------

    /// What to do next; what is due by now is ready.
    pub(crate) fn turn(&self, now: Instant) -> Turn {
        let mut state = lock(&self.state);
        state.release_due(now);
        if state.end.is_some() || (state.shares.is_empty() && state.unsettled == 0) {
            state.leaving = true;
            return Turn::Leave;
        }
        match state.room() {
            0 => Turn::Full,
            room => Turn::Fetch(room, state.held.keys().next().map(|(due, _)| *due)),
        }
    }

    /// Waits until there is enough room to be worth fetching, or nothing left to receive: `true`.
    pub(crate) fn wait_for_room(&self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        let mut state = lock(&self.state);
        loop {
            if state.is_worth_fetching() || state.end.is_some() {
                return true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || (state.shares.is_empty() && state.unsettled == 0) {
                return state.room() > 0;
            }
            state.wants_room = true;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.wants_room = false;
        }
    }

    /// Takes in what was fetched.
    pub(crate) fn take_in(&self, batch: &mut Vec<Fetched>) {
        let mut state = lock(&self.state);
        for fetched in batch.drain(..) {
            state.take_in(fetched);
        }
        state.notify();
    }

    /// Partitions that were assigned, at their committed positions.
    pub(crate) fn assigned(&self, list: &TopicPartitionList, ours: bool) {
        let mut state = lock(&self.state);
        for element in list.elements() {
            let is_delay = element.topic() != &*self.names.topic;
            let position = match element.offset() {
                Offset::Offset(offset) if offset >= 0 => Some(offset),
                _ => None,
            };
            state.drop_partition(is_delay, element.partition());
            let metadata = if ours { element.metadata() } else { "" };
            state.add(Partition::at(is_delay, element.partition(), position, metadata));
        }
    }

    /// Partitions that go to another consumer: what nobody has received is forgotten, and handlers that run may end, for
    /// a while. What is to be committed.
    pub(crate) fn revoking(&self, list: &TopicPartitionList, wait: Duration) -> TopicPartitionList {
        let deadline = Instant::now() + wait;
        let mut state = lock(&self.state);
        let gone = state.slots_of(list, &self.names);
        state.forget_unreceived(&gone);
        loop {
            let busy = gone.iter().filter_map(|slot| state.slots.get(slot));
            let busy = busy.flat_map(Partition::entries).any(Entry::is_out);
            let left = deadline.saturating_duration_since(Instant::now());
            if !busy || left.is_zero() || state.end.is_some() {
                return self.positions(&mut state, |slot, partition| partition.touched && gone.contains(&slot));
            }
            state.wants_rest = true;
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.wants_rest = false;
            // What is returned meanwhile is not for us either.
            state.forget_unreceived(&gone);
        }
    }

    /// They are gone: their tokens are stale.
    pub(crate) fn revoked(&self, list: &TopicPartitionList) {
        let mut state = lock(&self.state);
        for slot in state.slots_of(list, &self.names) {
            state.drop_slot(slot);
        }
    }

    /// What has changed since the last call, to be committed.
    pub(crate) fn changes(&self) -> TopicPartitionList {
        let mut state = lock(&self.state);
        self.positions(&mut state, |_, partition| partition.dirty)
    }

    /// Everything that has changed at all, for the last commit.
    pub(crate) fn all_changes(&self) -> TopicPartitionList {
        let mut state = lock(&self.state);
        self.positions(&mut state, |_, partition| partition.touched)
    }

    /// A commit has failed: these are to be committed again.
    pub(crate) fn not_committed(&self, list: &TopicPartitionList) {
        let mut state = lock(&self.state);
        for slot in state.slots_of(list, &self.names) {
            if let Some(partition) = state.slots.get_mut(&slot) {
                partition.dirty = true;
            }
        }
    }

    fn positions(&self, state: &mut State, wanted: impl Fn(u32, &Partition) -> bool) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for (slot, partition) in &mut state.slots {
            if !wanted(*slot, partition) {
                continue;
            }
            partition.dirty = false;
            let topic = self.topic(partition.is_delay);
            // A position of our own making cannot be invalid.
            if list.add_partition_offset(topic, partition.number, Offset::Offset(partition.position())).is_ok()
                && let Some(mut element) = list.find_partition(topic, partition.number)
            {
                element.set_metadata(partition.metadata());
            }
        }
        list
    }

    /// Partitions of which too much waits for its time, and those of which there is room again.
    pub(crate) fn fullness(&self) -> (TopicPartitionList, TopicPartitionList) {
        let (mut full, mut again) = (TopicPartitionList::new(), TopicPartitionList::new());
        let mut state = lock(&self.state);
        for partition in state.slots.values_mut() {
            let is_full = partition.held >= MAX_HELD || partition.held_bytes >= MAX_HELD_BYTES;
            let has_room = partition.held < MAX_HELD / 2 && partition.held_bytes < MAX_HELD_BYTES / 2;
            if is_full && !partition.is_full {
                partition.is_full = true;
                full.add_partition(self.topic(partition.is_delay), partition.number);
            } else if has_room && partition.is_full {
                partition.is_full = false;
                again.add_partition(self.topic(partition.is_delay), partition.number);
            }
        }
        (full, again)
    }

    /// Whether anything waits for its time, or did so too much.
    pub(crate) fn is_holding(&self) -> bool {
        let state = lock(&self.state);
        !state.held.is_empty() || state.slots.values().any(|partition| partition.is_full)
    }

    /// All partitions of which too much waits for its time.
    pub(crate) fn full(&self) -> TopicPartitionList {
        let mut full = TopicPartitionList::new();
        for partition in lock(&self.state).slots.values().filter(|partition| partition.is_full) {
            full.add_partition(self.topic(partition.is_delay), partition.number);
        }
        full
    }

    fn topic(&self, is_delay: bool) -> &str {
        match &self.names.delay {
            Some(delay) if is_delay => delay,
            _ => &self.names.topic,
        }
    }

    // ---- its life -----------------------------------------------------------------------------

    /// Reading is over; what nobody has settled can be settled no more.
    pub(crate) fn fail(&self, kind: ErrorKind, text: &str) {
        let mut state = lock(&self.state);
        state.end.get_or_insert_with(|| (kind, text.to_owned()));
        state.leaving = true;
        state.notify_all();
        self.changed.notify_all();
    }

    pub(crate) fn set_native(&self, native: Option<Arc<Native>>) -> Option<Arc<Native>> {
        std::mem::replace(&mut lock(&self.state).native, native)
    }

    pub(crate) fn native(&self) -> Option<Arc<Native>> {
        lock(&self.state).native.clone()
    }

    /// The polling thread has ended.
    pub(crate) fn set_ended(&self) {
        let mut state = lock(&self.state);
        state.leaving = true;
        state.slots.clear();
        state.ready.clear();
        state.held.clear();
        state.notify_all();
        drop(state);
        self.ended.send_replace(true);
    }

    pub(crate) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// Whether somebody still holds messages of it, or reads.
    pub(crate) fn is_in_use(&self) -> bool {
        let state = lock(&self.state);
        !state.shares.is_empty() || state.unsettled > 0
    }

    /// How many consumers of this connection share it.
    pub(crate) fn consumers(&self) -> usize {
        lock(&self.state).shares.len()
    }

    /// How many messages wait in a partition that ends at `high`; `None` when it is not ours.
    pub(crate) fn waiting(&self, number: i32, high: i64) -> Option<u64> {
        let state = lock(&self.state);
        let slot = state.find(false, number)?;
        state.slots.get(&slot).map(|partition| partition.waiting(high))
    }

    /// Messages with consumers of this connection.
    pub(crate) fn unsettled(&self) -> usize {
        lock(&self.state).unsettled
    }
}

impl State {
    /// The most that may be fetched.
    fn most(&self) -> usize {
        self.shares.values().map(|share| share.prefetch).sum()
    }

    fn room(&self) -> usize {
        let bytes: usize = self.shares.values().fold(0, |sum, share| sum.saturating_add(share.bytes));
        if self.fetched_bytes >= bytes && self.fetched > 0 { 0 } else { self.most().saturating_sub(self.fetched) }
    }

    /// Whether there is enough room for a fetch, or somebody has nothing to do without it.
    fn is_worth_fetching(&self) -> bool {
        let room = self.room();
        room > 0 && (room >= self.most() / 4 || self.ready.is_empty())
    }

    fn notify(&self) {
        if !self.ready.is_empty() {
            self.notify_all();
        }
    }

    fn notify_all(&self) {
        self.shares.values().for_each(|share| share.arrived.notify_one());
    }

    fn add(&mut self, partition: Partition) {
        self.next_slot = (self.next_slot + 1) % (1 << (u64::BITS - OFFSET_BITS));
        self.slots.insert(self.next_slot, partition);
    }

    fn find(&self, is_delay: bool, number: i32) -> Option<u32> {
        let found = self.slots.iter().find(|(_, slot)| (slot.is_delay, slot.number) == (is_delay, number));
        found.map(|(slot, _)| *slot)
    }

    fn slots_of(&self, list: &TopicPartitionList, names: &Names) -> Vec<u32> {
        let elements = list.elements();
        let find = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| {
            self.find(element.topic() != &*names.topic, element.partition())
        };
        elements.iter().filter_map(find).collect()
    }

    /// Slot and offset of a token that is with a consumer.
    fn locate(&mut self, token: Token) -> Result<(u32, i64)> {
        let (slot, number) = parts(token);
        let Some(partition) = self.slots.get_mut(&slot) else {
            return Err(match &self.end {
                Some((kind, text)) if *kind == ErrorKind::Closed => {
                    Error::new(*kind, text.clone()).with_backend(NAME).with_operation("settle")
                }
                _ => error::stale(),
            });
        };
        let offset = partition.base + number;
        match partition.entry(offset) {
            Some(Entry { place: Place::With(_), .. }) => Ok((slot, offset)),
            _ => Err(error::stale()),
        }
    }

    fn claimed(&mut self, token: Token) -> Option<&mut Entry> {
        let (slot, number) = parts(token);
        let partition = self.slots.get_mut(&slot)?;
        partition.entry(partition.base + number)
    }

    /// What is with a consumer is done.
    fn finish(&mut self, token: Token) -> Result<()> {
        let (slot, offset) = self.locate(token)?;
        let finished = self.slots.get_mut(&slot).and_then(|slot| slot.finish(offset));
        self.give_up(finished.ok_or_else(error::stale)?);
        Ok(())
    }

    /// What was with a consumer is not any more.
    fn give_up(&mut self, entry: Entry) {
        self.fetched = self.fetched.saturating_sub(1);
        self.fetched_bytes = self.fetched_bytes.saturating_sub(entry.bytes());
        let (Place::With(number) | Place::Finishing(number)) = entry.place else { return };
        self.unsettled = self.unsettled.saturating_sub(1);
        let Some(share) = self.shares.get_mut(&number) else { return };
        let was_full = share.taken >= share.prefetch || share.taken_bytes >= share.bytes;
        share.taken -= 1;
        share.taken_bytes -= entry.bytes();
        if was_full && !self.ready.is_empty() {
            share.arrived.notify_one();
        }
    }

    fn take_in(&mut self, fetched: Fetched) {
        let Fetched { is_delay, partition: number, offset, mut incoming, due } = fetched;
        // Only what is assigned is fetched; what comes late is that of another.
        let latest = self.latest.filter(|(slot, of)| *of == (is_delay, number) && self.slots.contains_key(slot));
        let Some(mut slot) = latest.map(|(slot, _)| slot).or_else(|| self.find(is_delay, number)) else { return };
        self.latest = Some((slot, (is_delay, number)));
        if self.slots.get(&slot).is_some_and(|partition| partition.has_seen(offset)) {
            // The topic was deleted and made again: within an assignment nothing else goes back.
            self.drop_slot(slot);
            self.add(Partition::at(is_delay, number, Some(offset), ""));
            slot = self.next_slot;
        }
        let Some(partition) = self.slots.get_mut(&slot) else { return };
        let bytes = incoming.message.size();
        let place = if due.is_some() { Place::Held } else { Place::Ready };
        if !partition.take_in(offset, bytes, place) {
            return;
        }
        incoming.token = Token(u64::from(slot) << OFFSET_BITS | (offset - partition.base).unsigned_abs());
        match due {
            Some(due) => {
                partition.held += 1;
                partition.held_bytes += bytes;
                self.keep(due, incoming);
            }
            None => {
                self.fetched += 1;
                self.fetched_bytes += bytes;
                self.ready.push_back(incoming);
            }
        }
    }

    fn keep(&mut self, due: Instant, incoming: Incoming) {
        self.next_held += 1;
        self.held.insert((due, self.next_held), incoming);
    }

    /// What is due is ready. It counts as fetched from now on.
    fn release_due(&mut self, now: Instant) {
        let mut some = false;
        while let Some(first) = self.held.first_entry()
            && first.key().0 <= now
        {
            let incoming = first.remove();
            let (slot, number) = parts(incoming.token);
            let Some(partition) = self.slots.get_mut(&slot) else { continue };
            let Some(entry) = partition.entry(partition.base + number) else { continue };
            entry.place = Place::Ready;
            let bytes = entry.bytes();
            partition.held = partition.held.saturating_sub(1);
            partition.held_bytes = partition.held_bytes.saturating_sub(bytes);
            (self.fetched, self.fetched_bytes) = (self.fetched + 1, self.fetched_bytes + bytes);
            self.ready.push_back(incoming);
            some = true;
        }
        if some {
            self.notify_all();
        }
    }

    /// Forgets what nobody has received of these slots; it stays unfinished.
    fn forget_unreceived(&mut self, slots: &[u32]) {
        let State { ready, held, fetched, fetched_bytes, slots: all, .. } = self;
        ready.retain(|waiting| {
            let (slot, number) = parts(waiting.token);
            let gone = slots.contains(&slot);
            if gone && let Some(entry) = all.get_mut(&slot).and_then(|slot| slot.entry(slot.base + number)) {
                *fetched = fetched.saturating_sub(1);
                *fetched_bytes = fetched_bytes.saturating_sub(entry.bytes());
            }
            !gone
        });
        held.retain(|_, waiting| !slots.contains(&parts(waiting.token).0));
    }

    fn drop_partition(&mut self, is_delay: bool, number: i32) {
        if let Some(slot) = self.find(is_delay, number) {
            self.drop_slot(slot);
        }
    }

    fn drop_slot(&mut self, slot: u32) {
        self.forget_unreceived(&[slot]);
        let Some(partition) = self.slots.remove(&slot) else { return };
        for entry in partition.entries() {
            if entry.is_out() {
                self.give_up(*entry);
            }
        }
    }
}

/// Slot and number of a message, counted from the slot's first offset.
fn parts(Token(token): Token) -> (u32, i64) {
    ((token >> OFFSET_BITS) as u32, (token & ((1 << OFFSET_BITS) - 1)) as i64)
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State")
            .field("slots", &self.slots.len())
            .field("ready", &self.ready.len())
            .field("held", &self.held.len())
            .field("shares", &self.shares)
            .field("end", &self.end)
            .finish_non_exhaustive()
    }
}
