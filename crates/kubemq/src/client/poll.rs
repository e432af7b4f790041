//! Several messages held at once: the stream `QueuesDownstream`, of which every poll has its own, so several can be open.

use std::{collections::BTreeSet, time::Duration};

use polymq_core::{Error, ErrorKind, Result};
use polymq_kubemq_proto::{
    QueueMessage, QueuesDownstreamRequest, QueuesDownstreamRequestType as Kind, QueuesDownstreamResponse,
};

use super::{KubeMq, check_name, duplex::Duplex, queues::check_count, verify::verified};
use crate::{
    NAME,
    error::{self, Effect},
    topology::request_id,
};

/// The longest wait of a poll.
const MAX_WAIT: Duration = Duration::from_secs(3600);

/// Messages that are held, invisible to others, for as long as this value and its connection live.
///
/// Some or all of them are acknowledged, returned or moved, by their sequences
/// ([`sequence_of`](Self::sequence_of)). Settling is done when the broker has done it: KubeMQ does not answer a
/// settlement, so each is followed by a question for what is still held. Dropped, and when its connection ends, what is not
/// settled is back in its place, uncounted.
#[derive(Debug)]
pub struct Poll {
    messages: Vec<QueueMessage>,
    held: BTreeSet<i64>,
    transaction: String,
    client_id: String,
    stream: Duplex<QueuesDownstreamRequest, QueuesDownstreamResponse>,
}

impl KubeMq {
    /// Holds up to `max` messages (1 to 1024) of a queue, oldest first, waiting up to `wait` (at most 1 h, in milliseconds) for
    /// them; fewer or none when no more came. When its future is dropped, everything is back in its place.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for bounds and names, what the broker says, and [`ErrorKind::Decode`] when the MD5 of a
    /// body is not the one that the server tells; then all of them are back in their places.
    pub async fn poll(&self, queue: &str, max: usize, wait: Duration) -> Result<Poll> {
        check_name(queue)?;
        if wait > MAX_WAIT {
            return Err(error::invalid(format!("a wait of {wait:?}, expected at most {MAX_WAIT:?}")));
        }
        let client_id = self.link.client_id.clone();
        let request = QueuesDownstreamRequest {
            request_id: request_id(),
            client_id: client_id.clone(),
            request_type_data: Kind::Get.into(),
            channel: queue.to_owned(),
            max_items: check_count(max)?,
            wait_timeout: i32::try_from(wait.as_millis()).unwrap_or(i32::MAX),
            ..QueuesDownstreamRequest::default()
        };
        let limit = wait + self.link.config.request_timeout;
        let open =
            |mut client: crate::transport::Client, requests| async move { client.queues_downstream(requests).await };
        let mut stream = Duplex::open(self.link.link(), request, limit, open).await?;
        let answer = stream.hear("receive", Effect::Idempotent, limit).await?;
        let answer = answer.ok_or_else(|| error::disconnected("receive", "the broker ended the stream"))?;
        if answer.is_error {
            return Err(error::refused("receive", &answer.error));
        }
        let messages = verified(answer.messages)?;
        let held = messages.iter().map(Poll::sequence_of).collect();
        Ok(Poll { messages, held, transaction: answer.transaction_id, client_id, stream })
    }
}

impl Poll {
    /// What the poll gave, in the order of the queue, settled or not.
    #[must_use]
    pub fn messages(&self) -> &[QueueMessage] {
        &self.messages
    }

    /// The number by which a message is settled.
    #[must_use]
    pub fn sequence_of(message: &QueueMessage) -> i64 {
        message.attributes.as_ref().map_or(0, |attributes| attributes.sequence.cast_signed())
    }

    /// The sequences of what is not settled, in order.
    pub fn held(&self) -> impl Iterator<Item = i64> + '_ {
        self.held.iter().copied()
    }

    /// These are done and leave the queue.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] without any call for a sequence that is not held, such as one that was settled before;
    /// [`ErrorKind::Stale`] when the broker does not hold them for us any more; [`ErrorKind::UnknownOutcome`] when it did not
    /// answer, or the future was dropped: it may or may not have its effect.
    pub async fn ack(&mut self, sequences: &[i64]) -> Result<()> {
        self.settle(Kind::AckRange, sequences, None).await
    }

    /// These go to the end of the queue, this delivery counted; to their dead-letter queue when that was the last they may
    /// have.
    ///
    /// # Errors
    /// As [`ack`](Self::ack).
    pub async fn nack(&mut self, sequences: &[i64]) -> Result<()> {
        self.settle(Kind::NAckRange, sequences, None).await
    }

    /// These leave the queue for another, as new messages.
    ///
    /// # Errors
    /// As [`ack`](Self::ack), and what the broker says about the other queue.
    pub async fn requeue(&mut self, sequences: &[i64], queue: &str) -> Result<()> {
        self.settle(Kind::ReQueueRange, sequences, Some(queue)).await
    }

    /// All that are not settled are done.
    ///
    /// # Errors
    /// As [`ack`](Self::ack).
    pub async fn ack_all(mut self) -> Result<()> {
        let all: Vec<_> = self.held().collect();
        self.settle(Kind::AckAll, &all, None).await
    }

    /// All that are not settled go to the end of the queue, counted.
    ///
    /// # Errors
    /// As [`ack`](Self::ack).
    pub async fn nack_all(mut self) -> Result<()> {
        let all: Vec<_> = self.held().collect();
        self.settle(Kind::NAckAll, &all, None).await
    }

    /// All that are not settled go to another queue.
    ///
    /// # Errors
    /// As [`requeue`](Self::requeue).
    pub async fn requeue_all(mut self, queue: &str) -> Result<()> {
        let all: Vec<_> = self.held().collect();
        self.settle(Kind::ReQueueAll, &all, Some(queue)).await
    }

    async fn settle(&mut self, kind: Kind, sequences: &[i64], to: Option<&str>) -> Result<()> {
        to.map_or(Ok(()), check_name)?;
        if let Some(other) = sequences.iter().find(|sequence| !self.held.contains(sequence)) {
            return Err(error::invalid(format!("this poll does not hold sequence {other}, or it was settled before")));
        }
        if sequences.is_empty() {
            return Ok(());
        }
        let mut order = self.request(kind);
        order.re_queue_channel = to.unwrap_or_default().to_owned();
        if matches!(kind, Kind::AckRange | Kind::NAckRange | Kind::ReQueueRange) {
            order.sequence_range = sequences.to_vec();
        }
        let question = self.request(Kind::ActiveOffsets);
        let (ordered, asked) = (order.request_id.clone(), question.request_id.clone());
        // Once told, they are not ours to settle again, unless the broker says so.
        self.held.retain(|held| !sequences.contains(held));
        self.stream.tell(order).await;
        self.stream.tell(question).await;
        let limit = self.stream.link.config.request_timeout;
        let mut refusal = None;
        loop {
            let answer = self.stream.hear("settle", Effect::Once, limit).await?;
            let Some(answer) = answer else {
                return Err(error::lost("settle", Effect::Once, "the broker ended the stream"));
            };
            if answer.ref_request_id == ordered && answer.is_error {
                refusal = Some(refused(&answer.error));
            } else if answer.ref_request_id == asked {
                // A transaction of which nothing is left is not known any more: that is an answer too, without any.
                self.held = answer.active_offsets.into_iter().collect();
                // But one that cannot write says so here alone.
                let unknown = answer.is_error.then(|| refused(&answer.error));
                let unknown = unknown.filter(|error| error.kind() == ErrorKind::UnknownOutcome);
                return refusal.or(unknown).map_or(Ok(()), Err);
            }
        }
    }

    fn request(&self, kind: Kind) -> QueuesDownstreamRequest {
        QueuesDownstreamRequest {
            request_id: request_id(),
            client_id: self.client_id.clone(),
            request_type_data: kind.into(),
            ref_transaction_id: self.transaction.clone(),
            ..QueuesDownstreamRequest::default()
        }
    }
}

fn refused(text: &str) -> Error {
    if text.contains("transaction") || text.contains("sequence id") {
        let text = format!("the broker does not hold these messages for us any more: {text}");
        return Error::new(ErrorKind::Stale, text).with_backend(NAME).with_operation("settle");
    }
    error::refused("settle", text)
}
