//! Receives the messages of one path.

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use polymq_core::{Consumer, Error, Incoming, Result, Settler};
use tokio::sync::mpsc;

use crate::{NAME, listener::Listener, settle::Share};

/// The consumer of one path. What it has not received when it ends is answered with 503.
pub(crate) struct HttpConsumer {
    share: Arc<Share>,
    received: mpsc::UnboundedReceiver<Incoming>,
    /// Serves the requests.
    listener: Arc<Listener>,
    closed: bool,
}

impl HttpConsumer {
    pub(crate) fn new(share: Arc<Share>, received: mpsc::UnboundedReceiver<Incoming>, listener: Arc<Listener>) -> Self {
        Self { share, received, listener, closed: false }
    }

    fn stop(&mut self) {
        self.closed = true;
        self.share.close();
        while let Ok(incoming) = self.received.try_recv() {
            self.share.release(incoming.token, incoming.message);
        }
    }
}

#[async_trait]
impl Consumer for HttpConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        let before = into.len();
        while into.len() == before {
            if self.closed || self.received.recv_many(into, max.max(1)).await == 0 {
                return Err(Error::closed("receive").with_backend(NAME));
            }
            // A sender that is gone in the meantime keeps its message, and would not learn what became of it.
            let mut at = before;
            while at < into.len() {
                if self.share.is_awaited(into[at].token) { at += 1 } else { drop(into.remove(at)) }
            }
        }
        Ok(())
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.share) as Arc<dyn Settler>
    }

    async fn close(&mut self) -> Result<()> {
        self.stop();
        self.listener.written(self.share.flush()).await;
        Ok(())
    }
}

impl Drop for HttpConsumer {
    fn drop(&mut self) {
        self.stop();
    }
}

impl fmt::Debug for HttpConsumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpConsumer").field("share", &self.share).finish_non_exhaustive()
    }
}
