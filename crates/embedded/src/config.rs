//! The settings of this backend.

use std::path::PathBuf;

use polymq_core::{Error, ErrorKind, Key, Result, Secret, Settings, config::percent_decoded};
use serde::Deserialize;

use crate::NAME;

/// Where the data are when nobody says so: in the present folder, where they are seen.
pub(crate) const DEFAULT_PATH: &str = "polymq-data";

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    Key { name: "url", default: "embedded://", help: "embedded:///path/to/folder; without a path, what path says" },
    Key { name: "path", default: DEFAULT_PATH, help: "the folder of the data, made when it is not there" },
    Key { name: "max_payload", default: "16777216", help: "largest body in bytes" },
];

/// Settings of the backend; [`KEYS`] explains each.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // KEYS says it once, for the command line and the docs too
pub struct EmbeddedConfig {
    pub url: Option<Secret>,
    pub path: PathBuf,
    pub max_payload: usize,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self { url: None, path: DEFAULT_PATH.into(), max_payload: 16 << 20 }
    }
}

impl EmbeddedConfig {
    /// Reads and checks settings; nothing is opened.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the key and the expectation.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let config: Self = settings.parse(NAME)?;
        if !(1..=100 << 20).contains(&config.max_payload) {
            return Err(invalid("setting \"max_payload\" is not valid, expected 1 to 104857600"));
        }
        config.folder()?;
        Ok(config)
    }

    /// The folder of the data: the URL's path where it has one.
    pub(crate) fn folder(&self) -> Result<PathBuf> {
        let expected = || {
            invalid("setting \"url\" is not valid, expected embedded:// or embedded:///path/to/folder")
                .with_hint("a path in the URL is an absolute one; set \"path\" for one from the present folder")
        };
        let Some(url) = &self.url else { return Ok(self.path.clone()) };
        let path = url.expose().strip_prefix("embedded://").ok_or_else(expected)?;
        let path = path.split(['?', '#']).next().unwrap_or_default();
        match path {
            "" => Ok(self.path.clone()),
            path if path.starts_with('/') && path.len() > 1 => {
                percent_decoded(path).map(PathBuf::from).ok_or_else(expected)
            }
            _ => Err(expected()),
        }
    }
}

fn invalid(sentence: &'static str) -> Error {
    Error::new(ErrorKind::Config, sentence).with_backend(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_folders() {
        let folder = |url: &str| Settings::from_url(url).and_then(|s| EmbeddedConfig::parse(&s)?.folder());
        assert_eq!(folder("embedded://").expect("good"), PathBuf::from("polymq-data"));
        assert_eq!(folder("embedded:///var/lib/shop%20a").expect("good"), PathBuf::from("/var/lib/shop a"));
        assert_eq!(folder("embedded:///a?max_payload=5").expect("good"), PathBuf::from("/a"));
        for url in ["embedded://here", "embedded:///", "embedded:///a?max_payload=0", "embedded:///a?pat=b"] {
            assert_eq!(folder(url).expect_err(url).kind(), ErrorKind::Config, "{url}");
        }
    }
}
