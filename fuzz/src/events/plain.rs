//! Plain events and who listens: by names and patterns, alone or in groups.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use polymq_kubemq_proto::{Empty, Event, EventReceive, Subscribe, subscribe::SubscribeType};
use tokio::time::{Instant, timeout};
use tokio_stream::{StreamExt, StreamMap};
use tonic::Streaming;

use super::{Mixed, Model, PATIENCE};
use crate::{at_once, manage};

const SLOTS: u8 = 5;
/// After the input's own name. The first is also the channel of the stored events, which is another one.
const CHANNELS: [&str; 5] = ["", ".a", ".b", ".a.b", ".b.a.b"];
/// `@` is the input's own name.
const PATTERNS: [&str; 14] =
    ["@", "@.a", "@.*", "@.>", "*.a", "*", ">", "@.*.b", "@.a.*", "*.*", "*.>", "@.a.>", "*.*.a.b", "@.>.b"];

#[derive(Default)]
pub(super) struct Listeners {
    streams: StreamMap<u64, Streaming<EventReceive>>,
    /// Who listens, by the number of its stream.
    about: BTreeMap<u64, Listener>,
    next: u64,
    /// Patterns and groups of who left a group and may still be given something.
    fading: Vec<(String, String)>,
    /// What must come, once to one of those.
    awaited: Vec<Awaited>,
    told: u64,
}

struct Listener {
    slot: u8,
    pattern: String,
    group: String,
    last: u64,
}

struct Awaited {
    number: u64,
    channel: String,
    to: BTreeSet<u64>,
    /// It may have gone to one that has left.
    doubtful: bool,
}

/// `*` is one part of a name, `>` at the end one or more.
fn matches(pattern: &[&str], name: &[&str]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        ([">"], [_, ..]) => true,
        (["*", pattern @ ..], [_, name @ ..]) => matches(pattern, name),
        ([wanted, pattern @ ..], [part, name @ ..]) if wanted == part => matches(pattern, name),
        _ => false,
    }
}

fn listens(pattern: &str, channel: &str) -> bool {
    matches(&pattern.split('.').collect::<Vec<_>>(), &channel.split('.').collect::<Vec<_>>())
}

impl Model {
    pub(super) fn plain_event(&mut self, channel: u8) -> Event {
        self.listeners.told += 1;
        let number = self.listeners.told;
        Event {
            event_id: format!("plain {number}"),
            client_id: "fuzz".into(),
            channel: format!("{}{}", self.name, CHANNELS[usize::from(channel) % CHANNELS.len()]),
            metadata: "plain".into(),
            body: number.to_be_bytes().to_vec().into(),
            tags: [("tag".to_owned(), "value".to_owned())].into(),
            ..Event::default()
        }
    }

    /// A good event will be told: to everybody who listens without a group, and to one of each group.
    pub(super) fn expect(&mut self, event: &Event) {
        let Listeners { about, fading, awaited, told, .. } = &mut self.listeners;
        let mut groups: BTreeMap<&str, BTreeSet<u64>> = BTreeMap::new();
        let mut add = |to, doubtful| {
            awaited.push(Awaited { number: *told, channel: event.channel.clone(), to, doubtful });
        };
        for (id, listener) in about.iter().filter(|(_, listener)| listens(&listener.pattern, &event.channel)) {
            if listener.group.is_empty() {
                add([*id].into(), false);
            } else {
                groups.entry(&listener.group).or_default().insert(*id);
            }
        }
        for (group, members) in groups {
            let left = |(pattern, of): &(String, String)| of == group && listens(pattern, &event.channel);
            add(members, fading.iter().any(left));
        }
    }

    pub(super) async fn listen(&mut self, slot: u8, pattern: u8, group: u8) {
        let slot = slot % SLOTS;
        if self.listeners.about.values().any(|listener| listener.slot == slot) {
            return;
        }
        let pattern = PATTERNS[usize::from(pattern) % PATTERNS.len()].replace('@', &self.name);
        let group = match group % 3 {
            0 => String::new(),
            group => format!("{}-{group}", self.name),
        };
        let request = Subscribe {
            subscribe_type_data: SubscribeType::Events.into(),
            client_id: "listener".into(),
            channel: pattern.clone(),
            group: group.clone(),
            ..Subscribe::default()
        };
        let stream = self.client.subscribe_to_events(request).await.unwrap().into_inner();
        let listeners = &mut self.listeners;
        listeners.next += 1;
        listeners.streams.insert(listeners.next, stream);
        listeners.about.insert(listeners.next, Listener { slot, pattern, group, last: 0 });
    }

    /// Everything that was told comes, and nothing else.
    pub(super) async fn hear(&mut self) {
        let listeners = &mut self.listeners;
        while let Some(awaited) = listeners.awaited.iter().find(|awaited| !awaited.doubtful) {
            let lost = format!("{} on {:?} is lost for {:?}", awaited.number, awaited.channel, awaited.to);
            let (id, event) = timeout(PATIENCE, listeners.streams.next()).await.expect(&lost).expect("a listener");
            listeners.heard(id, &event.unwrap());
        }
        self.client.ping(Empty {}).await.unwrap();
        while let Some(Some((id, event))) = at_once(listeners.streams.next()).await {
            listeners.heard(id, &event.unwrap());
        }
    }

    /// At the end one more event on each channel, for whoever listens.
    pub(super) async fn hear_all(&mut self) {
        if !self.listeners.about.is_empty() {
            let channels: Vec<_> = (0..CHANNELS.len() as u8).map(|channel| Mixed::Plain { channel }).collect();
            self.mix(&channels).await;
            self.hear().await;
        }
    }

    pub(super) async fn unlisten(&mut self, slot: u8) {
        self.hear().await;
        let listeners = &mut self.listeners;
        let found = listeners.about.iter().find(|(_, listener)| listener.slot == slot % SLOTS);
        let Some((&id, _)) = found else { return };
        listeners.streams.remove(&id);
        let Some(Listener { pattern, group, .. }) = listeners.about.remove(&id) else { return };
        if group.is_empty() {
            return;
        }
        listeners.fading.push((pattern.clone(), group));
        // The broker's list of patterns tells when it has left, unless another one has the same.
        if listeners.about.values().any(|listener| listener.pattern == pattern) {
            return;
        }
        let (listed, began) = (format!("\"name\":\"{pattern}\""), Instant::now());
        loop {
            let channels = manage(&mut self.client, "list-channels", "events", "").await.expect("a list");
            if !String::from_utf8(channels).expect("JSON").contains(&listed) {
                break;
            }
            assert!(began.elapsed() < PATIENCE, "{pattern} is listened to by nobody");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.listeners.fading.retain(|(left, _)| *left != pattern);
    }
}

impl Listeners {
    fn heard(&mut self, id: u64, event: &EventReceive) {
        let listener = self.about.get_mut(&id).expect("it listens");
        let number = u64::from_be_bytes((*event.body).try_into().expect("a body that was sent"));
        let at = self.awaited.iter().position(|awaited| awaited.number == number && awaited.to.contains(&id));
        let at = at.unwrap_or_else(|| panic!("not for {:?} in {:?}: {event:?}", listener.pattern, listener.group));
        let awaited = self.awaited.swap_remove(at);
        assert!(number > listener.last, "{number} came after {}", listener.last);
        listener.last = number;
        assert_eq!(event.channel, awaited.channel);
        assert_eq!((event.sequence, event.timestamp), (0, 0), "{event:?}");
        assert_eq!((&*event.event_id, &*event.metadata), (&*format!("plain {number}"), "plain"));
        assert_eq!(event.tags.get("tag").map(String::as_str), Some("value"), "{event:?}");
    }
}
