//! The data folder: one broker's at a time, and what that one knows to be on disk.
//!
//! `broker.lock` is locked while a broker runs; the system lets go of it with the process. In it stands up to where the
//! engine's log is known to be synced, written after each sync and before anybody is answered. After a crash it proves
//! that a log was whole that is not any more; what comes after that place may be anything, as after a power cut.

use std::{
    fs::File,
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    path::{Path, PathBuf},
    sync::OnceLock,
};

use crate::{check, store::StoreError};

/// Up to where a log is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Synced {
    /// Which log: the numbers in its head and in all its frames.
    pub(crate) salts: [u8; 8],
    /// Frames of it.
    pub(crate) frames: u32,
}

/// How long the engine's log is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Log {
    /// Which one, as in [`Synced`].
    salts: [u8; 8],
    /// Pages in it.
    pub(crate) pages: u32,
    /// Pages that are in the engine's file already.
    pub(crate) folded: u32,
}

#[derive(Debug)]
pub(crate) struct Folder {
    lock: File,
    /// Where the engine keeps how long its log is; there from its first look on. It stays open: to close it would let go
    /// of the locks that the engine has on it.
    index: (PathBuf, OnceLock<File>),
}

/// Where the record is, after a word that says that there is data.
const RECORD: u64 = 4;

impl Folder {
    /// Takes the folder, or tells that another broker has it.
    pub(crate) fn take(folder: &Path) -> Result<Self, StoreError> {
        let path = folder.join("broker.lock");
        let failed = |cause: io::Error| StoreError::Failed { path: path.clone(), what: cause.to_string() };
        let mut options = File::options();
        let mut lock = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(StoreError::Busy { folder: folder.to_owned() }),
            Err(std::fs::TryLockError::Error(cause)) => return Err(failed(cause)),
        }
        // The engine takes an empty file for a new one.
        let used = lock.read(&mut [0]).map_err(failed)? > 0;
        let data = folder.join("broker.sqlite");
        if used && std::fs::metadata(&data).is_ok_and(|data| data.len() == 0) {
            return Err(StoreError::Damaged { path: data, what: "it is empty, and it was not".to_owned() });
        }
        Ok(Self { lock, index: (folder.join("broker.sqlite-shm"), OnceLock::new()) })
    }

    /// What was known when the last broker ended, unless that one has ended well.
    pub(crate) fn synced(&self) -> Option<Synced> {
        let mut record = [0; 16];
        let mut lock = &self.lock;
        lock.seek(SeekFrom::Start(RECORD)).ok()?;
        lock.read_exact(&mut record).ok()?;
        let (salts, frames, sum) = (part(&record, 0)?, part(&record, 8)?, part(&record, 12)?);
        let frames = u32::from_le_bytes(frames);
        (u32::from_le_bytes(sum) == check::checksum(&record[..12]) && frames > 0).then_some(Synced { salts, frames })
    }

    /// Nothing is known of the log from now on, also after a power cut: only then may it be made shorter.
    pub(crate) fn forget(&self) -> io::Result<()> {
        self.write([0; 16])?;
        self.lock.sync_data()
    }

    /// How long the log is now. `None` when that cannot be read.
    pub(crate) fn log(&self) -> Option<Log> {
        let (path, index) = &self.index;
        let read = (|| {
            let mut index = match index.get() {
                Some(index) => index,
                None => {
                    let opened = File::open(path)?;
                    index.get_or_init(|| opened)
                }
            };
            // The head of the engine's index: pages at 16, salts at 32, folded pages after its copy, at 96.
            let mut head = [0; 100];
            index.seek(SeekFrom::Start(0))?;
            index.read_exact(&mut head)?;
            let number = |at| part(&head, at).map_or(0, u32::from_ne_bytes);
            Ok(Log { salts: part(&head, 32).unwrap_or_default(), pages: number(16), folded: number(96) })
        })();
        read.map_err(|cause: io::Error| tracing::debug!(%cause, "how long the log is cannot be read")).ok()
    }

    /// So much of the log is on disk. When that cannot be noted, less is known after a crash.
    pub(crate) fn remember(&self, log: Log) {
        let mut record = [0; 16];
        record[..8].copy_from_slice(&log.salts);
        record[8..12].copy_from_slice(&log.pages.to_le_bytes());
        let sum = check::checksum(&record[..12]);
        record[12..].copy_from_slice(&sum.to_le_bytes());
        if let Err(cause) = self.write(record) {
            tracing::debug!(%cause, "how far the log is on disk cannot be noted");
        }
    }

    fn write(&self, record: [u8; 16]) -> io::Result<()> {
        let mut file = [0; 20];
        file[..4].copy_from_slice(b"used");
        file[4..].copy_from_slice(&record);
        let mut lock = &self.lock;
        lock.seek(SeekFrom::Start(0))?;
        lock.write_all(&file)
    }
}

fn part<const N: usize>(record: &[u8], at: usize) -> Option<[u8; N]> {
    record.get(at..at + N)?.try_into().ok()
}
