//! Why the store refused.

use std::path::{Path, PathBuf};

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
    /// The channel was deleted meanwhile.
    #[error("the channel was deleted meanwhile; who sends to it makes it anew")]
    Gone,
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

/// What the engine said, in our words.
pub(crate) fn told(path: &Path, cause: &rusqlite::Error) -> StoreError {
    if matches!(cause, rusqlite::Error::StatementChangedRows(0)) {
        return StoreError::Gone;
    }
    match cause.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => StoreError::Full,
        Some(rusqlite::ErrorCode::DatabaseCorrupt | rusqlite::ErrorCode::NotADatabase) => {
            StoreError::Damaged { path: path.to_owned(), what: cause.to_string() }
        }
        _ => StoreError::Failed { path: path.to_owned(), what: cause.to_string() },
    }
}
