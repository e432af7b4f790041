//! The signals that stop a service.

use std::sync::LazyLock;

use futures_util::FutureExt;
use tokio::sync::watch;

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
    /// Whether one has come already.
    pub(crate) fn heard(&mut self) -> bool {
        self.next().now_or_never().is_some()
    }

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
    pub(crate) async fn next(&mut self) {
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
    pub(crate) async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending().await
        }
    }
}

static LISTENING: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// A service of this process that a signal stops, until it has stopped.
pub(super) struct Listening(());

impl Listening {
    pub(super) fn begin() -> Self {
        LISTENING.send_modify(|count| *count += 1);
        Self(())
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        LISTENING.send_modify(|count| *count -= 1);
    }
}

/// Whether the program runs a service that a signal stops.
pub(crate) fn somebody_listens() -> bool {
    *LISTENING.borrow() > 0
}

/// Resolves when all of them have stopped.
pub(crate) async fn nobody_listens() {
    // The sender is there for ever.
    let _ = LISTENING.subscribe().wait_for(|count| *count == 0).await;
}
