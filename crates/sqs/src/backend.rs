//! The backend: its names, settings and capabilities.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use polymq_core::{
    Backend, Capabilities, Connection, Delay, DeliveryCount, Key, Order, RedeliveryOrder, Result, Settings, Support,
};

use crate::{
    NAME,
    config::{Declare, KEYS, MAX_VISIBILITY, SqsConfig},
    connection::SqsConnection,
};

/// The longest delay of a message that is sent, from SQS's own documents.
pub(crate) const MAX_SEND_DELAY: Duration = Duration::from_secs(900);
/// The most messages in one request.
pub(crate) const BATCH: usize = 10;

/// Amazon SQS and SNS, and servers that speak like them.
#[derive(Debug, Default)]
pub struct SqsBackend;

#[async_trait]
impl Backend for SqsBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["sns", "aws"]
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["sqs", "sqss"]
    }

    fn foreign_variables(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("AWS_DEFAULT_REGION", "region"),
            ("AWS_REGION", "region"),
            ("AWS_ENDPOINT_URL", "endpoint"),
            ("AWS_ENDPOINT_URL_SQS", "sqs_endpoint"),
            ("AWS_ENDPOINT_URL_SNS", "sns_endpoint"),
            ("AWS_ACCESS_KEY_ID", "access_key_id"),
            ("AWS_SECRET_ACCESS_KEY", "secret_access_key"),
            ("AWS_SESSION_TOKEN", "session_token"),
            ("AWS_PROFILE", "profile"),
            ("AWS_SHARED_CREDENTIALS_FILE", "credentials_file"),
            ("AWS_CA_BUNDLE", "ca_file"),
        ]
    }

    fn keys(&self) -> &'static [Key] {
        KEYS
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&SqsConfig::default())
    }

    fn check_address(&self, address: &polymq_core::Address) -> Result<()> {
        match address.kind() {
            polymq_core::ChannelKind::Queue => crate::names::queue(address, None, false).map(drop),
            polymq_core::ChannelKind::Topic => crate::names::topic(address.name(), false).map(drop),
        }
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        SqsConfig::parse(settings).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        Ok(Arc::new(SqsConnection::connect(settings).await?))
    }
}

pub(crate) fn capabilities(config: &SqsConfig) -> Capabilities {
    let send = Delay { support: Support::Native, max: Some(MAX_SEND_DELAY) };
    // SQS counts its twelve hours from the delivery, so the time that a message may have been held comes off.
    let retry = Delay { support: Support::Native, max: Some(MAX_VISIBILITY.saturating_sub(config.lease_cap)) };
    Capabilities {
        persistent: true,
        queues: true,
        topics: true,
        kinds_apart: true,
        groups: true,
        order: if config.fifo { Order::PerKey } else { Order::None },
        requeue: Support::Native,
        redelivery: if config.fifo { RedeliveryOrder::Front } else { RedeliveryOrder::Any },
        delayed_retry: retry,
        delayed_send: if config.fifo { Delay::default() } else { send },
        delivery_count: DeliveryCount::Native,
        native_dead_letter: true,
        confirms: true,
        detects_unroutable: true,
        max_batch_send: Some(BATCH),
        max_batch_receive: Some(BATCH),
        request_reply: true,
        max_payload: Some(config.max_payload),
        leases: true,
        deduplication: config.fifo,
        creates_channels: config.declare == Declare::Auto,
        lookup: true,
        list: true,
        bindings: true,
        filter: Support::Native,
        purge: true,
        tls: true,
        ..Capabilities::default()
    }
}
