//! Request and reply: a message that asks for an answer, and the answer.
//!
//! Where the protocol answers on the same exchange (HTTP), the answer is that. Elsewhere a bus has one queue for its
//! replies, made for its first request and deleted with it; requests carry its name and a correlation id of their own, by
//! which a reply finds the request that waits for it, whatever else arrives in between.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{sync::oneshot, task::JoinHandle, time::Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    Address, Bus, Channel, ConsumeOptions, Consumer, Error, ErrorKind, Message, MessageId, Outcome, Receipt, Result,
    bus::Parts,
    layer::{NextHandle, NextSend},
    message::Stamp,
    subscription,
};

/// System header of a reply that is an error: why the request was given up.
pub const REPLY_ERROR: &str = "polymq-error";

/// How the names of the queues for replies begin.
pub(crate) const REPLY_QUEUE: &str = "polymq-reply-";

/// The most queues that replies were sent to lately and whose producers are kept.
const KEPT_REPLY_QUEUES: usize = 64;
/// The headers of W3C Trace Context: a reply belongs to the trace of its request.
const TRACE: [&str; 2] = ["traceparent", "tracestate"];
/// How long closing a bus waits for its reply queue to be deleted.
const DELETE_FOR: Duration = Duration::from_secs(5);

/// The answer to a request.
#[derive(Clone)]
pub struct Reply {
    message: Message,
    parts: Arc<Parts>,
}

impl Reply {
    pub(crate) fn new(message: Message, parts: Arc<Parts>) -> Result<Self> {
        if let Some(reason) = message.system_headers().get(REPLY_ERROR) {
            return Err(Error::new(ErrorKind::Handler, format!("the request was given up: {reason}")));
        }
        Ok(Self { message, parts })
    }

    /// The message that it came in.
    #[must_use]
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// Decodes the body by its content type.
    ///
    /// # Errors
    /// [`ErrorKind::Decode`].
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T> {
        let format = self.parts.serializers.resolve(&self.parts.accept, self.message.content_type())?;
        Ok(format.decode(self.message.payload(), &self.parts.limits)?)
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reply").field(&self.message).finish()
    }
}

/// What a handler returns to answer the one who asked: the value goes to the reply address of the message, or into the
/// response where the protocol has one. A message that asks for no answer is acknowledged, and the value is dropped.
///
/// ```
/// use polymq_core::{Answer, Result};
///
/// async fn double(n: u64) -> Result<Answer<u64>> {
///     Ok(Answer(n * 2))
/// }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer<T>(pub T);

/// A value on its way to becoming a reply.
pub struct Answered(Encode);

type Encode = Box<dyn FnOnce(&Bus) -> Result<Message> + Send>;

impl Answered {
    pub(crate) fn new<T: Serialize + Send + 'static>(value: T) -> Self {
        Self(Box::new(move |bus| bus.parts().encode(&value)))
    }

    pub(crate) fn message(self, bus: &Bus) -> Result<Message> {
        (self.0)(bus)
    }
}

impl fmt::Debug for Answered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Answered")
    }
}

/// What a reply needs to know of its request, for when that is gone.
#[derive(Debug)]
pub(crate) struct ReplyAddress {
    queue: String,
    correlation_id: Option<String>,
    trace: Trace,
}

impl ReplyAddress {
    /// `None`: nobody asks for a reply.
    pub(crate) fn of(request: &Message) -> Option<Self> {
        let correlation_id = request.correlation_id().map(str::to_owned);
        Some(Self {
            queue: request.reply_to()?.to_owned(),
            correlation_id: correlation_id.or_else(|| request.id().map(ToString::to_string)),
            trace: Trace::of(request),
        })
    }

    pub(crate) async fn send(&self, bus: &Bus, reply: Message) -> Result<()> {
        let reply = self.trace.goes_on_in(reply);
        let reply = match &self.correlation_id {
            Some(id) => reply.with_correlation_id(id.clone()),
            None => reply,
        };
        bus.answering().queue(bus, &self.queue).send_message(reply).await.map(drop)
    }

    /// Tells the one who asks that there will be no answer; best effort, because the request itself is safe already.
    pub(crate) async fn send_error(&self, bus: &Bus, reason: &str) {
        let reason = crate::dead_letter::header_text(reason);
        let mut reply = Message::new(reason.clone()).with_content_type("text/plain; charset=utf-8");
        reply.set_system_header(REPLY_ERROR, reason);
        if let Err(error) = self.send(bus, reply).await {
            tracing::warn!(queue = self.queue, %error, "whoever asked could not be told that there is no answer");
        }
    }
}

/// The trace that a message belongs to.
#[derive(Debug)]
pub(crate) struct Trace(Vec<(&'static str, String)>);

impl Trace {
    pub(crate) fn of(message: &Message) -> Self {
        let header = |name| Some((name, message.headers().get(name)?.to_owned()));
        Self(TRACE.into_iter().filter_map(header).collect())
    }

    /// The message in this trace, unless its sender has put it into one.
    pub(crate) fn goes_on_in(&self, mut message: Message) -> Message {
        if message.headers().get(TRACE[0]).is_none() {
            self.0.iter().for_each(|(name, value)| message.add_wire_header(*name, value.clone()));
        }
        message
    }
}

/// The queues of those who asked lately. Not with the parts of the bus, which the channels refer to.
#[derive(Clone, Default)]
pub(crate) struct Answering(Arc<Mutex<Vec<(String, Channel)>>>);

impl Answering {
    /// The queue of somebody who asks. It is never created: whoever asks has done that, or is gone.
    fn queue(&self, bus: &Bus, name: &str) -> Channel {
        let mut known = lock(&self.0);
        if let Some((_, channel)) = known.iter().find(|(queue, _)| queue == name) {
            return channel.clone();
        }
        if known.len() >= KEPT_REPLY_QUEUES {
            known.remove(0);
        }
        let channel = Channel::for_replies(Arc::clone(bus.parts()), Address::queue(name));
        known.push((name.to_owned(), channel.clone()));
        channel
    }
}

/// The requests of one bus that wait for their replies.
#[derive(Debug, Default)]
pub(crate) struct Requests {
    inbox: Arc<tokio::sync::Mutex<Option<Arc<Inbox>>>>,
    late: Arc<AtomicU64>,
    closed: AtomicBool,
}

impl Requests {
    /// Replies that came when nobody waited for them any more.
    pub(crate) fn late(&self) -> u64 {
        self.late.load(Ordering::Relaxed)
    }

    async fn inbox(&self, parts: &Arc<Parts>) -> Result<Arc<Inbox>> {
        let mut inbox = Arc::clone(&self.inbox).lock_owned().await;
        if self.closed.load(Ordering::Acquire) {
            // Nobody would delete the queue of another one.
            return Err(Error::closed("request"));
        }
        if let Some(open) = inbox.as_ref().filter(|open| !open.waiting.is_ended()) {
            return Ok(Arc::clone(open));
        }
        let (parts, late) = (Arc::clone(parts), Arc::clone(&self.late));
        // In a task: it goes on when whoever asks gives up, because nobody else knows the name of a queue that is half made.
        let opening = tokio::spawn(async move {
            if let Some(ended) = inbox.take() {
                let parts = Arc::clone(&parts);
                tokio::spawn(async move { ended.end(&parts, Instant::now() + DELETE_FOR).await });
            }
            Ok(Arc::clone(inbox.insert(Arc::new(Inbox::open(&parts, late).await?))))
        });
        opening.await.unwrap_or_else(|error| {
            // Its runtime has ended: whoever asks again opens another one.
            Err(Error::new(ErrorKind::Disconnected, "opening the reply queue broke off").with_source(error))
        })
    }

    /// Ends the reply queue, and there will be no other; those who wait learn that there will be no reply.
    pub(crate) async fn close(&self, parts: &Parts) {
        self.closed.store(true, Ordering::Release);
        let deadline = Instant::now() + DELETE_FOR;
        match tokio::time::timeout_at(deadline, async { self.inbox.lock().await.take() }).await {
            Ok(Some(inbox)) => inbox.end(parts, deadline).await,
            Ok(None) => {}
            Err(_) => tracing::debug!("the reply queue was not opened in time, and cannot be deleted"),
        }
    }
}

/// A reply queue and those who wait for what comes there.
#[derive(Debug)]
struct Inbox {
    address: Address,
    waiting: Arc<Waiting>,
    stop: CancellationToken,
    task: tokio::sync::Mutex<Option<JoinHandle<()>>>,
    _stop_when_dropped: DropGuard,
}

impl Inbox {
    async fn open(parts: &Arc<Parts>, late: Arc<AtomicU64>) -> Result<Self> {
        // A name that every broker can carry.
        let address = Address::queue(format!("{REPLY_QUEUE}{}", MessageId::new()));
        let options = ConsumeOptions { temporary: true, ..ConsumeOptions::default() };
        let (consumer, _) = subscription::open(parts, address.clone(), &options).await?;
        let (waiting, stop) =
            (Arc::new(Waiting { senders: Mutex::new(Some(HashMap::new())), late }), CancellationToken::new());
        let task = tokio::spawn(deliver(consumer, Delivering(Arc::clone(&waiting)), stop.clone()));
        let _stop_when_dropped = stop.clone().drop_guard();
        Ok(Self { address, waiting, stop, task: tokio::sync::Mutex::new(Some(task)), _stop_when_dropped })
    }

    /// Receives no more, and deletes the queue.
    async fn end(&self, parts: &Parts, deadline: Instant) {
        self.stop.cancel();
        let deleting = async {
            if let Some(task) = self.task.lock().await.take() {
                // A task that broke off has closed its consumer as well as it could.
                let _ = task.await;
            }
            parts.connection.delete(&self.address, None).await
        };
        match tokio::time::timeout_at(deadline, deleting).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(queue = self.address.name(), %error, "the reply queue was not deleted"),
            Err(_) => tracing::debug!(queue = self.address.name(), "the reply queue was not deleted in time"),
        }
    }
}

/// Senders by correlation id; `None` once the queue has ended.
#[derive(Debug)]
struct Waiting {
    senders: Mutex<Option<HashMap<String, oneshot::Sender<Message>>>>,
    late: Arc<AtomicU64>,
}

impl Waiting {
    fn is_ended(&self) -> bool {
        lock(&self.senders).is_none()
    }

    /// Waits under a correlation id, until this is dropped.
    fn enter(self: &Arc<Self>, id: &str) -> Option<(oneshot::Receiver<Message>, Place)> {
        let (sender, receiver) = oneshot::channel();
        lock(&self.senders).as_mut()?.insert(id.to_owned(), sender);
        Some((receiver, Place { waiting: Arc::clone(self), id: id.to_owned() }))
    }

    fn take(&self, id: &str) -> Option<oneshot::Sender<Message>> {
        lock(&self.senders).as_mut()?.remove(id)
    }

    fn arrived(&self, reply: Message) {
        let awaited = reply.correlation_id().and_then(|id| self.take(id));
        let is_late = match awaited {
            Some(sender) => sender.send(reply).is_err(),
            None => true,
        };
        if is_late {
            self.late.fetch_add(1, Ordering::Relaxed);
            tracing::debug!("a reply that nobody waits for is dropped");
        }
    }
}

struct Place {
    waiting: Arc<Waiting>,
    id: String,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.waiting.take(&self.id);
    }
}

/// As long as replies are delivered. The task that does it runs where the first request was made, and is dropped when that
/// runtime ends.
struct Delivering(Arc<Waiting>);

impl Drop for Delivering {
    fn drop(&mut self) {
        *lock(&self.0.senders) = None;
    }
}

/// Gives replies to those who wait, as long as the queue lives.
async fn deliver(mut consumer: Box<dyn Consumer>, delivering: Delivering, stop: CancellationToken) {
    let settler = consumer.settler();
    let mut received = Vec::new();
    loop {
        let outcome = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            outcome = consumer.receive(64, &mut received) => outcome,
        };
        for incoming in received.drain(..) {
            // One that comes again finds nobody waiting.
            drop(settler.ack(incoming.token));
            delivering.0.arrived(incoming.message);
        }
        if let Err(error) = outcome {
            tracing::warn!(%error, "the reply queue has ended; the next request makes another");
            break;
        }
    }
    drop(delivering);
    if let Err(error) = consumer.close().await {
        tracing::debug!(%error, "the reply queue was not closed");
    }
}

/// Sends a request and waits for its reply, all of it within the channel's time-out.
pub(crate) async fn request(channel: &Channel, message: Message, limit: Duration, deadline: Instant) -> Result<Reply> {
    let parts = channel.parts();
    if !parts.capabilities.request_reply {
        return Err(Error::unsupported(parts.connection.backend(), "request and reply"));
    }
    let (reply, from) = if parts.capabilities.direct {
        (channel.exchange(deadline, message).await?, channel.address().clone())
    } else {
        let inbox = match tokio::time::timeout_at(deadline, parts.requests.inbox(parts)).await {
            Ok(inbox) => inbox?,
            Err(_) => return Err(Error::new(ErrorKind::Timeout, format!("no reply queue within {limit:?}"))),
        };
        let id = MessageId::new().to_string();
        let ended = || Error::new(ErrorKind::UnknownOutcome, "the reply queue ended before the reply came");
        let (reply, _place) = inbox.waiting.enter(&id).ok_or_else(ended)?;
        let name = inbox.address.name().to_owned();
        channel.send_until(deadline, message.with_reply_to(name).with_correlation_id(id)).await?;
        match tokio::time::timeout_at(deadline, reply).await {
            Ok(reply) => (reply.map_err(|_| ended())?, inbox.address.clone()),
            Err(_) => {
                let sentence = format!("no reply within {limit:?}; the request was sent and may still be handled");
                return Err(Error::new(ErrorKind::UnknownOutcome, sentence)
                    .with_hint("see that a handler consumes it and returns an Answer"));
            }
        }
    };
    let reply = received(parts, &from, reply).await?;
    Reply::new(reply, Arc::clone(parts))
}

/// What the layers of this bus make of a reply: they undo what those of the other side have done.
async fn received(parts: &Parts, address: &Address, reply: Message) -> Result<Message> {
    if parts.layers.is_empty() {
        return Ok(reply);
    }
    let slot = Mutex::new(None);
    let outcome = {
        let last = |message: Message| -> BoxFuture<'_, Outcome> {
            *lock(&slot) = Some(message);
            Box::pin(std::future::ready(Outcome::Ack))
        };
        let next = NextHandle {
            address,
            channel: address.name(),
            group: None,
            subscription: 0,
            attempt: 1,
            layers: &parts.layers,
            last: &last,
        };
        next.handle(reply).await
    };
    match (outcome, slot.into_inner().unwrap_or_else(PoisonError::into_inner)) {
        (Outcome::Ack, Some(message)) => Ok(message),
        (outcome, _) => Err(Error::new(ErrorKind::Decode, format!("a layer refused the reply: {outcome:?}"))),
    }
}

/// What the layers of this bus make of an answer that goes back on the same exchange.
pub(crate) async fn sent(parts: &Parts, address: &Address, mut answer: Message) -> Result<Message> {
    if parts.layers.is_empty() {
        return Ok(answer);
    }
    // As any message that passes them: one that signs says when it was made.
    answer.stamp(Stamp::now);
    let slot = Mutex::new(None);
    {
        let last = |message: Message| -> BoxFuture<'_, Result<Receipt>> {
            let id = message.id().cloned().unwrap_or_default();
            *lock(&slot) = Some(message);
            Box::pin(std::future::ready(Ok(Receipt { id, broker_id: None })))
        };
        NextSend { address, layers: &parts.layers, last: &last }.send(answer).await?;
    }
    let passed = slot.into_inner().unwrap_or_else(PoisonError::into_inner);
    passed.ok_or_else(|| Error::new(ErrorKind::Refused, "a layer took the answer and sent none"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
