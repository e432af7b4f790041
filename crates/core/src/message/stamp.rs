//! When a message was made, and the id that follows from it.

use std::{cell::Cell, num::NonZeroU64, time::SystemTime};

use uuid::Uuid;

use crate::clock;

thread_local! {
    /// The last tick of the coarse clock that this thread has seen, and what its next message is stamped with in that tick.
    static TICK: Cell<Option<(clock::Tick, Stamp)>> = const { Cell::new(None) };
}

/// A moment. What the clock gives is converted once for id and time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stamp {
    /// Since 1970; 0 where that cannot be told.
    nanos: u64,
    /// The first half of a UUIDv7: milliseconds, version, and the quarter of a microsecond (section 6.2, method 3).
    id: u64,
    /// Of which the second half takes 62 bits.
    random: u64,
}

impl Stamp {
    /// The time of the first message of a tick is exact. Those that the same thread makes within the tick have its time, and ids
    /// that come after: reading the exact clock for each would be a quarter of what a message costs in memory.
    #[inline]
    pub(crate) fn now() -> Self {
        let Some(tick) = clock::tick() else { return SystemTime::now().into() };
        let mut next = match TICK.get() {
            Some((last, next)) if last == tick => next,
            _ => SystemTime::now().into(),
        };
        let now = next.take();
        TICK.set(Some((tick, next)));
        now
    }

    /// For many that are [taken](Self::take) from it: with a random number of its own, because what follows that of `now` is given to
    /// the next one of this thread.
    #[inline]
    pub(crate) fn for_many() -> Self {
        // What is stamped next comes after all of them.
        TICK.set(None);
        SystemTime::now().into()
    }

    /// Nanoseconds since 1970, where that can be told.
    #[inline]
    pub(super) fn nanos(self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.nanos)
    }

    /// The UUIDv7 of this moment (RFC 9562, section 5.7).
    #[inline]
    pub(super) fn uuid(self) -> Uuid {
        Uuid::from_u64_pair(self.id, (0b10 << 62) | (self.random >> 2))
    }

    /// The same moment for another message, whose id comes after (RFC 9562, section 6.2, method 2).
    #[inline]
    pub(crate) fn take(&mut self) -> Self {
        let next = Self { random: self.random.wrapping_add(1 << 2), ..*self };
        std::mem::replace(self, next)
    }
}

impl From<SystemTime> for Stamp {
    #[inline]
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let nanos = since.as_secs().checked_mul(1_000_000_000);
        let nanos = nanos.and_then(|nanos| nanos.checked_add(u64::from(since.subsec_nanos()))).unwrap_or(0);
        let (millis, rest) = (nanos / 1_000_000, nanos % 1_000_000);
        // The generator is seeded by the operating system once a thread.
        Self { nanos, id: (millis << 16) | (7 << 12) | ((rest << 12) / 1_000_000), random: fastrand::u64(..) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However single messages and batches of a thread follow each other, no id is given twice.
    #[test]
    fn no_id_is_given_twice() {
        let mut ids = std::collections::HashSet::new();
        for round in 0..10_000 {
            let mut many = Stamp::for_many();
            assert!((0..round % 7).all(|_| ids.insert(many.take().uuid())), "of a batch");
            assert!((0..round % 5).all(|_| ids.insert(Stamp::now().uuid())), "of single ones");
        }
    }

    /// Ids of a thread are in the order of its messages, and their times neither go back nor stay behind.
    #[test]
    fn stamps_of_a_thread_go_on() {
        let mut last = Stamp::now();
        for _ in 0..1_000_000 {
            let next = Stamp::now();
            assert!(next.uuid() > last.uuid() && next.nanos >= last.nanos, "{last:?}, then {next:?}");
            last = next;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        let (before, now) = (Stamp::from(SystemTime::now()), Stamp::now());
        assert!(now.nanos >= before.nanos, "{now:?} is behind {before:?}");
    }
}
