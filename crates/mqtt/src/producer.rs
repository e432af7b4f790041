//! Sending to one channel.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use async_trait::async_trait;
use bytes::Bytes;
use polymq_core::{Address, Completion, Error, ErrorKind, Message, ProduceOptions, Producer, Receipt, Result};
use rumqttc::v5::mqttbytes::QoS;
use tokio::time::timeout;

use crate::{
    NAME,
    bus::Bus,
    config::Protocol,
    convert::{self, Style},
    declared::Queue,
    error::error,
    link::{Link, Outgoing},
    slots::Answer,
    topology::Durable,
};

/// A producer; all producers of a connection share one link, which keeps the order of their calls.
#[derive(Debug)]
pub(crate) struct MqttProducer {
    bus: Arc<Bus>,
    link: Link,
    address: Address,
    style: Style,
    /// Where messages must be held by some session.
    queue: Option<Arc<Queue>>,
    closed: AtomicBool,
}

impl MqttProducer {
    pub(crate) fn new(bus: &Arc<Bus>, address: &Address, options: &ProduceOptions) -> Result<Self> {
        let config = &bus.config;
        let mut style = Style {
            topic: Bytes::copy_from_slice(address.name().as_bytes()),
            qos: quality(config.qos)?,
            retain: config.retain,
            protocol: config.protocol,
        };
        for (key, value) in &options.extra {
            match key.as_str() {
                "qos" => style.qos = value.parse().map_err(|_| not_valid(key, value, "0, 1 or 2")).and_then(quality)?,
                "retain" => style.retain = value.parse().map_err(|_| not_valid(key, value, "true or false"))?,
                _ => {
                    let sentence = format!("unknown option {key:?}; known: qos, retain");
                    return Err(error(ErrorKind::InvalidInput, sentence).with_channel(address.name()));
                }
            }
        }
        let told = config.protocol == Protocol::V5 && style.qos == QoS::AtLeastOnce;
        let queue = Durable::of(config, address, None).map(|row| match options.declare && !options.temporary {
            true => Arc::new(Queue::new(bus, row, told)),
            false => Arc::default(),
        });
        Ok(Self {
            bus: Arc::clone(bus),
            link: bus.link()?.clone(),
            address: address.clone(),
            queue,
            style,
            closed: AtomicBool::new(false),
        })
    }

    fn refuse(&self, cause: Error) -> Completion<Receipt> {
        Completion::ready(Err(cause.with_operation("send").with_channel(self.address.name())))
    }
}

/// Sends a message and tells when the broker has it.
pub(crate) fn publish(
    link: &Link,
    style: &Style,
    queue: Option<&Arc<Queue>>,
    message: &Message,
) -> Result<Completion<Receipt>> {
    let publish = convert::to_publish(message, style)?;
    let (size, limit) = (publish.size(), link.max_packet());
    if size > limit {
        let sentence = format!("a packet of {size} bytes, the broker takes at most {limit}");
        return Err(error(ErrorKind::TooLarge, sentence));
    }
    let (completer, completion) = Completion::queued();
    let id = message.id().cloned().unwrap_or_default();
    link.send(Outgoing { publish, answer: Answer::Receipt { completer, id, queue: queue.cloned() } });
    Ok(completion)
}

fn quality(level: u8) -> Result<QoS> {
    match level {
        0 => Ok(QoS::AtMostOnce),
        1 => Ok(QoS::AtLeastOnce),
        2 => Ok(QoS::ExactlyOnce),
        _ => Err(not_valid("qos", &level.to_string(), "0, 1 or 2")),
    }
}

#[cold]
fn not_valid(key: &str, value: &str, expected: &str) -> Error {
    error(ErrorKind::InvalidInput, format!("option {key:?}: {value:?} is not valid, expected {expected}"))
}

#[async_trait]
impl Producer for MqttProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        if self.closed.load(Ordering::Acquire) {
            return self.refuse(Error::closed("send").with_backend(NAME));
        }
        match publish(&self.link, &self.style, self.queue.as_ref(), &message) {
            Ok(completion) => completion,
            Err(cause) => self.refuse(cause),
        }
    }

    async fn flush(&self) -> Result<()> {
        self.link.flush_sends().await.map_err(|cause| cause.with_operation("flush"))
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, Ordering::Release);
        let limit = self.bus.config.operation_timeout;
        match timeout(limit, self.flush()).await {
            // The connection was closed before, which has flushed it.
            Ok(_) => Ok(()),
            Err(_) => Err(error(ErrorKind::Timeout, format!("messages are unanswered after {limit:?}"))
                .with_operation("close")
                .with_channel(self.address.name())),
        }
    }
}
