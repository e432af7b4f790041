//! Receiving: one consumer's share of what its hub fetches.

use std::sync::Arc;

use async_trait::async_trait;
use polymq_core::{Consumer, Incoming, Result, Settler};
use tokio::{sync::Notify, time::timeout};

use crate::{bodies::Bodies, hub::Hub, producer::CLOSE_TIMEOUT, settle::KafkaSettler};

/// A consumer of a channel.
#[derive(Debug)]
pub(crate) struct KafkaConsumer {
    hub: Arc<Hub>,
    share: u32,
    arrived: Arc<Notify>,
    settler: Arc<KafkaSettler>,
    bodies: Bodies,
}

impl KafkaConsumer {
    pub(crate) fn new(hub: Arc<Hub>, share: u32, arrived: Arc<Notify>, settler: KafkaSettler) -> Self {
        Self { hub, share, arrived, settler: Arc::new(settler), bodies: Bodies::default() }
    }
}

#[async_trait]
impl Consumer for KafkaConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        loop {
            // Nothing is taken while this waits, so dropping the future loses nothing.
            if let Some(result) = self.hub.take(self.share, max, &mut self.bodies, into) {
                return result.map_err(|error| error.with_channel(&*self.hub.names.topic));
            }
            self.arrived.notified().await;
        }
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.settler) as Arc<dyn Settler>
    }

    async fn close(&mut self) -> Result<()> {
        self.hub.part(self.share);
        // The last one leaves the group; where others go on, or messages are to be settled yet, only a commit is awaited: this
        // process may end now.
        let (committed, mut ended) = (self.hub.committed(), self.hub.ended());
        let done = async {
            tokio::select! {
                _ = committed => {}
                _ = ended.wait_for(|ended| *ended) => {}
            }
        };
        // Bounded for a broker that does not answer.
        let _ = timeout(CLOSE_TIMEOUT, done).await;
        Ok(())
    }
}

impl Drop for KafkaConsumer {
    fn drop(&mut self) {
        self.hub.part(self.share);
    }
}
