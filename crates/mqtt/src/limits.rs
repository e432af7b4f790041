//! What the broker takes, as it said when it greeted us.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};

use polymq_core::{Error, ErrorKind, Result};
use rumqttc::v5::mqttbytes::v5::{ConnAck, Publish};

use crate::{config::MqttConfig, error::error};

/// What the broker takes over the present connection; whoever sends more loses the connection.
#[derive(Debug)]
pub(crate) struct Limits {
    packet: AtomicU32,
    qos: AtomicU8,
    retain: AtomicBool,
}

impl Default for Limits {
    fn default() -> Self {
        Self { packet: AtomicU32::new(u32::MAX), qos: AtomicU8::new(2), retain: AtomicBool::new(true) }
    }
}

impl Limits {
    /// A connection begins.
    pub(crate) fn begin(&self, connack: &ConnAck) {
        let packet = connack.properties.as_ref().and_then(|properties| properties.max_packet_size);
        self.packet.store(packet.unwrap_or(u32::MAX), Ordering::Relaxed);
        self.qos.store(qos(connack), Ordering::Relaxed);
        self.retain.store(retains(connack), Ordering::Relaxed);
    }

    /// Bytes of the largest packet.
    pub(crate) fn packet(&self) -> usize {
        self.packet.load(Ordering::Relaxed) as usize
    }

    /// Why a message must not be written, if so.
    pub(crate) fn refuse(&self, publish: &Publish) -> Option<Error> {
        let (asked, most) = (publish.qos as u8, self.qos.load(Ordering::Relaxed));
        if asked > most {
            return Some(too_good(asked, most).with_operation("send"));
        }
        (publish.retain && !self.retain.load(Ordering::Relaxed)).then(|| keeps_nothing().with_operation("send"))
    }
}

/// Refuses a broker that cannot do what the configuration says.
pub(crate) fn check(config: &MqttConfig, connack: &ConnAck) -> Result<()> {
    match qos(connack) {
        most if config.qos > most => Err(too_good(config.qos, most)),
        _ if config.retain && !retains(connack) => Err(keeps_nothing()),
        _ => Ok(()),
    }
}

/// Left out, it is the best (section 3.2.2.3.4).
fn qos(connack: &ConnAck) -> u8 {
    connack.properties.as_ref().and_then(|properties| properties.max_qos).unwrap_or(2)
}

fn retains(connack: &ConnAck) -> bool {
    connack.properties.as_ref().and_then(|properties| properties.retain_available) != Some(0)
}

#[cold]
fn too_good(asked: u8, most: u8) -> Error {
    error(
        ErrorKind::Unsupported,
        format!("the broker takes messages of quality of service {most} at most, not {asked}"),
    )
    .with_hint(format!("set qos={most}, or allow more in the broker's configuration"))
}

#[cold]
fn keeps_nothing() -> Error {
    error(ErrorKind::Unsupported, "the broker keeps no message for new subscribers")
        .with_hint("set retain=false, or allow retained messages in the broker's configuration")
}
