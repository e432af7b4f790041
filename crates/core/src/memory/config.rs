use std::sync::Arc;

use serde::Deserialize;

use super::{NAME, queue::UNIT};
use crate::{
    Backend, Capabilities, Delay, DeliveryCount, Error, ErrorKind, Key, Order, RedeliveryOrder, Registry, Result,
    Settings, Support,
};

pub(super) const KEYS: &[Key] = &[
    Key { name: "url", default: "memory://", help: "memory:// or memory://name for a space of its own" },
    Key { name: "capacity", default: "100000", help: "messages that a queue holds before senders wait" },
    Key { name: "capacity_bytes", default: "268435456", help: "bytes that a queue holds before senders wait" },
    Key { name: "max_payload", default: "16777216", help: "the largest body in bytes" },
    Key { name: "like", default: "", help: "a linked backend; what it cannot do or carry is refused here too" },
];

/// The settings of a connection.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Config {
    url: String,
    /// Too small, and a burst makes its senders wait; too large, and a stalled consumer costs that much memory.
    capacity: usize,
    capacity_bytes: usize,
    max_payload: usize,
    like: String,
    #[serde(skip)]
    space: String,
    /// What [`like`](Self::like) names.
    #[serde(skip)]
    model: Option<Arc<dyn Backend>>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            url: "memory://".into(),
            capacity: 100_000,
            capacity_bytes: 256 * 1024 * 1024,
            max_payload: 16 * 1024 * 1024,
            like: String::new(),
            space: String::new(),
            model: None,
        }
    }
}

/// What a queue may hold.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) messages: usize,
    /// In the units of [`UNIT`].
    pub(super) size: u64,
}

impl Config {
    pub(super) fn read(settings: &Settings) -> Result<Self> {
        let mut config: Self = settings.parse(NAME)?;
        for (name, value) in [("capacity", config.capacity), ("capacity_bytes", config.capacity_bytes)] {
            if value == 0 {
                return Err(refuse(format!("setting {name:?} is 0, a queue that holds nothing delivers nothing"))
                    .with_hint("set it to 1 or more"));
            }
        }
        config.space = space(&config.url)?;
        if !config.like.is_empty() {
            config.model = Some(Arc::clone(&*Registry::linked().backend(&config.like)?));
        }
        Ok(config)
    }

    pub(super) fn space(&self) -> &str {
        &self.space
    }

    pub(super) fn limits(&self) -> Limits {
        Limits { messages: self.capacity, size: self.capacity_bytes as u64 / UNIT }
    }

    /// What it stands for, if it is to be as strict as another backend.
    pub(super) fn model(&self) -> Option<&Arc<dyn Backend>> {
        self.model.as_ref()
    }

    pub(super) fn capabilities(&self) -> Capabilities {
        match &self.model {
            Some(model) => self.own_capabilities().limited_to(&model.capabilities()),
            None => self.own_capabilities(),
        }
    }

    fn own_capabilities(&self) -> Capabilities {
        Capabilities {
            queues: true,
            topics: true,
            kinds_apart: true,
            groups: true,
            order: Order::SingleConsumer,
            requeue: Support::Native,
            redelivery: RedeliveryOrder::Back,
            delayed_retry: Delay { support: Support::Native, max: None },
            delayed_send: Delay { support: Support::Native, max: None },
            delivery_count: DeliveryCount::Native,
            confirms: true,
            creates_channels: true,
            detects_unroutable: true,
            request_reply: true,
            expiry: Support::Emulated,
            max_payload: Some(self.max_payload),
            lookup: true,
            list: true,
            bindings: true,
            filter: Support::Emulated,
            peek: true,
            stats: true,
            purge: true,
            prefetch_bytes: true,
            ..Capabilities::default()
        }
    }
}

/// The name in `memory://name`; empty for the process's own.
fn space(text: &str) -> Result<String> {
    let expected = "expected memory:// or memory://name";
    let url = url::Url::parse(text).map_err(|error| refuse(format!("the URL is no URL ({error}), {expected}")))?;
    let plain = url.scheme() == NAME
        && url.username().is_empty()
        && url.password().is_none()
        && url.port().is_none()
        && matches!(url.path(), "" | "/")
        && url.fragment().is_none();
    if !plain {
        return Err(refuse(format!("{:?} is not a memory URL, {expected}", crate::config::redact_url(text))));
    }
    Ok(url.host_str().unwrap_or_default().to_owned())
}

#[cold]
fn refuse(sentence: String) -> Error {
    Error::new(ErrorKind::Config, sentence).with_backend(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_names_the_space() {
        for (url, name) in [("memory://", ""), ("memory:///", ""), ("memory://a-1", "a-1"), ("memory://A", "A")] {
            assert_eq!(Config::read(&Settings::from_url(url).unwrap()).unwrap().space(), name, "{url}");
        }
        for url in ["memory://a/b", "memory://user:secret@a", "memory://a:1", "amqp://a"] {
            let error = Config::read(&Settings::from_url(url).unwrap()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config, "{url}");
            assert!(!format!("{error:?}").contains("secret"));
        }
    }

    #[test]
    fn settings_are_checked() {
        let read = |key: &str, value: &str| Config::read(&Settings::new().with(key, value));
        assert_eq!(read("capacity", "0").unwrap_err().kind(), ErrorKind::Config);
        assert!(read("capacitty", "1").unwrap_err().to_string().contains("\"capacity\""));
        assert_eq!(read("capacity", "7").unwrap().limits().messages, 7);
    }

    #[test]
    fn documented_defaults_are_the_defaults() {
        let documented = KEYS.iter().fold(Settings::new(), |settings, key| settings.with(key.name, key.default));
        let (documented, default) = (Config::read(&documented).unwrap(), Config::read(&Settings::new()).unwrap());
        assert_eq!(format!("{documented:?}"), format!("{default:?}"));
    }
}
