//! Stored events: an ordered log a channel, read by subscribers from where they want or where they were.
//!
//! A reader copies from the disk and waits for what is stored next, so replay and live events are one sequence without
//! gap or duplicate, and a slow reader costs no memory. Where a reader is, is kept by its client id or its group.

#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use polymq_kubemq_proto::{Event, EventReceive, Subscribe, subscribe::EventsStoreType};
use prost::Message as _;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    limits::Limits,
    names,
    numbers::Numbers,
    queue::now,
    readers::{self, Reader, Readers},
    refusal::Refusal,
    retention::{self, Kept},
    row::Row,
    store::{Change, Key, Store, StoreError, StoredChannel},
};

/// The pattern "events store" in the store.
pub(crate) const EVENTS_STORE: u8 = 2;
/// Events and bytes that a reader takes from the disk at once.
const PAGE: (usize, usize) = (256, 1 << 20);

#[derive(Debug)]
pub(crate) struct Log {
    pub(crate) id: u32,
    pub(crate) name: String,
    store: Store,
    pub(crate) row: Row,
    /// The next sequence to give. Held while an event is handed to the store.
    next: Mutex<u64>,
    /// Everything before it is on disk.
    stored: watch::Sender<u64>,
    /// It was deleted: who reads it is told.
    gone: CancellationToken,
    pub(crate) readers: Mutex<Readers>,
    /// How much there is, for retention.
    pub(crate) kept: Kept,
    /// Held by who removes the oldest ones.
    pub(crate) steps: Arc<tokio::sync::Mutex<()>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    fn new(store: Store, row: Row, stored: StoredChannel) -> Self {
        Self {
            kept: Kept::new(&stored),
            id: stored.id,
            name: stored.name,
            store,
            row,
            next: Mutex::new(stored.next),
            stored: watch::Sender::new(stored.next),
            gone: CancellationToken::new(),
            readers: Mutex::default(),
            steps: Arc::default(),
        }
    }

    /// Hands an event to the store: events are stored in the order of these calls, when each is awaited before the next.
    /// What it gives answers when the event is on disk.
    pub(crate) async fn append(
        self: &Arc<Self>,
        event: Event,
    ) -> Result<oneshot::Receiver<Result<(), StoreError>>, StoreError> {
        let admitted = self.store.admit(event.encoded_len()).await?;
        let (done, waits) = oneshot::channel();
        {
            let mut next = lock(&self.next);
            let sequence = *next;
            *next += 1;
            let received = EventReceive {
                event_id: event.event_id,
                channel: event.channel,
                metadata: event.metadata,
                body: event.body,
                timestamp: now(),
                sequence,
                tags: event.tags,
            };
            let value = received.encode_to_vec();
            let size = value.len();
            let changes = vec![
                Change::Put(Key::new(self.id, sequence), value),
                Change::Next { channel: self.id, sequence: sequence + 1 },
            ];
            let log = Arc::clone(self);
            self.row.commit(&self.store, changes, Some(admitted), move |result| {
                if result.is_ok() {
                    log.kept.add(size);
                    log.stored.send_replace(sequence + 1);
                }
                let _ = done.send(result);
            });
        }
        Ok(waits)
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Whether somebody reads under a name at present.
    pub(crate) fn is_read_by(&self, reader: &str) -> bool {
        lock(&self.readers).has(reader)
    }

    /// Whether it was deleted.
    pub(crate) fn is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }

    /// Events that were stored since the channel was made.
    pub(crate) fn count(&self) -> u64 {
        *self.stored.borrow() - 1
    }

    /// The sequence from which a first subscription reads, which was checked.
    fn start(&self, subscribe: &Subscribe) -> Result<u64, StoreError> {
        let value = subscribe.events_store_type_value;
        let end = *self.stored.borrow();
        Ok(match subscribe.events_store_type_data() {
            EventsStoreType::Undefined | EventsStoreType::StartNewOnly => end,
            EventsStoreType::StartFromFirst => 1,
            EventsStoreType::StartFromLast => self.store.last(self.id)?.unwrap_or(end),
            // Beyond the end is the end: a reader of a channel that was deleted and made anew asks for that.
            EventsStoreType::StartAtSequence => value.unsigned_abs().min(end),
            EventsStoreType::StartAtTime => self.at(1, nanoseconds(value))?,
            EventsStoreType::StartAtTimeDelta => {
                let back = value.saturating_mul(1_000_000_000);
                self.at(1, now().saturating_sub(back))?
            }
        })
    }

    /// The first event from a sequence on that is not older than a time. Times grow with sequences, so the middle tells
    /// the half.
    pub(crate) fn at(&self, mut from: u64, time: i64) -> Result<u64, StoreError> {
        let mut to = *self.stored.borrow();
        while from < to {
            let middle = from + (to - from) / 2;
            match self.events(middle, 1)?.first() {
                Some(event) if event.timestamp < time => from = event.sequence + 1,
                _ => to = middle,
            }
        }
        Ok(from)
    }

    pub(crate) fn events(&self, from: u64, most: usize) -> Result<Vec<EventReceive>, StoreError> {
        let found = self.store.read(self.id, from, most, PAGE.1)?;
        Ok(found
            .into_iter()
            .filter_map(|(sequence, value)| match EventReceive::decode(&*value) {
                Ok(event) => Some(event),
                Err(cause) => {
                    tracing::error!(channel = self.name, sequence, %cause, "a stored event cannot be read; it is passed over");
                    None
                }
            })
            .collect())
    }

    /// Waits until there are events from a sequence on.
    ///
    /// # Errors
    ///
    /// It cannot be read, was deleted, or nothing is stored any more.
    pub(crate) async fn wait(&self, from: u64) -> Result<Vec<EventReceive>, StoreError> {
        let mut stored = self.stored.subscribe();
        loop {
            if let Some(cause) = self.store.failed() {
                return Err(cause.clone());
            }
            let end = *stored.borrow_and_update();
            if end > from {
                let mut found = self.events(from, PAGE.0)?;
                // Written and not synced yet: a power cut could still undo it.
                found.retain(|event| event.sequence < end);
                if !found.is_empty() {
                    return Ok(found);
                }
            }
            tokio::select! {
                _ = stored.changed() => {}
                () = self.gone.cancelled() => return Err(StoreError::Gone),
                cause = self.store.failure() => return Err(cause),
            }
        }
    }
}

/// Every log by its name.
#[derive(Debug)]
pub(crate) struct Logs {
    store: Store,
    limits: Limits,
    numbers: Arc<Numbers>,
    logs: Arc<Mutex<HashMap<String, Arc<Log>>>>,
}

impl Logs {
    pub(crate) fn open(store: Store, limits: Limits, numbers: Arc<Numbers>, stored: Vec<StoredChannel>) -> Self {
        let logs = stored
            .into_iter()
            .filter(|channel| channel.kind == EVENTS_STORE)
            .map(|channel| {
                (channel.name.clone(), Arc::new(Log::new(store.clone(), Row::of(&channel, &numbers), channel)))
            })
            .collect();
        Self { store, limits, numbers, logs: Arc::new(Mutex::new(logs)) }
    }

    /// The log of a name; it is made when there is none, up to the limit of channels.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<Log>, Refusal> {
        let mut logs = lock(&self.logs);
        if let Some(log) = logs.get(name) {
            return Ok(Arc::clone(log));
        }
        if logs.len() >= self.limits.channels {
            return Err(Refusal::channels(self.limits.channels));
        }
        let (row, channel) = Row::make(&self.store, self.numbers.next()?, EVENTS_STORE, name);
        let log = Arc::new(Log::new(self.store.clone(), row, channel));
        logs.insert(name.to_owned(), Arc::clone(&log));
        Ok(log)
    }

    /// Removes a log with everything in it; `false` when there is none. It has its name until that is on disk, so that no
    /// other one can be stored before.
    pub(crate) async fn remove(&self, name: &str) -> Result<bool, StoreError> {
        let Some(log) = lock(&self.logs).get(name).cloned() else { return Ok(false) };
        retention::remove_much(&log).await?;
        let (done, waits) = oneshot::channel();
        let logs = Arc::clone(&self.logs);
        log.row.clone().remove(&self.store, move |result| {
            let mut all = lock(&logs);
            if result.is_ok() && all.get(&log.name).is_some_and(|found| Arc::ptr_eq(found, &log)) {
                all.remove(&log.name);
            }
            drop(all);
            if result.is_ok() {
                log.gone.cancel();
            }
            let _ = done.send(result);
        });
        waits.await.unwrap_or(Err(StoreError::Closed))?;
        Ok(true)
    }

    /// Every log, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Log>> {
        let mut all: Vec<_> = lock(&self.logs).values().map(Arc::clone).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }

    /// The log of a name, when there is one.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Log>> {
        lock(&self.logs).get(name).cloned()
    }

    /// Stores where every reader is, as the broker stops.
    pub(crate) async fn end_readers(&self) {
        for log in self.all() {
            readers::end(&log).await;
        }
    }

    /// Lets go what has had its time, until the broker stops.
    pub(crate) async fn keep_time(&self) {
        let (started, mut looked) = (Instant::now(), Instant::now());
        loop {
            tokio::time::sleep(retention::EVERY).await;
            if let Some(age) = self.limits.reader_age
                && looked.elapsed() >= readers::often(age)
            {
                looked = Instant::now();
                if let Err(cause) = readers::forget_old(&self.store, &self.all(), age, started.elapsed()) {
                    tracing::error!(%cause, "readers that did not come back cannot be forgotten; trying again");
                }
            }
            for log in self.all() {
                match retention::trim(&log, &self.limits).await {
                    Ok(()) => {}
                    Err(StoreError::Closed) => return,
                    Err(cause) => {
                        tracing::error!(channel = log.name, %cause, "old events cannot be removed; trying again")
                    }
                }
            }
        }
    }

    /// Subscribes: where its client or its group was, else where it asks.
    pub(crate) async fn subscribe(&self, subscribe: &Subscribe) -> Result<Reader, Refusal> {
        if subscribe.client_id.is_empty() {
            return Err(Refusal::no_client());
        }
        names::check_stored(&subscribe.channel)?;
        names::check_client(&subscribe.client_id, &subscribe.group)?;
        // Before a channel is made for it.
        check_start(subscribe)?;
        let log = self.get(&subscribe.channel)?;
        let start = log.start(subscribe)?;
        Reader::begin(log, readers::name(&subscribe.client_id, &subscribe.group), start).await
    }
}

/// Checks where a subscription wants to begin.
fn check_start(subscribe: &Subscribe) -> Result<(), Refusal> {
    let refusal = match subscribe.events_store_type_data() {
        EventsStoreType::Undefined => return Err(Refusal::no_start()),
        EventsStoreType::StartNewOnly | EventsStoreType::StartFromFirst | EventsStoreType::StartFromLast => {
            return Ok(());
        }
        EventsStoreType::StartAtSequence => Refusal::start_sequence(),
        EventsStoreType::StartAtTime => Refusal::start_time(),
        EventsStoreType::StartAtTimeDelta => Refusal::start_delta(),
    };
    if subscribe.events_store_type_value > 0 { Ok(()) } else { Err(refusal) }
}

/// A time as nanoseconds: SDKs send seconds, milliseconds, microseconds or nanoseconds, which their size tells apart.
fn nanoseconds(value: i64) -> i64 {
    let scale = if value < 100_000_000_000 {
        Duration::from_secs(1)
    } else if value < 100_000_000_000_000 {
        Duration::from_millis(1)
    } else if value < 100_000_000_000_000_000 {
        Duration::from_micros(1)
    } else {
        Duration::from_nanos(1)
    };
    value.saturating_mul(i64::try_from(scale.as_nanos()).unwrap_or(1))
}
