//! The one client through which everything is sent, and the thread that watches whether it has a connection.
//!
//! While there is no connection messages wait here, where they can still be withdrawn. What was handed to the client
//! library is tried by it, in order and without duplicates, until its delivery time-out; its report completes the send.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use polymq_core::{Completer, Error, ErrorKind, Message, MessageId, Receipt, Result, Ticket, Token};
use rdkafka::{
    ClientContext,
    client::Client,
    config::RDKafkaLogLevel,
    error::KafkaError,
    message::{DeliveryResult, Message as _},
    producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext, PurgeConfig},
};
use tokio::sync::oneshot;

use crate::{
    brokers::Brokers,
    client,
    config::KafkaConfig,
    convert, error,
    hub::Hub,
    link::{Link, Wake, lock},
};

/// A topic that every Kafka in use has; what the broker says about it does not matter, only that it answers.
pub(crate) const PROBE: &str = "__consumer_offsets";

/// How soon a broker answers that is there: when it takes longer after a connection was lost, that is told.
const ANSWER: Duration = Duration::from_secs(1);

/// How many withdrawn messages may lie about before they are looked for.
const SWEEP_FROM: usize = 1024;

pub(crate) type Native = BaseProducer<Context>;

/// What the client library calls back.
pub(crate) struct Context {
    link: Arc<Link>,
    brokers: Brokers,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        client::log(level, facility, line);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.brokers.told(statistics);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.link.observe(&error, reason);
        self.brokers.observe(error::code(&error));
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = Box<Answer>;

    fn delivery(&self, result: &DeliveryResult<'_>, answer: Box<Answer>) {
        match result {
            Ok(record) => answer.accepted(record.partition(), record.offset()),
            Err((error, _)) => answer.failed(error::sending(error.clone())),
        }
    }
}

/// Who waits for a message to be accepted.
pub(crate) enum Answer {
    /// A producer.
    Send { completer: Completer<Receipt>, id: MessageId, _ticket: Ticket },
    /// A delivery whose successor this is.
    Retry { completer: Completer<()>, hub: Arc<Hub>, token: Token },
}

impl Answer {
    fn hand_over(&self) -> bool {
        match self {
            Self::Send { completer, .. } => completer.hand_over(),
            Self::Retry { completer, .. } => completer.hand_over(),
        }
    }

    fn is_abandoned(&self) -> bool {
        match self {
            Self::Send { completer, .. } => completer.is_abandoned(),
            Self::Retry { completer, .. } => completer.is_abandoned(),
        }
    }

    fn accepted(self, partition: i32, offset: i64) {
        match self {
            Self::Send { completer, id, .. } => {
                completer.complete(Ok(Receipt { id, broker_id: Some(broker_id(partition, offset)) }));
            }
            Self::Retry { completer, hub, token } => {
                // Where the partition is gone meanwhile, the message comes again beside its successor.
                let done = hub.ack(&[token]);
                completer.complete(done.map_err(|error| error.with_operation("retry").with_channel(&*hub.names.topic)));
            }
        }
    }

    fn failed(self, error: Error) {
        match self {
            Self::Send { completer, .. } => completer.complete(Err(error)),
            Self::Retry { completer, .. } => completer.complete(Err(error.with_operation("retry"))),
        }
    }
}

/// Where a message is: `0@4711`. Formatted by the standard library, it took longer than all else that a report does.
fn broker_id(partition: i32, offset: i64) -> Box<str> {
    let (mut first, mut second) = (itoa::Buffer::new(), itoa::Buffer::new());
    [first.format(partition), "@", second.format(offset)].concat().into_boxed_str()
}

/// A message on its way out.
pub(crate) struct Outgoing {
    pub(crate) message: Message,
    pub(crate) topic: Arc<str>,
    pub(crate) partition: Option<i32>,
    pub(crate) due: Option<Instant>,
    pub(crate) answer: Answer,
}

pub(crate) struct Publisher {
    config: Arc<KafkaConfig>,
    link: Arc<Link>,
    gate: Mutex<Gate>,
}

struct Gate {
    /// `None` after the end.
    native: Option<Arc<Native>>,
    open: bool,
    waiting: VecDeque<Outgoing>,
    sweep_at: usize,
}

impl Gate {
    /// Drops withdrawn messages, so that an outage of an hour does not hold an hour of messages.
    fn sweep(&mut self) {
        self.waiting.retain(|outgoing| !outgoing.answer.is_abandoned());
        self.sweep_at = (self.waiting.len() * 2).max(SWEEP_FROM);
    }
}

impl Publisher {
    /// Makes the client and starts the thread that connects and watches. `first` hears of the first connection.
    pub(crate) fn start(
        config: Arc<KafkaConfig>,
        link: Arc<Link>,
        first: oneshot::Sender<Result<()>>,
    ) -> Result<Arc<Self>> {
        let native = create(&config, &link)?;
        let gate = Gate { native: Some(native), open: false, waiting: VecDeque::new(), sweep_at: SWEEP_FROM };
        let publisher = Arc::new(Self { config, link, gate: Mutex::new(gate) });
        let watcher = Arc::clone(&publisher);
        thread::Builder::new()
            .name("polymq-kafka-link".into())
            .spawn(move || watcher.watch(first))
            .map_err(|error| Error::new(ErrorKind::Other, "no thread can be started").with_source(error))?;
        Ok(publisher)
    }

    /// Hands a message over, or keeps it until there is a connection.
    pub(crate) fn send(&self, outgoing: Outgoing) {
        let mut gate = lock(&self.gate);
        match &gate.native {
            None => {
                drop(gate);
                let error = self.link.closed_error("send").unwrap_or_else(|| error::closed("send"));
                outgoing.answer.failed(error);
            }
            // In order: nothing overtakes what waits.
            Some(native) if gate.open => write(native, outgoing),
            Some(_) => {
                gate.waiting.push_back(outgoing);
                if gate.waiting.len() >= gate.sweep_at {
                    gate.sweep();
                }
            }
        }
    }

    /// Drops what was withdrawn while it waited here, for which nobody needs to wait.
    pub(crate) fn sweep(&self) {
        lock(&self.gate).sweep();
    }

    /// The client itself.
    pub(crate) fn native(&self) -> Option<Arc<Native>> {
        lock(&self.gate).native.clone()
    }

    /// Waits until everything that was handed to the client library is answered: `false` when that takes longer. Blocks.
    pub(crate) fn flush(&self, timeout: Duration) -> bool {
        self.native().is_none_or(|native| native.flush(timeout).is_ok())
    }

    fn open(&self) {
        let mut gate = lock(&self.gate);
        gate.open = true;
        let waiting = std::mem::take(&mut gate.waiting);
        if let Some(native) = &gate.native {
            waiting.into_iter().for_each(|outgoing| write(native, outgoing));
        }
    }

    fn shut(&self) {
        lock(&self.gate).open = false;
    }

    /// Ends it; what waits is answered, and so is what the broker has not answered. Blocks for half a second at most.
    pub(crate) fn end(&self) {
        let (native, waiting) = {
            let mut gate = lock(&self.gate);
            gate.open = false;
            (gate.native.take(), std::mem::take(&mut gate.waiting))
        };
        for outgoing in waiting {
            let error = self.link.closed_error("send").unwrap_or_else(|| error::closed("send"));
            outgoing.answer.failed(error);
        }
        if let Some(native) = native {
            // Others may still hold it for a moment; the answers do not wait for them.
            native.purge(PurgeConfig::default().queue().inflight());
        }
    }

    fn watch(&self, first: oneshot::Sender<Result<()>>) {
        let (mut first, mut patience) = (Some(first), self.config.connect_timeout);
        loop {
            match self.probe(patience) {
                Ok(()) => {}
                Err(error) if first.is_some() && !self.config.connect_retry => {
                    let reason = self.link.reason(&error::text(&error));
                    if let Some(first) = first.take() {
                        let _ = first.send(Err(error::disconnected("connect", &reason)
                            .with_hint("check that the broker runs there, and TLS against plain")));
                    }
                    break;
                }
                Err(error) => {
                    self.shut();
                    let reason = self.link.reason(&error::text(&error));
                    self.link.down(&reason);
                    if !self.again() {
                        break;
                    }
                }
            }
            // Also where others of its brokers still answer: they have not asked for the password since it changed.
            self.take_over();
            self.link.up();
            self.open();
            if let Some(first) = first.take() {
                let _ = first.send(Ok(()));
            }
            patience = self.config.heartbeat;
            match self.link.wait(self.config.heartbeat) {
                Wake::Probe => {}
                Wake::Suspected => patience = patience.min(ANSWER),
                Wake::Lost => {
                    self.shut();
                    self.link.down(&self.link.reason("no broker is connected"));
                }
                Wake::Fatal => {
                    self.shut();
                    self.link.down(&self.link.reason("the client library cannot go on"));
                    // It says so once.
                    while !self.renew() && self.link.sleep(self.config.reconnect_max) {}
                }
                Wake::Closed => break,
            }
        }
        self.end();
    }

    /// Tries until there is a connection; `false` when it is closed, or given up.
    fn again(&self) -> bool {
        let config = &self.config;
        let mut wait = config.reconnect_initial;
        for attempt in 1_u64.. {
            // The client library tries on its own, at this pace.
            if !self.link.sleep(wait) {
                return false;
            }
            let limited = config.reconnect_limit > 0;
            if self.probe(if limited { wait } else { config.connect_timeout }).is_ok() {
                return true;
            }
            self.take_over();
            let reason = self.link.reason("no broker answers");
            if limited && attempt >= config.reconnect_limit.into() {
                let sentence = format!("given up after {attempt} attempts to reconnect: {reason}");
                self.link.close(ErrorKind::Disconnected, &sentence);
                return false;
            }
            self.link.down(&reason);
            wait = (wait * 2).min(config.reconnect_max);
        }
        false
    }

    fn probe(&self, timeout: Duration) -> Result<(), KafkaError> {
        match self.native() {
            // A closed connection is found out by the wait that follows.
            None => Ok(()),
            Some(native) => native.client().fetch_metadata(Some(PROBE), timeout).map(drop),
        }
    }

    /// Another client instead of one that can connect no more, or not to everybody. What is on its way has a moment to be answered.
    fn take_over(&self) {
        let Some(native) = self.native().filter(|native| native.context().brokers.are_gone()) else { return };
        tracing::warn!("this client of librdkafka can connect no more; another one takes over");
        let _ = native.flush(ANSWER);
        let _ = self.renew();
    }

    /// Another client instead of one that cannot go on; what that one has not answered has an unknown outcome. `false`
    /// when none can be made now.
    fn renew(&self) -> bool {
        match create(&self.config, &self.link) {
            Ok(new) => {
                let old = {
                    let mut gate = lock(&self.gate);
                    gate.native.is_some().then(|| gate.native.replace(new))
                };
                drop(old);
                true
            }
            Err(error) => {
                tracing::error!(%error, "no new client can be made; trying again");
                if let Some(native) = self.native() {
                    native.context().brokers.ask_again();
                }
                false
            }
        }
    }
}

impl std::fmt::Debug for Publisher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Publisher").field("link", &self.link).finish_non_exhaustive()
    }
}

fn create(config: &KafkaConfig, link: &Arc<Link>) -> Result<Arc<Native>> {
    let context = Context { link: Arc::clone(link), brokers: Brokers::of(config)? };
    let made = client::producer(config)?.create_with_context(context);
    client::served(made.map_err(configuration)?)
}

/// Settings that the client library refuses.
pub(crate) fn configuration(error: KafkaError) -> Error {
    match &error {
        KafkaError::ClientConfig(_, why, key, _) => {
            error::config(format!("librdkafka refuses {key:?}: {why}")).with_hint("check the setting \"options\"")
        }
        other => error::config(other.to_string()),
    }
}

fn write(native: &Native, outgoing: Outgoing) {
    let Outgoing { message, topic, partition, due, answer } = outgoing;
    if !answer.hand_over() {
        return;
    }
    let mut record = BaseRecord::with_opaque_to(&topic, Box::new(answer)).payload(&message.payload()[..]);
    record.key = message.key().map(str::as_bytes);
    record.headers = convert::headers(&message, due);
    record.partition = partition;
    if let Err((error, record)) = native.send(record) {
        record.delivery_opaque.failed(error::sending(error));
    }
}

/// The part of a client that asks the cluster.
pub(crate) fn inner(native: &Native) -> &Client<Context> {
    native.client()
}
