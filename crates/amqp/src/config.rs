//! The settings of this backend, and the place that they lead to.

use std::{path::PathBuf, time::Duration};

use lapin::uri::AMQPUri;
use polymq_core::{
    Error, ErrorKind, Key, Result, Secret, Settings,
    config::{duration, is_loopback},
};
use serde::Deserialize;
use url::Url;

use crate::{NAME, login::Login, topology::TOPIC_EXCHANGE};

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    key("url", "amqp://localhost:5672", "where the broker is: amqp:// or amqps://user:password@host:port/vhost"),
    key("host", "localhost", "the host, where the URL names none"),
    key("port", "5672, or 5671 with TLS", "the port, where the URL names none"),
    key("user", "guest", "the user, where the URL names none"),
    key("pass", "guest", "the password, where the URL names none"),
    key("pass_file", "", "a file with the password, read again at every connect, so that it may be rotated"),
    key("vhost", "/", "the virtual host, where the URL names none"),
    key("heartbeat", "10s", "silence of twice this long ends a connection; whole seconds"),
    key("connect_timeout", "10s", "bound of one attempt to connect, and of a declaration"),
    key("connect_retry", "false", "keep trying when the very first attempt to connect fails"),
    key("reconnect_initial", "200ms", "wait before the second attempt to reconnect; doubles, with jitter"),
    key("reconnect_max", "15s", "longest wait between attempts to reconnect"),
    key("reconnect_limit", "0", "give up after this many failed attempts in a row; 0 never gives up"),
    key("channels", "4", "confirm channels that all producers share; a channel of yours always uses the same one"),
    key("queue_type", "classic", "what new queues are: classic or quorum"),
    key("exchange", "amq.topic", "the topic exchange behind topics; made when it does not exist"),
    key("declare", "auto", "auto makes what is missing, passive only checks that it is there, none asks nothing"),
    key("max_payload", "16777216", "largest body in bytes"),
    key("persistent", "true", "whether messages survive a restart of the broker"),
    key("allow_guest_remote", "false", "allow the guest login to a host that is not this one"),
    key("allow_plaintext_remote", "false", "allow credentials without TLS to a host that is not this one"),
    key("ca_file", "", "PEM file of the authority that signed the broker's certificate, besides the system's"),
    key("cert_file", "", "PEM file of this client's certificate"),
    key("key_file", "", "PEM file (PKCS #8) of this client's key"),
    key("tls_min", "1.2", "the oldest version of TLS that is spoken: 1.2 or 1.3"),
    key("name", "polymq", "how the connection is called in the broker's management"),
];

const fn key(name: &'static str, default: &'static str, help: &'static str) -> Key {
    Key { name, default, help }
}

/// Settings of the backend; [`KEYS`] explains each.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // KEYS says it once, for the command line and the docs too
pub struct AmqpConfig {
    pub url: Option<Secret>,
    pub host: Option<String>,
    pub port: Option<u16>,
    pub user: Option<String>,
    pub pass: Option<Secret>,
    pub pass_file: Option<PathBuf>,
    pub vhost: Option<String>,
    #[serde(with = "duration")]
    pub heartbeat: Duration,
    #[serde(with = "duration")]
    pub connect_timeout: Duration,
    pub connect_retry: bool,
    #[serde(with = "duration")]
    pub reconnect_initial: Duration,
    #[serde(with = "duration")]
    pub reconnect_max: Duration,
    pub reconnect_limit: u32,
    pub channels: usize,
    pub queue_type: QueueType,
    pub exchange: String,
    pub declare: Declare,
    pub max_payload: usize,
    pub persistent: bool,
    pub allow_guest_remote: bool,
    pub allow_plaintext_remote: bool,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub tls_min: TlsVersion,
    pub name: String,
}

impl Default for AmqpConfig {
    fn default() -> Self {
        Self {
            url: None,
            host: None,
            port: None,
            user: None,
            pass: None,
            pass_file: None,
            vhost: None,
            // RabbitMQ's own 60 s would hide a dead link for two minutes; below 5 s, a busy machine looks dead.
            heartbeat: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            connect_retry: false,
            reconnect_initial: Duration::from_millis(200),
            reconnect_max: Duration::from_secs(15),
            reconnect_limit: 0,
            channels: 4,
            queue_type: QueueType::Classic,
            exchange: TOPIC_EXCHANGE.into(),
            declare: Declare::Auto,
            // The limit of RabbitMQ 4; older versions would take more, and a move to a newer one would break.
            max_payload: 16 * 1024 * 1024,
            persistent: true,
            allow_guest_remote: false,
            allow_plaintext_remote: false,
            ca_file: None,
            cert_file: None,
            key_file: None,
            tls_min: TlsVersion::V12,
            name: "polymq".into(),
        }
    }
}

/// What new queues are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QueueType {
    /// On one node, on disk.
    Classic,
    /// Replicated to several nodes.
    Quorum,
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

/// What is done about queues and exchanges that do not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Declare {
    /// They are made.
    Auto,
    /// They are an error.
    Passive,
    /// Nobody asks; for users without the permission to ask.
    None,
}

impl AmqpConfig {
    /// Reads and checks settings; no connection is made.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the key and the expectation, [`ErrorKind::NotCompiledIn`] for `amqps`
    /// without the feature `tls`.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let config: Self = settings.parse(NAME)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let rules: [(&str, bool, &str); 9] = [
            ("heartbeat", (1..=65_535).contains(&self.heartbeat.as_secs()), "expected 1s to 65535s"),
            ("connect_timeout", !self.connect_timeout.is_zero(), "expected more than nothing"),
            ("reconnect_initial", !self.reconnect_initial.is_zero(), "expected more than nothing"),
            ("reconnect_max", self.reconnect_max >= self.reconnect_initial, "expected at least reconnect_initial"),
            ("channels", (1..=256).contains(&self.channels), "expected 1 to 256"),
            ("exchange", (1..=255).contains(&self.exchange.len()), "expected a name of 1 to 255 bytes"),
            ("max_payload", self.max_payload > 0, "expected more than nothing"),
            ("name", self.name.len() <= 255, "expected at most 255 bytes"),
            ("key_file", self.key_file.is_some() == self.cert_file.is_some(), "expected together with cert_file"),
        ];
        if let Some((key, _, expected)) = rules.iter().find(|(_, holds, _)| !holds) {
            return Err(config(format!("setting {key:?} is not valid, {expected}")));
        }
        let endpoint = self.endpoint()?;
        if self.cert_file.is_some() && !endpoint.tls {
            return Err(config("setting \"cert_file\" has no effect without TLS").with_hint("use an amqps:// URL"));
        }
        Ok(())
    }

    /// Where these settings lead, and as whom.
    pub(crate) fn endpoint(&self) -> Result<Endpoint> {
        let mut endpoint = match &self.url {
            Some(url) => self.read_url(url.expose())?,
            None => self.with_defaults(Endpoint::default()),
        };
        if let Some(path) = &self.pass_file {
            if endpoint.pass.is_some() {
                return Err(config("a password and \"pass_file\"").with_hint("give one of them"));
            }
            endpoint.pass = Some(Secret::read("pass_file", path).map_err(|error| error.with_backend(NAME))?);
        }
        endpoint.check(self)?;
        Ok(endpoint)
    }

    fn read_url(&self, text: &str) -> Result<Endpoint> {
        let invalid = || {
            config("setting \"url\" is not valid, expected amqp:// or amqps://user:password@host:port/vhost")
                .with_hint("write special characters in user, password and virtual host as %XX")
        };
        let url = Url::parse(text).map_err(|_| invalid())?;
        // The client library decodes the parts; its own defaults are not wanted.
        let parts: AMQPUri = text.parse().map_err(|_| invalid())?;
        let login = |given: bool, value: String| given.then_some(value);
        let host = match url.host() {
            Some(url::Host::Ipv6(address)) => Some(address.to_string()),
            Some(_) if !parts.authority.host.is_empty() => Some(parts.authority.host),
            _ => None,
        };
        let found = Endpoint {
            tls: url.scheme() == "amqps",
            host,
            port: url.port(),
            user: login(!url.username().is_empty(), parts.authority.userinfo.username),
            pass: login(url.password().is_some(), parts.authority.userinfo.password).map(Secret::new),
            vhost: login(!matches!(url.path(), "" | "/"), parts.vhost),
        };
        Ok(self.with_defaults(found))
    }

    /// What the URL says is whole: keys only fill what it leaves out, so that a stray `RMQ_HOST` cannot redirect it.
    fn with_defaults(&self, found: Endpoint) -> Endpoint {
        Endpoint {
            host: found.host.or_else(|| self.host.clone()),
            port: found.port.or(self.port),
            user: found.user.or_else(|| self.user.clone()),
            pass: found.pass.or_else(|| self.pass.clone()),
            vhost: found.vhost.or_else(|| self.vhost.clone()),
            ..found
        }
    }
}

/// A broker and a login.
#[derive(Debug, Clone, Default)]
pub(crate) struct Endpoint {
    pub(crate) tls: bool,
    host: Option<String>,
    port: Option<u16>,
    user: Option<String>,
    pass: Option<Secret>,
    vhost: Option<String>,
}

impl Endpoint {
    fn check(&self, settings: &AmqpConfig) -> Result<()> {
        if self.tls && !cfg!(feature = "tls") {
            return Err(Error::new(ErrorKind::NotCompiledIn, "amqps needs TLS, which is not compiled in")
                .with_backend(NAME)
                .with_hint("add the feature \"tls\" of polymq-amqp"));
        }
        if is_loopback(self.host()) {
            return Ok(());
        }
        if self.user() == "guest" && !settings.allow_guest_remote {
            return Err(config(format!("the guest login to {:?}, which is not this machine, is refused", self.host()))
                .with_hint("name a user of your own, or set allow_guest_remote=true"));
        }
        if !self.tls && !settings.allow_plaintext_remote {
            return Err(config(format!("credentials would travel in clear text to {:?}", self.host()))
                .with_hint("use an amqps:// URL, or set allow_plaintext_remote=true for a network that you trust"));
        }
        Ok(())
    }

    pub(crate) fn host(&self) -> &str {
        self.host.as_deref().unwrap_or("localhost")
    }

    pub(crate) fn port(&self) -> u16 {
        self.port.unwrap_or(if self.tls { 5671 } else { 5672 })
    }

    pub(crate) fn user(&self) -> &str {
        self.user.as_deref().unwrap_or("guest")
    }

    pub(crate) fn vhost(&self) -> &str {
        self.vhost.as_deref().unwrap_or("/")
    }

    /// The only place where the password leaves its wrapper.
    pub(crate) fn login(&self) -> Login {
        Login::new(self.user(), self.pass.as_ref().map_or("guest", Secret::expose))
    }

    /// The form of the client library, without the login.
    pub(crate) fn uri(&self, heartbeat: Duration) -> AMQPUri {
        use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUserInfo};
        AMQPUri {
            scheme: if self.tls { AMQPScheme::AMQPS } else { AMQPScheme::AMQP },
            authority: AMQPAuthority {
                userinfo: AMQPUserInfo { username: String::new(), password: String::new() },
                host: self.host().to_owned(),
                port: self.port(),
            },
            vhost: self.vhost().to_owned(),
            query: AMQPQueryString {
                heartbeat: Some(u16::try_from(heartbeat.as_secs()).unwrap_or(u16::MAX)),
                ..AMQPQueryString::default()
            },
        }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}, virtual host {:?}", self.host(), self.port(), self.vhost())
    }
}

#[cold]
fn config(sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, sentence).with_backend(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<Endpoint> {
        AmqpConfig::parse(&Settings::from_url(url)?)?.endpoint()
    }

    fn sentence(result: Result<Endpoint>) -> String {
        format!("{:?}: {0}", result.as_ref().map_or_else(|error| error.to_string(), |_| "accepted".into()))
    }

    #[test]
    fn a_url_is_taken_apart() {
        let endpoint = read("amqp://us%40er:p%2Fss@127.0.0.1:5673/my%2Fhost").expect("valid");
        assert_eq!((endpoint.user(), endpoint.vhost(), endpoint.port()), ("us@er", "my/host", 5673));
        assert_eq!(endpoint.pass.as_ref().map(Secret::expose), Some("p/ss"));
        assert_eq!(endpoint.uri(Duration::from_secs(7)).query.heartbeat, Some(7));
        let endpoint = read("amqp://localhost/").expect("valid");
        assert_eq!((endpoint.user(), endpoint.vhost(), endpoint.port()), ("guest", "/", 5672));
        assert_eq!(read("amqp://[::1]:9").expect("valid").host(), "::1");
    }

    #[test]
    fn keys_fill_what_the_url_leaves_out_and_no_more() {
        let settings = Settings::from_url("amqp://localhost").expect("a URL");
        let settings = settings.with("host", "elsewhere").with("user", "app").with("pass", "s3cret").with("vhost", "v");
        let config = AmqpConfig::parse(&settings).expect("valid");
        let endpoint = config.endpoint().expect("valid");
        assert_eq!((endpoint.host(), endpoint.user(), endpoint.vhost()), ("localhost", "app", "v"));
        assert!(!format!("{config:?}{endpoint:?}{endpoint}").contains("s3cret"));
    }

    #[test]
    fn the_guest_login_and_clear_text_stay_on_this_machine() {
        assert!(sentence(read("amqp://broker.example")).contains("guest login"));
        assert!(sentence(read("amqp://app:s3cret@broker.example")).contains("clear text"));
        assert!(!sentence(read("amqp://app:s3cret@broker.example")).contains("s3cret"));
        assert!(read("amqp://app:s3cret@broker.example?allow_plaintext_remote=true").is_ok());
        assert!(read("amqp://broker.example?allow_plaintext_remote=true&allow_guest_remote=on").is_ok());
        assert!(read("amqp://127.8.0.1").is_ok());
        #[cfg(feature = "tls")]
        assert!(read("amqps://app:s3cret@broker.example").is_ok());
    }

    #[test]
    fn wrong_settings_are_refused_by_name() {
        for (query, expected) in [
            ("heartbeat=10", "duration with its unit"),
            ("heartbeat=100ms", "\"heartbeat\" is not valid"),
            ("channels=0", "\"channels\" is not valid"),
            ("queue_type=stream", "classic, quorum"),
            ("heartbeet=10s", "did you mean \"heartbeat\"?"),
            ("cert_file=a.pem", "\"key_file\" is not valid"),
            ("cert_file=a.pem&key_file=b.pem", "amqps://"),
        ] {
            let text = sentence(read(&format!("amqp://localhost?{query}")));
            assert!(text.contains(expected), "{query}: {text}");
        }
    }

    #[test]
    fn every_key_is_a_setting_and_every_setting_a_key() {
        // An unknown name makes serde list the known ones.
        let error = Settings::new().with("zzzzzzzzzzzz", "").parse::<AmqpConfig>(NAME).expect_err("unknown");
        let listed = error.message().split("known: ").nth(1).unwrap_or_default().replace(" in code", "");
        assert_eq!(listed.split(", ").collect::<Vec<_>>(), KEYS.iter().map(|key| key.name).collect::<Vec<_>>());
    }
}
