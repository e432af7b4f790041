//! Which answers are written: until then they are lost when the process ends.
//!
//! In HTTP/2 an answer counts as written with its last part, of which as much as 16 KiB may wait for its client's window.

use std::{
    collections::BTreeMap,
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use polymq_core::Ticket;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

/// As much of an answer is handed over at a time, a frame of HTTP/2: what its client has no window for stays with us, and is seen.
const PART: usize = 16 * 1024;

/// The answers of one connection: those whose bodies were taken from us and wait in its buffer, and those that wait to be taken.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffered(Arc<Mutex<Answers>>);

#[derive(Debug, Default)]
struct Answers {
    tickets: Vec<Ticket>,
    /// Since when there are bodies that are not taken.
    untaken: BTreeMap<u64, Instant>,
    /// Of the next one.
    number: u64,
}

impl Buffered {
    fn each<T>(&self, change: impl FnOnce(&mut Answers) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The body of an answer whose ticket is dropped when it is written, or can never be.
    pub(crate) fn body(&self, bytes: Bytes, ticket: Option<Ticket>) -> Answered {
        let number = (!bytes.is_empty()).then(|| {
            self.each(|answers| {
                answers.number += 1;
                answers.untaken.insert(answers.number, Instant::now());
                answers.number
            })
        });
        Answered { bytes, ticket, number, buffered: self.clone() }
    }

    /// The stream that the answers are written to. It fails when nothing was taken of it for `idle`.
    pub(crate) fn stream<S>(&self, stream: S, idle: Duration) -> Watched<S> {
        Watched { stream, buffered: self.clone(), idle, stalled: None }
    }

    /// Waits for an answer that was not taken within `whole`.
    pub(crate) async fn untaken(&self, whole: Duration) {
        let mut wait = whole;
        loop {
            sleep(wait).await;
            // The first one that was made is the one that waits longest.
            let oldest = self.each(|answers| answers.untaken.first_key_value().map(|(_, since)| since.elapsed()));
            match oldest.map(|age| whole.checked_sub(age)) {
                Some(None | Some(Duration::ZERO)) => return,
                Some(Some(left)) => wait = left,
                None => wait = whole,
            }
        }
    }
}

/// A body that is dropped when it is in the buffer of its connection.
#[derive(Debug)]
pub(crate) struct Answered {
    bytes: Bytes,
    ticket: Option<Ticket>,
    /// Among the untaken; an empty one is none of them.
    number: Option<u64>,
    buffered: Buffered,
}

impl Body for Answered {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.bytes.is_empty() {
            return Poll::Ready(None);
        }
        let part = self.bytes.len().min(PART);
        Poll::Ready(Some(Ok(Frame::data(self.bytes.split_to(part)))))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.len() as u64)
    }
}

impl Drop for Answered {
    fn drop(&mut self) {
        let (ticket, number) = (self.ticket.take(), self.number);
        if ticket.is_some() || number.is_some() {
            self.buffered.each(|answers| {
                answers.tickets.extend(ticket);
                number.and_then(|number| answers.untaken.remove(&number));
            });
        }
    }
}

/// A stream that knows when its buffer was flushed, and when nobody reads what is written.
#[derive(Debug)]
pub(crate) struct Watched<S> {
    stream: S,
    buffered: Buffered,
    idle: Duration,
    /// Runs while the peer takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S> Watched<S> {
    /// What a call has come to: an error, when none has for too long.
    fn bounded<T>(&mut self, done: Poll<io::Result<T>>, cx: &mut Context<'_>) -> Poll<io::Result<T>> {
        if done.is_ready() {
            self.stalled = None;
            return done;
        }
        let idle = self.idle;
        ready!(self.stalled.get_or_insert_with(|| Box::pin(sleep(idle))).as_mut().poll(cx));
        let sentence = format!("nothing of an answer was taken for {idle:?}");
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, sentence)))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.bounded(done, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let done = Pin::new(&mut self.stream).poll_write_vectored(cx, parts);
        self.bounded(done, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    /// The connection writes its whole buffer before this.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = Pin::new(&mut self.stream).poll_flush(cx);
        let flushed = ready!(self.bounded(done, cx));
        if flushed.is_ok() {
            self.buffered.each(|answers| answers.tickets.clear());
        }
        Poll::Ready(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
