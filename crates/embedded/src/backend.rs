//! The backend: its name, settings and capabilities.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use polymq_core::{Address, Backend, Capabilities, Connection, Error, ErrorKind, Key, Result, Settings};
use polymq_kubemq::{KubeMqBackend, KubeMqConfig, KubeMqConnection};

use crate::{
    NAME,
    config::{EmbeddedConfig, KEYS},
    engine,
};

/// The engine answers as soon as there is something, so an idle consumer needs to ask seldom.
const POLL_WAIT: Duration = Duration::from_secs(30);

/// polymq's own broker inside this process.
#[derive(Debug, Default)]
pub struct EmbeddedBackend;

#[async_trait]
impl Backend for EmbeddedBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["embedded"]
    }

    fn keys(&self) -> &'static [Key] {
        KEYS
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            max_payload: Some(EmbeddedConfig::default().max_payload),
            tls: false,
            mutual_tls: false,
            ..KubeMqBackend.capabilities()
        }
    }

    fn check_address(&self, address: &Address) -> Result<()> {
        KubeMqBackend.check_address(address)
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        EmbeddedConfig::parse(settings).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        let config = EmbeddedConfig::parse(settings)?;
        let folder = config.folder()?;
        // A large store is checked before it is used.
        let opened = tokio::task::spawn_blocking(move || engine::open(&folder)).await;
        let service =
            opened.map_err(|cause| Error::new(ErrorKind::Other, "opening was cancelled").with_source(cause))??;
        let config = KubeMqConfig { max_payload: config.max_payload, poll_wait: POLL_WAIT, ..KubeMqConfig::default() };
        Ok(Arc::new(KubeMqConnection::in_process(NAME, config, service).await?))
    }
}
