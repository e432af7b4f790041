//! Why a broker cannot start, or go on.

use std::path::PathBuf;

use crate::store::StoreError;

/// Why a broker cannot start, or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// The data cannot be opened, or not be written any more.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file that an option names cannot be used.
    #[error("{}: {what}", .file.display())]
    Option {
        /// The file.
        file: PathBuf,
        /// What is wrong with it and what is expected.
        what: String,
    },
    /// The address cannot be had.
    #[error("cannot listen on {address:?}: {cause}; choose another address or stop what uses it")]
    Listen {
        /// The address that was asked for.
        address: String,
        /// What the system said.
        #[source]
        cause: std::io::Error,
    },
}

/// The result of starting a broker.
pub type Result<T> = std::result::Result<T, BrokerError>;
