//! Accepts connections and serves HTTP/1.1 and HTTP/2 on them.

use std::{convert::Infallible, fmt, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use http::Request;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use polymq_core::Result;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
};
use tokio_util::{sync::CancellationToken, sync::DropGuard, task::TaskTracker};

use crate::{
    config::{HttpConfig, refuse},
    server::Server,
    written::Buffered,
};

/// What the first bytes of HTTP/2 without TLS are; no request of HTTP/1 begins with them (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI ";

/// A bound address that is served until this is dropped, in the runtime that has bound it.
pub(crate) struct Listener {
    address: SocketAddr,
    pub(crate) server: Arc<Server>,
    stop: CancellationToken,
    tasks: TaskTracker,
    drain_timeout: Duration,
    _stop_when_dropped: DropGuard,
}

impl Listener {
    pub(crate) async fn bind(config: &HttpConfig) -> Result<Self> {
        let listen = config.listen()?;
        #[cfg(feature = "tls")]
        let tls = crate::tls::server(config)?;
        let bound = TcpListener::bind((listen.host.as_str(), listen.port)).await;
        let bound = bound.and_then(|socket| socket.local_addr().map(|address| (socket, address)));
        let (socket, address) = bound.map_err(|error| {
            refuse(format!("consumers cannot listen at {}:{}: {error}", listen.host, listen.port))
                .with_operation("consume")
                .with_hint("set listen to a free address of this machine, such as 0.0.0.0:8080")
                .with_source(error)
        })?;
        let server = Arc::new(Server::new(config)?);
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let serving = Serving {
            server: Arc::clone(&server),
            header_timeout: config.header_timeout,
            heartbeat: config.heartbeat,
            max_header_bytes: config.max_header_bytes,
            max_requests: config.max_requests,
            drain_timeout: config.drain_timeout,
            idle_timeout: config.idle_timeout,
            body_timeout: config.body_timeout,
            stop: stop.clone(),
            #[cfg(feature = "tls")]
            tls,
        };
        tasks.spawn(accept(socket, Arc::new(serving), tasks.clone()));
        let _stop_when_dropped = stop.clone().drop_guard();
        Ok(Self { address, server, stop, tasks, drain_timeout: config.drain_timeout, _stop_when_dropped })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits for answers that are on their way, no longer than the drain time-out.
    pub(crate) async fn written(&self, flush: impl Future<Output = ()>) {
        if tokio::time::timeout(self.drain_timeout, flush).await.is_err() {
            tracing::warn!(address = %self.address, "answers of a consumer that ends were not taken in time");
        }
    }

    /// Tells senders that wait to come again, and ends when they know, or the drain time-out has passed.
    pub(crate) async fn close(&self) {
        self.server.end();
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(self.drain_timeout * 2, self.tasks.wait()).await.is_err() {
            tracing::warn!(address = %self.address, "connections were cut: their answers were not taken in time");
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

/// What every connection needs.
struct Serving {
    server: Arc<Server>,
    header_timeout: Duration,
    heartbeat: Duration,
    max_header_bytes: u32,
    max_requests: usize,
    drain_timeout: Duration,
    idle_timeout: Duration,
    body_timeout: Duration,
    stop: CancellationToken,
    #[cfg(feature = "tls")]
    tls: Option<tokio_rustls::TlsAcceptor>,
}

async fn accept(socket: TcpListener, serving: Arc<Serving>, tasks: TaskTracker) {
    loop {
        let accepted = tokio::select! {
            biased;
            () = serving.stop.cancelled() => return,
            accepted = socket.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => drop(tasks.spawn(connection(stream, Arc::clone(&serving)))),
            Err(error) => {
                // Mostly that there are too many open files: a pause lets some of them close.
                tracing::warn!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, serving: Arc<Serving>) {
    // Small answers must not wait for each other.
    let _ = stream.set_nodelay(true);
    #[cfg(feature = "tls")]
    if let Some(acceptor) = &serving.tls {
        let handshake = tokio::time::timeout(serving.header_timeout, acceptor.accept(stream));
        let shaken = tokio::select! {
            biased;
            () = serving.stop.cancelled() => return,
            shaken = handshake => shaken,
        };
        match shaken {
            Ok(Ok(stream)) => {
                let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                serving.serve(stream, is_http2).await;
            }
            Ok(Err(error)) => tracing::debug!(%error, "no TLS connection"),
            Err(_) => tracing::debug!("a TLS handshake took too long"),
        }
        return;
    }
    let begun = tokio::select! {
        biased;
        () = serving.stop.cancelled() => return,
        begun = tokio::time::timeout(serving.header_timeout, begins_http2(&stream)) => begun,
    };
    match begun {
        Ok(Ok(is_http2)) => serving.serve(stream, is_http2).await,
        Ok(Err(error)) => tracing::debug!(%error, "a connection ended before its first request"),
        Err(_) => tracing::debug!("a connection sent nothing"),
    }
}

/// Looks at the first bytes without taking them.
async fn begins_http2(stream: &TcpStream) -> std::io::Result<bool> {
    let mut first = [0; PREFACE.len()];
    loop {
        let count = stream.peek(&mut first).await?;
        if count == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if count == PREFACE.len() || first[..count] != PREFACE[..count] {
            return Ok(first == PREFACE);
        }
        // Less than four bytes in a segment of their own: peeking again answers at once, with the same.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Serving {
    async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(&self, stream: S, is_http2: bool) {
        let server = Arc::clone(&self.server);
        let buffered = Buffered::default();
        let stream = TokioIo::new(buffered.stream(stream, self.idle_timeout));
        let untaken = buffered.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let (server, buffered) = (Arc::clone(&server), buffered.clone());
            async move {
                let (response, ticket) = server.serve(request).await;
                Ok::<_, Infallible>(response.map(|bytes| buffered.body(bytes, ticket)))
            }
        });
        // Both have this shape, and no common trait.
        macro_rules! run {
            ($connection:expr) => {{
                let mut connection = pin!($connection);
                let ended = tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = untaken.untaken(self.body_timeout) => {
                        // Those beside it in HTTP/2 may end.
                        connection.as_mut().graceful_shutdown();
                        let closing = async {
                            self.stop.cancelled().await;
                            tokio::time::sleep(self.drain_timeout).await;
                        };
                        tokio::select! {
                            ended = connection => ended,
                            () = tokio::time::sleep(self.body_timeout) => {
                                return tracing::debug!("a connection was cut: an answer was not taken");
                            }
                            () = closing => return tracing::debug!("a connection was cut at the drain time-out"),
                        }
                    }
                    () = self.stop.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        match tokio::time::timeout(self.drain_timeout, connection).await {
                            Ok(ended) => ended,
                            Err(_) => return tracing::debug!("a connection was cut at the drain time-out"),
                        }
                    }
                };
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended");
                }
            }};
        }
        if is_http2 {
            run!(
                http2::Builder::new(TokioExecutor::new())
                    .timer(TokioTimer::new())
                    .keep_alive_interval(self.heartbeat)
                    .keep_alive_timeout(self.heartbeat)
                    .max_concurrent_streams(u32::try_from(self.max_requests).unwrap_or(u32::MAX))
                    .max_header_list_size(self.max_header_bytes)
                    .serve_connection(stream, service)
            );
        } else {
            run!(
                http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(self.header_timeout)
                    .max_buf_size(self.max_header_bytes as usize)
                    .serve_connection(stream, service)
            );
        }
    }
}
