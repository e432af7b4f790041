//! The backend: its names, settings and capabilities.

use std::sync::Arc;

use async_trait::async_trait;
use polymq_core::{Backend, Capabilities, Connection, Delay, Key, RedeliveryOrder, Result, Settings, Support};

use crate::{
    NAME,
    config::{HttpConfig, KEYS},
    connection::HttpConnection,
};

/// HTTP/1.1 and HTTP/2, from sender to consumer without anyone between them.
#[derive(Debug, Default)]
pub struct HttpBackend;

#[async_trait]
impl Backend for HttpBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn aliases(&self) -> &'static [&'static str] {
        &["HTTPHandler"]
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["http", "https"]
    }

    fn keys(&self) -> &'static [Key] {
        KEYS
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(&HttpConfig::default())
    }

    fn check_address(&self, address: &polymq_core::Address) -> Result<()> {
        crate::target::check_name(address)
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        HttpConfig::parse(settings).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        Ok(Arc::new(HttpConnection::connect(settings)?))
    }
}

pub(crate) fn capabilities(config: &HttpConfig) -> Capabilities {
    Capabilities {
        direct: true,
        queues: true,
        topics: true,
        // The sender is told to come again, and when: 503 with Retry-After.
        requeue: Support::Emulated,
        redelivery: RedeliveryOrder::Any,
        delayed_retry: Delay { support: Support::Emulated, max: None },
        confirms: true,
        detects_unroutable: true,
        request_reply: true,
        max_payload: Some(config.max_payload),
        prefetch_bytes: true,
        tls: cfg!(feature = "tls"),
        mutual_tls: cfg!(feature = "tls"),
        ..Capabilities::default()
    }
}
