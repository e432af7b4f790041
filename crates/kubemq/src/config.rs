//! The settings of this backend, and the place that they lead to.

use std::{path::PathBuf, time::Duration};

use polymq_core::{
    Error, ErrorKind, Key, Result, Secret, Settings,
    config::{duration, is_loopback, percent_decoded},
};
use serde::Deserialize;
use url::Url;

use crate::{NAME, error::config};

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    key("url", "kubemq://localhost:50000", "where the broker is: kubemq:// or kubemqs://:TOKEN@host:port"),
    key("address", "localhost:50000", "host and port, where the URL names none"),
    key("token", "", "the token, where the URL names none"),
    key("token_file", "", "a file with the token, read again for every call, so that it may be rotated"),
    key("client_id", "polymq-<random>", "what this client calls itself; the broker's rules may go by it"),
    key(
        "heartbeat",
        "10s",
        "asks whether the broker is there after this long without any answer, and waits as long for it",
    ),
    key("connect_timeout", "10s", "bound of one attempt to connect, and of a declaration"),
    key("request_timeout", "30s", "bound of one request, besides the time that a poll waits"),
    key("connect_retry", "false", "keep trying when the very first attempt to connect fails"),
    key("reconnect_initial", "200ms", "wait before an attempt to reconnect; doubles, with jitter"),
    key("reconnect_max", "15s", "longest wait between attempts to reconnect"),
    key("reconnect_limit", "0", "give up after this many failed attempts in a row; 0 never gives up"),
    key("poll_wait", "1s", "how long one poll of an empty queue waits, 100ms to 1h; some brokers answer no sooner"),
    key("topics", "store", "store keeps topics (events store); events does not: at most once, with wildcards"),
    key("declare", "auto", "auto makes what is missing, passive only checks that it is there"),
    key("max_payload", "4128768", "largest body in bytes; some brokers take more than 4 MiB with everything"),
    key("ca_file", "", "PEM file of authorities to trust besides the system's"),
    key("cert_file", "", "PEM file of this client's certificate"),
    key("key_file", "", "PEM file of this client's key"),
    key("server_name", "the host", "the name in the broker's certificate, where it is not the host"),
    key("allow_plaintext_remote", "false", "allow a token without TLS to a host that is not this one"),
];

const fn key(name: &'static str, default: &'static str, help: &'static str) -> Key {
    Key { name, default, help }
}

/// Settings of the backend; [`KEYS`] explains each.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // KEYS says it once, for the command line and the docs too
pub struct KubeMqConfig {
    pub url: Option<Secret>,
    pub address: Option<String>,
    pub token: Option<Secret>,
    pub token_file: Option<PathBuf>,
    pub client_id: Option<String>,
    #[serde(with = "duration")]
    pub heartbeat: Duration,
    #[serde(with = "duration")]
    pub connect_timeout: Duration,
    #[serde(with = "duration")]
    pub request_timeout: Duration,
    pub connect_retry: bool,
    #[serde(with = "duration")]
    pub reconnect_initial: Duration,
    #[serde(with = "duration")]
    pub reconnect_max: Duration,
    pub reconnect_limit: u32,
    #[serde(with = "duration")]
    pub poll_wait: Duration,
    pub topics: Topics,
    pub declare: Declare,
    pub max_payload: usize,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub server_name: Option<String>,
    pub allow_plaintext_remote: bool,
}

impl Default for KubeMqConfig {
    fn default() -> Self {
        Self {
            url: None,
            address: None,
            token: None,
            token_file: None,
            client_id: None,
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            connect_retry: false,
            reconnect_initial: Duration::from_millis(200),
            reconnect_max: Duration::from_secs(15),
            reconnect_limit: 0,
            poll_wait: Duration::from_secs(1),
            topics: Topics::Store,
            declare: Declare::Auto,
            // 64 KiB of 4 MiB are for attributes.
            max_payload: (4 << 20) - (64 << 10),
            ca_file: None,
            cert_file: None,
            key_file: None,
            server_name: None,
            allow_plaintext_remote: false,
        }
    }
}

/// What carries topics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Topics {
    /// Events Store: kept, with groups that miss nothing.
    Store,
    /// Events: delivered to who is there, at most once, with wildcards.
    Events,
}

/// What is done about channels that do not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Declare {
    /// They are made.
    Auto,
    /// They are an error.
    Passive,
}

impl KubeMqConfig {
    /// Reads and checks settings; no connection is made.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the key and the expectation, [`ErrorKind::NotCompiledIn`] for `kubemqs` without the
    /// feature `tls`.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let config: Self = settings.parse(NAME)?;
        config.check()?;
        Ok(config)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let second = Duration::from_secs(1);
        let rules: [(&str, bool, &str); 9] = [
            ("heartbeat", !self.heartbeat.is_zero(), "expected more than nothing"),
            ("connect_timeout", !self.connect_timeout.is_zero(), "expected more than nothing"),
            ("request_timeout", !self.request_timeout.is_zero(), "expected more than nothing"),
            ("reconnect_initial", !self.reconnect_initial.is_zero(), "expected more than nothing"),
            ("reconnect_max", self.reconnect_max >= self.reconnect_initial, "expected at least reconnect_initial"),
            ("poll_wait", (second / 10..=second * 3600).contains(&self.poll_wait), "expected 100ms to 1h"),
            ("max_payload", (1..=100 << 20).contains(&self.max_payload), "expected 1 to 104857600"),
            ("client_id", self.client_id.as_ref().is_none_or(|id| !id.is_empty()), "expected a name"),
            ("key_file", self.key_file.is_some() == self.cert_file.is_some(), "expected together with cert_file"),
        ];
        if let Some((key, _, expected)) = rules.iter().find(|(_, holds, _)| !holds) {
            return Err(config(format!("setting {key:?} is not valid, {expected}")));
        }
        let place = self.place()?;
        let of_tls = [
            ("ca_file", self.ca_file.is_some()),
            ("cert_file", self.cert_file.is_some()),
            ("server_name", self.server_name.is_some()),
        ];
        match of_tls.iter().find(|(_, set)| *set) {
            Some((key, _)) if !place.tls => {
                Err(config(format!("setting {key:?} has no effect without TLS")).with_hint("use a kubemqs:// URL"))
            }
            _ => Ok(()),
        }
    }

    /// Where these settings lead.
    pub(crate) fn place(&self) -> Result<Place> {
        let mut place = Place { tls: false, host: String::new(), port: None, token: self.token.clone() };
        if let Some(address) = &self.address {
            place.read_address(address)?;
        }
        if let Some(url) = &self.url {
            place.read_url(url.expose())?;
        }
        if let Some(path) = &self.token_file {
            if place.token.is_some() {
                return Err(config("a token and \"token_file\"").with_hint("give one of them"));
            }
            place.token = Some(Secret::read("token_file", path).map_err(|error| error.with_backend(NAME))?);
        }
        place.check(self.allow_plaintext_remote)?;
        Ok(place)
    }
}

/// A broker and a token.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) tls: bool,
    host: String,
    port: Option<u16>,
    pub(crate) token: Option<Secret>,
}

impl Place {
    /// As `KUBEMQ_ADDRESS` has it.
    fn read_address(&mut self, text: &str) -> Result<()> {
        let invalid = || config(format!("setting \"address\" is {text:?}, expected host:port"));
        let url = Url::parse(&format!("kubemq://{text}")).map_err(|_| invalid())?;
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(invalid)?;
        if !url.username().is_empty() || !matches!(url.path(), "" | "/") {
            return Err(invalid());
        }
        (self.host, self.port) = (host.to_owned(), url.port());
        Ok(())
    }

    /// What the URL says is stronger than the keys, which fill what it leaves out.
    fn read_url(&mut self, text: &str) -> Result<()> {
        let invalid = || {
            config("setting \"url\" is not valid, expected kubemq:// or kubemqs://:TOKEN@host:port")
                .with_hint("write special characters in the token as %XX")
        };
        let url = Url::parse(text).map_err(|_| invalid())?;
        if !matches!(url.path(), "" | "/") {
            return Err(invalid());
        }
        self.tls = url.scheme() == "kubemqs";
        if let Some(host) = url.host_str().filter(|host| !host.is_empty()) {
            (self.host, self.port) = (host.to_owned(), url.port());
        }
        let token = url.password().or_else(|| Some(url.username()).filter(|user| !user.is_empty()));
        if let Some(token) = token {
            self.token = Some(Secret::new(percent_decoded(token).ok_or_else(invalid)?));
        }
        Ok(())
    }

    fn check(&self, allow_plaintext_remote: bool) -> Result<()> {
        if self.tls && !cfg!(feature = "tls") {
            return Err(Error::new(ErrorKind::NotCompiledIn, "kubemqs needs TLS, which is not compiled in")
                .with_backend(NAME)
                .with_hint("add the feature \"tls\" of polymq-kubemq"));
        }
        if self.token.is_some() && !self.tls && !allow_plaintext_remote && !is_loopback(self.host()) {
            return Err(config(format!("the token would travel in clear text to {:?}", self.host()))
                .with_hint("use a kubemqs:// URL, or set allow_plaintext_remote=true for a network that you trust"));
        }
        Ok(())
    }

    pub(crate) fn host(&self) -> &str {
        if self.host.is_empty() { "localhost" } else { &self.host }
    }

    /// As the client library wants it.
    pub(crate) fn uri(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}:{}", self.host(), self.port.unwrap_or(50_000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str, more: &[(&str, &str)]) -> Result<KubeMqConfig> {
        let settings = Settings::from_url(url)?;
        KubeMqConfig::parse(&more.iter().fold(settings, |settings, (key, value)| settings.with(*key, *value)))
    }

    #[test]
    fn urls_lead_to_places() {
        for (url, uri, token) in [
            ("kubemq://", "http://localhost:50000", None),
            ("kubemq://broker", "http://broker:50000", None),
            ("kubemq://127.0.0.1:7", "http://127.0.0.1:7", None),
            ("kubemq://[::1]:7", "http://[::1]:7", None),
            ("kubemqs://:a%2Fb@broker:7", "https://broker:7", Some("a/b")),
            ("kubemq://tok@localhost", "http://localhost:50000", Some("tok")),
        ] {
            let place = parsed(url, &[]).and_then(|config| config.place()).expect(url);
            assert_eq!((place.uri().as_str(), place.token.as_ref().map(Secret::expose)), (uri, token), "{url}");
        }
        let place = parsed("kubemq://", &[("address", "there:1")]).and_then(|config| config.place()).expect("good");
        assert_eq!(place.uri(), "http://there:1");
    }

    #[test]
    fn what_is_not_valid_is_refused_without_its_secret() {
        for (url, more, part) in [
            ("kubemq://broker/path", &[][..], "kubemq://"),
            ("kubemq://:geheim@broker", &[], "clear text"),
            ("kubemq://", &[("poll_wait", "0s")], "poll_wait"),
            ("kubemq://", &[("ca_file", "/x")], "without TLS"),
            ("kubemqs://", &[("cert_file", "/x")], "together with cert_file"),
            ("kubemq://", &[("topics", "stored")], "topics"),
            ("kubemq://", &[("tokn", "x")], "token"),
            ("kubemq://", &[("address", "a/b")], "host:port"),
        ] {
            let error = parsed(url, more).expect_err(url);
            let shown = format!("{error} {error:?}");
            assert!(shown.contains(part) && !shown.contains("geheim"), "{shown}");
        }
    }
}
