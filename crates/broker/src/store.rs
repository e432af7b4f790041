//! What survives: one SQLite file, written by one thread that commits many callers' changes at once.
//!
//! A change is answered after the transaction that holds it is on disk (WAL, `synchronous = FULL`). While one
//! transaction is synced the next ones gather, so the disk's latency is shared by everybody who waits (group commit).
//! Keys are integers, channel in the upper bits and sequence in the lower: appending goes to the right edge of the
//! tree. See the decision note on the broker's storage.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    time::Duration,
};

use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::{limits::Limits, room::Room};

/// The layout of the file. A file of another layout is refused.
const LAYOUT: i64 = 1;
/// Bits of a key that count within a channel.
const SEQUENCE_BITS: u32 = 44;
/// Changes that one transaction takes at most, so that nobody waits long for others.
const GROUP: usize = 4096;
/// How often what the disk had no room for is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// Bytes beyond the limit of the store for what must be written all the same, such as returning a message.
const BEYOND: u64 = 64 << 20;
/// Bytes of messages that may wait for the disk; then senders wait. Also the most that a message may have.
pub(crate) const WAITING_BYTES: usize = 128 << 20;

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS channels (
        id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, name TEXT NOT NULL, next INTEGER NOT NULL, UNIQUE (kind, name));
    CREATE TABLE IF NOT EXISTS messages (key INTEGER PRIMARY KEY, value BLOB NOT NULL);
    CREATE TABLE IF NOT EXISTS delayed (
        id INTEGER PRIMARY KEY, channel INTEGER NOT NULL, due INTEGER NOT NULL, value BLOB NOT NULL);
    CREATE INDEX IF NOT EXISTS delayed_due ON delayed (due);
    CREATE TABLE IF NOT EXISTS positions (
        channel INTEGER NOT NULL, reader TEXT NOT NULL, next INTEGER NOT NULL, PRIMARY KEY (channel, reader)) WITHOUT ROWID;
";

/// Why the store refused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The disk is full: what was to be written is not there, everything else is.
    #[error("the disk is full: free space in the data directory; nothing was stored")]
    Full,
    /// The store has as many bytes as it may.
    #[error(
        "the store has reached its limit of {limit} bytes: receive messages, keep stored events for less long, or raise the limit; nothing was stored"
    )]
    Limit {
        /// Bytes.
        limit: u64,
    },
    /// The file cannot be what this program wrote.
    #[error("{path} is damaged: {what}; restore it from a backup, or move it away to begin empty")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// Anything else.
    #[error("cannot store in {path}: {what}")]
    Failed {
        /// The file.
        path: PathBuf,
        /// What the engine said.
        what: String,
    },
    /// The broker was stopped.
    #[error("the store is closed")]
    Closed,
}

/// A place in a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key(i64);

impl Key {
    /// The place of a sequence in a channel.
    #[must_use]
    pub(crate) fn new(channel: u32, sequence: u64) -> Self {
        let sequence = i64::try_from(sequence).unwrap_or(i64::MAX).min((1 << SEQUENCE_BITS) - 1);
        Self((i64::from(channel) << SEQUENCE_BITS) | sequence)
    }

    /// The sequence within the channel.
    #[must_use]
    pub(crate) fn sequence(self) -> u64 {
        (self.0 & ((1 << SEQUENCE_BITS) - 1)).unsigned_abs()
    }
}

/// One change. What is handed over together is stored together or not at all.
#[derive(Debug)]
pub(crate) enum Change {
    /// A channel is made; its sequences begin at one.
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
    /// A message goes.
    Remove(Key),
    /// Everything from a place to another goes, without the second one and without those named.
    RemoveRange {
        /// The first place.
        from: Key,
        /// The place after the last one.
        to: Key,
        /// Sequences that stay, few.
        except: Vec<u64>,
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
    /// A delayed message has had its time.
    Undelay(u64),
    /// Where a reader goes on.
    Position {
        /// The channel.
        channel: u32,
        /// The reader.
        reader: String,
        /// The next sequence.
        next: u64,
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
    /// The message.
    pub(crate) value: Vec<u8>,
}

struct Commit {
    changes: Vec<Change>,
    then: Then,
    /// When the disk is full, it waits for room instead of being refused.
    lasting: bool,
    /// Bytes that count as waiting until the group is written.
    _admitted: Option<OwnedSemaphorePermit>,
}

type Then = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// Leave to hand bytes over.
#[derive(Debug)]
pub(crate) struct Admitted(OwnedSemaphorePermit);

/// The store. Clones share it; the last one to go closes it.
#[derive(Debug, Clone)]
pub(crate) struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    commits: Mutex<Option<mpsc::Sender<Commit>>>,
    waits: Arc<Semaphore>,
    room: Arc<Room>,
    reads: Arc<Mutex<Connection>>,
    writer: Mutex<Option<std::thread::JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Store {
    /// Opens the file in a folder, or makes both. A damaged file is refused.
    ///
    /// # Errors
    ///
    /// [`StoreError::Damaged`] when the file's structure is broken, [`StoreError::Failed`] when it cannot be opened.
    pub(crate) fn open(folder: &Path, limits: &Limits) -> Result<Self, StoreError> {
        let path = folder.join("broker.sqlite");
        let failed = |what: &dyn std::fmt::Display| StoreError::Failed { path: path.clone(), what: what.to_string() };
        std::fs::create_dir_all(folder).map_err(|cause| failed(&cause))?;
        let write = Connection::open(&path).map_err(|cause| failed(&cause))?;
        prepare(&write, &path, limits)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let read = Connection::open_with_flags(&path, flags).map_err(|cause| failed(&cause))?;
        let room = Room::new(limits.store_bytes, Some((limits.free_disk, folder.to_owned())));
        Self::start(path, room, Arc::new(Mutex::new(write)), Arc::new(Mutex::new(read)))
    }

    /// A store that forgets everything when it goes.
    ///
    /// # Errors
    ///
    /// [`StoreError::Failed`] when there is no memory for it.
    pub(crate) fn in_memory(limits: &Limits) -> Result<Self, StoreError> {
        let path = PathBuf::from("memory");
        let both = Connection::open_in_memory()
            .map_err(|cause| StoreError::Failed { path: path.clone(), what: cause.to_string() })?;
        prepare(&both, &path, limits)?;
        let both = Arc::new(Mutex::new(both));
        Self::start(path, Room::new(limits.store_bytes, None), Arc::clone(&both), both)
    }

    fn start(
        path: PathBuf,
        room: Room,
        write: Arc<Mutex<Connection>>,
        reads: Arc<Mutex<Connection>>,
    ) -> Result<Self, StoreError> {
        let (commits, waiting) = mpsc::channel::<Commit>();
        let room = Arc::new(room);
        room.measure(&lock(&write));
        let mut writer = Writer { path: path.clone(), connection: write, room: Arc::clone(&room), owed: Vec::new() };
        let writer = std::thread::Builder::new()
            .name("polymq-store".into())
            .spawn(move || writer.run(&waiting))
            .map_err(|cause| StoreError::Failed { path: path.clone(), what: cause.to_string() })?;
        let waits = Arc::new(Semaphore::new(WAITING_BYTES));
        let (commits, writer) = (Mutex::new(Some(commits)), Mutex::new(Some(writer)));
        Ok(Self(Arc::new(Inner { path, commits, waits, room, reads, writer })))
    }

    /// How full it is.
    pub(crate) fn room(&self) -> &Room {
        &self.0.room
    }

    /// Asked before messages come in: waits until so many bytes may wait for the disk, so that senders wait instead of
    /// filling the memory.
    ///
    /// # Errors
    ///
    /// [`StoreError::Full`] and [`StoreError::Limit`] while there is no room, [`StoreError::Closed`].
    pub(crate) async fn admit(&self, bytes: usize) -> Result<Admitted, StoreError> {
        let bytes = u32::try_from(bytes.clamp(1, WAITING_BYTES)).unwrap_or(u32::MAX);
        if let Some(refusal) = self.0.room.refusal() {
            return Err(refusal);
        }
        let permit = Arc::clone(&self.0.waits).acquire_many_owned(bytes).await;
        permit.map(Admitted).map_err(|_| StoreError::Closed)
    }

    /// Hands changes over, in the order of calls. `then` is called when they are on disk, or refused, whether anybody
    /// waits for it or not: from the store's own thread and in the same order, so it must be short.
    pub(crate) fn commit(
        &self,
        changes: Vec<Change>,
        admitted: Option<Admitted>,
        then: impl FnOnce(Result<(), StoreError>) + Send + 'static,
    ) {
        let admitted = admitted.map(|Admitted(permit)| permit);
        self.hand_over(Commit { changes, then: Box::new(then), lasting: false, _admitted: admitted });
    }

    /// As [`Store::commit`], for removals that were promised: on a full disk they wait for room.
    pub(crate) fn remove(&self, changes: Vec<Change>, then: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
        self.hand_over(Commit { changes, then: Box::new(then), lasting: true, _admitted: None });
    }

    fn hand_over(&self, commit: Commit) {
        let refused = match &*lock(&self.0.commits) {
            Some(commits) => commits.send(commit).err().map(|mpsc::SendError(commit)| commit),
            None => Some(commit),
        };
        if let Some(commit) = refused {
            // Never from within the call: callers hold locks that `then` may want.
            std::thread::spawn(move || (commit.then)(Err(StoreError::Closed)));
        }
    }

    /// Stores and waits until it is on disk. When the caller gives up waiting, the changes are stored all the same.
    ///
    /// # Errors
    ///
    /// As [`StoreError`] says; then none of the changes is stored.
    pub(crate) async fn store(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let (done, waits) = oneshot::channel();
        self.commit(changes, None, |result| drop(done.send(result)));
        waits.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Messages of a channel from a sequence on, at most so many and about so many bytes.
    ///
    /// # Errors
    ///
    /// [`StoreError::Failed`] or [`StoreError::Damaged`] when the file cannot be read.
    pub(crate) fn read(
        &self,
        channel: u32,
        from: u64,
        most: usize,
        bytes: usize,
    ) -> Result<Vec<(u64, Vec<u8>)>, StoreError> {
        let reads = lock(&self.0.reads);
        let found = (|| {
            let sql = "SELECT key, value FROM messages WHERE key BETWEEN ?1 AND ?2 ORDER BY key LIMIT ?3";
            let mut select = reads.prepare_cached(sql)?;
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            let mut rows = select.query(params![Key::new(channel, from).0, Key::new(channel, u64::MAX).0, most])?;
            let (mut found, mut size) = (Vec::new(), 0);
            while let Some(row) = rows.next()? {
                let value: Vec<u8> = row.get(1)?;
                size += value.len();
                found.push((Key(row.get(0)?).sequence(), value));
                if size >= bytes {
                    break;
                }
            }
            Ok(found)
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// Sequences of a channel from one on, and the bytes of each.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn sizes(&self, channel: u32, from: u64, most: usize) -> Result<Vec<(u64, u64)>, StoreError> {
        let reads = lock(&self.0.reads);
        let found: rusqlite::Result<Vec<_>> = (|| {
            let sql = "SELECT key, length(value) FROM messages WHERE key BETWEEN ?1 AND ?2 ORDER BY key LIMIT ?3";
            let mut select = reads.prepare_cached(sql)?;
            let most = i64::try_from(most).unwrap_or(i64::MAX);
            let range = params![Key::new(channel, from).0, Key::new(channel, u64::MAX).0, most];
            select.query_map(range, |row| Ok((Key(row.get(0)?).sequence(), row.get(1)?)))?.collect()
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// The last message of a channel.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn last(&self, channel: u32) -> Result<Option<u64>, StoreError> {
        let reads = lock(&self.0.reads);
        let range = params![Key::new(channel, 0).0, Key::new(channel, u64::MAX).0];
        let found: rusqlite::Result<Option<i64>> =
            reads.query_row("SELECT max(key) FROM messages WHERE key BETWEEN ?1 AND ?2", range, |row| row.get(0));
        found.map(|key| key.map(|key| Key(key).sequence())).map_err(|cause| told(&self.0.path, &cause))
    }

    /// Every channel.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn channels(&self) -> Result<Vec<StoredChannel>, StoreError> {
        let reads = lock(&self.0.reads);
        let found: rusqlite::Result<Vec<_>> = (|| {
            let mut select = reads.prepare("SELECT id, kind, name, next FROM channels ORDER BY id")?;
            let mut about = reads.prepare(
                "SELECT count(*), coalesce(sum(length(value)), 0), min(key) FROM messages WHERE key BETWEEN ?1 AND ?2",
            )?;
            let rows = select.query_map([], |row| {
                let id: u32 = row.get(0)?;
                let range = params![Key::new(id, 0).0, Key::new(id, u64::MAX).0];
                let (count, bytes, first): (u64, u64, Option<i64>) =
                    about.query_row(range, |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
                Ok(StoredChannel {
                    id,
                    kind: row.get(1)?,
                    name: row.get(2)?,
                    next: row.get(3)?,
                    count,
                    bytes,
                    first: first.map(|key| Key(key).sequence()),
                })
            })?;
            rows.collect()
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// Delayed messages that are due by a time, the earliest first.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn due(&self, by: i64, most: usize) -> Result<Vec<StoredDelay>, StoreError> {
        let reads = lock(&self.0.reads);
        let found: rusqlite::Result<Vec<_>> = (|| {
            let sql = "SELECT id, channel, due, value FROM delayed WHERE due <= ?1 ORDER BY due, id LIMIT ?2";
            let mut select = reads.prepare_cached(sql)?;
            let rows = select.query_map(params![by, i64::try_from(most).unwrap_or(i64::MAX)], |row| {
                Ok(StoredDelay { id: row.get(0)?, channel: row.get(1)?, due: row.get(2)?, value: row.get(3)? })
            })?;
            rows.collect()
        })();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// When the next delayed message is due, the highest number of one, and how many there are.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn delays(&self) -> Result<(Option<i64>, u64, u64), StoreError> {
        let reads = lock(&self.0.reads);
        reads
            .query_row("SELECT min(due), coalesce(max(id), 0), count(*) FROM delayed", [], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .map_err(|cause| told(&self.0.path, &cause))
    }

    /// Where a reader goes on.
    ///
    /// # Errors
    ///
    /// As [`Store::read`].
    pub(crate) fn position(&self, channel: u32, reader: &str) -> Result<Option<u64>, StoreError> {
        let reads = lock(&self.0.reads);
        let sql = "SELECT next FROM positions WHERE channel = ?1 AND reader = ?2";
        let found = reads.query_row(sql, params![channel, reader], |row| row.get(0)).optional();
        found.map_err(|cause| told(&self.0.path, &cause))
    }

    /// Waits for what was handed over and closes the file. A second call does nothing. Blocks.
    pub(crate) fn close(&self) {
        lock(&self.0.commits).take();
        if let Some(writer) = lock(&self.0.writer).take() {
            let _ = writer.join();
        }
    }
}

fn prepare(connection: &Connection, path: &Path, limits: &Limits) -> Result<(), StoreError> {
    let damaged = |what: String| StoreError::Damaged { path: path.to_owned(), what };
    let failed = |cause: rusqlite::Error| told(path, &cause);
    let set = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -65536; PRAGMA wal_autocheckpoint = 4096; PRAGMA journal_size_limit = 67108864;";
    connection.execute_batch(set).map_err(failed)?;
    let layout: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed)?;
    let tables: i64 =
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0)).map_err(failed)?;
    if layout != LAYOUT && (layout, tables) != (0, 0) {
        return Err(damaged(format!("its layout is {layout}, expected {LAYOUT}: another program or release wrote it")));
    }
    if let Some(limit) = limits.store_bytes {
        let size: u64 = connection.query_row("PRAGMA page_size", [], |row| row.get(0)).map_err(failed)?;
        let pages = i64::try_from((limit.saturating_add(BEYOND)) / size.max(1)).unwrap_or(i64::MAX);
        let pages = pages.min(i64::from(u32::MAX - 1));
        connection.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).map_err(failed)?;
    }
    connection.execute_batch(TABLES).map_err(failed)?;
    connection.pragma_update(None, "user_version", LAYOUT).map_err(failed)?;
    Ok(())
}

fn told(path: &Path, cause: &rusqlite::Error) -> StoreError {
    match cause.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => StoreError::Full,
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
            StoreError::Damaged { path: path.to_owned(), what: cause.to_string() }
        }
        _ => StoreError::Failed { path: path.to_owned(), what: cause.to_string() },
    }
}

/// The thread that writes.
struct Writer {
    path: PathBuf,
    connection: Arc<Mutex<Connection>>,
    room: Arc<Room>,
    /// Removals for which the disk had no room.
    owed: Vec<Commit>,
}

impl Writer {
    fn run(&mut self, waiting: &mpsc::Receiver<Commit>) {
        loop {
            let waits = self.room.is_full() || !self.owed.is_empty();
            let next = if waits {
                waiting.recv_timeout(AGAIN)
            } else {
                waiting.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
            };
            match next {
                Ok(first) => self.write_group(waiting, first),
                Err(mpsc::RecvTimeoutError::Timeout) => self.pay(),
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            self.room.measure(&lock(&self.connection));
        }
        self.pay();
        if !self.owed.is_empty() {
            let count = self.owed.len();
            tracing::error!(count, "the disk is full: messages that were acknowledged last come again after a restart");
        }
    }

    /// One transaction for everybody who waits.
    fn write_group(&mut self, waiting: &mpsc::Receiver<Commit>, first: Commit) {
        let mut group = vec![first];
        let mut changes = group[0].changes.len();
        while changes < GROUP
            && let Ok(next) = waiting.try_recv()
        {
            changes += next.changes.len();
            group.push(next);
        }
        let mut connection = lock(&self.connection);
        let results: Vec<_> = match transact(&mut connection, group.iter().flat_map(|commit| &commit.changes)) {
            Ok(()) => group.iter().map(|_| Ok(())).collect(),
            Err(cause) if group.len() == 1 => vec![Err(cause)],
            // One caller's changes must not fail the others'.
            Err(_) => group.iter().map(|commit| transact(&mut connection, commit.changes.iter())).collect(),
        };
        drop(connection);
        for (commit, result) in group.into_iter().zip(results) {
            match result.map_err(|cause| told(&self.path, &cause)) {
                Err(StoreError::Full) if commit.lasting => self.owed.push(commit),
                result => (commit.then)(result),
            }
        }
    }

    /// Tries again what the disk had no room for.
    fn pay(&mut self) {
        if self.owed.is_empty() {
            return;
        }
        let mut connection = lock(&self.connection);
        let result = transact(&mut connection, self.owed.iter().flat_map(|commit| &commit.changes));
        drop(connection);
        match result.map_err(|cause| told(&self.path, &cause)) {
            Err(StoreError::Full) => {}
            result => self.owed.drain(..).for_each(|commit| (commit.then)(result.clone())),
        }
    }
}

fn transact<'a>(connection: &mut Connection, changes: impl Iterator<Item = &'a Change>) -> rusqlite::Result<()> {
    let transaction = connection.transaction()?;
    for change in changes {
        apply(&transaction, change)?;
    }
    transaction.commit()
}

fn apply(transaction: &Transaction<'_>, change: &Change) -> rusqlite::Result<()> {
    let run = |sql: &str, values: &[&dyn rusqlite::ToSql]| transaction.prepare_cached(sql)?.execute(values);
    match change {
        Change::Put(key, value) => run("INSERT OR REPLACE INTO messages VALUES (?1, ?2)", params![key.0, value])?,
        Change::Remove(key) => run("DELETE FROM messages WHERE key = ?1", params![key.0])?,
        Change::RemoveRange { from, to, except } => {
            let mut from = from.0;
            let channel = to.0 & !((1 << SEQUENCE_BITS) - 1);
            let stay = except.iter().map(|sequence| channel | sequence.cast_signed());
            for end in stay.chain([to.0]) {
                run("DELETE FROM messages WHERE key >= ?1 AND key < ?2", params![from, end])?;
                from = end + 1;
            }
            0
        }
        Change::Next { channel, sequence } => {
            run("UPDATE channels SET next = ?2 WHERE id = ?1", params![channel, sequence])?
        }
        Change::Channel { id, kind, name } => {
            run("INSERT INTO channels VALUES (?1, ?2, ?3, 1)", params![id, kind, name])?
        }
        Change::RemoveChannel(id) => {
            let range = params![Key::new(*id, 0).0, Key::new(*id, u64::MAX).0];
            run("DELETE FROM messages WHERE key BETWEEN ?1 AND ?2", range)?;
            run("DELETE FROM delayed WHERE channel = ?1", params![id])?;
            run("DELETE FROM positions WHERE channel = ?1", params![id])?;
            run("DELETE FROM channels WHERE id = ?1", params![id])?
        }
        Change::Delay { id, channel, due, value } => {
            run("INSERT INTO delayed VALUES (?1, ?2, ?3, ?4)", params![id, channel, due, value])?
        }
        Change::Undelay(id) => run("DELETE FROM delayed WHERE id = ?1", params![id])?,
        Change::Position { channel, reader, next } => {
            run("INSERT OR REPLACE INTO positions VALUES (?1, ?2, ?3)", params![channel, reader, next])?
        }
    };
    Ok(())
}
