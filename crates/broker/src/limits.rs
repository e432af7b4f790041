//! What the broker allows, in one place.

use std::time::Duration;

/// What is beyond these is refused; with the protocol's error where it has one. The defaults are KubeMQ's where it has
/// them.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Messages of one receive.
    pub receive: usize,
    /// Longest wait of a receive.
    pub wait: Duration,
    /// Longest expiration of a message.
    pub expiration: Duration,
    /// Longest delay of a message.
    pub delay: Duration,
    /// Longest visibility time of a transaction.
    pub visibility: Duration,
    /// Most deliveries of a message; a message that asks for none gets these.
    pub receive_count: i32,
    /// Bytes of a message.
    pub message: usize,
    /// Connections at a time; more are closed at once.
    pub connections: usize,
    /// Calls and streams of one connection at a time; more wait at their client.
    pub streams: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            receive: 1024,
            wait: Duration::from_secs(3600),
            expiration: Duration::from_secs(43_200),
            delay: Duration::from_secs(43_200),
            visibility: Duration::from_secs(43_200),
            receive_count: 1024,
            message: 100 << 20,
            connections: 10_000,
            streams: 2_000,
        }
    }
}

/// How long a receive waits that does not say.
pub(crate) const DEFAULT_WAIT: Duration = Duration::from_secs(1);
/// How long a message is held for a transaction that does not say.
pub(crate) const DEFAULT_VISIBILITY: Duration = Duration::from_secs(60);
