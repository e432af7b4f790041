//! Steps over the single calls and those that only send: receiving, looking and emptying.

use std::collections::BTreeSet;

use polymq_kubemq_proto::{
    AckAllQueueMessagesRequest, QueuesDownstreamRequest, QueuesDownstreamRequestType as Poll, QueuesUpstreamRequest,
    ReceiveQueueMessagesRequest,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::model::Model;

impl Model {
    pub(super) async fn send(&mut self, queue: u8, deliveries: u8, dead_letters: bool) {
        let message = self.message(queue, deliveries, dead_letters);
        let result = self.client.send_queue_message(message).await.unwrap().into_inner();
        assert!(!result.is_error, "{result:?}");
    }

    pub(super) async fn upstream(&mut self, queue: u8, count: u8, deliveries: u8) {
        let messages: Vec<_> = (0..count).map(|_| self.message(queue, deliveries, false)).collect();
        let none = messages.is_empty();
        let request = QueuesUpstreamRequest { request_id: "u".into(), messages };
        let answers = self.client.queues_upstream(tokio_stream::once(request)).await.unwrap();
        let answer = answers.into_inner().message().await.unwrap().expect("an answer");
        assert_eq!(answer.is_error, none, "{answer:?}");
        assert!(answer.results.iter().all(|result| !result.is_error), "{answer:?}");
    }

    /// Takes, or only looks at, what waits.
    pub(super) async fn receive(&mut self, queue: u8, most: u8, peek: bool) -> usize {
        // Nobody waits for a second: the single call has no shorter wait, so it is asked when something is there.
        if self.waiting(queue).await == 0 {
            return 0;
        }
        let request = ReceiveQueueMessagesRequest {
            client_id: "fuzz".into(),
            channel: self.queue(queue),
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

    /// Whether a queue has a message that is not lent, when nobody waits for one any more.
    pub(super) async fn waiting(&mut self, queue: u8) -> usize {
        self.resolve(queue).await;
        let request = QueuesDownstreamRequest {
            request_id: "look".into(),
            client_id: "fuzz".into(),
            channel: self.queue(queue),
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

    pub(super) async fn purge(&mut self, queue: u8) {
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
}
