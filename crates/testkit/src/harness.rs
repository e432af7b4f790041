//! What a backend's tests tell the suite: how to connect, and how to break things.

use std::{collections::BTreeMap, fmt, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use polymq_core::{Address, Backend};

use crate::tools::{Deletion, Passwords, Switch, Tool, UNSAID};

/// The place that a backend is tested in. The two required methods are enough for a backend that lives in the
/// process; one with a broker gives the others too, and the suite fails when one of them is missing.
pub trait Harness: Send + Sync + fmt::Debug + 'static {
    /// The backend under test.
    fn backend(&self) -> Arc<dyn Backend>;

    /// The URL that connects to the broker; with `at`, to what listens there instead (a proxy before the broker).
    fn url(&self, at: Option<SocketAddr>) -> String;

    /// Puts something around the backend; how [mutants](crate::mutant) enter.
    fn wrap(&self, backend: Arc<dyn Backend>) -> Arc<dyn Backend> {
        backend
    }

    /// The clock of the cases.
    fn clock(&self) -> Clock {
        Clock::Real
    }

    /// The broker, to be stopped and killed; `None` for a backend that lives in the process.
    fn broker(&self) -> Option<&dyn BrokerControl> {
        None
    }

    /// A client that knows nothing of polymq.
    fn bare(&self) -> Option<&dyn BareClient> {
        None
    }

    /// A URL whose password is wrong.
    fn wrong_password(&self) -> Option<String> {
        None
    }

    /// A user who may connect, and a queue that this user may not use.
    fn denied(&self) -> Option<Denied> {
        None
    }

    /// Settings that make a dead connection known quickly, and the time within which it must be known then.
    fn heartbeat(&self) -> Option<Heartbeat> {
        None
    }

    /// Variables for child processes of the test binary, besides the URL.
    fn child_environment(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// How long it may take until everything works again after a fault.
    fn recovery(&self) -> Duration {
        Duration::from_secs(45)
    }

    /// Whether what was delivered stays ours when the connection is lost, because the broker ties it to something else: a
    /// loan (which the capabilities tell), or membership in a group. It can be settled over the next connection then.
    fn deliveries_outlive_connections(&self) -> bool {
        false
    }

    /// How long after its answer the broker may still lose a message when it is killed; zero for a broker that
    /// answers when the message is on disk. Mosquitto writes right after it has answered.
    fn write_lag(&self) -> Duration {
        Duration::ZERO
    }

    /// A password that can be changed.
    fn passwords(&self) -> Tool<'_, dyn Passwords> {
        Err(UNSAID)
    }

    /// An alarm of the broker, during which it takes nothing.
    fn alarm(&self) -> Tool<'_, dyn Switch> {
        Err(UNSAID)
    }

    /// A broker that answers "not so fast".
    fn throttle(&self) -> Tool<'_, dyn Switch> {
        Err(UNSAID)
    }

    /// Whether a queue can be deleted while it is used; otherwise why not.
    fn deletes_in_use(&self) -> Tool<'_, Deletion> {
        Ok(&Deletion::OfChannel)
    }

    /// Whether several consumers can share a queue over connections of their own; otherwise why not.
    fn members(&self) -> Tool<'_, ()> {
        Ok(&())
    }

    /// Names that this broker cannot carry, each with a part of the sentence that says why.
    fn bad_names(&self) -> Vec<(Address, &'static str)> {
        Vec::new()
    }

    /// Whether this broker tells everybody what exists, also those who may not use it. They still must not make it.
    fn anybody_may_look(&self) -> bool {
        false
    }

    /// The settings that bound operations, besides the time-outs that calls have themselves.
    fn time_outs(&self) -> Vec<&'static str> {
        vec!["connect_timeout"]
    }

    /// How long it may take to say that something is not there, not allowed or not reachable. The suite's list says five seconds,
    /// which is what it is with a paused clock; with a real one, eight cases run at a time on machines that stand still now and then.
    fn soon(&self) -> Duration {
        Duration::from_secs(if self.clock() == Clock::Paused { 5 } else { 45 })
    }

    /// How many messages the broker bears: in the case with a large backlog, at most 10 000 in the one with a long stream, and at most
    /// 5000 in the one with a subscription that comes and goes.
    fn backlog(&self) -> usize {
        100_000
    }

    /// How many senders, and how many consumers of one queue, the broker bears at a time.
    fn at_once(&self) -> usize {
        50
    }
}

/// The clock of the cases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The wall clock.
    Real,
    /// tokio's paused clock: it jumps when nothing can happen before. For backends without any I/O; makes the
    /// cases exact and fast.
    Paused,
}

/// Something that is not allowed.
#[derive(Debug, Clone)]
pub struct Denied {
    /// The URL of the user.
    pub url: String,
    /// What the user may not send to.
    pub address: Address,
    /// Whether the broker says so to consumers too. Mosquitto grants every subscription and delivers nothing.
    pub consumers_are_told: bool,
}

/// How a silent connection is found to be dead.
#[derive(Debug, Clone)]
pub struct Heartbeat {
    /// The settings, as key and value.
    pub settings: Vec<(String, String)>,
    /// The declared bound.
    pub bound: Duration,
}

/// The server behind a backend.
#[async_trait]
pub trait BrokerControl: Send + Sync + fmt::Debug {
    /// Where it listens.
    fn address(&self) -> SocketAddr;

    /// Starts it, with the data it had before, and returns when it answers. Does nothing when it runs.
    async fn start(&self);

    /// Stops it in order and returns when it is gone.
    async fn stop(&self);

    /// Kills it with SIGKILL and returns when it is gone.
    async fn kill(&self);
}

/// A client written with the protocol's own library, for interoperation both ways.
#[async_trait]
pub trait BareClient: Send + Sync + fmt::Debug {
    /// Sends to a queue that exists. The properties have the names that [`BareReceiver::next`] gives them.
    async fn send(&self, queue: &str, message: BareMessage);

    /// Sees the messages that are sent to a queue that exists from now on.
    async fn listen(&self, queue: &str) -> Box<dyn BareReceiver>;

    /// What the message of [`golden_message`](crate::golden_message) must be on the wire: all of its properties.
    fn golden(&self) -> BareMessage;

    /// What a foreign producer would send with a content type and one header `tenant: acme`, nothing of polymq.
    fn foreign(&self) -> BareMessage;
}

/// The receiving side of a [`BareClient`].
#[async_trait]
pub trait BareReceiver: Send + fmt::Debug {
    /// The next message; `None` when there was none for that long.
    async fn next(&mut self, wait: Duration) -> Option<BareMessage>;
}

/// A message as it is on the wire: body, and every property under the protocol's own name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BareMessage {
    /// The body.
    pub body: Vec<u8>,
    /// Properties as text.
    pub properties: BTreeMap<String, String>,
}

impl BareMessage {
    /// A message with these properties.
    #[must_use]
    pub fn new<const N: usize>(body: &[u8], properties: [(&str, &str); N]) -> Self {
        let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { body: body.to_vec(), properties }
    }
}
