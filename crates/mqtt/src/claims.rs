//! Who takes which session: consumers ask each other over the broker.
//!
//! MQTT ends the older of two connections with one client id, so a consumer must know whether a session is in use
//! before it connects as that session. Each session has a topic that only its user is subscribed to, with a connection
//! of its own, and a topic `<topic>/ask` for those who want it:
//!
//! 1. Publish "look" to "ask", subscribe to it and publish "claim" there, in one go. All subscribers see one order: the first
//!    claim goes on, the others come back in a moment. Whoever claimed before we subscribed is seen by the answer to "look",
//!    and says "busy" to our claim.
//! 2. Publish to the session's topic. Under MQTT 5, "no matching subscribers" says that nobody has it. Whoever has it
//!    answers "held" on "ask", or "busy" when it only looks at the session and is gone in a moment. No answer within
//!    [`PATIENCE`] counts as nobody.
//! 3. Subscribe to the session's topic, leave "ask", connect as the session.
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
use tokio::{
    sync::mpsc,
    sync::watch,
    time::{sleep, timeout},
};

use crate::{
    config::{MqttConfig, Protocol},
    error::error,
    link::Link,
    topology,
};

/// How long someone who is there may take to object. Too short, and a busy consumer loses its session to a newcomer
/// (duplicates); too long, and nobody takes the place of a consumer that hangs.
const PATIENCE: Duration = Duration::from_secs(3);

/// The same under MQTT 3.1.1, which does not tell whether anybody is there: every start takes this long.
const PATIENCE_V311: Duration = Duration::from_millis(700);

/// Behind the topic of a session, the topic of those who want it.
const ASK: &str = "/ask";

/// How long someone who asked before us may take to say so; it may also be one who has been told to come back.
const OBJECTION: Duration = Duration::from_millis(500);

/// Before asking again when someone looks at a session.
const VISIT: Duration = Duration::from_millis(50);

/// The claims of one connection.
#[derive(Debug)]
pub(crate) struct Claims {
    /// Tells our claims from those of others.
    instance: String,
    gone_topic: String,
    operation_timeout: Duration,
    protocol: Protocol,
    link: OnceLock<Link>,
    known: Mutex<HashMap<String, State>>,
    gone: watch::Sender<u64>,
}

#[derive(Debug)]
enum State {
    Asking { first: bool, verdict: mpsc::UnboundedSender<Verdict> },
    Ours(Purpose),
}

/// What a session is claimed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To consume with it.
    Hold,
    /// To see whether it exists, or to make it: gone in a moment.
    Visit,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    First,
    Taken,
    Busy,
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
            protocol: config.protocol,
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
        (self.gone_topic.clone(), Bytes::from(format!("gone {}", self.instance)))
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
            link.send_and_forget(self.control(&self.gone_topic, "gone", QoS::AtMostOnce));
        }
    }

    /// Claims the session of `topic`; `None` when someone has it.
    pub(crate) async fn claim(self: &Arc<Self>, topic: &str, purpose: Purpose) -> Result<Option<Claim>> {
        let ask = async {
            let mut pause = VISIT;
            loop {
                match self.ask(topic, purpose).await? {
                    Asked::Ours(claim) => return Ok(Some(claim)),
                    Asked::Taken => return Ok(None),
                    Asked::Busy => sleep(pause.mul_f64(0.5 + fastrand::f64())).await,
                }
                pause = (pause * 2).min(OBJECTION);
            }
        };
        timeout(self.operation_timeout, ask).await.unwrap_or_else(|_| {
            Err(error(ErrorKind::Timeout, format!("no agreement on the topic {topic:?}"))
                .with_hint("if the broker keeps topics with $ for itself, set control to another prefix"))
        })
    }

    async fn ask(self: &Arc<Self>, topic: &str, purpose: Purpose) -> Result<Asked> {
        let (verdict, mut verdicts) = mpsc::unbounded_channel();
        {
            let mut known = self.lock();
            match known.get(topic) {
                Some(State::Ours(Purpose::Hold)) => return Ok(Asked::Taken),
                Some(_) => return Ok(Asked::Busy),
                None => known.insert(topic.to_owned(), State::Asking { first: false, verdict }),
            };
        }
        // From here on, dropping this gives the topic up.
        let claim = Claim { topic: topic.to_owned(), claims: Arc::downgrade(self) };
        let link = self.link()?;
        let ask = format!("{topic}{ASK}");
        let look = link.send_urgent(self.control(&ask, "look", QoS::AtLeastOnce));
        let subscribe = link.subscribe(Filter::new(&*ask, QoS::AtMostOnce));
        let question = link.send_urgent(self.control(&ask, "claim", QoS::AtLeastOnce));
        let (looked, subscribed, asked) = tokio::join!(look, subscribe, question);
        let alone = looked.map_err(refused).and_then(allowed)? == PubAckReason::NoMatchingSubscribers;
        subscribed.and(asked).map_err(refused).and_then(allowed)?;
        if verdicts.recv().await != Some(Verdict::First) {
            return Ok(Asked::Busy);
        }
        let asked = link.send_urgent(self.control(topic, "claim", QoS::AtLeastOnce)).await.map_err(refused);
        let nobody = allowed(asked?)? == PubAckReason::NoMatchingSubscribers;
        let objection = match (nobody, self.protocol) {
            (false, Protocol::V5) => Some(PATIENCE),
            (false, Protocol::V311) => Some(PATIENCE_V311),
            (true, Protocol::V5) if !alone => Some(OBJECTION),
            (true, _) => None,
        };
        match objection {
            Some(wait) => match timeout(wait, verdicts.recv()).await {
                Ok(Some(Verdict::Taken)) => return Ok(Asked::Taken),
                Ok(_) => return Ok(Asked::Busy),
                Err(_) => tracing::debug!(topic, "nobody answers for this session"),
            },
            // Someone who asked before is about to subscribe.
            None if verdicts.try_recv().is_ok() => return Ok(Asked::Busy),
            None => {}
        }
        link.subscribe(Filter::new(topic, QoS::AtMostOnce)).await.map_err(refused)?;
        if verdicts.try_recv().is_ok() {
            return Ok(Asked::Busy);
        }
        self.lock().insert(topic.to_owned(), State::Ours(purpose));
        link.unsubscribe_and_forget(ask);
        Ok(Asked::Ours(claim))
    }

    /// Handles a message on a control topic; `false` when it is none of ours.
    pub(crate) fn message(&self, publish: &Publish) {
        let (Ok(topic), Ok(text)) = (std::str::from_utf8(&publish.topic), std::str::from_utf8(&publish.payload)) else {
            return;
        };
        if topic == self.gone_topic {
            if text.strip_prefix("gone ") != Some(&*self.instance) {
                self.look_again();
            }
            return;
        }
        let (topic, asking) = topic.strip_suffix(ASK).map_or((topic, false), |topic| (topic, true));
        let Some((word, who)) = text.split_once(' ') else { return };
        let ours = who == self.instance;
        let mut known = self.lock();
        let Some(state) = known.get_mut(topic) else { return };
        let answer = match (word, state) {
            ("claim", State::Ours(Purpose::Hold)) if !asking && !ours => Some("held"),
            ("claim", State::Ours(Purpose::Visit)) if !asking && !ours => Some("busy"),
            (word, State::Asking { first, verdict }) if asking => {
                let told = match word {
                    "claim" if ours => Some(Verdict::First),
                    // They were first, or were told so and come back.
                    "claim" if !*first => Some(Verdict::Busy),
                    "busy" if !ours => Some(Verdict::Busy),
                    "held" if !ours => Some(Verdict::Taken),
                    _ => None,
                };
                *first |= told == Some(Verdict::First);
                // Whoever does not wait any more has its answer.
                told.map(|told| verdict.send(told));
                (word == "claim" && !ours && *first).then_some("busy")
            }
            _ => None,
        };
        drop(known);
        if let (Some(word), Ok(link)) = (answer, self.link()) {
            link.send_and_forget(self.control(&format!("{topic}{ASK}"), word, QoS::AtMostOnce));
        }
    }

    fn control(&self, topic: &str, word: &str, qos: QoS) -> Publish {
        Publish::new(topic, qos, format!("{word} {}", self.instance), None)
    }

    fn link(&self) -> Result<&Link> {
        self.link.get().ok_or_else(|| error(ErrorKind::Disconnected, "not connected"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, State>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Asked {
    Ours(Claim),
    Taken,
    Busy,
}

impl Claim {
    /// A visitor stays.
    pub(crate) fn hold(&self) {
        if let Some(claims) = self.claims.upgrade() {
            claims.lock().insert(self.topic.clone(), State::Ours(Purpose::Hold));
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Some(claims) = self.claims.upgrade() else { return };
        claims.lock().remove(&self.topic);
        if let Some(link) = claims.link.get().cloned() {
            link.unsubscribe_and_forget(format!("{}{ASK}", self.topic));
            link.unsubscribe_and_forget(std::mem::take(&mut self.topic));
        }
    }
}

fn allowed(reason: PubAckReason) -> Result<PubAckReason> {
    match reason {
        PubAckReason::NotAuthorized => Err(refused(error(ErrorKind::PermissionDenied, "not allowed to publish"))),
        reason => Ok(reason),
    }
}

#[cold]
fn refused(cause: Error) -> Error {
    match cause.kind() {
        ErrorKind::Disconnected | ErrorKind::UnknownOutcome | ErrorKind::Closed => {
            error(ErrorKind::Disconnected, cause.message().to_owned())
        }
        ErrorKind::Unsupported => cause,
        _ => error(cause.kind(), format!("consumers cannot agree about sessions: {}", cause.message()))
            .with_hint("allow this user to read and write the topics under the setting control"),
    }
}
