//! Steps over the stream of polls: each poll is a transaction.

use std::collections::BTreeMap;

use polymq_kubemq_proto::{QueuesDownstreamRequest, QueuesDownstreamRequestType as Poll, QueuesDownstreamResponse};

use super::{STREAMS, model::Model, streams::Asked};

/// Polls without an answer that a stream may have.
const WAITING: usize = 6;
/// Longer than an input takes.
const LONG: i32 = 600_000;
const SHORT: i32 = 2;

/// A poll that may have messages.
pub(super) struct Transaction {
    pub(super) id: String,
    pub(super) stream: usize,
    /// By sequence: the body.
    pub(super) held: BTreeMap<i64, u64>,
}

impl Model {
    pub(super) async fn get(&mut self, stream: u8, queue: u8, most: u8, auto_ack: bool) {
        let stream = usize::from(stream) % STREAMS;
        let asked = Asked { channel: self.queue(queue), most: i32::from(most % 16) + 1, auto_ack, long: false };
        let id = self.poll(stream, asked, 0).await;
        while self.streams[stream].as_ref().is_some_and(|open| open.polls.contains_key(&id)) {
            let answer = self.open(stream).await.next().await.expect("an answer");
            self.polled(stream, answer);
        }
    }

    /// Polls without waiting for the answer.
    pub(super) async fn wait(&mut self, stream: usize, queue: u8, most: i8, auto_ack: bool, long: bool) {
        if self.streams[stream].as_ref().is_some_and(|open| open.polls.len() >= WAITING) {
            return;
        }
        let asked = Asked { channel: self.queue(queue), most: most.into(), auto_ack, long };
        self.poll(stream, asked, if long { LONG } else { SHORT }).await;
    }

    async fn poll(&mut self, stream: usize, asked: Asked, wait: i32) -> String {
        self.polls += 1;
        let id = format!("get {}", self.polls);
        let request = QueuesDownstreamRequest {
            request_id: id.clone(),
            client_id: "fuzz".into(),
            channel: asked.channel.clone(),
            request_type_data: Poll::Get.into(),
            max_items: asked.most,
            wait_timeout: wait,
            auto_ack: asked.auto_ack,
            ..QueuesDownstreamRequest::default()
        };
        self.request(stream, request).await;
        self.open(stream).await.polls.insert(id.clone(), asked);
        id
    }

    /// A poll is answered.
    pub(super) fn polled(&mut self, stream: usize, answer: QueuesDownstreamResponse) {
        let lent = self.lent();
        let open = self.streams[stream].as_mut().expect("its stream is open");
        let asked = open.polls.remove(&answer.ref_request_id).expect("an answer to a poll, and the only one");
        let finished = open.requests.is_none();
        assert!(!answer.is_error && answer.request_type_data() == Poll::Get, "{answer:?}");
        assert!(answer.active_offsets.is_empty(), "{answer:?}");
        assert_eq!(answer.transaction_complete, asked.auto_ack, "{answer:?}");
        assert!(self.ids.insert(answer.transaction_id.clone()), "one id for two: {answer:?}");
        assert!(asked.most <= 0 || answer.messages.len() <= asked.most.unsigned_abs() as usize, "more than asked for");
        assert!(!asked.long || !answer.messages.is_empty(), "it was to wait");
        let mut held = BTreeMap::new();
        for message in &answer.messages {
            assert_eq!(message.channel, asked.channel, "of the queue that was asked for");
            let body = self.delivered(message);
            assert!(!lent.contains(&body), "{body} is lent to two");
            let attributes = message.attributes.as_ref().expect("attributes");
            assert!(attributes.receive_count >= 1, "{attributes:?}");
            if asked.auto_ack {
                self.finish(body);
            } else {
                held.insert(attributes.sequence.cast_signed(), body);
            }
        }
        // What the poll of a finished stream got goes back with the stream's end.
        if held.is_empty() {
            self.over.push(answer.transaction_id);
        } else if !finished {
            self.transactions.push(Transaction { id: answer.transaction_id, stream, held });
        }
    }
}
