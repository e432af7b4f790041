//! How many messages were sent to each channel, and what became of them.
//!
//! A message counts once, when its sender has its answer, however often it was tried. What polymq itself sends beside it is
//! not here: copies for another attempt and dead letters are counted by their subscription
//! ([`RouteStats`](crate::RouteStats)).

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{Address, Error, Result, Retry};

/// Channels that have counters of their own. A program may use a name for each of its customers; those after so many
/// names are counted together.
const MOST_CHANNELS: usize = 1000;
/// What the channels after [`MOST_CHANNELS`] are counted as, and those whose name no backend takes.
const OTHERS: &str = "polymq-others";
/// What the queues of those who asked are counted as: each has a name that is used once.
const REPLIES: &str = "polymq-replies";

/// What became of the messages that were given to one channel since the bus was connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct SendStats {
    /// Messages that the broker has accepted.
    pub accepted: u64,
    /// Messages that certainly were not sent: refused, by polymq or by the broker, or not sent in time.
    pub failed: u64,
    /// Messages that may have been sent: no answer came, or the sender did not wait for it.
    pub unknown: u64,
}

impl std::ops::AddAssign for SendStats {
    fn add_assign(&mut self, other: Self) {
        self.accepted += other.accepted;
        self.failed += other.failed;
        self.unknown += other.unknown;
    }
}

/// The counters of one channel.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    accepted: AtomicU64,
    failed: AtomicU64,
    unknown: AtomicU64,
}

impl Counters {
    #[inline]
    pub(super) fn count<T>(&self, answer: &Result<T>) {
        match answer {
            Ok(_) => drop(self.accepted.fetch_add(1, Ordering::Relaxed)),
            Err(error) => self.count_error(error),
        }
    }

    pub(super) fn count_all<T>(&self, answers: &[Result<T>]) {
        let mut accepted = answers.len() as u64;
        for error in answers.iter().filter_map(|answer| answer.as_ref().err()) {
            accepted -= 1;
            self.count_error(error);
        }
        if accepted > 0 {
            self.accepted.fetch_add(accepted, Ordering::Relaxed);
        }
    }

    #[cold]
    pub(super) fn count_error(&self, error: &Error) {
        match error.retry() {
            Retry::UnknownOutcome => self.count_unknown(1),
            Retry::Never | Retry::Now | Retry::After(_) => drop(self.failed.fetch_add(1, Ordering::Relaxed)),
        }
    }

    pub(super) fn count_unknown(&self, count: u64) {
        self.unknown.fetch_add(count, Ordering::Relaxed);
    }

    /// A message that will be counted by its answer, or as unknown when the sender goes away before.
    pub(super) fn pending(&self) -> Pending<'_> {
        Pending(Some(self))
    }

    pub(super) fn now(&self) -> SendStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SendStats { accepted: read(&self.accepted), failed: read(&self.failed), unknown: read(&self.unknown) }
    }
}

/// A message whose answer is awaited.
pub(super) struct Pending<'a>(Option<&'a Counters>);

impl Pending<'_> {
    pub(super) fn answered<T>(mut self, answer: Result<T>) -> Result<T> {
        if let Some(counters) = self.0.take() {
            counters.count(&answer);
        }
        answer
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(counters) = self.0 {
            counters.count_unknown(1);
        }
    }
}

/// The counters of a bus.
#[derive(Debug, Default)]
pub(crate) struct Sent(Mutex<BTreeMap<Address, Arc<Counters>>>);

impl Sent {
    pub(super) fn to(&self, address: &Address) -> Arc<Counters> {
        let mut known = self.lock();
        if let Some(counters) = known.get(address) {
            return Arc::clone(counters);
        }
        let own = known.len() < MOST_CHANNELS && address.check().is_ok();
        Arc::clone(known.entry(if own { address.clone() } else { Address::queue(OTHERS) }).or_default())
    }

    pub(super) fn replies(&self) -> Arc<Counters> {
        Arc::clone(self.lock().entry(Address::queue(REPLIES)).or_default())
    }

    /// Those of the channels that something was sent to.
    pub(crate) fn all(&self) -> BTreeMap<Address, SendStats> {
        let stats = self.lock().iter().map(|(address, counters)| (address.clone(), counters.now())).collect();
        let mut stats: BTreeMap<_, _> = stats;
        stats.retain(|_, stats| *stats != SendStats::default());
        stats
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Address, Arc<Counters>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_end_do_not_make_counters_without_end() {
        let sent = Sent::default();
        for n in 0..MOST_CHANNELS + 500 {
            sent.to(&Address::queue(format!("of-customer-{n}"))).count(&Ok(()));
        }
        sent.to(&Address::queue("of-customer-1")).count(&Ok(()));
        let stats = sent.all();
        assert_eq!(stats.len(), MOST_CHANNELS + 1);
        let accepted = |name: &str| stats[&Address::queue(name)].accepted;
        assert_eq!((accepted("of-customer-0"), accepted("of-customer-1"), accepted(OTHERS)), (1, 2, 500));
    }
}
