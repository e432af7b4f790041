//! The handle that users hold to send to a queue or topic and to subscribe to it.

mod batch;
mod counters;
mod opened;
mod prepare;
mod send;
mod window;

pub use counters::SendStats;
pub(crate) use counters::Sent;
pub(crate) use opened::Opened;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::OnceCell,
    time::{Instant, timeout, timeout_at},
};

use self::{counters::Counters, window::Window};
use crate::{
    Address, Backoff, ChannelKind, Connection, ConsumeOptions, Error, ErrorKind, Message, ProduceOptions, Producer,
    Result, Subscription, bus::Parts, clock,
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

/// How long closing a producer waits for what was handed over and not answered: what waits for a connection, or for room in a
/// queue that nobody reads, may wait for ever. What is left then ends with the connection.
const CLOSE_FOR: Duration = Duration::from_secs(5);

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
    /// There will be no producer, where there is none yet.
    closed: AtomicBool,
    window: Window,
    /// Those of the address, whatever the options.
    sent: Arc<Counters>,
}

/// How the handle sends, whatever the backend.
#[derive(Debug, Clone, Copy, Default)]
struct Sending {
    when_full: WhenFull,
    repeats: u32,
    backoff: Backoff,
}

impl Channel {
    pub(crate) fn new(parts: Arc<Parts>, address: Address) -> Self {
        let sent = parts.sent.to(&address);
        Self::with_options(parts, address, ProduceOptions::default(), Sending::default(), sent)
    }

    /// The queue of somebody who waits for a reply.
    pub(crate) fn for_replies(parts: Arc<Parts>, address: Address) -> Self {
        let options = ProduceOptions { declare: false, temporary: true, ..ProduceOptions::default() };
        let sent = parts.sent.replies();
        Self::with_options(parts, address, options, Sending::default(), sent)
    }

    fn with_options(
        parts: Arc<Parts>,
        address: Address,
        options: ProduceOptions,
        sending: Sending,
        sent: Arc<Counters>,
    ) -> Self {
        let (producer, closed, window) = (OnceCell::new(), AtomicBool::new(false), Window::default());
        Self(Arc::new(Inner { parts, address, options, sending, producer, closed, window, sent }))
    }

    fn changed(&self, change: impl FnOnce(&mut ProduceOptions, &mut Sending)) -> Self {
        let (mut options, mut sending) = (self.0.options.clone(), self.0.sending);
        change(&mut options, &mut sending);
        let (parts, address, sent) = (Arc::clone(&self.0.parts), self.0.address.clone(), Arc::clone(&self.0.sent));
        Self::with_options(parts, address, options, sending, sent)
    }

    /// The same channel with another time-out for each send; has a producer of its own.
    #[must_use]
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        self.changed(|options, _| options.timeout = timeout)
    }

    /// The same channel with at most `messages` unconfirmed, and what to do when that many are. Each call of
    /// [`send_all`](Self::send_all) has a window of that size for itself, and waits when it is full.
    #[must_use]
    pub fn with_window(&self, messages: usize, full: WhenFull) -> Self {
        self.changed(|options, sending| {
            options.window = messages.max(1);
            sending.when_full = full;
        })
    }

    /// The same channel, where a send that failed is repeated up to `repeats` times after this backoff. It is
    /// repeated when it certainly had no effect. When its outcome is unknown it is repeated only if the caller gave
    /// the message an id: a receiver can then tell the copies from two messages. [`enqueue`](Self::enqueue), which does not
    /// wait for an answer, repeats nothing.
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
        self.0.window.taken()
    }

    /// What became of the messages that were sent to this channel, by every handle of this bus.
    #[must_use]
    pub fn sent(&self) -> SendStats {
        self.0.sent.now()
    }

    /// Encodes `value` with the serializer and kind bound to its type.
    ///
    /// # Errors
    /// [`ErrorKind::Encode`], or [`ErrorKind::Config`] when no serializer is bound.
    pub fn message<T: Serialize + 'static>(&self, value: &T) -> Result<Message> {
        self.0.parts.encode(value)
    }

    pub(crate) fn parts(&self) -> &Arc<Parts> {
        &self.0.parts
    }

    /// Waits until everything handed over before has been answered, as long as one send may take: after that, nobody waits
    /// for an answer any more.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`]; others when that cannot happen any more.
    pub async fn flush(&self) -> Result<()> {
        match self.0.producer.get() {
            Some(producer) => self.bounded("flush", self.0.options.timeout, producer.flush()).await,
            None => Ok(()),
        }
    }

    /// Flushes, for at most 5 seconds, and closes this channel's producer; a later send answers [`ErrorKind::Closed`]. A
    /// second call does nothing.
    ///
    /// # Errors
    /// Those of flushing.
    pub async fn close(&self) -> Result<()> {
        self.0.closed.store(true, Ordering::Release);
        match self.0.producer.get() {
            Some(producer) => self.bounded("close", CLOSE_FOR, producer.close()).await,
            None => Ok(()),
        }
    }

    async fn bounded(
        &self,
        operation: &'static str,
        limit: Duration,
        flushing: impl Future<Output = Result<()>>,
    ) -> Result<()> {
        let flushed = timeout(limit, flushing).await.unwrap_or_else(|_| {
            let sentence = format!("not everything that was sent before was answered within {limit:?}");
            Err(Error::new(ErrorKind::Timeout, sentence))
        });
        flushed.map_err(|error| self.locate(error.with_operation(operation)))
    }

    /// Subscribes for messages to be settled by hand; handlers are registered with a
    /// [`ConsumerFactory`](crate::ConsumerFactory) instead.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for options that the backend cannot honour, before anything is done;
    /// [`ErrorKind::NotFound`], [`ErrorKind::PermissionDenied`] and others as the broker answers.
    pub async fn subscribe(&self, mut options: ConsumeOptions) -> Result<Subscription> {
        self.check()?;
        if options.declare {
            options.dead_letters = self.letters_of(&options);
        }
        if let Some(letters) = &options.dead_letters {
            self.0.parts.check_dead_letters(&self.0.address, letters)?;
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

    /// The queue for its dead letters, unless the options name another. None where the sender is told and keeps them, and for
    /// a queue that is one itself.
    pub(crate) fn letters_of(&self, options: &ConsumeOptions) -> Option<Address> {
        let address = &self.0.address;
        let is_last = address.kind() == ChannelKind::Queue && address.name().ends_with(".dlq");
        let own =
            || (!is_last && !self.0.parts.capabilities.direct).then(|| address.dead_letters(options.group.as_deref()));
        options.dead_letters.clone().or_else(own)
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

    /// When a send that begins now must have ended.
    fn deadline(&self) -> Instant {
        clock::instant_in(self.0.options.timeout)
    }

    async fn producer(&self, deadline: Instant) -> Result<&dyn Producer> {
        let still_open = || match self.0.closed.load(Ordering::Acquire) {
            true => Err(self.locate(Error::closed("send"))),
            false => Ok(()),
        };
        let open = || async {
            still_open()?;
            // The broker itself may have named where a reply is awaited.
            if self.0.options.temporary { self.0.address.check() } else { self.check() }?;
            let opening = self.connection().producer(&self.0.address, &self.0.options);
            let producer = opening.await.map_err(|error| self.locate(error))?;
            // Also while it was opened.
            still_open()?;
            self.0.parts.opened.add(self);
            Ok(producer)
        };
        match self.0.producer.get() {
            Some(producer) => Ok(producer.as_ref()),
            // One opens it at a time, and each after one that failed: their turns count too.
            None => match timeout_at(deadline, self.0.producer.get_or_try_init(open)).await {
                Ok(producer) => producer.map(AsRef::as_ref),
                Err(_) => Err(self.too_late()),
            },
        }
    }

    /// Whether somebody besides the bus has a handle.
    pub(crate) fn is_used(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// Says where it happened. A backend that is built on another one has errors of the other's name: the name is this
    /// connection's.
    #[cold]
    pub(crate) fn locate(&self, error: Error) -> Error {
        let error = error.with_backend(self.backend());
        let error = if error.operation().is_none() { error.with_operation("send") } else { error };
        error.with_channel(self.0.address.name())
    }
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("address", &self.0.address).field("backend", &self.backend()).finish()
    }
}
