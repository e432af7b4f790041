//! Who reads stored events: where each reader is, and for how long that is remembered when it does not come back.

use std::{
    collections::{HashMap, VecDeque, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use polymq_kubemq_proto::EventReceive;
use tokio::{
    sync::oneshot,
    time::{Instant, sleep_until},
};

use crate::{
    log::{Log, lock},
    queue::now,
    refusal::Refusal,
    store::{Change, Place, Store, StoreError},
};

/// How long readers that are beyond their time may take to come back after the broker was started.
const GRACE: Duration = Duration::from_secs(3600);
/// How long an event that was given may take to leave this process. Until then a crash could take it along, so that long it is
/// not stored that its reader is beyond it.
const LEAVES: Duration = Duration::from_millis(500);

/// By what a position is kept: by the group, or by the client when it reads without one.
pub(crate) fn name(client: &str, group: &str) -> String {
    if group.is_empty() { format!("client {client}") } else { format!("group {group}") }
}

/// Who reads a log at present.
#[derive(Debug, Default)]
pub(crate) struct Readers {
    alone: HashMap<String, Cursor>,
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
    next: Arc<tokio::sync::Mutex<Next>>,
    /// What is stored of it.
    place: Arc<Place>,
}

impl Cursor {
    fn position(&self, log: &Log, reader: &str) -> Change {
        Change::Position { channel: log.id, reader: reader.to_owned(), place: Arc::clone(&self.place), seen: now() }
    }

    /// Stores where the reader is at its end, which is none by a crash. The number of a log that was deleted may be another one's
    /// some day.
    fn end(&self, log: &Log, reader: &str, next: &Next) {
        if next.was.is_some() && !log.is_gone() {
            log.store().note_place(&self.place, next.sequence, || self.position(log, reader));
        }
    }
}

#[derive(Debug, Default)]
struct Next {
    /// 0 while nobody has looked where the reader was.
    sequence: u64,
    /// Where it was at a time, unless that is stored.
    was: Option<(u64, Instant)>,
}

impl Readers {
    pub(crate) fn has(&self, name: &str) -> bool {
        self.alone.contains_key(name) || self.groups.contains_key(name)
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
            } else if let Entry::Vacant(free) = readers.alone.entry(name.clone()) {
                free.insert(Cursor::default()).clone()
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
        if cursor.sequence == 0 {
            store.written().await?;
            cursor.sequence = store.position(self.log.id, &self.name)?.unwrap_or(start);
            // Where a new reader begins is remembered at once: "new only" means from now on, also when it comes back.
            self.cursor.place.set(cursor.sequence);
            store.commit(vec![self.position()], None, drop);
        }
        Ok(())
    }

    fn position(&self) -> Change {
        self.cursor.position(&self.log, &self.name)
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
                self.ahead = self.more().await?;
            }
            // Members of a group take turns, an event each, so that they share.
            if !self.is_alone() {
                tokio::task::yield_now().await;
            }
            let mut cursor = self.cursor.next.lock().await;
            while let Some(event) = self.ahead.pop_front() {
                if event.sequence >= cursor.sequence {
                    cursor.sequence = event.sequence + 1;
                    self.note(&mut cursor);
                    let sequence = cursor.sequence;
                    cursor.was.get_or_insert_with(|| (sequence, Instant::now()));
                    return Ok(event);
                }
            }
        }
    }

    /// Waits for what comes next; meanwhile what was given before leaves.
    async fn more(&self) -> Result<VecDeque<EventReceive>, StoreError> {
        let from = self.cursor.next.lock().await.sequence;
        let mut found = std::pin::pin!(self.log.wait(from));
        loop {
            let was = self.cursor.next.lock().await.was;
            tokio::select! {
                found = &mut found => return Ok(found?.into()),
                () = sleep_until(was.map_or_else(Instant::now, |(_, at)| at + LEAVES)), if was.is_some() => {
                    self.note(&mut *self.cursor.next.lock().await);
                }
            }
        }
    }

    /// Stores where the reader was, when everything before that has left.
    fn note(&self, next: &mut Next) {
        if let Some((sequence, at)) = next.was
            && at.elapsed() >= LEAVES
        {
            self.log.store().note_place(&self.cursor.place, sequence, || self.position());
            next.was = (next.sequence > sequence).then(|| (next.sequence, Instant::now()));
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut readers = lock(&self.log.readers);
        let mut is_last = self.is_alone();
        if is_last {
            readers.alone.remove(&self.name);
        } else if let Some(group) = readers.groups.get_mut(&self.name) {
            group.members -= 1;
            is_last = group.members == 0;
            if is_last {
                readers.groups.remove(&self.name);
            }
        }
        // Handed over before anybody reads under this name again.
        if is_last && let Ok(next) = self.cursor.next.try_lock() {
            self.cursor.end(&self.log, &self.name, &next);
        }
        let seen = Change::Seen { channel: self.log.id, reader: self.name.clone(), seen: now() };
        self.log.store().note(vec![seen]);
    }
}

/// Stores where everybody is who reads a log, before its store is closed.
pub(crate) async fn end(log: &Log) {
    let cursors: Vec<_> = {
        let readers = lock(&log.readers);
        let groups = readers.groups.iter().map(|(name, group)| (name, &group.cursor));
        readers.alone.iter().chain(groups).map(|(name, cursor)| (name.clone(), cursor.clone())).collect()
    };
    for (name, cursor) in cursors {
        cursor.end(log, &name, &*cursor.next.lock().await);
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
