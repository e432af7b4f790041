//! The settings of this backend, and the place that they lead to.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use polymq_core::{Error, ErrorKind, Key, Result, Secret, Settings, config::duration};
use serde::Deserialize;
use url::Url;

use crate::{NAME, error};

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    key("url", "kafka://localhost:9092", "where a broker is: kafka:// or kafkas://user:password@host:port"),
    key("servers", "", "brokers to begin with, where the URL names none: host:port,host:port"),
    key("user", "", "the user, where the URL names none; without one there is no login"),
    key("pass", "", "the password, where the URL names none"),
    key("mechanism", "plain", "how to log in: plain, scram-sha-256 or scram-sha-512 (SCRAM needs the feature tls)"),
    key("heartbeat", "10s", "how often the connection is probed; silence of twice this long is a lost connection"),
    key("session_timeout", "10s", "a consumer that is silent for this long loses its partitions to others"),
    key("connect_timeout", "10s", "bound of one attempt to connect, and of a declaration"),
    key("connect_retry", "false", "keep trying when the very first attempt to connect fails"),
    key("reconnect_initial", "200ms", "wait before the second attempt to reconnect; doubles, with jitter"),
    key("reconnect_max", "10s", "longest wait between attempts to reconnect"),
    key("reconnect_limit", "0", "give up after as long as this many failed attempts take; 0 never gives up"),
    key("delivery_timeout", "2m", "how long a message that was handed over is tried; its outcome is unknown then"),
    key("linger", "0ms", "how long a message waits for company in its batch"),
    key("compression", "none", "what batches are packed with: none, lz4, snappy, gzip or zstd"),
    key("partitions", "", "partitions of new topics; the broker's default where this is empty"),
    key("replication", "", "copies of new topics; the broker's default where this is empty"),
    key("retention", "", "how long new topics keep messages; the broker's default where this is empty"),
    key("commit_interval", "100ms", "how long finished messages may wait for their positions to be committed"),
    key("revoke_wait", "5s", "how long a partition that goes to another consumer waits for handlers that run"),
    key("declare", "auto", "auto makes topics that are missing, passive only checks that they are there"),
    key("max_payload", "1000000", "largest body in bytes; new topics are made to take it"),
    key("allow_plaintext_remote", "false", "allow credentials without TLS to a host that is not this one"),
    key("ca_file", "", "PEM file of the authority that signed the brokers' certificates, instead of the system's"),
    key("cert_file", "", "PEM file of this client's certificate"),
    key("key_file", "", "PEM file of this client's key"),
    key("key_pass", "", "password of the key file"),
    key("name", "polymq", "the client id, shown in the broker's logs, metrics and quotas"),
    key("options", "", "further settings of librdkafka: name=value;name=value"),
];

const fn key(name: &'static str, default: &'static str, help: &'static str) -> Key {
    Key { name, default, help }
}

/// Settings of the backend; [`KEYS`] explains each.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // KEYS says it once, for the command line and the docs too
pub struct KafkaConfig {
    pub url: Option<Secret>,
    pub servers: Option<String>,
    pub user: Option<String>,
    pub pass: Option<Secret>,
    pub mechanism: Mechanism,
    #[serde(with = "duration")]
    pub heartbeat: Duration,
    #[serde(with = "duration")]
    pub session_timeout: Duration,
    #[serde(with = "duration")]
    pub connect_timeout: Duration,
    pub connect_retry: bool,
    #[serde(with = "duration")]
    pub reconnect_initial: Duration,
    #[serde(with = "duration")]
    pub reconnect_max: Duration,
    pub reconnect_limit: u32,
    #[serde(with = "duration")]
    pub delivery_timeout: Duration,
    #[serde(with = "duration")]
    pub linger: Duration,
    pub compression: Compression,
    pub partitions: Option<i32>,
    pub replication: Option<i32>,
    #[serde(deserialize_with = "some_duration")]
    pub retention: Option<Duration>,
    #[serde(with = "duration")]
    pub commit_interval: Duration,
    #[serde(with = "duration")]
    pub revoke_wait: Duration,
    pub declare: Declare,
    pub max_payload: usize,
    pub allow_plaintext_remote: bool,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub key_pass: Option<Secret>,
    pub name: String,
    pub options: Option<Secret>,
}

fn some_duration<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration::deserialize(deserializer).map(Some)
}

impl Default for KafkaConfig {
    fn default() -> Self {
        Self {
            url: None,
            servers: None,
            user: None,
            pass: None,
            mechanism: Mechanism::Plain,
            heartbeat: Duration::from_secs(10),
            // librdkafka's own 45 s would leave a killed consumer's messages lying for that long.
            session_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            connect_retry: false,
            reconnect_initial: Duration::from_millis(200),
            reconnect_max: Duration::from_secs(10),
            reconnect_limit: 0,
            delivery_timeout: Duration::from_secs(120),
            linger: Duration::ZERO,
            compression: Compression::None,
            partitions: None,
            replication: None,
            retention: None,
            commit_interval: Duration::from_millis(100),
            revoke_wait: Duration::from_secs(5),
            declare: Declare::Auto,
            // Kafka takes batches of 1048588 bytes unless told otherwise; the rest is for headers.
            max_payload: DEFAULT_PAYLOAD,
            allow_plaintext_remote: false,
            ca_file: None,
            cert_file: None,
            key_file: None,
            key_pass: None,
            name: "polymq".into(),
            options: None,
        }
    }
}

pub(crate) const DEFAULT_PAYLOAD: usize = 1_000_000;
/// Room for headers, key and the record's own fields beside the body: the most headers that polymq allows, and its own.
pub(crate) const RECORD_ROOM: usize = 48 * 1024;

/// How to log in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    /// The password itself.
    Plain,
    /// A proof of the password, with SHA-256.
    #[serde(rename = "scram-sha-256", alias = "SCRAM-SHA-256")]
    ScramSha256,
    /// A proof of the password, with SHA-512.
    #[serde(rename = "scram-sha-512", alias = "SCRAM-SHA-512")]
    ScramSha512,
}

/// What batches are packed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // the names of the formats
pub enum Compression {
    None,
    Lz4,
    Snappy,
    Gzip,
    Zstd,
}

/// What is done about topics that do not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Declare {
    /// They are made.
    Auto,
    /// They are an error.
    Passive,
}

impl KafkaConfig {
    /// Reads and checks settings; no connection is made.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the key and the expectation, [`ErrorKind::NotCompiledIn`] for `kafkas`
    /// without the feature `tls`.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let config: Self = settings.parse(NAME)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let between = |value: Duration, least: u64, most: u64| {
            (Duration::from_millis(least)..=Duration::from_millis(most)).contains(&value)
        };
        let rules = [
            ("heartbeat", between(self.heartbeat, 1_000, 3_600_000), "expected 1s to 1h"),
            ("session_timeout", between(self.session_timeout, 1_000, 300_000), "expected 1s to 5m"),
            ("connect_timeout", !self.connect_timeout.is_zero(), "expected more than nothing"),
            ("reconnect_initial", between(self.reconnect_initial, 1, 3_600_000), "expected 1ms to 1h"),
            ("reconnect_max", between(self.reconnect_max, 1, 3_600_000), "expected 1ms to 1h"),
            ("reconnect_max", self.reconnect_max >= self.reconnect_initial, "expected at least reconnect_initial"),
            ("delivery_timeout", between(self.delivery_timeout, 1_000, 86_400_000), "expected 1s to 1d"),
            ("linger", between(self.linger, 0, 60_000) && self.linger < self.delivery_timeout, "expected at most 1m"),
            ("partitions", self.partitions.is_none_or(|count| (1..=100_000).contains(&count)), "expected 1 to 100000"),
            ("replication", self.replication.is_none_or(|count| (1..=1000).contains(&count)), "expected 1 to 1000"),
            ("retention", self.retention.is_none_or(|time| !time.is_zero()), "expected more than nothing"),
            ("commit_interval", between(self.commit_interval, 1, 60_000), "expected 1ms to 1m"),
            ("revoke_wait", between(self.revoke_wait, 0, 240_000), "expected at most 4m"),
            ("max_payload", (1..=900_000_000).contains(&self.max_payload), "expected 1 to 900000000"),
            ("key_file", self.key_file.is_some() == self.cert_file.is_some(), "expected together with cert_file"),
            ("pass", self.pass.is_none() || self.has_user(), "expected together with user"),
        ];
        if let Some((key, _, expected)) = rules.iter().find(|(_, holds, _)| !holds) {
            return Err(error::config(format!("setting {key:?} is not valid, {expected}")));
        }
        self.options()?;
        let endpoint = self.endpoint()?;
        if self.cert_file.is_some() && !endpoint.tls {
            return Err(
                error::config("setting \"cert_file\" has no effect without TLS").with_hint("use a kafkas:// URL")
            );
        }
        Ok(())
    }

    fn has_user(&self) -> bool {
        self.user.is_some() || self.url.as_ref().is_some_and(|url| url.expose().contains('@'))
    }

    /// The further settings of the client library. What polymq relies on is not among them.
    pub(crate) fn options(&self) -> Result<Vec<(&str, &str)>> {
        const OURS: &[&str] = &[
            "bootstrap.servers",
            "metadata.broker.list",
            "security.protocol",
            "group.id",
            "group.protocol",
            "enable.auto.commit",
            "enable.auto.offset.store",
            "auto.offset.reset",
            "enable.idempotence",
            "acks",
            "request.required.acks",
            "partition.assignment.strategy",
            "transactional.id",
            "plugin.library.paths",
        ];
        let text = self.options.as_ref().map_or("", Secret::expose);
        let pairs = text.split(';').map(str::trim).filter(|pair| !pair.is_empty());
        pairs
            .map(|pair| {
                let Some((name, value)) = pair.split_once('=') else {
                    return Err(error::config("setting \"options\" is not valid, expected name=value;name=value"));
                };
                let (name, value) = (name.trim(), value.trim());
                if OURS.contains(&name) || name.starts_with("sasl.") {
                    return Err(error::config(format!(
                        "option {name:?} is polymq's own; use the settings of this backend"
                    )));
                }
                Ok((name, value))
            })
            .collect()
    }

    /// Where these settings lead, and as whom.
    pub(crate) fn endpoint(&self) -> Result<Endpoint> {
        let endpoint = match &self.url {
            Some(url) => self.read_url(url.expose())?,
            None => self.with_defaults(Endpoint::default()),
        };
        endpoint.check(self)?;
        Ok(endpoint)
    }

    fn read_url(&self, text: &str) -> Result<Endpoint> {
        let invalid = || {
            error::config("setting \"url\" is not valid, expected kafka:// or kafkas://user:password@host:port")
                .with_hint("write special characters in user and password as %XX, and further brokers in \"servers\"")
        };
        let url = Url::parse(text).map_err(|_| invalid())?;
        if !matches!(url.path(), "" | "/") {
            return Err(invalid());
        }
        let decoded = |text: &str| percent_decoded(text).ok_or_else(invalid);
        let host = url.host_str().filter(|host| !host.is_empty());
        let found = Endpoint {
            tls: url.scheme() == "kafkas",
            servers: host.map(|host| format!("{}:{}", host, url.port().unwrap_or(9092))),
            user: if url.username().is_empty() { None } else { Some(decoded(url.username())?) },
            pass: url.password().map(decoded).transpose()?.map(Secret::new),
        };
        Ok(self.with_defaults(found))
    }

    /// What the URL says is whole: keys only fill what it leaves out, so that a stray variable cannot add the brokers
    /// of another cluster.
    fn with_defaults(&self, found: Endpoint) -> Endpoint {
        Endpoint {
            servers: found.servers.or_else(|| self.servers.clone()),
            user: found.user.or_else(|| self.user.clone()),
            pass: found.pass.or_else(|| self.pass.clone()),
            ..found
        }
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first == b'%' {
            let (digits, tail) = tail.split_at_checked(2)?;
            bytes.push(u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?);
            rest = tail;
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

/// Brokers and a login.
#[derive(Debug, Clone, Default)]
pub(crate) struct Endpoint {
    pub(crate) tls: bool,
    servers: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) pass: Option<Secret>,
}

impl Endpoint {
    fn check(&self, settings: &KafkaConfig) -> Result<()> {
        let needs_tls = self.tls || (self.user.is_some() && settings.mechanism != Mechanism::Plain);
        if needs_tls && !cfg!(feature = "tls") {
            return Err(Error::new(ErrorKind::NotCompiledIn, "kafkas and SCRAM need TLS, which is not compiled in")
                .with_backend(NAME)
                .with_hint("add the feature \"tls\" of polymq-kafka"));
        }
        for server in self.servers().split(',') {
            let Some((host, port)) = server.trim().rsplit_once(':') else {
                return Err(error::config(format!("broker {server:?} has no port, expected host:port")));
            };
            if host.is_empty() || port.parse::<u16>().is_err() {
                return Err(error::config(format!("broker {server:?} is not valid, expected host:port")));
            }
            if self.user.is_some() && !self.tls && !is_loopback(host) && !settings.allow_plaintext_remote {
                return Err(error::config(format!("credentials would travel in clear text to {host:?}")).with_hint(
                    "use a kafkas:// URL, or set allow_plaintext_remote=true for a network that you trust",
                ));
            }
        }
        Ok(())
    }

    pub(crate) fn servers(&self) -> &str {
        self.servers.as_deref().unwrap_or("localhost:9092")
    }
}

fn is_loopback(host: &str) -> bool {
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host.eq_ignore_ascii_case("localhost") || host.to_ascii_lowercase().ends_with(".localhost"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<Endpoint> {
        KafkaConfig::parse(&Settings::from_url(url)?)?.endpoint()
    }

    fn sentence(url: &str) -> String {
        read(url).map_or_else(|error| error.to_string(), |found| panic!("accepted as {found:?}"))
    }

    #[test]
    fn urls_lead_somewhere() {
        let found = read("kafka://app:s%40cret@127.0.0.1:19092").expect("valid");
        assert_eq!((found.servers(), found.user.as_deref()), ("127.0.0.1:19092", Some("app")));
        assert_eq!(found.pass.as_ref().map(Secret::expose), Some("s@cret"));
        assert_eq!(read("kafka://").expect("valid").servers(), "localhost:9092");
        assert_eq!(read("kafka://one").expect("valid").servers(), "one:9092");
        assert_eq!(read("kafka:///?servers=a:1,b:2").expect("valid").servers(), "a:1,b:2");
        // The URL is whole: a variable does not add the brokers of another cluster.
        assert_eq!(read("kafka://one:1?servers=two:2").expect("valid").servers(), "one:1");
    }

    #[test]
    fn what_is_wrong_is_said() {
        assert!(sentence("kafka://host:9092/orders").contains("expected kafka://"));
        assert!(sentence("kafka:///?servers=one").contains("\"one\" has no port"));
        assert!(sentence("kafka://app:secret@broker.example:9092").contains("clear text to \"broker.example\""));
        assert!(sentence("kafka://localhost?partitions=0").contains("expected 1 to 100000"));
        assert!(sentence("kafka://localhost?options=acks%3D0").contains("polymq's own"));
        assert!(sentence("kafka://localhost?hartbeat=1s").contains("heartbeat"));
        assert!(sentence("kafka://localhost?pass=x").contains("together with user"));
        for url in ["kafka://app:secret@broker.example:9092", "kafka://app:secret@localhost:9092/x"] {
            assert!(!sentence(url).contains("secret"));
        }
    }

    #[test]
    fn every_key_is_documented_and_known() {
        let settings = KEYS.iter().filter(|key| !key.default.is_empty() && key.name != "url");
        let mut all = Settings::new();
        for key in settings {
            all = all.with(key.name, key.default);
        }
        let parsed = KafkaConfig::parse(&all).expect("the documented defaults are valid");
        assert_eq!(format!("{parsed:?}"), format!("{:?}", KafkaConfig::default()));
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn tls_that_is_not_there_is_not_ignored() {
        let error = read("kafkas://localhost:9093").expect_err("not compiled in");
        assert_eq!(error.kind(), ErrorKind::NotCompiledIn);
    }
}
