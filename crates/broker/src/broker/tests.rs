use polymq_kubemq_proto::{QueueMessage, StreamQueueMessagesRequest, StreamRequestType, kubemq_client::KubemqClient};
use tokio_stream::wrappers::ReceiverStream;

use super::*;

#[tokio::test]
async fn a_sync_that_fails_during_the_stop_is_told() {
    for fails in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let broker = Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start().await.unwrap();
        broker.store.break_syncs(fails);
        let told = broker.stop().await.map(|cause| cause.to_string());
        assert_eq!(told.is_some(), fails, "{told:?}");
        assert!(told.is_none_or(|cause| cause.contains("cannot be synced")), "the cause");
    }
}

async fn yields() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

/// On a clock that stands, so that a stop waits for what comes however late that is.
#[tokio::test(start_paused = true)]
async fn an_old_streams_acknowledgement_that_meets_a_stop_counts_and_is_answered() {
    let (_end, ended) = std::sync::mpsc::channel::<()>();
    tokio::task::spawn_blocking(move || ended.recv());
    for handled in [false, true] {
        let broker = Broker::builder().in_process().unwrap();
        let shared = Arc::clone(&broker.opened.shared);
        let mut client = KubemqClient::new(broker.service.clone());
        let message = QueueMessage {
            client_id: "test".into(),
            channel: "orders".into(),
            body: "x".into(),
            ..QueueMessage::default()
        };
        assert!(!client.send_queue_message(message).await.unwrap().into_inner().is_error);
        let asking = |kind: StreamRequestType, ref_sequence| StreamQueueMessagesRequest {
            client_id: "test".into(),
            channel: "orders".into(),
            stream_request_type_data: kind.into(),
            ref_sequence,
            ..StreamQueueMessagesRequest::default()
        };
        let (requests, stream) = tokio::sync::mpsc::channel(8);
        requests.send(asking(StreamRequestType::ReceiveMessage, 0)).await.unwrap();
        let mut answers = client.stream_queue_message(ReceiverStream::new(stream)).await.unwrap().into_inner();
        let held = answers.message().await.unwrap().unwrap().message.unwrap();
        let ack = asking(StreamRequestType::AckMessage, held.attributes.unwrap().sequence);
        let queue = shared.queues.get("orders").unwrap();
        // The store stores nothing for now.
        let (goes, waits) = std::sync::mpsc::channel::<()>();
        shared.store.commit(Vec::new(), None, move |_| _ = waits.recv());
        if handled {
            requests.send(ack).await.unwrap();
            while queue.stats().held > 0 {
                tokio::task::yield_now().await;
            }
            shared.stopping.cancel();
            yields().await;
        } else {
            shared.stopping.cancel();
            yields().await;
            requests.send(ack).await.unwrap();
        }
        drop(goes);
        let answer = answers.message().await.unwrap().expect("an answer");
        assert!(!answer.is_error, "{answer:?}");
        assert!(answers.message().await.unwrap().is_none(), "the end of the stream");
        assert_eq!(queue.stats().messages, 0);
    }
}
