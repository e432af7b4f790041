//! The thread that writes: one transaction for everybody who waits.

use std::{
    fs::File,
    path::Path,
    sync::{Arc, Mutex, mpsc},
    time::{Duration, Instant},
};

use rusqlite::{Connection, config::DbConfig};
use tokio::sync::OwnedSemaphorePermit;

use super::{Change, StoreError, apply::transact, fold::Fold, lock, syncs::Syncs};
use crate::{
    folder::{Folder, Log},
    room::Room,
};

/// Changes that one transaction takes at most, so that nobody waits long for others.
const GROUP: usize = 4096;
/// How often what the disk had no room for is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// How often is looked how much room there is, unless there is little.
const LOOK: Duration = Duration::from_millis(20);

/// What is promised to a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// On disk when it is told.
    Awaited,
    /// Written, which no crash of the process undoes, and synced with what is awaited next. When the disk is full, it is told as
    /// if it were written, and waits for room.
    Lasting,
    /// Written, and refused when the disk is full.
    Noted,
}

/// Changes of one caller, who is told.
pub(super) struct Commit {
    pub(super) changes: Vec<Change>,
    pub(super) then: Then,
    pub(super) kind: Kind,
    /// Bytes that count as waiting until the group is written.
    pub(super) _admitted: Option<OwnedSemaphorePermit>,
}

pub(super) type Then = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// The files, unless the store is in memory.
pub(super) struct Disk {
    /// The engine's log. The engine writes it, and here it is synced: `fdatasync`, which the engine does not use, does not
    /// wait for times of the file that nobody needs.
    log: File,
    syncs: Arc<Syncs>,
    fold: Fold,
    pub(super) folder: Arc<Mutex<Option<Folder>>>,
}

impl Disk {
    /// Of a store whose engine is set up, so that its log is there.
    pub(super) fn open(path: &Path, folder: Folder, syncs: Arc<Syncs>) -> Result<Self, StoreError> {
        let failed =
            |cause: &dyn std::fmt::Display| StoreError::Failed { path: path.to_owned(), what: cause.to_string() };
        let mut name = path.as_os_str().to_owned();
        name.push("-wal");
        let log = File::options().read(true).write(true).open(name).map_err(|cause| failed(&cause))?;
        let fold = Fold::start(path, Arc::clone(&syncs))?;
        Ok(Self { log, syncs, fold, folder: Arc::new(Mutex::new(Some(folder))) })
    }

    fn log(&self) -> Option<Log> {
        lock(&self.folder).as_ref().and_then(Folder::log)
    }

    fn sync(&self, log: Option<Log>) -> Result<(), StoreError> {
        self.syncs.sync(|| self.log.sync_data())?;
        if let (Some(log), Some(folder)) = (log, &*lock(&self.folder)) {
            folder.remember(log);
        }
        Ok(())
    }
}

/// The thread that writes.
pub(super) struct Writer {
    pub(super) connection: Arc<Mutex<Connection>>,
    pub(super) syncs: Arc<Syncs>,
    pub(super) room: Arc<Room>,
    /// When was looked how much room there is.
    pub(super) looked: Instant,
    /// Removals for which the disk had no room.
    pub(super) owed: Vec<Change>,
    /// When that was tried last.
    pub(super) tried: Instant,
    pub(super) done: Arc<Mutex<(u64, Duration)>>,
    pub(super) disk: Option<Disk>,
}

impl Writer {
    pub(super) fn run(&mut self, waiting: &mpsc::Receiver<Commit>) {
        loop {
            let waits = self.room.is_full() || !self.owed.is_empty();
            let next = if waits {
                waiting.recv_timeout(AGAIN)
            } else {
                waiting.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected)
            };
            match next {
                Ok(first) => {
                    if let Some(cause) = self.syncs.failed() {
                        (first.then)(Err(cause.clone()));
                    } else {
                        self.write_group(waiting, first);
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
            }
            if let Some(cause) = self.syncs.failed() {
                waiting.try_iter().for_each(|commit| (commit.then)(Err(cause.clone())));
                break;
            }
            if self.tried.elapsed() >= AGAIN {
                self.pay();
            }
            if self.room.is_tight() || self.looked.elapsed() >= LOOK {
                self.room.measure(&lock(&self.connection));
                self.looked = Instant::now();
            }
        }
        self.end();
    }

    fn end(&mut self) {
        self.pay();
        if !self.owed.is_empty() {
            let count = self.owed.len();
            tracing::error!(
                count,
                "the disk is full or fails: messages that were acknowledged last come again after a restart"
            );
        }
        // One file holds everything of a broker that was stopped.
        if let Some(disk) = &mut self.disk {
            disk.fold.end();
            if let Some(folder) = &*lock(&disk.folder) {
                let _ = self.syncs.sync(|| folder.forget());
            }
        }
        let connection = lock(&self.connection);
        match self.syncs.fold(&connection, "PRAGMA wal_checkpoint(TRUNCATE)") {
            Ok(true) => {}
            Ok(false) => {
                tracing::warn!("somebody reads the store: its log stays beside its file, and a backup needs both")
            }
            Err(cause) => {
                tracing::debug!(%cause, "the log of the store stays beside its file; the next start reads it")
            }
        }
        if self.syncs.failed().is_some() {
            // The last connection that is closed would do it.
            let _ = connection.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true);
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
        let mut results: Vec<_> = match transact(&mut connection, group.iter().flat_map(|commit| &commit.changes)) {
            Ok(()) => group.iter().map(|_| Ok(())).collect(),
            Err(cause) => match self.syncs.told(&cause) {
                cause if group.len() == 1 || self.syncs.failed().is_some() => {
                    group.iter().map(|_| Err(cause.clone())).collect()
                }
                // One caller's changes must not fail the others'.
                _ => group
                    .iter()
                    .map(|commit| {
                        transact(&mut connection, commit.changes.iter()).map_err(|cause| self.syncs.told(&cause))
                    })
                    .collect(),
            },
        };
        drop(connection);
        let log = self.disk.as_ref().and_then(Disk::log);
        let mut synced = Ok(());
        // Nobody waits for a removal. After a power cut, what was acknowledged last may come again.
        if group.iter().zip(&results).any(|(commit, result)| commit.kind == Kind::Awaited && result.is_ok())
            && let Some(disk) = &self.disk
        {
            synced = disk.sync(log);
            results.iter_mut().filter(|result| result.is_ok()).for_each(|result| result.clone_from(&synced));
        }
        {
            let mut done = lock(&self.done);
            *done = (done.0 + 1, done.1 + started.elapsed());
        }
        for (commit, result) in group.into_iter().zip(results) {
            if result.is_ok() {
                self.forget_owed(&commit.changes);
            }
            match result {
                Err(StoreError::Full) if commit.kind == Kind::Lasting => {
                    self.owed.extend(commit.changes);
                    (commit.then)(Ok(()));
                }
                result => (commit.then)(result),
            }
        }
        if let (Ok(()), Some(disk), Some(log)) = (synced, &self.disk, log) {
            disk.fold.after(&lock(&self.connection), log);
        }
    }

    /// What is owed of a channel goes with it: its number may be another one's soon.
    fn forget_owed(&mut self, changes: &[Change]) {
        if self.owed.is_empty() {
            return;
        }
        for change in changes {
            if let Change::RemoveChannel(id) = change {
                self.owed.retain(|owed| !matches!(owed, Change::Remove(key, _) if key.channel() == *id));
            }
        }
    }

    /// Tries again what the disk had no room for.
    fn pay(&mut self) {
        if self.owed.is_empty() || self.syncs.failed().is_some() {
            return;
        }
        self.tried = Instant::now();
        let mut connection = lock(&self.connection);
        let result = transact(&mut connection, self.owed.iter());
        drop(connection);
        match result.map_err(|cause| self.syncs.told(&cause)) {
            Err(StoreError::Full) => return,
            Err(cause) => {
                let count = self.owed.len();
                tracing::error!(count, %cause, "messages that were acknowledged could not be removed and may come again");
            }
            Ok(()) => {}
        }
        self.owed.clear();
    }
}
