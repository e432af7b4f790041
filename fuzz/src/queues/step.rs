//! What an input may do with queues.

use arbitrary::Arbitrary;
use polymq_kubemq_proto::{QueueMessagesBatchRequest, QueuesDownstreamRequestType as Poll};

use super::{Old, STREAMS, model::Model};

// One more changes what the bytes of all inputs mean: see docs/testing.md.
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
    /// A poll whose answer is not waited for: for a moment, or for longer than an input takes.
    Wait {
        stream: u8,
        queue: u8,
        most: i8,
        auto_ack: bool,
        long: bool,
    },
    /// What is left of a transaction, or whether it is over; of one that is, when `over`.
    Ask {
        stream: u8,
        transaction: u8,
        over: bool,
        offsets: bool,
    },
    /// Settles over any stream, or over one of its own with this one request.
    Over {
        stream: u8,
        transaction: u8,
        kind: Settle,
        which: Option<u8>,
    },
    /// The client sends nothing more on a stream; running polls are finished, the rest goes back.
    Finish {
        stream: u8,
    },
}

#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Settle {
    Ack,
    Nack,
    Requeue(u8),
    Close,
}

impl Settle {
    fn request(self, some: bool) -> (Poll, Option<u8>) {
        match (self, some) {
            (Self::Ack, false) => (Poll::AckAll, None),
            (Self::Ack, true) => (Poll::AckRange, None),
            (Self::Nack, false) => (Poll::NAckAll, None),
            (Self::Nack, true) => (Poll::NAckRange, None),
            (Self::Requeue(target), false) => (Poll::ReQueueAll, Some(target)),
            (Self::Requeue(target), true) => (Poll::ReQueueRange, Some(target)),
            (Self::Close, _) => (Poll::CloseByClient, None),
        }
    }
}

impl Model {
    pub(crate) async fn step(&mut self, step: &Step) {
        match *step {
            Step::Send { queue, deliveries, dead_letters } => self.send(queue, deliveries, dead_letters).await,
            Step::Batch { queue, count } => {
                let messages: Vec<_> = (0..count % 8).map(|_| self.message(queue, 0, false)).collect();
                let none = messages.is_empty();
                let request = QueueMessagesBatchRequest { batch_id: "b".into(), messages };
                match self.client.send_queue_messages_batch(request).await {
                    Ok(answer) => assert!(!answer.get_ref().have_errors, "{answer:?}"),
                    Err(status) => assert!(none, "{status}"),
                }
            }
            Step::Upstream { queue, count, deliveries } => self.upstream(queue, count % 8, deliveries).await,
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
            Step::Break { stream } => self.break_off(usize::from(stream) % STREAMS).await,
            Step::Old { stream, ref step } => self.old(usize::from(stream) % STREAMS, step).await,
            Step::Wait { stream, queue, most, auto_ack, long } => {
                let stream = usize::from(stream) % STREAMS;
                self.wait(stream, queue, most, auto_ack, long).await;
            }
            Step::Ask { stream, transaction, over, offsets } => {
                self.ask(usize::from(stream) % STREAMS, transaction, over, offsets).await;
            }
            Step::Over { stream, transaction, kind, which } => {
                let (kind, target) = kind.request(which.is_some());
                let stream = usize::from(stream) % (STREAMS + 1);
                self.settle_over(Some(stream), transaction, kind, which, false, target).await;
            }
            Step::Finish { stream } => self.finish_stream(usize::from(stream) % STREAMS).await,
        }
    }
}
