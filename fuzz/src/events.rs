//! Stored events, and commands and queries with their responders.
//!
//! What must hold: a reader gets what was stored from where it begins, in order and without a gap or a repetition, across
//! its reconnects, but for what was on its way to it when it left; a request has one answer, its responder's or the time-out.

use std::time::Duration;

use arbitrary::Arbitrary;
use polymq_kubemq_proto::{
    Event, EventReceive, Request, Response, Subscribe,
    request::RequestType,
    subscribe::{EventsStoreType, SubscribeType},
};
use tonic::Streaming;

use crate::{Client, manage, with_broker};

const READERS: usize = 3;
const STEPS: usize = 48;
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Arbitrary)]
pub enum Step {
    Store {
        count: u8,
    },
    /// A reader begins, or goes on where it was.
    Subscribe {
        reader: u8,
        start: Start,
    },
    /// A reader takes some of what there is for it.
    Read {
        reader: u8,
        count: u8,
    },
    Leave {
        reader: u8,
    },
    Ask {
        query: bool,
        answered: bool,
        cached: u8,
    },
}

#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Start {
    New,
    First,
    Last,
    At(u8),
    Wrong(i64),
}

#[derive(Default)]
struct Reader {
    /// The next sequence that must come; none before the first subscription.
    next: Option<u64>,
    /// Up to here events may have been sent when it left, and count as delivered then.
    sent: u64,
    stream: Option<Streaming<EventReceive>>,
}

struct Model {
    client: Client,
    name: String,
    stored: u64,
    readers: [Reader; READERS],
}

pub fn run(steps: &[Step]) {
    if steps.is_empty() {
        return;
    }
    with_broker(async |channel, name| {
        let mut model = Model { client: Client::new(channel), name, stored: 0, readers: Default::default() };
        for step in steps.iter().take(STEPS) {
            model.step(step).await;
        }
        // Whoever still reads gets the rest.
        for reader in 0..READERS {
            model.read(reader, u64::MAX).await;
        }
        let name = model.name.clone();
        let _ = manage(&mut model.client, "delete-channel", "events_store", &name).await;
    });
}

impl Model {
    async fn step(&mut self, step: &Step) {
        match *step {
            Step::Store { count } => self.store(count % 8).await,
            Step::Subscribe { reader, start } => self.subscribe(usize::from(reader) % READERS, start).await,
            Step::Read { reader, count } => self.read(usize::from(reader) % READERS, count.into()).await,
            Step::Leave { reader } => self.leave(usize::from(reader) % READERS).await,
            Step::Ask { query, answered, cached } => self.ask(query, answered, cached % 3).await,
        }
    }

    async fn store(&mut self, count: u8) {
        let event = |number: u64| Event {
            client_id: "fuzz".into(),
            channel: self.name.clone(),
            body: number.to_be_bytes().to_vec().into(),
            store: true,
            ..Event::default()
        };
        let events: Vec<_> = (1..=u64::from(count)).map(|more| event(self.stored + more)).collect();
        let mut answers = self.client.send_events_stream(tokio_stream::iter(events)).await.unwrap().into_inner();
        for _ in 0..count {
            let answer = answers.message().await.unwrap().expect("an answer an event");
            assert!(answer.sent, "{answer:?}");
        }
        self.stored += u64::from(count);
    }

    async fn subscribe(&mut self, reader: usize, start: Start) {
        let (kind, value) = match start {
            Start::New => (EventsStoreType::StartNewOnly, 0),
            Start::First => (EventsStoreType::StartFromFirst, 0),
            Start::Last => (EventsStoreType::StartFromLast, 0),
            Start::At(sequence) => (EventsStoreType::StartAtSequence, i64::from(sequence)),
            Start::Wrong(value) => (EventsStoreType::StartAtSequence, value.min(0)),
        };
        let request = Subscribe {
            subscribe_type_data: SubscribeType::EventsStore.into(),
            client_id: format!("{}-{reader}", self.name),
            channel: self.name.clone(),
            events_store_type_data: kind.into(),
            events_store_type_value: value,
            ..Subscribe::default()
        };
        let reading = self.readers[reader].stream.is_some();
        let began = tokio::time::Instant::now();
        let stream = loop {
            match self.client.subscribe_to_events(request.clone()).await {
                Ok(stream) => break Some(stream.into_inner()),
                // One that has just left may not be known to have.
                Err(status) if status.message().contains("already registered") && !reading => {
                    assert!(began.elapsed() < PATIENCE, "{status}");
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Err(status) => {
                    assert!(reading || matches!(start, Start::Wrong(_) | Start::At(0)), "{status}");
                    break None;
                }
            }
        };
        let Some(stream) = stream else { return };
        assert!(!reading, "two with one name");
        let begin = match start {
            Start::New => self.stored + 1,
            Start::First => 1,
            Start::Last => self.stored.max(1),
            Start::At(sequence) => sequence.into(),
            Start::Wrong(_) => panic!("a wrong start is refused"),
        };
        let reader = &mut self.readers[reader];
        reader.next.get_or_insert(begin);
        reader.stream = Some(stream);
    }

    /// Leaves, and waits until the broker knows: until then it may send what is stored.
    async fn leave(&mut self, reader: usize) {
        if self.readers[reader].stream.take().is_none() {
            return;
        }
        let name = self.name.clone();
        let left = format!("\"client\":\"{name}-{reader}\",\"isActive\":false");
        let began = tokio::time::Instant::now();
        loop {
            let readers = manage(&mut self.client, "list-readers", "events_store", &name).await.expect("a channel");
            let readers = String::from_utf8(readers).expect("JSON");
            if readers.contains(&left) {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "{readers}");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.readers[reader].sent = self.stored;
    }

    async fn read(&mut self, reader: usize, most: u64) {
        let Reader { next, sent, stream } = &self.readers[reader];
        if stream.is_some() && next.is_some_and(|next| next <= *sent) {
            // So that something comes in any case.
            self.store(1).await;
        }
        let stored = self.stored;
        let Reader { next: Some(next), sent, stream: Some(stream) } = &mut self.readers[reader] else { return };
        for _ in 0..most {
            if *next > stored {
                return;
            }
            let event = tokio::time::timeout(PATIENCE, stream.message()).await.expect("in time");
            let event = event.unwrap().expect("the stream goes on");
            assert!(event.sequence <= (*next).max(*sent + 1), "{} came, {next} was skipped", event.sequence);
            // What was on its way when a reader left may come again.
            if event.sequence >= *next {
                assert_eq!(*event.body, event.sequence.to_be_bytes(), "the event of its number");
                (*next, *sent) = (event.sequence + 1, 0);
            }
        }
    }

    async fn ask(&mut self, query: bool, answered: bool, cached: u8) {
        let kind = if query { RequestType::Query } else { RequestType::Command };
        let channel = format!("{}.ask", self.name);
        let mut request = Request {
            request_id: "ask".into(),
            request_type_data: kind.into(),
            client_id: "fuzz".into(),
            channel: channel.clone(),
            body: vec![1].into(),
            timeout: if answered { 10_000 } else { 2 },
            ..Request::default()
        };
        if cached > 0 {
            (request.cache_key, request.cache_ttl) = (format!("k{cached}"), 60);
        }
        let mut listening = None;
        if answered {
            let kind = if query { SubscribeType::Queries } else { SubscribeType::Commands };
            let subscribe = Subscribe {
                subscribe_type_data: kind.into(),
                client_id: "responder".into(),
                channel,
                ..Subscribe::default()
            };
            listening = Some(self.client.subscribe_to_requests(subscribe).await.unwrap().into_inner());
        }
        let (mut asking, mut answering) = (self.client.clone(), self.client.clone());
        let respond = async {
            let Some(mut requests) = listening else { return std::future::pending().await };
            while let Some(request) = requests.message().await.unwrap() {
                let response = Response {
                    client_id: "responder".into(),
                    request_id: request.request_id,
                    reply_channel: request.reply_channel,
                    body: vec![2].into(),
                    executed: true,
                    ..Response::default()
                };
                // The second one is nobody's.
                answering.send_response(response.clone()).await.unwrap();
                answering.send_response(response).await.unwrap();
            }
        };
        tokio::select! {
            answer = asking.send_request(request) => match answer {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    assert!(answer.executed && (answered || answer.cache_hit), "{answer:?}");
                    assert_eq!(answer.body.is_empty(), !query, "{answer:?}");
                }
                Err(status) => assert!(!answered && status.message().contains("Error 301"), "{status}"),
            },
            () = respond => panic!("the subscription ended"),
        }
    }
}
