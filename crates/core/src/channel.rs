//! The handle that users hold to send to a queue or topic and to subscribe to it.

use std::{
    any::TypeId,
    collections::VecDeque,
    fmt,
    future::poll_fn,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
    time::Duration,
};

use futures_util::FutureExt;
use serde::Serialize;
use tokio::{
    sync::{Notify, OnceCell},
    task::coop,
};

use crate::{
    Address, Backoff, ChannelKind, Completion, Connection, ConsumeOptions, Error, ErrorKind, HealthState, Message,
    Outgoing, ProduceOptions, Producer, Receipt, Reply, Result, Retry, Subscription, Text, bus::Parts, layer::NextSend,
    message::Stamp,
};

/// What a send does when the window of unconfirmed messages is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WhenFull {
    /// Waits for room, within the send's time-out.
    #[default]
    Wait,
    /// Answers [`ErrorKind::Busy`] at once.
    Refuse,
}

/// A queue or topic of a [`Bus`](crate::Bus). Cheap to clone and to share between tasks; clones share one producer,
/// which is opened by the first send. Making a channel does no I/O.
#[derive(Clone)]
pub struct Channel(Arc<Inner>);

struct Inner {
    parts: Arc<Parts>,
    address: Address,
    options: ProduceOptions,
    sending: Sending,
    producer: OnceCell<Box<dyn Producer>>,
    window: Window,
}

/// After so many messages sent in one call other tasks get their turn, as tokio's own budget has it.
const YIELD_AFTER: usize = 128;

/// How the handle sends, whatever the backend.
#[derive(Debug, Clone, Copy, Default)]
struct Sending {
    when_full: WhenFull,
    repeats: u32,
    backoff: Backoff,
}

impl Channel {
    pub(crate) fn new(parts: Arc<Parts>, address: Address) -> Self {
        Self::with_options(parts, address, ProduceOptions::default(), Sending::default())
    }

    fn with_options(parts: Arc<Parts>, address: Address, options: ProduceOptions, sending: Sending) -> Self {
        let (producer, window) = (OnceCell::new(), Window::default());
        Self(Arc::new(Inner { parts, address, options, sending, producer, window }))
    }

    fn changed(&self, change: impl FnOnce(&mut ProduceOptions, &mut Sending)) -> Self {
        let (mut options, mut sending) = (self.0.options.clone(), self.0.sending);
        change(&mut options, &mut sending);
        Self::with_options(Arc::clone(&self.0.parts), self.0.address.clone(), options, sending)
    }

    /// The same channel with another time-out for each send; has a producer of its own.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        self.changed(|options, _| options.timeout = timeout)
    }

    /// The same channel with at most `messages` unconfirmed, and what to do when that many are.
    #[must_use]
    pub fn with_window(&self, messages: usize, full: WhenFull) -> Self {
        self.changed(|options, sending| {
            options.window = messages.max(1);
            sending.when_full = full;
        })
    }

    /// The same channel, where a send that failed is repeated up to `repeats` times after this backoff. It is
    /// repeated when it certainly had no effect. When its outcome is unknown it is repeated only if the caller gave
    /// the message an id: a receiver can then tell the copies from two messages.
    #[must_use]
    pub fn with_repeats(&self, repeats: u32, backoff: Backoff) -> Self {
        self.changed(|_, sending| (sending.repeats, sending.backoff) = (repeats, backoff))
    }

    /// The same channel, not created when it does not exist: sending then fails with [`ErrorKind::NotFound`] or
    /// [`ErrorKind::Unroutable`].
    #[must_use]
    pub fn existing(&self) -> Self {
        self.changed(|options, _| options.declare = false)
    }

    /// The same channel as the queue of somebody who waits for a reply.
    pub(crate) fn temporary(&self) -> Self {
        self.changed(|options, _| (options.declare, options.temporary) = (false, true))
    }

    /// The same channel with a setting that only one backend knows (`qos`, `retain`); the backend refuses what it
    /// does not know when the first message is sent.
    #[must_use]
    pub fn with(&self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.changed(|options, _| options.extra.push((key.into(), value.into())))
    }

    /// Kind and name.
    #[must_use]
    pub fn address(&self) -> &Address {
        &self.0.address
    }

    /// How many sends wait for the broker's answer.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.0.window.in_flight.load(Ordering::Relaxed)
    }

    /// Encodes `value` with the serializer and kind bound to its type.
    ///
    /// # Errors
    /// [`ErrorKind::Encode`], or [`ErrorKind::Config`] when no serializer is bound.
    pub fn message<T: Serialize + 'static>(&self, value: &T) -> Result<Message> {
        self.0.parts.encode(value)
    }

    /// Encodes and sends; `Ok` means that the broker has accepted responsibility.
    ///
    /// Dropping the future leaves the outcome unknown.
    ///
    /// # Errors
    /// As [`send_message`](Self::send_message), and those of encoding.
    pub async fn send<T: Serialize + 'static>(&self, value: &T) -> Result<Receipt> {
        self.send_message(self.message(value)?).await
    }

    /// Sends a message; gives it a UUIDv7 and the present time where it has none.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`], [`ErrorKind::TooLarge`] and [`ErrorKind::Unsupported`] before anything is sent;
    /// [`ErrorKind::Disconnected`] or [`ErrorKind::Timeout`] when the message certainly was not sent in time;
    /// [`ErrorKind::UnknownOutcome`] when it may have been; [`ErrorKind::Unroutable`], [`ErrorKind::Refused`] and
    /// others as the broker answers.
    #[allow(clippy::manual_async_fn)] // it would move its argument once more
    pub fn send_message(&self, mut message: Message) -> impl Future<Output = Result<Receipt>> + Send + '_ {
        async move {
            let has_own_id = message.id().is_some();
            self.prepare(&mut message, Stamp::now)?;
            // Where answers are always at hand, a producer that never waits must not keep other tasks from running.
            coop::consume_budget().await;
            // The way of most sends, in one piece: each call on the way would move the message once more.
            if self.0.sending.repeats == 0
                && self.0.parts.layers.is_empty()
                && let Some(producer) = self.0.producer.get()
                && self.0.window.has_plenty(self.0.options.window)
            {
                return match producer.send(message).at_hand() {
                    Ok(result) => result.map_err(|error| self.locate(error)),
                    Err(completion) => {
                        let _place = self.0.window.enter_late();
                        self.answer(completion).await
                    }
                };
            }
            Box::pin(self.send_repeatedly(message, has_own_id)).await
        }
    }

    /// Asks: encodes and sends `value`, and waits for the answer that a handler returns as [`Answer`](crate::Answer), at
    /// most as long as one send may take ([`with_timeout`](Self::with_timeout)).
    ///
    /// # Errors
    /// As [`request_message`](Self::request_message), and those of encoding.
    pub async fn request<T: Serialize + 'static>(&self, value: &T) -> Result<Reply> {
        self.request_message(self.message(value)?).await
    }

    /// Asks with a message. Its reply address and correlation id are set here: each request has its own.
    ///
    /// # Errors
    /// Those of sending; [`ErrorKind::UnknownOutcome`] when no reply came in time, which is dropped when it comes later;
    /// [`ErrorKind::Handler`] with the reason when the request was given up; [`ErrorKind::Unsupported`] as the backend
    /// declares.
    pub async fn request_message(&self, message: Message) -> Result<Reply> {
        let asking = crate::request::request(self, message, self.0.options.timeout);
        Box::pin(asking).await.map_err(|error| self.locate(error.with_operation("request")))
    }

    /// Sends a message and takes the answer of the same exchange.
    pub(crate) async fn exchange(&self, mut message: Message) -> Result<Message> {
        self.prepare(&mut message, Stamp::now)?;
        let answer = std::sync::Mutex::new(None);
        let last = |mut message: Message| -> futures_util::future::BoxFuture<'_, _> {
            let answer = &answer;
            Box::pin(async move {
                // A layer may have changed the message.
                self.prepare(&mut message, Stamp::now)?;
                let id = message.id().cloned().unwrap_or_default();
                let producer = self.producer().await?;
                self.enter().await?;
                let _place = Permit(&self.0.window);
                let limit = self.0.options.timeout;
                let answered = match tokio::time::timeout(limit, producer.request(message)).await {
                    Ok(answered) => answered?,
                    Err(_) => {
                        return Err(Error::new(ErrorKind::UnknownOutcome, format!("no reply within {limit:?}")));
                    }
                };
                *answer.lock().unwrap_or_else(PoisonError::into_inner) = Some(answered);
                Ok(Receipt { id, broker_id: None })
            })
        };
        NextSend { address: &self.0.address, layers: &self.0.parts.layers, last: &last }.send(message).await?;
        let answer = answer.into_inner().unwrap_or_else(PoisonError::into_inner);
        answer.ok_or_else(|| Error::new(ErrorKind::Refused, "a layer took the request and sent none"))
    }

    /// Makes a message ready to leave with an acknowledgement: checked, through the layers, to a channel that exists.
    pub(crate) async fn ready(&self, mut message: Message) -> Result<(Address, Message)> {
        self.prepare(&mut message, Stamp::now)?;
        let mut message = crate::request::sent(&self.0.parts, &self.0.address, message).await?;
        // A layer may have changed the message.
        self.prepare(&mut message, Stamp::now)?;
        self.producer().await?;
        Ok((self.0.parts.connection.real_address(&self.0.address), message))
    }

    pub(crate) fn parts(&self) -> &Arc<Parts> {
        &self.0.parts
    }

    async fn send_repeatedly(&self, message: Message, has_own_id: bool) -> Result<Receipt> {
        let Sending { repeats, backoff, .. } = self.0.sending;
        for attempt in 1..=repeats {
            let error = match self.send_once(message.clone()).await {
                Ok(receipt) => return Ok(receipt),
                Err(error) => error,
            };
            let pause = match error.retry() {
                Retry::Now => backoff.delay(attempt),
                Retry::After(least) => backoff.delay(attempt).max(least),
                Retry::UnknownOutcome if has_own_id => backoff.delay(attempt),
                Retry::UnknownOutcome | Retry::Never => return Err(error),
            };
            tracing::warn!(channel = self.0.address.name(), %error, attempt, "not sent; trying again");
            tokio::time::sleep(pause).await;
        }
        self.send_once(message).await
    }

    async fn send_once(&self, message: Message) -> Result<Receipt> {
        if self.0.parts.layers.is_empty() {
            return self.hand_over(message).await;
        }
        let last = |message| -> futures_util::future::BoxFuture<'_, _> { Box::pin(self.checked_hand_over(message)) };
        NextSend { address: &self.0.address, layers: &self.0.parts.layers, last: &last }.send(message).await
    }

    /// Hands a message over and returns without waiting for the broker's answer, which the completion gives.
    /// [`flush`](Self::flush) and closing the bus wait for it. Layers are run, so with layers it waits like
    /// [`send_message`](Self::send_message).
    ///
    /// # Errors
    /// Those that are found before anything is sent.
    pub async fn enqueue(&self, mut message: Message) -> Result<Completion<Receipt>> {
        if !self.0.parts.layers.is_empty() {
            return Ok(Completion::ready(self.send_message(message).await));
        }
        self.prepare(&mut message, Stamp::now)?;
        let producer = self.producer().await?;
        self.enter().await?;
        let place = Place(self.clone());
        let mut completion = producer.send(message);
        if let Some(result) = completion.try_take() {
            return Ok(Completion::ready(result.map_err(|error| self.locate(error))));
        }
        let (answer, handle) = Completion::queued();
        let _always = answer.hand_over();
        tokio::spawn(async move { answer.complete(place.0.answer(completion).await) });
        Ok(handle)
    }

    /// Sends many messages with a sliding window of unconfirmed ones; answers in their order, one each.
    ///
    /// Never waits for a whole batch: that costs a quarter of the throughput on some brokers and nearly all on others.
    pub async fn send_all(&self, messages: impl IntoIterator<Item = Message>) -> Vec<Result<Receipt>> {
        let mut messages = messages.into_iter();
        let mut results = Vec::with_capacity(messages.size_hint().0);
        if !self.0.parts.layers.is_empty() {
            for message in messages {
                results.push(self.send_message(message).await);
            }
            return results;
        }
        let producer = match self.producer().await {
            Ok(producer) => producer,
            Err(error) => return messages.map(|_| Err(copy(&error))).collect(),
        };
        let (window, at_once) = (self.0.options.window, producer.at_once().max(1));
        // One clock read and one random number for the whole call; each id comes after the one before.
        let mut now = Stamp::now();
        let mut chunk = Outgoing::default();
        // Those behind the first one that waits for its answer, so that results are in order.
        let mut waiting: VecDeque<Completion<Receipt>> = VecDeque::new();
        let mut since_yield = 0;
        loop {
            if waiting.len() >= window
                && let Some(completion) = waiting.pop_front()
            {
                results.push(self.answer(completion).await);
                // One confirmation often answers many: what follows then leaves together.
                while let Some(answer) = waiting.front_mut().and_then(|completion| completion.now_or_never()) {
                    results.push(answer.map_err(|error| self.locate(error)));
                    waiting.pop_front();
                }
            }
            // Written at once to where they are prepared and taken from: each is moved as seldom as can be.
            chunk.extend(messages.by_ref().take((window - waiting.len()).min(at_once)));
            let count = chunk.len();
            if count == 0 {
                break;
            }
            let refused = self.prepare_all(&mut chunk, &mut now);
            // As above.
            since_yield += count;
            if since_yield >= YIELD_AFTER {
                since_yield = 0;
                give_way().await;
            } else {
                coop::consume_budget().await;
            }
            if waiting.is_empty() && refused.is_empty() {
                producer.send_many(&mut chunk, &mut results);
            }
            let mut refused = refused.into_iter().peekable();
            for at in count - chunk.len()..count {
                let Some(message) = chunk.pop() else { break };
                let answer = match refused.next_if(|(refused, _)| *refused == at) {
                    Some((_, error)) => Ok(Err(error)),
                    None => producer.send(message).at_hand(),
                };
                match answer {
                    Ok(result) if waiting.is_empty() => results.push(result.map_err(|error| self.locate(error))),
                    Ok(result) => waiting.push_back(Completion::ready(result)),
                    Err(completion) => waiting.push_back(completion),
                }
            }
        }
        for completion in waiting {
            results.push(self.answer(completion).await);
        }
        results
    }

    /// Waits until everything handed over before has been answered.
    ///
    /// # Errors
    /// When that cannot happen any more.
    pub async fn flush(&self) -> Result<()> {
        match self.0.producer.get() {
            Some(producer) => producer.flush().await,
            None => Ok(()),
        }
    }

    /// Flushes and closes this channel's producer; a later send answers [`ErrorKind::Closed`]. A second call does nothing.
    ///
    /// # Errors
    /// Those of flushing.
    pub async fn close(&self) -> Result<()> {
        match self.0.producer.get() {
            Some(producer) => producer.close().await,
            None => Ok(()),
        }
    }

    /// Subscribes for messages to be settled by hand; handlers are registered with a
    /// [`ConsumerFactory`](crate::ConsumerFactory) instead.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for options that the backend cannot honour, before anything is done;
    /// [`ErrorKind::NotFound`], [`ErrorKind::PermissionDenied`] and others as the broker answers.
    pub async fn subscribe(&self, mut options: ConsumeOptions) -> Result<Subscription> {
        self.check()?;
        // Where the sender keeps what is rejected, it is told; no queue is needed.
        if options.dead_letters.is_none() && options.declare && !self.0.parts.capabilities.direct {
            options.dead_letters = Some(self.0.address.dead_letters(options.group.as_deref()));
        }
        crate::subscription::check_options(
            self.backend(),
            self.connection().capabilities(),
            &self.0.address,
            &options,
        )?;
        Subscription::open(Arc::clone(&self.0.parts), self.0.address.clone(), options).await
    }

    pub(crate) fn connection(&self) -> &dyn Connection {
        self.0.parts.connection.as_ref()
    }

    pub(crate) fn backend(&self) -> &'static str {
        self.connection().backend()
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.0.parts.check_address(&self.0.address)
    }

    pub(crate) fn check_group(&self, group: Option<&str>) -> Result<()> {
        match group {
            Some(group) if self.0.address.kind() == ChannelKind::Queue => {
                let sentence = format!("group {group:?} of a queue: a queue has no groups, its consumers share it");
                Err(Error::new(ErrorKind::InvalidInput, sentence).with_channel(self.0.address.name()))
            }
            _ => Ok(()),
        }
    }

    async fn producer(&self) -> Result<&dyn Producer> {
        let open = || async {
            // The broker itself may have named where a reply is awaited.
            if self.0.options.temporary { self.0.address.check() } else { self.check() }?;
            let opening = self.connection().producer(&self.0.address, &self.0.options);
            match tokio::time::timeout(self.0.options.timeout, opening).await {
                Ok(producer) => producer.map_err(|error| self.locate(error)),
                Err(_) => Err(self.too_late()),
            }
        };
        match self.0.producer.get() {
            Some(producer) => Ok(producer.as_ref()),
            None => self.0.producer.get_or_try_init(open).await.map(AsRef::as_ref),
        }
    }

    /// Gives the message what it lacks; refuses what every backend refuses, then what this one cannot carry.
    #[inline]
    fn prepare(&self, message: &mut Message, now: impl FnOnce() -> Stamp) -> Result<()> {
        if let Some(identity) = &self.0.parts.identity {
            identity.sign(message);
        }
        message.stamp(now);
        let bytes = message.payload().len();
        let fits = self.0.parts.capabilities.max_payload.is_none_or(|max| bytes <= max);
        if fits && message.is_plain() { Ok(()) } else { self.check_message(message) }
    }

    #[inline(never)]
    fn check_message(&self, message: &Message) -> Result<()> {
        message.check().map_err(|error| self.locate(error))?;
        self.within_limits(message)
    }

    /// Prepares messages where they are; tells which are refused.
    fn prepare_all(&self, messages: &mut Outgoing, now: &mut Stamp) -> Vec<(usize, Error)> {
        let mut refused = Vec::new();
        for (at, message) in messages.iter_mut().enumerate() {
            if let Err(error) = self.prepare(message, || now.take()) {
                refused.push((at, error));
            }
        }
        refused
    }

    fn within_limits(&self, message: &Message) -> Result<()> {
        let capabilities = &self.0.parts.capabilities;
        let bytes = message.payload().len();
        if let Some(max) = capabilities.max_payload
            && bytes > max
        {
            return Err(self.locate(
                Error::new(ErrorKind::TooLarge, format!("a body of {bytes} bytes, at most {max} bytes are possible"))
                    .with_hint("send a reference to the data instead"),
            ));
        }
        if message.deliver_at().is_some() && !capabilities.delayed_send.support.is_available() {
            return Err(self.locate(Error::unsupported(self.backend(), "sending now what is delivered later")));
        }
        if let (Some(at), Some(max)) = (message.deliver_at(), capabilities.delayed_send.max)
            && crate::until(at) > max
        {
            return Err(self.locate(Error::unsupported(
                self.backend(),
                format_args!("a delivery {:?} from now, at most {max:?} are possible", crate::until(at)),
            )));
        }
        if let Some(max) = capabilities.max_headers
            && message.headers().len() > max
        {
            let count = message.headers().len();
            return Err(self.locate(Error::unsupported(
                self.backend(),
                format_args!("{count} headers on a message, at most {max} are possible"),
            )));
        }
        Ok(())
    }

    async fn checked_hand_over(&self, message: Message) -> Result<Receipt> {
        // A layer may have made it larger.
        self.within_limits(&message)?;
        self.hand_over(message).await
    }

    /// Sends without layers and without the rules for user headers: for copies that polymq makes.
    pub(crate) async fn send_as_is(&self, mut message: Message) -> Result<Receipt> {
        message.stamp(Stamp::now);
        self.hand_over(message).await
    }

    async fn hand_over(&self, message: Message) -> Result<Receipt> {
        let producer = self.producer().await?;
        self.enter().await?;
        let _place = Permit(&self.0.window);
        let mut completion = producer.send(message);
        match completion.try_take() {
            Some(result) => result.map_err(|error| self.locate(error)),
            None => self.answer(completion).await,
        }
    }

    /// The answer within the time-out; afterwards what is certain about it.
    async fn answer(&self, mut completion: Completion<Receipt>) -> Result<Receipt> {
        match tokio::time::timeout(self.0.options.timeout, &mut completion).await {
            Ok(result) => result.map_err(|error| self.locate(error)),
            Err(_) if completion.withdraw() => Err(self.too_late()),
            Err(_) => Err(self.locate(Error::new(
                ErrorKind::UnknownOutcome,
                format!("no answer within {:?}; the message may have been accepted", self.0.options.timeout),
            ))),
        }
    }

    #[cold]
    fn too_late(&self) -> Error {
        let health = self.connection().health().now();
        let (kind, why) = match health.state {
            HealthState::Up | HealthState::Degraded => (ErrorKind::Timeout, String::new()),
            HealthState::Down | HealthState::Closed => (ErrorKind::Disconnected, format!(" ({health})")),
        };
        self.locate(Error::new(kind, format!("not sent within {:?}{why}", self.0.options.timeout)))
    }

    /// Takes a place in the window.
    async fn enter(&self) -> Result<()> {
        let (window, limit) = (&self.0.window, self.0.options.window);
        if window.try_enter(limit) {
            return Ok(());
        }
        if self.0.sending.when_full == WhenFull::Refuse {
            return Err(self.locate(Error::new(
                ErrorKind::Busy,
                format!("{limit} messages wait for the broker's answer already"),
            )));
        }
        match tokio::time::timeout(self.0.options.timeout, window.wait(limit)).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.too_late()),
        }
    }

    #[cold]
    pub(crate) fn locate(&self, error: Error) -> Error {
        let error = if error.backend().is_none() { error.with_backend(self.backend()) } else { error };
        let error = if error.operation().is_none() { error.with_operation("send") } else { error };
        error.with_channel(self.0.address.name())
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("address", &self.0.address).field("backend", &self.backend()).finish()
    }
}

/// Counts sends that wait for their answer. A semaphore would do, at four times the cost on the path where the
/// answer is at hand and nothing waits.
#[derive(Debug, Default)]
struct Window {
    in_flight: AtomicUsize,
    waiting: AtomicUsize,
    room: Notify,
}

/// How much room lets a send start without a place: more threads than this do not start one at the same instant.
const PLENTY: usize = 64;

impl Window {
    /// Whether a message may be handed over first and counted afterwards, when its answer is not at hand.
    fn has_plenty(&self, limit: usize) -> bool {
        self.in_flight.load(Ordering::Relaxed) + PLENTY < limit
    }

    fn enter_late(&self) -> Permit<'_> {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        Permit(self)
    }

    fn try_enter(&self, limit: usize) -> bool {
        let room = |taken| (taken < limit).then_some(taken + 1);
        self.in_flight.fetch_update(Ordering::SeqCst, Ordering::SeqCst, room).is_ok()
    }

    async fn wait(&self, limit: usize) {
        // Counted before looking, so that a leaver either is seen here or sees this waiter.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let _waiting = Waiting(&self.waiting);
        loop {
            let room = self.room.notified();
            if self.try_enter(limit) {
                return;
            }
            room.await;
        }
    }

    fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::SeqCst);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.room.notify_one();
        }
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Permit<'a>(&'a Window);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A place in the window that outlives the call which took it.
struct Place(Channel);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.window.leave();
    }
}

/// Lets other tasks that are ready have their turn. Unlike tokio's own, without a look at sockets and timers first:
/// the runtime takes that by itself every few dozen turns.
async fn give_way() {
    let mut given = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut given, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cold]
fn copy(error: &Error) -> Error {
    let mut copy = Error::new(error.kind(), error.message().to_owned()).with_retry(error.retry());
    if let Some(backend) = error.backend() {
        copy = copy.with_backend(backend.to_owned());
    }
    if let Some(operation) = error.operation() {
        copy = copy.with_operation(operation);
    }
    if let Some(channel) = error.channel() {
        copy = copy.with_channel(channel);
    }
    match error.hint() {
        Some(hint) => copy.with_hint(hint.to_owned()),
        None => copy,
    }
}

impl Parts {
    pub(crate) fn encode<T: Serialize + 'static>(&self, value: &T) -> Result<Message> {
        let format = self.serializers.for_type::<T>()?;
        let body = format.encode(value, &self.limits)?;
        let content_type = match format.static_content_type() {
            Some(known) => Text::Borrowed(known),
            None => Text::Owned(format.content_type().to_owned()),
        };
        let message = Message::new(body).with_content_type(content_type);
        Ok(match self.kinds.get(TypeId::of::<T>()) {
            Some(kind) => {
                let message = message.with_kind(kind.name.clone());
                match kind.version {
                    Some(version) => message.with_version(version),
                    None => message,
                }
            }
            None => message,
        })
    }
}
