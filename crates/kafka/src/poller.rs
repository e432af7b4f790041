//! The thread of a [`Hub`]: fetches within the prefetch, hears of rebalances, commits what is finished.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use polymq_core::{Error, ErrorKind, Result};
use rdkafka::{
    Offset,
    consumer::{CommitMode, Consumer},
    error::{KafkaError, KafkaResult},
    message::Message as _,
};
use tokio::sync::oneshot;

use crate::{
    client,
    config::KafkaConfig,
    context::{Context, Native},
    error,
    hub::{Fetched, Hub, Room, Turn},
    link::{Link, lock},
    position::{Position, begin_at},
    publisher::configuration,
    record::{self, Content, Record},
    topology,
};

/// How long the thread does not look whether somebody has closed: longer is late, shorter costs an idle process.
const TICK: Duration = Duration::from_millis(50);
/// How long a full prefetch is waited for before fetching is paused. Pausing throws away what the client library has
/// fetched; without it, a rebalance of the group waits for this long.
const PATIENCE: Duration = Duration::from_secs(1);

/// The bytes after which no more is fetched at once. A body that a handler keeps for long keeps what was fetched with it.
const AT_ONCE: usize = 128 * 1024;
/// How long whoever reads a record, or counts messages, may take until its client ends without it.
const MOMENT: Duration = Duration::from_millis(100);

/// How often positions are committed though nothing has changed: much more often than Kafka forgets them.
const RENEWAL: Duration = Duration::from_secs(3600);

/// What a hub reads, and from where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) prefetch: usize,
    pub(crate) bytes: usize,
    /// Where a group without a position begins.
    pub(crate) start: Position,
    /// Where the group begins now, whatever its position was.
    pub(crate) seek: Option<Position>,
    /// What handlers send is committed with the positions.
    pub(crate) transactional: bool,
}

/// Starts the thread; `ready` hears when it reads. Without the thread the hub has ended.
pub(crate) fn start(
    hub: Arc<Hub>,
    config: Arc<KafkaConfig>,
    link: Arc<Link>,
    plan: Plan,
    ready: oneshot::Sender<Result<()>>,
) -> Result<()> {
    let ended = |hub: &Hub, error: Error| {
        hub.fail(error.kind(), error.message());
        hub.set_ended();
        error
    };
    let reading = Arc::clone(&hub);
    let run = move || {
        guarded(&Arc::clone(&reading), move || {
            let mut poller = match Poller::begin(&reading, config, link, &plan) {
                Ok(poller) => poller,
                Err(error) => {
                    let _ = ready.send(Err(ended(&reading, error)));
                    return;
                }
            };
            reading.set_begun(plan.seek);
            let _ = ready.send(Ok(()));
            poller.run();
            poller.leave();
        });
    };
    let spawned = thread::Builder::new().name("polymq-kafka".into()).spawn(run);
    spawned
        .map(drop)
        .map_err(|error| ended(&hub, Error::new(ErrorKind::Other, "no thread can be started").with_source(error)))
}

/// Runs what a hub's thread does. A panic, as the client library has some for what other programs write, ends the hub like any
/// other failure: whoever reads hears of it and opens another one, instead of waiting for ever.
fn guarded(hub: &Hub, run: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(run)).is_err() {
        let error = error::panicked("receive");
        tracing::error!(topic = %hub.names.topic, %error, "its consumers have to be opened anew");
        hub.fail(error.kind(), error.message());
        // Its records first: the client must not be the last of them to go, behind the lock that its end takes.
        hub.seal();
        if let Some(native) = hub.set_native(None) {
            end(native);
        }
        hub.set_ended();
    }
}

struct Poller {
    hub: Arc<Hub>,
    config: Arc<KafkaConfig>,
    link: Arc<Link>,
    plan: Plan,
    native: Arc<Native>,
    batch: Vec<Fetched>,
    is_paused: bool,
    /// Since when there is no room.
    full_since: Option<Instant>,
    committed: Instant,
    /// When a delay topic or new partitions were looked for.
    looked: Instant,
    /// When positions were committed for their own sake.
    renewed: Instant,
}

impl Poller {
    fn begin(hub: &Arc<Hub>, config: Arc<KafkaConfig>, link: Arc<Link>, plan: &Plan) -> Result<Self> {
        let native = create(hub, &config, &link, plan)?;
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
            plan: *plan,
            native,
            batch: Vec::new(),
            is_paused: false,
            full_since: None,
            committed: Instant::now(),
            looked: Instant::now(),
            renewed: Instant::now(),
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
                    if self.fetch(Room { messages: 1, bytes: 0 }, None) > 0 {
                        self.is_paused = false;
                        self.pause(true);
                    }
                    self.hub.wait_for_room(TICK);
                }
            }
            self.commit();
            self.look();
            if self.native.context().brokers.are_gone() {
                self.renew();
            }
        }
    }

    /// Another client takes over from one that cannot go on. What that one had not committed comes again.
    fn renew(&mut self) {
        let topic = &*self.hub.names.topic;
        tracing::warn!(topic, "this client of librdkafka can connect no more; another one takes over");
        let native = match create(&self.hub, &self.config, &self.link, &self.plan) {
            Ok(native) => Arc::new(native),
            Err(error) => {
                tracing::error!(topic, %error, "no new client can be made; trying again");
                return self.native.context().brokers.ask_again();
            }
        };
        self.native.context().resign();
        let list = self.hub.abandoned();
        let reads = match &self.hub.names.group {
            Some(_) => native.subscribe(&[topic]),
            None => native.assign(&list),
        };
        if let Err(error) = reads {
            return self.hub.fail(ErrorKind::Other, &error::text(&error));
        }
        if self.hub.names.group.is_none() {
            self.hub.assigned(&list, true);
        }
        (self.is_paused, self.full_since) = (false, None);
        drop(self.hub.set_native(Some(Arc::clone(&native))));
        let old = std::mem::replace(&mut self.native, native);
        // It waits for answers that nobody gives. Without a thread of its own, it does so here.
        let _ = thread::Builder::new().name("polymq-kafka-end".into()).spawn(move || end(old));
    }

    fn fetch(&mut self, room: Room, due: Option<Instant>) -> usize {
        let now = Instant::now();
        let mut wait = if self.is_paused { Duration::ZERO } else { TICK };
        if let Some(due) = due {
            wait = wait.min(due.saturating_duration_since(now));
        }
        let mut failure = None;
        let records = record::fetch(&self.native, |native, records| {
            let (mut bytes, most) = (0, room.bytes.min(AT_ONCE));
            while records.len() < room.messages && (bytes < most || records.is_empty()) {
                match native.poll(wait) {
                    Some(Ok(record)) => {
                        bytes += record::bytes(&record);
                        records.push(record);
                    }
                    Some(Err(error)) => {
                        failure = Some(error);
                        break;
                    }
                    None => break,
                }
                wait = Duration::ZERO;
            }
        });
        let count = records.len();
        if count > 0 {
            self.take_in(records);
        }
        if let Some(error) = failure {
            self.failed(&error);
        }
        if self.hub.is_holding() {
            self.limit_held();
        }
        count
    }

    fn take_in(&mut self, records: Vec<Record>) {
        // Most records are of the topic of the one before, whose name need not be looked at again.
        let mut latest = None;
        self.batch.extend(records.into_iter().map(|record| {
            let borrowed = record.get();
            let is_delay = match latest {
                Some((topic, is_delay)) if topic == borrowed.topic_ptr() => is_delay,
                _ => borrowed.topic() != &*self.hub.names.topic,
            };
            latest = Some((borrowed.topic_ptr(), is_delay));
            let (partition, offset) = (borrowed.partition(), borrowed.offset());
            let due = if is_delay { record.due() } else { None };
            Fetched { is_delay, partition, offset, content: Content::Record(record), due }
        }));
        self.hub.take_in(&mut self.batch);
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

    /// Now and then looks for a delay topic where there was none, and without a group for new partitions.
    fn look(&mut self) {
        if self.renewed.elapsed() >= RENEWAL {
            self.hub.renew_positions();
            self.renewed = Instant::now();
        }
        let context = self.native.context();
        let is_alone = self.hub.names.group.is_none();
        if (is_alone || context.may_lack_companions(&self.hub))
            && self.looked.elapsed() >= self.config.heartbeat
            && self.link.is_up_or_closing()
        {
            match is_alone {
                true => self.find_partitions(),
                false => context.find_companions(&self.hub, &self.native),
            }
            self.looked = Instant::now();
        }
    }

    /// Reads partitions that were added, from their beginning: all that is in them is new. Only a group is told of them.
    fn find_partitions(&self) {
        let topic = &*self.hub.names.topic;
        let found = topology::partitions(self.native.client(), topic, self.config.connect_timeout);
        let Ok(Some(found)) = found.inspect_err(|error| tracing::debug!(topic, %error, "partitions are not known"))
        else {
            return;
        };
        let mut new = topology::list(topic, &self.hub.missing(&found));
        if new.count() == 0 {
            return;
        }
        tracing::debug!(topic, partitions = new.count(), "added");
        match new.set_all_offsets(Offset::Beginning).and_then(|()| self.native.incremental_assign(&new)) {
            Ok(()) => self.hub.assigned(&new, false),
            Err(error) => tracing::warn!(topic, %error, "new partitions cannot be read yet"),
        }
    }

    /// Tells the broker what is finished, without waiting: librdkafka repeats what fails on the way, and what the broker
    /// refuses is said again with the next assignment, and every hour.
    fn commit(&mut self) {
        let flushing = self.hub.flushing();
        if !flushing.is_empty() {
            self.commit_all();
            // Who has given up does not need to know.
            return flushing.into_iter().for_each(|waiting| _ = waiting.send(()));
        }
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

    /// Commits what is finished, and hears that it is committed.
    fn commit_all(&self) {
        if let Some(transactions) = self.hub.transactions() {
            return transactions.commit(Some(self.config.connect_timeout));
        }
        if self.hub.names.group.is_none() || !self.link.is_up_or_closing() {
            return;
        }
        // Also what was committed without waiting.
        let changes = self.hub.all_changes();
        if changes.count() > 0
            && let Err(error) = self.native.commit(&changes, CommitMode::Sync)
        {
            tracing::warn!(topic = %self.hub.names.topic, %error, "positions are not committed");
            self.hub.not_committed(&changes);
        }
    }

    /// Commits what is left, and leaves the group.
    fn leave(self) {
        if self.hub.transactions().is_some() {
            // What was handed over already is written yet.
            self.commit_all();
        }
        self.hub.seal();
        self.commit_all();
        drop(self.hub.set_native(None));
        let Self { hub, native, .. } = self;
        end(native);
        hub.set_ended();
    }
}

fn create(hub: &Arc<Hub>, config: &Arc<KafkaConfig>, link: &Arc<Link>, plan: &Plan) -> Result<Native> {
    let own = format!("polymq-{:016x}", fastrand::u64(..));
    let group = hub.names.group.as_deref().unwrap_or(&own);
    let made = Context::receiving(hub, link, config).and_then(|context| {
        let settings = client::consumer(config, group, plan.prefetch, plan.bytes)?;
        settings.create_with_context(context).map_err(configuration)
    });
    made.map_err(error::for_now)
}

/// Ends the client, which leaves the group, in this thread: not in that of a handler that drops the last body it has lent.
fn end(mut native: Arc<Native>) {
    let deadline = Instant::now() + MOMENT;
    while Instant::now() < deadline {
        native = match Arc::try_unwrap(native) {
            Ok(last) => return drop(last),
            Err(shared) => shared,
        };
        thread::sleep(Duration::from_millis(1));
    }
    // A handler has kept a body: the memory stays until that is dropped.
    if native.close_queue().is_ok() {
        while !native.closed() {
            drop(native.poll(TICK));
        }
    }
}

#[cfg(test)]
mod tests {
    use polymq_core::Address;

    use super::*;
    use crate::{bodies::Bodies, topology::Names};

    #[test]
    fn a_panic_ends_the_hub_and_its_readers_hear_of_it() {
        let hub = Hub::new(Names::of(&Address::queue("orders"), None));
        let (share, _) = hub.join(1, 1).expect("it has just begun");
        guarded(&hub, || {});
        assert!(
            !*hub.ended().borrow() && hub.take(share, 1, &mut Bodies::default(), &mut Vec::new()).is_none(),
            "it goes on"
        );
        guarded(&hub, || panic!("a part of this test"));
        let error =
            hub.take(share, 1, &mut Bodies::default(), &mut Vec::new()).expect("an answer").expect_err("it is over");
        assert_eq!(error.kind(), ErrorKind::Other, "{error}");
        assert!(*hub.ended().borrow());
    }
}
