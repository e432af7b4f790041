//! What survives: one SQLite file, written by one thread that commits many callers' changes at once.
//!
//! A change is answered after the transaction that holds it is on disk (WAL, `synchronous = FULL`). While one
//! transaction is synced the next ones gather, so the disk's latency is shared by everybody who waits (group commit).
//! Keys are integers, channel in the upper bits and sequence in the lower: appending goes to the right edge of the
//! tree. See the decision note on the broker's storage.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, mpsc},
    time::{Duration, Instant},
};

use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::{check, folder::Folder, limits::Limits, room::Room};

/// The layout of the file. A file of another layout is refused.
const LAYOUT: i64 = 2;
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
        id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, name TEXT NOT NULL, next INTEGER NOT NULL, count INTEGER NOT NULL,
        bytes INTEGER NOT NULL, UNIQUE (kind, name));
    CREATE TABLE IF NOT EXISTS messages (key INTEGER PRIMARY KEY, sum INTEGER NOT NULL, value BLOB NOT NULL);
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
    /// Another broker uses the folder.
    #[error("{folder} is in use by another broker: stop that one, or give this one another folder")]
    Busy {
        /// The folder.
        folder: PathBuf,
    },
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
    /// A message goes, with so many bytes.
    Remove(Key, usize),
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
    /// What was found to be wrong while the broker serves.
    damage: OnceLock<StoreError>,
    /// Transactions that are on disk, and how long they took.
    done: Arc<Mutex<(u64, Duration)>>,
    /// Nobody else's until the store is closed.
    folder: Arc<Mutex<Option<Folder>>>,
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
        let owner = Folder::take(folder)?;
        check::log(&folder.join("broker.sqlite-wal"), owner.synced())?;
        owner.forget().map_err(|cause| failed(&cause))?;
        let write = Connection::open(&path).map_err(|cause| failed(&cause))?;
        prepare(&write, &path, limits)?;
        let small = std::fs::metadata(&path).is_ok_and(|file| file.len() <= check::AT_ONCE);
        if small {
            check::whole(&write, &path)?;
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let read = Connection::open_with_flags(&path, flags).map_err(|cause| failed(&cause))?;
        let room = Room::new(limits.store_bytes, Some((limits.free_disk, folder.to_owned())));
        let store = Self::start(path, room, Some(owner), Arc::new(Mutex::new(write)), Arc::new(Mutex::new(read)))?;
        if !small {
            store.check_later()?;
        }
        Ok(store)
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
        Self::start(path, Room::new(limits.store_bytes, None), None, Arc::clone(&both), both)
    }

    fn start(
        path: PathBuf,
        room: Room,
        folder: Option<Folder>,
        write: Arc<Mutex<Connection>>,
        reads: Arc<Mutex<Connection>>,
    ) -> Result<Self, StoreError> {
        let (commits, waiting) = mpsc::channel::<Commit>();
        let room = Arc::new(room);
        room.measure(&lock(&write));
        let done = Arc::<Mutex<(u64, Duration)>>::default();
        let folder = Arc::new(Mutex::new(folder));
        let mut writer = Writer {
            path: path.clone(),
            connection: write,
            room: Arc::clone(&room),
            owed: Vec::new(),
            synced: true,
            done: Arc::clone(&done),
            folder: Arc::clone(&folder),
        };
        let writer = std::thread::Builder::new()
            .name("polymq-store".into())
            .spawn(move || writer.run(&waiting))
            .map_err(|cause| StoreError::Failed { path: path.clone(), what: cause.to_string() })?;
        let waits = Arc::new(Semaphore::new(WAITING_BYTES));
        let (commits, writer) = (Mutex::new(Some(commits)), Mutex::new(Some(writer)));
        Ok(Self(Arc::new(Inner { path, commits, waits, room, reads, writer, damage: OnceLock::new(), done, folder })))
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
            let sql = "SELECT key, sum, value FROM messages WHERE key BETWEEN ?1 AND ?2 ORDER BY key";
            let mut select = reads.prepare_cached(sql)?;
            let mut rows = select.query(params![Key::new(channel, from).0, Key::new(channel, u64::MAX).0])?;
            let (mut found, mut size) = (Vec::new(), 0);
            while let Some(row) = rows.next()? {
                let sequence = Key(row.get(0)?).sequence();
                let value: Vec<u8> = row.get(2)?;
                if row.get::<_, u32>(1)? != check::checksum(&value) {
                    let what = format!("message {sequence} of channel number {channel} is not what was stored");
                    tracing::error!(what, "a damaged message is passed over");
                    let _ = self.0.damage.set(StoreError::Damaged { path: self.0.path.clone(), what });
                    continue;
                }
                size += value.len();
                found.push((sequence, value));
                if size >= bytes || found.len() >= most {
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
            let mut select = reads.prepare("SELECT id, kind, name, next, count, bytes FROM channels ORDER BY id")?;
            let mut first = reads.prepare("SELECT min(key) FROM messages WHERE key BETWEEN ?1 AND ?2")?;
            let rows = select.query_map([], |row| {
                let id: u32 = row.get(0)?;
                let range = params![Key::new(id, 0).0, Key::new(id, u64::MAX).0];
                let first: Option<i64> = first.query_row(range, |row| row.get(0))?;
                Ok(StoredChannel {
                    id,
                    kind: row.get(1)?,
                    name: row.get(2)?,
                    next: row.get(3)?,
                    count: row.get(4)?,
                    bytes: row.get(5)?,
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

    /// Transactions since the store was opened, and how long they took.
    pub(crate) fn commits(&self) -> (u64, Duration) {
        *lock(&self.0.done)
    }

    /// Whether the thread that writes runs.
    pub(crate) fn is_alive(&self) -> bool {
        lock(&self.0.writer).as_ref().is_some_and(|writer| !writer.is_finished())
    }

    /// What was found to be wrong since the store was opened.
    pub(crate) fn damage(&self) -> Option<&StoreError> {
        self.0.damage.get()
    }

    /// Checks everything in a thread, which ends with the check or with the store.
    fn check_later(&self) -> Result<(), StoreError> {
        let store = Arc::downgrade(&self.0);
        let path = self.0.path.clone();
        let failed = |cause: &dyn std::fmt::Display| StoreError::Failed { path: path.clone(), what: cause.to_string() };
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(&path, flags).map_err(|cause| failed(&cause))?;
        let alive = Arc::downgrade(&self.0);
        let stop = move || alive.strong_count() == 0;
        connection.progress_handler(10_000, Some(stop)).map_err(|cause| failed(&cause))?;
        let (at, spawned) = (path.clone(), std::thread::Builder::new().name("polymq-check".into()));
        let spawned = spawned.spawn(move || match check::whole(&connection, &at) {
            Ok(()) => tracing::info!("the stored messages are as they were written"),
            Err(cause @ StoreError::Damaged { .. }) => {
                tracing::error!(%cause, "the store is damaged; what can be read is served");
                if let Some(inner) = store.upgrade() {
                    let _ = inner.damage.set(cause);
                }
            }
            Err(cause) => tracing::debug!(%cause, "the check of the store has ended early"),
        });
        spawned.map(drop).map_err(|cause| failed(&cause))
    }

    /// Waits for what was handed over and closes the file. A second call does nothing. Blocks.
    pub(crate) fn close(&self) {
        lock(&self.0.commits).take();
        if let Some(writer) = lock(&self.0.writer).take() {
            let _ = writer.join();
        }
        lock(&self.0.folder).take();
    }
}

fn prepare(connection: &Connection, path: &Path, limits: &Limits) -> Result<(), StoreError> {
    let damaged = |what: String| StoreError::Damaged { path: path.to_owned(), what };
    let failed = |cause: rusqlite::Error| told(path, &cause);
    let number = |sql: &str| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(failed);
    let (layout, tables) = (number("PRAGMA user_version")?, number("SELECT count(*) FROM sqlite_schema")?);
    if layout != LAYOUT && (layout, tables) != (0, 0) {
        return Err(damaged(format!("its layout is {layout}, expected {LAYOUT}: another program or release wrote it")));
    }
    let set = "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -65536; PRAGMA wal_autocheckpoint = 4096; PRAGMA journal_size_limit = 67108864;";
    connection.execute_batch(set).map_err(failed)?;
    // What a crash has left in the log goes into the file, so that the log never holds what two crashes have left.
    number("PRAGMA wal_checkpoint(TRUNCATE)")?;
    if let Some(limit) = limits.store_bytes {
        let size = number("PRAGMA page_size")?.max(512).unsigned_abs();
        let pages = (limit.saturating_add(BEYOND) / size).min(u64::from(u32::MAX - 1));
        number(&format!("PRAGMA max_page_count = {pages}"))?;
    }
    let transaction = connection.unchecked_transaction().map_err(failed)?;
    transaction.execute_batch(TABLES).map_err(failed)?;
    transaction.pragma_update(None, "user_version", LAYOUT).map_err(failed)?;
    transaction.commit().map_err(failed)
}

pub(crate) fn told(path: &Path, cause: &rusqlite::Error) -> StoreError {
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
    /// Whether a transaction is on disk when it has ended.
    synced: bool,
    done: Arc<Mutex<(u64, Duration)>>,
    folder: Arc<Mutex<Option<Folder>>>,
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
        // One file holds everything of a broker that was stopped.
        if let Some(folder) = &*lock(&self.folder) {
            let _ = folder.forget();
        }
        let folded = lock(&self.connection).query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
        if let Err(cause) = folded {
            tracing::debug!(%cause, "the log of the store stays beside its file; the next start reads it");
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
        let started = Instant::now();
        let mut connection = lock(&self.connection);
        // Nobody waits for a removal: it is written, so no crash of the process undoes it, and synced with what comes
        // next. After a power cut, what was acknowledged last may come again.
        let synced = group.iter().any(|commit| !commit.lasting);
        let results: Vec<_> = match transact(
            &mut connection,
            (&mut self.synced, synced),
            group.iter().flat_map(|commit| &commit.changes),
        ) {
            Ok(()) => group.iter().map(|_| Ok(())).collect(),
            Err(cause) if group.len() == 1 => vec![Err(cause)],
            // One caller's changes must not fail the others'.
            Err(_) => group
                .iter()
                .map(|commit| transact(&mut connection, (&mut self.synced, synced), commit.changes.iter()))
                .collect(),
        };
        drop(connection);
        if synced
            && results.iter().any(std::result::Result::is_ok)
            && let Some(folder) = &*lock(&self.folder)
        {
            folder.remember();
        }
        {
            let mut done = lock(&self.done);
            *done = (done.0 + 1, done.1 + started.elapsed());
        }
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
        let result =
            transact(&mut connection, (&mut self.synced, false), self.owed.iter().flat_map(|commit| &commit.changes));
        drop(connection);
        match result.map_err(|cause| told(&self.path, &cause)) {
            Err(StoreError::Full) => {}
            result => self.owed.drain(..).for_each(|commit| (commit.then)(result.clone())),
        }
    }
}

/// What a transaction changes of a channel: known at its end, stored in one step.
#[derive(Default)]
struct Moved {
    next: u64,
    count: i64,
    bytes: i64,
}

type Channels = HashMap<u32, Moved>;

/// One transaction, synced or not; `was` is how it was with the one before.
fn transact<'a>(
    connection: &mut Connection,
    (was, synced): (&mut bool, bool),
    changes: impl Iterator<Item = &'a Change>,
) -> rusqlite::Result<()> {
    if *was != synced {
        connection.pragma_update(None, "synchronous", if synced { "FULL" } else { "NORMAL" })?;
        *was = synced;
    }
    let transaction = connection.transaction()?;
    let mut channels = Channels::new();
    for change in changes {
        apply(&transaction, change, &mut channels)?;
    }
    for (id, moved) in channels {
        let sql = "UPDATE channels SET next = max(next, ?2), count = count + ?3, bytes = bytes + ?4 WHERE id = ?1";
        let mut update = transaction.prepare_cached(sql)?;
        update.execute(params![id, moved.next, moved.count, moved.bytes])?;
    }
    transaction.commit()
}

fn apply(transaction: &Transaction<'_>, change: &Change, channels: &mut Channels) -> rusqlite::Result<()> {
    let run = |sql: &str, values: &[&dyn rusqlite::ToSql]| transaction.prepare_cached(sql)?.execute(values);
    match change {
        Change::Put(key, value) => {
            run("INSERT INTO messages VALUES (?1, ?2, ?3)", params![key.0, check::checksum(value), value])?;
            let moved = channels.entry(key.channel()).or_default();
            (moved.count, moved.bytes) = (moved.count + 1, moved.bytes + value.len().cast_signed() as i64);
        }
        Change::Remove(key, size) => {
            if run("DELETE FROM messages WHERE key = ?1", params![key.0])? > 0 {
                let moved = channels.entry(key.channel()).or_default();
                (moved.count, moved.bytes) = (moved.count - 1, moved.bytes - size.cast_signed() as i64);
            }
        }
        Change::RemoveRange { from, to, except } => {
            let moved = channels.entry(to.channel()).or_default();
            let channel = to.0 & !((1 << SEQUENCE_BITS) - 1);
            let mut from = from.0;
            for end in except.iter().map(|sequence| channel | sequence.cast_signed()).chain([to.0]) {
                let sql = "SELECT count(*), coalesce(sum(length(value)), 0) FROM messages WHERE key >= ?1 AND key < ?2";
                let mut select = transaction.prepare_cached(sql)?;
                let (count, bytes): (i64, i64) =
                    select.query_row(params![from, end], |row| Ok((row.get(0)?, row.get(1)?)))?;
                (moved.count, moved.bytes) = (moved.count - count, moved.bytes - bytes);
                run("DELETE FROM messages WHERE key >= ?1 AND key < ?2", params![from, end])?;
                from = end + 1;
            }
        }
        Change::Next { channel, sequence } => {
            let moved = channels.entry(*channel).or_default();
            moved.next = moved.next.max(*sequence);
        }
        Change::Channel { id, kind, name } => {
            run("INSERT INTO channels VALUES (?1, ?2, ?3, 1, 0, 0)", params![id, kind, name])?;
        }
        Change::RemoveChannel(id) => {
            let range = params![Key::new(*id, 0).0, Key::new(*id, u64::MAX).0];
            run("DELETE FROM messages WHERE key BETWEEN ?1 AND ?2", range)?;
            run("DELETE FROM delayed WHERE channel = ?1", params![id])?;
            run("DELETE FROM positions WHERE channel = ?1", params![id])?;
            run("DELETE FROM channels WHERE id = ?1", params![id])?;
            channels.remove(id);
        }
        Change::Delay { id, channel, due, value } => {
            run("INSERT INTO delayed VALUES (?1, ?2, ?3, ?4)", params![id, channel, due, value])?;
        }
        Change::Undelay(id) => {
            run("DELETE FROM delayed WHERE id = ?1", params![id])?;
        }
        Change::Position { channel, reader, next } => {
            run("INSERT OR REPLACE INTO positions VALUES (?1, ?2, ?3)", params![channel, reader, next])?;
        }
    }
    Ok(())
}
