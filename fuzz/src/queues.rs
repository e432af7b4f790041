//! The life of messages in queues, by steps over both of the protocol's streams and its single calls.
//!
//! What must hold, whatever the order: each delivery is of a message that was accepted and that nobody has finished with; and
//! at the end every accepted message is either finished with or still there, once. Expirations and delays are left out,
//! because they make messages come and go by the clock; dropping for good is expected where a message had its last delivery.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use arbitrary::Arbitrary;
use polymq_kubemq_proto::{
    AckAllQueueMessagesRequest, QueueMessage, QueueMessagePolicy, QueueMessagesBatchRequest, QueuesDownstreamRequest,
    QueuesDownstreamRequestType as Poll, QueuesDownstreamResponse, QueuesUpstreamRequest, ReceiveQueueMessagesRequest,
    StreamQueueMessagesRequest, StreamQueueMessagesResponse, StreamRequestType,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

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

/// Steps of the older transactions.
#[derive(Debug, Arbitrary)]
pub enum Old {
    Receive { queue: u8 },
    Ack { wrong: bool },
    Reject,
    Extend { seconds: i8 },
    Resend { target: u8 },
    Modify { target: u8 },
    Break,
}

/// A poll that may have messages.
struct Transaction {
    id: String,
    stream: usize,
    /// By sequence: the body.
    held: BTreeMap<i64, u64>,
}

struct Downstream {
    requests: mpsc::Sender<QueuesDownstreamRequest>,
    answers: Streaming<QueuesDownstreamResponse>,
}

struct Older {
    requests: mpsc::Sender<StreamQueueMessagesRequest>,
    answers: Streaming<StreamQueueMessagesResponse>,
    held: Option<(u64, u64)>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    /// Deliveries that it may have; none: as many as the broker allows.
    deliveries: u8,
    dead_letters: bool,
}

struct Model {
    client: Client,
    name: String,
    next: u64,
    /// Accepted and not finished with.
    there: BTreeMap<u64, Known>,
    finished: BTreeSet<u64>,
    /// Had their last delivery and no queue for dead letters: may be gone.
    may_be_gone: BTreeSet<u64>,
    transactions: Vec<Transaction>,
    streams: [Option<Downstream>; STREAMS],
    older: [Option<Older>; STREAMS],
}

pub fn run(steps: &[Step]) {
    if steps.is_empty() {
        return;
    }
    with_broker(async |channel, name| {
        let client = Client::new(channel);
        let mut model = Model {
            client,
            name,
            next: 0,
            there: BTreeMap::new(),
            finished: BTreeSet::new(),
            may_be_gone: BTreeSet::new(),
            transactions: Vec::new(),
            streams: Default::default(),
            older: Default::default(),
        };
        for step in steps.iter().take(STEPS) {
            model.step(step).await;
        }
        model.end().await;
    });
}

fn body(message: &QueueMessage) -> u64 {
    u64::from_be_bytes((*message.body).try_into().expect("a body that was sent"))
}

impl Model {
    fn queue(&self, number: u8) -> String {
        format!("{}.{}", self.name, usize::from(number) % QUEUES)
    }

    fn message(&mut self, queue: u8, deliveries: u8, dead_letters: bool) -> QueueMessage {
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
    fn delivered(&mut self, message: &QueueMessage) -> u64 {
        let body = body(message);
        assert!(self.there.contains_key(&body), "{body} came after it was finished with, or was never sent");
        body
    }

    fn finish(&mut self, body: u64) {
        assert!(self.there.remove(&body).is_some(), "{body} was finished with before");
        self.finished.insert(body);
    }

    /// A delivery failed: without dead letters it may have been the last one.
    fn failed(&mut self, body: u64) {
        // It becomes a dead letter, without the policy that it had, and from there may fail for good.
        if let Some(known) = self.there.get(&body)
            && (known.deliveries > 0 || known.dead_letters)
        {
            self.may_be_gone.extend((!known.dead_letters).then_some(body));
        }
    }

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

    /// Takes, or only looks at, what waits.
    async fn receive(&mut self, queue: u8, most: u8, peek: bool) -> usize {
        // Nobody waits for a second: the single call has no shorter wait, so it is asked when something is there.
        let channel = self.queue(queue);
        if self.waiting(&channel).await == 0 {
            return 0;
        }
        let request = ReceiveQueueMessagesRequest {
            client_id: "fuzz".into(),
            channel,
            max_number_of_messages: most.into(),
            wait_time_seconds: 1,
            is_peak: peek,
            ..ReceiveQueueMessagesRequest::default()
        };
        let answer = self.client.receive_queue_messages(request).await.unwrap().into_inner();
        assert!(!answer.is_error, "{}", answer.error);
        for message in &answer.messages {
            let body = self.delivered(message);
            if !peek {
                self.finish(body);
            }
        }
        answer.messages.len()
    }

    /// How many messages of a queue are not lent, as far as this input knows of loans.
    async fn waiting(&mut self, channel: &str) -> usize {
        let request = QueuesDownstreamRequest {
            request_id: "look".into(),
            client_id: "fuzz".into(),
            channel: channel.into(),
            request_type_data: Poll::Get.into(),
            max_items: 1,
            ..QueuesDownstreamRequest::default()
        };
        let (requests, stream) = mpsc::channel(2);
        requests.send(request).await.unwrap();
        let mut answers = self.client.queues_downstream(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let answer = answers.message().await.unwrap().expect("an answer");
        assert!(!answer.is_error, "{}", answer.error);
        for message in &answer.messages {
            self.delivered(message);
        }
        if !answer.messages.is_empty() {
            // Back before the next step, by the broker's own word.
            let close = QueuesDownstreamRequest {
                request_type_data: Poll::CloseByClient.into(),
                ref_transaction_id: answer.transaction_id,
                ..QueuesDownstreamRequest::default()
            };
            requests.send(close.clone()).await.unwrap();
            requests.send(close).await.unwrap();
            let refused = answers.message().await.unwrap().expect("an answer to the second one");
            assert!(refused.is_error, "{refused:?}");
        }
        answer.messages.len()
    }

    async fn purge(&mut self, queue: u8) {
        let request = AckAllQueueMessagesRequest {
            client_id: "fuzz".into(),
            channel: self.queue(queue),
            ..AckAllQueueMessagesRequest::default()
        };
        let answer = self.client.ack_all_queue_messages(request).await.unwrap().into_inner();
        assert!(!answer.is_error, "{}", answer.error);
        // Which ones is not said. What is lent stays; anything else may be gone.
        let lent: BTreeSet<_> = self.lent();
        self.may_be_gone.extend(self.there.keys().filter(|body| !lent.contains(body)));
    }

    fn lent(&self) -> BTreeSet<u64> {
        let polled = self.transactions.iter().flat_map(|transaction| transaction.held.values().copied());
        let older = self.older.iter().flatten().filter_map(|older| older.held.map(|(_, body)| body));
        polled.chain(older).collect()
    }

    async fn get(&mut self, stream: u8, queue: u8, most: u8, auto_ack: bool) {
        let stream = usize::from(stream) % STREAMS;
        if self.streams[stream].is_none() {
            let (requests, receiver) = mpsc::channel(4);
            let answers = self.client.queues_downstream(ReceiverStream::new(receiver)).await.unwrap().into_inner();
            self.streams[stream] = Some(Downstream { requests, answers });
        }
        let request = QueuesDownstreamRequest {
            request_id: "get".into(),
            client_id: "fuzz".into(),
            channel: self.queue(queue),
            request_type_data: Poll::Get.into(),
            max_items: i32::from(most % 16) + 1,
            auto_ack,
            ..QueuesDownstreamRequest::default()
        };
        let open = self.streams[stream].as_mut().expect("opened");
        open.requests.send(request).await.unwrap();
        let answer = open.answers.message().await.unwrap().expect("an answer");
        assert!(!answer.is_error, "{}", answer.error);
        let lent = self.lent();
        let mut held = BTreeMap::new();
        for message in &answer.messages {
            let body = self.delivered(message);
            assert!(!lent.contains(&body), "{body} is lent to two");
            let attributes = message.attributes.as_ref().expect("attributes");
            assert!(attributes.receive_count >= 1, "{attributes:?}");
            if auto_ack {
                self.finish(body);
            } else {
                held.insert(attributes.sequence.cast_signed(), body);
            }
        }
        if !held.is_empty() {
            self.transactions.push(Transaction { id: answer.transaction_id, stream, held });
        }
    }

    /// Settles all of a poll, or those that the bits of `which` choose. Success is not answered, so a question follows
    /// that is: the transaction's status.
    async fn settle(&mut self, transaction: u8, kind: Poll, which: Option<u8>, twice: bool, target: Option<u8>) {
        if self.transactions.is_empty() {
            return;
        }
        let at = usize::from(transaction) % self.transactions.len();
        let mut transaction = self.transactions.swap_remove(at);
        let chosen: Vec<(i64, u64)> = transaction
            .held
            .iter()
            .enumerate()
            .filter(|(at, _)| which.is_none_or(|which| which >> (at % 8) & 1 == 1))
            .map(|(_, (sequence, body))| (*sequence, *body))
            .collect();
        let mut range: Vec<i64> = chosen.iter().map(|(sequence, _)| *sequence).collect();
        if twice {
            range.extend(range.clone());
        }
        let request = QueuesDownstreamRequest {
            request_id: "settle".into(),
            client_id: "fuzz".into(),
            request_type_data: kind.into(),
            ref_transaction_id: transaction.id.clone(),
            re_queue_channel: target.map(|target| self.queue(target)).unwrap_or_default(),
            sequence_range: range,
            ..QueuesDownstreamRequest::default()
        };
        let status = QueuesDownstreamRequest {
            request_id: "status".into(),
            request_type_data: Poll::TransactionStatus.into(),
            ..request.clone()
        };
        let open = self.streams[transaction.stream].as_mut().expect("its stream is open");
        open.requests.send(request).await.unwrap();
        open.requests.send(status).await.unwrap();
        let mut answer = open.answers.message().await.unwrap().expect("an answer");
        if answer.is_error {
            assert!(chosen.is_empty(), "{kind:?}: {}", answer.error);
            answer = open.answers.message().await.unwrap().expect("an answer");
        }
        assert_eq!(answer.ref_request_id, "status");
        for (sequence, body) in chosen {
            transaction.held.remove(&sequence);
            match kind {
                Poll::AckAll | Poll::AckRange => self.finish(body),
                Poll::NAckAll | Poll::NAckRange => self.failed(body),
                _ => {}
            }
        }
        if kind == Poll::CloseByClient {
            transaction.held.clear();
        }
        assert_eq!(answer.transaction_complete, transaction.held.is_empty(), "{kind:?}");
        if !transaction.held.is_empty() {
            self.transactions.push(transaction);
        }
    }

    async fn old(&mut self, stream: usize, step: &Old) {
        if matches!(step, Old::Break) {
            if let Some((_, body)) = self.older[stream].take().and_then(|older| older.held) {
                self.failed(body);
            }
            return;
        }
        if let Old::Receive { queue } = step {
            let channel = self.queue(*queue);
            if self.waiting(&channel).await == 0 {
                return;
            }
        }
        if self.older[stream].is_none() {
            let (requests, receiver) = mpsc::channel(2);
            let answers = self.client.stream_queue_message(ReceiverStream::new(receiver)).await.unwrap().into_inner();
            self.older[stream] = Some(Older { requests, answers, held: None });
        }
        let held = self.older[stream].as_ref().and_then(|older| older.held);
        let mut request = StreamQueueMessagesRequest {
            request_id: "old".into(),
            client_id: "fuzz".into(),
            wait_time_seconds: 1,
            visibility_seconds: 600,
            ref_sequence: held.map_or(0, |(sequence, _)| sequence),
            ..StreamQueueMessagesRequest::default()
        };
        request.stream_request_type_data = match *step {
            Old::Receive { queue } => {
                request.channel = self.queue(queue);
                StreamRequestType::ReceiveMessage
            }
            Old::Ack { wrong } => {
                request.ref_sequence += u64::from(wrong);
                StreamRequestType::AckMessage
            }
            Old::Reject => StreamRequestType::RejectMessage,
            Old::Extend { seconds } => {
                // One that ends while the input runs would be a race.
                request.visibility_seconds = i32::from(seconds) * 100;
                StreamRequestType::ModifyVisibility
            }
            Old::Resend { target } => {
                request.channel = self.queue(target);
                StreamRequestType::ResendMessage
            }
            Old::Modify { target } => {
                request.modified_message = Some(self.message(target, 0, false));
                StreamRequestType::SendModifiedMessage
            }
            Old::Break => unreachable!("handled above"),
        }
        .into();
        let open = self.older[stream].as_mut().expect("opened");
        open.requests.send(request).await.unwrap();
        let answer = open.answers.message().await.unwrap().expect("every request is answered");
        let modified = matches!(step, Old::Modify { .. }).then_some(self.next);
        if answer.is_error {
            // What was not accepted is not there.
            modified.map(|body| self.there.remove(&body));
            let refused = held.is_none()
                || matches!(step, Old::Receive { .. } | Old::Ack { wrong: true } | Old::Extend { seconds: i8::MIN..0 });
            assert!(refused, "{step:?}: {}", answer.error);
            return;
        }
        match (step, held) {
            (Old::Receive { .. }, _) => {
                let message = answer.message.expect("a message");
                let body = self.delivered(&message);
                assert!(!self.lent().contains(&body), "{body} is lent to two");
                let sequence = message.attributes.expect("attributes").sequence;
                self.older[stream].as_mut().expect("opened").held = Some((sequence, body));
            }
            (Old::Extend { .. }, _) => {}
            (_, Some((_, body))) => {
                match step {
                    Old::Ack { .. } | Old::Modify { .. } => self.finish(body),
                    Old::Reject => self.failed(body),
                    _ => {}
                }
                // The stream ends after its message.
                let mut older = self.older[stream].take().expect("opened");
                assert!(older.answers.message().await.unwrap().is_none(), "the stream ends");
            }
            (_, None) => panic!("{step:?} succeeded with nothing held"),
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
