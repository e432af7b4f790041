//! The life of messages in queues, by steps over both of the protocol's streams and its single calls.
//!
//! What must hold, whatever the order: each delivery is of a message that was accepted and that nobody has finished with; and
//! at the end every accepted message is either finished with or still there, once. Expirations and delays are left out,
//! because they make messages come and go by the clock; dropping for good is expected where a message had its last delivery.

mod calls;
mod model;
mod older;
mod polls;

pub use older::Old;

use std::time::Duration;

use arbitrary::Arbitrary;
use polymq_kubemq_proto::{QueueMessagesBatchRequest, QueuesDownstreamRequestType as Poll, QueuesUpstreamRequest};

use self::model::Model;
use crate::{Client, manage, with_broker};

/// Queues of an input; the last one is nobody's but the dead letters'.
const QUEUES: usize = 3;
/// Streams of each kind that an input has open.
const STREAMS: usize = 2;
/// Steps of an input; more say nothing new.
const STEPS: usize = 48;

#[derive(Debug, Arbitrary)]
pub enum Step {
    /// One message by the single call, with a limit of deliveries and perhaps a queue of dead letters.
    Send {
        queue: u8,
        deliveries: u8,
        dead_letters: bool,
    },
    Batch {
        queue: u8,
        count: u8,
    },
    Upstream {
        queue: u8,
        count: u8,
        deliveries: u8,
    },
    Receive {
        queue: u8,
        most: u8,
        peek: bool,
    },
    Purge {
        queue: u8,
    },
    Get {
        stream: u8,
        queue: u8,
        most: u8,
        auto_ack: bool,
    },
    AckAll {
        transaction: u8,
    },
    AckSome {
        transaction: u8,
        which: u8,
        twice: bool,
    },
    NackAll {
        transaction: u8,
    },
    NackSome {
        transaction: u8,
        which: u8,
    },
    Requeue {
        transaction: u8,
        target: u8,
    },
    RequeueSome {
        transaction: u8,
        which: u8,
        target: u8,
    },
    Close {
        transaction: u8,
    },
    /// The stream breaks; what is lent over it goes back.
    Break {
        stream: u8,
    },
    Old {
        stream: u8,
        step: Old,
    },
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
    async fn step(&mut self, step: &Step) {
        match *step {
            Step::Send { queue, deliveries, dead_letters } => {
                let message = self.message(queue, deliveries, dead_letters);
                let result = self.client.send_queue_message(message).await.unwrap().into_inner();
                assert!(!result.is_error, "{result:?}");
            }
            Step::Batch { queue, count } => {
                let messages: Vec<_> = (0..count % 8).map(|_| self.message(queue, 0, false)).collect();
                let none = messages.is_empty();
                let request = QueueMessagesBatchRequest { batch_id: "b".into(), messages };
                match self.client.send_queue_messages_batch(request).await {
                    Ok(answer) => assert!(!answer.get_ref().have_errors, "{answer:?}"),
                    Err(status) => assert!(none, "{status}"),
                }
            }
            Step::Upstream { queue, count, deliveries } => {
                let messages: Vec<_> = (0..count % 8).map(|_| self.message(queue, deliveries, false)).collect();
                let none = messages.is_empty();
                let request = QueuesUpstreamRequest { request_id: "u".into(), messages };
                let answers = self.client.queues_upstream(tokio_stream::once(request)).await.unwrap();
                let answer = answers.into_inner().message().await.unwrap().expect("an answer");
                assert_eq!(answer.is_error, none, "{answer:?}");
                assert!(answer.results.iter().all(|result| !result.is_error), "{answer:?}");
            }
            Step::Receive { queue, most, peek } => drop(self.receive(queue, most % 16 + 1, peek).await),
            Step::Purge { queue } => self.purge(queue).await,
            Step::Get { stream, queue, most, auto_ack } => self.get(stream, queue, most, auto_ack).await,
            Step::AckAll { transaction } => self.settle(transaction, Poll::AckAll, None, false, None).await,
            Step::AckSome { transaction, which, twice } => {
                self.settle(transaction, Poll::AckRange, Some(which), twice, None).await;
            }
            Step::NackAll { transaction } => self.settle(transaction, Poll::NAckAll, None, false, None).await,
            Step::NackSome { transaction, which } => {
                self.settle(transaction, Poll::NAckRange, Some(which), false, None).await;
            }
            Step::Requeue { transaction, target } => {
                self.settle(transaction, Poll::ReQueueAll, None, false, Some(target)).await;
            }
            Step::RequeueSome { transaction, which, target } => {
                self.settle(transaction, Poll::ReQueueRange, Some(which), false, Some(target)).await;
            }
            Step::Close { transaction } => self.settle(transaction, Poll::CloseByClient, None, false, None).await,
            Step::Break { stream } => {
                let stream = usize::from(stream) % STREAMS;
                self.streams[stream] = None;
                self.transactions.retain(|transaction| transaction.stream != stream);
            }
            Step::Old { stream, ref step } => self.old(usize::from(stream) % STREAMS, step).await,
        }
    }

    /// Everything that is left comes, each once; then nothing does.
    async fn end(mut self) {
        for older in &mut self.older {
            if let Some((_, body)) = older.take().and_then(|older| older.held) {
                let known = self.there.get(&body).copied();
                self.may_be_gone.extend(known.filter(|known| !known.dead_letters).map(|_| body));
            }
        }
        self.streams = Default::default();
        self.transactions.clear();
        // Streams that broke give back when the broker has seen it; the counts of the queues tell when.
        for round in 0.. {
            let mut came = 0;
            for queue in 0..QUEUES as u8 {
                came += self.receive(queue, 16, false).await;
            }
            let left: Vec<_> = self.there.keys().filter(|body| !self.may_be_gone.contains(body)).collect();
            if left.is_empty() && came == 0 {
                break;
            }
            assert!(came > 0 || round < 2_000, "lost: {left:?}");
            if came == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        for queue in 0..QUEUES as u8 {
            let name = self.queue(queue);
            let _ = manage(&mut self.client, "delete-channel", "queues", &name).await;
        }
    }
}
