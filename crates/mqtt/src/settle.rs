//! Settling deliveries.
//!
//! MQTT knows one answer, "done". Everything else is made from keeping that answer back: a message that is not
//! acknowledged stays with the broker, and comes again when this process dies.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use bytes::Bytes;
use polymq_core::{ATTEMPT, Completion, ErrorKind, Message, Result, Settler, Token};
use rumqttc::v5::mqttbytes::QoS;
use tokio::{runtime::Handle, time::sleep};

use crate::{
    bus::Bus,
    convert::{self, Style},
    error::error,
    hub::Hub,
    producer,
};

/// Settles the deliveries of one consumer.
#[derive(Debug)]
pub(crate) struct MqttSettler {
    bus: Weak<Bus>,
    /// The connection's: who settles may be a thread without one, or of one that ends soon.
    runtime: Handle,
    hub: Arc<Hub>,
    /// How a retry sends a message again; `None` where that would reach others too, or lose the attempt number.
    republish: Option<Style>,
}

impl MqttSettler {
    pub(crate) fn new(bus: &Arc<Bus>, hub: &Arc<Hub>, republish: bool) -> Self {
        let style = Style {
            topic: Bytes::copy_from_slice(hub.name.as_bytes()),
            // Less would give the original up without knowing that its successor arrived.
            qos: QoS::AtLeastOnce,
            retain: false,
            protocol: bus.config.protocol,
        };
        let republish = republish.then_some(style);
        Self { bus: Arc::downgrade(bus), runtime: bus.runtime.clone(), hub: Arc::clone(hub), republish }
    }
}

impl Settler for MqttSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        // There is no answer to an acknowledgement. If it is lost with the connection, the message comes again.
        Completion::ready(if self.hub.ack(token) { Ok(()) } else { Err(stale()) })
    }

    fn release(&self, token: Token, message: Message) {
        self.hub.again(token, message, None, true);
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        let retry = Retry {
            bus: self.bus.clone(),
            runtime: self.runtime.clone(),
            hub: Arc::clone(&self.hub),
            token,
            message: message.clone(),
            attempt,
            after,
        };
        let Some(style) = self.republish.clone() else {
            return Completion::ready(retry.stay());
        };
        if !self.hub.is_current(token) {
            return Completion::ready(Err(stale()));
        }
        let (completer, completion) = Completion::queued();
        let _ = completer.hand_over();
        let ticket = self.bus.upgrade().map(|bus| bus.copies.ticket());
        self.runtime.spawn(async move {
            completer.complete(retry.republish(&style).await);
            drop(ticket);
        });
        completion
    }
}

struct Retry {
    bus: Weak<Bus>,
    runtime: Handle,
    hub: Arc<Hub>,
    token: Token,
    message: Message,
    attempt: u32,
    after: Duration,
}

impl Retry {
    /// Sends the successor, which waits wherever it is received, then gives the original up.
    async fn republish(self, style: &Style) -> Result<()> {
        let sent = match self.bus.upgrade().filter(|bus| bus.is_up()) {
            Some(bus) => self.send(&bus, style).await,
            // By the time there is a connection, the broker may have delivered the original again.
            None => Err(error(ErrorKind::Disconnected, "not connected")),
        };
        match sent {
            Ok(()) if self.hub.ack(self.token) => Ok(()),
            // The connection ended in between: the successor is safe, and the original comes again too.
            Ok(()) => Err(stale()),
            // It may be there: settling again sends a copy more, and no copy less.
            Err(cause) if cause.kind() == ErrorKind::UnknownOutcome => Err(cause.with_operation("settle")),
            Err(cause) => {
                // Still ours: then the attempt happens here, and only its number is lost with this process.
                tracing::warn!(channel = &*self.hub.name, %cause, "a retry stays in this process");
                self.stay()
            }
        }
    }

    async fn send(&self, bus: &Bus, style: &Style) -> Result<()> {
        let mut copy = self.message.clone();
        copy.set_system_header(ATTEMPT, self.attempt.to_string());
        if !self.after.is_zero() {
            convert::set_due_in(&mut copy, self.after);
        }
        producer::publish(bus.link()?, style, Some(&Arc::default()), &copy)?.await.map(|_| ())
    }

    /// Hands the original out again when its time has come. The broker keeps it until it is acknowledged, so that
    /// from here on another attempt is certain.
    fn stay(self) -> Result<()> {
        let Self { runtime, hub, token, message, attempt, after, .. } = self;
        if after.is_zero() {
            return if hub.again(token, message, Some(attempt), false) { Ok(()) } else { Err(stale()) };
        }
        if !hub.set_aside(token) {
            return Err(stale());
        }
        runtime.spawn(async move {
            sleep(after).await;
            hub.again(token, message, Some(attempt), false);
        });
        Ok(())
    }
}

#[cold]
fn stale() -> polymq_core::Error {
    error(ErrorKind::Stale, "the connection that brought this message has ended; the broker delivers it again")
        .with_operation("settle")
}
