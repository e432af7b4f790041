//! Steps over the stream of polls: each poll is a transaction.

use std::collections::BTreeMap;

use polymq_kubemq_proto::{QueuesDownstreamRequest, QueuesDownstreamRequestType as Poll, QueuesDownstreamResponse};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{STREAMS, model::Model};

/// A poll that may have messages.
pub(super) struct Transaction {
    id: String,
    pub(super) stream: usize,
    /// By sequence: the body.
    pub(super) held: BTreeMap<i64, u64>,
}

pub(super) struct Downstream {
    requests: mpsc::Sender<QueuesDownstreamRequest>,
    answers: Streaming<QueuesDownstreamResponse>,
}

impl Model {
    pub(super) async fn get(&mut self, stream: u8, queue: u8, most: u8, auto_ack: bool) {
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
    pub(super) async fn settle(
        &mut self,
        transaction: u8,
        kind: Poll,
        which: Option<u8>,
        twice: bool,
        target: Option<u8>,
    ) {
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
}
