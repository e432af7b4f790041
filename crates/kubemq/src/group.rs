//! A group of a topic: its members consume a queue, and one of them moves the topic's events into it.
//!
//! KubeMQ counts a stored event as consumed when it was delivered, not when it was handled, and knows neither
//! acknowledgement nor retry for it. A queue knows all of that. So the group has a queue, and a position: the sequence of
//! the last event that is safely in the queue. The position is a message in a queue of its own, replaced by a newer one
//! before it is given up, so that it is never lost.
//!
//! Only one member may move. The server lets a client id read a stored channel once at a time; the members all ask to read
//! one under the group's id, and who may is the one. When its connection ends, so does its reading, and another takes over.

use std::{sync::Arc, time::Duration};

use futures_util::{FutureExt, StreamExt, future::try_join_all};
use polymq_core::{Error, ErrorKind, Result, Start};
use polymq_kubemq_proto::{
    Event, EventReceive, QueueMessage, QueuesDownstreamRequest, QueuesDownstreamRequestType as Kind,
    QueuesDownstreamResponse, Subscribe,
    subscribe::{EventsStoreType, SubscribeType},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::{
    convert::{self, Wire},
    error::{self, Effect, native},
    link::{Link, Live},
    names,
    outbox::{Outbox, ToQueues},
    producer::CLOSE_TIMEOUT,
    topology::{self, Pattern, request_id},
};

/// How often a member asks whether it may move.
const CONTEND: Duration = Duration::from_secs(2);
/// Some servers confirm a subscription with its first event only: then one is sent to it after this long.
const SILENT: Duration = Duration::from_secs(1);
/// How often the position is written while events come.
const WRITE: Duration = Duration::from_secs(1);
/// Events moved at a time.
const MOVED: usize = 128;
/// How often the position may be missing before the group begins anew with what the topic still has.
const MISSING: u32 = 5;

/// Where a group begins or is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Position {
    /// With the first event that is kept.
    First,
    /// With events of this time, in nanoseconds since 1970, and later ones.
    Since(i64),
    /// After this sequence.
    After(u64),
}

impl Position {
    fn read(message: &QueueMessage) -> Option<Self> {
        match std::str::from_utf8(&message.body).ok()? {
            "first" => Some(Self::First),
            "new" => Some(Self::Since(message.attributes.as_ref()?.timestamp)),
            number => number.parse().ok().map(Self::After),
        }
    }

    fn start(self) -> (EventsStoreType, i64) {
        match self {
            Self::First => (EventsStoreType::StartFromFirst, 0),
            Self::Since(time) => (EventsStoreType::StartAtTime, time),
            Self::After(sequence) => (EventsStoreType::StartAtSequence, sequence.saturating_add(1).cast_signed()),
        }
    }
}

/// Makes a group that begins there; harmless when it exists.
pub(crate) async fn make(
    link: &Link,
    live: &Live,
    outbox: &Outbox<ToQueues>,
    (topic, group): (&str, &str),
    start: Start,
) -> Result<()> {
    let position = names::of_position(topic, group);
    if topology::queue_exists(link, live, &position).await? {
        return Ok(());
    }
    let queue = names::of_group(topic, group);
    match topology::create(link, live, Pattern::Queues, &queue).await {
        Err(error) if error.kind() != ErrorKind::Unsupported => return Err(error),
        _ => {}
    }
    let text = if start == Start::Earliest { "first" } else { "new" };
    outbox.send(note(&position, &link.client_id, text)).await
}

fn note(queue: &str, client_id: &str, text: &str) -> QueueMessage {
    QueueMessage {
        message_id: request_id(),
        client_id: client_id.to_owned(),
        channel: queue.to_owned(),
        body: text.to_owned().into(),
        ..QueueMessage::default()
    }
}

/// Moves events when it is this member's turn; ends when it is dropped or stopped.
#[derive(Debug)]
pub(crate) struct Mover {
    stop: watch::Sender<bool>,
    ended: watch::Receiver<bool>,
}

impl Mover {
    pub(crate) fn start(link: Arc<Link>, outbox: Arc<Outbox<ToQueues>>, topic: &str, group: &str) -> Self {
        let (stop, stopping) = watch::channel(false);
        let (end, ended) = watch::channel(false);
        let task = Task {
            position: names::of_position(topic, group),
            queue: names::of_group(topic, group),
            topic: topic.to_owned(),
            group: group.to_owned(),
            link: Arc::clone(&link),
            outbox,
            missing: 0,
        };
        link.spawn(async move {
            task.run(stopping).await;
            end.send_replace(true);
        });
        Self { stop, ended }
    }

    /// Writes the position and lets another member move.
    pub(crate) async fn close(&self) {
        self.stop.send_replace(true);
        let mut ended = self.ended.clone();
        // Bounded for a broker that does not answer: then the connection's end is the end.
        let _ = timeout(CLOSE_TIMEOUT, ended.wait_for(|ended| *ended)).await;
    }
}

struct Task {
    topic: String,
    group: String,
    queue: String,
    position: String,
    link: Arc<Link>,
    outbox: Arc<Outbox<ToQueues>>,
    missing: u32,
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // Who does not hold the mover any more does not need it.
    let _ = stopping.wait_for(|stop| *stop).await;
}

impl Task {
    async fn run(mut self, mut stopping: watch::Receiver<bool>) {
        loop {
            let live = tokio::select! {
                live = self.link.live() => live,
                () = stopped(&mut stopping) => return,
            };
            let Ok(live) = live else { return };
            match self.lead(&live, stopping.clone()).await {
                Ok(()) => {}
                // Another member moves.
                Err(error) if error.kind() == ErrorKind::Conflict => {}
                Err(error) => {
                    self.link.failed(&live, &error);
                    tracing::debug!(topic = self.topic, group = self.group, %error, "moving events was interrupted");
                }
            }
            tokio::select! {
                () = sleep(CONTEND.mul_f64(0.5 + fastrand::f64() / 2.0)) => {}
                () = stopped(&mut stopping) => return,
            }
        }
    }

    /// Moves for as long as it may.
    async fn lead(&mut self, live: &Live, mut stopping: watch::Receiver<bool>) -> Result<()> {
        let mut lock = self.lock(live).await?;
        let mut kept = Kept::open(self, live).await?;
        let Some(mut position) = kept.newest(self).await? else {
            self.missing += 1;
            if self.missing > MISSING {
                tracing::warn!(
                    topic = self.topic,
                    group = self.group,
                    "the group's position is gone; it begins with what is kept"
                );
                kept.write(self, "first").await?;
            }
            return Ok(());
        };
        self.missing = 0;
        let mut events = self.events(live, position).await?;
        let mut written = position;
        let mut due = Instant::now();
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        position = self.moved(event, &mut events).await?;
                        self.link.answered();
                    }
                    Some(Err(status)) => return Err(native("receive", Effect::Idempotent, status)),
                    None => return Err(error::disconnected("receive", "the broker ended the subscription")),
                },
                () = sleep_until(due), if written != position => {
                    written = position;
                    due = Instant::now() + WRITE;
                    kept.write_position(self, position).await?;
                }
                ended = lock.next() => match ended {
                    // What confirms a subscription on some servers.
                    Some(Ok(_)) => {}
                    Some(Err(status)) => return Err(native("receive", Effect::Idempotent, status)),
                    None => return Err(error::disconnected("receive", "the broker ended the subscription")),
                },
                () = self.link.over(live) => return Ok(()),
                () = stopped(&mut stopping) => {
                    if written != position {
                        kept.write_position(self, position).await?;
                    }
                    return kept.close().await;
                }
            }
        }
    }

    /// Only one member gets it; the others are told that the client id is registered.
    async fn lock(&self, live: &Live) -> Result<Streaming<EventReceive>> {
        let subscribe = Subscribe {
            subscribe_type_data: SubscribeType::EventsStore.into(),
            client_id: format!("polymq-group-{}", self.group),
            channel: self.position.clone(),
            events_store_type_data: EventsStoreType::StartNewOnly.into(),
            ..Subscribe::default()
        };
        let mut client = live.client.clone();
        let mut other = live.client.clone();
        let event = Event {
            event_id: request_id(),
            client_id: self.link.client_id.clone(),
            channel: self.position.clone(),
            metadata: "who may move".to_owned(),
            store: true,
            ..Event::default()
        };
        let nudge = async {
            sleep(SILENT).await;
            let _ = other.send_event(event).await;
            std::future::pending::<()>().await;
        };
        let limit = self.link.config.request_timeout;
        let subscribing = async {
            tokio::select! {
                answer = client.subscribe_to_events(subscribe) => answer,
                () = nudge => Err(tonic::Status::unknown("never")),
            }
        };
        self.link.call(live, "receive", Effect::Idempotent, limit, subscribing).await
    }

    async fn events(&self, live: &Live, position: Position) -> Result<Streaming<EventReceive>> {
        let (start, value) = position.start();
        let subscribe = Subscribe {
            subscribe_type_data: SubscribeType::EventsStore.into(),
            // The server goes on where a known client was: ours is always a new one.
            client_id: format!("{}-{}", self.link.client_id, request_id()),
            channel: self.topic.clone(),
            events_store_type_data: start.into(),
            events_store_type_value: value,
            ..Subscribe::default()
        };
        let mut client = live.client.clone();
        client
            .subscribe_to_events(subscribe)
            .await
            .map(tonic::Response::into_inner)
            .map_err(|status| native("receive", Effect::Idempotent, status))
    }

    /// Puts an event, and those that are there already, into the group's queue; where that leads.
    async fn moved(&self, first: EventReceive, events: &mut Streaming<EventReceive>) -> Result<Position> {
        let mut last = first.sequence;
        let mut sent = vec![self.put(first)];
        while sent.len() < MOVED
            && let Some(Some(Ok(event))) = events.next().now_or_never()
        {
            last = event.sequence;
            sent.push(self.put(event));
        }
        try_join_all(sent).await?;
        Ok(Position::After(last))
    }

    fn put(&self, event: EventReceive) -> impl Future<Output = Result<()>> + use<> {
        let message = Wire::from(event).message();
        self.outbox.hand_over(convert::queued(&message, &self.queue, &self.link.client_id, Duration::ZERO))
    }
}

/// The position, held so that nobody else has it.
struct Kept {
    requests: mpsc::Sender<QueuesDownstreamRequest>,
    answers: Streaming<QueuesDownstreamResponse>,
    limit: Duration,
    /// What is held, by transaction.
    held: Vec<(String, Vec<i64>)>,
}

impl Kept {
    async fn open(task: &Task, live: &Live) -> Result<Self> {
        let (requests, receiver) = mpsc::channel(16);
        // Some servers answer the opening with the first answer only.
        let request = Self::request(task, Kind::TransactionStatus, "open");
        let closed = || error::disconnected("receive", "the stream has ended");
        requests.send(request).await.map_err(|_| closed())?;
        let mut client = live.client.clone();
        let limit = task.link.config.request_timeout;
        let opening = client.queues_downstream(ReceiverStream::new(receiver));
        let answers = task.link.call(live, "receive", Effect::Idempotent, limit, opening).await?;
        let mut kept = Self { requests, answers, limit, held: Vec::new() };
        kept.answer("open").await?;
        Ok(kept)
    }

    fn request(task: &Task, kind: Kind, id: &str) -> QueuesDownstreamRequest {
        QueuesDownstreamRequest {
            request_id: id.to_owned(),
            client_id: task.link.client_id.clone(),
            request_type_data: kind.into(),
            channel: task.position.clone(),
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
    async fn newest(&mut self, task: &Task) -> Result<Option<Position>> {
        let id = request_id();
        let get = QueuesDownstreamRequest { max_items: 1024, ..Self::request(task, Kind::Get, &id) };
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
        Ok(written.or_else(|| positions.iter().min()).copied())
    }

    async fn write_position(&mut self, task: &Task, position: Position) -> Result<()> {
        match position {
            Position::After(sequence) => self.write(task, &sequence.to_string()).await,
            // It is there as it was made.
            Position::First | Position::Since(_) => Ok(()),
        }
    }

    /// Writes a position, takes it, and gives up the earlier ones.
    async fn write(&mut self, task: &Task, text: &str) -> Result<()> {
        task.outbox.send(note(&task.position, &task.link.client_id, text)).await?;
        let earlier = std::mem::take(&mut self.held);
        self.newest(task).await?;
        if self.held.is_empty() {
            return Err(Error::new(ErrorKind::Conflict, "the position is somebody else's").with_backend(crate::NAME));
        }
        for (transaction, sequences) in earlier {
            let request = QueuesDownstreamRequest {
                sequence_range: sequences,
                ref_transaction_id: transaction,
                ..Self::request(task, Kind::AckRange, "settle")
            };
            self.ask(request).await?;
        }
        Ok(())
    }

    /// Returns when the broker has everything that was told.
    async fn close(mut self) -> Result<()> {
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
