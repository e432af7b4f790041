//! Steps over the older stream: one message at a time.

use arbitrary::Arbitrary;
use polymq_kubemq_proto::{StreamQueueMessagesRequest, StreamQueueMessagesResponse, StreamRequestType};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::model::Model;

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

pub(super) struct Older {
    requests: mpsc::Sender<StreamQueueMessagesRequest>,
    answers: Streaming<StreamQueueMessagesResponse>,
    pub(super) held: Option<(u64, u64)>,
}

impl Model {
    pub(super) async fn old(&mut self, stream: usize, step: &Old) {
        if matches!(step, Old::Break) {
            if let Some((_, body)) = self.older[stream].take().and_then(|older| older.held) {
                self.failed(body);
            }
            return;
        }
        if let Old::Receive { queue } = step
            && self.waiting(*queue).await == 0
        {
            return;
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
}
