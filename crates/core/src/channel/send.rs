//! Sending one message.

use std::{sync::PoisonError, time::Duration};

use serde::Serialize;
use tokio::{
    task::coop,
    time::{Instant, timeout_at},
};

use super::{Channel, Sending, WhenFull};
use crate::{
    Address, Completion, Error, ErrorKind, HealthState, Message, Producer, Receipt, Reply, Result, Retry,
    layer::NextSend, message::Stamp,
};

impl Channel {
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
            self.prepare(&mut message, Stamp::now).inspect_err(|error| self.0.sent.count_error(error))?;
            // Where answers are always at hand, a producer that never waits must not keep other tasks from running.
            coop::consume_budget().await;
            // The way of most sends, in one piece: each call on the way would move the message once more.
            if self.0.sending.repeats == 0
                && self.0.parts.layers.is_empty()
                && let Some(producer) = self.0.producer.get()
                && self.0.window.has_plenty(self.0.options.window)
            {
                return match producer.send(message).at_hand() {
                    Ok(result) => {
                        self.0.sent.count(&result);
                        result.map_err(|error| self.locate(error))
                    }
                    Err(mut completion) => {
                        let pending = self.0.sent.pending();
                        let _place = self.0.window.enter_late();
                        pending.answered(self.answer(&mut completion, self.deadline()).await)
                    }
                };
            }
            let pending = self.0.sent.pending();
            pending.answered(Box::pin(self.send_repeatedly(message, has_own_id, None)).await)
        }
    }

    /// Sends on a message that came over a broker as it is: what another program has written need not keep the rules for what
    /// users make. One that this backend cannot carry is refused still.
    pub(crate) async fn pass_on(&self, mut message: Message) -> Result<Receipt> {
        if let Some(identity) = &self.0.parts.identity {
            identity.sign(&mut message);
        }
        message.stamp(Stamp::now);
        self.within_limits(&message).inspect_err(|error| self.0.sent.count_error(error))?;
        let pending = self.0.sent.pending();
        pending.answered(Box::pin(self.send_repeatedly(message, true, None)).await)
    }

    /// The same for one that came over another backend: refuses what would end a connection on some.
    pub(crate) async fn pass_over(&self, message: Message) -> Result<Receipt> {
        let checked = message.check_carried().map_err(|error| self.locate(error));
        checked.inspect_err(|error| self.0.sent.count_error(error))?;
        self.pass_on(message).await
    }

    /// Sends a message as part of something that must have ended then.
    pub(crate) async fn send_until(&self, deadline: Instant, mut message: Message) -> Result<Receipt> {
        let has_own_id = message.id().is_some();
        self.prepare(&mut message, Stamp::now).inspect_err(|error| self.0.sent.count_error(error))?;
        let pending = self.0.sent.pending();
        pending.answered(self.send_repeatedly(message, has_own_id, Some(deadline)).await)
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
        let asking = crate::request::request(self, message, self.0.options.timeout, self.deadline());
        Box::pin(asking).await.map_err(|error| self.locate(error.with_operation("request")))
    }

    /// Sends a message and takes the answer of the same exchange.
    pub(crate) async fn exchange(&self, deadline: Instant, message: Message) -> Result<Message> {
        let pending = self.0.sent.pending();
        pending.answered(self.exchange_once(deadline, message).await)
    }

    async fn exchange_once(&self, deadline: Instant, mut message: Message) -> Result<Message> {
        self.prepare(&mut message, Stamp::now)?;
        let answer = std::sync::Mutex::new(None);
        let last = |mut message: Message| -> futures_util::future::BoxFuture<'_, _> {
            let answer = &answer;
            Box::pin(async move {
                // A layer may have changed the message.
                self.prepare(&mut message, Stamp::now)?;
                let id = message.id().cloned().unwrap_or_default();
                let (producer, _) = self.start(Some(deadline)).await?;
                let _place = self.0.window.permit();
                let answered = match timeout_at(deadline, producer.request(message)).await {
                    Ok(answered) => answered?,
                    Err(_) => {
                        let sentence = format!("no reply within {:?}", self.0.options.timeout);
                        return Err(Error::new(ErrorKind::UnknownOutcome, sentence));
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
        self.producer(self.deadline()).await?;
        Ok((self.0.parts.connection.real_address(&self.0.address), message))
    }

    /// Each attempt may take the time-out of a send, unless all of them must have ended by a deadline.
    async fn send_repeatedly(&self, message: Message, has_own_id: bool, deadline: Option<Instant>) -> Result<Receipt> {
        for attempt in 1..=self.0.sending.repeats {
            let error = match self.send_once(message.clone(), deadline).await {
                Ok(receipt) => return Ok(receipt),
                Err(error) => error,
            };
            let Some(pause) = self.repeat_after(&error, has_own_id, attempt) else { return Err(error) };
            if deadline.is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()) <= pause) {
                return Err(error);
            }
            tracing::warn!(channel = self.0.address.name(), %error, attempt, "not sent; trying again");
            tokio::time::sleep(pause).await;
        }
        self.send_once(message, deadline).await
    }

    /// How long after this error, which that attempt met, a message may be sent again; `None`: it may not.
    pub(super) fn repeat_after(&self, error: &Error, has_own_id: bool, attempt: u32) -> Option<Duration> {
        let Sending { backoff, .. } = self.0.sending;
        match error.retry() {
            Retry::Now => Some(backoff.delay(attempt)),
            Retry::After(least) => Some(backoff.delay(attempt).max(least)),
            Retry::UnknownOutcome if has_own_id => Some(backoff.delay(attempt)),
            Retry::UnknownOutcome | Retry::Never => None,
        }
    }

    /// The outcome of a message that left with an acknowledgement, or failed to.
    pub(crate) fn count_sent(&self, error: Option<&Error>) {
        match error {
            Some(error) => self.0.sent.count_error(error),
            None => self.0.sent.count(&Ok(())),
        }
    }

    async fn send_once(&self, message: Message, deadline: Option<Instant>) -> Result<Receipt> {
        if self.0.parts.layers.is_empty() {
            return self.hand_over(message, deadline).await;
        }
        let last = |message| -> futures_util::future::BoxFuture<'_, _> {
            Box::pin(async move {
                // A layer may have made it larger.
                self.within_limits(&message)?;
                self.hand_over(message, deadline).await
            })
        };
        NextSend { address: &self.0.address, layers: &self.0.parts.layers, last: &last }.send(message).await
    }

    /// Hands a message over and returns without waiting for the broker's answer, which the completion gives.
    /// [`flush`](Self::flush) and closing the bus wait for it. Nothing is repeated
    /// ([`with_repeats`](Self::with_repeats)). Layers are run, so with layers it waits, and repeats, like
    /// [`send_message`](Self::send_message).
    ///
    /// # Errors
    /// Those that are found before anything is sent.
    pub async fn enqueue(&self, mut message: Message) -> Result<Completion<Receipt>> {
        if !self.0.parts.layers.is_empty() {
            return Ok(Completion::ready(self.send_message(message).await));
        }
        let ready = async {
            self.prepare(&mut message, Stamp::now)?;
            self.start(None).await
        };
        let (producer, deadline) = ready.await.inspect_err(|error| self.0.sent.count_error(error))?;
        let place = Place(self.clone());
        let mut completion = producer.send(message);
        if let Some(result) = completion.try_take() {
            self.0.sent.count(&result);
            return Ok(Completion::ready(result.map_err(|error| self.locate(error))));
        }
        let (answer, handle) = Completion::queued();
        let _always = answer.hand_over();
        let deadline = deadline.unwrap_or_else(|| self.deadline());
        tokio::spawn(async move {
            let pending = place.0.0.sent.pending();
            answer.complete(pending.answered(place.0.answer(&mut completion, deadline).await));
        });
        Ok(handle)
    }

    /// Sends without layers and without the rules for user headers: for copies that polymq makes, which have their id.
    pub(crate) async fn send_as_is(&self, message: Message) -> Result<Receipt> {
        self.hand_over(message, None).await
    }

    async fn hand_over(&self, message: Message, deadline: Option<Instant>) -> Result<Receipt> {
        let (producer, deadline) = self.start(deadline).await?;
        let _place = self.0.window.permit();
        let mut completion = producer.send(message);
        match completion.try_take() {
            Some(result) => result.map_err(|error| self.locate(error)),
            None => self.answer(&mut completion, deadline.unwrap_or_else(|| self.deadline())).await,
        }
    }

    /// The producer, with a place in the window. Opening, waiting for room and the answer have one deadline, which is `None`
    /// as long as nothing had to be waited for: the clock is not free.
    async fn start(&self, deadline: Option<Instant>) -> Result<(&dyn Producer, Option<Instant>)> {
        if let Some(producer) = self.0.producer.get()
            && self.0.window.try_enter(self.0.options.window)
        {
            return Ok((producer.as_ref(), deadline));
        }
        let deadline = deadline.unwrap_or_else(|| self.deadline());
        let producer = self.producer(deadline).await?;
        self.enter(deadline).await?;
        Ok((producer, Some(deadline)))
    }

    /// The answer until the deadline; afterwards what is certain about it.
    pub(super) async fn answer(&self, completion: &mut Completion<Receipt>, deadline: Instant) -> Result<Receipt> {
        match timeout_at(deadline, &mut *completion).await {
            Ok(result) => result.map_err(|error| self.locate(error)),
            Err(_) if completion.withdraw() => Err(self.too_late()),
            Err(_) => Err(self.locate(Error::new(
                ErrorKind::UnknownOutcome,
                format!("no answer within {:?}; the message may have been accepted", self.0.options.timeout),
            ))),
        }
    }

    #[cold]
    pub(super) fn too_late(&self) -> Error {
        let health = self.connection().health().now();
        let (kind, why) = match health.state {
            HealthState::Up | HealthState::Degraded => (ErrorKind::Timeout, String::new()),
            HealthState::Down | HealthState::Closed => (ErrorKind::Disconnected, format!(" ({health})")),
        };
        self.locate(Error::new(kind, format!("not sent within {:?}{why}", self.0.options.timeout)))
    }

    /// Takes a place in the window.
    async fn enter(&self, deadline: Instant) -> Result<()> {
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
        match timeout_at(deadline, window.wait(limit)).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.too_late()),
        }
    }
}

/// A place in the window that outlives the call which took it.
struct Place(Channel);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.0.window.leave();
    }
}
