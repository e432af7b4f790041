//! The settings of one backend, with where each came from.

use std::{collections::BTreeMap, fmt};

use serde::de::DeserializeOwned;

use super::{Environment, redact::redact_url, values};
use crate::{Backend, Error, ErrorKind, Result};

/// Where a setting came from; later variants win.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// A key of a configuration file.
    File(String),
    /// An environment variable of the ecosystem, such as `RMQ_HOST`.
    ForeignVariable(String),
    /// One of polymq's own environment variables.
    Variable(String),
    /// The query of the URL.
    Url,
    /// A call in the program.
    Code,
}

impl Origin {
    /// Whether what came from here gives way to what came from there; of equals the later one wins.
    #[must_use]
    pub fn is_weaker_than(&self, other: &Self) -> bool {
        std::mem::discriminant(self) != std::mem::discriminant(other) && self < other
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "in {path}"),
            Self::ForeignVariable(name) | Self::Variable(name) => write!(f, "in the variable {name}"),
            Self::Url => f.write_str("in the URL"),
            Self::Code => f.write_str("in code"),
        }
    }
}

/// Settings by name. A backend reads them with [`Settings::parse`].
#[derive(Clone, Default)]
pub struct Settings(BTreeMap<String, (String, Origin)>);

impl Settings {
    /// No settings: everything at its default.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Settings of a URL, and of its query.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the text is no URL.
    pub fn from_url(url: &str) -> Result<Self> {
        let mut settings = Self::new();
        settings.set_url(url, Origin::Code)?;
        Ok(settings)
    }

    /// Sets `key` in code; the query of a `url` sets its keys too, as with [`set_url`](Self::set_url).
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        let (key, value) = (key.into(), value.into());
        // What is no URL is kept as it is, for the backend to refuse.
        if key != "url" || self.set_url(&value, Origin::Code).is_err() {
            self.set(key, value, Origin::Code);
        }
        self
    }

    /// Sets `key`, unless a stronger origin has set it.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<String>, origin: Origin) {
        let key = key.into();
        if self.takes(&key, &origin) {
            self.0.insert(key, (value.into(), origin));
        }
    }

    /// Whether no stronger origin has set the key. Of equals the later one wins.
    fn takes(&self, key: &str, origin: &Origin) -> bool {
        !self.0.get(key).is_some_and(|(_, known)| origin.is_weaker_than(known))
    }

    /// Forgets what the query of a URL has said that another one takes the place of.
    fn forget_query(&mut self) {
        self.0.retain(|_, (_, origin)| *origin != Origin::Url);
    }

    /// Sets the key `url` and, from its query, the keys named there; neither when a stronger origin has set the URL. What the
    /// query of a URL said is gone with it.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the text is no URL.
    pub fn set_url(&mut self, text: &str, origin: Origin) -> Result<()> {
        let mut url = url::Url::parse(text).map_err(|error| {
            Error::new(ErrorKind::Config, format!("{:?} {origin} is no URL: {error}", redact_url(text)))
                .with_hint("write it as scheme://user:password@host:port")
        })?;
        if !self.takes("url", &origin) {
            return Ok(());
        }
        self.forget_query();
        let pairs: Vec<(String, String)> = url.query_pairs().map(|(key, value)| (key.into(), value.into())).collect();
        url.set_query(None);
        self.set("url", url.as_str(), origin);
        for (key, value) in pairs {
            self.set(key, value, Origin::Url);
        }
        Ok(())
    }

    /// Takes what the environment says about `backend`: `POLYMQ_<BACKEND>_<KEY>` and the ecosystem's own
    /// variables. Unknown variables with that prefix are kept, so that [`Settings::parse`] refuses them by name.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when `POLYMQ_<BACKEND>_URL` is no URL.
    pub fn read_environment(&mut self, backend: &dyn Backend, environment: &Environment) -> Result<()> {
        for (variable, key) in backend.foreign_variables() {
            if let Some(value) = environment.get(variable) {
                self.set_text(key, value, Origin::ForeignVariable((*variable).to_owned()))?;
            }
        }
        let prefix = format!("POLYMQ_{}_", backend.name().to_ascii_uppercase());
        for (variable, value) in environment.with_prefix(&prefix) {
            let key = variable[prefix.len()..].to_ascii_lowercase();
            self.set_text(&key, value, Origin::Variable(variable.to_owned()))?;
        }
        Ok(())
    }

    fn set_text(&mut self, key: &str, value: &str, origin: Origin) -> Result<()> {
        if key == "url" {
            return self.set_url(value, origin);
        }
        self.set(key, value, origin);
        Ok(())
    }

    /// The text of `key`.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(|(value, _)| value.as_str())
    }

    /// Where the value of `key` came from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Option<&Origin> {
        self.0.get(key).map(|(_, origin)| origin)
    }

    /// Adds what `other` says and this does not, or says more weakly.
    pub fn merge(&mut self, other: &Self) {
        let takes_url = other.0.get("url").is_some_and(|(_, origin)| self.takes("url", origin));
        if takes_url {
            self.forget_query();
        }
        for (key, (value, origin)) in other.0.iter().filter(|(_, (_, origin))| takes_url || *origin != Origin::Url) {
            self.set(key.clone(), value.clone(), origin.clone());
        }
    }

    /// Reads the settings into a backend's own struct. Give it `#[serde(default, deny_unknown_fields)]`:
    /// unknown keys are then errors that name the near ones.
    ///
    /// Booleans are `true/yes/on/1` and `false/no/off/0`; durations are read by [`duration`](super::duration)
    /// (`250ms`, `2s`, `5m`).
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming key, value (unless it is secret), expectation and origin.
    pub fn parse<T: DeserializeOwned>(&self, backend: &str) -> Result<T> {
        values::parse(self.0.iter().map(|(key, (value, origin))| (key.as_str(), value.as_str(), origin)), backend)
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Values may be secrets; names and origins are enough to debug with.
        f.debug_map().entries(self.0.iter().map(|(key, (_, origin))| (key, origin))).finish()
    }
}
