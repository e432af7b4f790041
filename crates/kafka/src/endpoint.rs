//! Where the settings lead, and as whom.

use polymq_core::{
    Error, ErrorKind, Result, Secret,
    config::{is_loopback, percent_decoded},
};
use url::Url;

use crate::{
    NAME,
    config::{KafkaConfig, Mechanism},
    error,
};

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
                .with_hint("add the feature \"kafka-tls\" of the crate polymq (\"tls\" of polymq-kafka)"));
        }
        for server in self.servers().split(',') {
            if server.contains('@') {
                return Err(error::config("a broker's address has an @ in it, expected host:port").with_hint(
                    "write user and password once, before the first host of the URL, or into user and pass",
                ));
            }
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

impl KafkaConfig {
    /// Where these settings lead, and as whom.
    pub(crate) fn endpoint(&self) -> Result<Endpoint> {
        let mut endpoint = match &self.url {
            Some(url) => self.read_url(url.expose())?,
            None => self.with_defaults(Endpoint::default()),
        };
        if let Some(path) = &self.pass_file {
            if endpoint.pass.is_some() {
                return Err(error::config("a password and \"pass_file\"").with_hint("give one of them"));
            }
            endpoint.pass = Some(Secret::read("pass_file", path).map_err(|error| error.with_backend(NAME))?);
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use polymq_core::Settings;

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
        let shown = sentence("kafka:///?servers=app:hush@one:9092");
        assert!(shown.contains("has an @ in it") && !shown.contains("hush"), "{shown}");
        assert!(sentence("kafka://app:secret@broker.example:9092").contains("clear text to \"broker.example\""));
        assert!(sentence("kafka://localhost?partitions=0").contains("expected 1 to 100000"));
        assert!(sentence("kafka://localhost?options=acks%3D0").contains("polymq's own"));
        assert!(sentence("kafka://localhost?hartbeat=1s").contains("heartbeat"));
        assert!(sentence("kafka://localhost?pass=x").contains("together with user"));
        for url in ["kafka://app:secret@broker.example:9092", "kafka://app:secret@localhost:9092/x"] {
            assert!(!sentence(url).contains("secret"));
        }
    }

    #[cfg(not(feature = "tls"))]
    #[test]
    fn tls_that_is_not_there_is_not_ignored() {
        let error = read("kafkas://localhost:9093").expect_err("not compiled in");
        assert_eq!(error.kind(), ErrorKind::NotCompiledIn);
    }
}
