//! The settings of this backend, and the place that they lead to.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use polymq_core::{Key, Result, Secret, Settings, config::duration};
use serde::Deserialize;
use url::Url;

use crate::{NAME, error::config};

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    key(
        "url",
        "sqs://",
        "sqs:// alone is AWS; sqs://KEY:SECRET@host:port is a server of your own, sqss:// the same with TLS",
    ),
    key("endpoint", "", "where SQS and SNS are, as http:// or https://, instead of what the region says"),
    key("region", "that of the AWS configuration", "the region; us-east-1 for a server of your own"),
    key("access_key_id", "", "the access key, where the URL names none; without any, the AWS credential chain"),
    key("secret_access_key", "", "its secret"),
    key("session_token", "", "its session token"),
    key("profile", "", "the profile of the AWS configuration files"),
    key(
        "credentials_file",
        "",
        "the AWS credentials file, instead of ~/.aws/credentials; read again when SQS refuses what it said",
    ),
    key("ca_file", "", "PEM file of authorities to trust besides the system's"),
    key(
        "heartbeat",
        "10s",
        "asks whether the service is there after this long without any answer, and waits as long for it",
    ),
    key("connect_timeout", "10s", "bound of connecting, and of a declaration"),
    key("request_timeout", "30s", "bound of one request, besides the time that a long poll waits"),
    key("connect_retry", "false", "keep trying when the very first attempt to connect fails"),
    key("reconnect_initial", "200ms", "wait before an attempt to reconnect; doubles, with jitter"),
    key("reconnect_max", "15s", "longest wait between attempts to reconnect"),
    key("reconnect_limit", "0", "give up after this many failed attempts in a row; 0 never gives up"),
    key(
        "poll_wait",
        "20s",
        "how long one poll of an empty queue waits; 0s to 20s, 0s polls five times a second. Closing waits for it, 5 s at most",
    ),
    key("polls", "8", "the most polls of one consumer at a time; that many only while the queue is full"),
    key("requests", "8", "the most send requests of one producer at a time; more than one only for full batches"),
    key(
        "fifo",
        "false",
        "every queue and topic is a FIFO one, with .fifo after its name: order by key, no delayed sends",
    ),
    key("declare", "auto", "auto makes what is missing, passive only checks that it is there"),
    key(
        "max_payload",
        "737280",
        "largest body in bytes; SQS takes 1 MiB with attributes, and a binary body grows by a third",
    ),
    key("max_message", "1048576", "largest message in bytes, attributes included, and largest batch"),
    key("max_topic_message", "262144", "the same for topics"),
    key("lease_cap", "1h", "how long a message is held at most; at most 12h"),
    key("redrive", "0", "deliveries after which SQS itself moves a message to the dead letters; 0 leaves it to polymq"),
    key(
        "raw_delivery",
        "true",
        "topics deliver bodies as they are; false wraps them in SNS's JSON, which is read as well",
    ),
    key("allow_plaintext_remote", "false", "allow credentials without TLS to a host that is not this one"),
];

const fn key(name: &'static str, default: &'static str, help: &'static str) -> Key {
    Key { name, default, help }
}

/// Settings of the backend; [`KEYS`] explains each.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // KEYS says it once, for the command line and the docs too
pub struct SqsConfig {
    pub url: Option<Secret>,
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<Secret>,
    pub session_token: Option<Secret>,
    pub profile: Option<String>,
    pub credentials_file: Option<PathBuf>,
    pub ca_file: Option<PathBuf>,
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
    pub polls: usize,
    pub requests: usize,
    pub fifo: bool,
    pub declare: Declare,
    pub max_payload: usize,
    pub max_message: usize,
    pub max_topic_message: usize,
    #[serde(with = "duration")]
    pub lease_cap: Duration,
    pub redrive: u32,
    pub raw_delivery: bool,
    pub allow_plaintext_remote: bool,
}

impl Default for SqsConfig {
    fn default() -> Self {
        Self {
            url: None,
            endpoint: None,
            region: None,
            access_key_id: None,
            secret_access_key: None,
            session_token: None,
            profile: None,
            credentials_file: None,
            ca_file: None,
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            connect_retry: false,
            reconnect_initial: Duration::from_millis(200),
            reconnect_max: Duration::from_secs(15),
            reconnect_limit: 0,
            poll_wait: Duration::from_secs(20),
            polls: 8,
            requests: 8,
            fifo: false,
            declare: Declare::Auto,
            // Four thirds of it are 960 KiB, which leaves 64 KiB for attributes.
            max_payload: 720 * 1024,
            max_message: 1024 * 1024,
            max_topic_message: 256 * 1024,
            lease_cap: Duration::from_secs(3600),
            redrive: 0,
            raw_delivery: true,
            allow_plaintext_remote: false,
        }
    }
}

/// What is done about queues and topics that do not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Declare {
    /// They are made.
    Auto,
    /// They are an error.
    Passive,
}

/// The longest loan of a message, from SQS's own documents.
pub(crate) const MAX_VISIBILITY: Duration = Duration::from_secs(12 * 3600);

impl SqsConfig {
    /// Reads and checks settings; no connection is made.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](polymq_core::ErrorKind::Config) naming the key and the expectation.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let config: Self = settings.parse(NAME)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let rules: [(&str, bool, &str); 11] = [
            ("heartbeat", !self.heartbeat.is_zero(), "expected more than nothing"),
            ("connect_timeout", !self.connect_timeout.is_zero(), "expected more than nothing"),
            ("request_timeout", !self.request_timeout.is_zero(), "expected more than nothing"),
            ("reconnect_initial", !self.reconnect_initial.is_zero(), "expected more than nothing"),
            ("reconnect_max", self.reconnect_max >= self.reconnect_initial, "expected at least reconnect_initial"),
            ("poll_wait", self.poll_wait <= Duration::from_secs(20), "expected 0s to 20s"),
            ("polls", (1..=64).contains(&self.polls), "expected 1 to 64"),
            ("requests", (1..=64).contains(&self.requests), "expected 1 to 64"),
            ("max_payload", (1..=self.max_message).contains(&self.max_payload), "expected 1 to max_message"),
            ("lease_cap", (1..=43_200).contains(&self.lease_cap.as_secs()), "expected 1s to 12h"),
            ("redrive", self.redrive <= 1000, "expected 0 to 1000"),
        ];
        if let Some((key, _, expected)) = rules.iter().find(|(_, holds, _)| !holds) {
            return Err(config(format!("setting {key:?} is not valid, {expected}")));
        }
        self.place().map(drop)
    }

    /// Where these settings lead, and as whom.
    pub(crate) fn place(&self) -> Result<Place> {
        let mut place = Place {
            endpoint: self.endpoint.clone(),
            key: self.access_key_id.clone(),
            secret: self.secret_access_key.clone(),
        };
        if let Some(url) = &self.url {
            place.read(url.expose())?;
        }
        if place.key.is_some() != place.secret.is_some() {
            return Err(config("an access key without its secret, or a secret without its key")
                .with_hint("set access_key_id and secret_access_key, or write sqs://KEY:SECRET@host:port"));
        }
        place.check(self.allow_plaintext_remote)?;
        Ok(place)
    }

    /// Whether looking again may find other credentials: not where the settings name them.
    pub(crate) fn may_renew(&self) -> bool {
        self.place().is_ok_and(|place| place.key.is_none())
    }
}

/// An endpoint and a login; what is missing is what the AWS configuration says.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) endpoint: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) secret: Option<Secret>,
}

impl Place {
    /// What the URL says is stronger than the keys, which fill what it leaves out.
    fn read(&mut self, text: &str) -> Result<()> {
        let invalid = || {
            config("setting \"url\" is not valid, expected sqs://, or sqs:// or sqss://KEY:SECRET@host:port")
                .with_hint("write special characters in key and secret as %XX")
        };
        let url = Url::parse(text).map_err(|_| invalid())?;
        let decoded = |text: &str| percent_decode(text).ok_or_else(invalid);
        if !url.username().is_empty() {
            self.key = Some(decoded(url.username())?);
            self.secret = url.password().map(decoded).transpose()?.map(Secret::new);
        }
        if !matches!(url.path(), "" | "/") {
            return Err(invalid());
        }
        if let Some(host) = url.host_str().filter(|host| !host.is_empty()) {
            let scheme = if url.scheme() == "sqss" { "https" } else { "http" };
            let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
            self.endpoint = Some(format!("{scheme}://{host}{port}"));
        }
        Ok(())
    }

    fn check(&self, allow_plaintext_remote: bool) -> Result<()> {
        let Some(endpoint) = &self.endpoint else { return Ok(()) };
        let url = Url::parse(endpoint).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let Some(url) = url else {
            return Err(config("setting \"endpoint\" is not valid, expected http://host:port or https://host:port"));
        };
        let host = url.host_str().unwrap_or_default();
        if url.scheme() == "http" && !allow_plaintext_remote && !is_loopback(host) {
            return Err(config(format!("credentials and messages would travel in clear text to {host:?}")).with_hint(
                "use sqss:// or https://, or set allow_plaintext_remote=true for a network that you trust",
            ));
        }
        Ok(())
    }
}

impl Place {
    /// Whether it is reached without TLS.
    pub(crate) fn is_plain(&self) -> bool {
        self.endpoint.as_deref().is_some_and(|endpoint| endpoint.starts_with("http://"))
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.endpoint.as_deref().unwrap_or("AWS"))
    }
}

fn is_loopback(host: &str) -> bool {
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost"),
    }
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        bytes.push(match first {
            b'%' => {
                let digits = std::str::from_utf8(rest.get(..2)?).ok()?;
                rest = &rest[2..];
                u8::from_str_radix(digits, 16).ok()?
            }
            byte => *byte,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<Place> {
        SqsConfig::parse(&Settings::from_url(url)?)?.place()
    }

    #[test]
    fn a_url_names_aws_or_a_server() {
        let aws = read("sqs://?region=eu-west-1").expect("AWS");
        assert_eq!((aws.endpoint, aws.key), (None, None));
        let own = read("sqs://me:s%2Fecret@127.0.0.1:4566").expect("a server");
        assert_eq!(own.endpoint.as_deref(), Some("http://127.0.0.1:4566"));
        assert_eq!(own.secret.as_ref().map(Secret::expose), Some("s/ecret"));
        assert_eq!(read("sqss://k:s@example.org").expect("TLS").endpoint.as_deref(), Some("https://example.org"));
    }

    #[test]
    fn what_is_not_safe_or_not_whole_is_refused() {
        for (url, word) in [
            ("sqs://k:s@example.org", "clear text"),
            ("sqs://?endpoint=http://example.org", "clear text"),
            ("sqs://?endpoint=example.org", "endpoint"),
            ("sqs://?access_key_id=k", "secret"),
            ("sqs://localhost/queue", "url"),
            ("sqs://localhost?poll_wait=21s", "poll_wait"),
            ("sqs://localhost?lease_cap=13h", "lease_cap"),
            ("sqs://localhost?pols=3", "polls"),
        ] {
            let sentence = read(url).expect_err(url).to_string();
            assert!(sentence.contains(word), "{url}: {sentence}");
        }
        assert!(read("sqs://k:s@example.org?allow_plaintext_remote=true").is_ok());
        let shown = format!("{:?}", SqsConfig::parse(&Settings::from_url("sqs://k:hush@localhost").expect("a URL")));
        assert!(!shown.contains("hush"), "{shown}");
    }
}
