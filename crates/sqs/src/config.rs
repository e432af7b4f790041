//! The settings of this backend.

use std::{path::PathBuf, time::Duration};

use polymq_core::{
    Key, Result, Secret, Settings,
    config::{Origin, duration},
};
use serde::Deserialize;
use url::Url;

use crate::{NAME, error::config, place::Place};

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    key(
        "url",
        "sqs://",
        "sqs:// alone is AWS; sqs://KEY:SECRET@host:port is a server of your own, sqss:// the same with TLS",
    ),
    key("endpoint", "", "where SQS and SNS are, as http:// or https://, instead of what the region says"),
    key("sqs_endpoint", "", "where SQS is, when that is not where SNS is"),
    key("sns_endpoint", "", "where SNS is, when that is not where SQS is"),
    key("region", "that of the AWS configuration", "the region; with an endpoint us-east-1 where nothing names one"),
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
    pub sqs_endpoint: Option<String>,
    pub sns_endpoint: Option<String>,
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
            sqs_endpoint: None,
            sns_endpoint: None,
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

/// What is called a time-out may be as long as this: it is added to other times.
const LONGEST: Duration = Duration::from_secs(366 * 24 * 3600);
const SOME: &str = "expected more than nothing, and a year at most";

/// The longest loan of a message, from SQS's own documents.
pub(crate) const MAX_VISIBILITY: Duration = Duration::from_secs(12 * 3600);

impl SqsConfig {
    /// Reads and checks settings; no connection is made.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](polymq_core::ErrorKind::Config) naming the key and the expectation.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let mut config: Self = settings.parse(NAME)?;
        config.forget_others(settings);
        config.check()?;
        Ok(config)
    }

    /// What is said of one service, or of a session, belongs to the endpoint, or the key, that is said in the same place: it does
    /// not count beside one that comes from a stronger place, nor do the variables of every AWS program beside what was given to polymq.
    fn forget_others(&mut self, settings: &Settings) {
        let url = self.url.as_ref().and_then(|url| Url::parse(url.expose()).ok());
        let url_has = |part: fn(&Url) -> bool| url.as_ref().is_some_and(part);
        let belongs = |key: &str, to: &str| match (settings.origin(key), settings.origin(to)) {
            // The query goes with its URL.
            (Some(Origin::Url), _) => true,
            (Some(Origin::ForeignVariable(_)), to) => matches!(to, None | Some(Origin::ForeignVariable(_))),
            (Some(origin), Some(to)) => !origin.is_weaker_than(to),
            _ => true,
        };
        let endpoint =
            if url_has(|url| url.host_str().is_some_and(|host| !host.is_empty())) { "url" } else { "endpoint" };
        self.sqs_endpoint.take_if(|_| !belongs("sqs_endpoint", endpoint));
        self.sns_endpoint.take_if(|_| !belongs("sns_endpoint", endpoint));
        let key = if url_has(|url| !url.username().is_empty()) { "url" } else { "access_key_id" };
        self.session_token.take_if(|_| !belongs("session_token", key));
    }

    fn check(&self) -> Result<()> {
        let some = |duration: Duration| !duration.is_zero() && duration <= LONGEST;
        let rules: [(&str, bool, &str); 12] = [
            ("heartbeat", some(self.heartbeat), SOME),
            ("connect_timeout", some(self.connect_timeout), SOME),
            ("request_timeout", some(self.request_timeout), SOME),
            ("reconnect_initial", some(self.reconnect_initial), SOME),
            ("reconnect_max", self.reconnect_max >= self.reconnect_initial, "expected at least reconnect_initial"),
            ("reconnect_max", some(self.reconnect_max), SOME),
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
        Place::of(self)
    }

    /// Whether looking again may find other credentials: not where the settings name them.
    pub(crate) fn may_renew(&self) -> bool {
        self.place().is_ok_and(|place| place.key.is_none())
    }
}

#[cfg(test)]
mod tests {
    use polymq_core::Backend;

    use super::*;

    fn read(url: &str) -> Result<Place> {
        SqsConfig::parse(&Settings::from_url(url)?)?.place()
    }

    #[test]
    fn a_url_names_aws_or_a_server() {
        let aws = read("sqs://?region=eu-west-1").expect("AWS");
        assert_eq!((aws.sqs, aws.sns, aws.key), (None, None, None));
        let own = read("sqs://me:s%2Fecret@127.0.0.1:4566").expect("a server");
        assert_eq!(own.sqs.as_deref(), Some("http://127.0.0.1:4566"));
        assert_eq!(own.secret.as_ref().map(Secret::expose), Some("s/ecret"));
        assert_eq!(read("sqss://k:s@example.org").expect("TLS").sns.as_deref(), Some("https://example.org"));
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
            ("sqs://localhost?request_timeout=500000000000years", "request_timeout"),
            ("sqs://localhost?pols=3", "polls"),
        ] {
            let sentence = read(url).expect_err(url).to_string();
            assert!(sentence.contains(word), "{url}: {sentence}");
        }
        assert!(read("sqs://k:s@example.org?allow_plaintext_remote=true").is_ok());
        let shown = format!("{:?}", SqsConfig::parse(&Settings::from_url("sqs://k:hush@localhost").expect("a URL")));
        assert!(!shown.contains("hush"), "{shown}");
    }

    #[test]
    fn documented_defaults_are_the_defaults() {
        // What depends on something else says so in words.
        let texts = KEYS.iter().filter(|key| !key.default.is_empty() && key.name != "region");
        let documented = texts.fold(Settings::new(), |settings, key| settings.with(key.name, key.default));
        let documented = SqsConfig::parse(&documented).expect("valid");
        let url = documented.url.clone();
        assert_eq!(format!("{documented:?}"), format!("{:?}", SqsConfig { url, ..SqsConfig::default() }));
    }

    #[test]
    fn what_other_programs_are_told_does_not_mix_with_what_polymq_is_told() {
        let place = |url: &str, variables: &[(&str, &str)]| {
            let mut settings = Settings::from_url(url).expect("a URL");
            for (variable, value) in variables {
                let foreign = crate::SqsBackend.foreign_variables();
                let (name, key) = foreign.iter().find(|(name, _)| name == variable).expect("a variable");
                settings.set(*key, *value, Origin::ForeignVariable((*name).to_owned()));
            }
            let config = SqsConfig::parse(&settings).expect("settings");
            let place = config.place().expect("a place");
            (place.sqs, place.sns, config.session_token.is_some())
        };
        let temporary = [("AWS_ACCESS_KEY_ID", "k"), ("AWS_SECRET_ACCESS_KEY", "s"), ("AWS_SESSION_TOKEN", "t")];
        assert_eq!(place("sqs://", &temporary), (None, None, true));
        assert_eq!(place("sqs://?access_key_id=mine&secret_access_key=s", &temporary), (None, None, false));
        let own = Some("http://localhost:9324".to_owned());
        assert_eq!(place("sqs://k:s@localhost:9324", &temporary), (own.clone(), own.clone(), false));
        let token = "sqs://k:s@localhost:9324?session_token=mine";
        assert_eq!(place(token, &temporary), (own.clone(), own.clone(), true));

        let sqs = ("AWS_ENDPOINT_URL_SQS", "https://sqs.example.org");
        let (at, all) = (Some(sqs.1.to_owned()), Some("https://example.org".to_owned()));
        assert_eq!(place("sqs://", &[sqs]), (at.clone(), None, false), "SNS stays where the region has it");
        assert_eq!(place("sqs://", &[sqs, ("AWS_ENDPOINT_URL", "https://example.org")]), (at, all, false));
        assert_eq!(place("sqs://localhost:9324", &[sqs]), (own.clone(), own.clone(), false));
        assert_eq!(place("sqs://?endpoint=http://localhost:9324", &[sqs]), (own.clone(), own.clone(), false));
        let both = "sqs://localhost:9324?sns_endpoint=https://sns.example.org";
        assert_eq!(place(both, &[]), (own.clone(), Some("https://sns.example.org".to_owned()), false));

        // What a file says of the servers and keys of production does not go with the URL of a laptop.
        let mut settings = Settings::new();
        for (key, value) in
            [("sns_endpoint", "https://sns.example.org"), ("session_token", "t"), ("access_key_id", "k")]
        {
            settings.set(key, value, Origin::File("polymq.toml".into()));
        }
        settings.set_url("sqs://k:s@localhost:9324", Origin::Variable("POLYMQ_URL".into())).expect("a URL");
        let config = SqsConfig::parse(&settings).expect("settings");
        assert_eq!((config.place().expect("a place").sns, config.session_token.is_some()), (own, false));
    }
}
