//! A topic without a group, and events that are not kept: read as they come, settled here.
//!
//! The broker knows no settlement of events, and such a subscription ends with its consumer, so nothing is to be kept for
//! later: what is to be tried again waits in this process.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use futures_util::StreamExt;
use polymq_core::{Completion, Consumer, Details, Error, ErrorKind, Incoming, Message, Result, Settler, Start, Token};
use polymq_kubemq_proto::{
    EventReceive, Subscribe,
    subscribe::{EventsStoreType, SubscribeType},
};
use tokio::{
    sync::{Notify, oneshot},
    time::{Instant, sleep, sleep_until, timeout},
};

use crate::{
    convert::Wire,
    error::{self, Effect, native},
    link::{Items, Link, Live},
    topology::request_id,
};

/// Wait after a subscription that was refused.
const PAUSE: Duration = Duration::from_secs(1);

/// What is read, and how.
#[derive(Debug, Clone)]
pub(crate) struct Reading {
    pub(crate) topic: Arc<str>,
    /// Members of a group share events that are not kept; there is none for stored ones.
    pub(crate) group: String,
    pub(crate) store: bool,
    pub(crate) start: Start,
    pub(crate) prefetch: usize,
}

#[derive(Debug, Default)]
struct State {
    buffer: VecDeque<Incoming>,
    /// Attempts of what was received and is unsettled.
    held: HashMap<Token, u32>,
    /// What comes again later.
    later: BTreeMap<(Instant, u64), Incoming>,
    last: u64,
    closing: bool,
    abandoned: bool,
    end: Option<Error>,
}

/// Shared by a consumer, its settler and its task.
#[derive(Debug)]
pub(crate) struct Heard {
    state: Mutex<State>,
    arrived: Notify,
    work: Notify,
    prefetch: usize,
}

impl Heard {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_room(&self) -> bool {
        let state = self.lock();
        // What waits to be tried again is held here, too: what is not read waits at the broker.
        state.buffer.len() + state.held.len() + state.later.len() < self.prefetch
    }

    fn push(&self, mut incoming: Incoming) {
        let mut state = self.lock();
        state.last += 1;
        incoming.token = Token(state.last);
        state.buffer.push_back(incoming);
        drop(state);
        self.arrived.notify_one();
    }

    fn fail(&self, error: &Error) {
        self.lock().end.get_or_insert_with(|| error::copy(error));
        self.arrived.notify_one();
    }

    pub(crate) fn start_close(&self) {
        self.lock().closing = true;
        self.arrived.notify_one();
        self.work.notify_one();
    }

    /// Nobody can settle any more.
    pub(crate) fn abandon(&self) {
        self.start_close();
        self.lock().abandoned = true;
    }

    fn is_closing(&self) -> bool {
        let state = self.lock();
        state.closing || state.end.is_some()
    }

    fn take(&self, max: usize, into: &mut Vec<Incoming>) -> Option<Result<()>> {
        let mut state = self.lock();
        if state.closing {
            return Some(Err(error::closed("receive")));
        }
        if state.buffer.is_empty() {
            return state.end.as_ref().map(|error| Err(error::copy(error).with_operation("receive")));
        }
        for _ in 0..max.max(1) {
            let Some(incoming) = state.buffer.pop_front() else { break };
            state.held.insert(incoming.token, incoming.attempt());
            into.push(incoming);
        }
        Some(Ok(()))
    }

    fn claim(&self, token: Token) -> Result<u32> {
        let mut state = self.lock();
        if state.abandoned {
            return Err(error::closed("settle"));
        }
        let attempt = state.held.remove(&token).ok_or_else(error::stale)?;
        drop(state);
        self.work.notify_one();
        Ok(attempt)
    }

    /// When the next message that waits is due; moves those that are.
    fn due(&self) -> Option<Instant> {
        let now = Instant::now();
        loop {
            let mut state = self.lock();
            let (due, number) = *state.later.first_key_value()?.0;
            if due > now {
                return Some(due);
            }
            let incoming = state.later.remove(&(due, number));
            drop(state);
            incoming.into_iter().for_each(|incoming| self.push(incoming));
        }
    }

    fn again(&self, message: &Message, attempt: u32, after: Duration) {
        let details = Details { attempt: Some(attempt), ..Details::default() };
        let incoming =
            Incoming { details: Some(Box::new(details)), ..Incoming::new(message.clone(), Token::default()) };
        if after.is_zero() {
            return self.push(incoming);
        }
        let mut state = self.lock();
        state.last += 1;
        let number = state.last;
        state.later.insert((Instant::now() + after, number), incoming);
        drop(state);
        self.work.notify_one();
    }
}

/// A consumer of a topic without a group.
#[derive(Debug)]
pub(crate) struct Listener {
    heard: Arc<Heard>,
    settler: Arc<Local>,
}

impl Listener {
    /// Subscribes; returns when the server has the subscription.
    pub(crate) async fn start(link: Arc<Link>, reading: Reading, bound: Duration) -> Result<(Self, Arc<Heard>)> {
        let heard = Arc::new(Heard {
            state: Mutex::default(),
            arrived: Notify::new(),
            work: Notify::new(),
            prefetch: reading.prefetch.max(1),
        });
        let (ready, first) = oneshot::channel();
        let task = Task {
            link: Arc::clone(&link),
            heard: Arc::clone(&heard),
            client_id: format!("{}-{}", link.client_id, request_id()),
            reading,
            last: 0,
            began: None,
        };
        let listener = Self { heard: Arc::clone(&heard), settler: Arc::new(Local(Arc::clone(&heard))) };
        link.spawn(task.run(ready));
        match timeout(bound, first).await {
            Ok(Ok(answer)) => answer.map(|()| (listener, heard)),
            Ok(Err(_)) => Err(error::closed("consume")),
            Err(_) => Err(error::disconnected("consume", &link.reason())),
        }
    }
}

#[async_trait]
impl Consumer for Listener {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        loop {
            if let Some(result) = self.heard.take(max, into) {
                self.heard.work.notify_one();
                return result;
            }
            self.heard.arrived.notified().await;
        }
    }

    fn settler(&self) -> Arc<dyn Settler> {
        Arc::clone(&self.settler) as Arc<dyn Settler>
    }

    async fn close(&mut self) -> Result<()> {
        self.heard.start_close();
        Ok(())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.heard.start_close();
    }
}

/// Settles in this process.
#[derive(Debug)]
struct Local(Arc<Heard>);

impl Settler for Local {
    fn ack(&self, token: Token) -> Completion<()> {
        Completion::ready(self.0.claim(token).map(drop))
    }

    fn release(&self, token: Token, message: Message) {
        if let Ok(attempt) = self.0.claim(token) {
            self.0.again(&message, attempt, Duration::ZERO);
        }
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        Completion::ready(self.0.claim(token).map(|_| self.0.again(message, attempt, after)))
    }
}

struct Task {
    link: Arc<Link>,
    heard: Arc<Heard>,
    reading: Reading,
    /// The server goes on where a client was that it knows, and counts what was delivered, not what came here: where events
    /// are stored, each subscription has a new one.
    client_id: String,
    /// The sequence that was read last.
    last: u64,
    /// When the subscription was asked for that was there first.
    began: Option<Instant>,
}

impl Task {
    async fn run(mut self, ready: oneshot::Sender<Result<()>>) {
        let mut ready = Some(ready);
        let heard = Arc::clone(&self.heard);
        loop {
            let live = tokio::select! {
                live = self.link.live() => live,
                () = closing(&heard) => return,
            };
            let live = match live {
                Ok(live) => live,
                Err(error) => return heard.fail(&error),
            };
            let asked = Instant::now();
            let subscribed = tokio::select! {
                subscribed = self.subscribe(&live) => subscribed,
                () = closing(&heard) => return,
            };
            let error = match subscribed {
                Ok(events) => {
                    self.began.get_or_insert(asked);
                    if let Some(ready) = ready.take() {
                        let _ = ready.send(Ok(()));
                    }
                    match self.read(&live, events).await {
                        Some(error) => error,
                        None => return,
                    }
                }
                Err(error) => error,
            };
            self.link.failed(&live, &error);
            if error::is_of_deleting(&error) {
                // Whatever the topic has when it is made anew is new.
                (self.last, self.reading.start) = (0, Start::Earliest);
            }
            if let Some(ready) = ready.take_if(|_| error.kind() != ErrorKind::Disconnected) {
                let _ = ready.send(Err(error::copy(&error)));
                return;
            }
            if error::is_final(error.kind()) {
                return heard.fail(&error);
            }
            if error.kind() != ErrorKind::Disconnected {
                tracing::warn!(topic = %self.reading.topic, %error, "cannot subscribe, trying again");
                tokio::select! {
                    () = sleep(PAUSE) => {}
                    () = closing(&heard) => return,
                }
            }
        }
    }

    async fn subscribe(&mut self, live: &Live) -> Result<Items<EventReceive>> {
        if self.reading.store {
            self.client_id = format!("{}-{}", self.link.client_id, request_id());
        }
        let (kind, value) = match (self.reading.store, self.last, self.reading.start) {
            (false, ..) => (EventsStoreType::Undefined, 0),
            (true, 0, Start::New) => new_since(self.began),
            (true, 0, Start::Earliest) => (EventsStoreType::StartFromFirst, 0),
            (true, last, _) => (EventsStoreType::StartAtSequence, (last + 1).cast_signed()),
        };
        let pattern = if self.reading.store { SubscribeType::EventsStore } else { SubscribeType::Events };
        let subscribe = Subscribe {
            subscribe_type_data: pattern.into(),
            client_id: self.client_id.clone(),
            channel: self.reading.topic.to_string(),
            group: self.reading.group.clone(),
            events_store_type_data: kind.into(),
            events_store_type_value: value,
        };
        let mut client = live.client.clone();
        let opening = async move { client.subscribe_to_events(subscribe).await };
        self.link.subscribe(live, "consume", opening).await
    }

    /// Reads until the subscription ends; `None`: closed.
    async fn read(&mut self, live: &Live, mut events: Items<EventReceive>) -> Option<Error> {
        let heard = Arc::clone(&self.heard);
        loop {
            if heard.is_closing() {
                return None;
            }
            let due = heard.due();
            let room = heard.has_room();
            tokio::select! {
                event = events.next(), if room => match event {
                    Some(Ok(event)) => {
                        self.link.answered();
                        self.last = event.sequence;
                        heard.push(self.incoming(event));
                    }
                    Some(Err(status)) => return Some(native("receive", Effect::Idempotent, status)),
                    None => return Some(error::disconnected("receive", "the broker ended the subscription")),
                },
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
                () = heard.work.notified() => {}
                () = self.link.over(live) => return Some(error::disconnected("receive", &self.link.reason())),
            }
        }
    }

    fn incoming(&self, event: EventReceive) -> Incoming {
        let channel = (*event.channel != *self.reading.topic).then(|| Arc::from(event.channel.as_str()));
        let mut details = Details {
            channel,
            broker_time: u64::try_from(event.timestamp)
                .ok()
                .filter(|time| *time > 0)
                .map(|nanos| SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos)),
            sequence: (event.sequence > 0).then_some(event.sequence),
            ..Details::default()
        };
        let message = Wire::from(event).message();
        details.attempt = Some(message.header_attempt());
        Incoming { message, token: Token::default(), details: Some(Box::new(details)) }
    }
}

/// The place of new events: of a subscription that began before, the time since. The protocol counts in seconds and the server
/// from when the request reaches it, so a moment more is asked for: what was sent just before may come, and nothing is left out.
pub(crate) fn new_since(began: Option<Instant>) -> (EventsStoreType, i64) {
    match began {
        None => (EventsStoreType::StartNewOnly, 0),
        Some(began) => {
            (EventsStoreType::StartAtTimeDelta, i64::try_from(began.elapsed().as_secs() + 2).unwrap_or(i64::MAX))
        }
    }
}

async fn closing(heard: &Heard) {
    while !heard.is_closing() {
        heard.work.notified().await;
    }
}
