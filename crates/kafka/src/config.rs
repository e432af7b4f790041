//! The settings of this backend.

use std::{path::PathBuf, time::Duration};

use polymq_core::{Key, Result, Secret, Settings, config::duration};
use serde::Deserialize;

use crate::{NAME, error};

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    key("url", "kafka://localhost:9092", "where a broker is: kafka:// or kafkas://user:password@host:port"),
    key("servers", "", "brokers to begin with, where the URL names none: host:port,host:port"),
    key("user", "", "the user, where the URL names none; without one there is no login"),
    key("pass", "", "the password, where the URL names none"),
    key("pass_file", "", "a file with the password, read again when it is refused, so that it may be rotated"),
    key(
        "mechanism",
        "plain",
        "how to log in: plain, scram-sha-256 or scram-sha-512 (SCRAM needs the feature kafka-tls)",
    ),
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
    key(
        "declare",
        "auto",
        "auto makes topics that are missing, passive only checks that they are there (but makes those for replies)",
    ),
    key("max_payload", "1000000", "largest body in bytes; new topics are made to take it"),
    key("allow_plaintext_remote", "false", "allow credentials without TLS to a host that is not this one"),
    key("ca_file", "", "PEM file of the authority that signed the brokers' certificates, instead of the system's"),
    key("cert_file", "", "PEM file of this client's certificate"),
    key("key_file", "", "PEM file of this client's key"),
    key("key_pass", "", "password of the key file"),
    key("name", "polymq", "the client id, shown in the broker's logs, metrics and quotas"),
    key("options", "", "further settings of librdkafka: name=value;name=value; what polymq sets itself is refused"),
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
    pub pass_file: Option<PathBuf>,
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
            pass_file: None,
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

/// What of the client library is not an option, by all of its names, and the setting of polymq instead. A name that ends
/// with a dot stands for all that begin with it.
const OURS: &[(&str, &str)] = &[
    ("bootstrap.servers", "servers"),
    ("metadata.broker.list", "servers"),
    ("security.protocol", "url"),
    ("sasl.username", "user"),
    ("sasl.password", "pass"),
    ("sasl.", "mechanism"),
    ("socket.timeout.ms", "heartbeat"),
    ("session.timeout.ms", "session_timeout"),
    ("transaction.timeout.ms", "session_timeout"),
    ("delivery.timeout.ms", "delivery_timeout"),
    ("message.timeout.ms", "delivery_timeout"),
    ("linger.ms", "linger"),
    ("queue.buffering.max.ms", "linger"),
    ("compression.type", "compression"),
    ("compression.codec", "compression"),
    ("message.max.bytes", "max_payload"),
    ("queue.buffering.max.messages", ""),
    ("queue.buffering.max.kbytes", ""),
    ("partitioner", ""),
    // A certificate is always checked.
    ("enable.ssl.certificate.verification", ""),
    ("ssl.endpoint.identification.algorithm", ""),
    ("enable.idempotence", ""),
    ("acks", ""),
    ("request.required.acks", ""),
    ("transactional.id", ""),
    ("group.id", ""),
    ("group.protocol", ""),
    ("partition.assignment.strategy", ""),
    ("enable.auto.commit", ""),
    ("enable.auto.offset.store", ""),
    ("auto.offset.reset", ""),
    ("allow.auto.create.topics", ""),
    ("plugin.library.paths", ""),
];

impl KafkaConfig {
    /// Reads and checks settings; no connection is made.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](polymq_core::ErrorKind::Config) naming the key and the expectation,
    /// [`ErrorKind::NotCompiledIn`](polymq_core::ErrorKind::NotCompiledIn) for `kafkas`
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
            ("pass_file", self.pass_file.is_none() || self.has_user(), "expected together with user"),
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
        let text = self.options.as_ref().map_or("", Secret::expose);
        let pairs = text.split(';').map(str::trim).filter(|pair| !pair.is_empty());
        pairs
            .map(|pair| {
                let Some((name, value)) = pair.split_once('=') else {
                    return Err(error::config("setting \"options\" is not valid, expected name=value;name=value"));
                };
                let (name, value) = (name.trim(), value.trim());
                match OURS.iter().find(|(ours, _)| name == *ours || (name.starts_with(ours) && ours.ends_with('.'))) {
                    None => Ok((name, value)),
                    Some((_, "")) => Err(error::config(format!(
                        "option {name:?} is polymq's own: what it promises depends on it, so it cannot be set"
                    ))),
                    Some((_, setting)) => Err(error::config(format!("option {name:?} is polymq's own"))
                        .with_hint(format!("use the setting {setting:?}"))),
                }
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client;

    /// Each is in the clients as it was given, or refused with the name of the setting that does the same.
    #[test]
    fn no_option_is_replaced_in_silence() {
        let own = KafkaConfig::default();
        let clients = |config: &KafkaConfig| {
            let made = [
                client::producer(config),
                client::transactional(config, "id"),
                client::consumer(config, "group", 1, 1),
            ];
            made.map(|made| made.expect("valid"))
        };
        let ours = clients(&own);
        let names: std::collections::BTreeSet<&str> =
            ours.iter().flat_map(|made| made.config_map().into_keys()).collect();
        let aliases = ["message.timeout.ms", "queue.buffering.max.ms", "compression.codec", "acks", "sasl.username"];
        let mut kept = 0;
        for name in names.iter().copied().chain(aliases) {
            match KafkaConfig::parse(&Settings::new().with("options", format!("{name}=4711"))) {
                Ok(config) => {
                    for made in clients(&config) {
                        assert_eq!(made.get(name), Some("4711"), "{name}");
                    }
                    kept += 1;
                }
                Err(error) => {
                    assert!(error.to_string().contains(name), "{error}");
                    let setting = error.hint().and_then(|hint| hint.split('"').nth(1));
                    let known = |setting: &str| KEYS.iter().any(|key| setting == key.name);
                    assert!(setting.map_or_else(|| error.to_string().contains("cannot be set"), known), "{error:?}");
                }
            }
        }
        assert!(kept > 10 && names.len() > 30, "{kept} of {names:?}");
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
}
