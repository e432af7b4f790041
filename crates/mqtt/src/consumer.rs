//! Receiving from one channel.

use std::sync::Arc;

use async_trait::async_trait;
use polymq_core::{Consumer, Error, Incoming, Result, Settler};
use tokio::time::timeout;

use crate::{NAME, bus::Bus, hub::Hub, settle::MqttSettler, stock::Seat};

/// A consumer: its share of what a hub brings.
#[derive(Debug)]
pub(crate) struct MqttConsumer {
    bus: Arc<Bus>,
    hub: Arc<Hub>,
    seat: Seat,
    settler: Arc<MqttSettler>,
    open: bool,
}

impl MqttConsumer {
    /// The hub counts this consumer already.
    pub(crate) fn new(bus: Arc<Bus>, (hub, seat): (Arc<Hub>, Seat), republish: bool) -> Self {
        let settler = Arc::new(MqttSettler::new(&bus, &hub, republish));
        Self { bus, hub, seat, settler, open: true }
    }

    fn leave(&mut self) {
        if std::mem::replace(&mut self.open, false) {
            self.hub.leave(&self.seat);
        }
    }
}

#[async_trait]
impl Consumer for MqttConsumer {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        if !self.open {
            return Err(Error::closed("receive").with_backend(NAME).with_channel(&*self.hub.name));
        }
        self.hub.receive(&self.seat, max, into).await
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::<MqttSettler>::clone(&self.settler)
    }

    async fn close(&mut self) -> Result<()> {
        if self.open {
            self.leave();
            // What cannot be written in time is delivered again.
            let _ = timeout(self.bus.config.operation_timeout, self.hub.flush()).await;
        }
        Ok(())
    }
}

impl Drop for MqttConsumer {
    fn drop(&mut self) {
        self.leave();
    }
}
