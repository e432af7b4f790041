//! What is known of the files: everything, until a sync fails.
//!
//! The system may forget what it could not write, and a later sync of the same file may seem to succeed all the same. So
//! after one that failed nothing is written any more, nothing is answered, and the log, which holds what was synced before,
//! is not put into its file: the next start reads it anew.

use std::{io, path::PathBuf};

use rusqlite::{Connection, ffi};
use tokio::sync::SetOnce;

use super::{StoreError, told};

/// The syncs of one store.
#[derive(Debug)]
pub(super) struct Syncs {
    path: PathBuf,
    /// Why nothing is stored any more.
    lost: SetOnce<StoreError>,
    /// Whether every sync fails.
    #[cfg(test)]
    pub(super) broken: std::sync::atomic::AtomicBool,
}

impl Syncs {
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            lost: SetOnce::new(),
            #[cfg(test)]
            broken: false.into(),
        }
    }

    /// Why nothing is stored any more: a sync has failed.
    pub(super) fn failed(&self) -> Option<&StoreError> {
        self.lost.get()
    }

    /// Waits until a sync has failed.
    pub(super) async fn fail(&self) -> StoreError {
        self.lost.wait().await.clone()
    }

    /// Writes and syncs one of the files beside the engine's, unless a sync has failed.
    ///
    /// # Errors
    ///
    /// Why nothing is stored any more, from now on or already.
    pub(super) fn sync(&self, work: impl FnOnce() -> io::Result<()>) -> Result<(), StoreError> {
        if let Some(cause) = self.failed() {
            return Err(cause.clone());
        }
        let done = if self.works() { work() } else { Err(io::Error::other("as the test wants it")) };
        done.map_err(|cause| self.lose(format!("what was written last cannot be synced: {cause}")))
    }

    /// Puts the engine's log into its file, unless a sync has failed; whether nobody was in the way.
    ///
    /// # Errors
    ///
    /// As [`Syncs::told`].
    pub(super) fn fold(&self, connection: &Connection, how: &str) -> Result<bool, StoreError> {
        if self.failed().is_some() {
            return Ok(true);
        }
        let folded = if self.works() {
            connection.prepare_cached(how).and_then(|mut fold| fold.query_row([], |row| row.get(0)))
        } else {
            Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_IOERR_FSYNC), None))
        };
        folded.map(|busy: i64| busy == 0).map_err(|cause| self.told(&cause))
    }

    /// What the engine said, in our words. When it is about a sync, nothing is stored any more from now on.
    pub(super) fn told(&self, cause: &rusqlite::Error) -> StoreError {
        match cause.sqlite_error() {
            Some(error) if error.extended_code == ffi::SQLITE_IOERR_FSYNC => {
                self.lose(format!("it or its log cannot be synced: {cause}"))
            }
            _ => told(&self.path, cause),
        }
    }

    /// The first cause counts.
    fn lose(&self, what: String) -> StoreError {
        let cause = StoreError::Failed { path: self.path.clone(), what };
        if self.lost.set(cause.clone()).is_ok() {
            tracing::error!(%cause, "nothing is stored any more: start the broker anew");
        }
        cause
    }

    #[cfg(test)]
    fn works(&self) -> bool {
        !self.broken.load(std::sync::atomic::Ordering::Relaxed)
    }

    #[cfg(not(test))]
    fn works(&self) -> bool {
        true
    }
}
