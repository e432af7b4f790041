//! What was answered, and what came.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU8, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::time::sleep;

/// Messages that wait for a handler; then senders wait, so that the end is not far.
const WAITING: usize = 3000;
/// Where what is moved may be.
const PLACES: [&str; 4] = ["inbox", "requeued", "resent", "changed"];

/// A message that is rejected at each delivery.
pub(crate) fn fails(body: &str) -> bool {
    body.starts_with("bad")
}

/// A message that goes from one queue to another.
pub(crate) fn is_moved(body: &str) -> bool {
    body.starts_with("move")
}

#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
#[repr(u8)]
pub(crate) enum Phase {
    Loads,
    /// Nothing more is sent or moved.
    Drains,
    Ends,
}

#[derive(Debug, Default)]
pub(crate) struct Ledger {
    phase: AtomicU8,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Messages whose sending was answered.
    pub(crate) accepted: BTreeSet<String>,
    /// Those of them that are to be handled.
    wanted: usize,
    /// Deliveries of what was to be handled.
    pub(crate) handled: BTreeMap<String, u32>,
    /// When it was answered that they are acknowledged.
    acknowledged: HashMap<String, Instant>,
    /// They came again all the same.
    pub(crate) undone: BTreeSet<String>,
    /// To where they were moved, when that was answered.
    pub(crate) moved: BTreeMap<String, &'static str>,
    /// What was in other queues in the end.
    pub(crate) found: BTreeMap<&'static str, BTreeMap<String, u32>>,
    /// Events whose storing was answered.
    pub(crate) stored: BTreeSet<String>,
    /// Sequences of events that the reader was given.
    pub(crate) read: BTreeMap<u64, u32>,
    /// When something came.
    last: Option<Instant>,
}

impl Counts {
    /// Whether a message came to where it should go.
    pub(crate) fn came(&self, body: &str) -> bool {
        if is_moved(body) {
            PLACES.iter().any(|queue| self.is_in(queue, body))
        } else if fails(body) {
            self.is_in("letters", body)
        } else {
            self.handled.contains_key(body)
        }
    }

    pub(crate) fn is_in(&self, queue: &str, body: &str) -> bool {
        self.found.get(queue).is_some_and(|found| found.contains_key(body))
    }

    /// In how many places each moved message is.
    pub(crate) fn places(&self) -> BTreeMap<String, u32> {
        let mut places = BTreeMap::new();
        for (body, times) in PLACES.iter().filter_map(|queue| self.found.get(queue)).flatten() {
            *places.entry(body.clone()).or_default() += times;
        }
        places
    }
}

impl Ledger {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap()
    }

    pub(crate) fn go(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
    }

    /// Whether a phase has not ended.
    pub(crate) fn is(&self, phase: Phase) -> bool {
        self.phase.load(Ordering::Relaxed) <= phase as u8
    }

    pub(crate) fn accept(&self, body: String) {
        let mut counts = self.lock();
        counts.wanted += usize::from(!is_moved(&body) && !fails(&body));
        counts.accepted.insert(body);
    }

    /// Messages and events so far.
    pub(crate) fn load(&self) -> usize {
        let counts = self.lock();
        counts.accepted.len().min(counts.stored.len())
    }

    /// Whether there was some of everything.
    pub(crate) fn is_loaded(&self) -> bool {
        let counts = self.lock();
        counts.accepted.len() > 200 && counts.stored.len() > 100 && counts.moved.len() > 20 && counts.read.len() > 50
    }

    /// Waits a moment, and until not too much waits for a handler.
    pub(crate) async fn pace(&self, moment: Duration) {
        loop {
            sleep(moment).await;
            let counts = self.lock();
            if counts.wanted < counts.handled.len() + WAITING {
                return;
            }
            drop(counts);
            if !self.is(Phase::Loads) {
                return;
            }
        }
    }

    /// A delivery, on a stream that was opened at a time: nothing that was acknowledged before.
    pub(crate) fn handle(&self, body: &str, opened: Instant) {
        let mut counts = self.lock();
        if counts.acknowledged.get(body).is_some_and(|answered| *answered < opened) {
            counts.undone.insert(body.to_owned());
        }
        *counts.handled.entry(body.to_owned()).or_default() += 1;
        counts.last = Some(Instant::now());
    }

    pub(crate) fn acknowledge(&self, bodies: impl IntoIterator<Item = String>) {
        let now = Instant::now();
        self.lock().acknowledged.extend(bodies.into_iter().map(|body| (body, now)));
    }

    pub(crate) fn find(&self, queue: &'static str, body: String) {
        let mut counts = self.lock();
        *counts.found.entry(queue).or_default().entry(body).or_default() += 1;
        counts.last = Some(Instant::now());
    }

    /// How long nothing has come.
    pub(crate) fn silent(&self) -> Duration {
        self.lock().last.map_or(Duration::ZERO, |last| last.elapsed())
    }

    /// Whether the reader is beyond the last event.
    pub(crate) fn has_read(&self, stored: &BTreeMap<u64, String>) -> bool {
        self.lock().read.last_key_value().map(|(sequence, _)| sequence) >= stored.last_key_value().map(|(last, _)| last)
    }
}
