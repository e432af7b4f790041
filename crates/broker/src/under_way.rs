//! Requests that have come in part, or whole and are worked on: their bytes are counted for all connections together, so
//! that no number of senders who begin large requests and never end them fills the memory.
//!
//! What is counted is what has come, not what was announced. A request of which no more comes is refused
//! after a while, when half of the room is taken. Of a call with one request everything counts until the call
//! is answered; of a stream of requests, until the next one is wanted.

use std::{
    convert::Infallible,
    future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body::Frame;
use tokio::time::{Instant, Sleep, sleep};
use tonic::{
    Status,
    body::Body,
    codegen::{Service, http},
    server::NamedService,
};

use crate::access::Access;

/// Calls that have a stream of requests.
const STREAMS: [&str; 4] = ["SendEventsStream", "StreamQueueMessage", "QueuesDownstream", "QueuesUpstream"];
/// The call that needs no token.
const FREE: &str = "Ping";
/// Requests of up to so many bytes find room when larger ones do not.
const SMALL: usize = 64 << 10;
/// Bytes before each request that say how long it is.
const HEAD: usize = 5;

/// The bytes of all.
#[derive(Debug)]
pub(crate) struct UnderWay {
    most: usize,
    /// How long an unfinished request keeps its room without more of it, when others may need that.
    patience: Duration,
    taken: AtomicUsize,
}

impl UnderWay {
    pub(crate) fn new(most: usize, patience: Duration) -> Arc<Self> {
        Arc::new(Self { most, patience, taken: AtomicUsize::new(0) })
    }

    pub(crate) fn now(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Counts bytes of a request of some size, while the value lives.
    ///
    /// # Errors
    ///
    /// `RESOURCE_EXHAUSTED` when there is no room for them.
    pub(crate) fn take(self: &Arc<Self>, bytes: usize) -> Result<Taken, Status> {
        let mut taken = Taken { of: Arc::clone(self), bytes: 0 };
        taken.add(bytes, bytes)?;
        Ok(taken)
    }
}

/// A part of the bytes of all; dropped, it is given back.
#[derive(Debug)]
pub(crate) struct Taken {
    of: Arc<UnderWay>,
    bytes: usize,
}

impl Taken {
    /// More bytes have come, of a request of some size.
    fn add(&mut self, bytes: usize, size: usize) -> Result<(), Status> {
        let all = self.of.most;
        let most = if size <= SMALL { all } else { all - all / 8 };
        let fits = |taken: usize| taken.checked_add(bytes).filter(|taken| *taken <= most);
        if self.of.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_err() {
            return Err(Status::resource_exhausted(format!(
                "requests of {} bytes are under way, the most this broker allows is {all}: send this one again later, or raise \
                 the limit",
                self.of.now()
            )));
        }
        self.bytes += bytes;
        Ok(())
    }

    fn keep(&mut self, bytes: usize) {
        self.of.taken.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        self.bytes = bytes;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.keep(0);
    }
}

/// Where in its requests a sender is.
#[derive(Debug, Default)]
struct Place {
    head: [u8; HEAD],
    /// Bytes of the head that have come.
    of_head: usize,
    /// Bytes of the request that have come after its head, and all of them.
    body: (usize, usize),
}

impl Place {
    fn advance(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            if self.of_head < HEAD {
                let count = data.len().min(HEAD - self.of_head);
                self.head[self.of_head..self.of_head + count].copy_from_slice(&data[..count]);
                (self.of_head, data) = (self.of_head + count, &data[count..]);
                let [_, size @ ..] = self.head;
                self.body = (0, u32::from_be_bytes(size) as usize);
            } else {
                let count = data.len().min(self.body.1 - self.body.0);
                (self.body.0, data) = (self.body.0 + count, &data[count..]);
            }
            if self.of_head == HEAD && self.body.0 == self.body.1 {
                *self = Self::default();
            }
        }
    }

    /// Bytes of a request whose end has not come.
    fn part(&self) -> usize {
        self.of_head + self.body.0
    }
}

/// What a client sends in one call.
struct Counted {
    inner: Body,
    is_stream: bool,
    place: Place,
    taken: Arc<std::sync::Mutex<Taken>>,
    /// Runs while the rest of a request does not come.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Counted {
    /// Ready when a request that is not whole has stood still for too long and others may need its room. A sender whose
    /// connection we do not read, because a disk is slow, stands still too, so nobody is sent away without need.
    fn poll_stalled(&mut self, all: &UnderWay, context: &mut Context<'_>) -> Poll<Status> {
        let patience = all.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
        loop {
            ready!(stalled.as_mut().poll(context));
            if all.now() > all.most / 2 {
                break;
            }
            stalled.as_mut().reset(Instant::now() + patience);
        }
        let (come, size) = self.place.body;
        let what = match self.place.part() {
            0 => "of a request all has come but its end".to_owned(),
            _ => format!("of a request of {size} bytes {come} have come"),
        };
        Poll::Ready(Status::deadline_exceeded(format!(
            "{what}, and no more for {patience:?}, while the room is needed: nothing of it was done; send it again"
        )))
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        let mut taken = crate::log::lock(&this.taken);
        if this.is_stream {
            // Who asks for more has worked on what came before.
            taken.keep(this.place.part());
        }
        let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(context) else {
            // One that is alone in its call is not worked on before the call's end has come.
            let is_part = this.place.part() > 0 || (!this.is_stream && taken.bytes > 0);
            let all = Arc::clone(&taken.of);
            drop(taken);
            return if is_part {
                this.poll_stalled(&all, context).map(|status| Some(Err(status)))
            } else {
                Poll::Pending
            };
        };
        this.stalled = None;
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.place.advance(data);
            if let Err(status) = taken.add(data.len(), this.place.body.1.max(data.len())) {
                return Poll::Ready(Some(Err(status)));
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.inner.size_hint()
    }
}

/// A service whose requests are counted, of those who may call at all.
#[derive(Debug, Clone)]
pub(crate) struct Counting<S> {
    pub(crate) service: S,
    pub(crate) access: Arc<Access>,
    pub(crate) under_way: Arc<UnderWay>,
}

impl<S> Service<http::Request<Body>> for Counting<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<S::Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let call = request.uri().path().rsplit('/').next().unwrap_or_default();
        let is_stream = STREAMS.contains(&call);
        if call != FREE {
            // A stranger's request is not read: it takes no room from others.
            match self.access.caller(request.headers()) {
                Ok(caller) => drop(request.extensions_mut().insert(caller)),
                Err(status) => return Box::pin(future::ready(Ok(status.into_http()))),
            }
        }
        let taken = Taken { of: Arc::clone(&self.under_way), bytes: 0 };
        let taken = Arc::new(std::sync::Mutex::new(taken));
        let counted = Arc::clone(&taken);
        let counted =
            |inner| Body::new(Counted { inner, is_stream, place: Place::default(), taken: counted, stalled: None });
        let answer = self.service.call(request.map(counted));
        Box::pin(async move {
            let answer = answer.await;
            // Of a stream, its requests go on; then they keep it alive.
            drop(taken);
            answer
        })
    }
}

impl<S: NamedService> NamedService for Counting<S> {
    const NAME: &'static str = S::NAME;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(size: u8) -> Vec<u8> {
        let mut bytes = vec![0, 0, 0, 0, size];
        bytes.resize(HEAD + size as usize, 7);
        bytes
    }

    #[test]
    fn the_part_of_a_request_is_known_however_it_is_cut() {
        let all: Vec<u8> = [3, 0, 200, 1].into_iter().flat_map(request).collect();
        let ends: Vec<usize> = [8, 5, 205, 6]
            .iter()
            .scan(0, |end, size| {
                *end += size;
                Some(*end)
            })
            .collect();
        for cut in 1..20 {
            let (mut place, mut come) = (Place::default(), 0);
            for piece in all.chunks(cut) {
                place.advance(piece);
                come += piece.len();
                let begun = ends.iter().rev().find(|end| **end <= come).copied().unwrap_or(0);
                assert_eq!(place.part(), come - begun, "{come} by {cut}");
            }
        }
    }

    #[test]
    fn what_is_taken_is_given_back_and_small_requests_find_room() {
        let all = UnderWay::new(800_000, Duration::from_secs(30));
        let mut large = all.take(600_000).unwrap();
        assert!(large.add(200_000, 800_000).is_err(), "an eighth is kept");
        let refused = all.take(200_000).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        assert!(refused.message().contains("requests of 600000 bytes are under way"), "{refused}");
        large.add(100_000, 700_000).unwrap();
        let small: Vec<_> = (0..2).map(|_| all.take(50_000).unwrap()).collect();
        assert!(all.take(1).is_err());
        drop(small);
        large.keep(10);
        assert_eq!(all.now(), 10);
        drop(large);
        assert_eq!(all.now(), 0);
    }
}
