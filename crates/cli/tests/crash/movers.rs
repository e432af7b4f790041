//! Who moves messages from one queue to others, which must happen whole or not at all.

use std::sync::Arc;

use polymq_kubemq_proto::{QueuesDownstreamRequestType as Kind, StreamRequestType as Old, *};
use tokio::{sync::mpsc, task::JoinSet, time::sleep};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    AGAIN, connect,
    consumers::{Held, request, sequence},
    ledger::{Ledger, Phase},
    text,
};

pub(crate) fn start(tasks: &mut JoinSet<()>, address: &str, ledger: &Arc<Ledger>) {
    tasks.spawn(requeues(address.to_owned(), Arc::clone(ledger)));
    tasks.spawn(resends(address.to_owned(), Arc::clone(ledger)));
}

/// Requeues a part of what a poll gave, and then the others; who asks for the transaction after that knows that it is done.
async fn requeues(address: String, ledger: Arc<Ledger>) {
    let mut client = connect(&address);
    while ledger.is(Phase::Loads) {
        let (requests, stream) = mpsc::channel(8);
        let Ok(answers) = client.queues_downstream(ReceiverStream::new(stream)).await else {
            sleep(AGAIN).await;
            continue;
        };
        let mut answers = answers.into_inner();
        while ledger.is(Phase::Loads) {
            let poll = QueuesDownstreamRequest { max_items: 10, ..request(Kind::Get, "inbox") };
            if requests.send(poll).await.is_err() {
                break;
            }
            let Ok(Some(polled)) = answers.message().await else { break };
            assert!(!polled.is_error, "{}", polled.error);
            let mut steps = match polled.messages.len() {
                0 => continue,
                1 => vec![],
                several => {
                    vec![(Kind::ReQueueRange, polled.messages[..several / 2].iter().map(sequence).collect())]
                }
            };
            steps.extend([(Kind::ReQueueAll, vec![]), (Kind::TransactionStatus, vec![])]);
            for (kind, sequence_range) in steps {
                let step = QueuesDownstreamRequest {
                    ref_transaction_id: polled.transaction_id.clone(),
                    re_queue_channel: "requeued".into(),
                    sequence_range,
                    ..request(kind, "inbox")
                };
                if requests.send(step).await.is_err() {
                    break;
                }
            }
            let Ok(Some(status)) = answers.message().await else { break };
            assert!(status.transaction_complete && !status.is_error, "{status:?}");
            let moved = polled.messages.iter().map(|message| (text(&message.body), "requeued"));
            ledger.lock().moved.extend(moved);
        }
    }
}

/// Resends a message, or sends another one in its stead, now or later.
async fn resends(address: String, ledger: Arc<Ledger>) {
    let mut client = connect(&address);
    while ledger.is(Phase::Loads) {
        let Some(held) = Held::next(&mut client, "inbox").await else {
            sleep(AGAIN).await;
            continue;
        };
        let body = text(&held.message.body);
        let queue = if fastrand::bool() { "resent" } else { "changed" };
        let request = StreamQueueMessagesRequest { channel: queue.into(), ..StreamQueueMessagesRequest::default() };
        let answered = if queue == "resent" {
            held.settle(Old::ResendMessage, request).await
        } else {
            let policy = QueueMessagePolicy { delay_seconds: fastrand::i32(0..2), ..QueueMessagePolicy::default() };
            let changed = QueueMessage {
                client_id: "crash".into(),
                channel: queue.into(),
                metadata: "changed".into(),
                body: held.message.body.clone(),
                policy: Some(policy),
                ..QueueMessage::default()
            };
            let request = StreamQueueMessagesRequest { modified_message: Some(changed), ..request };
            held.settle(Old::SendModifiedMessage, request).await
        };
        if answered {
            ledger.lock().moved.insert(body, queue);
        }
    }
}
