//! Events, stored or not, and commands and queries with their responders.
//!
//! What must hold: a reader gets what was stored from where it begins, in order and without a gap or a repetition, across
//! its reconnects, but for what was on its way to it when it left; readers of one group get each event once between them, and
//! who joins later goes on where the group is. A plain event comes to everybody whose pattern matches, and to one of each
//! group, once. A request has one answer, its responder's or the time-out.

mod asking;
mod groups;
mod plain;
mod readers;
mod sending;
mod starts;

pub use self::{sending::Mixed, starts::Start};

use std::time::Duration;

use arbitrary::Arbitrary;

use self::{groups::Group, plain::Listeners, readers::Reader, starts::Times};
use crate::{Client, manage, with_broker};

const READERS: usize = 3;
const GROUPS: usize = 2;
const STEPS: usize = 48;
const PATIENCE: Duration = Duration::from_secs(10);

// One more changes what the bytes of all inputs mean: see docs/testing.md.
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
    /// Plain and stored events, good and bad, over one stream.
    Mix {
        events: Vec<Mixed>,
    },
    /// One event by the single call.
    Tell {
        event: Mixed,
    },
    Listen {
        slot: u8,
        pattern: u8,
        group: u8,
    },
    /// Everything that was told comes, and nothing else.
    Hear,
    Unlisten {
        slot: u8,
    },
    /// One more reader for a group.
    Join {
        group: u8,
        member: u8,
        start: Start,
    },
    /// Members of a group take some of what there is for it.
    Share {
        group: u8,
        count: u8,
    },
    /// A member leaves; when it is `clean`, nothing is on its way to it.
    Quit {
        group: u8,
        member: u8,
        clean: bool,
    },
    Disband {
        group: u8,
        clean: bool,
    },
}

pub(crate) struct Model {
    pub(crate) client: Client,
    name: String,
    stored: u64,
    readers: [Reader; READERS],
    groups: [Group; GROUPS],
    listeners: Listeners,
    times: Times,
}

pub fn run(steps: &[Step]) {
    if steps.is_empty() {
        return;
    }
    with_broker(async |channel, name| {
        let mut model = Model::new(Client::new(channel), name);
        for step in steps.iter().take(STEPS) {
            model.step(step).await;
        }
        model.end().await;
    });
}

impl Model {
    pub(crate) fn new(client: Client, name: String) -> Self {
        Self {
            client,
            name,
            stored: 0,
            readers: Default::default(),
            groups: Default::default(),
            listeners: Listeners::default(),
            times: Times::default(),
        }
    }

    pub(crate) async fn step(&mut self, step: &Step) {
        match *step {
            Step::Store { count } => self.store(count % 8).await,
            Step::Subscribe { reader, start } => self.subscribe(usize::from(reader) % READERS, start).await,
            Step::Read { reader, count } => self.read(usize::from(reader) % READERS, count.into()).await,
            Step::Leave { reader } => self.leave(usize::from(reader) % READERS).await,
            Step::Ask { query, answered, cached } => self.ask(query, answered, cached % 3).await,
            Step::Mix { ref events } => self.mix(events).await,
            Step::Tell { event } => self.tell(event).await,
            Step::Listen { slot, pattern, group } => self.listen(slot, pattern, group).await,
            Step::Hear => self.hear().await,
            Step::Unlisten { slot } => self.unlisten(slot).await,
            Step::Join { group, member, start } => self.join(usize::from(group) % GROUPS, member, start).await,
            Step::Share { group, count } => self.share(usize::from(group) % GROUPS, count.into()).await,
            Step::Quit { group, member, clean } => self.quit(usize::from(group) % GROUPS, member, clean).await,
            Step::Disband { group, clean } => self.disband(usize::from(group) % GROUPS, clean).await,
        }
    }

    /// Everybody is cut off, as when the broker stops.
    pub(crate) fn cut(&mut self) {
        for reader in &mut self.readers {
            reader.cut(self.stored);
        }
        for group in &mut self.groups {
            group.cut();
        }
        self.listeners = Listeners::default();
        self.times.cut();
    }

    /// Whoever still reads gets the rest.
    pub(crate) async fn end(mut self) {
        for reader in 0..READERS {
            self.read(reader, u64::MAX).await;
        }
        for group in 0..GROUPS {
            self.last(group).await;
        }
        self.hear_all().await;
        let name = self.name.clone();
        let _ = manage(&mut self.client, "delete-channel", "events_store", &name).await;
    }
}
