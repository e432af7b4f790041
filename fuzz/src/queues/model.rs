//! What must be true of the messages of one input, as far as its steps tell.

use std::collections::{BTreeMap, BTreeSet};

use polymq_kubemq_proto::{QueueMessage, QueueMessagePolicy};

use super::{QUEUES, STREAMS, older::Older, polls::Transaction, streams::Downstream};
use crate::Client;

#[derive(Debug, Clone, Copy)]
pub(super) struct Known {
    /// Deliveries that it may have; none: as many as the broker allows.
    pub(super) deliveries: u8,
    pub(super) dead_letters: bool,
}

pub(crate) struct Model {
    pub(crate) client: Client,
    pub(super) name: String,
    pub(super) next: u64,
    /// Accepted and not finished with.
    pub(super) there: BTreeMap<u64, Known>,
    pub(super) finished: BTreeSet<u64>,
    /// Had their last delivery and no queue for dead letters: may be gone.
    pub(super) may_be_gone: BTreeSet<u64>,
    pub(super) transactions: Vec<Transaction>,
    /// Polls that were asked for, the ids of their transactions, and those that nothing is left of.
    pub(super) polls: u64,
    pub(super) ids: BTreeSet<String>,
    pub(super) over: Vec<String>,
    pub(super) streams: [Option<Downstream>; STREAMS],
    pub(super) older: [Option<Older>; STREAMS],
}

fn body(message: &QueueMessage) -> u64 {
    u64::from_be_bytes((*message.body).try_into().expect("a body that was sent"))
}

impl Model {
    pub(crate) fn new(client: Client, name: String) -> Self {
        Self {
            client,
            name,
            next: 0,
            there: BTreeMap::new(),
            finished: BTreeSet::new(),
            may_be_gone: BTreeSet::new(),
            transactions: Vec::new(),
            polls: 0,
            ids: BTreeSet::new(),
            over: Vec::new(),
            streams: Default::default(),
            older: Default::default(),
        }
    }

    pub(super) fn queue(&self, number: u8) -> String {
        format!("{}.{}", self.name, usize::from(number) % QUEUES)
    }

    pub(super) fn message(&mut self, queue: u8, deliveries: u8, dead_letters: bool) -> QueueMessage {
        self.next += 1;
        let deliveries = deliveries % 4;
        let policy = QueueMessagePolicy {
            max_receive_count: i32::from(deliveries),
            max_receive_queue: if dead_letters { self.queue(QUEUES as u8 - 1) } else { String::new() },
            ..QueueMessagePolicy::default()
        };
        self.there.insert(self.next, Known { deliveries, dead_letters });
        QueueMessage {
            client_id: "fuzz".into(),
            channel: self.queue(queue),
            body: self.next.to_be_bytes().to_vec().into(),
            policy: Some(policy),
            ..QueueMessage::default()
        }
    }

    /// A message came: it must be there.
    pub(super) fn delivered(&mut self, message: &QueueMessage) -> u64 {
        let body = body(message);
        assert!(self.there.contains_key(&body), "{body} came after it was finished with, or was never sent");
        body
    }

    pub(super) fn finish(&mut self, body: u64) {
        assert!(self.there.remove(&body).is_some(), "{body} was finished with before");
        self.finished.insert(body);
    }

    /// A delivery failed: without dead letters it may have been the last one.
    pub(super) fn failed(&mut self, body: u64) {
        // It becomes a dead letter, without the policy that it had, and from there may fail for good.
        if let Some(known) = self.there.get(&body)
            && (known.deliveries > 0 || known.dead_letters)
        {
            self.may_be_gone.extend((!known.dead_letters).then_some(body));
        }
    }

    pub(super) fn lent(&self) -> BTreeSet<u64> {
        let polled = self.transactions.iter().flat_map(|transaction| transaction.held.values().copied());
        let older = self.older.iter().flatten().filter_map(|older| older.held.map(|(_, body)| body));
        polled.chain(older).collect()
    }
}
