//! The signals that stop a service.

use crate::{Error, ErrorKind, Result};

/// SIGINT and SIGTERM, remembered from the moment this is made: before any handler starts, or a signal in between
/// would end the process without a drain.
pub(crate) struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    pub(crate) fn new() -> Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let problem = |error| Error::new(ErrorKind::Other, "signals cannot be received").with_source(error);
        Ok(Self {
            terminate: signal(SignalKind::terminate()).map_err(problem)?,
            interrupt: signal(SignalKind::interrupt()).map_err(problem)?,
        })
    }

    #[cfg(unix)]
    pub(super) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    #[cfg(not(unix))]
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {})
    }

    #[cfg(not(unix))]
    pub(super) async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    }
}
