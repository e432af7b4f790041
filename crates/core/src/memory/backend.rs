use std::sync::Arc;

use async_trait::async_trait;

use super::{NAME, config, config::Config, connection::MemoryConnection};
use crate::{Backend, Capabilities, Connection, Key, Result, Settings};

/// Queues and topics inside this process; see [`memory`](crate::memory).
#[derive(Debug, Clone, Copy, Default)]
pub struct MemoryBackend;

#[async_trait]
impl Backend for MemoryBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schemes(&self) -> &'static [&'static str] {
        &[NAME]
    }

    fn keys(&self) -> &'static [Key] {
        config::KEYS
    }

    fn capabilities(&self) -> Capabilities {
        Config::default().capabilities()
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        Config::read(settings).map(drop)
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        Ok(Arc::new(MemoryConnection::new(&Config::read(settings)?)))
    }
}
