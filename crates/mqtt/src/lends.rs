//! The events of a connection that brings messages.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use polymq_core::Error;
use rumqttc::v5::mqttbytes::v5::Publish;

use crate::{
    hub::Hub,
    link::{Events, Lost},
};

/// Passes the events of one link on to a hub.
#[derive(Debug)]
pub(crate) struct Lends {
    hub: Arc<Hub>,
    number: u16,
    serial: u32,
    fate: Fate,
    /// Whether another connection to the same broker is up, where the session may be taken over.
    sibling: Option<Arc<AtomicBool>>,
}

impl Lends {
    pub(crate) fn new(hub: &Arc<Hub>, number: u16, serial: u32, sibling: Option<Arc<AtomicBool>>) -> Self {
        Self { hub: Arc::clone(hub), number, serial, fate: Fate::default(), sibling }
    }

    pub(crate) fn fate(&self) -> Fate {
        self.fate.clone()
    }

    fn end(&self, ended: Ended) {
        self.fate.lock().0.get_or_insert(ended);
        self.hub.changed.notify_one();
    }
}

impl Events for Lends {
    fn connected(&mut self, generation: u32, session_present: bool) {
        self.fate.lock().1 = session_present;
        self.hub.connected(self.number, self.serial, generation, session_present);
    }

    fn message(&mut self, generation: u32, publish: Publish) {
        self.hub.message(self.number, generation, publish);
    }

    fn idle(&mut self) {
        self.hub.wake();
    }

    fn lost(&mut self, lost: &Lost) -> bool {
        self.hub.lost(self.number, self.serial);
        let go_on = !matches!(lost, Lost::TakenOver);
        if !go_on {
            self.end(Ended::TakenOver);
        }
        go_on
    }

    fn may_reconnect(&mut self) -> bool {
        // A broker that ends one connection and not the other has given the session to someone else; mosquitto closes
        // without a word more often than with one. Whoever has it must be asked before we take it back.
        let taken_over = self.sibling.as_ref().is_some_and(|up| up.load(Ordering::Acquire));
        if taken_over {
            self.end(Ended::TakenOver);
        }
        !taken_over
    }

    fn subscribed(&mut self) {
        self.hub.subscribed(self.number, self.serial);
    }

    fn refused(&mut self, error: Error) {
        self.hub.fail(&error);
    }

    fn ended(&mut self, error: Option<&Error>) {
        if error.is_some() {
            self.end(Ended::GivenUp);
        }
        self.hub.lost(self.number, self.serial);
    }
}

/// What has become of a connection.
#[derive(Debug, Default, Clone)]
pub(crate) struct Fate(Arc<Mutex<(Option<Ended>, bool)>>);

/// Why a link does not come back by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// Someone else has the session.
    TakenOver,
    /// The limit of attempts is reached.
    GivenUp,
}

impl Fate {
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.lock().0
    }

    /// Whether the broker knew the session at the last connect.
    pub(crate) fn session_present(&self) -> bool {
        self.lock().1
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Option<Ended>, bool)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
