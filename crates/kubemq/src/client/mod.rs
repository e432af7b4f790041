//! What only KubeMQ has, typed: queues with policies, transactions and polls, events with their start positions, commands and
//! queries with their responders, and channels.
//!
//! Everything that lasts is a value, and ends when the value is dropped: a subscription, a responder, a transaction, a poll.
//! A call ends when its future is dropped; what was handed over by then may still have its effect. Values do not depend on
//! each other, but all of them on their client: when it is dropped they end too, with an error.

mod channels;
mod duplex;
mod events;
mod feed;
mod poll;
mod queues;
mod requests;
mod responder;
mod transaction;
mod verify;

use std::sync::{Arc, OnceLock};

use polymq_core::{Address, Result, Settings};

pub use self::{
    events::{Events, StartAt},
    poll::Poll,
    queues::{Accepted, Policy},
    requests::{Answered, Ask, RequestKind},
    responder::{Asked, Reply, Responder},
    transaction::Transaction,
    verify::Corrupted,
};
use crate::{
    config::{KubeMqConfig, Topics},
    connect::Target,
    connection::ServerInfo,
    link::{Link, LinkHandle},
    names,
    outbox::{Outbox, ToTopics},
    transport::InProcess,
};

/// A client for what only KubeMQ has; everything else goes over a `Bus`.
#[derive(Debug)]
pub struct KubeMq {
    link: LinkHandle,
    /// One long stream of stored events, and one of others, when they are first used.
    stored: OnceLock<Arc<Outbox<ToTopics<true>>>>,
    plain: OnceLock<Arc<Outbox<ToTopics<false>>>>,
}

impl KubeMq {
    /// Connects with the settings of the backend `kubemq`. A server of another version than 2.x is used with a warning.
    ///
    /// # Errors
    /// As [`KubeMqConnection::connect`](crate::KubeMqConnection::connect).
    pub async fn connect(settings: &Settings) -> Result<Self> {
        Self::open(KubeMqConfig::parse(settings)?, Target::Network).await
    }

    /// The same with a broker in this process; as
    /// [`KubeMqConnection::in_process`](crate::KubeMqConnection::in_process).
    ///
    /// # Errors
    /// [`ErrorKind::Config`](polymq_core::ErrorKind::Config) for settings that are not valid, and what the broker answers.
    pub async fn in_process(config: KubeMqConfig, service: InProcess) -> Result<Self> {
        config.check()?;
        Self::open(config, Target::InProcess(service)).await
    }

    async fn open(config: KubeMqConfig, target: Target) -> Result<Self> {
        let link = Link::start(Arc::new(config), target).await?;
        Ok(Self { link, stored: OnceLock::new(), plain: OnceLock::new() })
    }

    /// A round trip, and what the server says about itself.
    ///
    /// # Errors
    /// [`ErrorKind::Disconnected`](polymq_core::ErrorKind::Disconnected) when nobody answers in time.
    pub async fn ping(&self) -> Result<ServerInfo> {
        self.link.ping().await.map(ServerInfo::from)
    }
}

fn check_name(name: &str) -> Result<()> {
    names::check(&Address::queue(name), Topics::Store)
}
