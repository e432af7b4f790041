//! Connecting: a socket of our own, and the client library logging in over it.

use std::{
    future::Future,
    io::{self, Read, Write},
    net::SocketAddr,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_rs::{
    Runtime, Tokio,
    traits::{Executor, Reactor, RuntimeKit},
    util::Task,
};
use futures_util::{AsyncRead, AsyncWrite, Stream};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties, uri::AMQPUri};
use tokio::net::TcpStream;

use crate::{
    login::{Blank, Login},
    socket::{Control, Socket},
};

#[cfg(feature = "tls")]
pub(crate) use crate::tls::Tls;

/// What is needed to trust a broker, and to be trusted by it.
#[cfg(not(feature = "tls"))]
#[derive(Debug, Clone)]
pub(crate) struct Tls(std::convert::Infallible);

/// A socket to the broker, and what controls it. Not bounded.
pub(crate) async fn open(uri: &AMQPUri, tls: Option<Tls>) -> io::Result<(Socket, Control)> {
    let host = uri.authority.host.as_str();
    let stream = TcpStream::connect((host, uri.authority.port)).await?;
    stream.set_nodelay(true)?;
    match tls {
        None => Ok(Socket::plain(stream)),
        #[cfg(feature = "tls")]
        Some(tls) => Ok(Socket::tls(tls.handshake(host, stream).await?)),
        #[cfg(not(feature = "tls"))]
        Some(never) => match never.0 {},
    }
}

/// Logs in over a socket, on the runtime that this is called from. Not bounded; whoever stops waiting must
/// [abort](Control::abort) the socket.
///
/// The client library could open the socket itself. But it starts a task and a thread before, and does not end the
/// task when the broker is not there: an outage of a day would leak thousands.
pub(crate) async fn log_in(
    socket: Socket,
    uri: AMQPUri,
    login: Login,
    properties: ConnectionProperties,
) -> lapin::Result<Connection> {
    let properties = properties.with_auth_provider(Blank::of(&login));
    let socket = Mutex::new(Some(socket.with_login(login)));
    let take = async move |_: AMQPUri, _: Runtime<Kit>| {
        let socket = socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It asks once, because its own retries are off.
        Ok(AsyncTcpStream::Plain(socket.ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))?))
    };
    Connection::connector(uri, Runtime::new(Kit(Tokio::current())), take, properties).await
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
