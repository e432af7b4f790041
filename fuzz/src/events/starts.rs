//! Where subscriptions to stored events begin, and when each event was stored.

use std::{ops::RangeInclusive, time::SystemTime};

use arbitrary::Arbitrary;
use polymq_kubemq_proto::{
    EventReceive, Subscribe,
    subscribe::{EventsStoreType, SubscribeType},
};
use tokio::time::timeout;
use tonic::Streaming;

use super::{Model, PATIENCE};

// One more changes what the bytes of all inputs mean: see docs/testing.md.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Start {
    New,
    First,
    Last,
    At(u8),
    Wrong(i64),
    /// At the time of an event or beside it, in one of the units that are told apart.
    Time {
        event: u8,
        beside: i8,
        unit: u8,
    },
    /// So many seconds ago, and one.
    Ago(u16),
    /// Without a start, or with a value that its kind cannot have.
    Refused(u8),
}

/// A start as it is asked for.
pub(super) struct Asked {
    kind: EventsStoreType,
    value: i64,
    /// Nanoseconds of what the value counts.
    unit: i64,
    pub(super) error: Option<&'static str>,
}

/// When the events were stored, by their sequence, as a reader of its own was told.
#[derive(Default)]
pub(super) struct Times {
    known: Vec<i64>,
    since: Option<i64>,
    /// The reader, with the next sequence for it.
    reader: Option<(Streaming<EventReceive>, usize)>,
    readers: usize,
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap()
}

/// Nanoseconds of the units of times.
const UNITS: [i64; 4] = [1, 1_000, 1_000_000, 1_000_000_000];

impl Times {
    /// The next reader begins at the first one, and must be told the same.
    pub(super) fn cut(&mut self) {
        self.reader = None;
    }

    /// Before anything is stored.
    pub(super) fn begin(&mut self) {
        self.since.get_or_insert_with(now);
    }

    /// The first sequence that is not older.
    fn first(&self, time: i64) -> u64 {
        self.known.partition_point(|known| *known < time) as u64 + 1
    }
}

impl Start {
    fn error(self) -> Option<&'static str> {
        match self {
            Self::Wrong(_) | Self::At(0) => Some("Error 112"),
            Self::Refused(kind) => Some(["Error 111", "Error 112", "Error 113", "Error 114"][usize::from(kind) % 4]),
            _ => None,
        }
    }
}

impl Model {
    /// What to ask for.
    pub(super) async fn start(&mut self, start: Start) -> Asked {
        use EventsStoreType as Kind;
        if matches!(start, Start::Time { .. } | Start::Ago(_)) {
            self.learn().await;
        }
        let mut counted = UNITS[3];
        let (kind, value) = match start {
            Start::New => (Kind::StartNewOnly, 0),
            Start::First => (Kind::StartFromFirst, 0),
            Start::Last => (Kind::StartFromLast, 0),
            Start::At(sequence) => (Kind::StartAtSequence, sequence.into()),
            Start::Wrong(value) => (Kind::StartAtSequence, value.min(0)),
            Start::Time { event, beside, unit } => {
                let known = &self.times.known;
                let time = known.get(usize::from(event) % known.len().max(1)).copied().unwrap_or_else(now);
                counted = UNITS[usize::from(unit) % 4];
                (Kind::StartAtTime, time / counted + i64::from(beside.signum()))
            }
            Start::Ago(seconds) => (Kind::StartAtTimeDelta, i64::from(seconds) + 1),
            Start::Refused(kind) => {
                let kinds = [Kind::Undefined, Kind::StartAtSequence, Kind::StartAtTime, Kind::StartAtTimeDelta];
                (kinds[usize::from(kind) % 4], 0)
            }
        };
        Asked { kind, value, unit: counted, error: start.error() }
    }

    /// Subscribes; tells where a new reader begins: with a time that the broker takes from its clock, between two.
    pub(super) async fn read_from(
        &mut self,
        asked: &Asked,
        client: String,
        group: String,
    ) -> Result<(Streaming<EventReceive>, RangeInclusive<u64>), tonic::Status> {
        self.times.begin();
        let request = Subscribe {
            subscribe_type_data: SubscribeType::EventsStore.into(),
            client_id: client,
            channel: self.name.clone(),
            group,
            events_store_type_data: asked.kind.into(),
            events_store_type_value: asked.value,
        };
        let before = now();
        let stream = self.client.subscribe_to_events(request).await?.into_inner();
        let ago = |now: i64| self.times.first(now - asked.value * asked.unit);
        let begin = match asked.kind {
            EventsStoreType::StartNewOnly => self.stored + 1,
            EventsStoreType::StartFromFirst => 1,
            EventsStoreType::StartFromLast => self.stored.max(1),
            EventsStoreType::StartAtSequence => asked.value.unsigned_abs().min(self.stored + 1),
            EventsStoreType::StartAtTime => self.times.first(asked.value * asked.unit),
            EventsStoreType::StartAtTimeDelta => return Ok((stream, ago(before)..=ago(now()))),
            EventsStoreType::Undefined => panic!("a subscription without a start"),
        };
        Ok((stream, begin..=begin))
    }

    /// Looks when what is stored was; what was known must be so still.
    pub(crate) async fn learn(&mut self) {
        if self.times.reader.is_none() {
            self.times.readers += 1;
            let asked = Asked { kind: EventsStoreType::StartFromFirst, value: 0, unit: 1, error: None };
            let client = format!("{}-times-{}", self.name, self.times.readers);
            let (stream, _) = self.read_from(&asked, client, String::new()).await.unwrap();
            self.times.reader = Some((stream, 0));
        }
        let times = &mut self.times;
        let (stream, next) = times.reader.as_mut().expect("it reads");
        while (*next as u64) < self.stored {
            let event = timeout(PATIENCE, stream.message()).await.expect("in time").unwrap().expect("it goes on");
            assert_eq!(event.sequence, *next as u64 + 1, "in order, from the first");
            let within = times.since.unwrap_or(0)..=now();
            assert!(within.contains(&event.timestamp), "{within:?}: {event:?}");
            match times.known.get(*next) {
                Some(known) => assert_eq!(event.timestamp, *known, "its time stays"),
                None => times.known.push(event.timestamp),
            }
            *next += 1;
        }
    }
}
