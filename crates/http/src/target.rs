//! Where messages are sent, and where consumers listen.

use std::{fmt, net::IpAddr};

use polymq_core::{Address, Error, ErrorKind, Result, config::redact_url};
use url::Url;

use crate::{
    NAME,
    config::{HttpConfig, refuse},
};

/// A base URL; the name of a channel is added to its path.
#[derive(Clone)]
pub(crate) struct Target(Url);

impl Target {
    /// An address of the settings, which is shown the token.
    pub(crate) fn parse(text: &str, config: &HttpConfig) -> Result<Self> {
        let target = Self::read(text)?;
        target.check_clear_text(config.has_token(), config)?;
        Ok(target)
    }

    fn read(text: &str) -> Result<Self> {
        let invalid = || {
            refuse(format!(
                "{:?} is no address to send to, expected http:// or https://host:port/path",
                redact_url(text)
            ))
        };
        let url = Url::parse(text).map_err(|_| invalid())?;
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() || url.fragment().is_some() {
            return Err(invalid());
        }
        if url.scheme() == "https" && !cfg!(feature = "tls") {
            return Err(Error::new(ErrorKind::NotCompiledIn, "https needs TLS, which is not compiled in")
                .with_backend(NAME)
                .with_hint("add the feature \"tls\" of polymq-http"));
        }
        Ok(Self(url))
    }

    fn check_clear_text(&self, shows_token: bool, config: &HttpConfig) -> Result<()> {
        let Self(url) = self;
        // A key alone, as the user, is a login too.
        let secret = !url.username().is_empty() || url.password().is_some() || shows_token;
        if secret && url.scheme() == "http" && !is_local(url) && !config.allow_plaintext_remote {
            return Err(refuse(format!(
                "credentials would travel in clear text to {:?}",
                url.host_str().unwrap_or("")
            ))
            .with_hint("use an https:// URL, or set allow_plaintext_remote=true for a network that you trust"));
        }
        Ok(())
    }

    /// The URL itself.
    pub(crate) fn url(&self) -> Url {
        self.0.clone()
    }

    /// The URL of a channel.
    pub(crate) fn of(&self, address: &Address) -> Url {
        let mut url = self.0.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            // Each segment is percent-encoded; nothing in a name can become another URL's part.
            path.pop_if_empty().extend(address.name().split('/'));
        }
        url
    }

    /// The URL that an option of a channel names: whole, or a path at the same server.
    pub(crate) fn endpoint(&self, text: &str, config: &HttpConfig) -> Result<Url> {
        if !text.starts_with('/') {
            let target = Self::read(text)?;
            target.check_clear_text(config.shows_token_to(&target.0)?, config)?;
            return Ok(target.0);
        }
        let joined =
            self.0.join(text).map_err(|_| refuse(format!("the endpoint {:?} is no path", redact_url(text))))?;
        Ok(joined)
    }

    /// Without an address of their own, consumers listen where messages are sent.
    pub(crate) fn listen(&self) -> Listen {
        Listen {
            host: self.0.host_str().unwrap_or("localhost").trim_matches(['[', ']']).to_owned(),
            port: self.0.port_or_known_default().unwrap_or(80),
            path: decoded(self.0.path()),
        }
    }
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&redact_url(self.0.as_str()))
    }
}

fn is_local(url: &Url) -> bool {
    match url.host() {
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        None => false,
    }
}

/// A place to listen at, and the path below which the channels are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Listen {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Decoded, without a slash at its end.
    path: String,
}

impl Listen {
    pub(crate) fn parse(text: &str) -> Result<Self> {
        let invalid = || {
            let text = redact_url(text);
            refuse(format!("{text:?} is no address to listen at, expected host:port or host:port/path"))
        };
        let (authority, path) = text.find('/').map_or((text, ""), |at| text.split_at(at));
        let (host, port) = authority.rsplit_once(':').ok_or_else(invalid)?;
        let port = port.parse().map_err(|_| invalid())?;
        let host = host.trim_matches(['[', ']']);
        if host.is_empty() {
            return Err(invalid());
        }
        Ok(Self { host: host.to_owned(), port, path: decoded(path) })
    }

    /// The path of a channel, decoded.
    pub(crate) fn path_of(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }
}

fn decoded(path: &str) -> String {
    percent_encoding::percent_decode_str(path.trim_end_matches('/')).decode_utf8_lossy().into_owned()
}

/// Refuses names that clients and proxies rewrite on the way.
pub(crate) fn check_name(address: &Address) -> Result<()> {
    match address.name().split('/').find(|segment| matches!(*segment, "" | "." | "..")) {
        Some(segment) => Err(Error::new(
            ErrorKind::InvalidInput,
            format!(
                "the name {:?} has the part {segment:?} between slashes, which is no part of a path",
                address.name()
            ),
        )
        .with_backend(NAME)
        .with_hint("use parts that are not empty and no dots alone")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_part_of_the_path_and_nothing_else() {
        let target = Target::parse("http://h:1/base/", &HttpConfig::default()).expect("valid");
        for (name, url) in [
            ("orders", "http://h:1/base/orders"),
            ("a/b", "http://h:1/base/a/b"),
            ("a b?x#y", "http://h:1/base/a%20b%3Fx%23y"),
            ("%2e", "http://h:1/base/%252e"),
            ("ä", "http://h:1/base/%C3%A4"),
        ] {
            assert_eq!(target.of(&Address::queue(name)).as_str(), url);
        }
        for name in ["..", "a/../b", "/a", "a//b", "a/", "."] {
            assert!(check_name(&Address::queue(name)).is_err(), "{name}");
        }
        assert!(check_name(&Address::queue("a.b/c..d")).is_ok());
    }

    #[test]
    fn an_endpoint_is_a_url_or_a_path() {
        let (config, target) = (HttpConfig::default(), |text| Target::parse(text, &HttpConfig::default()));
        let base = target("http://h:1/base").expect("valid");
        assert_eq!(base.endpoint("/x/y?z=1", &config).expect("valid").as_str(), "http://h:1/x/y?z=1");
        assert_eq!(base.endpoint("http://other/x", &config).expect("valid").as_str(), "http://other/x");
        assert!(base.endpoint("other", &config).is_err());
    }

    #[test]
    fn consumers_listen_where_messages_are_sent_unless_told_otherwise() {
        let config = HttpConfig::default();
        let listen = Target::parse("http://[::1]:81/in/", &config).expect("valid").listen();
        assert_eq!((listen.host.as_str(), listen.port, listen.path_of("a/b").as_str()), ("::1", 81, "/in/a/b"));
        assert_eq!(Listen::parse("[::1]:81/in").expect("valid"), listen);
        assert_eq!(Listen::parse("0.0.0.0:0").expect("valid").path_of("q"), "/q");
        for text in ["", "host", ":1", "host:x", "host:99999"] {
            assert!(Listen::parse(text).is_err(), "{text}");
        }
    }
}
