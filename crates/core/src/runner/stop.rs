//! The signal to stop, cheap enough to look at before every message.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

/// A cancellation token that is looked at with two loads; tokio's own takes a lock for that.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    token: CancellationToken,
    said: Arc<AtomicBool>,
    above: Arc<AtomicBool>,
}

impl Stop {
    /// Stopped by itself or together with this one; has no children of its own.
    pub(super) fn child(&self) -> Self {
        Self { token: self.token.child_token(), said: Arc::default(), above: Arc::clone(&self.said) }
    }

    pub(super) fn stop(&self) {
        // Before the token, so that whoever it wakes finds it said.
        self.said.store(true, Ordering::Release);
        self.token.cancel();
    }

    #[inline]
    pub(crate) fn is_said(&self) -> bool {
        self.said.load(Ordering::Acquire) || self.above.load(Ordering::Acquire)
    }

    /// Resolves when it is said.
    pub(crate) fn said(&self) -> WaitForCancellationFuture<'_> {
        self.token.cancelled()
    }
}
