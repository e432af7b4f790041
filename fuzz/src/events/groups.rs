//! Readers of stored events that share them: one of a group gets each, and the group's position goes on without them.

use std::collections::BTreeSet;

use polymq_kubemq_proto::EventReceive;
use tokio::time::timeout;
use tokio_stream::{StreamExt, StreamMap};
use tonic::Streaming;

use super::{Model, PATIENCE, Start};

/// Members that a group can have.
const MEMBERS: u8 = 3;

#[derive(Default)]
pub(super) struct Group {
    /// It has a position: somebody was there.
    begun: bool,
    members: StreamMap<u8, Streaming<EventReceive>>,
    /// What each member's stream gave last.
    last: [u64; MEMBERS as usize],
    /// What must come to one of them.
    awaited: BTreeSet<u64>,
    /// What may come, once: it may have been on its way to a member that left.
    doubtful: BTreeSet<u64>,
    /// A member left while others stayed, and may still be given something.
    fading: bool,
}

impl Group {
    /// An event was stored.
    pub(super) fn told(&mut self, sequence: u64) {
        if self.begun {
            if self.fading { &mut self.doubtful } else { &mut self.awaited }.insert(sequence);
        }
    }

    /// Who is gone may have been sent everything.
    fn doubt(&mut self) {
        self.doubtful.append(&mut self.awaited);
    }

    pub(super) fn cut(&mut self) {
        if !self.members.is_empty() {
            self.doubt();
        }
        self.members.clear();
        self.fading = false;
    }

    /// An event came to a member.
    fn came(&mut self, member: u8, event: &EventReceive) {
        let sequence = event.sequence;
        let last = &mut self.last[usize::from(member)];
        assert!(sequence > *last, "{sequence} came to {member} after {last}");
        *last = sequence;
        assert_eq!(*event.body, sequence.to_be_bytes(), "the event of its number");
        let due = self.awaited.remove(&sequence) || self.doubtful.remove(&sequence);
        assert!(due, "{sequence} came to the group before, or is not for it");
    }
}

impl Model {
    fn group(&self, group: usize) -> String {
        format!("{}-g{group}", self.name)
    }

    pub(super) async fn join(&mut self, group: usize, member: u8, start: Start) {
        let member = member % MEMBERS;
        if self.groups[group].members.contains_key(&member) {
            return;
        }
        let asked = self.start(start).await;
        let subscribed = self.read_from(&asked, format!("{}-m{member}", self.name), self.group(group)).await;
        let (stream, begin) = match (subscribed, asked.error) {
            (Ok(found), None) => found,
            (Err(status), Some(error)) if status.message().contains(error) => return,
            (Err(status), _) => panic!("{start:?}: {status}"),
            (Ok(_), Some(_)) => panic!("a wrong start is refused: {start:?}"),
        };
        let group = &mut self.groups[group];
        if !std::mem::replace(&mut group.begun, true) {
            group.awaited = (*begin.end()..=self.stored).collect();
            group.doubtful = (*begin.start()..*begin.end()).collect();
        }
        group.last[usize::from(member)] = 0;
        group.members.insert(member, stream);
    }

    /// So much of what must come to a group comes.
    pub(super) async fn share(&mut self, group: usize, most: u64) {
        let group = &mut self.groups[group];
        for _ in 0..most {
            if group.awaited.is_empty() || group.members.is_empty() {
                return;
            }
            let next = timeout(PATIENCE, group.members.next()).await;
            let (member, event) = next.unwrap_or_else(|_| panic!("lost: {:?}", group.awaited)).expect("a member");
            group.came(member, &event.unwrap());
        }
    }

    pub(super) async fn quit(&mut self, group: usize, member: u8, clean: bool) {
        if clean {
            self.share(group, u64::MAX).await;
        }
        let left = &mut self.groups[group];
        if left.members.remove(&(member % MEMBERS)).is_none() {
            return;
        }
        left.doubt();
        left.fading = true;
        self.gone(group).await;
    }

    pub(super) async fn disband(&mut self, group: usize, clean: bool) {
        if clean {
            self.share(group, u64::MAX).await;
        }
        let left = &mut self.groups[group];
        if left.members.is_empty() {
            return;
        }
        left.doubt();
        left.members.clear();
        self.gone(group).await;
    }

    /// When nobody is left, waits until the broker knows.
    async fn gone(&mut self, group: usize) {
        if self.groups[group].members.is_empty() {
            self.left("group", &self.group(group)).await;
            self.groups[group].fading = false;
        }
    }

    /// At the end: what a group that was left did not get waits for who comes, and nothing comes twice.
    pub(super) async fn last(&mut self, group: usize) {
        if self.groups[group].begun && self.groups[group].members.is_empty() {
            self.join(group, 0, Start::First).await;
        }
        self.share(group, u64::MAX).await;
        self.client.ping(polymq_kubemq_proto::Empty {}).await.unwrap();
        let group = &mut self.groups[group];
        while let Some(Some((member, event))) = crate::at_once(group.members.next()).await {
            group.came(member, &event.unwrap());
        }
    }
}
