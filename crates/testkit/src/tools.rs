//! What some brokers have and others lack, for the faults that need it.

use std::{fmt, net::SocketAddr};

use async_trait::async_trait;

/// A tool, or in a few words why there is none, which the summary prints.
pub type Tool<'a, T> = Result<&'a T, &'static str>;

/// What a harness says that says nothing: the case fails.
pub(crate) const UNSAID: &str = "the harness says neither that it has this nor why not";

/// What notices that a queue is deleted under those who use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deletion {
    /// Who uses the queue, and nobody else.
    OfChannel,
    /// The connection that held it, since the broker keeps what it is to get by connection; it is made again.
    OfConnection,
}

/// The password of one user, who may do everything and is used by nobody else.
#[async_trait]
pub trait Passwords: Send + Sync + fmt::Debug {
    /// Where the server listens that checks it.
    fn address(&self) -> SocketAddr;

    /// A URL with this password, to what listens at `at`.
    fn url(&self, password: &str, at: SocketAddr) -> String;

    /// Changes the password at the broker, and returns when the old one is refused.
    async fn set(&self, password: &str);
}

/// A trouble of the broker that can be switched on and off.
#[async_trait]
pub trait Switch: Send + Sync + fmt::Debug {
    /// A URL for which it matters.
    fn url(&self) -> String;

    /// Returns when it is so.
    async fn turn(&self, on: bool);
}
