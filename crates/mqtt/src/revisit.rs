//! Visits to the sessions that nobody here consumes, so that they do not expire while this process lives.
//!
//! A broker drops a session that nobody connects to for `session_expiry`, with its messages. Producers connect to none, and
//! nobody to those of dead letters until somebody looks at them. The broker tells only that nobody at all wants a message:
//! where anyone else listens to its topic, it would be confirmed and held by nobody.

use std::{sync::Weak, time::Duration};

use tokio::time::sleep;

use crate::{
    bus::Bus,
    config::{MqttConfig, Protocol},
};

/// Visits as often as it takes, until everything ends.
pub(crate) async fn run(bus: Weak<Bus>) {
    let Some((every, mut stop)) = bus.upgrade().and_then(|bus| Some((every(&bus.config)?, bus.stopping()))) else {
        return;
    };
    loop {
        tokio::select! {
            () = sleep(every.mul_f64(0.75 + fastrand::f64() / 4.0)) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
        let Some(bus) = bus.upgrade() else { return };
        tokio::select! {
            () = bus.revisit() => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

/// Twice may fail. Under MQTT 3.1.1 sessions do not expire, nor do they with the largest expiry.
fn every(config: &MqttConfig) -> Option<Duration> {
    let expires = config.protocol == Protocol::V5 && config.session_expiry.as_secs() < u64::from(u32::MAX);
    expires.then(|| (config.session_expiry / 3).max(Duration::from_secs(1)))
}
