//! What a hub knows, behind its lock.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Instant,
};

use polymq_core::{Error, ErrorKind, Message, Result, Token};
use rdkafka::TopicPartitionList;
use tokio::sync::{Notify, oneshot};

use super::fetching::Fetched;
use crate::{
    NAME,
    context::Native,
    error,
    partition::{Entry, Partition, Place},
    record::Content,
    topology::Names,
};

/// Offsets in a token; the rest is the number of the assignment, so that a partition that has gone and come back
/// has other tokens.
const OFFSET_BITS: u32 = 40;

#[derive(Default)]
pub(super) struct State {
    pub(super) slots: BTreeMap<u32, Partition>,
    pub(super) next_slot: u32,
    /// Nobody has received these.
    pub(super) ready: VecDeque<Waiting>,
    /// By the time at which they are due.
    pub(super) held: BTreeMap<(Instant, u64), Waiting>,
    pub(super) next_held: u64,
    /// Returned, by token, while their transaction is under way: it decides whether they are delivered again.
    pub(super) returned: BTreeMap<u64, Message>,
    pub(super) shares: BTreeMap<u32, Share>,
    pub(super) next_share: u32,
    /// What the consumers may have together: messages and bytes.
    pub(super) most: usize,
    pub(super) most_bytes: usize,
    /// Ready or with a consumer.
    pub(super) fetched: usize,
    pub(super) fetched_bytes: usize,
    /// With a consumer.
    pub(super) unsettled: usize,
    /// The polling thread waits for room.
    pub(super) wants_room: bool,
    /// The polling thread waits for the end of handlers.
    pub(super) wants_rest: bool,
    /// No consumer can join any more.
    pub(super) leaving: bool,
    /// The last positions are taken: nothing is settled any more, for nobody would commit it.
    pub(super) sealed: bool,
    /// Closed consumers, which hear when what they have acknowledged is committed.
    pub(super) flushing: Vec<oneshot::Sender<()>>,
    pub(super) end: Option<(ErrorKind, String)>,
    pub(super) native: Option<Arc<Native>>,
}

/// A message with no consumer. Where it comes from is told by its token.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) content: Content,
    pub(super) token: Token,
}

/// One consumer.
#[derive(Debug)]
pub(super) struct Share {
    pub(super) prefetch: usize,
    pub(super) bytes: usize,
    pub(super) taken: usize,
    pub(super) taken_bytes: usize,
    pub(super) arrived: Arc<Notify>,
}

impl State {
    /// Adds up what consumers may have, when one has come or gone.
    pub(super) fn sum_up(&mut self) {
        self.most = self.shares.values().fold(0, |sum, share| sum.saturating_add(share.prefetch));
        self.most_bytes = self.shares.values().fold(0, |sum, share| sum.saturating_add(share.bytes));
    }

    pub(super) fn room(&self) -> usize {
        if self.fetched_bytes >= self.most_bytes && self.fetched > 0 {
            0
        } else {
            self.most.saturating_sub(self.fetched)
        }
    }

    /// Whether there is enough room for a fetch, or somebody has nothing to do without it.
    pub(super) fn is_worth_fetching(&self) -> bool {
        let room = self.room();
        room > 0 && (room >= self.most / 4 || self.ready.is_empty())
    }

    pub(super) fn notify(&self) {
        if !self.ready.is_empty() {
            self.notify_all();
        }
    }

    pub(super) fn notify_all(&self) {
        self.shares.values().for_each(|share| share.arrived.notify_one());
    }

    pub(super) fn add(&mut self, partition: Partition) {
        self.next_slot = (self.next_slot + 1) % (1 << (u64::BITS - OFFSET_BITS));
        self.slots.insert(self.next_slot, partition);
    }

    pub(super) fn find(&self, is_delay: bool, number: i32) -> Option<u32> {
        let found = self.slots.iter().find(|(_, slot)| (slot.is_delay, slot.number) == (is_delay, number));
        found.map(|(slot, _)| *slot)
    }

    pub(super) fn slots_of(&self, list: &TopicPartitionList, names: &Names) -> Vec<u32> {
        let elements = list.elements();
        let find = |element: &rdkafka::topic_partition_list::TopicPartitionListElem<'_>| {
            self.find(element.topic() != &*names.topic, element.partition())
        };
        elements.iter().filter_map(find).collect()
    }

    /// Slot and offset of a token that is with a consumer.
    pub(super) fn locate(&mut self, token: Token) -> Result<(u32, i64)> {
        let (slot, number) = parts(token);
        let sealed = self.sealed;
        let Some(partition) = self.slots.get_mut(&slot).filter(|_| !sealed) else { return Err(self.gone()) };
        let offset = partition.base + number;
        match partition.entry(offset) {
            Some(Entry { place: Place::With(_), .. }) => Ok((slot, offset)),
            _ => Err(error::stale()),
        }
    }

    /// The error of who settles what belongs to no partition of ours, or comes too late.
    #[cold]
    fn gone(&self) -> Error {
        match &self.end {
            Some((kind, text)) if *kind == ErrorKind::Closed => {
                Error::new(*kind, text.clone()).with_backend(NAME).with_operation("settle")
            }
            _ => error::stale(),
        }
    }

    pub(super) fn claimed(&mut self, token: Token) -> Option<&mut Entry> {
        let (slot, number) = parts(token);
        let partition = self.slots.get_mut(&slot)?;
        partition.entry(partition.base + number)
    }

    /// What is with a consumer is done.
    pub(super) fn finish(&mut self, token: Token) -> Result<()> {
        let (slot, number) = parts(token);
        let sealed = self.sealed;
        let Some(partition) = self.slots.get_mut(&slot).filter(|_| !sealed) else { return Err(self.gone()) };
        let finished = partition.finish_if(partition.base + number, |place| matches!(place, Place::With(_)));
        self.give_up(finished.ok_or_else(error::stale)?);
        Ok(())
    }

    /// What was with a consumer is not any more.
    pub(super) fn give_up(&mut self, entry: Entry) {
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

    /// Takes in what was fetched, in its order.
    pub(super) fn take_in(&mut self, batch: &mut Vec<Fetched>) {
        // Where the message before belonged: the next one most likely does too.
        let (mut origin, mut slot) = (None, 0);
        for Fetched { is_delay, partition: number, offset, content, due } in batch.drain(..) {
            if origin != Some((is_delay, number)) {
                // Only what is assigned is fetched; what comes late is that of another.
                let Some(found) = self.find(is_delay, number) else { continue };
                (origin, slot) = (Some((is_delay, number)), found);
            }
            if self.slots.get(&slot).is_some_and(|partition| partition.has_seen(offset)) {
                // The topic was deleted and made again: within an assignment nothing else goes back.
                self.drop_slot(slot);
                self.add(Partition::at(is_delay, number, Some(offset), ""));
                slot = self.next_slot;
            }
            let Some(partition) = self.slots.get_mut(&slot) else { continue };
            // What waits for long is read before it is counted, with its headers, and keeps nothing of others with it.
            let content = if due.is_some() { content.alone() } else { content };
            let bytes = content.bytes();
            let place = if due.is_some() { Place::Held } else { Place::Ready };
            if !partition.take_in(offset, bytes, place) {
                continue;
            }
            let token = Token(u64::from(slot) << OFFSET_BITS | (offset - partition.base).unsigned_abs());
            let waiting = Waiting { content, token };
            match due {
                Some(due) => {
                    partition.held += 1;
                    partition.held_bytes += bytes;
                    self.keep(due, waiting);
                }
                None => {
                    self.fetched += 1;
                    self.fetched_bytes += bytes;
                    self.ready.push_back(waiting);
                }
            }
        }
    }

    /// Keeps what is not due yet.
    pub(super) fn keep(&mut self, due: Instant, waiting: Waiting) {
        self.next_held += 1;
        self.held.insert((due, self.next_held), waiting);
    }

    /// What is due is ready. It counts as fetched from now on.
    pub(super) fn release_due(&mut self, now: Instant) {
        let mut some = false;
        while let Some(first) = self.held.first_entry()
            && first.key().0 <= now
        {
            let waiting = first.remove();
            let (slot, number) = parts(waiting.token);
            let Some(partition) = self.slots.get_mut(&slot) else { continue };
            let Some(entry) = partition.entry(partition.base + number) else { continue };
            entry.place = Place::Ready;
            let bytes = entry.bytes();
            partition.held = partition.held.saturating_sub(1);
            partition.held_bytes = partition.held_bytes.saturating_sub(bytes);
            (self.fetched, self.fetched_bytes) = (self.fetched + 1, self.fetched_bytes + bytes);
            self.ready.push_back(waiting);
            some = true;
        }
        if some {
            self.notify_all();
        }
    }

    /// Forgets what nobody has received of these slots; it stays unfinished.
    pub(super) fn forget_unreceived(&mut self, slots: &[u32]) {
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

    /// Puts what was with a consumer back to those that wait, in its place.
    pub(super) fn put_back(&mut self, token: Token, message: Message) {
        // Gone: another consumer has it already.
        let Ok((slot, offset)) = self.locate(token) else { return };
        let Some(entry) = self.slots.get_mut(&slot).and_then(|slot| slot.entry(offset)) else { return };
        let copy = *entry;
        entry.place = Place::Ready;
        self.give_up(copy);
        (self.fetched, self.fetched_bytes) = (self.fetched + 1, self.fetched_bytes + copy.bytes());
        let returned = Waiting { content: Content::Message { message, taken_at: None }, token };
        let same = |waiting: &&Waiting| parts(waiting.token).0 == slot;
        // Tokens of one slot are in the order of their offsets.
        let before = self.ready.iter().position(|waiting| same(&waiting) && waiting.token.0 > token.0);
        let last =
            self.ready.len() - self.ready.iter().rev().position(|waiting| same(&waiting)).unwrap_or(self.ready.len());
        let at = before.unwrap_or(last);
        self.ready.insert(at, returned);
        self.notify();
    }

    pub(super) fn drop_partition(&mut self, is_delay: bool, number: i32) {
        if let Some(slot) = self.find(is_delay, number) {
            self.drop_slot(slot);
        }
    }

    pub(super) fn drop_slot(&mut self, slot: u32) {
        self.forget_unreceived(&[slot]);
        self.returned.retain(|token, _| parts(Token(*token)).0 != slot);
        let Some(partition) = self.slots.remove(&slot) else { return };
        for entry in partition.entries() {
            if entry.is_out() {
                self.give_up(*entry);
            }
        }
    }
}

/// Slot and number of a message, counted from the slot's first offset.
pub(super) fn parts(Token(token): Token) -> (u32, i64) {
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
