//! The backend: its names, settings and capabilities.

use std::sync::Arc;

use async_trait::async_trait;
use polymq_core::{
    Backend, Capabilities, Connection, Delay, DeliveryCount, Key, Order, RedeliveryOrder, Result, Settings, Support,
};

use crate::{
    NAME,
    config::{Declare, KEYS, KafkaConfig},
    connection::KafkaConnection,
    topology::MAX_DELAY,
};

/// Apache Kafka, and other brokers that speak its protocol.
#[derive(Debug, Default)]
pub struct KafkaBackend;

#[async_trait]
impl Backend for KafkaBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["KafkaHandler"]
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["kafka", "kafkas"]
    }

    fn foreign_variables(&self) -> &'static [(&'static str, &'static str)] {
        &[("KAFKA_BOOTSTRAP_SERVERS", "servers"), ("KAFKA_SASL_USERNAME", "user"), ("KAFKA_SASL_PASSWORD", "pass")]
    }

    fn keys(&self) -> &'static [Key] {
        KEYS
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&KafkaConfig::default())
    }

    fn check_address(&self, address: &polymq_core::Address) -> Result<()> {
        crate::topology::Names::of(address, None).check()
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        KafkaConfig::parse(settings).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        Ok(Arc::new(KafkaConnection::connect(settings).await?))
    }
}

pub(crate) fn capabilities(config: &KafkaConfig) -> Capabilities {
    let delay = Delay { support: Support::Emulated, max: Some(MAX_DELAY) };
    Capabilities {
        persistent: true,
        queues: true,
        topics: true,
        groups: true,
        replay: true,
        order: Order::PerKey,
        requeue: Support::Emulated,
        redelivery: RedeliveryOrder::Back,
        delayed_retry: delay,
        delayed_send: delay,
        delivery_count: DeliveryCount::Header,
        confirms: true,
        transactions: true,
        detects_unroutable: true,
        request_reply: true,
        expiry: Support::Emulated,
        max_payload: Some(config.max_payload),
        seek: true,
        creates_channels: config.declare == Declare::Auto,
        lookup: true,
        filter: Support::Emulated,
        stats: true,
        purge: true,
        prefetch_bytes: true,
        tls: cfg!(feature = "tls"),
        mutual_tls: cfg!(feature = "tls"),
        ..Capabilities::default()
    }
}
