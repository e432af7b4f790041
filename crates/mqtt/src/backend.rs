//! The backend: a name, settings and a way to connect.

use std::sync::Arc;

use async_trait::async_trait;
use polymq_core::{Backend, Capabilities, Connection, Key, Result, Settings};

use crate::{
    config::{KEYS, MqttConfig},
    connection::MqttConnection,
    topology,
};

/// The name that selects this backend.
pub const NAME: &str = "mqtt";

/// MQTT 5 and 3.1.1.
#[derive(Debug, Clone, Copy, Default)]
pub struct MqttBackend;

#[async_trait]
impl Backend for MqttBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["mqtt", "mqtts"]
    }

    fn foreign_variables(&self) -> &'static [(&'static str, &'static str)] {
        &[
            ("MQTT_URI", "url"),
            ("MQTT_URL", "url"),
            ("MQTT_HOST", "host"),
            ("MQTT_PORT", "port"),
            ("MQTT_USERNAME", "user"),
            ("MQTT_PASSWORD", "pass"),
        ]
    }

    fn keys(&self) -> &'static [Key] {
        KEYS
    }

    /// Those of MQTT 5 with default settings; a connection tells those of its own settings.
    fn capabilities(&self) -> Capabilities {
        topology::capabilities(&MqttConfig::default())
    }

    fn check_address(&self, address: &polymq_core::Address) -> Result<()> {
        topology::check_address(address)
    }

    fn check(&self, settings: &Settings) -> Result<()> {
        let config = MqttConfig::parse(settings)?;
        #[cfg(feature = "tls")]
        if config.endpoint()?.tls {
            crate::wire::tls_config(&config)?;
        }
        drop(config);
        Ok(())
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        Ok(Arc::new(MqttConnection::connect(MqttConfig::parse(settings)?).await?))
    }
}
