//! The socket under the client library: plain or encrypted, and with handles of ours.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use futures_util::{AsyncRead, AsyncWrite, task::AtomicWaker};
use tokio::net::TcpStream;
#[cfg(feature = "tls")]
use tokio_rustls::client::TlsStream;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use crate::login::Login;

/// What is done to a socket from outside.
#[derive(Debug, Clone, Default)]
pub(crate) struct Control(Arc<Controls>);

#[derive(Debug, Default)]
struct Controls {
    aborted: AtomicBool,
    reader: AtomicWaker,
    bursts: Mutex<Bursts>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Bursts {
    /// How many are being queued.
    open: usize,
    /// One has ended since the last look: what it has queued does not wait for the others.
    due: bool,
}

impl Control {
    /// Ends the socket: the thread of the client library that waits for it has no other end.
    pub(crate) fn abort(&self) {
        self.0.aborted.store(true, Ordering::Release);
        self.0.reader.wake();
    }

    /// Holds writes back until the burst is dropped, so that the client library writes many messages at once: its
    /// thread wakes for each, and a write of each would cost this machine a system call and the broker a wake-up.
    /// To be held for as long as it takes to queue what is at hand, and never while waiting for anything.
    pub(crate) fn burst(&self) -> Burst {
        self.0.bursts().open += 1;
        Burst(Arc::clone(&self.0))
    }
}

/// Messages on their way to the client library.
#[derive(Debug)]
pub(crate) struct Burst(Arc<Controls>);

impl Drop for Burst {
    fn drop(&mut self) {
        let mut bursts = self.0.bursts();
        bursts.open -= 1;
        bursts.due = true;
        drop(bursts);
        self.0.ended.notify_one();
    }
}

impl Controls {
    fn bursts(&self) -> MutexGuard<'_, Bursts> {
        self.bursts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks the thread that writes. It is the client library's own, with nothing else to do than to read, and would
    /// otherwise be woken for each message of the burst.
    fn await_burst(&self) {
        let bursts = self.ended.wait_while(self.bursts(), |bursts| bursts.open > 0 && !bursts.due);
        bursts.unwrap_or_else(PoisonError::into_inner).due = false;
    }
}

/// A connected socket.
pub(crate) struct Socket {
    inner: Inner,
    control: Control,
    /// Until it has been written.
    login: Option<Login>,
}

enum Inner {
    Plain(Compat<TcpStream>),
    #[cfg(feature = "tls")]
    Tls(Box<Compat<TlsStream<TcpStream>>>),
}

impl Socket {
    fn new(inner: Inner) -> (Self, Control) {
        let control = Control::default();
        (Self { inner, control: control.clone(), login: None }, control)
    }

    pub(crate) fn plain(stream: TcpStream) -> (Self, Control) {
        Self::new(Inner::Plain(stream.compat()))
    }

    #[cfg(feature = "tls")]
    pub(crate) fn tls(stream: TlsStream<TcpStream>) -> (Self, Control) {
        Self::new(Inner::Tls(Box::new(stream.compat())))
    }

    /// The login that takes the place of the client library's blank.
    pub(crate) fn with_login(self, login: Login) -> Self {
        Self { login: Some(login), ..self }
    }
}

macro_rules! delegate {
    ($inner:expr, $method:ident $(, $argument:expr)*) => {
        match &mut $inner {
            Inner::Plain(stream) => Pin::new(stream).$method($($argument),*),
            #[cfg(feature = "tls")]
            Inner::Tls(stream) => Pin::new(stream.as_mut()).$method($($argument),*),
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let controls = &this.control.0;
        controls.reader.register(cx.waker());
        if controls.aborted.load(Ordering::Acquire) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        delegate!(this.inner, poll_read, cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let Some(login) = &mut this.login else { return delegate!(this.inner, poll_write, cx, buffer) };
        let (part, ours) = login.part(buffer);
        let written = ready!(delegate!(this.inner, poll_write, cx, part))?;
        if ours && login.advance(written) {
            this.login = None;
        }
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.login.is_some() {
            let first = buffers.iter().find(|buffer| !buffer.is_empty());
            return self.poll_write(cx, first.map_or(&[], |buffer| buffer));
        }
        delegate!(self.get_mut().inner, poll_write_vectored, cx, buffers)
    }

    /// The client library flushes before it gathers what is to be written, so here a burst is waited for. While writing it
    /// would be too late: the first message is gathered by then, goes out alone, and costs the broker a write to its disk.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.control.0.await_burst();
        delegate!(this.inner, poll_flush, cx)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self.get_mut().inner, poll_close, cx)
    }
}
