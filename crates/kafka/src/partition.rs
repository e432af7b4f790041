//! What is finished in a partition, and what is not: the position that may be committed, and what is finished beyond it.
//!
//! Kafka keeps one position for each partition. Messages are finished out of order, so the position is that of the
//! first unfinished one; which of the later ones are finished already is told in the metadata beside it, and whoever
//! gets the partition next leaves them out.

use std::{
    collections::VecDeque,
    fmt::Write,
    ops::{Range, RangeInclusive},
};

/// Kafka's bound for the metadata is 4096 bytes unless it is told otherwise.
const MAX_METADATA: usize = 3500;
/// Tells our metadata from that of others.
const MARK: &str = "pmq1 ";
/// Finished messages behind an unfinished one are kept until there are this many, and as many as unfinished ones.
const FEW: usize = 256;

/// One partition, from its assignment on.
#[derive(Debug)]
pub(crate) struct Partition {
    pub(crate) is_delay: bool,
    pub(crate) number: i32,
    /// Tokens count from here.
    pub(crate) base: i64,
    /// The first offset that was not seen.
    next: i64,
    /// By offset, from the first unfinished one on. Offsets mostly follow each other, so that one is found by its number.
    open: VecDeque<Entry>,
    /// How many of them are finished.
    finished: usize,
    before: Before,
    /// Something changed since the last commit was sent.
    pub(crate) dirty: bool,
    /// Something changed since the assignment.
    pub(crate) touched: bool,
    /// Too much of it waits for its time.
    pub(crate) is_full: bool,
    /// What of it waits for its time.
    pub(crate) held: usize,
    pub(crate) held_bytes: usize,
}

/// A message, in few bytes: there is one for each that was fetched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entry {
    offset: i64,
    bytes: u32,
    pub(crate) place: Place,
}

impl Entry {
    pub(crate) fn bytes(&self) -> usize {
        self.bytes as usize
    }

    /// It has so many bytes more; returns by how many it has grown.
    pub(crate) fn grow(&mut self, more: usize) -> usize {
        let before = self.bytes;
        self.bytes = before.saturating_add(u32::try_from(more).unwrap_or(u32::MAX));
        (self.bytes - before) as usize
    }

    /// Whether a consumer has it.
    pub(crate) fn is_out(&self) -> bool {
        matches!(self.place, Place::With(_) | Place::Finishing(_))
    }
}

/// Where a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Waiting to be received.
    Ready,
    /// Waiting for its time.
    Held,
    /// With the share of this number.
    With(u32),
    /// The same, and in a transaction that makes it done.
    Finishing(u32),
    /// Done.
    Finished,
}

/// What an earlier owner has finished: everything before `until` that is not in `open`.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Before {
    until: i64,
    open: Vec<Range<i64>>,
}

impl Partition {
    /// A partition at this committed position, with this metadata.
    pub(crate) fn at(is_delay: bool, number: i32, position: Option<i64>, metadata: &str) -> Self {
        let base = position.unwrap_or(0);
        Self {
            is_delay,
            number,
            base,
            next: base,
            open: VecDeque::new(),
            finished: 0,
            before: position.and_then(|position| read(position, metadata)).unwrap_or_default(),
            dirty: false,
            touched: false,
            is_full: false,
            held: 0,
            held_bytes: 0,
        }
    }

    /// The position is to be committed again, though nothing has changed, if there is one that anybody would miss.
    pub(crate) fn renew(&mut self) {
        if self.touched || (self.is_delay && self.position() > 0) {
            (self.dirty, self.touched) = (true, true);
        }
    }

    /// Whether the offset is before the next one.
    pub(crate) fn has_seen(&self, offset: i64) -> bool {
        offset < self.next
    }

    /// Takes a message in; `false` when it is finished or here already.
    pub(crate) fn take_in(&mut self, offset: i64, bytes: usize, place: Place) -> bool {
        if offset < self.next {
            return false;
        }
        self.next = offset + 1;
        // Offsets that are left out are none: markers of transactions, and what compaction took away.
        (self.dirty, self.touched) = (true, true);
        if offset < self.before.until && !self.before.open.iter().any(|range| range.contains(&offset)) {
            return false;
        }
        self.open.push_back(Entry { offset, bytes: u32::try_from(bytes).unwrap_or(u32::MAX), place });
        true
    }

    /// An unfinished message.
    pub(crate) fn entry(&mut self, offset: i64) -> Option<&mut Entry> {
        let at = self.find(offset)?;
        self.open.get_mut(at).filter(|entry| entry.place != Place::Finished)
    }

    fn find(&self, offset: i64) -> Option<usize> {
        let guess = usize::try_from(offset - self.open.front()?.offset).ok()?;
        match self.open.get(guess) {
            Some(entry) if entry.offset == offset => Some(guess),
            _ => self.open.binary_search_by_key(&offset, |entry| entry.offset).ok(),
        }
    }

    /// The message is done.
    pub(crate) fn finish(&mut self, offset: i64) -> Option<Entry> {
        self.finish_if(offset, |_| true)
    }

    /// The same, if it is where it must be.
    pub(crate) fn finish_if(&mut self, offset: i64, is_right: impl Fn(Place) -> bool) -> Option<Entry> {
        let entry = self.entry(offset).filter(|entry| is_right(entry.place))?;
        let before = *entry;
        entry.place = Place::Finished;
        self.finished += 1;
        (self.dirty, self.touched) = (true, true);
        while self.open.front().is_some_and(|entry| entry.place == Place::Finished) {
            self.open.pop_front();
            self.finished -= 1;
        }
        if self.finished > FEW && self.finished > self.open.len() / 2 {
            self.open.retain(|entry| entry.place != Place::Finished);
            self.finished = 0;
        }
        Some(before)
    }

    /// Everything unfinished.
    pub(crate) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.open.iter().filter(|entry| entry.place != Place::Finished)
    }

    /// What may be committed: the first unfinished offset.
    pub(crate) fn position(&self) -> i64 {
        self.unfinished().next().map_or(self.end(), |range| *range.start())
    }

    /// How many messages before `high` are unfinished and with nobody.
    pub(crate) fn waiting(&self, high: i64) -> u64 {
        let unseen = u64::try_from(high - self.end()).unwrap_or(0);
        let unfinished: i64 = self.unfinished().map(|range| range.end() - range.start() + 1).sum();
        let with = self.open.iter().filter(|entry| matches!(entry.place, Place::With(_))).count();
        unseen + u64::try_from(unfinished).unwrap_or(0).saturating_sub(with as u64)
    }

    /// The metadata beside the position.
    pub(crate) fn metadata(&self) -> String {
        write(self.position(), self.end(), self.unfinished())
    }

    fn end(&self) -> i64 {
        self.next.max(self.before.until)
    }

    /// Ours, and of the earlier owner's what was not seen again yet.
    fn unfinished(&self) -> impl Iterator<Item = RangeInclusive<i64>> {
        let earlier = self.before.open.iter().filter(|range| range.end > self.next);
        let earlier = earlier.map(|range| range.start.max(self.next)..=range.end - 1);
        // Who asks while a transaction is being made is that transaction.
        let open = self.entries().filter(|entry| !matches!(entry.place, Place::Finishing(_)));
        open.map(|entry| entry.offset..=entry.offset).chain(earlier)
    }
}

/// How many of the messages from `position` to `high` are unfinished, by the metadata of a commit.
pub(crate) fn unfinished(position: i64, metadata: &str, high: i64) -> u64 {
    let before = read(position, metadata).unwrap_or_default();
    let unseen = high - position.max(before.until);
    let open: i64 = before.open.iter().map(|range| range.end - range.start).sum();
    u64::try_from(unseen + open).unwrap_or(0)
}

fn write(position: i64, end: i64, unfinished: impl Iterator<Item = RangeInclusive<i64>>) -> String {
    let mut joined: Vec<RangeInclusive<i64>> = Vec::new();
    for range in unfinished {
        match joined.last_mut() {
            Some(last) if *last.end() + 1 == *range.start() => *last = *last.start()..=*range.end(),
            _ => joined.push(range),
        }
    }
    // Nothing is finished beyond the position.
    if joined.first().is_none_or(|first| *first.start() == position && first.end() + 1 == end) && joined.len() <= 1 {
        return String::new();
    }
    let (mut text, mut until) = (String::new(), end);
    for range in joined {
        let before = text.len();
        let (from, to) = (range.start() - position, range.end() - position);
        let written = if from == to { write!(text, "{from},") } else { write!(text, "{from}-{to},") };
        if written.is_err() || text.len() > MAX_METADATA {
            // What does not fit is told as not seen: it may come twice, and is not lost.
            text.truncate(before);
            until = *range.start();
            break;
        }
    }
    format!("{MARK}{};{}", until - position, text.trim_end_matches(','))
}

fn read(position: i64, metadata: &str) -> Option<Before> {
    let (until, ranges) = metadata.strip_prefix(MARK)?.split_once(';')?;
    let range = |text: &str| {
        let (from, to) = text.split_once('-').unwrap_or((text, text));
        let (from, to): (i64, i64) = (from.parse().ok()?, to.parse().ok()?);
        (from <= to).then(|| position + from..position + to + 1)
    };
    let open = ranges.split(',').filter(|text| !text.is_empty()).map(range).collect::<Option<Vec<_>>>()?;
    Some(Before { until: position + until.parse::<i64>().ok()?, open })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(partition: &mut Partition, offset: i64) -> bool {
        partition.take_in(offset, 1, Place::Ready)
    }

    fn seen(offsets: Range<i64>) -> Partition {
        let mut partition = Partition::at(false, 0, Some(offsets.start), "");
        assert!(offsets.clone().all(|offset| take(&mut partition, offset)));
        partition
    }

    #[test]
    fn the_position_never_passes_an_unfinished_message() {
        let mut partition = seen(10..20);
        assert_eq!((partition.position(), partition.metadata().as_str()), (10, ""));
        for offset in [11, 12, 15, 19] {
            assert!(partition.finish(offset).is_some());
            assert_eq!(partition.position(), 10);
        }
        assert_eq!(partition.metadata(), "pmq1 10;0,3-4,6-8");
        assert!(partition.finish(10).is_some());
        assert_eq!(partition.position(), 13);
        assert!(partition.finish(10).is_none(), "once only");
        for offset in [13, 14, 16, 17, 18] {
            partition.finish(offset);
        }
        assert_eq!((partition.position(), partition.metadata().as_str()), (20, ""));
    }

    #[test]
    fn the_next_owner_leaves_out_what_is_finished() {
        let mut first = seen(10..20);
        for offset in [11, 12, 15, 19] {
            first.finish(offset);
        }
        let mut second = Partition::at(false, 0, Some(first.position()), &first.metadata());
        assert_eq!(
            (second.position(), second.metadata()),
            (first.position(), first.metadata()),
            "nothing is forgotten"
        );
        assert_eq!(second.waiting(25), 11);
        assert_eq!(unfinished(first.position(), &first.metadata(), 25), 11);
        let taken: Vec<i64> = (10..25).filter(|offset| take(&mut second, *offset)).collect();
        assert_eq!(taken, [10, 13, 14, 16, 17, 18, 20, 21, 22, 23, 24]);
        second.finish(10);
        assert_eq!((second.position(), second.metadata().as_str()), (13, "pmq1 12;0-1,3-5,7-11"));
    }

    #[test]
    fn gaps_are_no_messages() {
        let mut partition = seen(10..11);
        assert!(take(&mut partition, 50));
        partition.finish(10);
        assert_eq!(partition.position(), 50);
        assert!(!take(&mut partition, 50), "a message is taken in once");
    }

    #[test]
    fn what_is_finished_behind_an_unfinished_message_takes_no_room() {
        let mut partition = seen(0..1);
        for offset in 1..100_000 {
            assert!(take(&mut partition, offset) && partition.finish(offset).is_some());
            assert!(partition.finish(offset).is_none() && partition.entry(offset).is_none());
        }
        assert!(partition.open.len() <= 2 * FEW && partition.open.capacity() <= 8 * FEW, "{}", partition.open.len());
        assert_eq!((partition.position(), partition.metadata().as_str()), (0, "pmq1 100000;0"));
        assert!(partition.finish(0).is_some());
        assert_eq!(partition.position(), 100_000);
    }

    #[test]
    fn what_does_not_fit_comes_twice_and_is_not_lost() {
        let mut partition = seen(0..10_000);
        (1..10_000).step_by(2).for_each(|offset| assert!(partition.finish(offset).is_some()));
        let metadata = partition.metadata();
        assert!(metadata.len() < 4096, "{}", metadata.len());
        let mut next = Partition::at(false, 0, Some(0), &metadata);
        let taken: Vec<i64> = (0..10_000).filter(|offset| take(&mut next, *offset)).collect();
        assert!((0..10_000).step_by(2).all(|offset| taken.binary_search(&offset).is_ok()));
    }

    #[test]
    fn metadata_of_others_is_nothing_to_us() {
        for metadata in ["", "x", "pmq1 ", "pmq1 5", "pmq1 x;1", "pmq1 5;2-1", "pmq1 5;a"] {
            let mut partition = Partition::at(false, 0, Some(7), metadata);
            assert!(take(&mut partition, 7), "{metadata}");
        }
    }
}
