//! Connections as they come: counted, with TLS where it is asked for, and with a bound on how long one may say nothing.

use std::{
    io,
    pin::Pin,
    sync::{Arc, PoisonError, RwLock},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig, server::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{
    either::Either,
    sync::{CancellationToken, WaitForCancellationFutureOwned},
};
use tonic::transport::server::Connected;

use crate::{counts::Counts, error::Result, tls::TlsFiles};

/// How long a new connection may take until its first byte, or its TLS handshake, is there.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long accepting pauses when the system has nothing to give, such as file descriptors.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// TLS as it is now; it can be read anew while the broker runs.
#[derive(Debug, Default)]
pub(crate) struct Tls {
    files: Option<TlsFiles>,
    config: RwLock<Option<Arc<ServerConfig>>>,
}

impl Tls {
    pub(crate) fn open(files: Option<TlsFiles>) -> Result<Arc<Self>> {
        let config = RwLock::new(files.as_ref().map(TlsFiles::read).transpose()?);
        Ok(Arc::new(Self { files, config }))
    }

    /// Reads the files anew. What it gives puts what was read in place, for connections from then on.
    pub(crate) fn read(&self) -> Result<impl FnOnce()> {
        let read = self.files.as_ref().map(TlsFiles::read).transpose()?;
        Ok(move || *self.config.write().unwrap_or_else(PoisonError::into_inner) = read)
    }

    fn acceptor(&self) -> Option<TlsAcceptor> {
        let config = self.config.read().unwrap_or_else(PoisonError::into_inner);
        config.clone().map(TlsAcceptor::from)
    }
}

/// A connection, and its place among those that are allowed.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: Either<TcpStream, Box<TlsStream<TcpStream>>>,
    _place: Place,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

/// A place among the connections that are allowed, counted while it is taken.
#[derive(Debug)]
struct Place {
    counts: Counts,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.counts.connections.take();
    }
}

/// Who may connect, and until when.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    pub(crate) tls: Arc<Tls>,
    pub(crate) places: Arc<Semaphore>,
    pub(crate) counts: Counts,
    /// Ends every connection, whatever it does.
    pub(crate) cut: CancellationToken,
}

/// Accepts until nobody takes the connections any more. Those for which there is no place are closed at once.
pub(crate) fn accept(listener: TcpListener, door: Door) -> ReceiverStream<io::Result<Connection>> {
    let (ready, connections) = mpsc::channel(64);
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = ready.closed() => return,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(cause) => {
                    tracing::warn!(%cause, "a connection cannot be accepted");
                    tokio::time::sleep(EXHAUSTED).await;
                    continue;
                }
            };
            let Ok(permit) = Arc::clone(&door.places).try_acquire_owned() else {
                door.counts.refused.add();
                tracing::warn!(%peer, "connection refused: as many are open as the limit allows");
                continue;
            };
            door.counts.connections.add();
            let place = Place { counts: door.counts.clone(), _permit: permit };
            let (ready, acceptor, cut) =
                (ready.clone(), door.tls.acceptor(), Box::pin(door.cut.clone().cancelled_owned()));
            tokio::spawn(async move {
                match timeout(PATIENCE, open(stream, acceptor)).await {
                    Ok(Ok(stream)) => drop(ready.send(Ok(Connection { stream, _place: place, cut })).await),
                    Ok(Err(cause)) => tracing::debug!(%peer, %cause, "connection refused"),
                    Err(_) => tracing::debug!(%peer, "connection refused: it said nothing for too long"),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}

async fn open(
    stream: TcpStream,
    acceptor: Option<TlsAcceptor>,
) -> io::Result<Either<TcpStream, Box<TlsStream<TcpStream>>>> {
    stream.set_nodelay(true)?;
    match acceptor {
        Some(acceptor) => Ok(Either::Right(Box::new(acceptor.accept(stream).await?))),
        None => {
            stream.peek(&mut [0]).await?;
            Ok(Either::Left(stream))
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) -> Self::ConnectInfo {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.cut.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }
}
