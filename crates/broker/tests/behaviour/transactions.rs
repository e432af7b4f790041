//! The older transactions: what takes the place of a held message does so in one step.

use std::{collections::BTreeMap, time::Duration};

use polymq_broker::{Broker, Limits};
use polymq_kubemq_proto::{StreamRequestType as Kind, *};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::common::*;

fn asking(kind: Kind) -> StreamQueueMessagesRequest {
    StreamQueueMessagesRequest {
        client_id: "test".into(),
        channel: "orders".into(),
        stream_request_type_data: kind.into(),
        visibility_seconds: 60,
        wait_time_seconds: 5,
        ..StreamQueueMessagesRequest::default()
    }
}

type Stream = (mpsc::Sender<StreamQueueMessagesRequest>, tonic::Streaming<StreamQueueMessagesResponse>);

/// Holds the next message of "orders".
async fn hold(caller: &mut Client) -> (Stream, QueueMessage) {
    let (requests, stream) = mpsc::channel(8);
    requests.send(asking(Kind::ReceiveMessage)).await.unwrap();
    let mut answers = caller.stream_queue_message(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    ((requests, answers), answer.message.unwrap_or_else(|| panic!("{}", answer.error)))
}

fn modified(message: QueueMessage) -> StreamQueueMessagesRequest {
    StreamQueueMessagesRequest { modified_message: Some(message), ..asking(Kind::SendModifiedMessage) }
}

/// Who goes away while its change is stored leaves the message or what it became, never both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_message_is_never_there_twice() {
    const MESSAGES: u64 = 12;
    let folder = tempfile::tempdir().unwrap();
    let broker = Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start().await.unwrap();
    let mut caller = client(&broker).await;
    for number in 0..MESSAGES {
        send(&mut caller, message("orders", number.to_string())).await;
    }
    // The store is busy, so that what is handed to it waits.
    let mut other = client(&broker).await;
    let busy = tokio::spawn(async move {
        let messages = vec![message("bulk", "x".repeat(200)); 4000];
        loop {
            let request = QueueMessagesBatchRequest { batch_id: "b".into(), messages: messages.clone() };
            other.send_queue_messages_batch(request).await.unwrap();
        }
    });
    for number in 0..MESSAGES {
        let ((requests, answers), held) = hold(&mut caller).await;
        let body = String::from_utf8(held.body.to_vec()).unwrap();
        let delay_seconds = i32::from(number % 3 == 0);
        let policy = Some(QueueMessagePolicy { delay_seconds, ..QueueMessagePolicy::default() });
        requests.send(modified(QueueMessage { policy, ..message("changed", body) })).await.unwrap();
        // Somewhere in the middle of it.
        tokio::time::sleep(Duration::from_millis(10 * number)).await;
        drop((requests, answers));
    }
    busy.abort();
    let _ = busy.await;
    let mut found = BTreeMap::<u64, Vec<&str>>::new();
    for _ in 0..20 {
        for queue in ["orders", "changed"] {
            for body in receive(&mut caller, queue, 100).await {
                found.entry(body.parse().unwrap()).or_default().push(queue);
            }
        }
        if found.len() as u64 == MESSAGES {
            break;
        }
    }
    let changed = found.values().filter(|places| places.contains(&"changed")).count();
    println!("{changed} of {MESSAGES} were changed");
    assert!((0..MESSAGES).all(|number| found.get(&number).is_some_and(|places| places.len() == 1)), "{found:?}");
    drop(caller);
    broker.stop().await;
}

/// What may not take its place leaves it held; a change with a delay waits for its time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_change_leaves_the_message_held() {
    let limits = Limits { queue_count: Some(1), ..Limits::default() };
    let broker = Broker::builder().listen("127.0.0.1:0").limits(limits).start().await.unwrap();
    let mut caller = client(&broker).await;
    send(&mut caller, message("orders", "one")).await;
    send(&mut caller, message("full", "there")).await;
    let ((requests, mut answers), _) = hold(&mut caller).await;
    for (change, expected) in [
        (message("changed", ""), "Error 110"),
        (QueueMessage { client_id: String::new(), ..message("changed", "x") }, "Error 101"),
        (message("full", "x"), "the most this broker allows"),
    ] {
        requests.send(modified(change)).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert!(answer.is_error && answer.error.contains(expected), "{answer:?}");
    }
    let policy = Some(QueueMessagePolicy { delay_seconds: 1, ..QueueMessagePolicy::default() });
    requests.send(modified(QueueMessage { policy, ..message("changed", "late") })).await.unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    assert!(!answer.is_error, "{answer:?}");
    assert!(answers.message().await.unwrap().is_none(), "the end of the stream");
    let wait = ReceiveQueueMessagesRequest { wait_time_seconds: 60, ..receiving("changed", 1) };
    let late = caller.receive_queue_messages(wait).await.unwrap().into_inner().messages;
    assert_eq!(late.iter().map(|message| &*message.body).collect::<Vec<_>>(), [b"late"]);
    assert!(receive(&mut caller, "orders", 1).await.is_empty(), "it has gone");
    drop((caller, requests));
    broker.stop().await;
}
