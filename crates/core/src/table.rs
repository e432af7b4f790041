//! The queue table: which backend each queue comes in over and goes out over, in a file.

use std::{collections::BTreeMap, fmt, path::Path};

use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind, Registry, Result, Settings, config::Origin};

/// The queue table of a file, in TOML or JSON.
///
/// ```toml
/// [queues.orders]
/// consumer = "amqp"
/// producer = "mqtt"
///
/// [backends.amqp]
/// url = "amqp://localhost"
/// heartbeat = "5s"
/// ```
///
/// JSON files may also have the older shape, an object of queues without `queues` around it, where `consumer_loop`
/// stands for `consumer`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueTable {
    /// Queues by the name that the program uses.
    pub queues: BTreeMap<String, QueueEntry>,
    /// Settings of backends, by their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub backends: BTreeMap<String, BTreeMap<String, Scalar>>,
}

/// One queue of the table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueEntry {
    /// The name on the brokers; the name in the table without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The backend that it is consumed from.
    #[serde(alias = "consumer_loop")]
    pub consumer: String,
    /// The backend that it is produced to.
    pub producer: String,
}

/// A setting in a file: a text, number or truth value.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Number(i64),
    /// Anything else, such as `"250ms"`.
    Text(String),
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => fmt::Display::fmt(value, f),
            Self::Number(value) => fmt::Display::fmt(value, f),
            Self::Text(value) => f.write_str(value),
        }
    }
}

impl fmt::Debug for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl QueueTable {
    /// Reads a file; its name's ending decides between TOML and JSON.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the file, the place and what was expected.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| problem(path, &error).with_source(error))?;
        if path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("json")) {
            Self::from_json(&text).map_err(|error| problem(path, &error))
        } else {
            Self::from_toml(&text).map_err(|error| problem(path, &error))
        }
    }

    /// Reads TOML.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with the place and what was expected.
    pub fn from_toml(text: &str) -> Result<Self> {
        // The message alone: the whole error would quote the line, which may hold a password.
        toml::from_str(text).map_err(|error| Error::new(ErrorKind::Config, without_values(error.message())))
    }

    /// Reads JSON, in this shape or the older one.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with the place and what was expected.
    pub fn from_json(text: &str) -> Result<Self> {
        let config = |error: serde_json::Error| Error::new(ErrorKind::Config, without_values(&error.to_string()));
        let value: serde_json::Value = serde_json::from_str(text).map_err(config)?;
        if value.get("queues").is_some() {
            return serde_json::from_value(value).map_err(config);
        }
        let queues = serde_json::from_value(value).map_err(config)?;
        Ok(Self { queues, backends: BTreeMap::new() })
    }

    /// Checks every name against the registry.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownBackend`] and [`ErrorKind::NotCompiledIn`] naming queue and backend.
    pub fn check(&self, registry: &Registry) -> Result<()> {
        for (queue, entry) in &self.queues {
            for backend in [&entry.consumer, &entry.producer] {
                registry.backend(backend).map_err(|error| error.with_channel(queue.clone()))?;
            }
        }
        for backend in self.backends.keys() {
            registry.backend(backend)?;
        }
        Ok(())
    }

    /// The same with each backend's section under the backend's own name, as [`settings`](Self::settings) looks for it.
    pub(crate) fn with_own_names(mut self, registry: &Registry) -> Result<Self> {
        let mut backends = BTreeMap::new();
        for (name, keys) in std::mem::take(&mut self.backends) {
            let own = registry.backend(&name)?.name();
            if backends.insert(own.to_owned(), keys).is_some() {
                let sentence = format!("the table has two sections of the backend {own}, one of them as {name:?}");
                return Err(Error::new(ErrorKind::Config, sentence).with_hint("write one"));
            }
        }
        self.backends = backends;
        Ok(self)
    }

    /// The settings that the file has for a backend.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when its `url` is none.
    pub fn settings(&self, backend: &str, file: &str) -> Result<Settings> {
        let mut settings = Settings::new();
        for (key, value) in self.backends.get(backend).into_iter().flatten() {
            let origin = Origin::File(file.to_owned());
            match key.as_str() {
                "url" => settings.set_url(&value.to_string(), origin)?,
                _ => settings.set(key.clone(), value.to_string(), origin),
            }
        }
        Ok(settings)
    }
}

/// What a parser says of a text where it expected something else quotes the text, which may hold a password.
fn without_values(said: &str) -> String {
    const QUOTED: &str = "string \"";
    match (said.find(QUOTED), said.rfind("\", expected")) {
        (Some(at), Some(end)) if at + QUOTED.len() <= end => {
            format!("{}***{}", &said[..at + QUOTED.len()], &said[end..])
        }
        _ => said.to_owned(),
    }
}

#[cold]
fn problem(path: &Path, what: &dyn fmt::Display) -> Error {
    Error::new(ErrorKind::Config, format!("the queue table {} cannot be read: {what}", path.display()))
}
