//! What a channel holds, under its lock: queues, and senders that wait for room.

use std::{
    collections::VecDeque,
    sync::{Arc, Weak},
};

use tokio::{sync::oneshot, time::Instant};

use super::{
    after::After,
    channel::Channel,
    config::Limits,
    queue::{Queue, Ticket},
};
use crate::{Completer, Message, MessageId, Receipt, clock};

#[derive(Default)]
pub(super) struct State {
    /// `None` when it is deleted. Declaring it again revives it for the producers that hold it.
    pub(super) limits: Option<Limits>,
    /// One for a queue; for a topic one for each group and each subscription without a group.
    pub(super) queues: Vec<Queue>,
    /// Of a topic: queues that get its messages too.
    pub(super) bound: Vec<Arc<Channel>>,
    /// Of a queue: the topics that it is bound to, whose senders may wait for room here.
    pub(super) feeders: Vec<Weak<Channel>>,
    next_id: u64,
    pub(super) parked: VecDeque<Parked>,
    pub(super) parked_size: u64,
    /// From this length on, senders that gave up are looked for.
    pub(super) sweep_at: usize,
}

/// Waits until every queue has room, in the order of calls.
pub(super) enum Parked {
    Send {
        message: Message,
        completer: Completer<Receipt>,
        connection: u64,
    },
    /// Answered when everything before it was.
    Flush {
        done: oneshot::Sender<()>,
        connection: u64,
    },
}

impl State {
    pub(super) fn add_queue(&mut self, group: Option<&str>, limits: Limits) -> u64 {
        self.next_id += 1;
        self.queues.push(Queue::new(self.next_id, group, limits));
        self.next_id
    }

    pub(super) fn find(&mut self, id: u64) -> Option<&mut Queue> {
        self.queues.iter_mut().find(|queue| queue.id == id)
    }

    pub(super) fn group(&self, group: &str) -> Option<&Queue> {
        self.queues.iter().find(|queue| queue.group.as_deref() == Some(group))
    }

    pub(super) fn fits(&self, size: u64) -> bool {
        self.queues.iter().all(|queue| queue.fits(size)) && self.bound.iter().all(|bound| bound.takes(size))
    }

    /// Nothing waits for room, and no other channel gets the messages too.
    #[inline]
    pub(super) fn is_alone(&self) -> bool {
        self.parked.is_empty() && self.bound.is_empty()
    }

    #[inline(never)]
    pub(super) fn push(&mut self, mut message: Message, size: u64, after: &mut After) {
        let due = match message.deliver_at() {
            None => None,
            Some(at) => {
                message = message.without_deliver_at();
                let delay = clock::until(at);
                (!delay.is_zero()).then(|| Instant::now() + delay)
            }
        };
        for bound in &self.bound {
            bound.push_bound(message.clone(), size, due, after);
        }
        let Some((last, others)) = self.queues.split_last_mut() else { return };
        for queue in others {
            queue.push_at(message.clone(), size, due, after);
        }
        last.push_at(message, size, due, after);
    }

    /// Takes in what waited for room.
    pub(super) fn admit(&mut self, after: &mut After) {
        if !self.parked.is_empty() {
            self.admit_parked(after);
        }
        if !self.feeders.is_empty() {
            after.rest().feeders.extend(self.feeders.iter().filter_map(Weak::upgrade));
        }
    }

    #[cold]
    fn admit_parked(&mut self, after: &mut After) {
        while let Some(first) = self.parked.front() {
            let size = first.size();
            if !first.is_abandoned() && !matches!(first, Parked::Flush { .. }) && !self.fits(size) {
                return;
            }
            self.parked_size -= size;
            match self.parked.pop_front() {
                Some(Parked::Send { message, completer, .. }) if completer.hand_over() => {
                    let receipt = receipt(&message);
                    self.push(message, size, after);
                    after.rest().answers.push((completer, Ok(receipt)));
                }
                Some(Parked::Flush { done, .. }) => after.rest().flushed.push(done),
                _ => {}
            }
        }
    }

    /// Forgets senders that gave up.
    pub(super) fn sweep(&mut self) {
        self.parked.retain(|parked| !parked.is_abandoned());
        self.parked_size = self.parked.iter().map(Parked::size).sum();
        self.sweep_at = 2 * self.parked.len();
    }
}

impl Parked {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Send { message, .. } => Ticket::size_of(message),
            Self::Flush { .. } => 0,
        }
    }

    pub(super) fn is_abandoned(&self) -> bool {
        match self {
            Self::Send { completer, .. } => completer.is_abandoned(),
            Self::Flush { done, .. } => done.is_closed(),
        }
    }
}

#[inline]
pub(super) fn receipt(message: &Message) -> Receipt {
    Receipt { id: message.id().cloned().unwrap_or_else(MessageId::new), broker_id: None }
}
