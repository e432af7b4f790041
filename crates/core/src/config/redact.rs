//! Keeps secrets out of logs, errors and debug output, in one place.

use std::{fmt, path::Path};

use serde::Deserialize;

use crate::{Error, ErrorKind, Result};

/// A text that is never printed.
#[derive(Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    #[must_use]
    pub fn new(secret: impl Into<String>) -> Self {
        Self(secret.into())
    }

    /// Reads a secret from the file that a setting names, without the line end behind it. Settings that name a file of a
    /// secret are read again at every connect at least, so that a secret that is rotated there reaches the next connection.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the setting and the file.
    pub fn read(setting: &str, path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            Error::new(ErrorKind::Config, format!("setting {setting:?}: {path:?} cannot be read: {error}"))
                .with_hint("give the path of a file that holds nothing else and that this process may read")
        })?;
        Ok(Self(text.trim_end_matches(['\r', '\n']).to_owned()))
    }

    /// The secret itself, for the one place that hands it to the client library.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Whether what has this name looks like a secret.
pub(super) fn is_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    ["pass", "secret", "token", "key"].iter().any(|word| key.contains(word))
}

/// The URL with its password, and the values of secret-looking query keys, replaced by `***`. A user without a password may be a token,
/// and is replaced too.
///
/// Of text that is no URL, so that a mistyped one does not leak either, only what stands behind the last `@` and before a
/// query is shown.
#[must_use]
pub fn redact_url(text: &str) -> String {
    // `me:secret@host` parses too, as a URL of the scheme `me` without a host.
    let parsed = url::Url::parse(text).ok().filter(|url| !url.cannot_be_a_base());
    let Some(mut url) = parsed else {
        let (start, rest) = text.split_at(text.find(['?', '#']).unwrap_or(text.len()));
        return match (start.rsplit_once('@'), rest) {
            // A password may hold either mark.
            (_, rest) if rest.contains('@') => "***".into(),
            (Some((_, host)), "") => format!("***@{host}"),
            (Some((_, host)), _) => format!("***@{host}?***"),
            (None, "") => text.to_owned(),
            (None, _) => format!("{start}?***"),
        };
    };
    let hidden = match (url.username(), url.password()) {
        (_, Some(_)) => url.set_password(Some("***")),
        ("", None) => Ok(()),
        _ => url.set_username("***"),
    };
    if hidden.is_err() {
        return "***".into();
    }
    if url.query().is_some() {
        let pairs: Vec<(String, String)> = url
            .query_pairs()
            .map(|(key, value)| (key.to_string(), if is_secret(&key) { "***".into() } else { value.to_string() }))
            .collect();
        url.query_pairs_mut().clear().extend_pairs(pairs);
    }
    url.into()
}
