//! The confirm channels that all producers share, and what goes through them.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, OnceLock, atomic::AtomicU64},
};

use lapin::Connection;
use polymq_core::{Completer, Message, MessageId, Receipt, Result, Token};
use tokio::sync::{mpsc, oneshot};

use crate::{
    config::{AmqpConfig, Declare, QueueType},
    link::LinkHandle,
    publisher::Publisher,
    settle::Shared,
    topology::{self, QueuePlan},
};

/// Where messages go.
#[derive(Debug)]
pub(crate) struct Route {
    /// Empty for the default exchange, which leads to the queue that the routing key names.
    pub(crate) exchange: Arc<str>,
    pub(crate) routing_key: Arc<str>,
    /// What to make before the first message on a new connection.
    pub(crate) plan: Option<QueuePlan>,
    pub(crate) declare_exchange: bool,
    pub(crate) persistent: bool,
    /// What the channel's queues are.
    pub(crate) queue_type: QueueType,
    /// The queue ends with somebody's connection, so what is made for its delays must not stay either.
    pub(crate) temporary: bool,
    /// The generation of the connection that has seen the plan carried out; 0 is none.
    pub(crate) ensured: AtomicU64,
}

impl Route {
    /// Straight to one queue, which exists.
    pub(crate) fn to_queue(queue: Arc<str>, temporary: bool, queue_type: QueueType) -> Arc<Self> {
        Arc::new(Self {
            exchange: "".into(),
            routing_key: queue,
            plan: None,
            declare_exchange: false,
            persistent: true,
            queue_type,
            temporary,
            ensured: AtomicU64::new(0),
        })
    }

    /// Makes what is to be made.
    pub(crate) async fn ensure(&self, connection: &Connection, declare: Declare) -> Result<()> {
        if self.declare_exchange {
            topology::ensure_exchange(connection, &self.exchange, declare).await?;
        }
        match &self.plan {
            Some(plan) => topology::ensure(connection, plan).await,
            None => Ok(()),
        }
    }

    /// What the queues for its delays are. Quorum queues stay for good, which only those of a queue that stays too may do.
    pub(crate) fn delay_type(&self) -> QueueType {
        if self.temporary { QueueType::Classic } else { self.queue_type }
    }

    /// Whether messages go to the same place.
    pub(crate) fn leads_as(&self, other: &Self) -> bool {
        (&self.exchange, &self.routing_key) == (&other.exchange, &other.routing_key)
    }

    pub(crate) fn is_queue(&self) -> bool {
        self.exchange.is_empty()
    }
}

/// A message on its way to the broker.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) message: Message,
    pub(crate) route: Arc<Route>,
    pub(crate) answer: Answer,
}

/// Who waits for the confirm.
#[derive(Debug)]
pub(crate) enum Answer {
    /// A producer.
    Send(Completer<Receipt>),
    /// A consumer that gives the original up afterwards.
    Retry { completer: Completer<()>, shared: Arc<Shared>, token: Token },
}

impl Answer {
    pub(crate) fn hand_over(&self) -> bool {
        match self {
            Self::Send(completer) => completer.hand_over(),
            Self::Retry { completer, .. } => completer.hand_over(),
        }
    }

    /// Whether what it was for is over: the broker delivers the original of a retry again, so a copy would be one too many.
    pub(crate) fn is_stale(&self) -> bool {
        match self {
            Self::Send(_) => false,
            Self::Retry { shared, token, .. } => !shared.is_open(*token),
        }
    }

    pub(crate) fn take_back(&self) {
        match self {
            Self::Send(completer) => completer.take_back(),
            Self::Retry { completer, .. } => completer.take_back(),
        }
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        match self {
            Self::Send(completer) => completer.is_abandoned(),
            Self::Retry { completer, .. } => completer.is_abandoned(),
        }
    }

    pub(crate) fn complete(self, result: Result<Option<MessageId>>) {
        match self {
            Self::Send(completer) => {
                completer.complete(result.map(|id| Receipt { id: id.unwrap_or_default(), broker_id: None }))
            }
            Self::Retry { completer, shared, token } => completer.complete(result.and_then(|_| shared.finish(token))),
        }
    }
}

/// What a channel of the pool is told.
#[derive(Debug)]
pub(crate) enum Item {
    Publish(Outgoing),
    /// To be answered when everything before it is.
    Flush(oneshot::Sender<()>),
}

/// The pool. A route always uses the same channel, so messages of one route keep their order.
#[derive(Debug)]
pub(crate) struct Publishers {
    link: Arc<LinkHandle>,
    config: Arc<AmqpConfig>,
    channels: Vec<OnceLock<mpsc::UnboundedSender<Item>>>,
}

impl Publishers {
    pub(crate) fn new(link: Arc<LinkHandle>, config: Arc<AmqpConfig>) -> Arc<Self> {
        let channels = (0..config.channels).map(|_| OnceLock::new()).collect();
        Arc::new(Self { link, config, channels })
    }

    fn of(&self, route: &Route) -> &mpsc::UnboundedSender<Item> {
        let mut hasher = DefaultHasher::new();
        (&route.exchange, &route.routing_key).hash(&mut hasher);
        // The remainder fits in any usize.
        let at = (hasher.finish() % self.channels.len() as u64) as usize;
        self.channels[at].get_or_init(|| {
            let (sender, receiver) = mpsc::unbounded_channel();
            self.link.spawn(Publisher::new(Arc::clone(&self.link), Arc::clone(&self.config), receiver).run());
            sender
        })
    }

    pub(crate) fn send(&self, outgoing: Outgoing) {
        let channel = self.of(&outgoing.route);
        if let Err(mpsc::error::SendError(Item::Publish(outgoing))) = channel.send(Item::Publish(outgoing)) {
            outgoing.answer.complete(Err(self.link.ended("send")));
        }
    }

    /// Waits until everything handed over for this route before has been answered.
    pub(crate) async fn flush(&self, route: &Route) {
        flush(self.of(route)).await;
    }

    pub(crate) async fn flush_all(&self) {
        for channel in self.channels.iter().filter_map(OnceLock::get) {
            flush(channel).await;
        }
    }
}

async fn flush(channel: &mpsc::UnboundedSender<Item>) {
    let (done, answered) = oneshot::channel();
    // A publisher that has ended has answered everything.
    if channel.send(Item::Flush(done)).is_ok() {
        let _ = answered.await;
    }
}
