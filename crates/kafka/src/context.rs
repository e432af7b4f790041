//! What the client library calls back: what goes wrong, and partitions that come and go.

use std::{
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use polymq_core::{Error, ErrorKind, Result};
use rdkafka::{
    ClientContext, TopicPartitionList,
    config::RDKafkaLogLevel,
    consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, RebalanceProtocol},
    error::KafkaError,
    types::{RDKafkaErrorCode as Code, RDKafkaRespErr},
};

use crate::{
    brokers::Brokers,
    client,
    config::KafkaConfig,
    error,
    hub::Hub,
    link::{Link, lock},
    topology,
};

/// A client that receives, or asks on behalf of a group.
pub(crate) type Native = BaseConsumer<Context>;

/// What the client library calls back.
pub(crate) struct Context {
    /// Until another client takes over.
    hub: Mutex<Weak<Hub>>,
    link: Arc<Link>,
    config: Arc<KafkaConfig>,
    pub(crate) brokers: Brokers,
    /// Whether the delay topic is being read here.
    has_companions: AtomicBool,
    /// What it told that ends the consumer.
    pub(crate) end: Mutex<Option<Error>>,
}

impl Context {
    /// Of the consumer of a hub.
    pub(crate) fn receiving(hub: &Arc<Hub>, link: &Arc<Link>, config: &Arc<KafkaConfig>) -> Result<Self> {
        Ok(Self { hub: Mutex::new(Arc::downgrade(hub)), ..Self::asking(link, config)? })
    }

    /// Of a consumer that asks and never reads.
    pub(crate) fn asking(link: &Arc<Link>, config: &Arc<KafkaConfig>) -> Result<Self> {
        Ok(Self {
            hub: Mutex::default(),
            link: Arc::clone(link),
            config: Arc::clone(config),
            brokers: Brokers::of(config)?,
            has_companions: AtomicBool::new(false),
            end: Mutex::new(None),
        })
    }

    /// Another client has taken over: what happens to this one is nothing to the hub.
    pub(crate) fn resign(&self) {
        *lock(&self.hub) = Weak::new();
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, line: &str) {
        client::log(level, facility, line);
    }

    fn stats_raw(&self, statistics: &[u8]) {
        self.brokers.told(statistics);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // What ends this client is its hub's affair, and nothing to the one that sends.
        if error::code(&error) != Some(Code::Fatal) {
            self.link.observe(&error, reason);
        }
        self.brokers.observe(error::code(&error));
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
        let hub = lock(&self.hub).upgrade();
        let mut all = list.clone();
        if let Some(hub) = hub.as_deref().filter(|hub| list.find_partition(&hub.names.topic, 0).is_some()) {
            let companions = if is_assignment { self.new_companions(hub, consumer) } else { self.old_companions(hub) };
            for companion in companions.iter().flat_map(TopicPartitionList::elements) {
                all.add_partition(companion.topic(), companion.partition());
            }
        }
        if let Some(hub) = hub.as_deref().filter(|_| !is_assignment) {
            self.revoke(hub, consumer, &all);
        }
        if is_assignment {
            resume(consumer, &all);
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
    /// The partitions of the delay topic, when there is one that is not read here: whoever has the first partition of the
    /// topic reads them. The group itself shares only the topic, or one member might get nothing but delayed messages.
    fn new_companions(&self, hub: &Hub, consumer: &Native) -> Option<TopicPartitionList> {
        let delay = hub.names.delay.as_deref().filter(|_| !self.has_companions.load(Ordering::Acquire))?;
        match topology::partitions(consumer.client(), delay, self.config.connect_timeout) {
            Ok(Some(_)) => {
                self.has_companions.store(true, Ordering::Release);
                Some(topology::list(delay, &topology::DELAY_PARTITIONS))
            }
            Ok(None) => None,
            Err(error) => {
                tracing::debug!(topic = %hub.names.topic, %error, "whether there is a delay topic is not known yet");
                None
            }
        }
    }

    /// Those that were read here until now.
    fn old_companions(&self, hub: &Hub) -> Option<TopicPartitionList> {
        let delay = hub.names.delay.as_deref().filter(|_| self.has_companions.swap(false, Ordering::AcqRel))?;
        Some(topology::list(delay, &topology::DELAY_PARTITIONS))
    }

    /// Whether a delay topic may have been made since partitions were assigned: by whoever first sent to it, or by hand.
    pub(crate) fn may_lack_companions(&self, hub: &Hub) -> bool {
        hub.names.delay.is_some() && !self.has_companions.load(Ordering::Acquire)
    }

    /// Reads the delay topic from now on, if there is one by now and it is ours to read.
    pub(crate) fn find_companions(&self, hub: &Hub, consumer: &Native) {
        let Some(list) = hub.has_first().then(|| self.new_companions(hub, consumer)).flatten() else { return };
        resume(consumer, &list);
        match consumer.incremental_assign(&list) {
            Ok(()) => self.assigned(hub, consumer, &list),
            Err(error) => {
                tracing::warn!(topic = %hub.names.topic, %error, "the delay topic cannot be read yet");
                self.has_companions.store(false, Ordering::Release);
            }
        }
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

/// A partition that was paused when it went away comes back paused: the client library forgets that in no other way. Who
/// has no room for it pauses it again.
fn resume(consumer: &Native, list: &TopicPartitionList) {
    if let Err(error) = consumer.resume(list) {
        tracing::debug!(%error, "fetching cannot be resumed");
    }
}
