//! Transactions: what handlers hand back is sent, and the positions of a group are committed, as one.
//!
//! A thread takes everything that was handed over meanwhile into one transaction of the broker, which is open only for as
//! long as that is written, never while a handler runs. It is the only one that commits positions of its group: a
//! plain commit that is overtaken would take a position back.

use std::{
    sync::{
        Arc, Mutex,
        mpsc::{Receiver, Sender, SyncSender, channel, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use polymq_core::{Address, Completer, Completion, Error, ErrorKind, Message, Result, Token};
use rdkafka::{
    ClientContext, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{Consumer as _, ConsumerGroupMetadata},
    error::KafkaError,
    message::DeliveryResult,
    producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext},
    types::RDKafkaErrorCode as Code,
};

use crate::{
    brokers::Brokers,
    client,
    config::KafkaConfig,
    convert, error,
    hub::Hub,
    link::{Link, lock},
    publisher::configuration,
    topology::{self, Names},
};

/// The most settlements of one transaction.
const MOST: usize = 1000;

type Native = BaseProducer<Context>;

/// The thread of a group, and the way to it.
#[derive(Debug)]
pub(crate) struct Transactions(Mutex<Sender<Job>>);

/// What is to be part of the next transaction.
enum Job {
    Settle(Settlement),
    /// What is finished is committed.
    Positions(Option<SyncSender<()>>),
}

/// A message is done and these are sent.
struct Settlement {
    token: Token,
    sends: Vec<Sending>,
    completer: Completer<()>,
}

/// A message on its way out.
#[derive(Debug)]
pub(crate) struct Sending {
    pub(crate) topic: Arc<str>,
    pub(crate) partition: Option<i32>,
    pub(crate) due: Option<std::time::Instant>,
    pub(crate) message: Message,
}

impl Sending {
    /// Where a message to this address goes.
    pub(crate) fn to(address: &Address, message: Message) -> Result<Self> {
        let names = Names::of(address, None);
        let (topic, partition, due) = topology::place(&names.topic, names.delay.as_ref(), message.deliver_at())?;
        Ok(Self { topic, partition, due, message })
    }
}

impl Transactions {
    /// Starts the thread. It ends when the last handle is gone.
    pub(crate) fn start(hub: &Arc<Hub>, config: Arc<KafkaConfig>, link: Arc<Link>) -> Result<Arc<Self>> {
        let (sender, jobs) = channel();
        let writer = Writer { hub: Arc::downgrade(hub), config, link, native: None };
        let spawned = thread::Builder::new().name("polymq-kafka-transactions".into()).spawn(|| writer.run(jobs));
        spawned.map_err(|error| Error::new(ErrorKind::Other, "no thread can be started").with_source(error))?;
        Ok(Arc::new(Self(Mutex::new(sender))))
    }

    /// A message is done and these are sent.
    pub(crate) fn settle(&self, token: Token, sends: Vec<Sending>) -> Completion<()> {
        let (completer, completion) = Completion::queued();
        // Nothing takes it back from here on.
        let _always = completer.hand_over();
        self.add(Job::Settle(Settlement { token, sends, completer }));
        completion
    }

    /// Commits what is finished; waits for it when there is a time to wait.
    pub(crate) fn commit(&self, wait: Option<Duration>) {
        let Some(wait) = wait else { return self.add(Job::Positions(None)) };
        let (done, committed) = sync_channel(1);
        self.add(Job::Positions(Some(done)));
        // What is not committed by then comes again.
        let _ = committed.recv_timeout(wait);
    }

    fn add(&self, job: Job) {
        // A thread that has ended drops the job, which answers it.
        let _ = lock(&self.0).send(job);
    }
}

/// What the client library calls back.
pub(crate) struct Context {
    link: Arc<Link>,
    brokers: Brokers,
    /// Why the broker refused a message of the present transaction for itself.
    refused: Mutex<Option<KafkaError>>,
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        client::log(level, facility, line);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.brokers.told(statistics);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // What ends this client is found out by its thread, and is nothing to the others.
        if error::code(&error) != Some(Code::Fatal) {
            self.link.observe(&error, reason);
        }
        self.brokers.observe(error::code(&error));
    }
}

impl ProducerContext for Context {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result
            && !is_of_transaction(error)
        {
            lock(&self.refused).get_or_insert_with(|| error.clone());
        }
    }
}

struct Writer {
    hub: std::sync::Weak<Hub>,
    config: Arc<KafkaConfig>,
    link: Arc<Link>,
    native: Option<Arc<Native>>,
}

impl Writer {
    fn run(mut self, jobs: Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            let mut settled = Vec::new();
            let mut waiting = Vec::new();
            for job in std::iter::once(first).chain(jobs.try_iter().take(MOST - 1)) {
                match job {
                    Job::Settle(settlement) => settled.push(settlement),
                    Job::Positions(done) => waiting.extend(done),
                }
            }
            if let Some(hub) = self.hub.upgrade() {
                self.settle(&hub, settled);
            }
            for done in waiting {
                // Who does not wait any more does not need to know.
                let _ = done.send(());
            }
        }
    }

    fn settle(&mut self, hub: &Hub, settlements: Vec<Settlement>) {
        let (ours, stale): (Vec<_>, Vec<_>) =
            settlements.into_iter().map(|one| (hub.claim(one.token), one)).partition(|(claimed, _)| claimed.is_ok());
        for (claimed, one) in stale {
            // What is another's by now is not written.
            one.completer.complete(claimed);
        }
        let ours: Vec<Settlement> = ours.into_iter().map(|(_, one)| one).collect();
        let positions = hub.changes();
        let is_empty = positions.count() == 0 && ours.iter().all(|one| one.sends.is_empty());
        let outcome = match hub.native().and_then(|native| native.group_metadata()) {
            _ if is_empty => Ok(()),
            Some(group) => self.write(&ours, &positions, &group),
            None => Err(error::closed("settle")),
        };
        let tokens: Vec<Token> = ours.iter().map(|one| one.token).collect();
        let Err(error) = outcome else {
            hub.settle_claimed(&tokens);
            return ours.into_iter().for_each(|one| one.completer.complete(Ok(())));
        };
        tracing::debug!(topic = %hub.names.topic, %error, "transaction given up");
        hub.unclaim(&tokens);
        hub.not_committed(&positions);
        if ours.len() > 1 && !matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::Closed) {
            // One of them may be the reason, and is not to be that of the others.
            return ours.into_iter().for_each(|one| self.settle(hub, vec![one]));
        }
        ours.into_iter().for_each(|one| one.completer.complete(Err(error::copy(&error))));
    }

    /// One transaction; an error means that nothing of it has happened, or will. One exception is left: when the client loses
    /// all its brokers for good while a commit is not answered, nobody can tell, and the messages come again.
    fn write(
        &mut self,
        settlements: &[Settlement],
        positions: &TopicPartitionList,
        group: &ConsumerGroupMetadata,
    ) -> Result<()> {
        let timeout = self.config.connect_timeout;
        let native = match &self.native {
            Some(native) => native,
            None => {
                // Not the fault of what was to be settled.
                let native = self.create().map_err(error::for_now)?;
                self.native.insert(native)
            }
        };
        *lock(&native.context().refused) = None;
        let written = fill(native, settlements, positions, group, timeout);
        let outcome = written.and_then(|()| again(native, || native.commit_transaction(timeout)));
        let Err(error) = outcome else { return Ok(()) };
        let refused = lock(&native.context().refused).take();
        if is_fatal(&error)
            || again(native, || native.abort_transaction(timeout)).is_err()
            || native.context().brokers.are_gone()
        {
            // The next one has an epoch of its own; the broker ends what this one has begun.
            self.native = None;
        }
        Err(match refused {
            Some(refused) => error::sending(refused),
            None => failed(error),
        })
    }

    fn create(&self) -> Result<Arc<Native>> {
        let timeout = self.config.connect_timeout;
        let id = format!("{}-{:016x}", self.config.name, fastrand::u64(..));
        let context =
            Context { link: Arc::clone(&self.link), brokers: Brokers::of(&self.config)?, refused: Mutex::new(None) };
        let native: Native =
            client::transactional(&self.config, &id)?.create_with_context(context).map_err(configuration)?;
        let native = client::served(native)?;
        again(&native, || native.init_transactions(timeout)).map_err(failed)?;
        Ok(native)
    }
}

fn fill(
    native: &Native,
    settlements: &[Settlement],
    positions: &TopicPartitionList,
    group: &ConsumerGroupMetadata,
    timeout: Duration,
) -> Result<(), KafkaError> {
    native.begin_transaction()?;
    for sending in settlements.iter().flat_map(|one| &one.sends) {
        let mut record: BaseRecord<'_, str, [u8]> = BaseRecord::to(&sending.topic).payload(sending.message.payload());
        record.key = sending.message.key();
        record.headers = convert::headers(&sending.message, sending.due);
        record.partition = sending.partition;
        native.send(record).map_err(|(error, _)| error)?;
    }
    if positions.count() > 0 {
        native.send_offsets_to_transaction(positions, group, timeout)?;
    }
    Ok(())
}

/// Repeats what may be repeated, also while there is no connection: only an answer tells whether it has happened.
fn again(native: &Native, mut run: impl FnMut() -> Result<(), KafkaError>) -> Result<(), KafkaError> {
    let context = native.context();
    let is_over = || context.link.closed_error("settle").is_some() || context.brokers.are_gone();
    loop {
        let began = Instant::now();
        match run() {
            Err(KafkaError::Transaction(error)) if error.is_retriable() && !is_over() => {
                tracing::debug!(%error, "transaction, trying again");
                // The client library has waited already, but for what it knows at once.
                thread::sleep(Duration::from_millis(100).saturating_sub(began.elapsed()));
            }
            result => return result,
        }
    }
}

fn is_fatal(error: &KafkaError) -> bool {
    matches!(error, KafkaError::Transaction(error) if error.is_fatal())
}

/// Whether it tells what became of a transaction, and nothing about a message in it.
fn is_of_transaction(error: &KafkaError) -> bool {
    let of_any_message = matches!(
        error::code(error),
        // One message ends the transaction, and all others are withdrawn.
        Some(Code::PurgeQueue | Code::PurgeInflight)
            // The one of its batch that is refused for itself says so.
            | Some(Code::InvalidDifferentRecord)
            // Nothing more is taken after that.
            | Some(Code::State | Code::Fatal)
            // Somebody else has begun anew, or the coordinator takes it to be over.
            | Some(Code::Fenced | Code::ProducerFenced | Code::InvalidProducerEpoch | Code::InvalidTransactionalState)
    );
    of_any_message || matches!(error, KafkaError::Transaction(_))
}

/// The error of a transaction that has not happened. A rebalance or a broker's stall, which have no kind of their own, are not
/// the fault of what was to be settled: that is tried again.
#[cold]
fn failed(error: KafkaError) -> Error {
    let may_pass = is_of_transaction(&error);
    match error::native("settle", error) {
        error if may_pass && error.kind() == ErrorKind::Other => error.with_kind(ErrorKind::Busy),
        error => error,
    }
}
