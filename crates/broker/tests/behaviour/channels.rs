//! Channels that are made and deleted while their rows cannot be stored, or while somebody uses them: what was answered is
//! there after a restart, and nothing else is.

use std::{path::Path, time::Duration};

use crate::common::*;
use polymq_broker::Broker;
use polymq_kubemq_proto::{request::RequestType, subscribe::*, *};
use rusqlite::Connection;

async fn start(folder: &Path) -> (Broker, Client) {
    let broker = Broker::builder().listen("127.0.0.1:0").data_dir(folder).start().await.unwrap();
    let caller = client(&broker).await;
    (broker, caller)
}

/// From here on the engine refuses what `sql` says, as on a full disk.
fn refuse(folder: &Path, sql: &str) {
    let file = Connection::open(folder.join("broker.sqlite")).unwrap();
    file.execute_batch(&format!("CREATE TRIGGER full BEFORE {sql} BEGIN SELECT RAISE(ABORT, 'no room'); END")).unwrap();
}

fn take_all(folder: &Path) {
    let file = Connection::open(folder.join("broker.sqlite")).unwrap();
    file.execute_batch("DROP TRIGGER full").unwrap();
}

async fn delete(client: &mut Client, kind: &str, channel: &str) -> String {
    manage(client, "delete-channel", kind, channel).await
}

async fn manage(client: &mut Client, operation: &str, kind: &str, channel: &str) -> String {
    administer(client, operation, kind, channel).await.error
}

async fn administer(client: &mut Client, operation: &str, kind: &str, channel: &str) -> Response {
    let tags = [("channel_type", kind), ("channel", channel)];
    let request = Request {
        request_type_data: RequestType::Query.into(),
        client_id: "test".into(),
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: operation.into(),
        timeout: 10_000,
        tags: tags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        ..Request::default()
    };
    client.send_request(request).await.unwrap().into_inner()
}

async fn peek(client: &mut Client, queue: &str) -> Vec<String> {
    let request = ReceiveQueueMessagesRequest { is_peak: true, ..receiving(queue, 100) };
    let answer = client.receive_queue_messages(request).await.unwrap().into_inner();
    answer.messages.iter().map(|message| String::from_utf8(message.body.to_vec()).unwrap()).collect()
}

async fn stored(client: &mut Client, reader: &str) -> EventReceive {
    let request = Subscribe {
        client_id: reader.into(),
        ..subscribe(SubscribeType::EventsStore, "log", EventsStoreType::StartFromFirst)
    };
    next(&mut client.subscribe_to_events(request).await.unwrap().into_inner()).await
}

#[tokio::test]
async fn what_is_sent_to_a_channel_that_could_not_be_stored_at_first_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, mut caller) = start(folder.path()).await;
    refuse(folder.path(), "INSERT ON channels");
    assert!(receive(&mut caller, "orders", 1).await.is_empty());
    let refused = send(&mut caller, message("orders", "refused")).await.error;
    assert!(refused.contains("no room"), "{refused}");
    let refused = caller.send_event(event("log", "refused", true)).await.unwrap_err();
    assert!(refused.message().contains("no room"), "{refused}");
    take_all(folder.path());
    assert_eq!(send(&mut caller, message("orders", "1")).await.error, "");
    let later = QueueMessagePolicy { delay_seconds: 1, ..QueueMessagePolicy::default() };
    assert_eq!(send(&mut caller, QueueMessage { policy: Some(later), ..message("delayed", "2") }).await.error, "");
    assert!(caller.send_event(event("log", "3", true)).await.unwrap().into_inner().sent);
    drop(caller);
    broker.stop().await;

    let (broker, mut caller) = start(folder.path()).await;
    assert_eq!(peek(&mut caller, "orders").await, ["1"]);
    let mut came = Vec::new();
    while came.is_empty() {
        came = receive(&mut caller, "delayed", 1).await;
    }
    assert_eq!(came, ["2"]);
    assert_eq!(&*stored(&mut caller, "reader").await.body, b"3");
    drop(caller);
    broker.stop().await;
}

/// What the only queue is said to have: messages that wait for their delay.
async fn delayed(client: &mut Client) -> u64 {
    let listed = administer(client, "list-channels", "queues", "").await.body;
    let listed: serde_json::Value = serde_json::from_slice(&listed).unwrap();
    assert_eq!(listed[0]["incoming"]["delayed"], listed[0]["outgoing"]["delayed"], "{listed}");
    listed[0]["incoming"]["delayed"].as_u64().unwrap()
}

#[tokio::test]
async fn what_is_delayed_is_counted_also_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, mut caller) = start(folder.path()).await;
    for seconds in [3600, 3600, 1, 0] {
        let policy = Some(QueueMessagePolicy { delay_seconds: seconds, ..QueueMessagePolicy::default() });
        assert_eq!(send(&mut caller, QueueMessage { policy, ..message("orders", "1") }).await.error, "");
        assert!((1..=3).contains(&delayed(&mut caller).await));
    }
    while delayed(&mut caller).await > 2 {}
    assert_eq!(peek(&mut caller, "orders").await.len(), 2);
    drop(caller);
    broker.stop().await;

    let (broker, mut caller) = start(folder.path()).await;
    assert_eq!(delayed(&mut caller).await, 2);
    assert_eq!(delete(&mut caller, "queues", "orders").await, "");
    assert_eq!(manage(&mut caller, "create-channel", "queues", "orders").await, "");
    assert_eq!(delayed(&mut caller).await, 0, "another queue of that name");
    drop(caller);
    broker.stop().await;
}

#[tokio::test]
async fn a_channel_that_could_not_be_deleted_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, mut caller) = start(folder.path()).await;
    assert_eq!(send(&mut caller, message("orders", "1")).await.error, "");
    assert!(caller.send_event(event("log", "1", true)).await.unwrap().into_inner().sent);
    refuse(folder.path(), "DELETE ON channels");
    for kind in [("queues", "orders"), ("events_store", "log")] {
        let refused = delete(&mut caller, kind.0, kind.1).await;
        assert!(refused.contains("no room"), "{refused}");
    }
    take_all(folder.path());
    assert_eq!(send(&mut caller, message("orders", "2")).await.error, "");
    assert!(caller.send_event(event("log", "2", true)).await.unwrap().into_inner().sent);
    drop(caller);
    broker.stop().await;

    let (broker, mut caller) = start(folder.path()).await;
    assert_eq!(peek(&mut caller, "orders").await, ["1", "2"]);
    assert_eq!(stored(&mut caller, "reader").await.sequence, 1);
    for kind in [("queues", "orders"), ("events_store", "log")] {
        assert_eq!(delete(&mut caller, kind.0, kind.1).await, "");
    }
    assert_eq!(send(&mut caller, message("orders", "3")).await.error, "");
    assert_eq!(peek(&mut caller, "orders").await, ["3"]);
    drop(caller);
    broker.stop().await;
}

#[tokio::test]
async fn what_a_consumer_holds_of_a_deleted_queue_comes_out_of_no_other_one() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, mut caller) = start(folder.path()).await;
    for body in ["1", "2"] {
        assert_eq!(send(&mut caller, message("a", body)).await.error, "");
    }
    let (requests, stream) = tokio::sync::mpsc::channel(4);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = caller.queues_downstream(stream).await.unwrap().into_inner();
    let poll = QueuesDownstreamRequest {
        client_id: "test".into(),
        channel: "a".into(),
        request_type_data: QueuesDownstreamRequestType::Get.into(),
        max_items: 2,
        ..QueuesDownstreamRequest::default()
    };
    requests.send(poll.clone()).await.unwrap();
    let polled = answers.message().await.unwrap().unwrap();
    assert_eq!(polled.messages.len(), 2);
    assert_eq!(delete(&mut caller, "queues", "a").await, "");
    let nack = QueuesDownstreamRequest {
        request_type_data: QueuesDownstreamRequestType::NAckAll.into(),
        ref_transaction_id: polled.transaction_id,
        ..poll
    };
    requests.send(nack).await.unwrap();
    let refused = tokio::time::timeout(Duration::from_secs(30), answers.message()).await.expect("it is refused");
    let refused = refused.unwrap().unwrap().error;
    assert_eq!(refused, "the channel was deleted meanwhile; who sends to it makes it anew");
    drop((requests, answers, caller));
    broker.stop().await;

    // It has the number that the deleted one had.
    let (broker, mut caller) = start(folder.path()).await;
    for number in 1..=5 {
        assert_eq!(send(&mut caller, message("b", format!("b{number}"))).await.error, "");
    }
    assert_eq!(receive(&mut caller, "b", 10).await, ["b1", "b2", "b3", "b4", "b5"]);
    drop(caller);
    broker.stop().await;
}

/// A channel that is asked for while one of its name is being deleted is made, and not taken for the one that goes.
#[tokio::test]
async fn a_channel_that_is_created_while_it_is_deleted_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let (broker, mut caller) = start(folder.path()).await;
    for (kind, name) in [("queues", "orders"), ("events_store", "log")] {
        let mut rounds = 0..10;
        loop {
            assert!(rounds.next().is_some(), "the file is locked all the time");
            assert_eq!(manage(&mut caller, "create-channel", kind, name).await, "");
            // Nothing is stored until this is over, and what is asked for waits in its order.
            let file = Connection::open(folder.path().join("broker.sqlite")).unwrap();
            file.execute_batch("BEGIN IMMEDIATE").unwrap();
            let (mut one, mut other, mut third) = (caller.clone(), caller.clone(), caller.clone());
            let deleting = async { delete(&mut one, kind, name).await };
            let creating = async { manage(&mut other, "create-channel", kind, name).await };
            // Asked after them on the same connection: when these are answered, both wait.
            let going_on = async {
                for _ in 0..10 {
                    third.ping(Empty {}).await.unwrap();
                }
                file.execute_batch("COMMIT").unwrap();
            };
            let (deleted, created, ()) = tokio::join!(deleting, creating, going_on);
            // The broker gives up after some seconds, when this process stood still for so long.
            if [&deleted, &created].iter().any(|answer| answer.contains("locked")) {
                continue;
            }
            assert_eq!((deleted, created), (String::new(), String::new()));
            assert_eq!(delete(&mut caller, kind, name).await, "", "it is there");
            break;
        }
    }
    drop(caller);
    broker.stop().await;
}

/// A key has room for so many numbers of channels: beyond them, one would have the messages of another one.
#[tokio::test]
async fn channels_keep_their_messages_when_the_numbers_have_come_to_an_end() {
    for last in [524_287, 1_048_576] {
        let folder = tempfile::tempdir().unwrap();
        let (broker, mut caller) = start(folder.path()).await;
        assert_eq!(send(&mut caller, message("orders", "1")).await.error, "");
        drop(caller);
        broker.stop().await;
        let file = Connection::open(folder.path().join("broker.sqlite")).unwrap();
        file.execute("INSERT INTO channels VALUES (?1, 1, 'last', 1, 0, 0)", [last]).unwrap();
        drop(file);

        let (broker, mut caller) = start(folder.path()).await;
        assert_eq!(manage(&mut caller, "create-channel", "queues", "deleted").await, "");
        assert_eq!(delete(&mut caller, "queues", "deleted").await, "");
        assert_eq!(peek(&mut caller, "orders").await, ["1"], "after {last}");
        assert_eq!(send(&mut caller, message("made", "2")).await.error, "");
        drop(caller);
        broker.stop().await;

        let (broker, mut caller) = start(folder.path()).await;
        let info = caller.queues_info(QueuesInfoRequest::default()).await.unwrap().into_inner().info.unwrap();
        let count: Vec<_> = info.queues.iter().map(|queue| (&*queue.name, queue.messages)).collect();
        assert_eq!(count, [("last", 0), ("made", 1), ("orders", 1)], "after {last}");
        assert_eq!(peek(&mut caller, "orders").await, ["1"]);
        assert_eq!(receive(&mut caller, "made", 10).await, ["2"]);
        drop(caller);
        broker.stop().await;
    }
}
