//! Stored events: an ordered log a channel, read by subscribers from where they want or where they were.
//!
//! A reader copies from the disk and waits for what is stored next, so replay and live events are one sequence without
//! gap or duplicate, and a slow reader costs no memory. Where a reader is, is kept by its client id or its group.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use polymq_kubemq_proto::{Event, EventReceive, Subscribe, subscribe::EventsStoreType};
use prost::Message as _;
use tokio::sync::{oneshot, watch};

use crate::{
    limits::Limits,
    names,
    queue::now,
    queues::Numbers,
    refusal::Refusal,
    retention::{self, Kept},
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
    /// The next sequence to give. Held while an event is handed to the store.
    next: Mutex<u64>,
    /// Everything before it is on disk.
    stored: watch::Sender<u64>,
    /// Members of a group share one cursor; the names of who reads without one.
    readers: Mutex<Readers>,
    /// How much there is, for retention.
    pub(crate) kept: Kept,
}

#[derive(Debug, Default)]
struct Readers {
    alone: HashSet<String>,
    groups: HashMap<String, Arc<tokio::sync::Mutex<u64>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Log {
    fn new(store: Store, stored: StoredChannel) -> Self {
        Self {
            kept: Kept::new(&stored),
            id: stored.id,
            name: stored.name,
            store,
            next: Mutex::new(stored.next),
            stored: watch::Sender::new(stored.next),
            readers: Mutex::default(),
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
            self.store.commit(changes, Some(admitted), move |result| {
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

    /// Events that were stored since the channel was made.
    pub(crate) fn count(&self) -> u64 {
        *self.stored.borrow() - 1
    }

    /// The sequence from which a first subscription reads.
    fn start(&self, subscribe: &Subscribe) -> Result<u64, Refusal> {
        let value = subscribe.events_store_type_value;
        let end = *self.stored.borrow();
        let positive = |refusal: Refusal| if value > 0 { Ok(value) } else { Err(refusal) };
        Ok(match subscribe.events_store_type_data() {
            EventsStoreType::Undefined => return Err(Refusal::no_start()),
            EventsStoreType::StartNewOnly => end,
            EventsStoreType::StartFromFirst => 1,
            EventsStoreType::StartFromLast => self.store.last(self.id)?.unwrap_or(end),
            EventsStoreType::StartAtSequence => positive(Refusal::start_sequence())?.unsigned_abs(),
            EventsStoreType::StartAtTime => self.at(1, nanoseconds(positive(Refusal::start_time())?))?,
            EventsStoreType::StartAtTimeDelta => {
                let back = positive(Refusal::start_delta())?.saturating_mul(1_000_000_000);
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
    async fn wait(&self, from: u64) -> Result<Vec<EventReceive>, StoreError> {
        let mut stored = self.stored.subscribe();
        loop {
            if *stored.borrow_and_update() > from {
                let found = self.events(from, PAGE.0)?;
                if !found.is_empty() {
                    return Ok(found);
                }
            }
            if stored.changed().await.is_err() {
                return Err(StoreError::Closed);
            }
        }
    }
}

/// A subscription to a log.
#[derive(Debug)]
pub(crate) struct Reader {
    log: Arc<Log>,
    /// By what its position is kept.
    name: String,
    alone: bool,
    cursor: Arc<tokio::sync::Mutex<u64>>,
}

impl Reader {
    /// Hands events over in order; `give` tells whether the subscriber took them. A position counts as reached when it did.
    pub(crate) async fn read<F, G>(&self, mut give: F) -> Result<(), StoreError>
    where
        F: FnMut(EventReceive) -> G,
        G: Future<Output = bool>,
    {
        loop {
            let from = *self.cursor.lock().await;
            let waits = self.log.wait(from).await?;
            // Members of a group take turns, an event each, so that they share.
            for event in waits {
                let mut cursor = self.cursor.lock().await;
                if event.sequence < *cursor {
                    continue;
                }
                let next = event.sequence + 1;
                if !give(event).await {
                    return Ok(());
                }
                *cursor = next;
                let position = Change::Position { channel: self.log.id, reader: self.name.clone(), next };
                self.log.store.commit(vec![position], None, drop);
                drop(cursor);
                if !self.alone {
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut readers = lock(&self.log.readers);
        if self.alone {
            readers.alone.remove(&self.name);
        } else if Arc::strong_count(&self.cursor) == 2 {
            // The list's and ours: the last member goes.
            readers.groups.remove(&self.name);
        }
    }
}

/// Every log by its name.
#[derive(Debug)]
pub(crate) struct Logs {
    store: Store,
    limits: Limits,
    numbers: Arc<Numbers>,
    logs: Mutex<HashMap<String, Arc<Log>>>,
}

impl Logs {
    pub(crate) fn open(store: Store, limits: Limits, numbers: Arc<Numbers>, stored: Vec<StoredChannel>) -> Self {
        let logs = stored
            .into_iter()
            .filter(|channel| channel.kind == EVENTS_STORE)
            .map(|channel| (channel.name.clone(), Arc::new(Log::new(store.clone(), channel))))
            .collect();
        Self { store, limits, numbers, logs: Mutex::new(logs) }
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
        let id = self.numbers.next();
        self.store.commit(vec![Change::Channel { id, kind: EVENTS_STORE, name: name.to_owned() }], None, drop);
        let stored =
            StoredChannel { id, kind: EVENTS_STORE, name: name.to_owned(), next: 1, count: 0, bytes: 0, first: None };
        let log = Arc::new(Log::new(self.store.clone(), stored));
        logs.insert(name.to_owned(), Arc::clone(&log));
        Ok(log)
    }

    /// Removes a log with everything in it; `false` when there is none.
    pub(crate) async fn remove(&self, name: &str) -> Result<bool, StoreError> {
        let Some(log) = lock(&self.logs).remove(name) else { return Ok(false) };
        self.store.store(vec![Change::RemoveChannel(log.id)]).await?;
        Ok(true)
    }

    /// Every log, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Log>> {
        let mut all: Vec<_> = lock(&self.logs).values().map(Arc::clone).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }

    /// Lets go what has had its time, until the broker stops.
    pub(crate) async fn keep_time(&self) {
        loop {
            tokio::time::sleep(retention::EVERY).await;
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
    pub(crate) fn subscribe(&self, subscribe: &Subscribe) -> Result<Reader, Refusal> {
        if subscribe.client_id.is_empty() {
            return Err(Refusal::no_client());
        }
        names::check_stored(&subscribe.channel)?;
        names::check_client(&subscribe.client_id, &subscribe.group)?;
        let log = self.get(&subscribe.channel)?;
        let start = log.start(subscribe)?;
        let alone = subscribe.group.is_empty();
        let name = if alone { format!("client {}", subscribe.client_id) } else { format!("group {}", subscribe.group) };
        let next = log.store.position(log.id, &name)?.unwrap_or(start);
        let mut readers = lock(&log.readers);
        let cursor = if alone {
            if !readers.alone.insert(name.clone()) {
                return Err(Refusal::because("stan: clientID already registered"));
            }
            Arc::new(tokio::sync::Mutex::new(next))
        } else {
            let cursor = readers.groups.entry(name.clone());
            Arc::clone(cursor.or_insert_with(|| Arc::new(tokio::sync::Mutex::new(next))))
        };
        drop(readers);
        // Where a new reader begins is remembered at once: "new only" means from now on, also when it comes back.
        let position = Change::Position { channel: log.id, reader: name.clone(), next };
        self.store.commit(vec![position], None, drop);
        Ok(Reader { log, name, alone, cursor })
    }
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
