//! The connection that users hold: one link for sending, and one for each queue that is consumed.

use std::sync::{Arc, Mutex};

use tokio::{sync::OnceCell, time::timeout};

use crate::{
    NAME,
    bus::{Bus, lock},
    config::{MqttConfig, Protocol},
    consumer::MqttConsumer,
    error::error,
    keeper::ROW_ENDS_AFTER,
    producer::MqttProducer,
    topology::{self, Durable},
};
use async_trait::async_trait;
use polymq_core::{
    Address, Capabilities, ChannelKind, Connection, ConsumeOptions, Consumer, Error, ErrorKind, HealthWatch,
    ProduceOptions, Producer, Result, Start,
};

/// A connection to an MQTT broker.
#[derive(Debug)]
pub(crate) struct MqttConnection {
    bus: Arc<Bus>,
    capabilities: Capabilities,
    /// What came of closing, for the first one who asks.
    closed: OnceCell<Mutex<Option<Error>>>,
}

impl MqttConnection {
    pub(crate) async fn connect(config: MqttConfig) -> Result<Self> {
        let capabilities = topology::capabilities(&config);
        Ok(Self { bus: Bus::connect(config).await?, capabilities, closed: OnceCell::new() })
    }

    fn row(&self, address: &Address, group: Option<&str>) -> Option<Durable> {
        Durable::of(&self.bus.config, address, group)
    }

    async fn declare_all(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        if let Some(row) = self.row(address, options.group.as_deref()) {
            self.bus.declare_row(&row, true).await?;
        }
        self.declare_dead_letters(options, true).await
    }

    async fn declare_dead_letters(&self, options: &ConsumeOptions, see: bool) -> Result<()> {
        let Some(dead_letters) = &options.dead_letters else { return Ok(()) };
        topology::check_published(dead_letters)
            .map_err(|cause| cause.with_hint("name the queue for dead letters of a wildcard yourself"))?;
        match self.row(dead_letters, None) {
            Some(row) => self.bus.declare_row(&row, see).await,
            None => Ok(()),
        }
    }

    /// Ends everything. Cancelled, it may be begun again.
    async fn wind_up(&self) -> Result<()> {
        let bus = &self.bus;
        // Each gives its original up. One that is not sent in time is told so by itself.
        let copies = async {
            bus.copies.flush().await;
            Ok(())
        };
        let _ = bus.bounded("close", copies).await;
        bus.stop.send_replace(true);
        let mut kept: Vec<_> = lock(&bus.own).clone();
        let cells: Vec<_> = lock(&bus.kept).values().cloned().collect();
        // At once, also while another consumer is still being made.
        let ended = Error::closed("receive");
        kept.iter().for_each(|kept| kept.hub.fail(&ended));
        for cell in &cells {
            cell.try_lock().iter().flat_map(|kept| kept.iter()).for_each(|kept| kept.hub.fail(&ended));
        }
        let consumers = async {
            for cell in cells {
                kept.extend(cell.lock().await.clone());
            }
            // At once: a keeper may wait for the broker before it sees that it must stop.
            kept.iter().for_each(|kept| kept.hub.fail(&Error::closed("receive")));
            for kept in kept {
                kept.closed().await;
            }
            Ok(())
        };
        let consumers = bus.bounded("close", consumers).await;
        let link = bus.link()?;
        // Without a connection there is nothing to wait for but the connection.
        if link.waiting() > 0 || bus.is_up() {
            let _ = bus.bounded("close", link.flush_sends()).await;
        }
        let unsent = link.close(false).await;
        bus.board.close();
        consumers?;
        match unsent {
            0 => Ok(()),
            _ => {
                Err(error(ErrorKind::Disconnected, format!("{unsent} messages were not sent")).with_operation("close"))
            }
        }
    }

    fn check_open(&self, operation: &'static str) -> Result<()> {
        match self.bus.is_stopped() {
            true => Err(Error::closed(operation).with_backend(NAME)),
            false => Ok(()),
        }
    }
}

fn check_consume(address: &Address, options: &ConsumeOptions) -> Result<()> {
    topology::check_address(address)?;
    if let Some(group) = &options.group {
        topology::check_group(group)?;
    }
    if options.start == Start::Earliest {
        return Err(Error::unsupported(NAME, "beginning with messages that were sent before"));
    }
    match options.extra.first() {
        Some((key, _)) => {
            Err(error(ErrorKind::InvalidInput, format!("unknown option {key:?}; a consumer has none here")))
        }
        None => Ok(()),
    }
}

/// What may have been declared is no more than that: nothing was sent or received, and there is no harm in another try.
#[cold]
fn in_passing(cause: Error) -> Error {
    match cause.kind() {
        ErrorKind::UnknownOutcome => cause.with_kind(ErrorKind::Timeout),
        _ => cause,
    }
}

#[async_trait]
impl Connection for MqttConnection {
    fn backend(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn health(&self) -> HealthWatch {
        self.bus.board.watch()
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        topology::check_address(address)
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        self.check_open("producer")?;
        topology::check_published(address)?;
        let producer = MqttProducer::new(&self.bus, address, options)?;
        // Who waits for a reply has a plain subscription, or a session of its own.
        if let Some(row) = self.row(address, None).filter(|_| !options.temporary) {
            let named = |cause: Error| in_passing(cause).with_operation("declare").with_channel(address.name());
            if options.declare {
                self.bus.declare_row(&row, false).await.map_err(named)?;
            } else if !self.bus.is_kept(&row).await && !self.bus.visit(&row, false).await.map_err(named)? {
                return Err(error(ErrorKind::NotFound, "no session holds messages of this queue")
                    .with_operation("producer")
                    .with_channel(address.name())
                    .with_hint("declare it, or send to a topic where only foreign subscribers listen"));
            }
        }
        Ok(Box::new(producer))
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        self.check_open("consumer")?;
        check_consume(address, options)?;
        let named = |cause: Error| in_passing(cause).with_operation("consumer").with_channel(address.name());
        if options.declare {
            self.declare_dead_letters(options, false).await.map_err(named)?;
        }
        // What is for one consumer and a while needs no session that outlives it.
        let place = match self.row(address, options.group.as_deref()).filter(|_| !options.temporary) {
            Some(row) => self.bus.join(row, address.shared_name(), options).await.map_err(named)?,
            None => self.bus.own(address.shared_name(), options).await.map_err(named)?,
        };
        let republish = address.kind() == ChannelKind::Queue && self.bus.config.protocol == Protocol::V5;
        Ok(Box::new(MqttConsumer::new(Arc::clone(&self.bus), place, republish)))
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.check_open("declare")?;
        check_consume(address, options)?;
        let named = |cause: Error| cause.with_operation("declare").with_channel(address.name());
        self.declare_all(address, options).await.map_err(named)
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.check_open("delete")?;
        let Some(row) = self.row(address, group) else { return Ok(()) };
        self.bus.declared.remove(&row);
        let cell = lock(&self.bus.kept).remove(&row);
        let kept = match cell {
            Some(cell) => cell.lock().await.take(),
            None => None,
        };
        if let Some(kept) = kept {
            kept.hub.fail(&error(ErrorKind::NotFound, "the channel was deleted"));
            // A consumer that cannot let go in time is thrown out below.
            let _ = timeout(self.bus.config.operation_timeout, kept.closed()).await;
        }
        let mut absent = 0;
        for number in 0..u16::MAX {
            let (link, present) = self.bus.open(&row, number).await.map_err(|cause| cause.with_operation("delete"))?;
            link.close(true).await;
            absent = if present { 0 } else { absent + 1 };
            if absent == ROW_ENDS_AFTER {
                break;
            }
        }
        Ok(())
    }

    async fn exists(&self, address: &Address, group: Option<&str>) -> Result<bool> {
        self.check_open("exists")?;
        // Every topic is there; only sessions are made.
        let Some(row) = self.row(address, group) else { return Ok(true) };
        if self.bus.is_kept(&row).await {
            return Ok(true);
        }
        let named = |cause: Error| cause.with_operation("exists").with_channel(address.name());
        self.bus.visit(&row, false).await.map_err(named)
    }

    async fn ping(&self) -> Result<()> {
        self.check_open("ping")?;
        self.bus.bounded("ping", self.bus.link()?.ping()).await.map_err(|cause| cause.with_operation("ping"))
    }

    async fn close(&self) -> Result<()> {
        // Who closes at the same time waits for the same end.
        let ended = || async { Mutex::new(self.wind_up().await.err()) };
        lock(self.closed.get_or_init(ended).await).take().map_or(Ok(()), Err)
    }
}
