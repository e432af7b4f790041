//! Settling deliveries.
//!
//! MQTT knows one answer, "done". Everything else is made from keeping that answer back: a message that is not
//! acknowledged stays with the broker, and comes again when this process dies.

use std::{sync::Arc, sync::Weak, time::Duration};

use bytes::Bytes;
use polymq_core::{ATTEMPT, Completion, ErrorKind, Message, Result, Settler, Token};
use rumqttc::v5::mqttbytes::QoS;
use tokio::time::sleep;

use crate::{
    bus::Bus,
    convert::Style,
    error::error,
    hub::{Hub, Quota},
    producer,
};

/// Settles the deliveries of one consumer.
#[derive(Debug)]
pub(crate) struct MqttSettler {
    bus: Weak<Bus>,
    hub: Arc<Hub>,
    quota: Arc<Quota>,
    /// How a retry sends a message again; `None` where that would reach others too, or lose the attempt number.
    republish: Option<Style>,
}

impl MqttSettler {
    pub(crate) fn new(bus: &Arc<Bus>, hub: &Arc<Hub>, quota: &Arc<Quota>, republish: bool) -> Self {
        let style = Style {
            topic: Bytes::copy_from_slice(hub.name.as_bytes()),
            // Less would give the original up without knowing that its successor arrived.
            qos: QoS::AtLeastOnce,
            retain: false,
            protocol: bus.config.protocol,
        };
        Self {
            bus: Arc::downgrade(bus),
            hub: Arc::clone(hub),
            quota: Arc::clone(quota),
            republish: republish.then_some(style),
        }
    }
}

impl Settler for MqttSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        self.quota.free();
        // There is no answer to an acknowledgement. If it is lost with the connection, the message comes again.
        Completion::ready(if self.hub.ack(token) { Ok(()) } else { Err(stale()) })
    }

    fn release(&self, token: Token, message: Message) {
        self.quota.free();
        self.hub.again(token, message, None, true);
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        self.quota.free();
        if !self.hub.is_current(token) {
            return Completion::ready(Err(stale()));
        }
        let retry = Retry {
            bus: self.bus.clone(),
            hub: Arc::clone(&self.hub),
            token,
            message: message.clone(),
            attempt,
            republish: self.republish.clone(),
        };
        if after.is_zero() {
            let (completer, completion) = Completion::queued();
            let _ = completer.hand_over();
            tokio::spawn(async move { completer.complete(retry.now().await) });
            return completion;
        }
        // The broker keeps the message until it is acknowledged: from here on, another attempt is certain.
        tokio::spawn(async move {
            sleep(after).await;
            let _ = retry.now().await;
        });
        Completion::ready(Ok(()))
    }
}

struct Retry {
    bus: Weak<Bus>,
    hub: Arc<Hub>,
    token: Token,
    message: Message,
    attempt: u32,
    republish: Option<Style>,
}

impl Retry {
    async fn now(mut self) -> Result<()> {
        if let Some(style) = self.republish.take() {
            match self.republish(&style).await {
                Ok(()) => return Ok(()),
                Err(cause) if cause.kind() == ErrorKind::Stale => return Err(cause),
                // Still ours: then the attempt happens here, and only its number is lost with this process.
                Err(cause) => tracing::warn!(channel = &*self.hub.name, %cause, "a retry stays in this process"),
            }
        }
        match self.hub.again(self.token, self.message, Some(self.attempt), false) {
            true => Ok(()),
            false => Err(stale()),
        }
    }

    /// Sends the successor, then gives the original up.
    async fn republish(&self, style: &Style) -> Result<()> {
        // The broker delivers a message of an ended connection again: a copy would be one too many.
        if !self.hub.is_current(self.token) {
            return Err(stale());
        }
        let bus = self.bus.upgrade().ok_or_else(|| error(ErrorKind::Closed, "the connection was closed"))?;
        let mut copy = self.message.clone();
        copy.set_system_header(ATTEMPT, self.attempt.to_string());
        producer::publish(bus.link()?, style, true, &copy)?.await?;
        match self.hub.ack(self.token) {
            true => Ok(()),
            // The connection ended in between: the successor is safe, and the original comes again too.
            false => Err(stale()),
        }
    }
}

#[cold]
fn stale() -> polymq_core::Error {
    error(ErrorKind::Stale, "the connection that brought this message has ended; the broker delivers it again")
        .with_operation("settle")
}
