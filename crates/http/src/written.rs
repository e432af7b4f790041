//! Which answers are written: until then they are lost when the process ends.
//!
//! In HTTP/2 an answer that is longer than its client's window counts as written with its first part.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, SizeHint};
use polymq_core::Ticket;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Those of one connection whose bodies were taken from us and wait in its buffer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffered(Arc<Mutex<Vec<Ticket>>>);

impl Buffered {
    fn each(&self, change: impl FnOnce(&mut Vec<Ticket>)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The body of an answer whose ticket is dropped when it is written, or can never be.
    pub(crate) fn body(&self, bytes: Full<Bytes>, ticket: Option<Ticket>) -> Answered {
        Answered { bytes, ticket, buffered: self.clone() }
    }

    /// The stream that the answers are written to.
    pub(crate) fn stream<S>(&self, stream: S) -> Watched<S> {
        Watched { stream, buffered: self.clone() }
    }
}

/// A body that is dropped when it is in the buffer of its connection.
#[derive(Debug)]
pub(crate) struct Answered {
    bytes: Full<Bytes>,
    ticket: Option<Ticket>,
    buffered: Buffered,
}

impl Body for Answered {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.bytes).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.bytes.size_hint()
    }
}

impl Drop for Answered {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.buffered.each(|tickets| tickets.push(ticket));
        }
    }
}

/// A stream that knows when its buffer was flushed.
#[derive(Debug)]
pub(crate) struct Watched<S> {
    stream: S,
    buffered: Buffered,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// The connection writes its whole buffer before this.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = ready!(Pin::new(&mut self.stream).poll_flush(cx));
        if flushed.is_ok() {
            self.buffered.each(Vec::clear);
        }
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
