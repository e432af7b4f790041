//! A group of a topic: its members consume a queue, and one of them moves the topic's events into it.
//!
//! KubeMQ counts a stored event as consumed when it was delivered, not when it was handled, and knows neither
//! acknowledgement nor retry for it. A queue knows all of that. So the group has a queue, and a position: the sequence of
//! the last event that is safely in the queue (`position.rs`).
//!
//! Only one member may move. The server lets a client id read a stored channel once at a time; the members all ask to read
//! one under the group's id, and who may is the one. When its connection ends, so does its reading, and another takes over.
//! Some servers let a client id read only one channel at a time, whatever its name: so each topic's group has an id of its own.
//!
//! Servers that keep messages for a while only forget positions too. A position is younger than the events before it, so where
//! events are kept no longer than queues, what is left then is what was not moved yet, and the group begins with that.

use std::{sync::Arc, time::Duration};

use futures_util::{
    Stream, StreamExt, TryFutureExt, TryStreamExt,
    future::ready,
    stream::{BoxStream, empty, once, select},
};
use md5::{Digest, Md5};
use polymq_core::{Completion, Error, ErrorKind, Result, Retry, Start};
use polymq_kubemq_proto::{
    Event, EventReceive, Subscribe,
    subscribe::{EventsStoreType, SubscribeType},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until, timeout},
};
use tonic::Streaming;

use crate::{
    convert::{self, Wire},
    error::{self, Effect, native},
    link::{Link, Live},
    names,
    outbox::{Outbox, ToQueues},
    position::{Kept, Moved, Place, Position, note},
    producer::CLOSE_TIMEOUT,
    topology::{self, Pattern, request_id},
};

/// How often a member asks whether it may move.
const CONTEND: Duration = Duration::from_secs(2);
/// Some servers confirm a subscription with its first event only: then one is sent to it after this long.
const SILENT: Duration = Duration::from_secs(1);
/// How long the position is not written at most while events come. It is written as often as that takes a twentieth of the time: what
/// was moved since is moved again by whoever goes on after a kill.
const WRITE: Duration = Duration::from_secs(1);
/// Events moved at a time.
const MOVED: usize = 128;
/// How often the position may be missing before the group begins anew with what the topic still has.
const MISSING: u32 = 5;

/// Events of the topic, from a position on, and what ends them.
type Events = BoxStream<'static, Result<EventReceive>>;

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
    outbox.send(note(&position, &link.client_id, (text, ""))).await
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
            queue: names::of_group(topic, group),
            topic: topic.to_owned(),
            group: group.to_owned(),
            place: Place { link: Arc::clone(&link), outbox, queue: names::of_position(topic, group) },
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
    place: Place,
    missing: u32,
}

/// How a subscription ends that nobody has refused.
fn ended() -> impl Stream<Item = Result<EventReceive>> + Send + 'static {
    once(ready(Err(error::disconnected("receive", "the broker ended the subscription"))))
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    // Who does not hold the mover any more does not need it.
    let _ = stopping.wait_for(|stop| *stop).await;
}

impl Task {
    async fn run(mut self, mut stopping: watch::Receiver<bool>) {
        loop {
            let live = tokio::select! {
                live = self.place.link.live() => live,
                () = stopped(&mut stopping) => return,
            };
            let Ok(live) = live else { return };
            match self.lead(&live, stopping.clone()).await {
                Ok(()) => {}
                // Another member moves.
                Err(error) if error.kind() == ErrorKind::Conflict => {}
                Err(error) => {
                    self.place.link.failed(&live, &error);
                    if error.retry() == Retry::Never {
                        tracing::warn!(topic = self.topic, group = self.group, %error, "events cannot be moved to the group, trying again");
                    } else {
                        tracing::debug!(topic = self.topic, group = self.group, %error, "moving events was interrupted");
                    }
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
        let mut kept = Kept::open(&self.place, live).await?;
        let Some(mut position) = kept.newest(&self.place).await? else {
            self.missing += 1;
            if self.missing > MISSING {
                tracing::warn!(
                    topic = self.topic,
                    group = self.group,
                    "the group's position is gone; it begins with what is kept"
                );
                kept.write(&self.place, ("first", "")).await?;
            }
            return Ok(());
        };
        self.missing = 0;
        let mut events = self.events(live, &position).ready_chunks(MOVED);
        let mut written = position.clone();
        let mut due = Instant::now();
        loop {
            tokio::select! {
                Some(some) = events.next() => match self.moved(live, some, &mut position).await {
                    Ok(None) => self.place.link.answered(),
                    Ok(Some(end)) if error::is_of_deleting(&end) => {
                        tracing::warn!(
                            topic = self.topic,
                            group = self.group,
                            "the topic was deleted; the group begins with what it has since"
                        );
                        return kept.begin_anew(&self.place).await;
                    }
                    Ok(Some(end)) | Err(end) => {
                        // Who goes on from here must not move again what the queue has taken.
                        if written != position && !error::is_of_connection(end.kind()) {
                            kept.write_position(&self.place, &position).await?;
                        }
                        return Err(end);
                    }
                },
                () = sleep_until(due), if written != position => {
                    let began = Instant::now();
                    written.clone_from(&position);
                    kept.write_position(&self.place, &position).await?;
                    due = Instant::now() + (20 * began.elapsed()).min(WRITE);
                }
                ended = lock.next() => match ended {
                    // What confirms a subscription on some servers.
                    Some(Ok(_)) => {}
                    Some(Err(status)) => return Err(native("receive", Effect::Idempotent, status)),
                    None => return Err(error::disconnected("receive", "the broker ended the subscription")),
                },
                () = self.place.link.over(live) => return Ok(()),
                () = stopped(&mut stopping) => {
                    if written != position {
                        kept.write_position(&self.place, &position).await?;
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
            // Of letters and digits, which every server takes, whatever the names are.
            client_id: format!("polymq-group-{:x}", Md5::digest(&self.place.queue)),
            channel: self.place.queue.clone(),
            events_store_type_data: EventsStoreType::StartNewOnly.into(),
            ..Subscribe::default()
        };
        let mut client = live.client.clone();
        let mut other = live.client.clone();
        let event = Event {
            event_id: request_id(),
            client_id: self.place.link.client_id.clone(),
            channel: self.place.queue.clone(),
            metadata: "who may move".to_owned(),
            store: true,
            ..Event::default()
        };
        let nudge = async {
            sleep(SILENT).await;
            let _ = other.send_event(event).await;
            std::future::pending::<()>().await;
        };
        let limit = self.place.link.config.request_timeout;
        let subscribing = async {
            tokio::select! {
                answer = client.subscribe_to_events(subscribe) => answer,
                () = nudge => Err(tonic::Status::unknown("never")),
            }
        };
        self.place.link.call(live, "receive", Effect::Idempotent, limit, subscribing).await
    }

    /// Some servers confirm a subscription with its first event only, so the stream begins before it is there.
    fn events(&self, live: &Live, position: &Position) -> Events {
        let from = |start: EventsStoreType, value: i64| {
            let subscribe = Subscribe {
                subscribe_type_data: SubscribeType::EventsStore.into(),
                // The server goes on where a known client was: ours is always a new one.
                client_id: format!("{}-{}", self.place.link.client_id, request_id()),
                channel: self.topic.clone(),
                events_store_type_data: start.into(),
                events_store_type_value: value,
                ..Subscribe::default()
            };
            let mut client = live.client.clone();
            let opening = async move { client.subscribe_to_events(subscribe).await.map(tonic::Response::into_inner) };
            opening.try_flatten_stream().map_err(|status| native("receive", Effect::Idempotent, status))
        };
        let events = match position {
            Position::First => from(EventsStoreType::StartFromFirst, 0).boxed(),
            Position::Since(time) => from(EventsStoreType::StartAtTime, *time).boxed(),
            Position::After(moved) => {
                let at = from(EventsStoreType::StartAtSequence, moved.sequence.cast_signed());
                // A topic that was made anew and has fewer events by now has none there: its last one tells.
                // Chained, so that its end drops it: open and not read, it would hold what is under way.
                let last = from(EventsStoreType::StartFromLast, 0).take(1).chain(empty());
                let (moved, begun) = (moved.clone(), moved.clone());
                let early = last.try_filter(move |event| ready(event.sequence <= begun.sequence));
                let new = move |event: EventReceive| ready(moved.is_before(&event).map(|new| new.then_some(event)));
                select(early, at.chain(ended())).try_filter_map(new).boxed()
            }
        };
        events.chain(ended()).boxed()
    }

    /// Puts events into the group's queue, which leads to a position, also where it takes the first ones only; what has ended
    /// the events, if anything.
    async fn moved(
        &self,
        live: &Live,
        events: Vec<Result<EventReceive>>,
        position: &mut Position,
    ) -> Result<Option<Error>> {
        let (mut sent, mut end) = (Vec::with_capacity(events.len()), None);
        for event in events {
            match event {
                Ok(event) => {
                    let moved = Moved { sequence: event.sequence, id: event.event_id.clone() };
                    sent.push((moved, self.put(event)));
                }
                Err(error) => {
                    end = Some(error);
                    break;
                }
            }
        }
        let link = &self.place.link;
        let mut sent = sent.into_iter();
        while let Some((moved, mut answer)) = sent.next() {
            let lost = || Err(error::disconnected("send", &link.reason()));
            if let Err(error) = link.unless_over(live, &mut answer).await.unwrap_or_else(lost) {
                // They are moved again, with those before them: what waits for the next connection would come before these.
                answer.withdraw();
                for (_, answer) in sent {
                    answer.withdraw();
                }
                return Err(error);
            }
            *position = Position::After(moved);
        }
        Ok(end)
    }

    fn put(&self, event: EventReceive) -> Completion<()> {
        let message = Wire::from(event).message();
        self.place.outbox.hand_over(convert::queued(&message, &self.queue, &self.place.link.client_id, Duration::ZERO))
    }
}
