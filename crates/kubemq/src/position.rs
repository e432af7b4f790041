//! The position of a group: a message in a queue of its own, held by who moves, and replaced by a newer one before it is
//! given up, so that it is never lost. `first`, `new` (from its own time on), or the sequence of the last event that is in
//! the group's queue, with that event's id as metadata.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use polymq_core::{Error, ErrorKind, Result};
use polymq_kubemq_proto::{
    EventReceive, QueueMessage, QueuesDownstreamRequest, QueuesDownstreamRequestType as Kind, QueuesDownstreamResponse,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    error::{self, Effect, native},
    link::{Link, Live},
    outbox::{Outbox, ToQueues},
    topology::request_id,
};

/// Where a group begins or is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Position {
    /// With the first event that is kept.
    First,
    /// With events of this time, in nanoseconds since 1970, and later ones.
    Since(i64),
    /// After this one.
    After(Moved),
}

/// An event that is safely in the group's queue. A topic that is deleted and made anew has the same sequences and other ids.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moved {
    pub(crate) sequence: u64,
    /// Empty when it is not known.
    pub(crate) id: String,
}

impl Moved {
    /// Whether an event comes after this one; an error when the topic is not the one that had this one.
    pub(crate) fn is_before(&self, event: &EventReceive) -> Result<bool> {
        if event.sequence > self.sequence {
            return Ok(true);
        }
        if event.sequence == self.sequence && (self.id.is_empty() || self.id == event.event_id) {
            return Ok(false);
        }
        Err(error::refused("receive", "the channel was deleted and made anew"))
    }
}

impl Position {
    fn read(message: &QueueMessage) -> Option<Self> {
        match std::str::from_utf8(&message.body).ok()? {
            "first" => Some(Self::First),
            "new" => Some(Self::Since(message.attributes.as_ref()?.timestamp)),
            number => {
                let sequence = number.parse().ok()?;
                Some(Self::After(Moved { sequence, id: message.metadata.clone() }))
            }
        }
    }
}

/// A position to write.
pub(crate) fn note(queue: &str, client_id: &str, (text, id): (&str, &str)) -> QueueMessage {
    QueueMessage {
        message_id: request_id(),
        client_id: client_id.to_owned(),
        channel: queue.to_owned(),
        body: text.to_owned().into(),
        metadata: id.to_owned(),
        ..QueueMessage::default()
    }
}

/// Where a position is written and read.
pub(crate) struct Place {
    pub(crate) link: Arc<Link>,
    pub(crate) outbox: Arc<Outbox<ToQueues>>,
    /// The position's own.
    pub(crate) queue: String,
}

/// The position, held so that nobody else has it.
pub(crate) struct Kept {
    requests: mpsc::Sender<QueuesDownstreamRequest>,
    answers: Streaming<QueuesDownstreamResponse>,
    limit: Duration,
    /// What is held, by transaction.
    held: Vec<(String, Vec<i64>)>,
}

impl Kept {
    pub(crate) async fn open(place: &Place, live: &Live) -> Result<Self> {
        let (requests, receiver) = mpsc::channel(16);
        // Some servers answer the opening with the first answer only.
        let request = Self::request(place, Kind::TransactionStatus, "open");
        let closed = || error::disconnected("receive", "the stream has ended");
        requests.send(request).await.map_err(|_| closed())?;
        let mut client = live.client.clone();
        let limit = place.link.config.request_timeout;
        let opening = client.queues_downstream(ReceiverStream::new(receiver));
        let answers = place.link.call(live, "receive", Effect::Idempotent, limit, opening).await?;
        let mut kept = Self { requests, answers, limit, held: Vec::new() };
        kept.answer("open").await?;
        Ok(kept)
    }

    fn request(place: &Place, kind: Kind, id: &str) -> QueuesDownstreamRequest {
        QueuesDownstreamRequest {
            request_id: id.to_owned(),
            client_id: place.link.client_id.clone(),
            request_type_data: kind.into(),
            channel: place.queue.clone(),
            ref_transaction_id: id.to_owned(),
            ..QueuesDownstreamRequest::default()
        }
    }

    async fn answer(&mut self, id: &str) -> Result<QueuesDownstreamResponse> {
        let waiting = async {
            loop {
                match self.answers.next().await {
                    Some(Ok(answer)) if answer.ref_request_id == id => return Ok(answer),
                    Some(Ok(_)) => {}
                    Some(Err(status)) => return Err(native("receive", Effect::Idempotent, status)),
                    None => return Err(error::disconnected("receive", "the broker ended the stream")),
                }
            }
        };
        match timeout(self.limit, waiting).await {
            Ok(answer) => answer,
            Err(_) => Err(error::disconnected("receive", "the broker did not answer in time")),
        }
    }

    async fn ask(&mut self, request: QueuesDownstreamRequest) -> Result<()> {
        self.requests.send(request).await.map_err(|_| error::disconnected("receive", "the stream has ended"))
    }

    /// Takes every position that is there; the furthest counts.
    pub(crate) async fn newest(&mut self, place: &Place) -> Result<Option<Position>> {
        let id = request_id();
        let get = QueuesDownstreamRequest { max_items: 1024, ..Self::request(place, Kind::Get, &id) };
        self.ask(get).await?;
        let answer = self.answer(&id).await?;
        if answer.is_error {
            return Err(error::refused("receive", &answer.error));
        }
        let sequence = |message: &QueueMessage| message.attributes.as_ref().map(|it| it.sequence.cast_signed());
        let sequences: Vec<i64> = answer.messages.iter().filter_map(sequence).collect();
        if !sequences.is_empty() {
            self.held.push((answer.transaction_id, sequences));
        }
        // The first of several that were made at once, the furthest of those that were written.
        let positions: Vec<_> = answer.messages.iter().filter_map(Position::read).collect();
        let written = positions.iter().filter(|position| matches!(position, Position::After(_))).max();
        Ok(written.or_else(|| positions.iter().min()).cloned())
    }

    pub(crate) async fn write_position(&mut self, place: &Place, position: &Position) -> Result<()> {
        match position {
            Position::After(Moved { sequence, id }) => self.write(place, (&sequence.to_string(), id)).await,
            // It is there as it was made.
            Position::First | Position::Since(_) => Ok(()),
        }
    }

    /// The topic was deleted: whatever it has when it is made anew is new.
    pub(crate) async fn begin_anew(mut self, place: &Place) -> Result<()> {
        self.write(place, ("first", "")).await?;
        self.close().await
    }

    /// Writes a position, takes it, and gives up the earlier ones.
    pub(crate) async fn write(&mut self, place: &Place, position: (&str, &str)) -> Result<()> {
        place.outbox.send(note(&place.queue, &place.link.client_id, position)).await?;
        let earlier = std::mem::take(&mut self.held);
        self.newest(place).await?;
        if self.held.is_empty() {
            return Err(Error::new(ErrorKind::Conflict, "the position is somebody else's").with_backend(crate::NAME));
        }
        for (transaction, sequences) in earlier {
            let request = QueuesDownstreamRequest {
                sequence_range: sequences,
                ref_transaction_id: transaction,
                ..Self::request(place, Kind::AckRange, "settle")
            };
            self.ask(request).await?;
        }
        Ok(())
    }

    /// Returns when the broker has everything that was told.
    pub(crate) async fn close(mut self) -> Result<()> {
        let id = request_id();
        let status = QueuesDownstreamRequest {
            request_id: id.clone(),
            client_id: "polymq".to_owned(),
            request_type_data: Kind::TransactionStatus.into(),
            ref_transaction_id: id.clone(),
            ..QueuesDownstreamRequest::default()
        };
        self.ask(status).await?;
        self.answer(&id).await.map(drop)
    }
}
