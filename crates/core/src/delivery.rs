//! A message that was received and must be settled: once, by value.

use std::{
    fmt, mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::{
    Address, Bus, Capabilities, Channel, Completion, Details, Error, ErrorKind, Incoming, Message, Result, Retry,
    Sends, Settler, Support,
    clock::FAR,
    dead_letter::{Errors, FIRST_ERROR, Obituary, brief_dead_letter, dead_letter, header_text},
    message::Stamp,
    request::{ReplyAddress, Trace},
    settling::Settling,
};

/// What the deliveries of one consumer share.
#[derive(Debug)]
pub(crate) struct Origin {
    pub(crate) settler: Arc<dyn Settler>,
    pub(crate) address: Address,
    pub(crate) group: Option<String>,
    pub(crate) backend: &'static str,
    pub(crate) capabilities: Capabilities,
    pub(crate) transactional: bool,
    pub(crate) dead_letters: Option<Channel>,
}

impl Origin {
    /// Says where settling has failed. The name of the backend is the connection's, also where that is built on another.
    #[cold]
    fn locate(&self, error: Error) -> Error {
        error.with_backend(self.backend).with_operation("settle").with_channel(self.address.name())
    }
}

/// A received message. Settle it with one of [`ack`](Self::ack), [`retry`](Self::retry), [`reject`](Self::reject) and
/// [`drop_message`](Self::drop_message); each takes the delivery, so that settling twice does not compile, and
/// gives it back inside the error when it fails. A delivery that is dropped unsettled returns to the broker, with a warning.
/// Settling whose future is dropped before the broker has answered goes on; the message returns only if that fails.
pub struct Delivery(Box<Inner>); // boxed: it is moved several times on its way to being settled

struct Inner {
    incoming: Incoming,
    attempt: u32,
    origin: Arc<Origin>,
    settled: bool,
    /// What a dead letter of it gets that has no id: the same at each try. Boxed: almost none needs it.
    stamp: Option<Box<Stamp>>,
}

impl Inner {
    async fn ready(&self, messages: &[(Channel, Message)]) -> Result<Vec<(Address, Message)>> {
        let mut ready = Vec::new();
        for (channel, message) in messages {
            ready.push(channel.ready(message.clone()).await?);
        }
        Ok(ready)
    }
}

impl Delivery {
    #[inline]
    pub(crate) fn new(incoming: Incoming, origin: Arc<Origin>) -> Self {
        // The place first: what is made before it is moved once more.
        let place = Box::new_uninit();
        let attempt = incoming.attempt();
        Self(Box::write(place, Inner { incoming, attempt, origin, settled: false, stamp: None }))
    }

    pub(crate) fn with_attempt(mut self, attempt: u32) -> Self {
        self.0.attempt = attempt;
        self
    }

    /// It is settled already, by other means.
    pub(crate) fn forget(mut self) {
        self.keep();
    }

    /// It does not return to the broker when it is dropped.
    pub(crate) fn keep(&mut self) {
        self.0.settled = true;
    }

    /// The message.
    #[must_use]
    pub fn message(&self) -> &Message {
        &self.0.incoming.message
    }

    /// The number of this attempt, 1-based.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.0.attempt
    }

    /// The concrete name of the channel: with wildcards, the name that was sent to.
    #[must_use]
    pub fn channel(&self) -> &str {
        self.0.incoming.channel().unwrap_or(self.0.origin.address.name())
    }

    /// What the broker itself tells about the delivery.
    #[must_use]
    pub fn details(&self) -> Option<&Details> {
        self.0.incoming.details.as_deref()
    }

    /// The message is done.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`](crate::ErrorKind::Stale) when the broker has taken the message back in the meantime: it comes again.
    pub async fn ack(self) -> Result<(), SettleError> {
        match self.0.origin.settler.ack(self.0.incoming.token).at_hand() {
            Ok(acknowledged) => self.settled(acknowledged),
            Err(settling) => Settling::new(self, settling).await,
        }
    }

    /// The message is done, and the one who asked gets this answer: as the response where the protocol has one, otherwise
    /// in a message to its reply address, which is accepted by the broker before the original is acknowledged. Where
    /// nobody asks for an answer, or nobody can take it any more, the message is only acknowledged.
    ///
    /// # Errors
    /// Those of sending the answer that may pass (the original is untouched then), and of [`ack`](Self::ack).
    pub async fn answer(self, bus: &Bus, answer: Message) -> Result<(), SettleError> {
        if self.0.origin.capabilities.direct {
            let answer = Trace::of(self.message()).goes_on_in(answer);
            let passed = match crate::request::sent(bus.parts(), &self.0.origin.address, answer).await {
                Ok(passed) => passed,
                Err(error) => return Err(self.failed(error)),
            };
            if let Some(told) = self.0.origin.settler.answer(self.0.incoming.token, &passed) {
                return self.settle(told).await;
            }
            return self.ack().await;
        }
        let Some(asking) = ReplyAddress::of(self.message()) else { return self.ack().await };
        match asking.send(bus, answer).await {
            // A sender of our own that is closed says nothing of who asked.
            Err(error) if error.retry() != Retry::Never || error.kind() == ErrorKind::Closed => Err(self.failed(error)),
            outcome => {
                if let Err(error) = outcome {
                    tracing::warn!(channel = self.channel(), %error, "whoever asked cannot be answered any more");
                }
                self.ack().await
            }
        }
    }

    /// The message is done and these are sent: both or neither on a transactional consumer
    /// ([`ConsumeOptions::transactional`](crate::ConsumeOptions)); on any other they are accepted by the broker before the
    /// message is acknowledged.
    ///
    /// # Errors
    /// Those of encoding and sending (the original is untouched then), and of [`ack`](Self::ack).
    pub async fn ack_and_send(self, bus: &Bus, sends: Sends) -> Result<(), SettleError> {
        match sends.messages(bus) {
            Ok(messages) => self.ack_with(&messages, &AtomicUsize::new(0)).await,
            Err(error) => Err(self.failed(error)),
        }
    }

    /// As [`ack_and_send`](Self::ack_and_send); `accepted` counts those that need not be sent once more when it is called again.
    pub(crate) async fn ack_with(
        self,
        messages: &[(Channel, Message)],
        accepted: &AtomicUsize,
    ) -> Result<(), SettleError> {
        if self.0.origin.transactional {
            let settled = match self.0.ready(messages).await {
                Ok(ready) => {
                    let settling = self.0.origin.settler.ack_and_send(self.0.incoming.token, ready);
                    self.settle(settling).await
                }
                Err(error) => Err(self.failed(error)),
            };
            let error = settled.as_ref().err().map(SettleError::error);
            messages.iter().for_each(|(channel, _)| channel.count_sent(error));
            return settled;
        }
        for (channel, message) in &messages[accepted.load(Ordering::Relaxed).min(messages.len())..] {
            if let Err(error) = channel.send_message(message.clone()).await {
                return Err(self.failed(error));
            }
            accepted.fetch_add(1, Ordering::Relaxed);
        }
        self.ack().await
    }

    /// Another attempt, no earlier than `after` from now; more than 30 years count as 30.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) as the backend declares; `Stale` as for [`ack`](Self::ack).
    pub async fn retry(self, after: Duration) -> Result<(), SettleError> {
        let next = self.0.attempt.saturating_add(1);
        self.again(next, after, None).await
    }

    /// Puts the message back behind the others, or for later, without counting an attempt.
    ///
    /// # Errors
    /// As [`retry`](Self::retry).
    pub async fn defer(self, after: Duration) -> Result<(), SettleError> {
        let same = self.0.attempt;
        self.again(same, after, None).await
    }

    pub(crate) async fn again(mut self, attempt: u32, after: Duration, error: Option<&str>) -> Result<(), SettleError> {
        if let Err(error) = can_retry(self.0.origin.backend, &self.0.origin.capabilities, after) {
            return Err(self.failed(error));
        }
        if let Some(error) = error
            && self.0.incoming.message.system_headers().get(FIRST_ERROR).is_none()
        {
            self.0.incoming.message.set_system_header(FIRST_ERROR, header_text(error));
        }
        // A backend adds it to the present.
        let after = after.min(FAR);
        let settling = self.0.origin.settler.retry(self.0.incoming.token, &self.0.incoming.message, attempt, after);
        self.settle(settling).await
    }

    /// Waits for the answer to what the settler was told.
    async fn settle(self, settling: Completion<()>) -> Result<(), SettleError> {
        match settling.at_hand() {
            Ok(settled) => self.settled(settled),
            Err(settling) => Settling::new(self, settling).await,
        }
    }

    pub(crate) fn settled(mut self, outcome: Result<()>) -> Result<(), SettleError> {
        match outcome {
            Ok(()) => {
                self.0.settled = true;
                Ok(())
            }
            Err(error) => {
                let error = self.0.origin.locate(error);
                let over = matches!(error.kind(), ErrorKind::Stale | ErrorKind::Closed);
                Err(SettleError { over, ..self.failed(error) })
            }
        }
    }

    /// To the dead-letter queue, with the reason. The copy is accepted by the broker before the original is acknowledged.
    ///
    /// # Errors
    /// Those of sending the copy (the original is untouched then) and of [`ack`](Self::ack).
    pub async fn reject(self, reason: &str) -> Result<(), SettleError> {
        self.bury(reason, Errors::default()).await
    }

    pub(crate) async fn bury(self, reason: &str, errors: Errors<'_>) -> Result<(), SettleError> {
        let origin = Arc::clone(&self.0.origin);
        let obituary = Obituary {
            reason,
            source: &origin.address,
            group: origin.group.as_deref(),
            attempts: self.0.attempt,
            errors,
        };
        self.bury_as(reason, |message| dead_letter(message, obituary)).await
    }

    /// The same with no more than the reason, cut short, and the source: for a message that is too large with all of it.
    pub(crate) async fn bury_briefly(self, reason: &str) -> Result<(), SettleError> {
        let origin = Arc::clone(&self.0.origin);
        self.bury_as(reason, |message| brief_dead_letter(message, reason, &origin.address)).await
    }

    async fn bury_as(mut self, reason: &str, letter: impl FnOnce(&Message) -> Message) -> Result<(), SettleError> {
        let Some(channel) = &self.0.origin.dead_letters else {
            let settling = self.0.origin.settler.reject(self.0.incoming.token, reason);
            return self.settle(settling).await;
        };
        let (mut letter, stamp) = (letter(&self.0.incoming.message), &mut self.0.stamp);
        letter.stamp(|| **stamp.get_or_insert_with(|| Box::new(Stamp::now())));
        match channel.send_as_is(letter).await {
            Ok(_) => self.ack().await,
            Err(error) => Err(self.failed(error)),
        }
    }

    /// Acknowledges the message without having handled it; the reason is logged.
    ///
    /// # Errors
    /// As [`ack`](Self::ack).
    pub async fn drop_message(self, reason: &str) -> Result<(), SettleError> {
        let message = self.message();
        tracing::info!(channel = self.channel(), id = ?message.id(), reason, "message dropped");
        self.ack().await
    }

    /// The broker should hold the message for us for `by` from now on.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) where the broker lends for no fixed time; `Stale` when
    /// the loan is over.
    pub async fn extend(&self, by: Duration) -> Result<()> {
        if !self.0.origin.capabilities.leases {
            return Err(Error::unsupported(self.0.origin.backend, "lease extension"));
        }
        let extended = self.0.origin.settler.extend(self.0.incoming.token, by).await;
        extended.map_err(|error| self.0.origin.locate(error))
    }

    /// Returns the message to the broker without a warning.
    pub(crate) fn release(mut self) {
        self.0.settled = true;
        self.0.origin.settler.release(self.0.incoming.token, mem::take(&mut self.0.incoming.message));
    }

    #[cold]
    fn failed(self, error: Error) -> SettleError {
        // What was to be sent with it may have failed on another backend, which keeps its name.
        let error = error.with_operation("settle").with_channel(self.0.origin.address.name());
        SettleError { error, delivery: self, over: false }
    }
}

/// Refuses what the backend declares that it cannot do.
pub(crate) fn can_retry(backend: &'static str, capabilities: &Capabilities, after: Duration) -> Result<()> {
    if after.is_zero() {
        return match capabilities.requeue {
            Support::None => Err(Error::unsupported(backend, "returning a message for another attempt")),
            Support::Emulated | Support::Native => Ok(()),
        };
    }
    if !capabilities.delayed_retry.support.is_available() {
        return Err(Error::unsupported(backend, "returning a message for an attempt after a delay"));
    }
    match capabilities.delayed_retry.max {
        Some(max) if after > max => {
            Err(Error::unsupported(backend, format_args!("a retry delay of {after:?}, at most {max:?} is possible")))
        }
        _ => Ok(()),
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if !self.0.settled {
            tracing::warn!(
                channel = self.channel(),
                id = ?self.0.incoming.message.id(),
                "delivery dropped unsettled; the message returns to the broker"
            );
            self.0.origin.settler.release(self.0.incoming.token, mem::take(&mut self.0.incoming.message));
        }
    }
}

impl fmt::Debug for Delivery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Delivery")
            .field("channel", &self.channel())
            .field("attempt", &self.0.attempt)
            .field("message", &self.0.incoming.message)
            .finish_non_exhaustive()
    }
}

/// Settling failed; the delivery is inside and can be settled again or dropped.
#[derive(Debug)]
pub struct SettleError {
    error: Error,
    delivery: Delivery,
    /// The broker's side of it is over; nothing that is done with it has an effect.
    over: bool,
}

impl SettleError {
    /// What went wrong.
    #[must_use]
    pub fn error(&self) -> &Error {
        &self.error
    }

    /// Whether the delivery itself is over, and not something that was to be sent with it.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// The delivery, unsettled.
    #[must_use]
    pub fn into_delivery(self) -> Delivery {
        self.delivery
    }

    /// Both parts.
    #[must_use]
    pub fn into_parts(self) -> (Error, Delivery) {
        (self.error, self.delivery)
    }
}

impl fmt::Display for SettleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl std::error::Error for SettleError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

impl From<SettleError> for Error {
    /// Gives the delivery up: it returns to the broker.
    fn from(settle: SettleError) -> Self {
        let SettleError { error, delivery, .. } = settle;
        delivery.release();
        error
    }
}
