//! The thread of a [`Hub`]: fetches within the prefetch, hears of rebalances, commits what is finished.

use std::{
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use polymq_core::{Details, Error, ErrorKind, Incoming, Result};
use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, RebalanceProtocol},
    error::{KafkaError, KafkaResult},
    message::{BorrowedMessage, Message as _},
    types::{RDKafkaErrorCode as Code, RDKafkaRespErr},
};
use tokio::sync::oneshot;

use crate::{
    client,
    config::KafkaConfig,
    convert, error,
    hub::{Fetched, Hub, Turn},
    link::{Link, lock},
    position::Position,
    publisher::configuration,
    topology,
};

/// How long the thread does not look whether somebody has closed: longer is late, shorter costs an idle process.
const TICK: Duration = Duration::from_millis(50);
/// How long a full prefetch is waited for before fetching is paused. Pausing throws away what the client library has
/// fetched; without it, a rebalance of the group waits for this long.
const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) type Native = BaseConsumer<Context>;

/// What the client library calls back.
pub(crate) struct Context {
    hub: Weak<Hub>,
    link: Arc<Link>,
    config: Arc<KafkaConfig>,
    /// Whether there is a delay topic.
    has_delay: bool,
    /// Whether it is being read here.
    has_companions: AtomicBool,
    /// What it told that ends the consumer.
    end: Mutex<Option<Error>>,
}

impl Context {
    /// Of a consumer that asks and never reads.
    pub(crate) fn asking(link: &Arc<Link>, config: &Arc<KafkaConfig>) -> Self {
        Self {
            hub: Weak::new(),
            link: Arc::clone(link),
            config: Arc::clone(config),
            has_delay: false,
            has_companions: AtomicBool::new(false),
            end: Mutex::new(None),
        }
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        client::log(level, facility, line);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.link.observe(&error, reason);
        let kind = error::code(&error).map_or(ErrorKind::Other, error::kind);
        if kind == ErrorKind::PermissionDenied || error::code(&error) == Some(Code::Fatal) {
            lock(&self.end).get_or_insert_with(|| error::native("consume", error));
        }
    }
}

impl ConsumerContext for Context {
    // One call for what the group shares and what goes with it: after the first one the client library goes on.
    fn rebalance(&self, consumer: &Native, event: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let is_assignment = event == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let hub = self.hub.upgrade();
        let all = hub.as_deref().map_or_else(|| list.clone(), |hub| self.with_companions(hub, list, is_assignment));
        if let Some(hub) = hub.as_deref().filter(|_| !is_assignment) {
            self.revoke(hub, consumer, &all);
        }
        let is_cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let changed = match (is_assignment, is_cooperative) {
            (true, true) => consumer.incremental_assign(&all),
            (true, false) => consumer.assign(&all),
            (false, true) => consumer.incremental_unassign(&all),
            (false, false) => consumer.unassign(),
        };
        if let Err(error) = changed {
            tracing::error!(%error, partitions = ?all, "partitions cannot be taken over or given away");
        }
        if let Some(hub) = hub.filter(|_| is_assignment) {
            self.assigned(&hub, consumer, &all);
        }
    }
}

impl Context {
    /// These, and the partitions of the delay topic if they go with them: whoever has the first partition of the topic
    /// reads them. The group itself shares only the topic, or one member might get nothing but delayed messages.
    fn with_companions(&self, hub: &Hub, list: &TopicPartitionList, is_assignment: bool) -> TopicPartitionList {
        let mut all = list.clone();
        if let Some(delay) = hub.names.delay.as_deref().filter(|_| self.has_delay)
            && list.find_partition(&hub.names.topic, 0).is_some()
            && self.has_companions.swap(is_assignment, Ordering::AcqRel) != is_assignment
        {
            for partition in topology::DELAY_PARTITIONS {
                all.add_partition(delay, partition);
            }
        }
        all
    }

    fn revoke(&self, hub: &Hub, consumer: &Native, list: &TopicPartitionList) {
        tracing::debug!(topic = %hub.names.topic, partitions = list.count(), "revoked");
        // Lost in silence: others have it already, and nothing can be committed.
        let lost = consumer.assignment_lost();
        let changes = hub.revoking(list, if lost { Duration::ZERO } else { self.config.revoke_wait });
        if let Some(transactions) = hub.transactions().filter(|_| !lost) {
            hub.not_committed(&changes);
            transactions.commit(Some(self.config.connect_timeout));
        } else if !lost
            && changes.count() > 0
            && self.link.is_up_or_closing()
            && let Err(error) = consumer.commit(&changes, CommitMode::Sync)
        {
            tracing::warn!(topic = %hub.names.topic, %error, "positions of partitions that go are not committed");
        }
        hub.revoked(list);
    }

    fn assigned(&self, hub: &Hub, consumer: &Native, list: &TopicPartitionList) {
        tracing::debug!(topic = %hub.names.topic, partitions = list.count(), "assigned");
        match consumer.committed_offsets(list.clone(), self.config.connect_timeout) {
            Ok(found) => hub.assigned(&found, true),
            Err(error) => {
                // Only what is finished beyond the position is not known: it may come twice.
                tracing::warn!(topic = %hub.names.topic, %error, "positions cannot be read");
                hub.assigned(list, false);
            }
        }
    }
}

/// What a hub reads, and from where.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) prefetch: usize,
    pub(crate) bytes: usize,
    /// Where a group without a position begins.
    pub(crate) start: Position,
    /// Where the group begins now, whatever its position was.
    pub(crate) seek: Option<Position>,
    pub(crate) has_delay: bool,
    /// What handlers send is committed with the positions.
    pub(crate) transactional: bool,
}

/// Starts the thread; `ready` hears when it reads.
pub(crate) fn start(
    hub: Arc<Hub>,
    config: Arc<KafkaConfig>,
    link: Arc<Link>,
    plan: Plan,
    ready: oneshot::Sender<Result<()>>,
) -> Result<()> {
    let run = move || {
        let mut poller = match Poller::begin(&hub, config, link, &plan) {
            Ok(poller) => poller,
            Err(error) => {
                hub.fail(error.kind(), error.message());
                hub.set_ended();
                let _ = ready.send(Err(error));
                return;
            }
        };
        let _ = ready.send(Ok(()));
        poller.run();
        poller.leave();
    };
    let spawned = thread::Builder::new().name("polymq-kafka".into()).spawn(run);
    spawned.map(drop).map_err(|error| Error::new(ErrorKind::Other, "no thread can be started").with_source(error))
}

struct Poller {
    hub: Arc<Hub>,
    config: Arc<KafkaConfig>,
    link: Arc<Link>,
    native: Arc<Native>,
    batch: Vec<Fetched>,
    is_paused: bool,
    /// Since when there is no room.
    full_since: Option<Instant>,
    committed: Instant,
}

impl Poller {
    fn begin(hub: &Arc<Hub>, config: Arc<KafkaConfig>, link: Arc<Link>, plan: &Plan) -> Result<Self> {
        let own = format!("polymq-{:016x}", fastrand::u64(..));
        let group = hub.names.group.as_deref().unwrap_or(&own);
        let context =
            Context { hub: Arc::downgrade(hub), has_delay: plan.has_delay, ..Context::asking(&link, &config) };
        let settings = client::consumer(&config, group, plan.prefetch, plan.bytes)?;
        let native: Native = settings.create_with_context(context).map_err(configuration)?;
        let (topic, timeout) = (&*hub.names.topic, config.connect_timeout);
        let failed = |error| error::native("consume", error).with_channel(topic);
        match &hub.names.group {
            Some(_) => {
                begin_at(&native, &hub.names, plan.start, plan.seek, timeout)?;
                native.subscribe(&[topic]).map_err(failed)?;
            }
            None => {
                let partitions = topology::existing(native.client(), topic, timeout)?;
                let list = plan.seek.unwrap_or(plan.start).offsets(&native, topic, &partitions, timeout)?;
                native.assign(&list).map_err(failed)?;
                hub.assigned(&list, false);
            }
        }
        let native = Arc::new(native);
        hub.set_native(Some(Arc::clone(&native)));
        Ok(Self {
            hub: Arc::clone(hub),
            config,
            link,
            native,
            batch: Vec::new(),
            is_paused: false,
            full_since: None,
            committed: Instant::now(),
        })
    }

    fn run(&mut self) {
        loop {
            if let Some(error) = self.link.closed_error("receive") {
                self.hub.fail(error.kind(), error.message());
            }
            if let Some(error) = lock(&self.native.context().end).take() {
                self.hub.fail(error.kind(), error.message());
            }
            match self.hub.turn(Instant::now()) {
                Turn::Leave => return,
                Turn::Fetch(room, due) => {
                    self.full_since = None;
                    self.pause(false);
                    self.fetch(room, due);
                }
                Turn::Full if !self.is_paused => {
                    let since = *self.full_since.get_or_insert_with(Instant::now);
                    if !self.hub.wait_for_room(self.config.commit_interval.min(PATIENCE)) && since.elapsed() > PATIENCE
                    {
                        self.pause(true);
                    }
                }
                Turn::Full => {
                    // Rebalances and errors; a message can only come from a partition that is new.
                    if self.fetch(1, None) > 0 {
                        self.is_paused = false;
                        self.pause(true);
                    }
                    self.hub.wait_for_room(TICK);
                }
            }
            self.commit();
        }
    }

    fn fetch(&mut self, room: usize, due: Option<Instant>) -> usize {
        let now = Instant::now();
        let mut wait = if self.is_paused { Duration::ZERO } else { TICK };
        if let Some(due) = due {
            wait = wait.min(due.saturating_duration_since(now));
        }
        let mut failure = None;
        while self.batch.len() < room {
            match self.native.poll(wait) {
                Some(Ok(record)) => self.batch.push(fetched(&record, &self.hub)),
                Some(Err(error)) => {
                    failure = Some(error);
                    break;
                }
                None => break,
            }
            wait = Duration::ZERO;
        }
        let count = self.batch.len();
        if count > 0 {
            self.hub.take_in(&mut self.batch);
        }
        if let Some(error) = failure {
            self.failed(&error);
        }
        if self.hub.is_holding() {
            self.limit_held();
        }
        count
    }

    /// Delayed messages wait here only up to a bound.
    fn limit_held(&self) {
        let (full, again) = self.hub.fullness();
        if full.count() > 0 {
            self.changed_fetching(self.native.pause(&full));
        }
        if again.count() > 0 && !self.is_paused {
            self.changed_fetching(self.native.resume(&again));
        }
    }

    fn pause(&mut self, pause: bool) {
        if self.is_paused == pause {
            return;
        }
        self.is_paused = pause;
        let changed = self.native.assignment().and_then(|all| match pause {
            true => self.native.pause(&all),
            false => self.native.resume(&all).and_then(|()| self.native.pause(&self.hub.full())),
        });
        self.changed_fetching(changed);
    }

    fn changed_fetching(&self, result: KafkaResult<()>) {
        if let Err(error) = result {
            // A partition that has just gone; the next assignment begins afresh.
            tracing::debug!(topic = %self.hub.names.topic, %error, "fetching cannot be paused or resumed");
        }
    }

    fn failed(&self, error: &KafkaError) {
        let topic = &*self.hub.names.topic;
        tracing::debug!(topic, %error, "polled");
        let Some(code) = error::code(error) else { return };
        match error::kind(code) {
            // The health of the connection tells.
            ErrorKind::Disconnected | ErrorKind::Timeout => {}
            kind @ (ErrorKind::PermissionDenied | ErrorKind::NotFound) => {
                let missing = kind == ErrorKind::NotFound;
                // A topic that is made again is read again; the client library goes on asking for it.
                let still_there = missing
                    && !matches!(
                        topology::partitions(self.native.client(), topic, self.config.connect_timeout),
                        Ok(None)
                    );
                if !still_there {
                    self.hub.fail(kind, &error::text(error));
                }
            }
            _ if matches!(error, KafkaError::MessageConsumptionFatal(_)) => {
                self.hub.fail(ErrorKind::Other, &error::text(error));
            }
            _ => tracing::warn!(topic, %error, "receiving"),
        }
    }

    /// Tells the broker what is finished, without waiting: librdkafka repeats what fails on the way, and the next commit
    /// says it all again.
    fn commit(&mut self) {
        if self.hub.names.group.is_none() || self.committed.elapsed() < self.config.commit_interval {
            return;
        }
        if !self.hub.has_changes() {
            return;
        }
        self.committed = Instant::now();
        if let Some(transactions) = self.hub.transactions() {
            return transactions.commit(None);
        }
        let changes = self.hub.changes();
        if let Err(error) = self.native.commit(&changes, CommitMode::Async) {
            tracing::debug!(topic = %self.hub.names.topic, %error, "commit failed, trying again");
            self.hub.not_committed(&changes);
        }
    }

    /// Commits what is left, hears that it is committed, and leaves the group.
    fn leave(self) {
        let topic = &*self.hub.names.topic;
        let changes = self.hub.all_changes();
        if let Some(transactions) = self.hub.transactions() {
            self.hub.not_committed(&changes);
            transactions.commit(Some(self.config.connect_timeout));
        } else if self.hub.names.group.is_some()
            && changes.count() > 0
            && self.link.is_up_or_closing()
            && let Err(error) = self.native.commit(&changes, CommitMode::Sync)
        {
            tracing::warn!(topic, %error, "the last positions are not committed");
        }
        drop(self.hub.set_native(None));
        let Self { hub, native, .. } = self;
        // Leaves the group. Where somebody counts messages just now, that ends first.
        drop(native);
        hub.set_ended();
    }
}

fn fetched(record: &BorrowedMessage<'_>, hub: &Hub) -> Fetched {
    let (message, left) = convert::message(record);
    let left = left.filter(|left| !left.is_zero());
    let broker_time = record.timestamp().to_millis().and_then(|millis| u64::try_from(millis).ok());
    let details = Details {
        broker_time: broker_time.map(|millis| std::time::SystemTime::UNIX_EPOCH + Duration::from_millis(millis)),
        sequence: u64::try_from(record.offset()).ok(),
        partition: Some(record.partition()),
        ..Details::default()
    };
    Fetched {
        is_delay: record.topic() != &*hub.names.topic,
        partition: record.partition(),
        offset: record.offset(),
        incoming: Incoming { message, details: Some(Box::new(details)), ..Incoming::default() },
        due: left.map(|left| Instant::now() + left),
    }
}

/// Commits where a group begins, unless it has a position: from now on it misses nothing. Blocks.
pub(crate) fn begin_at(
    native: &Native,
    names: &topology::Names,
    start: Position,
    seek: Option<Position>,
    timeout: Duration,
) -> Result<()> {
    if names.is_queue && seek.is_none() {
        // The oldest message, which is where a group without a position begins.
        return Ok(());
    }
    let topic = &*names.topic;
    let failed = |error| error::native("consume", error).with_channel(topic);
    let partitions = topology::existing(native.client(), topic, timeout)?;
    let known = native.committed_offsets(topology::list(topic, &partitions), timeout).map_err(failed)?;
    let has_position = |partition: &i32| {
        known.find_partition(topic, *partition).is_some_and(|found| matches!(found.offset(), Offset::Offset(_)))
    };
    let wanted: Vec<i32> = match seek {
        Some(_) => partitions,
        None => partitions.into_iter().filter(|partition| !has_position(partition)).collect(),
    };
    if wanted.is_empty() {
        return Ok(());
    }
    let list = seek.unwrap_or(start).offsets(native, topic, &wanted, timeout)?;
    match native.commit(&list, CommitMode::Sync) {
        Ok(()) => Ok(()),
        // The group has members; the first of them has said where it begins.
        Err(KafkaError::ConsumerCommit(
            Code::UnknownMemberId | Code::IllegalGeneration | Code::RebalanceInProgress,
        )) => match seek {
            None => Ok(()),
            Some(_) => Err(Error::new(ErrorKind::Conflict, "the group has consumers, so its position cannot be set")
                .with_backend(crate::NAME)
                .with_operation("consume")
                .with_channel(topic)
                .with_hint("stop them first")),
        },
        Err(error) => Err(failed(error)),
    }
}
