//! The backend: its names, settings and capabilities.

use std::sync::Arc;

use async_trait::async_trait;
use polymq_core::{
    Backend, Capabilities, Connection, Delay, DeliveryCount, Key, Order, RedeliveryOrder, Result, Settings, Support,
    Wildcards,
};

use crate::{
    NAME,
    config::{AmqpConfig, Declare, KEYS, QueueType},
    connection::AmqpConnection,
    topology::MAX_DELAY,
};

/// RabbitMQ, and other brokers that speak AMQP 0-9-1.
#[derive(Debug, Default)]
pub struct AmqpBackend;

#[async_trait]
impl Backend for AmqpBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["rabbitmq", "rmq", "RMQIOHandler"]
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["amqp", "amqps"]
    }

    fn foreign_variables(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("RMQ_HOST", "host"),
            ("RMQ_PORT", "port"),
            ("RMQ_USER", "user"),
            ("RMQ_PASS", "pass"),
            ("RMQ_VHOST", "vhost"),
        ]
    }

    fn keys(&self) -> &'static [Key] {
        KEYS
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&AmqpConfig::default())
    }

    fn check_address(&self, address: &polymq_core::Address) -> Result<()> {
        crate::topology::check_address(address)
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        AmqpConfig::parse(settings).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        Ok(Arc::new(AmqpConnection::connect(settings).await?))
    }
}

pub(crate) fn capabilities(config: &AmqpConfig) -> Capabilities {
    let delay = Delay { support: Support::Emulated, max: Some(MAX_DELAY) };
    Capabilities {
        persistent: config.persistent,
        queues: true,
        topics: true,
        kinds_apart: true,
        groups: true,
        order: Order::SingleConsumer,
        requeue: Support::Emulated,
        // A quorum queue takes messages back in the order in which they come back.
        redelivery: if config.queue_type == QueueType::Quorum { RedeliveryOrder::Any } else { RedeliveryOrder::Back },
        delayed_retry: delay,
        delayed_send: delay,
        delivery_count: DeliveryCount::Header,
        native_dead_letter: true,
        confirms: true,
        detects_unroutable: true,
        wildcards: Some(Wildcards { one: "*", many: "#", separator: "." }),
        request_reply: true,
        expiry: Support::Native,
        max_payload: Some(config.max_payload),
        creates_channels: config.declare == Declare::Auto,
        lookup: true,
        bindings: true,
        filter: Support::Emulated,
        stats: true,
        purge: true,
        tls: cfg!(feature = "tls"),
        mutual_tls: cfg!(feature = "tls"),
        ..Capabilities::default()
    }
}
