//! Receiving from one channel.

use std::sync::Arc;

use async_trait::async_trait;
use polymq_core::{Consumer, Error, Incoming, Result, Settler};
use tokio::time::timeout;

use crate::{NAME, bus::Bus, keeper::Kept, settle::MqttSettler, stock::Seat};

/// A consumer: its share of what a hub brings.
#[derive(Debug)]
pub(crate) struct MqttConsumer {
    bus: Arc<Bus>,
    kept: Kept,
    seat: Seat,
    settler: Arc<MqttSettler>,
    open: bool,
}

impl MqttConsumer {
    /// The hub counts this consumer already.
    pub(crate) fn new(bus: Arc<Bus>, (kept, seat): (Kept, Seat), republish: bool) -> Self {
        let settler = Arc::new(MqttSettler::new(&bus, &kept.hub, republish));
        Self { bus, kept, seat, settler, open: true }
    }

    fn leave(&mut self) {
        if std::mem::replace(&mut self.open, false) {
            self.kept.hub.leave(&self.seat);
        }
    }
}

#[async_trait]
impl Consumer for MqttConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        if !self.open {
            return Err(Error::closed("receive").with_backend(NAME).with_channel(&*self.kept.hub.name));
        }
        self.kept.hub.receive(&self.seat, max, into).await
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::<MqttSettler>::clone(&self.settler)
    }

    async fn close(&mut self) -> Result<()> {
        self.leave();
        // Also the second time: what was settled since the first is told before the process may end.
        let told = async {
            self.kept.hub.flush().await;
            // The broker has read it all when it has answered the goodbye, which waits for what consumers still hold.
            if self.kept.hub.close_if_done() {
                self.kept.closed().await;
            }
        };
        // What cannot be told in time is delivered again.
        let _ = timeout(self.bus.config.operation_timeout, told).await;
        Ok(())
    }
}

impl Drop for MqttConsumer {
    fn drop(&mut self) {
        self.leave();
    }
}
