//! Who handles what was sent, over the newer streams and the older ones, and who takes what is left in the end.

use std::{sync::Arc, time::Instant};

use polymq_kubemq_proto::{
    QueuesDownstreamRequestType as Kind, StreamRequestType as Old, kubemq_client::KubemqClient, *,
};
use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};

use crate::{
    AGAIN, connect,
    ledger::{Ledger, Phase, fails},
    text,
};

pub(crate) fn start(tasks: &mut JoinSet<()>, address: &str, ledger: &Arc<Ledger>) {
    tasks.spawn(polls(address.to_owned(), Arc::clone(ledger)));
    tasks.spawn(transacts(address.to_owned(), Arc::clone(ledger)));
}

/// Takes what came into the other queues.
pub(crate) fn drain(tasks: &mut JoinSet<()>, address: &str, ledger: &Arc<Ledger>) {
    for queue in ["letters", "inbox", "requeued", "resent", "changed"] {
        tasks.spawn(takes(address.to_owned(), Arc::clone(ledger), queue));
    }
}

/// A request of a stream of polls.
pub(crate) fn request(kind: Kind, channel: &str) -> QueuesDownstreamRequest {
    QueuesDownstreamRequest {
        request_id: "r".into(),
        client_id: "crash".into(),
        channel: channel.into(),
        request_type_data: kind.into(),
        max_items: 50,
        wait_timeout: 500,
        ..QueuesDownstreamRequest::default()
    }
}

pub(crate) fn sequence(message: &QueueMessage) -> i64 {
    message.attributes.as_ref().unwrap().sequence.cast_signed()
}

/// Handles what comes, and rejects what fails; now and then it asks whether that has arrived.
async fn polls(address: String, ledger: Arc<Ledger>) {
    let mut client = connect(&address);
    while ledger.is(Phase::Drains) {
        let (opened, (requests, stream)) = (Instant::now(), mpsc::channel(8));
        let Ok(answers) = client.queues_downstream(ReceiverStream::new(stream)).await else {
            sleep(AGAIN).await;
            continue;
        };
        let mut answers = answers.into_inner();
        while ledger.is(Phase::Drains) && requests.send(request(Kind::Get, "orders")).await.is_ok() {
            let Ok(Some(polled)) = answers.message().await else { break };
            assert!(!polled.is_error, "{}", polled.error);
            let (bad, good): (Vec<_>, Vec<_>) =
                polled.messages.into_iter().partition(|message| fails(&text(&message.body)));
            good.iter().for_each(|message| ledger.handle(&text(&message.body), opened));
            for (kind, messages) in [(Kind::AckRange, &good), (Kind::NAckRange, &bad)] {
                let settle = QueuesDownstreamRequest {
                    ref_transaction_id: polled.transaction_id.clone(),
                    sequence_range: messages.iter().map(sequence).collect(),
                    ..request(kind, "orders")
                };
                if !messages.is_empty() && requests.send(settle).await.is_err() {
                    break;
                }
            }
            if fastrand::bool() && !good.is_empty() {
                let id = polled.transaction_id;
                let status =
                    QueuesDownstreamRequest { ref_transaction_id: id, ..request(Kind::TransactionStatus, "orders") };
                if requests.send(status).await.is_err() {
                    break;
                }
                let Ok(Some(status)) = answers.message().await else { break };
                assert!(status.transaction_complete && !status.is_error, "{status:?}");
                ledger.acknowledge(good.iter().map(|message| text(&message.body)));
            }
        }
    }
}

/// A message of the older transactions.
pub(crate) struct Held {
    pub(crate) message: QueueMessage,
    requests: mpsc::Sender<StreamQueueMessagesRequest>,
    answers: Streaming<StreamQueueMessagesResponse>,
}

impl Held {
    /// The next one, when it comes soon.
    pub(crate) async fn next(client: &mut KubemqClient<Channel>, channel: &str) -> Option<Self> {
        let (requests, stream) = mpsc::channel(2);
        let receive = StreamQueueMessagesRequest {
            client_id: "crash".into(),
            stream_request_type_data: Old::ReceiveMessage.into(),
            channel: channel.into(),
            visibility_seconds: 60,
            wait_time_seconds: 1,
            ..StreamQueueMessagesRequest::default()
        };
        requests.send(receive).await.ok()?;
        let mut answers = client.stream_queue_message(ReceiverStream::new(stream)).await.ok()?.into_inner();
        let message = answers.message().await.ok()??.message?;
        Some(Self { message, requests, answers })
    }

    /// Ends it; tells whether that was answered.
    pub(crate) async fn settle(mut self, kind: Old, request: StreamQueueMessagesRequest) -> bool {
        let request = StreamQueueMessagesRequest {
            client_id: "crash".into(),
            stream_request_type_data: kind.into(),
            ref_sequence: self.message.attributes.as_ref().unwrap().sequence,
            ..request
        };
        if self.requests.send(request).await.is_err() {
            return false;
        }
        let Ok(Some(answer)) = self.answers.message().await else { return false };
        assert!(!answer.is_error, "{}", answer.error);
        true
    }
}

/// Handles and rejects one message after the other, and waits for each answer.
async fn transacts(address: String, ledger: Arc<Ledger>) {
    let mut client = connect(&address);
    while ledger.is(Phase::Drains) {
        let opened = Instant::now();
        let Some(held) = Held::next(&mut client, "orders").await else {
            sleep(AGAIN).await;
            continue;
        };
        let body = text(&held.message.body);
        let request = StreamQueueMessagesRequest { channel: "orders".into(), ..StreamQueueMessagesRequest::default() };
        if fails(&body) {
            held.settle(Old::RejectMessage, request).await;
            continue;
        }
        ledger.handle(&body, opened);
        if held.settle(Old::AckMessage, request).await {
            ledger.acknowledge([body]);
        }
    }
}

/// From a broker that is not killed any more.
async fn takes(address: String, ledger: Arc<Ledger>, queue: &'static str) {
    let mut client = connect(&address);
    while ledger.is(Phase::Drains) {
        let all = ReceiveQueueMessagesRequest {
            client_id: "crash".into(),
            channel: queue.into(),
            max_number_of_messages: 1000,
            wait_time_seconds: 1,
            ..ReceiveQueueMessagesRequest::default()
        };
        let taken = client.receive_queue_messages(all).await.unwrap().into_inner();
        assert!(!taken.is_error, "{}", taken.error);
        taken.messages.iter().for_each(|message| ledger.find(queue, text(&message.body)));
    }
}
