//! The backend: its names, settings and capabilities.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use polymq_core::{
    Address, Backend, Capabilities, Connection, Delay, DeliveryCount, Key, Order, RedeliveryOrder, Result, Settings,
    Support, Wildcards,
};

use crate::{
    NAME,
    config::{Declare, KEYS, KubeMqConfig, Topics},
    connection::KubeMqConnection,
    convert::MAX_SECONDS,
    names,
};

/// KubeMQ, and polymq's own broker.
#[derive(Debug, Default)]
pub struct KubeMqBackend;

#[async_trait]
impl Backend for KubeMqBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["kubemq", "kubemqs"]
    }

    fn foreign_variables(&self) -> &'static [(&'static str, &'static str)] {
        &[("KUBEMQ_ADDRESS", "address"), ("KUBEMQ_AUTH_TOKEN", "token"), ("KUBEMQ_CLIENT_ID", "client_id")]
    }

    fn keys(&self) -> &'static [Key] {
        KEYS
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&KubeMqConfig::default())
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        names::check(address, Topics::Store)
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        KubeMqConfig::parse(settings).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        Ok(Arc::new(KubeMqConnection::connect(settings).await?))
    }
}

pub(crate) fn capabilities(config: &KubeMqConfig) -> Capabilities {
    let delay = Delay { support: Support::Native, max: Some(Duration::from_secs(MAX_SECONDS)) };
    let stored = config.topics == Topics::Store;
    Capabilities {
        persistent: true,
        queues: true,
        topics: true,
        groups: true,
        at_most_once_topics: !stored,
        replay: stored,
        wildcards: (!stored).then_some(Wildcards { one: "*", many: ">", separator: "." }),
        kinds_apart: true,
        order: Order::SingleConsumer,
        requeue: Support::Native,
        redelivery: RedeliveryOrder::Back,
        delayed_retry: delay,
        delayed_send: delay,
        delivery_count: DeliveryCount::Native,
        confirms: true,
        request_reply: true,
        expiry: Support::Native,
        max_payload: Some(config.max_payload),
        creates_channels: config.declare == Declare::Auto,
        lookup: true,
        list: true,
        filter: Support::Emulated,
        purge: true,
        peek: true,
        tls: cfg!(feature = "tls"),
        mutual_tls: cfg!(feature = "tls"),
        ..Capabilities::default()
    }
}
