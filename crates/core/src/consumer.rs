//! What a backend implements to receive and to settle.

use std::{
    fmt,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;

use crate::{Address, Completion, Error, ErrorKind, Message, Result};

/// What a backend needs to settle a delivery: a delivery tag, a packet id, a key into its own table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Token(pub u64);

/// A message as a backend hands it over, not yet settled.
#[derive(Debug, Default)]
pub struct Incoming {
    /// The message.
    pub message: Message,
    /// What settles it.
    pub token: Token,
    /// What the broker tells about the delivery, where it tells something. Boxed: every move of a delivery has its price.
    pub details: Option<Box<Details>>,
}

// What is received is moved several times; growing it costs every backend, and in memory most of all.
const _: () = assert!(size_of::<Incoming>() <= 120);

impl Incoming {
    /// A message about which the broker tells nothing.
    #[inline]
    #[must_use]
    pub fn new(message: Message, token: Token) -> Self {
        Self { message, token, details: None }
    }

    /// The number of this attempt, 1-based: the broker's count where it counts, the header of the copy otherwise.
    #[inline]
    #[must_use]
    pub fn attempt(&self) -> u32 {
        let counted = self.details.as_ref().and_then(|details| details.attempt);
        counted.unwrap_or_else(|| self.message.header_attempt()).max(1)
    }

    /// The concrete channel name, where it differs from the consumed one.
    #[inline]
    #[must_use]
    pub fn channel(&self) -> Option<&str> {
        self.details.as_ref()?.channel.as_deref()
    }

    /// The details, made where there are none.
    pub fn details_mut(&mut self) -> &mut Details {
        self.details.get_or_insert_default()
    }
}

/// What the broker itself knows about a delivery.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details {
    /// The attempt number that the broker counts, 1-based; without it the header of the message counts.
    pub attempt: Option<u32>,
    /// The concrete channel name, where it differs from the consumed one (wildcards).
    pub channel: Option<Arc<str>>,
    /// When the broker took the message.
    pub broker_time: Option<SystemTime>,
    /// Its sequence number or offset.
    pub sequence: Option<u64>,
    /// Its partition.
    pub partition: Option<i32>,
    /// Whether the broker says that it has delivered the message before.
    pub redelivered: bool,
    /// Whether this is the kept last message of a topic.
    pub retained: bool,
}

/// The backend's side of receiving from one channel. Users hold a [`Subscription`](crate::Subscription) or write handlers.
///
/// A consumer that is created fetches on its own, at most [`ConsumeOptions::prefetch`] messages ahead, and
/// goes on by itself after a lost connection.
#[async_trait]
pub trait Consumer: Send + fmt::Debug + 'static {
    /// Waits for at least one message and appends up to `max` to `into`.
    ///
    /// Must be cancel-safe: dropping the future loses nothing. A lost connection is not an error, the call
    /// goes on waiting; an error is final (the channel was deleted, permission was withdrawn, the consumer was closed).
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()>;

    /// The same without a future of its own, which takes an allocation; `None`: only [`receive`](Self::receive) is there.
    /// A poll that was pending and is not repeated is ended by [`stop_receiving`](Self::stop_receiving).
    fn poll_receive(&mut self, cx: &mut Context<'_>, max: usize, into: &mut Vec<Incoming>) -> Option<Poll<Result<()>>> {
        let _ = (cx, max, into);
        None
    }

    /// What the last poll waits for is not awaited any more.
    fn stop_receiving(&mut self) {}

    /// What settles the deliveries of this consumer; outlives it.
    fn settler(&self) -> Arc<dyn Settler>;

    /// Stops fetching, returns to the broker what was fetched and not received, and flushes acknowledgements.
    /// Deliveries that were received can still be settled or released afterwards; a second call flushes what was.
    async fn close(&mut self) -> Result<()>;
}

/// Waits for messages as [`Consumer::receive`] does, in the way that costs less.
pub(crate) async fn receive(consumer: &mut dyn Consumer, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
    let polled = {
        let waiting = Waiting(consumer);
        poll_fn(|cx| match waiting.0.poll_receive(cx, max, into) {
            Some(received) => received.map(Some),
            None => Poll::Ready(None),
        })
        .await
    };
    match polled {
        Some(received) => received,
        None => consumer.receive(max, into).await,
    }
}

/// Dropping it ends the wait.
struct Waiting<'a>(&'a mut dyn Consumer);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.stop_receiving();
    }
}

/// Settles deliveries. Every method may be called from any task and must not block.
///
/// A token is settled once; core guarantees it. A token of a connection that has ended, or of a lease that
/// has expired, answers [`ErrorKind::Stale`](crate::ErrorKind::Stale): the broker delivers that message again. That
/// ends the delivery, which no longer counts against the prefetch; a [`release`](Self::release) may follow, or not.
pub trait Settler: Send + Sync + fmt::Debug + 'static {
    /// The message is done. Acknowledgements may be coalesced, but never cover an unfinished message.
    /// The runner seldom waits for the answer: a [`Completion::future`] is polled to its end in a task then.
    fn ack(&self, token: Token) -> Completion<()>;

    /// Many messages are done, each as with [`ack`](Self::ack); an error is that of one of them. For backends that
    /// do something once for all of them.
    fn ack_many(&self, tokens: &[Token]) -> Completion<()> {
        let mut result = Ok(());
        for token in tokens {
            // An answer that comes later can only be that the message comes again: nobody needs to wait for it.
            if let Some(Err(error)) = self.ack(*token).answer_or_go_on() {
                result = Err(error);
            }
        }
        Completion::ready(result)
    }

    /// Back to the broker, for any consumer, now. Used when a delivery is dropped unsettled and when a consumer
    /// drains; best effort, because a connection that has ended has returned it already. Counts no attempt where
    /// polymq counts: what was not tried, or was cancelled, has not failed.
    fn release(&self, token: Token, message: Message);

    /// Another attempt after a delay, behind the messages that wait unless the backend declares otherwise:
    /// `attempt` is the number that the next delivery must carry when the backend declares a delivery count. The original is only given up when its successor is safe with the broker.
    ///
    /// Answers [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as the capabilities declare.
    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()>;

    /// Gives the message up with this reason, where its sender keeps it ([`Capabilities::direct`](crate::Capabilities)).
    /// Asked for only when the channel has no dead-letter queue.
    fn reject(&self, token: Token, reason: &str) -> Completion<()> {
        let _ = (token, reason);
        Completion::ready(Err(Error::new(ErrorKind::Unsupported, "this channel has no dead-letter queue of polymq's")
            .with_hint("choose one in the failure policy")))
    }

    /// The message is done and these are sent, to addresses as the broker knows them: all of it or nothing. Asked for only
    /// when the consumer was made with [`ConsumeOptions::transactional`].
    fn ack_and_send(&self, token: Token, messages: Vec<(Address, Message)>) -> Completion<()> {
        let _ = (token, messages);
        Completion::ready(Err(Error::unsupported("this", "sending and acknowledging as one")))
    }

    /// Acknowledges with an answer that travels back on the same exchange, where the protocol has one (the response of
    /// HTTP). `None`: it has none, and the answer goes to the message's reply address.
    fn answer(&self, token: Token, answer: &Message) -> Option<Completion<()>> {
        let _ = (token, answer);
        None
    }

    /// The broker should hold the message for us for `by` from now on.
    fn extend(&self, token: Token, by: Duration) -> Completion<()> {
        let _ = (token, by);
        Completion::ready(Err(Error::unsupported("this", "lease extension")))
    }
}

/// Where a group that has no position yet begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// With the messages sent from now on.
    #[default]
    New,
    /// With the oldest message that the broker keeps; needs the replay capability.
    Earliest,
}

/// How a channel is consumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumeOptions {
    /// The group that shares a topic's messages. A topic without a group is a subscription of its own that ends
    /// with the consumer.
    pub group: Option<String>,
    /// The most messages fetched and not settled.
    pub prefetch: usize,
    /// The most bytes fetched and not settled, where the backend declares it.
    pub prefetch_bytes: usize,
    /// Where a new group begins.
    pub start: Start,
    /// Messages of one key are handled in their order.
    pub ordered_by_key: bool,
    /// Of a topic, only messages of these kinds; empty takes all.
    pub kinds: Vec<String>,
    /// What a handler sends by what it returns ([`Sends`](crate::Sends)) and the acknowledgement of its message are one.
    pub transactional: bool,
    /// The queue for dead letters, made together with the channel; `None` makes none.
    pub dead_letters: Option<Address>,
    /// Creates the channel when it does not exist; otherwise a missing channel is
    /// [`ErrorKind::NotFound`](crate::ErrorKind::NotFound).
    pub declare: bool,
    /// The queue is for this consumer alone and for a while: it may end with it, has no dead-letter queue and needs no disk.
    /// A backend whose broker has nothing like it makes an ordinary queue, which is deleted by its user.
    pub temporary: bool,
    /// How long the broker lends a message at a time, where it does; extended while the handler runs.
    pub lease: Duration,
    /// How long a message is lent in all, whatever its handler does.
    pub max_lease: Duration,
    /// Settings that only one backend knows, checked by it.
    pub extra: Vec<(String, String)>,
}

impl Default for ConsumeOptions {
    fn default() -> Self {
        Self {
            group: None,
            prefetch: 256,
            prefetch_bytes: 64 * 1024 * 1024,
            start: Start::New,
            ordered_by_key: false,
            transactional: false,
            kinds: Vec::new(),
            dead_letters: None,
            declare: true,
            temporary: false,
            lease: Duration::from_secs(30),
            max_lease: Duration::from_secs(12 * 3600),
            extra: Vec::new(),
        }
    }
}
