//! The settings of this backend.

use std::{path::PathBuf, time::Duration};

use http::Method;
use polymq_core::{Error, ErrorKind, Key, Result, Secret, Settings, config::duration};
use serde::Deserialize;
use url::Url;

use crate::{
    NAME,
    target::{Listen, Target},
};

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    key(
        "url",
        "http://localhost:8080",
        "where messages are sent: http:// or https://host:port/path; a queue's name follows",
    ),
    key(
        "listen",
        "host and port of the url",
        "where consumers listen: host:port or host:port/path; port 0 takes a free one",
    ),
    key("method", "POST", "the method of requests; consumers answer 405 to others"),
    key("content_type", "", "the content type of messages that have none"),
    key("endpoints", "", "base URLs, separated by commas: a topic is sent to each of them instead of to the url"),
    key(
        "token",
        "",
        "bearer token that is sent to url and endpoints, and to no other server; a login in a URL goes before it",
    ),
    key("token_file", "", "file of the token instead, read anew for each request: a rotated one is used at once"),
    key("accept_token", "", "bearer token that consumers ask of their senders; without it, anyone may send"),
    key("accept_token_file", "", "file of such tokens instead, one a line, read anew for each request"),
    key("connect_timeout", "10s", "bound of one attempt to connect"),
    key("header_timeout", "30s", "consumers: how long a request's headers may take; an idle connection ends after it"),
    key(
        "idle_timeout",
        "15s",
        "consumers: silence inside of a body that ends a request; senders: when an unused connection is closed",
    ),
    key("body_timeout", "2m", "how long a body may take in all, of a request or of an answer"),
    key("heartbeat", "10s", "HTTP/2: silence after which a peer is asked whether it lives; it has as long to answer"),
    key("max_payload", "16777216", "largest body in bytes; a larger one is answered with 413"),
    key("max_reply", "16777216", "largest body of an answer in bytes"),
    key("max_header_bytes", "65536", "most bytes of a request's headers; more are answered with 431"),
    key("max_buffered", "268435456", "most bytes of bodies that are held at a time; more are answered with 503"),
    key("max_requests", "1024", "most requests that are served at a time; more are answered with 503"),
    key(
        "busy_retry",
        "1s",
        "when a sender is told to come again that found no room, no consumer yet, or whose message was given back",
    ),
    key("drain_timeout", "5s", "how long closing waits for answers that are on their way"),
    key("http2", "auto", "senders: auto (by TLS), only (also without TLS), off; consumers take both"),
    key("allow_plaintext_remote", "false", "allow credentials without TLS to a host that is not this one"),
    key("tls_min", "1.2", "the oldest version of TLS that is spoken: 1.2 or 1.3"),
    key("ca_file", "", "PEM file of the authority that signed the server's certificate, besides the system's"),
    key("cert_file", "", "PEM file of this side's certificate: consumers listen with TLS, senders show it"),
    key("key_file", "", "PEM file of this side's key"),
    key("client_ca_file", "", "PEM file of the authority whose certificates consumers ask of their senders"),
];

const fn key(name: &'static str, default: &'static str, help: &'static str) -> Key {
    Key { name, default, help }
}

/// The settings of a connection. See [`KEYS`] for what each means.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // each is described in KEYS, once
pub struct HttpConfig {
    pub url: Option<Secret>,
    pub listen: Option<String>,
    pub method: String,
    pub content_type: Option<String>,
    pub endpoints: Secret,
    pub token: Option<Secret>,
    pub token_file: Option<PathBuf>,
    pub accept_token: Option<Secret>,
    pub accept_token_file: Option<PathBuf>,
    #[serde(with = "duration")]
    pub connect_timeout: Duration,
    #[serde(with = "duration")]
    pub header_timeout: Duration,
    #[serde(with = "duration")]
    pub idle_timeout: Duration,
    #[serde(with = "duration")]
    pub body_timeout: Duration,
    #[serde(with = "duration")]
    pub heartbeat: Duration,
    pub max_payload: usize,
    pub max_reply: usize,
    pub max_header_bytes: u32,
    pub max_buffered: usize,
    pub max_requests: usize,
    #[serde(with = "duration")]
    pub busy_retry: Duration,
    #[serde(with = "duration")]
    pub drain_timeout: Duration,
    pub http2: Http2,
    pub allow_plaintext_remote: bool,
    pub tls_min: TlsVersion,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub client_ca_file: Option<PathBuf>,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            url: None,
            listen: None,
            method: "POST".into(),
            content_type: None,
            endpoints: Secret::default(),
            token: None,
            token_file: None,
            accept_token: None,
            accept_token_file: None,
            connect_timeout: Duration::from_secs(10),
            // Longer than senders keep unused connections: the side that sends must be the one that closes, or a request
            // would now and then be written to a connection that is just being closed, and its outcome be unknown.
            header_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(120),
            heartbeat: Duration::from_secs(10),
            max_payload: 16 * 1024 * 1024,
            max_reply: 16 * 1024 * 1024,
            // Room for 16 KiB of user headers, percent-encoded.
            max_header_bytes: 64 * 1024,
            max_buffered: 256 * 1024 * 1024,
            max_requests: 1024,
            busy_retry: Duration::from_secs(1),
            drain_timeout: Duration::from_secs(5),
            http2: Http2::Auto,
            allow_plaintext_remote: false,
            tls_min: TlsVersion::V12,
            ca_file: None,
            cert_file: None,
            key_file: None,
            client_ca_file: None,
        }
    }
}

/// When senders speak HTTP/2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Http2 {
    /// When both sides agree on it (ALPN), which needs TLS.
    Auto,
    /// Always, without TLS too: the server must know.
    Only,
    /// Never.
    Off,
}

/// A version of TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum TlsVersion {
    /// TLS 1.2.
    #[serde(rename = "1.2")]
    V12,
    /// TLS 1.3.
    #[serde(rename = "1.3")]
    V13,
}

/// What is called a time-out may be as long as this: it is added to other times.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);
const SOME: &str = "expected more than nothing, and a year at most";

impl HttpConfig {
    /// Reads and checks settings; no connection is made.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the key and the expectation, [`ErrorKind::NotCompiledIn`] for `https` without
    /// the feature `tls`.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let config: Self = settings.parse(NAME)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let some = |duration: Duration| !duration.is_zero() && duration <= LONGEST;
        let given = |token: &Option<Secret>| token.as_ref().is_none_or(|token| !token.expose().trim().is_empty());
        let rules: [(&str, bool, &str); 17] = [
            ("connect_timeout", some(self.connect_timeout), SOME),
            ("header_timeout", some(self.header_timeout), SOME),
            ("idle_timeout", some(self.idle_timeout), SOME),
            ("body_timeout", some(self.body_timeout), SOME),
            ("heartbeat", some(self.heartbeat), SOME),
            ("max_payload", self.max_payload > 0, "expected more than nothing"),
            ("max_header_bytes", self.max_header_bytes >= 8192, "expected at least 8192"),
            ("max_buffered", self.max_buffered >= self.max_payload, "expected at least max_payload"),
            ("max_requests", (1..=1 << 20).contains(&self.max_requests), "expected 1 to 1048576"),
            ("method", method(&self.method).is_ok(), "expected an HTTP method such as POST, PUT or GET"),
            ("token", given(&self.token), "expected a token; leave the setting out to send none"),
            ("accept_token", given(&self.accept_token), "expected a token; leave the setting out to let anyone in"),
            ("token_file", self.token_file.is_none() || self.token.is_none(), "expected without token"),
            (
                "accept_token_file",
                self.accept_token_file.is_none() || self.accept_token.is_none(),
                "expected without accept_token",
            ),
            ("key_file", self.key_file.is_some() == self.cert_file.is_some(), "expected together with cert_file"),
            ("client_ca_file", self.client_ca_file.is_none() || self.cert_file.is_some(), "expected with cert_file"),
            ("cert_file", self.cert_file.is_none() || cfg!(feature = "tls"), "expected the feature \"tls\""),
        ];
        if let Some((key, _, expected)) = rules.iter().find(|(_, holds, _)| !holds) {
            return Err(refuse(format!("setting {key:?} is not valid, {expected}")));
        }
        self.target()?;
        self.topic_targets()?;
        if self.listen.is_some() {
            self.listen()?;
        }
        Ok(())
    }

    /// Where messages go.
    pub(crate) fn target(&self) -> Result<Target> {
        Target::parse(self.url.as_ref().map_or("http://localhost:8080", Secret::expose), self)
    }

    /// Where the messages of topics go.
    pub(crate) fn topic_targets(&self) -> Result<Vec<Target>> {
        let listed = self.endpoints.expose();
        if listed.trim().is_empty() {
            return Ok(vec![self.target()?]);
        }
        listed.split(',').map(|text| Target::parse(text.trim(), self)).collect()
    }

    /// Whether requests to this URL show the token: to the servers that the settings name, where the URL has no login of
    /// its own. Other places are told by options of a channel and may be anybody's.
    pub(crate) fn shows_token_to(&self, url: &Url) -> Result<bool> {
        let has_login = !url.username().is_empty() || url.password().is_some();
        if has_login || !self.has_token() {
            return Ok(false);
        }
        let known = std::iter::once(self.target()?).chain(self.topic_targets()?);
        Ok(known.into_iter().any(|target| target.url().origin() == url.origin()))
    }

    pub(crate) fn has_token(&self) -> bool {
        self.token.is_some() || self.token_file.is_some()
    }

    /// Where consumers listen.
    pub(crate) fn listen(&self) -> Result<Listen> {
        match &self.listen {
            Some(text) => Listen::parse(text),
            None => Ok(self.target()?.listen()),
        }
    }
}

pub(crate) fn method(text: &str) -> Result<Method> {
    let known = [Method::POST, Method::PUT, Method::PATCH, Method::GET, Method::DELETE];
    known
        .into_iter()
        .find(|method| method.as_str().eq_ignore_ascii_case(text))
        .ok_or_else(|| refuse(format!("{text:?} is no method for messages, expected POST, PUT, PATCH, GET or DELETE")))
}

#[cold]
pub(crate) fn refuse(sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, sentence).with_backend(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sentence(url: &str) -> String {
        let parsed = Settings::from_url(url).and_then(|settings| HttpConfig::parse(&settings));
        parsed.map_or_else(|error| error.to_string(), |_| "accepted".into())
    }

    #[test]
    fn wrong_settings_are_refused_by_name() {
        for (url, expected) in [
            ("http://localhost?max_payload=0", "\"max_payload\" is not valid"),
            ("http://localhost?method=SHOUT", "\"method\" is not valid"),
            ("http://localhost?http2=maybe", "auto, only, off"),
            ("http://localhost?idle_timeout=5", "duration with its unit"),
            ("http://localhost?lissten=x", "did you mean \"listen\"?"),
            ("http://localhost?listen=nowhere", "expected host:port"),
            ("http://localhost?endpoints=ftp://x", "expected http:// or https://"),
            ("http://localhost?cert_file=a.pem", "\"key_file\" is not valid"),
            ("http://localhost?token=", "\"token\" is not valid"),
            ("http://localhost?accept_token=", "\"accept_token\" is not valid"),
            ("http://localhost?accept_token=%20", "\"accept_token\" is not valid"),
            ("http://localhost?token=a&token_file=b", "\"token_file\" is not valid"),
            ("http://localhost?accept_token=a&accept_token_file=b", "\"accept_token_file\" is not valid"),
            ("http://localhost?max_buffered=1", "\"max_buffered\" is not valid"),
            ("http://localhost?body_timeout=500000000000years", "\"body_timeout\" is not valid"),
        ] {
            let text = sentence(url);
            assert!(text.contains(expected), "{url}: {text}");
        }
        assert_eq!(sentence("http://localhost/base?method=put&http2=only&listen=[::1]:0/in"), "accepted");
    }

    #[test]
    fn j6_credentials_need_encryption_unless_they_stay_here() {
        for url in [
            "http://me:s3cret@example.org",
            "http://s3cret@example.org",
            "http://:s3cret@example.org",
            "http://example.org?token=s3cret",
            "http://example.org?token_file=s3cret",
        ] {
            let text = sentence(url);
            assert!(text.contains("clear text") && !text.contains("s3cret"), "{text}");
            let separator = if url.contains('?') { '&' } else { '?' };
            assert_eq!(sentence(&format!("{url}{separator}allow_plaintext_remote=true")), "accepted");
        }
        assert_eq!(sentence("http://me:s3cret@127.0.0.1:1"), "accepted");
        assert_eq!(sentence("http://example.org"), "accepted");
        #[cfg(feature = "tls")]
        assert_eq!(sentence("https://me:s3cret@example.org"), "accepted");
    }

    #[test]
    fn secrets_are_not_shown() {
        let settings =
            Settings::from_url("http://me:s3cret@localhost?token=s3cret&accept_token=s3cret").expect("a URL");
        assert!(!format!("{:?}", HttpConfig::parse(&settings).expect("valid")).contains("s3cret"));
    }

    #[test]
    fn documented_defaults_are_the_defaults() {
        // What has none, or depends on another, says so in words.
        let texts = KEYS.iter().filter(|key| !key.default.is_empty() && key.name != "listen");
        let documented = texts.fold(Settings::new(), |settings, key| settings.with(key.name, key.default));
        let documented = HttpConfig::parse(&documented).expect("valid");
        let (url, default) = (documented.url.clone(), HttpConfig::default());
        assert_eq!(documented.target().expect("a URL").url(), default.target().expect("a URL").url());
        assert_eq!(format!("{documented:?}"), format!("{:?}", HttpConfig { url, ..default }));
    }

    #[test]
    fn every_key_is_a_setting_and_every_setting_a_key() {
        // An unknown name makes serde list the known ones.
        let error = Settings::new().with("zzzzzzzzzzzz", "").parse::<HttpConfig>(NAME).expect_err("unknown");
        let listed = error.message().split("known: ").nth(1).unwrap_or_default().replace(" in code", "");
        assert_eq!(listed.split(", ").collect::<Vec<_>>(), KEYS.iter().map(|key| key.name).collect::<Vec<_>>());
    }
}
