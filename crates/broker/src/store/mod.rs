//! What survives: one SQLite file, written by one thread that commits many callers' changes at once.
//!
//! A change is answered after the transaction that holds it is on disk (WAL, synced after each transaction that somebody
//! waits for). While one transaction is synced the next ones gather, so the disk's latency is shared by everybody who waits (group commit).
//! Keys are integers, channel in the upper bits and sequence in the lower: appending goes to the right edge of the
//! tree. See the decision note on the broker's storage.

mod apply;
mod change;
mod error;
mod fold;
mod reads;
mod schema;
mod syncs;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use change::{Change, Key, MOST_CHANNELS, Place, StoredChannel, StoredDelay};
pub use error::StoreError;
pub(crate) use error::told;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use rusqlite::{Connection, OpenFlags};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use self::{
    schema::prepare,
    syncs::Syncs,
    writer::{Commit, Disk, Kind, Writer},
};
use crate::{check, folder::Folder, limits::Limits, room::Room};

/// Bytes of messages that may wait for the disk; then senders wait. Also the most that a message may have.
pub(crate) const WAITING_BYTES: usize = 128 << 20;

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
    syncs: Arc<Syncs>,
    writer: Mutex<Option<JoinHandle<()>>>,
    /// Reads everything beside the writer. While it reads, the log cannot be folded.
    check: Mutex<Option<JoinHandle<()>>>,
    closing: Arc<AtomicBool>,
    /// What was found to be wrong while the broker serves.
    damage: OnceLock<StoreError>,
    /// Transactions that are on disk, and how long they took.
    done: Arc<Mutex<(u64, Duration)>>,
    /// Nobody else's until the store is closed. None in memory.
    folder: Option<Arc<Mutex<Option<Folder>>>>,
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
        let syncs = Arc::new(Syncs::new(path.clone()));
        let disk = Disk::open(&path, owner, Arc::clone(&syncs))?;
        let connections = (Arc::new(Mutex::new(write)), Arc::new(Mutex::new(read)));
        let store = Self::start(path, room, syncs, Some(disk), connections)?;
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
        let syncs = Arc::new(Syncs::new(path.clone()));
        Self::start(path, Room::new(limits.store_bytes, None), syncs, None, (Arc::clone(&both), both))
    }

    fn start(
        path: PathBuf,
        room: Room,
        syncs: Arc<Syncs>,
        disk: Option<Disk>,
        (write, reads): (Arc<Mutex<Connection>>, Arc<Mutex<Connection>>),
    ) -> Result<Self, StoreError> {
        let (commits, waiting) = mpsc::channel::<Commit>();
        let room = Arc::new(room);
        room.measure(&lock(&write));
        let done = Arc::<Mutex<(u64, Duration)>>::default();
        let folder = disk.as_ref().map(|disk| Arc::clone(&disk.folder));
        let mut writer = Writer {
            connection: write,
            syncs: Arc::clone(&syncs),
            room: Arc::clone(&room),
            looked: Instant::now(),
            owed: Vec::new(),
            tried: Instant::now(),
            done: Arc::clone(&done),
            disk,
        };
        let writer = std::thread::Builder::new()
            .name("polymq-store".into())
            .spawn(move || writer.run(&waiting))
            .map_err(|cause| StoreError::Failed { path: path.clone(), what: cause.to_string() })?;
        let waits = Arc::new(Semaphore::new(WAITING_BYTES));
        let (commits, writer) = (Mutex::new(Some(commits)), Mutex::new(Some(writer)));
        let damage = OnceLock::new();
        let (check, closing) = Default::default();
        Ok(Self(Arc::new(Inner {
            path,
            commits,
            waits,
            room,
            reads,
            syncs,
            writer,
            check,
            closing,
            damage,
            done,
            folder,
        })))
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
        self.hand_over(Commit { changes, then: Box::new(then), kind: Kind::Awaited, _admitted: admitted });
    }

    /// As [`Store::commit`], for removals that were promised: told when they are written, which is before they are synced. On a
    /// full disk they wait for room, and are told at once.
    pub(crate) fn remove(&self, changes: Vec<Change>, then: impl FnOnce(Result<(), StoreError>) + Send + 'static) {
        self.hand_over(Commit { changes, then: Box::new(then), kind: Kind::Lasting, _admitted: None });
    }

    /// Waits until everything that was handed over before is written: no end of the process undoes it then.
    ///
    /// # Errors
    ///
    /// [`StoreError::Closed`].
    pub(crate) async fn written(&self) -> Result<(), StoreError> {
        let (done, waits) = oneshot::channel();
        self.remove(Vec::new(), |result| drop(done.send(result)));
        waits.await.unwrap_or(Err(StoreError::Closed))
    }

    /// As [`Store::commit`], for what nobody waits for and what may be lost: it is not synced for its own sake.
    pub(crate) fn note(&self, changes: Vec<Change>) {
        self.hand_over(Commit { changes, then: Box::new(drop), kind: Kind::Noted, _admitted: None });
    }

    /// Notes where a reader goes on, unless it is noted already and that waits.
    pub(crate) fn note_place(&self, place: &Arc<Place>, next: u64, change: impl FnOnce() -> Change) {
        if !place.go_on(next) {
            return;
        }
        let place = Arc::clone(place);
        let then = move |result: Result<(), StoreError>| {
            if result.is_err() {
                place.forget();
            }
        };
        self.hand_over(Commit { changes: vec![change()], then: Box::new(then), kind: Kind::Noted, _admitted: None });
    }

    fn hand_over(&self, commit: Commit) {
        let refused = match &*lock(&self.0.commits) {
            Some(commits) if self.failed().is_none() => {
                commits.send(commit).err().map(|mpsc::SendError(commit)| commit)
            }
            _ => Some(commit),
        };
        if let Some(commit) = refused.filter(|commit| commit.kind != Kind::Noted) {
            let cause = self.failed().cloned().unwrap_or(StoreError::Closed);
            // Never from within the call: callers hold locks that `then` may want.
            std::thread::spawn(move || (commit.then)(Err(cause)));
        }
    }

    /// Stores and waits until it is on disk. When the caller gives up waiting, the changes are stored all the same.
    ///
    /// # Errors
    ///
    /// As [`StoreError`] says; then none of the changes is stored.
    #[cfg(test)]
    pub(crate) async fn store(&self, changes: Vec<Change>) -> Result<(), StoreError> {
        let (done, waits) = oneshot::channel();
        self.commit(changes, None, |result| drop(done.send(result)));
        waits.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Transactions since the store was opened, and how long they took.
    pub(crate) fn commits(&self) -> (u64, Duration) {
        *lock(&self.0.done)
    }

    /// Why nothing is stored any more, until the broker is started anew.
    pub(crate) fn failed(&self) -> Option<&StoreError> {
        self.0.syncs.failed()
    }

    /// Whether every sync fails from now on.
    #[cfg(test)]
    pub(crate) fn break_syncs(&self, broken: bool) {
        self.0.syncs.broken.store(broken, std::sync::atomic::Ordering::Relaxed);
    }

    /// Waits until [`Store::failed`] tells something.
    pub(crate) async fn failure(&self) -> StoreError {
        self.0.syncs.fail().await
    }

    /// Whether the thread that writes runs.
    pub(crate) fn is_alive(&self) -> bool {
        self.failed().is_none() && lock(&self.0.writer).as_ref().is_some_and(|writer| !writer.is_finished())
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
        let (alive, closing) = (Arc::downgrade(&self.0), Arc::clone(&self.0.closing));
        let stop = move || closing.load(Ordering::Relaxed) || alive.strong_count() == 0;
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
        *lock(&self.0.check) = Some(spawned.map_err(|cause| failed(&cause))?);
        Ok(())
    }

    /// Waits for what was handed over and closes the file. A second call does nothing. Blocks.
    pub(crate) fn close(&self) {
        lock(&self.0.commits).take();
        self.0.closing.store(true, Ordering::Relaxed);
        if let Some(check) = lock(&self.0.check).take() {
            let _ = check.join();
        }
        if let Some(writer) = lock(&self.0.writer).take() {
            let _ = writer.join();
        }
        if let Some(folder) = &self.0.folder {
            lock(folder).take();
        }
    }
}
