//! The settings of this backend, and the place that they lead to.

use std::{path::PathBuf, time::Duration};

use polymq_core::{
    Error, ErrorKind, Key, Result, Secret, Settings,
    config::{duration, is_loopback, percent_decoded},
};
use serde::Deserialize;
use url::Url;

use crate::{NAME, topology};

/// Every setting, as [`Backend::keys`](polymq_core::Backend::keys) tells them.
pub const KEYS: &[Key] = &[
    key("url", "mqtt://localhost:1883", "where the broker is: mqtt:// or mqtts://user:password@host:port"),
    key("host", "localhost", "the host, where no URL is given"),
    key("port", "1883, or 8883 with TLS", "the port, where the URL names none"),
    key("user", "", "the user, where the URL names none"),
    key("pass", "", "the password, where the URL names none"),
    key("pass_file", "", "a file with the password, read again at every connect, so that it may be rotated"),
    key("protocol", "5", "5 or 3.1.1; 3.1.1 carries the body and nothing beside it"),
    key("client_id", "unique", "client id of the sending connection; two connections must not share one"),
    key("session", "polymq", "prefix of the durable sessions; programs that share queues must agree on it"),
    key("session_expiry", "7days", "how long the broker keeps a queue's session that nobody connects to"),
    key("control", "$polymq", "prefix of the topics on which consumers agree who takes which session"),
    key("share", "polymq", "name of the shared subscription behind queues"),
    key("qos", "1", "quality of service of what is sent: 0 (not confirmed), 1 or 2"),
    key("retain", "false", "whether the broker keeps the last message of a topic for new subscribers"),
    key("keep_alive", "20s", "a connection that is silent for one and a half of this is given up; whole seconds"),
    key("connect_timeout", "10s", "bound of one attempt to connect"),
    key("connect_retry", "false", "keep trying when the very first attempt to connect fails"),
    key("reconnect_initial", "100ms", "wait before the second attempt to reconnect; doubles, with jitter"),
    key("reconnect_max", "10s", "longest wait between attempts to reconnect"),
    key("reconnect_limit", "0", "give up after this many failed attempts in a row; 0 never gives up"),
    key("operation_timeout", "10s", "bound of a subscription, a declaration, a ping and of each step of closing"),
    key("receive_maximum", "65535", "most messages the broker may lend one connection, whatever the prefetch"),
    key("max_payload", "16777216", "largest body in bytes"),
    key("allow_plaintext_remote", "false", "allow credentials without TLS to a host that is not this one"),
    key("ca_file", "", "PEM file of the authority that signed the broker's certificate, besides the system's"),
    key("cert_file", "", "PEM file of this client's certificate"),
    key("key_file", "", "PEM file of this client's key"),
    key("tls_min", "1.2", "the oldest version of TLS that is spoken: 1.2 or 1.3"),
];

const fn key(name: &'static str, default: &'static str, help: &'static str) -> Key {
    Key { name, default, help }
}

/// Settings of the backend; [`KEYS`] explains each.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(missing_docs)] // KEYS says it once, for the command line and the docs too
pub struct MqttConfig {
    pub url: Option<Secret>,
    pub host: Option<String>,
    pub port: Option<u16>,
    pub user: Option<String>,
    pub pass: Option<Secret>,
    pub pass_file: Option<PathBuf>,
    pub protocol: Protocol,
    pub client_id: Option<String>,
    pub session: String,
    #[serde(with = "duration")]
    pub session_expiry: Duration,
    pub control: String,
    pub share: String,
    pub qos: u8,
    pub retain: bool,
    #[serde(with = "duration")]
    pub keep_alive: Duration,
    #[serde(with = "duration")]
    pub connect_timeout: Duration,
    pub connect_retry: bool,
    #[serde(with = "duration")]
    pub reconnect_initial: Duration,
    #[serde(with = "duration")]
    pub reconnect_max: Duration,
    pub reconnect_limit: u32,
    #[serde(with = "duration")]
    pub operation_timeout: Duration,
    pub receive_maximum: u16,
    pub max_payload: usize,
    pub allow_plaintext_remote: bool,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    pub tls_min: TlsVersion,
}

impl Default for MqttConfig {
    fn default() -> Self {
        Self {
            url: None,
            host: None,
            port: None,
            user: None,
            pass: None,
            pass_file: None,
            protocol: Protocol::V5,
            client_id: None,
            session: "polymq".into(),
            // Too short, and the messages of a queue whose service is down for a long weekend are gone; the
            // broker's own bound (mosquitto: persistent_client_expiration) may be shorter.
            session_expiry: Duration::from_secs(7 * 24 * 3600),
            control: "$polymq".into(),
            share: "polymq".into(),
            qos: 1,
            retain: false,
            // A black hole is found within 30 s; below 5 s, a busy machine looks dead.
            keep_alive: Duration::from_secs(20),
            connect_timeout: Duration::from_secs(10),
            connect_retry: false,
            reconnect_initial: Duration::from_millis(100),
            reconnect_max: Duration::from_secs(10),
            reconnect_limit: 0,
            operation_timeout: Duration::from_secs(10),
            receive_maximum: u16::MAX,
            // The protocol ends at 256 MiB and mosquitto has no bound of its own; brokers in the cloud take
            // between 128 KiB and 16 MiB.
            max_payload: 16 * 1024 * 1024,
            allow_plaintext_remote: false,
            ca_file: None,
            cert_file: None,
            key_file: None,
            tls_min: TlsVersion::V12,
        }
    }
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

/// The version of MQTT that is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Protocol {
    /// MQTT 5.
    #[serde(rename = "5")]
    V5,
    /// MQTT 3.1.1.
    #[serde(rename = "3.1.1")]
    V311,
}

impl MqttConfig {
    /// Reads and checks settings; no connection is made.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the key and the expectation, [`ErrorKind::NotCompiledIn`] for `mqtts`
    /// without the feature `tls`.
    pub fn parse(settings: &Settings) -> Result<Self> {
        let config: Self = settings.parse(NAME)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let plain = |text: &str| topology::check_name(text).is_ok() && !text.contains(['+', '#']);
        let rules: [(&str, bool, &str); 13] = [
            ("qos", self.qos <= 2, "expected 0, 1 or 2"),
            ("keep_alive", (1..=65_535).contains(&self.keep_alive.as_secs()), "expected 1s to 65535s"),
            ("connect_timeout", !self.connect_timeout.is_zero(), "expected more than nothing"),
            ("operation_timeout", !self.operation_timeout.is_zero(), "expected more than nothing"),
            ("reconnect_initial", !self.reconnect_initial.is_zero(), "expected more than nothing"),
            ("reconnect_max", self.reconnect_max >= self.reconnect_initial, "expected at least reconnect_initial"),
            ("receive_maximum", self.receive_maximum > 0, "expected 1 to 65535"),
            // 256 MiB is the protocol's bound of a packet; the rest of it is for names and properties.
            ("max_payload", (1..=255 << 20).contains(&self.max_payload), "expected 1 to 267386880 bytes"),
            ("session", plain(&self.session), "expected a name without + and #"),
            ("share", plain(&self.share) && !self.share.contains('/'), "expected a name without +, # and /"),
            ("control", plain(self.control.trim_start_matches('$')), "expected a topic without + and #"),
            ("client_id", self.client_id.as_deref().is_none_or(plain), "expected a name without + and #"),
            ("key_file", self.key_file.is_some() == self.cert_file.is_some(), "expected together with cert_file"),
        ];
        if let Some((key, _, expected)) = rules.iter().find(|(_, holds, _)| !holds) {
            return Err(config(format!("setting {key:?} is not valid, {expected}")));
        }
        let endpoint = self.endpoint()?;
        if !endpoint.tls && (self.cert_file.is_some() || self.ca_file.is_some()) {
            return Err(config("certificates have no effect without TLS").with_hint("use an mqtts:// URL"));
        }
        Ok(())
    }

    /// Where these settings lead, and as whom.
    pub(crate) fn endpoint(&self) -> Result<Endpoint> {
        let mut endpoint = match &self.url {
            Some(url) => Endpoint::from_url(url.expose())?,
            None => Endpoint::default(),
        };
        // What the URL says is whole: keys only fill what it leaves out, so that a stray MQTT_HOST cannot redirect it.
        endpoint.host = endpoint.host.or_else(|| self.host.clone());
        endpoint.port = endpoint.port.or(self.port);
        endpoint.user = endpoint.user.or_else(|| self.user.clone());
        endpoint.pass = endpoint.pass.or_else(|| self.pass.clone());
        if let Some(path) = &self.pass_file {
            if endpoint.pass.is_some() || self.pass.is_some() {
                return Err(config("a password and \"pass_file\"").with_hint("give one of them"));
            }
            endpoint.pass = Some(Secret::read("pass_file", path).map_err(|error| error.with_backend(NAME))?);
        }
        endpoint.check(self)?;
        Ok(endpoint)
    }

    /// Options of the native client for this broker and login, for what polymq does not offer: a connection of
    /// your own beside polymq's.
    ///
    /// ```
    /// use polymq_core::Settings;
    /// use polymq_mqtt::{MqttConfig, rumqttc::v5::AsyncClient};
    ///
    /// let config = MqttConfig::parse(&Settings::from_url("mqtt://localhost")?)?;
    /// let (client, eventloop) = AsyncClient::new(config.native_options("my-own-client")?, 10);
    /// # drop((client, eventloop));
    /// # Ok::<(), polymq_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::Config`] as [`MqttConfig::parse`], and when a certificate file cannot be read.
    pub fn native_options(&self, client_id: &str) -> Result<rumqttc::v5::MqttOptions> {
        let endpoint = self.endpoint()?;
        let mut options = rumqttc::v5::MqttOptions::new(client_id, endpoint.host(), endpoint.port());
        options.set_keep_alive(self.keep_alive);
        options.set_connection_timeout(self.connect_timeout.as_secs().max(1));
        if let Some((user, pass)) = endpoint.login() {
            options.set_credentials(user, pass);
        }
        #[cfg(feature = "tls")]
        if endpoint.tls {
            let tls = std::sync::Arc::unwrap_or_clone(crate::wire::tls_config(self)?);
            options.set_transport(rumqttc::Transport::tls_with_config(tls.into()));
        }
        Ok(options)
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
}

impl Endpoint {
    fn from_url(text: &str) -> Result<Self> {
        let invalid = || {
            config("setting \"url\" is not valid, expected mqtt:// or mqtts://user:password@host:port")
                .with_hint("write special characters in user and password as %XX")
        };
        let url = Url::parse(text).map_err(|_| invalid())?;
        let decode = |text: &str| percent_decoded(text).ok_or_else(invalid);
        if !matches!(url.scheme(), "mqtt" | "mqtts") || !matches!(url.path(), "" | "/") || url.fragment().is_some() {
            return Err(invalid());
        }
        let host = match url.host() {
            Some(url::Host::Ipv6(address)) => Some(address.to_string()),
            Some(host) => Some(host.to_string()).filter(|host| !host.is_empty()),
            None => None,
        };
        let user = Some(decode(url.username())?).filter(|user| !user.is_empty());
        let pass = url.password().map(decode).transpose()?.map(Secret::new);
        Ok(Self { tls: url.scheme() == "mqtts", host, port: url.port(), user, pass })
    }

    fn check(&self, settings: &MqttConfig) -> Result<()> {
        if self.tls && !cfg!(feature = "tls") {
            return Err(Error::new(ErrorKind::NotCompiledIn, "mqtts needs TLS, which is not compiled in")
                .with_backend(NAME)
                .with_hint("add the feature \"tls\" of polymq-mqtt"));
        }
        if self.user.is_none() && self.pass.as_ref().is_some_and(|pass| !pass.is_empty()) {
            return Err(config("a password without a user").with_hint("set the user too"));
        }
        let clear = !self.tls && self.login().is_some() && !is_loopback(self.host());
        if clear && !settings.allow_plaintext_remote {
            return Err(config(format!("credentials would travel in clear text to {:?}", self.host()))
                .with_hint("use an mqtts:// URL, or set allow_plaintext_remote=true for a network that you trust"));
        }
        Ok(())
    }

    pub(crate) fn host(&self) -> &str {
        self.host.as_deref().unwrap_or("localhost")
    }

    pub(crate) fn port(&self) -> u16 {
        self.port.unwrap_or(if self.tls { 8883 } else { 1883 })
    }

    /// User and password, where there are any; the only place where the password leaves its wrapper.
    pub(crate) fn login(&self) -> Option<(&str, &str)> {
        let user = self.user.as_deref().filter(|user| !user.is_empty())?;
        Some((user, self.pass.as_ref().map_or("", Secret::expose)))
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.host(), self.port())
    }
}

#[cold]
pub(crate) fn config(sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, sentence).with_backend(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Result<Endpoint> {
        MqttConfig::parse(&Settings::from_url(url)?)?.endpoint()
    }

    #[test]
    fn a_url_is_taken_apart() {
        let endpoint = read("mqtt://us%40er:p%2Fss@127.0.0.1:1884").expect("valid");
        assert_eq!(endpoint.to_string(), "127.0.0.1:1884");
        assert_eq!(endpoint.login(), Some(("us@er", "p/ss")));
        assert_eq!(read("mqtt://localhost/").expect("valid").port(), 1883);
        assert_eq!(read("mqtt://[::1]:9").expect("valid").host(), "::1");
        #[cfg(feature = "tls")]
        assert_eq!(read("mqtts://broker.example").expect("valid").port(), 8883);
        for wrong in ["mqtt://localhost/topic", "http://localhost"] {
            assert_eq!(read(wrong).expect_err(wrong).kind(), ErrorKind::Config);
        }
    }

    #[test]
    fn keys_fill_what_the_url_leaves_out_and_no_more() {
        let settings =
            Settings::from_url("mqtt://127.0.0.1").expect("a URL").with("host", "elsewhere").with("port", "7");
        let endpoint = MqttConfig::parse(&settings.with("user", "app").with("pass", "x")).expect("valid").endpoint();
        let endpoint = endpoint.expect("valid");
        assert_eq!((endpoint.to_string().as_str(), endpoint.login()), ("127.0.0.1:7", Some(("app", "x"))));
    }

    #[test]
    fn a_password_beside_the_url_belongs_to_the_user_in_it() {
        let settings = |url: &str| Settings::from_url(url).expect("a URL").with("pass", "x");
        let login = |url: &str, user: Option<&str>| {
            let settings = user.iter().fold(settings(url), |settings, user| settings.with("user", *user));
            let endpoint = MqttConfig::parse(&settings).expect("valid").endpoint().expect("valid");
            endpoint.login().map(|(user, pass)| (user.to_owned(), pass.to_owned()))
        };
        let pair = |user: &str, pass: &str| Some((user.to_owned(), pass.to_owned()));
        assert_eq!(login("mqtt://app@localhost", None), pair("app", "x"));
        assert_eq!(login("mqtt://app@localhost", Some("other")), pair("app", "x"));
        assert_eq!(login("mqtt://app:own@localhost", Some("other")), pair("app", "own"));
        assert_eq!(login("mqtt://localhost", Some("other")), pair("other", "x"));
        let error = MqttConfig::parse(&settings("mqtt://localhost")).expect_err("whose password?");
        assert!(error.to_string().contains("password without a user"), "{error}");
    }

    #[test]
    fn variables_of_other_programs_reach_the_endpoint() {
        let endpoint = |variables: &[(&str, &str)]| {
            let environment = variables.iter().copied().collect();
            let mut settings = Settings::new();
            settings.read_environment(&crate::MqttBackend, &environment).expect("readable");
            MqttConfig::parse(&settings).expect("valid").endpoint().expect("valid")
        };
        let (host, port) = (("MQTT_HOST", "127.0.0.1"), ("MQTT_PORT", "7"));
        let login = [("MQTT_USERNAME", "app"), ("MQTT_PASSWORD", "x")];
        for (variables, place, user) in [
            (&[][..], "localhost:1883", None),
            (&[("MQTT_URL", "mqtt://127.0.0.2:5")], "127.0.0.2:5", None),
            (&[("MQTT_URI", "mqtt://app:x@127.0.0.2:5")], "127.0.0.2:5", Some(("app", "x"))),
            (&[host], "127.0.0.1:1883", None),
            (&[port], "localhost:7", None),
            (&[host, port, login[0], login[1]], "127.0.0.1:7", Some(("app", "x"))),
            (&[("MQTT_URI", "mqtt://app@127.0.0.2"), host, login[1]], "127.0.0.2:1883", Some(("app", "x"))),
            (&[("POLYMQ_MQTT_HOST", "127.0.0.3"), host], "127.0.0.3:1883", None),
        ] {
            let endpoint = endpoint(variables);
            assert_eq!((endpoint.to_string().as_str(), endpoint.login()), (place, user), "{variables:?}");
        }
        let documented = ["MQTT_HOST", "MQTT_PASSWORD", "MQTT_PORT", "MQTT_URI", "MQTT_URL", "MQTT_USERNAME"];
        let mut known: Vec<_> = polymq_core::Backend::foreign_variables(&crate::MqttBackend)
            .iter()
            .map(|(variable, _)| *variable)
            .collect();
        known.sort_unstable();
        assert_eq!(known, documented, "each is tried above");
    }

    #[test]
    fn documented_defaults_are_the_defaults() {
        // These are `None` in the struct: what they mean is found where they are used.
        let elsewhere = ["url", "host", "port", "client_id"];
        let keys = KEYS.iter().filter(|key| !key.default.is_empty() && !elsewhere.contains(&key.name));
        let documented = keys.fold(Settings::new(), |settings, key| settings.with(key.name, key.default));
        let documented = MqttConfig::parse(&documented).expect("valid");
        assert_eq!(format!("{documented:?}"), format!("{:?}", MqttConfig::default()));
        let default = |name: &str| KEYS.iter().find(|key| key.name == name).expect("documented").default;
        let endpoint = MqttConfig::default().endpoint().expect("valid");
        assert_eq!((endpoint.host(), default("url")), (default("host"), &*format!("mqtt://{endpoint}")));
        assert_eq!(read(default("url")).expect("valid").to_string(), endpoint.to_string());
        let tls = Endpoint { tls: true, ..Endpoint::default() };
        assert_eq!(default("port"), format!("{}, or {} with TLS", endpoint.port(), tls.port()));
        for key in KEYS.iter().filter(|key| key.default.is_empty()) {
            assert!(format!("{:?}", MqttConfig::default()).contains(&format!("{}: None", key.name)), "{}", key.name);
        }
    }

    #[test]
    fn clear_text_credentials_stay_on_this_machine() {
        let error = read("mqtt://app:hunter2@broker.example").expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("clear text") && error.to_string().contains("allow_plaintext_remote"));
        assert!(!format!("{error:?}").contains("hunter2"));
        read("mqtt://app:hunter2@broker.example?allow_plaintext_remote=true").expect("allowed by name");
        read("mqtt://broker.example").expect("nothing secret travels");
        read("mqtt://app:hunter2@localhost").expect("stays here");
    }

    #[test]
    fn wrong_settings_are_named() {
        for (key, value) in [
            ("qos", "3"),
            ("keep_alive", "100ms"),
            ("protocol", "4"),
            ("share", "a/b"),
            ("session", "a+b"),
            ("max_payload", "0"),
            ("receive_maximum", "0"),
            ("key_file", "k.pem"),
            ("keepalive", "20s"),
        ] {
            let error = MqttConfig::parse(&Settings::new().with(key, value)).expect_err(key);
            assert_eq!(error.kind(), ErrorKind::Config, "{key}");
            assert!(error.to_string().contains(key), "{error}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let settings = Settings::from_url("mqtt://app:hunter2@localhost").expect("a URL").with("pass", "hunter3");
        let config = MqttConfig::parse(&settings).expect("valid");
        let shown = format!("{config:?} {:?}", config.endpoint());
        assert!(!shown.contains("hunter"), "{shown}");
    }

    #[test]
    fn every_setting_is_documented() {
        let mut settings = Settings::new();
        settings.set("no_such_key", "", polymq_core::config::Origin::Code);
        let error = MqttConfig::parse(&settings).expect_err("unknown").to_string();
        let known: Vec<_> =
            error.split("known: ").nth(1).expect("a list").split([',', ' ']).filter(|w| !w.is_empty()).collect();
        let documented: Vec<_> = KEYS.iter().map(|key| key.name).collect();
        for name in &documented {
            assert!(known.contains(name), "{name} is documented and unknown: {error}");
        }
        assert_eq!(known.iter().filter(|word| **word != "in" && **word != "code").count(), documented.len());
    }
}
