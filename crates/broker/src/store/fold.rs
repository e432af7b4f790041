//! The engine's log goes into its file beside the writing: by a thread and a connection of their own, in short steps,
//! so that hardly ever somebody who waits for the disk waits for that.
//!
//! The log can be begun anew only when all of it is in the file, which a thread beside a busy writer never reaches: what
//! it leaves, the writer folds itself, and that is little.

use std::{
    path::Path,
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

use rusqlite::Connection;

use super::{StoreError, syncs::Syncs, told};
use crate::folder::Log;

/// Pages that are worth a step.
const STEP: u32 = 1024;
/// Pages that are little.
const LITTLE: u32 = 512;
/// Pages from which on the log is begun anew when little is left of it: 16 MiB.
const LONG: u32 = 4096;
/// Pages from which on it is begun anew however much is left.
const TOO_LONG: u32 = 32_768;

/// Puts all of the log that nobody reads any more into the file.
const FOLD: &str = "PRAGMA wal_checkpoint(PASSIVE)";

/// The thread.
#[derive(Debug)]
pub(super) struct Fold {
    syncs: Arc<Syncs>,
    asks: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Fold {
    pub(super) fn start(path: &Path, syncs: Arc<Syncs>) -> Result<Self, StoreError> {
        let connection = Connection::open(path).map_err(|cause| told(path, &cause))?;
        let (asks, asked) = sync_channel(1);
        let known = Arc::clone(&syncs);
        let thread =
            std::thread::Builder::new().name("polymq-fold".into()).spawn(move || steps(&connection, &known, &asked));
        let thread = thread.map_err(|cause| StoreError::Failed { path: path.to_owned(), what: cause.to_string() })?;
        Ok(Self { syncs, asks: Some(asks), thread: Some(thread) })
    }

    /// After a transaction of the writer: has a step made when there is enough for one, and ends what the steps leave.
    pub(super) fn after(&self, writer: &Connection, log: Log) {
        let left = log.pages.saturating_sub(log.folded);
        if (log.pages >= LONG && left <= LITTLE) || log.pages >= TOO_LONG {
            fold(writer, &self.syncs);
        } else if left >= STEP
            && let Some(asks) = &self.asks
        {
            // When one is asked for already, that one will see these pages too.
            let _ = asks.try_send(());
        }
    }

    /// Waits for the step that is under way; there are no more.
    pub(super) fn end(&mut self) {
        self.asks.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn steps(connection: &Connection, syncs: &Syncs, asked: &Receiver<()>) {
    while asked.recv().is_ok() {
        fold(connection, syncs);
    }
}

/// What fails is tried again at the next step, unless that was a sync, and nothing is lost by it: the log stays longer.
fn fold(connection: &Connection, syncs: &Syncs) {
    if let Err(cause) = syncs.fold(connection, FOLD) {
        tracing::warn!(%cause, "the log of the store could not be shortened");
    }
}
