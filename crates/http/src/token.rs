//! Bearer tokens: the one that senders show, and those that consumers ask for. A token of a file is read whenever it is
//! used, so that a rotated one is in the next request of every connection.

use std::path::{Path, PathBuf};

use http::HeaderValue;
use polymq_core::{Error, Result, Secret};

use crate::config::{HttpConfig, refuse};

/// What a sender shows.
#[derive(Debug)]
pub(crate) enum Shown {
    Nothing,
    Given(HeaderValue),
    Of(PathBuf),
}

impl Shown {
    /// Reads the file once, so that one that cannot be used is found at start.
    pub(crate) fn new(config: &HttpConfig) -> Result<Self> {
        let shown = match (&config.token, &config.token_file) {
            (Some(token), _) => Self::Given(bearer("token", token.expose())?),
            (None, Some(path)) => Self::Of(path.clone()),
            (None, None) => Self::Nothing,
        };
        shown.header()?;
        Ok(shown)
    }

    /// The header of one request.
    pub(crate) fn header(&self) -> Result<Option<HeaderValue>> {
        match self {
            Self::Nothing => Ok(None),
            Self::Given(value) => Ok(Some(value.clone())),
            Self::Of(path) => bearer("token_file", read("token_file", path)?.trim()).map(Some),
        }
    }
}

fn bearer(key: &str, token: &str) -> Result<HeaderValue> {
    let value = HeaderValue::from_str(&format!("Bearer {token}")).ok().filter(|_| !token.is_empty());
    let mut value = value.ok_or_else(|| refuse(format!("setting {key:?} is not valid, expected a token of ASCII")))?;
    value.set_sensitive(true);
    Ok(value)
}

/// What a consumer asks for.
#[derive(Debug)]
pub(crate) enum Asked {
    Nothing,
    Given(Secret),
    Of(PathBuf),
}

impl Asked {
    pub(crate) fn new(config: &HttpConfig) -> Result<Self> {
        Ok(match (&config.accept_token, &config.accept_token_file) {
            (Some(token), _) => Self::Given(token.clone()),
            (None, Some(path)) => {
                accepted(path)?;
                Self::Of(path.clone())
            }
            (None, None) => Self::Nothing,
        })
    }

    /// Whether a request with this header may come in.
    pub(crate) fn admits(&self, authorization: Option<&HeaderValue>) -> Result<bool> {
        let given = authorization.and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        Ok(match (self, given) {
            (Self::Nothing, _) => true,
            (_, None) => false,
            (Self::Given(token), Some(given)) => is_same(given, token.expose().as_bytes()),
            (Self::Of(path), Some(given)) => accepted(path)?.lines().any(|token| is_same(given, token.as_bytes())),
        })
    }
}

/// The tokens of a file, one a line; a file without any is a mistake, and nobody comes in meanwhile.
fn accepted(path: &Path) -> Result<String> {
    let text = read("accept_token_file", path)?;
    let tokens: Vec<&str> = text.lines().map(str::trim).filter(|token| !token.is_empty()).collect();
    if tokens.is_empty() {
        return Err(refuse("setting \"accept_token_file\" names a file that has no token in it, expected one a line"));
    }
    Ok(tokens.join("\n"))
}

fn read(key: &str, path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .map_err(|error| -> Error { refuse(format!("setting {key:?} names a file that cannot be read: {error}")) })
}

/// Compares without telling by its time where the difference is.
fn is_same(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |differs, (left, right)| differs | (left ^ right)) == 0
}
