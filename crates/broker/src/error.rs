//! Why a broker cannot start.

use crate::store::StoreError;

/// Why a broker cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// The data cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
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
