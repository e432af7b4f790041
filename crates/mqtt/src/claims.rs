//! Who takes which session: consumers ask each other over the broker.
//!
//! MQTT ends the older of two connections with one client id, so a consumer must know whether a session is in use
//! before it connects as that session. Each session has a topic. Whoever uses the session is subscribed to its topic
//! with a connection of its own and objects to the claims of others:
//!
//! 1. Publish "probe" and subscribe, in one go. Under MQTT 5 the answer "no matching subscribers" says that nobody
//!    is there.
//! 2. Publish "claim". The first claim on the topic wins, because all subscribers see one order; a later claim is
//!    answered with "held".
//! 3. When the probe could not tell that nobody is there, wait a moment for an objection.
//!
//! Losing this race costs nothing but duplicates: a session that is taken over delivers again whatever was not
//! acknowledged, and its former user looks for another one.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
    time::Duration,
};

use bytes::Bytes;
use polymq_core::{Error, ErrorKind, Result};
use rumqttc::v5::mqttbytes::{
    QoS,
    v5::{Filter, PubAckReason, Publish},
};
use tokio::{sync::mpsc, sync::watch, time::timeout};

use crate::{config::MqttConfig, error::error, link::Link, topology};

/// How long a holder may take to object. Too short, and a busy consumer loses its session to a newcomer (duplicates);
/// too long, and every start under MQTT 3.1.1 takes that long.
const PATIENCE: Duration = Duration::from_millis(500);

/// The claims of one connection.
#[derive(Debug)]
pub(crate) struct Claims {
    /// Tells our claims from those of others.
    instance: String,
    gone_topic: String,
    operation_timeout: Duration,
    link: OnceLock<Link>,
    known: Mutex<HashMap<String, State>>,
    gone: watch::Sender<u64>,
}

#[derive(Debug)]
enum State {
    Asking { echoed: bool, verdict: mpsc::UnboundedSender<Verdict> },
    Held,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Echo,
    Taken,
}

/// A session that is ours until this is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    topic: String,
    claims: Weak<Claims>,
}

impl Claims {
    pub(crate) fn new(config: &MqttConfig) -> Arc<Self> {
        Arc::new(Self {
            instance: format!("{:016x}", fastrand::u64(..)),
            gone_topic: topology::gone_topic(config),
            operation_timeout: config.operation_timeout,
            link: OnceLock::new(),
            known: Mutex::default(),
            gone: watch::Sender::new(0),
        })
    }

    /// The connection to ask over.
    pub(crate) fn attach(&self, link: Link) {
        let _ = self.link.set(link);
    }

    /// What the broker publishes when this process dies.
    pub(crate) fn will(&self) -> (String, Bytes) {
        (self.gone_topic.clone(), Bytes::from(self.instance.clone()))
    }

    /// Changes when sessions may have been left behind by someone.
    pub(crate) fn gone(&self) -> watch::Receiver<u64> {
        self.gone.subscribe()
    }

    /// Something may have been missed while there was no connection.
    pub(crate) fn look_again(&self) {
        self.gone.send_modify(|count| *count += 1);
    }

    /// Listens to others that leave.
    pub(crate) async fn watch_gone(&self) -> Result<()> {
        self.link()?.subscribe(Filter::new(&*self.gone_topic, QoS::AtMostOnce)).await
    }

    /// Tells others that we have left.
    pub(crate) fn say_gone(&self) {
        if let Ok(link) = self.link() {
            link.send_and_forget(self.control(&self.gone_topic, &self.instance, QoS::AtMostOnce));
        }
    }

    /// Claims the session of `topic`; `None` when someone has it.
    pub(crate) async fn claim(self: &Arc<Self>, topic: &str) -> Result<Option<Claim>> {
        let (verdict, mut verdicts) = mpsc::unbounded_channel();
        {
            let mut known = self.lock();
            if known.contains_key(topic) {
                return Ok(None);
            }
            known.insert(topic.to_owned(), State::Asking { echoed: false, verdict });
        }
        // From here on, dropping this gives the topic up.
        let claim = Claim { topic: topic.to_owned(), claims: Arc::downgrade(self) };
        let link = self.link()?;
        let probe = link.send_urgent(self.control(topic, "probe", QoS::AtLeastOnce));
        let subscribe = link.subscribe(Filter::new(topic, QoS::AtMostOnce));
        let (probe, subscribed) = tokio::join!(probe, subscribe);
        subscribed.map_err(refused)?;
        let alone = match probe.map_err(refused)? {
            PubAckReason::NoMatchingSubscribers => true,
            PubAckReason::NotAuthorized => {
                return Err(refused(error(ErrorKind::PermissionDenied, "not allowed to publish")));
            }
            _ => false,
        };
        link.send_and_forget(self.control(topic, &format!("claim {}", self.instance), QoS::AtMostOnce));
        match timeout(self.operation_timeout, verdicts.recv()).await {
            Ok(Some(Verdict::Echo)) => {}
            Ok(Some(Verdict::Taken)) => return Ok(None),
            Ok(None) | Err(_) => {
                return Err(error(ErrorKind::Timeout, format!("no answer on the topic {topic:?}"))
                    .with_hint("if the broker keeps topics with $ for itself, set control to another prefix"));
            }
        }
        if !alone && timeout(PATIENCE, verdicts.recv()).await.is_ok() {
            return Ok(None);
        }
        self.lock().insert(topic.to_owned(), State::Held);
        Ok(Some(claim))
    }

    /// Handles a message on a control topic; `false` when it is none of ours.
    pub(crate) fn message(&self, publish: &Publish) {
        let (Ok(topic), Ok(text)) = (std::str::from_utf8(&publish.topic), std::str::from_utf8(&publish.payload)) else {
            return;
        };
        if topic == self.gone_topic {
            if text != self.instance {
                self.look_again();
            }
            return;
        }
        let mut known = self.lock();
        let Some(state) = known.get_mut(topic) else { return };
        let object = match (text.split_once(' '), state) {
            (Some(("claim", who)), State::Asking { echoed, verdict }) => {
                if who == self.instance {
                    *echoed = true;
                    let _ = verdict.send(Verdict::Echo);
                    false
                } else if *echoed {
                    true
                } else {
                    let _ = verdict.send(Verdict::Taken);
                    false
                }
            }
            (Some(("claim", who)), State::Held) => who != self.instance,
            (Some(("held", who)), State::Asking { verdict, .. }) if who != self.instance => {
                let _ = verdict.send(Verdict::Taken);
                false
            }
            _ => false,
        };
        drop(known);
        if let (true, Ok(link)) = (object, self.link()) {
            link.send_and_forget(self.control(topic, &format!("held {}", self.instance), QoS::AtMostOnce));
        }
    }

    fn control(&self, topic: &str, text: &str, qos: QoS) -> Publish {
        Publish::new(topic, qos, text.to_owned(), None)
    }

    fn link(&self) -> Result<&Link> {
        self.link.get().ok_or_else(|| error(ErrorKind::Disconnected, "not connected"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, State>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(claims) = self.claims.upgrade() else { return };
        claims.lock().remove(&self.topic);
        if let Some(link) = claims.link.get().cloned() {
            let topic = std::mem::take(&mut self.topic);
            link.unsubscribe_and_forget(topic);
        }
    }
}

#[cold]
fn refused(cause: Error) -> Error {
    match cause.kind() {
        ErrorKind::Disconnected | ErrorKind::UnknownOutcome | ErrorKind::Closed => {
            error(ErrorKind::Disconnected, cause.message().to_owned())
        }
        _ => error(cause.kind(), format!("consumers cannot agree about sessions: {}", cause.message()))
            .with_hint("allow this user to read and write the topics under the setting control"),
    }
}
