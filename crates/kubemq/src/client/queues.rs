//! Queues without transactions: sending with a policy, taking, looking, and emptying with a count.

use std::time::{Duration, SystemTime};

use polymq_core::{Message, Result};
use polymq_kubemq_proto::{
    QueueMessage, QueueMessagePolicy, QueueMessagesBatchRequest, ReceiveQueueMessagesRequest, SendQueueMessageResult,
};

use super::{KubeMq, check_name, verify::verified};
use crate::{
    convert::{MAX_SECONDS, Wire},
    error::{self, Effect},
    topology::{self, request_id},
};

/// The most messages of one call.
const MAX_MESSAGES: usize = 1024;
/// The most deliveries of a message.
const MAX_RECEIVES: u32 = 1024;
/// The longest wait for messages, in seconds.
const MAX_WAIT: u64 = 3600;

/// What the broker does with a message of a queue; nothing of it unless said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    /// It is gone after this, counted from when its delay has ended; whole seconds, at most 12 h.
    pub expires_in: Option<Duration>,
    /// It enters its queue after this; whole seconds, at most 12 h.
    pub delay: Option<Duration>,
    /// After so many deliveries that were not acknowledged, it goes to the queue of this name.
    pub dead_letters: Option<(u32, String)>,
}

/// What the broker says of a message that it has taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The message's id: the one it was sent with, or the broker's.
    pub id: String,
    /// When the broker took it.
    pub at: Option<SystemTime>,
    /// When it expires.
    pub expires_at: Option<SystemTime>,
    /// When it enters its queue, if not at once.
    pub delayed_to: Option<SystemTime>,
}

impl Policy {
    fn checked(&self) -> Result<QueueMessagePolicy> {
        let seconds = |what: &str, time: Option<Duration>| time.map_or(Ok(0), |time| seconds(what, time, MAX_SECONDS));
        let mut policy = QueueMessagePolicy {
            expiration_seconds: seconds("expiration", self.expires_in)?,
            delay_seconds: seconds("delay", self.delay)?,
            ..QueueMessagePolicy::default()
        };
        if let Some((count, queue)) = &self.dead_letters {
            if !(1..=MAX_RECEIVES).contains(count) {
                return Err(error::invalid(format!("{count} deliveries, expected 1 to {MAX_RECEIVES}")));
            }
            check_name(queue)?;
            policy.max_receive_count = i32::try_from(*count).unwrap_or(i32::MAX);
            policy.max_receive_queue.clone_from(queue);
        }
        Ok(policy)
    }
}

/// Whole seconds from 1 to a bound.
pub(super) fn seconds(what: &str, time: Duration, most: u64) -> Result<i32> {
    if time.subsec_nanos() > 0 || !(1..=most).contains(&time.as_secs()) {
        return Err(error::invalid(format!("the {what} is {time:?}, expected whole seconds, 1 s to {most} s")));
    }
    Ok(i32::try_from(time.as_secs()).unwrap_or(i32::MAX))
}

/// How long one wait for messages may be.
pub(super) fn wait_seconds(wait: Duration) -> Result<i32> {
    seconds("wait", wait, MAX_WAIT)
}

/// How many messages one call may ask for.
pub(super) fn check_count(max: usize) -> Result<i32> {
    if !(1..=MAX_MESSAGES).contains(&max) {
        return Err(error::invalid(format!("{max} messages, expected 1 to {MAX_MESSAGES}")));
    }
    Ok(i32::try_from(max).unwrap_or(i32::MAX))
}

impl KubeMq {
    /// Sends a message to a queue; returns when the broker has it. A message is refused before any call when it has neither
    /// body nor header `kubemq-metadata`, or a policy out of its bounds.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](polymq_core::ErrorKind::InvalidInput) as above, and what the broker says.
    pub async fn send(&self, queue: &str, message: &Message, policy: &Policy) -> Result<Accepted> {
        let native = native(&self.link.client_id, queue, message, policy)?;
        let live = self.link.live_soon("send").await?;
        let mut client = live.client.clone();
        let limit = self.link.config.request_timeout;
        outcome(self.link.call(&live, "send", Effect::Once, limit, client.send_queue_message(native)).await?)
    }

    /// Sends messages to a queue in one call, and says how each went, in their order. Not atomic: one that is refused does
    /// not stop the others. If one is not valid, none is sent.
    ///
    /// # Errors
    /// As [`send`](Self::send), for the call as a whole.
    pub async fn send_batch(
        &self,
        queue: &str,
        messages: &[Message],
        policy: &Policy,
    ) -> Result<Vec<Result<Accepted>>> {
        let messages: Vec<_> = messages
            .iter()
            .map(|message| native(&self.link.client_id, queue, message, policy))
            .collect::<Result<_>>()?;
        let count = messages.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        let request = QueueMessagesBatchRequest { batch_id: request_id(), messages };
        let live = self.link.live_soon("send").await?;
        let mut client = live.client.clone();
        let limit = self.link.config.request_timeout;
        let sending = client.send_queue_messages_batch(request);
        let answer = self.link.call(&live, "send", Effect::Once, limit, sending).await?;
        if answer.results.len() != count {
            let reason = format!("the broker told {} results of {count}", answer.results.len());
            return Err(error::lost("send", Effect::Once, &reason));
        }
        Ok(answer.results.into_iter().map(outcome).collect())
    }

    /// Takes up to `max` messages (1 to 1024), oldest first, waiting up to `wait` (whole seconds, 1 s to 1 h) for them. They are
    /// gone from the queue, and there is nothing to acknowledge: for that, see [`transaction`](Self::transaction) and
    /// [`poll`](Self::poll), or consume over a `Bus`. When its future is dropped, messages that were on their way can be lost.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`](polymq_core::ErrorKind::InvalidInput) for bounds and names, what the broker says, and
    /// [`ErrorKind::Decode`](polymq_core::ErrorKind::Decode) when the MD5 of a body is not the one that the server tells;
    /// the source of that error is [`Corrupted`](super::Corrupted) and holds the messages.
    pub async fn receive(&self, queue: &str, max: usize, wait: Duration) -> Result<Vec<QueueMessage>> {
        self.look(queue, max, wait, false).await
    }

    /// The same without taking them: they stay as they are, in their order and uncounted.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub async fn peek(&self, queue: &str, max: usize, wait: Duration) -> Result<Vec<QueueMessage>> {
        self.look(queue, max, wait, true).await
    }

    async fn look(&self, queue: &str, max: usize, wait: Duration, peek: bool) -> Result<Vec<QueueMessage>> {
        check_name(queue)?;
        let request = ReceiveQueueMessagesRequest {
            request_id: request_id(),
            client_id: self.link.client_id.clone(),
            channel: queue.to_owned(),
            max_number_of_messages: check_count(max)?,
            wait_time_seconds: wait_seconds(wait)?,
            is_peak: peek,
        };
        let live = self.link.live_soon("receive").await?;
        let mut client = live.client.clone();
        let limit = wait + self.link.config.request_timeout;
        // What is taken is gone: an answer that is lost is not asked for again.
        let effect = if peek { Effect::Idempotent } else { Effect::Once };
        let answer = self.link.call(&live, "receive", effect, limit, client.receive_queue_messages(request)).await?;
        if answer.is_error { Err(error::refused("receive", &answer.error)) } else { verified(answer.messages) }
    }

    /// Discards what waits in a queue, and says how many messages that were. What others hold stays.
    ///
    /// # Errors
    /// What the broker says.
    pub async fn ack_all(&self, queue: &str) -> Result<u64> {
        check_name(queue)?;
        let live = self.link.live_soon("purge").await?;
        topology::purge(&self.link, &live, queue).await
    }
}

/// The message as it goes to a queue, checked before any call.
pub(super) fn native(client_id: &str, queue: &str, message: &Message, policy: &Policy) -> Result<QueueMessage> {
    check_name(queue)?;
    if message.payload().is_empty() && message.headers().get("kubemq-metadata").is_none_or(str::is_empty) {
        return Err(error::invalid("the message has neither a body nor a header \"kubemq-metadata\", expected one"));
    }
    Ok(Wire::of(message).queued(queue, client_id, policy.checked()?))
}

fn outcome(sent: SendQueueMessageResult) -> Result<Accepted> {
    if sent.is_error {
        return Err(error::refused("send", &sent.error));
    }
    Ok(Accepted {
        id: sent.message_id,
        at: moment(sent.sent_at),
        expires_at: moment(sent.expiration_at),
        delayed_to: moment(sent.delayed_to),
    })
}

/// Nanoseconds since 1970, 0 for none.
fn moment(nanos: i64) -> Option<SystemTime> {
    let nanos = u64::try_from(nanos).ok().filter(|nanos| *nanos > 0)?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_nanos(nanos))
}
