//! Who reads stored events: where each reader is, and for how long that is remembered when it does not come back.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use polymq_kubemq_proto::EventReceive;
use tokio::sync::oneshot;

use crate::{
    log::{Log, lock},
    queue::now,
    refusal::Refusal,
    store::{Change, Place, Store, StoreError},
};

/// How long readers that are beyond their time may take to come back after the broker was started.
const GRACE: Duration = Duration::from_secs(3600);

/// By what a position is kept: by the group, or by the client when it reads without one.
pub(crate) fn name(client: &str, group: &str) -> String {
    if group.is_empty() { format!("client {client}") } else { format!("group {group}") }
}

/// Who reads a log at present.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    alone: HashSet<String>,
    groups: HashMap<String, Group>,
}

/// Of a group that is there.
#[derive(Debug, Default)]
struct Group {
    members: usize,
    /// They share it.
    cursor: Cursor,
}

/// Where a reader is.
#[derive(Debug, Clone, Default)]
struct Cursor {
    /// The next sequence; 0 while nobody has looked where the reader was.
    next: Arc<tokio::sync::Mutex<u64>>,
    /// What is stored of it.
    place: Arc<Place>,
}

impl Readers {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.alone.contains(name) || self.groups.contains_key(name)
    }
}

/// A subscription to a log.
#[derive(Debug)]
pub(crate) struct Reader {
    log: Arc<Log>,
    name: String,
    cursor: Cursor,
    /// What was read from the disk and not given yet.
    ahead: VecDeque<EventReceive>,
}

impl Reader {
    /// Where the reader was, else at a first sequence.
    pub(crate) async fn begin(log: Arc<Log>, name: String, start: u64) -> Result<Self, Refusal> {
        let cursor = {
            let mut readers = lock(&log.readers);
            if !name.starts_with("client ") {
                let group = readers.groups.entry(name.clone()).or_default();
                group.members += 1;
                group.cursor.clone()
            } else if readers.alone.insert(name.clone()) {
                Cursor::default()
            } else {
                return Err(Refusal::because("stan: clientID already registered"));
            }
        };
        let reader = Self { log, name, cursor, ahead: VecDeque::new() };
        reader.look(start).await?;
        Ok(reader)
    }

    /// From here on nobody else reads under this name: what was noted of it before is looked at when it is written.
    async fn look(&self, start: u64) -> Result<(), StoreError> {
        let store = self.log.store();
        let mut cursor = self.cursor.next.lock().await;
        if *cursor == 0 {
            store.written().await?;
            *cursor = store.position(self.log.id, &self.name)?.unwrap_or(start);
            // Where a new reader begins is remembered at once: "new only" means from now on, also when it comes back.
            self.cursor.place.set(*cursor);
            store.commit(vec![self.position()], None, drop);
        }
        Ok(())
    }

    fn position(&self) -> Change {
        let place = Arc::clone(&self.cursor.place);
        Change::Position { channel: self.log.id, reader: self.name.clone(), place, seen: now() }
    }

    #[cfg(test)]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    fn is_alone(&self) -> bool {
        self.name.starts_with("client ")
    }

    /// The next event, which counts as delivered from then on. Dropped, it has taken none.
    ///
    /// # Errors
    ///
    /// The log cannot be read, or is deleted.
    pub(crate) async fn next(&mut self) -> Result<EventReceive, StoreError> {
        loop {
            if self.ahead.is_empty() {
                let from = *self.cursor.next.lock().await;
                self.ahead = self.log.wait(from).await?.into();
            }
            // Members of a group take turns, an event each, so that they share.
            if !self.is_alone() {
                tokio::task::yield_now().await;
            }
            let mut cursor = self.cursor.next.lock().await;
            while let Some(event) = self.ahead.pop_front() {
                if event.sequence >= *cursor {
                    *cursor = event.sequence + 1;
                    self.log.store().note_place(&self.cursor.place, *cursor, || self.position());
                    return Ok(event);
                }
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut readers = lock(&self.log.readers);
        if self.is_alone() {
            readers.alone.remove(&self.name);
        } else if let Some(group) = readers.groups.get_mut(&self.name) {
            group.members -= 1;
            if group.members == 0 {
                readers.groups.remove(&self.name);
            }
        }
        let seen = Change::Seen { channel: self.log.id, reader: self.name.clone(), seen: now() };
        self.log.store().note(vec![seen]);
    }
}

/// How often is looked for readers that did not come back.
pub(crate) fn often(age: Duration) -> Duration {
    (age / 10).min(Duration::from_secs(60))
}

/// Forgets where readers were that nobody has seen for some time. Those that are there are seen, however quiet their channel is.
pub(crate) fn forget_old(store: &Store, logs: &[Arc<Log>], age: Duration, up: Duration) -> Result<(), StoreError> {
    let before = |age: Duration| now().saturating_sub(i64::try_from(age.as_nanos()).unwrap_or(i64::MAX));
    // What is seen now and then needs no writing each time, and a crash makes nobody older than half of the time.
    for (channel, reader, seen) in store.unseen(before(age / 2))? {
        let log = logs.iter().find(|log| log.id == channel);
        let readers = log.map(|log| lock(&log.readers));
        if readers.as_ref().is_some_and(|readers| readers.has(&reader)) {
            store.note(vec![Change::Seen { channel, reader, seen: now() }]);
        } else if seen < before(age) && up >= GRACE.min(age) {
            tracing::info!(
                channel = log.map(|log| &log.name),
                reader,
                "a reader did not come back: where it was is forgotten"
            );
            // Under the lock: who subscribes now is stored after this.
            store.note(vec![Change::RemovePosition { channel, reader }]);
        }
    }
    Ok(())
}

/// Forgets where a reader was; `false` when nobody knows it.
pub(crate) async fn forget(log: &Log, name: &str) -> Result<bool, Refusal> {
    // Where one that has just left began may not be written yet.
    log.store().written().await?;
    let (done, waits) = oneshot::channel();
    {
        let readers = lock(&log.readers);
        if readers.has(name) {
            return Err(Refusal::because(format_args!("{name:?} reads at present: end its subscriptions first")));
        }
        if log.store().position(log.id, name)?.is_none() {
            return Ok(false);
        }
        let removal = Change::RemovePosition { channel: log.id, reader: name.to_owned() };
        log.store().commit(vec![removal], None, |result| drop(done.send(result)));
    }
    waits.await.unwrap_or(Err(StoreError::Closed))?;
    Ok(true)
}
