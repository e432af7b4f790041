//! What is stored: places, the changes of one step, and what is found at the start.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

/// Bits of a key that count within a channel.
const SEQUENCE_BITS: u32 = 44;
/// The highest number of a channel: the rest of a key's bits, without the one of its sign.
pub(crate) const MOST_CHANNELS: u32 = (1 << (63 - SEQUENCE_BITS)) - 1;

/// A place in a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key(pub(super) i64);

impl Key {
    /// The place of a sequence in a channel.
    #[must_use]
    pub(crate) fn new(channel: u32, sequence: u64) -> Self {
        let sequence = i64::try_from(sequence).unwrap_or(i64::MAX).min((1 << SEQUENCE_BITS) - 1);
        Self((i64::from(channel) << SEQUENCE_BITS) | sequence)
    }

    /// The channel.
    #[must_use]
    pub(crate) fn channel(self) -> u32 {
        u32::try_from(self.0 >> SEQUENCE_BITS).unwrap_or(u32::MAX)
    }

    /// The sequence within the channel.
    #[must_use]
    pub(crate) fn sequence(self) -> u64 {
        (self.0 & ((1 << SEQUENCE_BITS) - 1)).unsigned_abs()
    }
}

/// Where a reader goes on. What is stored is where it is by then, so one note of it that waits is enough.
#[derive(Debug, Default)]
pub(crate) struct Place {
    next: AtomicU64,
    /// A note waits.
    noted: AtomicBool,
}

impl Place {
    /// It only goes on.
    pub(crate) fn set(&self, next: u64) {
        self.next.fetch_max(next, Ordering::AcqRel);
    }

    /// Whether that is to be noted: who is told so must do it.
    pub(crate) fn go_on(&self, next: u64) -> bool {
        self.set(next);
        !self.noted.swap(true, Ordering::AcqRel)
    }

    /// What is to be stored. Whoever goes on after this notes it anew.
    pub(super) fn take(&self) -> u64 {
        self.forget();
        self.next.load(Ordering::Acquire)
    }

    /// No note waits any more.
    pub(super) fn forget(&self) {
        self.noted.swap(false, Ordering::AcqRel);
    }
}

/// One change. What is handed over together is stored together or not at all.
#[derive(Debug)]
pub(crate) enum Change {
    /// A channel is made, unless it is there; its sequences begin at one.
    Channel {
        /// Its number.
        id: u32,
        /// Its pattern, as a number.
        kind: u8,
        /// Its name.
        name: String,
    },
    /// A channel and everything in it goes.
    RemoveChannel(u32),
    /// The first sequence of a channel that was never used.
    Next {
        /// The channel.
        channel: u32,
        /// The sequence.
        sequence: u64,
    },
    /// A message is put at its place.
    Put(Key, Vec<u8>),
    /// A message goes, with so many bytes.
    Remove(Key, usize),
    /// Everything from a place to another goes, without the second one.
    RemoveRange {
        /// The first place.
        from: Key,
        /// The place after the last one.
        to: Key,
    },
    /// A message waits for its time.
    Delay {
        /// Its own number.
        id: u64,
        /// The channel.
        channel: u32,
        /// Nanoseconds since the Unix epoch.
        due: i64,
        /// The message.
        value: Vec<u8>,
    },
    /// A delayed message has had its time; refused when it has had it already.
    Undelay(u64),
    /// Where a reader goes on.
    Position {
        /// The channel.
        channel: u32,
        /// The reader.
        reader: String,
        /// The next sequence.
        place: Arc<Place>,
        /// Nanoseconds since the Unix epoch.
        seen: i64,
    },
    /// A reader was there.
    Seen {
        /// The channel.
        channel: u32,
        /// The reader.
        reader: String,
        /// Nanoseconds since the Unix epoch.
        seen: i64,
    },
    /// Where a reader was is forgotten.
    RemovePosition {
        /// The channel.
        channel: u32,
        /// The reader.
        reader: String,
    },
}

/// A channel as it was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredChannel {
    /// Its number.
    pub(crate) id: u32,
    /// Its pattern, as a number.
    pub(crate) kind: u8,
    /// Its name.
    pub(crate) name: String,
    /// The first sequence that was never used.
    pub(crate) next: u64,
    /// Messages in it.
    pub(crate) count: u64,
    /// Bytes of them.
    pub(crate) bytes: u64,
    /// Delayed messages for it.
    pub(crate) delayed: u64,
    /// The first one's sequence.
    pub(crate) first: Option<u64>,
}

/// A delayed message as it was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredDelay {
    /// Its own number.
    pub(crate) id: u64,
    /// The channel.
    pub(crate) channel: u32,
    /// Nanoseconds since the Unix epoch.
    pub(crate) due: i64,
    /// The message, unless it is damaged.
    pub(crate) value: Option<Vec<u8>>,
}
