//! How a sender reaches its server: over TCP, by way of the proxy that the environment names, with TLS.

use std::{
    fmt, io,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, Uri, header, uri::Scheme};
use http_body_util::{Empty, Full};
use hyper::{
    client::conn::http1,
    rt::{Read, ReadBufCursor, Write},
};
use hyper_util::{
    client::{
        legacy::{
            self,
            connect::{Connected, Connection, HttpConnector},
        },
        proxy::matcher::{Intercept, Matcher},
    },
    rt::TokioIo,
};
use polymq_core::Result;
use tokio::{net::TcpStream, time::timeout};
use tower_service::Service;

use crate::config::HttpConfig;

/// The client behind the producers of a connection: hyper's own, with its pool of connections.
pub type Client = legacy::Client<Connector, Full<Bytes>>;

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Connecting<T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send>>;

#[cfg(feature = "tls")]
type Secured = hyper_rustls::HttpsConnector<Route>;
#[cfg(not(feature = "tls"))]
type Secured = Route;

/// Makes the connections of a [`Client`], each within the setting `connect_timeout`.
#[derive(Debug, Clone)]
pub struct Connector {
    secured: Secured,
    limit: std::time::Duration,
}

impl Connector {
    pub(crate) fn new(config: &HttpConfig, proxies: Arc<Matcher>) -> Result<Self> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_keepalive(Some(config.heartbeat));
        tcp.set_connect_timeout(Some(config.connect_timeout));
        let route = Route { tcp, proxies };
        #[cfg(feature = "tls")]
        let route = hyper_rustls::HttpsConnector::from((route, crate::tls::client(config)?));
        Ok(Self { secured: route, limit: config.connect_timeout })
    }
}

impl Service<Uri> for Connector {
    type Response = <Secured as Service<Uri>>::Response;
    type Error = Failure;
    type Future = Connecting<Self::Response>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.secured.poll_ready(cx)
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let (connecting, limit) = (self.secured.call(server), self.limit);
        Box::pin(async move {
            let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("nobody was there within {limit:?}"));
            timeout(limit, connecting).await.map_err(late)?
        })
    }
}

/// The proxies that the environment names (`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY`, `NO_PROXY`), as curl reads them.
pub(crate) fn proxies() -> Arc<Matcher> {
    let named = ["NO_PROXY", "no_proxy"].into_iter().find_map(|name| std::env::var(name).ok());
    Arc::new(if named.is_some_and(|hosts| is_everything(&hosts)) {
        Matcher::builder().build()
    } else {
        Matcher::from_env()
    })
}

/// Whether no host has a proxy. The matcher takes the asterisk for names of hosts alone, and not for their addresses.
fn is_everything(no_proxy: &str) -> bool {
    no_proxy.split(',').any(|host| host.trim() == "*")
}

/// The proxy before a server. This machine is reached without any: to another one, a login for it must not go.
fn before(proxies: &Matcher, server: &Uri) -> Option<Intercept> {
    let host = server.host()?.trim_matches(['[', ']']);
    let is_here = match host.parse::<IpAddr>() {
        Ok(address) => address.is_loopback(),
        Err(_) => host == "localhost" || host.ends_with(".localhost"),
    };
    if is_here { None } else { proxies.intercept(server) }
}

/// What the proxy before a server without TLS is shown with each request; before one with TLS it sees none.
pub(crate) fn shown_to_proxy(proxies: &Matcher, server: &Uri) -> Option<HeaderValue> {
    let proxy = before(proxies, server).filter(|_| server.scheme() == Some(&Scheme::HTTP))?;
    let mut shown = proxy.basic_auth()?.clone();
    shown.set_sensitive(true);
    Some(shown)
}

/// To the server, or to the proxy before it.
#[derive(Clone)]
pub struct Route {
    tcp: HttpConnector,
    proxies: Arc<Matcher>,
}

impl Service<Uri> for Route {
    type Response = Reached;
    type Error = Failure;
    type Future = Connecting<Reached>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.tcp.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, server: Uri) -> Self::Future {
        let mut tcp = self.tcp.clone();
        let proxy = before(&self.proxies, &server);
        Box::pin(async move {
            let Some(proxy) = proxy else { return Ok(Reached { stream: tcp.call(server).await?, by_proxy: false }) };
            if proxy.uri().scheme() != Some(&Scheme::HTTP) {
                let scheme = proxy.uri().scheme_str().unwrap_or_default();
                return Err(format!("the environment names a proxy with {scheme}://, expected http://").into());
            }
            if server.scheme() == Some(&Scheme::HTTP) {
                return Ok(Reached { stream: tcp.call(proxy.uri().clone()).await?, by_proxy: true });
            }
            let stream = tcp.call(proxy.uri().clone()).await?;
            // What is at its end is the server itself.
            Ok(Reached { stream: tunnel(stream, &server, proxy.basic_auth()).await?, by_proxy: false })
        })
    }
}

impl fmt::Debug for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The matcher would show the proxies' passwords.
        f.debug_struct("Route").finish_non_exhaustive()
    }
}

/// Asks a proxy to pass on what follows (RFC 9110, section 9.3.6).
async fn tunnel(
    stream: TokioIo<TcpStream>,
    server: &Uri,
    login: Option<&HeaderValue>,
) -> Result<TokioIo<TcpStream>, Failure> {
    let place = format!("{}:{}", server.host().unwrap_or_default(), server.port_u16().unwrap_or(443));
    let mut asked = Request::connect(&place).header(header::HOST, &place).body(Empty::<Bytes>::new())?;
    if let Some(login) = login {
        let mut login = login.clone();
        login.set_sensitive(true);
        asked.headers_mut().insert(header::PROXY_AUTHORIZATION, login);
    }
    let (mut proxy, connection) = http1::handshake(stream).await?;
    // It ends with the answer, or when nobody waits for one any more.
    tokio::spawn(connection.with_upgrades());
    let answer = proxy.send_request(asked).await?;
    if !answer.status().is_success() {
        return Err(NoTunnel(answer.status()).into());
    }
    let opened = hyper::upgrade::on(answer).await?.downcast::<TokioIo<TcpStream>>();
    match opened {
        // The server says nothing before it is spoken to.
        Ok(parts) if parts.read_buf.is_empty() => Ok(parts.io),
        _ => Err("the proxy has said more than that it passes on what follows".into()),
    }
}

/// A proxy does not pass on what is meant for a server, and says so with this status.
#[derive(Debug)]
pub(crate) struct NoTunnel(pub(crate) StatusCode);

impl fmt::Display for NoTunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the proxy answered {}", self.0)
    }
}

impl std::error::Error for NoTunnel {}

/// A connection to whom a [`Route`] leads.
#[derive(Debug)]
pub struct Reached {
    stream: TokioIo<TcpStream>,
    /// Requests name their server: this is a proxy that sends them on (RFC 9112, section 3.2.2).
    by_proxy: bool,
}

impl Connection for Reached {
    fn connected(&self) -> Connected {
        self.stream.connected().proxy(self.by_proxy)
    }
}

impl Read for Reached {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl Write for Reached {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_reached_without_a_proxy_that_would_see_its_logins() {
        let proxies = Matcher::builder().all("http://agent:secret@proxy.example").build();
        let uri = |text: &str| text.parse::<Uri>().expect("a URI");
        for here in ["http://localhost/x", "http://127.0.0.1:1", "http://[::1]/", "http://a.localhost"].map(uri) {
            assert!(before(&proxies, &here).is_none() && shown_to_proxy(&proxies, &here).is_none(), "{here}");
        }
        for there in ["http://shop.example", "http://localhost.example", "http://10.0.0.1"].map(uri) {
            assert!(before(&proxies, &there).is_some() && shown_to_proxy(&proxies, &there).is_some(), "{there}");
        }
        let there = uri("https://shop.example");
        assert!(before(&proxies, &there).is_some() && shown_to_proxy(&proxies, &there).is_none());
    }

    #[test]
    fn an_asterisk_keeps_proxies_from_addresses_too() {
        assert!(is_everything("*") && is_everything("shop.example, *"));
        assert!(!is_everything("") && !is_everything("*.example,10.0.0.0/8"));
        let nobody = Matcher::builder().build();
        assert!(before(&nobody, &"http://10.0.0.1".parse().expect("a URI")).is_none());
    }

    /// What a proxy that answers like this is asked, and then hears; and what its sender is told.
    #[cfg(feature = "tls")]
    async fn by_way_of(answer: &'static str) -> (String, Option<u8>, polymq_core::Error) {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let proxy = format!("http://agent:s3cret@{}", listener.local_addr().expect("an address"));
        let serving = tokio::spawn(async move {
            let (mut client, _) = listener.accept().await.expect("a connection");
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                asked.push(client.read_u8().await.expect("a request"));
            }
            client.write_all(answer.as_bytes()).await.expect("written");
            (String::from_utf8_lossy(&asked).into_owned(), client.read_u8().await.ok())
        });
        let connector = Connector::new(&HttpConfig::default(), Arc::new(Matcher::builder().all(proxy).build()));
        let executor = hyper_util::rt::TokioExecutor::new();
        let client: Client = legacy::Client::builder(executor).build(connector.expect("a connector"));
        let request = Request::post("https://shop.example/orders").body(Full::default()).expect("a request");
        let error = crate::error::native(client.request(request).await.expect_err("no server is there"));
        let (asked, heard) = serving.await.expect("no panic");
        (asked, heard, error)
    }

    #[cfg(feature = "tls")]
    #[tokio::test]
    async fn a_proxy_that_opens_no_way_says_why() {
        use polymq_core::{ErrorKind, Retry};
        for (status, kind, retry) in [
            ("407 Proxy Authentication Required", ErrorKind::Unauthenticated, Retry::Never),
            ("403 Forbidden", ErrorKind::PermissionDenied, Retry::Never),
            ("502 Bad Gateway", ErrorKind::Disconnected, Retry::Now),
        ] {
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
            let (asked, heard, error) = by_way_of(answer.leak()).await;
            assert!(asked.starts_with("CONNECT shop.example:443 HTTP/1.1\r\n"), "{asked}");
            assert!(asked.contains("proxy-authorization: Basic YWdlbnQ6czNjcmV0\r\n"), "{asked}");
            assert_eq!((error.kind(), error.retry(), heard), (kind, retry, None), "{error:?}");
            assert!(error.to_string().contains(status) && !format!("{error:?}").contains("s3cret"), "{error:?}");
        }
        let (_, heard, _) = by_way_of("HTTP/1.1 200 Connection established\r\n\r\n").await;
        assert_eq!(heard, Some(22), "TLS begins");
    }
}
