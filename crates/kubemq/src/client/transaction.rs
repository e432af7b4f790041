//! One message held for a visibility time: the stream `StreamQueueMessage`, of which every transaction has its own.

use std::{sync::Arc, time::Duration};

use polymq_core::{Error, ErrorKind, Message, Result};
use polymq_kubemq_proto::{
    QueueMessage, StreamQueueMessagesRequest, StreamQueueMessagesResponse, StreamRequestType as Kind,
};

use super::{
    KubeMq, Policy, check_name,
    duplex::Duplex,
    queues::{seconds, wait_seconds},
    verify::verified,
};
use crate::{
    convert::MAX_SECONDS,
    error::{self, Effect},
    topology::request_id,
};

/// The stream's error when nothing came in time.
const NOTHING: &str = "Error 138";

/// A message that is held, invisible to others, until it is settled or its visibility time is over.
///
/// ```no_run
/// # use std::time::Duration;
/// # async fn example(client: polymq_kubemq::KubeMq) -> polymq_core::Result<()> {
/// let second = Duration::from_secs(1);
/// if let Some(mut held) = client.transaction("orders", 30 * second, 5 * second).await? {
///     held.extend(60 * second).await?;
///     held.ack().await?;
/// }
/// # Ok(())
/// # }
/// ```
///
/// Settling consumes it, so nothing is settled twice:
///
/// ```compile_fail,E0382
/// # async fn example(held: polymq_kubemq::Transaction) -> polymq_core::Result<()> {
/// held.ack().await?;
/// held.reject().await // value used after move
/// # }
/// ```
///
/// and what [`KubeMq::receive`] took is acknowledged already, so it cannot be settled at all:
///
/// ```compile_fail,E0599
/// # async fn example(client: polymq_kubemq::KubeMq) -> polymq_core::Result<()> {
/// let taken = client.receive("orders", 1, std::time::Duration::from_secs(1)).await?;
/// for message in taken {
///     message.ack().await?; // no such method
/// }
/// # Ok(())
/// # }
/// ```
///
/// Dropped unsettled, and when its connection ends or its time is over, the message goes to the end of its queue with its
/// delivery counted, or to its dead-letter queue. The same happens when settling fails, unless it had its effect: after
/// [`ErrorKind::UnknownOutcome`], which also stands for a future that was dropped, nobody knows.
#[derive(Debug)]
pub struct Transaction {
    message: QueueMessage,
    stream: Duplex<StreamQueueMessagesRequest, StreamQueueMessagesResponse>,
    client_id: Arc<str>,
}

impl KubeMq {
    /// Holds the oldest message of a queue for `visibility` (whole seconds, at most 12 h), waiting up to `wait` (whole
    /// seconds, at most 1 h) for one; `None` when none came. When its future is dropped, a message that was on its way is
    /// counted as delivered and goes back.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for bounds and names, what the broker says, and [`ErrorKind::Decode`] when the MD5 of the
    /// body is not the one that the server tells; that message goes back, counted.
    pub async fn transaction(&self, queue: &str, visibility: Duration, wait: Duration) -> Result<Option<Transaction>> {
        check_name(queue)?;
        let request = StreamQueueMessagesRequest {
            channel: queue.to_owned(),
            visibility_seconds: visibility_seconds(visibility)?,
            wait_time_seconds: wait_seconds(wait)?,
            ..request(Kind::ReceiveMessage, &self.link.client_id)
        };
        let limit = wait + self.link.config.request_timeout;
        let open =
            |mut client: crate::transport::Client, requests| async move { client.stream_queue_message(requests).await };
        let mut stream = Duplex::open(self.link.link(), request, limit, open).await?;
        let ended = || error::disconnected("receive", "the broker ended the stream");
        let answer = stream.hear("receive", Effect::Idempotent, limit).await?.ok_or_else(ended)?;
        if answer.is_error {
            return if answer.error.starts_with(NOTHING) { Ok(None) } else { Err(refused("receive", &answer.error)) };
        }
        let Some(message) = verified(Vec::from_iter(answer.message))?.pop() else { return Err(ended()) };
        Ok(Some(Transaction { message, stream, client_id: self.link.client_id.as_str().into() }))
    }
}

impl Transaction {
    /// What is held.
    #[must_use]
    pub fn message(&self) -> &QueueMessage {
        &self.message
    }

    /// It is done and leaves the queue.
    ///
    /// # Errors
    /// [`ErrorKind::Stale`] when its visibility time was over before: it is delivered again.
    pub async fn ack(mut self) -> Result<()> {
        let request = StreamQueueMessagesRequest { ref_sequence: self.sequence(), ..self.request(Kind::AckMessage) };
        self.exchange("ack", request).await
    }

    /// To the end of its queue, this delivery counted; to its dead-letter queue when that was the last it may have.
    ///
    /// # Errors
    /// As [`ack`](Self::ack).
    pub async fn reject(mut self) -> Result<()> {
        let request = StreamQueueMessagesRequest { ref_sequence: self.sequence(), ..self.request(Kind::RejectMessage) };
        self.exchange("reject", request).await
    }

    /// Held for so long from now on (whole seconds, at most 12 h), however much was left.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for the bounds, without any call; else as [`ack`](Self::ack).
    pub async fn extend(&mut self, visibility: Duration) -> Result<()> {
        let visibility_seconds = visibility_seconds(visibility)?;
        let request = StreamQueueMessagesRequest { visibility_seconds, ..self.request(Kind::ModifyVisibility) };
        self.exchange("extend", request).await
    }

    /// It leaves this queue for another, as a new message with the same id, content and policy.
    ///
    /// # Errors
    /// As [`ack`](Self::ack), and what the broker says about the other queue.
    pub async fn resend(mut self, queue: &str) -> Result<()> {
        check_name(queue)?;
        let request = StreamQueueMessagesRequest { channel: queue.to_owned(), ..self.request(Kind::ResendMessage) };
        self.exchange("resend", request).await
    }

    /// Another message goes to a queue in its stead, this one or another; it leaves this queue. A message without an id gets
    /// one of its own.
    ///
    /// # Errors
    /// As [`KubeMq::send`] for the message and [`ack`](Self::ack) for this one.
    pub async fn resend_modified(mut self, queue: &str, message: &Message, policy: &Policy) -> Result<()> {
        let mut modified = super::queues::native(&self.client_id, queue, message, policy)?;
        if modified.message_id.is_empty() {
            modified.message_id = request_id();
        }
        let request =
            StreamQueueMessagesRequest { modified_message: Some(modified), ..self.request(Kind::SendModifiedMessage) };
        self.exchange("resend", request).await
    }

    fn sequence(&self) -> u64 {
        self.message.attributes.as_ref().map_or(0, |attributes| attributes.sequence)
    }

    fn request(&self, kind: Kind) -> StreamQueueMessagesRequest {
        request(kind, &self.client_id)
    }

    /// Its time may be over while nobody asks: then that is the next answer, whatever was asked.
    async fn exchange(&mut self, operation: &'static str, request: StreamQueueMessagesRequest) -> Result<()> {
        let limit = self.stream.link.config.request_timeout;
        let id = request.request_id.clone();
        self.stream.tell(request).await;
        loop {
            match self.stream.hear(operation, Effect::Once, limit).await? {
                Some(answer) if answer.is_error => return Err(refused(operation, &answer.error)),
                Some(answer) if answer.request_id == id => return Ok(()),
                // Of an extension whose future was dropped.
                Some(_) => {}
                None => return Err(error::lost(operation, Effect::Once, "the broker ended the stream")),
            }
        }
    }
}

fn request(kind: Kind, client_id: &str) -> StreamQueueMessagesRequest {
    StreamQueueMessagesRequest {
        request_id: request_id(),
        client_id: client_id.to_owned(),
        stream_request_type_data: kind.into(),
        ..StreamQueueMessagesRequest::default()
    }
}

fn visibility_seconds(visibility: Duration) -> Result<i32> {
    seconds("visibility time", visibility, MAX_SECONDS)
}

fn refused(operation: &'static str, text: &str) -> Error {
    let error = error::refused(operation, text);
    match error.kind() {
        ErrorKind::Stale => {
            error.with_hint("hold it longer, or extend it in time; the broker delivers the message again")
        }
        _ => error,
    }
}
