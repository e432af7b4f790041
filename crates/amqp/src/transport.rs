//! The socket under the client library: plain, or TLS with rustls.
//!
//! The client library has TLS of its own, which brings 72 crates (PKCS #12 among them) where these few do.

use std::{
    future::Future,
    io::{self, Read, Write},
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use async_rs::{
    Runtime, Tokio,
    traits::{Executor, Reactor, RuntimeKit},
    util::Task,
};
use futures_util::{AsyncRead, AsyncWrite, Stream, task::AtomicWaker};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties, uri::AMQPUri};
use tokio::net::TcpStream;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

/// A socket to the broker, and what ends it. Not bounded.
pub(crate) async fn open(uri: &AMQPUri, tls: Option<Tls>) -> io::Result<(Socket, Abort)> {
    let host = uri.authority.host.as_str();
    let stream = TcpStream::connect((host, uri.authority.port)).await?;
    stream.set_nodelay(true)?;
    let inner = match tls {
        None => Inner::Plain(stream.compat()),
        #[cfg(feature = "tls")]
        Some(tls) => Inner::Tls(Box::new(tls.handshake(host, stream).await?.compat())),
        #[cfg(not(feature = "tls"))]
        Some(never) => match never.0 {},
    };
    let abort = Abort::default();
    Ok((Socket { inner, abort: abort.clone() }, abort))
}

/// Logs in over a socket, on the runtime that this is called from. Not bounded; whoever stops waiting must
/// [abort](Abort::abort) the socket.
///
/// The client library could open the socket itself. But it starts a task and a thread before, and does not end the
/// task when the broker is not there: an outage of a day would leak thousands.
pub(crate) async fn login(socket: Socket, uri: AMQPUri, properties: ConnectionProperties) -> lapin::Result<Connection> {
    let socket = Mutex::new(Some(socket));
    let take = async move |_: AMQPUri, _: Runtime<Kit>| {
        let socket = socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It asks once, because its own retries are off.
        Ok(AsyncTcpStream::Plain(socket.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?))
    };
    Connection::connector(uri, Runtime::new(Kit(Tokio::current())), take, properties).await
}

/// What is needed to trust a broker, and to be trusted by it.
#[cfg(not(feature = "tls"))]
#[derive(Debug, Clone)]
pub(crate) struct Tls(std::convert::Infallible);

#[cfg(feature = "tls")]
pub(crate) use self::tls::Tls;

#[cfg(feature = "tls")]
mod tls {
    use std::{fmt, io, path::Path, sync::Arc};

    use polymq_core::{Error, ErrorKind, Result};
    use tokio::net::TcpStream;
    use tokio_rustls::{
        TlsConnector,
        client::TlsStream,
        rustls::{
            ClientConfig, RootCertStore,
            crypto::ring,
            pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
        },
    };

    use crate::{NAME, config::AmqpConfig};

    /// What is needed to trust a broker, and to be trusted by it.
    #[derive(Clone)]
    pub(crate) struct Tls(TlsConnector);

    impl Tls {
        /// Reads certificates and keys; blocks on files.
        pub(crate) fn load(config: &AmqpConfig) -> Result<Self> {
            let mut roots = RootCertStore::empty();
            // A system without certificates, or with a broken one, is no reason to refuse the given authority.
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if let Some(path) = &config.ca_file {
                for certificate in certificates("ca_file", path)? {
                    roots.add(certificate).map_err(|error| unusable("ca_file", path, error))?;
                }
            }
            let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
                .with_safe_default_protocol_versions()
                .map_err(|error| Error::new(ErrorKind::Config, format!("TLS: {error}")).with_backend(NAME))?
                .with_root_certificates(roots);
            let config = match (&config.cert_file, &config.key_file) {
                (Some(cert), Some(key)) => {
                    let chain = certificates("cert_file", cert)?;
                    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable("key_file", key, error))?;
                    let given = builder.with_client_auth_cert(chain, secret);
                    given.map_err(|error| unusable("key_file", key, error))?
                }
                _ => builder.with_no_client_auth(),
            };
            Ok(Self(TlsConnector::from(Arc::new(config))))
        }

        pub(super) async fn handshake(&self, host: &str, stream: TcpStream) -> io::Result<TlsStream<TcpStream>> {
            let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
            self.0.connect(name, stream).await
        }
    }

    fn certificates(setting: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>> {
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
        match read {
            Ok(certificates) if certificates.is_empty() => Err(unusable(setting, path, "it holds no certificate")),
            read => read.map_err(|error| unusable(setting, path, error)),
        }
    }

    #[cold]
    fn unusable(setting: &str, path: &Path, reason: impl fmt::Display) -> Error {
        Error::new(ErrorKind::Config, format!("setting {setting:?}: {path:?} is not usable: {reason}"))
            .with_backend(NAME)
            .with_hint("give the path of a PEM file that this process may read")
    }

    impl fmt::Debug for Tls {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("Tls")
        }
    }
}

/// Ends a socket from outside: the thread of the client library that waits for it has no other end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Abort(Arc<(AtomicBool, AtomicWaker)>);

impl Abort {
    pub(crate) fn abort(&self) {
        self.0.0.store(true, Ordering::Release);
        self.0.1.wake();
    }
}

/// A connected socket.
pub(crate) struct Socket {
    inner: Inner,
    abort: Abort,
}

enum Inner {
    Plain(Compat<TcpStream>),
    #[cfg(feature = "tls")]
    Tls(Box<Compat<tokio_rustls::client::TlsStream<TcpStream>>>),
}

macro_rules! delegate {
    ($self:ident, $method:ident $(, $argument:expr)*) => {
        match &mut $self.get_mut().inner {
            Inner::Plain(stream) => Pin::new(stream).$method($($argument),*),
            #[cfg(feature = "tls")]
            Inner::Tls(stream) => Pin::new(stream.as_mut()).$method($($argument),*),
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let abort = &self.abort.0;
        abort.1.register(cx.waker());
        if abort.0.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        delegate!(self, poll_read, cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, poll_write, cx, buffer)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, poll_write_vectored, cx, buffers)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_flush, cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_close, cx)
    }
}

/// Tokio, as the client library wants it, with our socket.
#[derive(Debug, Clone)]
struct Kit(Tokio);

impl RuntimeKit for Kit {}

impl Executor for Kit {
    type Task<T: Send + 'static> = <Tokio as Executor>::Task<T>;

    fn block_on<T, F: Future<Output = T>>(&self, future: F) -> T {
        self.0.block_on(future)
    }

    fn spawn<T: Send + 'static, F: Future<Output = T> + Send + 'static>(&self, future: F) -> Task<Self::Task<T>> {
        self.0.spawn(future)
    }

    fn spawn_blocking<T: Send + 'static, F: FnOnce() -> T + Send + 'static>(&self, run: F) -> Task<Self::Task<T>> {
        self.0.spawn_blocking(run)
    }
}

impl Reactor for Kit {
    type TcpStream = Socket;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + Send + 'static>(
        &self,
        _: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        // Ours are opened before the client library hears of them.
        Err::<Socket, _>(io::ErrorKind::Unsupported.into())
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    fn tcp_connect_addr(&self, _: SocketAddr) -> impl Future<Output = io::Result<Socket>> + Send + 'static {
        // Ours are opened before the client library hears of them.
        std::future::ready(Err(io::ErrorKind::Unsupported.into()))
    }
}
