//! The events of a connection that brings messages.

use std::sync::{Arc, Mutex, PoisonError};

use polymq_core::Error;
use rumqttc::v5::mqttbytes::v5::Publish;
use tokio::sync::watch;

use crate::{
    hub::Hub,
    link::{Events, Lost},
};

/// Passes the events of one link on to a hub.
#[derive(Debug)]
pub(crate) struct Lends {
    hub: Arc<Hub>,
    number: u32,
    serial: u32,
    fate: Fate,
    /// The generation of another connection to the same broker, where the session may be taken over.
    sibling: Option<watch::Receiver<u32>>,
    /// What it was when this connection ended.
    sibling_at_loss: u32,
    /// What it was when this connection was tried again last.
    sibling_tried: u32,
}

impl Lends {
    pub(crate) fn new(hub: &Arc<Hub>, number: u32, serial: u32, sibling: Option<watch::Receiver<u32>>) -> Self {
        Self {
            hub: Arc::clone(hub),
            number,
            serial,
            fate: Fate::default(),
            sibling,
            sibling_at_loss: 0,
            sibling_tried: 0,
        }
    }

    pub(crate) fn fate(&self) -> Fate {
        self.fate.clone()
    }

    fn sibling(&self) -> u32 {
        self.sibling.as_ref().map_or(0, |generation| *generation.borrow())
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
        self.sibling_at_loss = self.sibling();
        self.hub.lost(self.number, self.serial);
        let go_on = !matches!(lost, Lost::TakenOver);
        if !go_on {
            self.end(Ended::TakenOver);
        }
        go_on
    }

    fn broker_is_back(&self) -> impl Future<Output = ()> + Send {
        let (sibling, before) = (self.sibling.clone(), self.sibling_at_loss.max(self.sibling_tried));
        async move {
            match sibling {
                Some(mut generation) => drop(generation.wait_for(|now| *now > before).await),
                None => std::future::pending().await,
            }
        }
    }

    fn may_reconnect(&mut self) -> bool {
        // A broker that ends one connection and not the other has given the session to someone else; mosquitto closes
        // without a word more often than with one. Whoever has it must be asked before we take it back.
        // One that has ended as well, and is back already, says that the broker was gone.
        let taken_over = self.sibling_at_loss > 0 && self.sibling() == self.sibling_at_loss;
        if taken_over {
            self.end(Ended::TakenOver);
        }
        self.sibling_tried = self.sibling();
        !taken_over
    }

    fn has_room(&self) -> bool {
        self.hub.has_room()
    }

    fn room(&self) -> impl Future<Output = ()> + Send {
        self.hub.turns(false)
    }

    fn must_look(&self) -> bool {
        self.hub.must_look(self.number)
    }

    fn looked(&mut self) {
        self.hub.looked(self.number);
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
