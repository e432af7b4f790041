//! Readers of stored events: how long it is remembered where each one was.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use polymq_broker::{Broker, InProcess, Limits};
use polymq_kubemq_proto::{request::RequestType, subscribe::*, *};
use serde_json::Value;
use tonic::{
    body::Body,
    codegen::{Service, http},
};

use crate::common::*;

fn managing(operation: &str, tags: &[(&str, &str)]) -> Request {
    Request {
        request_type_data: RequestType::Query.into(),
        client_id: "test".into(),
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: operation.into(),
        timeout: 10_000,
        tags: tags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        ..Request::default()
    }
}

async fn manage(client: &mut Client, operation: &str, tags: &[(&str, &str)]) -> Response {
    client.send_request(managing(operation, tags)).await.unwrap().into_inner()
}

/// Next sequence and whether it reads, by name.
async fn readers(client: &mut Client) -> BTreeMap<String, (u64, bool)> {
    let answer = manage(client, "list-readers", &[("channel", "log")]).await;
    assert_eq!(answer.error, "");
    let list: Vec<Value> = serde_json::from_slice(&answer.body).unwrap();
    let entry = |reader: &Value| {
        let name = reader["client"].as_str().or(reader["group"].as_str()).unwrap().to_owned();
        (name, (reader["next"].as_u64().unwrap(), reader["isActive"].as_bool().unwrap()))
    };
    list.iter().map(entry).collect()
}

/// Asks until the readers are as expected.
async fn becomes(client: &mut Client, expected: &[(&str, (u64, bool))]) {
    let expected: BTreeMap<_, _> = expected.iter().map(|(name, state)| ((*name).to_owned(), *state)).collect();
    for _ in 0..3000 {
        if readers(client).await == expected {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(readers(client).await, expected);
}

async fn subscribed(
    client: &mut Client,
    name: &str,
    group: &str,
    start: EventsStoreType,
) -> tonic::Streaming<EventReceive> {
    let request = Subscribe {
        client_id: name.into(),
        group: group.into(),
        ..subscribe(SubscribeType::EventsStore, "log", start)
    };
    client.subscribe_to_events(request).await.unwrap().into_inner()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_does_not_come_back_is_forgotten_and_one_that_is_there_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let start = |reader_age: Option<u64>| {
        let limits = Limits { reader_age: reader_age.map(Duration::from_secs), ..Limits::default() };
        Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).limits(limits).start()
    };
    let broker = start(Some(12)).await.unwrap();
    let mut caller = client(&broker).await;
    caller.send_event(event("log", "1", true)).await.unwrap();
    let mut gone = subscribed(&mut caller, "gone", "", EventsStoreType::StartFromFirst).await;
    let mut quiet = subscribed(&mut caller, "quiet", "", EventsStoreType::StartFromFirst).await;
    let mut member = subscribed(&mut caller, "m", "workers", EventsStoreType::StartFromFirst).await;
    for stream in [&mut gone, &mut quiet, &mut member] {
        assert_eq!(next(stream).await.sequence, 1);
    }
    becomes(&mut caller, &[("gone", (2, true)), ("quiet", (2, true)), ("workers", (2, true))]).await;
    let dropped = Instant::now();
    drop((gone, member));
    // Nothing comes in for longer than the time: who is there stays known.
    becomes(&mut caller, &[("quiet", (2, true))]).await;
    assert!(dropped.elapsed() > Duration::from_secs(11), "not before its time: {:?}", dropped.elapsed());
    drop((quiet, caller));
    broker.stop().await;

    // On a machine that stands still, nobody's time ends here.
    let broker = start(None).await.unwrap();
    let mut caller = client(&broker).await;
    caller.send_event(event("log", "2", true)).await.unwrap();
    let mut quiet = subscribed(&mut caller, "quiet", "", EventsStoreType::StartFromFirst).await;
    assert_eq!(next(&mut quiet).await.sequence, 2, "where it was");
    let mut gone = subscribed(&mut caller, "gone", "", EventsStoreType::StartFromFirst).await;
    assert_eq!(next(&mut gone).await.sequence, 1, "as a new one");
    drop((quiet, gone, caller));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_is_dropped_by_hand_or_with_its_channel() {
    let folder = tempfile::tempdir().unwrap();
    let start = || Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start();
    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    caller.send_event(event("log", "1", true)).await.unwrap();
    let mut reader = subscribed(&mut caller, "m", "workers", EventsStoreType::StartFromFirst).await;
    assert_eq!(next(&mut reader).await.sequence, 1);
    let tags = [("channel", "log"), ("group", "workers")];
    let refused = manage(&mut caller, "delete-reader", &tags).await;
    assert!(!refused.executed && refused.error.contains("reads at present"), "{refused:?}");
    drop(reader);
    becomes(&mut caller, &[("workers", (2, false))]).await;
    for (tags, what) in [
        (vec![("channel", "log"), ("client", "workers")], "reader not found"),
        (vec![("channel", "log")], "a reader is named by one of the tags"),
        (vec![("channel", "other"), ("client", "workers")], "channel not found"),
    ] {
        let refused = manage(&mut caller, "delete-reader", &tags).await;
        assert!(!refused.executed && refused.error.contains(what), "{refused:?}");
    }
    let dropped = manage(&mut caller, "delete-reader", &tags).await;
    assert!(dropped.executed && dropped.error.is_empty(), "{dropped:?}");
    becomes(&mut caller, &[]).await;
    let mut anew = subscribed(&mut caller, "m", "workers", EventsStoreType::StartFromFirst).await;
    assert_eq!(next(&mut anew).await.sequence, 1, "as a new one");

    // A channel of the same name is another one, also for who still reads the first, and after a restart.
    let deleted = manage(&mut caller, "delete-channel", &[("channel_type", "events_store"), ("channel", "log")]).await;
    assert!(deleted.executed, "{deleted:?}");
    drop((anew, caller));
    broker.stop().await;
    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    caller.send_event(event("log", "1", true)).await.unwrap();
    becomes(&mut caller, &[]).await;
    broker.stop().await;
}

/// A channel that is deleted ends its subscriptions, so that their clients subscribe to the one that is made under its name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_of_a_deleted_channel_are_told() {
    let broker = Broker::builder().listen("127.0.0.1:0").start().await.unwrap();
    let mut caller = client(&broker).await;
    for number in 1..=3 {
        caller.send_event(event("log", number.to_string(), true)).await.unwrap();
    }
    let mut alone = subscribed(&mut caller, "alone", "", EventsStoreType::StartFromFirst).await;
    let mut member = subscribed(&mut caller, "m", "workers", EventsStoreType::StartFromLast).await;
    for sequence in 1..=3 {
        assert_eq!(next(&mut alone).await.sequence, sequence);
    }
    assert_eq!(next(&mut member).await.sequence, 3);
    let deleted = manage(&mut caller, "delete-channel", &[("channel_type", "events_store"), ("channel", "log")]).await;
    assert!(deleted.executed, "{deleted:?}");
    for stream in [&mut alone, &mut member] {
        let end = tokio::time::timeout(Duration::from_secs(30), stream.message()).await.expect("told");
        assert!(end.as_ref().is_err_and(|status| status.message().contains("deleted")), "{end:?}");
    }
    // As SDKs do it: from after what they have had.
    let after = Subscribe {
        client_id: "alone".into(),
        events_store_type_value: 4,
        ..subscribe(SubscribeType::EventsStore, "log", EventsStoreType::StartAtSequence)
    };
    let mut alone = caller.subscribe_to_events(after).await.unwrap().into_inner();
    caller.send_event(event("log", "new", true)).await.unwrap();
    let first = next(&mut alone).await;
    assert_eq!((first.sequence, &*first.body), (1, &b"new"[..]));
    drop((alone, member, caller));
    broker.stop().await;
}

/// A poll that waits at a queue that is deleted is answered, and the next one is at the new queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poll_of_a_deleted_queue_ends() {
    let broker = Broker::builder().listen("127.0.0.1:0").start().await.unwrap();
    let mut caller = client(&broker).await;
    let polling = tokio::spawn({
        let mut caller = caller.clone();
        let long = ReceiveQueueMessagesRequest { wait_time_seconds: 600, ..receiving("orders", 1) };
        async move { caller.receive_queue_messages(long).await.unwrap().into_inner() }
    });
    let deleted = [("channel_type", "queues"), ("channel", "orders")];
    // It is there as soon as the poll waits.
    while !manage(&mut caller, "delete-channel", &deleted).await.executed {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    send(&mut caller, message("orders", "new")).await;
    let polled = tokio::time::timeout(Duration::from_secs(30), polling).await.expect("answered").unwrap();
    assert!(!polled.is_error && polled.messages.is_empty(), "{polled:?}");
    assert_eq!(receive(&mut caller, "orders", 1).await, ["new"]);
    drop(caller);
    broker.stop().await;
}

/// The broker in this process, without a socket that takes more than is read.
#[derive(Clone)]
struct Within(Arc<InProcess>);

impl Service<http::Request<Body>> for Within {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = std::result::Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let answer = self.0.call(request);
        Box::pin(async move { Ok(answer.await) })
    }
}

/// What a subscriber was not sent is not counted as delivered, and who comes back at once goes on where it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_comes_back_misses_nothing_and_gets_nothing_twice() {
    const EVENTS: u64 = 60;
    let folder = tempfile::tempdir().unwrap();
    let broker = Arc::new(Broker::builder().data_dir(folder.path()).in_process().unwrap());
    let mut caller = kubemq_client::KubemqClient::new(Within(Arc::clone(&broker)));
    for _ in 0..EVENTS {
        // Larger than what is put together for one write.
        caller.send_event(event("log", vec![0; 40_000], true)).await.unwrap();
    }
    for group in ["", "workers"] {
        for expected in 1..=EVENTS {
            let request = Subscribe {
                group: group.into(),
                ..subscribe(SubscribeType::EventsStore, "log", EventsStoreType::StartFromFirst)
            };
            let mut stream = caller.subscribe_to_events(request).await.unwrap().into_inner();
            assert_eq!(next(&mut stream).await.sequence, expected, "group {group:?}");
        }
    }
}

/// Members of a group that leave at the same moment leave nobody behind who would read for ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_is_away_when_its_members_left_together() {
    let broker = Arc::new(Broker::builder().in_process().unwrap());
    let mut caller = kubemq_client::KubemqClient::new(Within(Arc::clone(&broker)));
    for round in 0..1000 {
        let mut members = Vec::new();
        for client_id in ["one", "two"] {
            let request = Subscribe {
                client_id: client_id.into(),
                group: "workers".into(),
                ..subscribe(SubscribeType::EventsStore, "log", EventsStoreType::StartFromFirst)
            };
            members.push(caller.subscribe_to_events(request).await.unwrap());
        }
        let together = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            for member in members {
                scope.spawn(|| {
                    together.wait();
                    drop(member);
                });
            }
        });
        let dropping = managing("delete-reader", &[("channel", "log"), ("group", "workers")]);
        let dropped = caller.send_request(dropping).await.unwrap().into_inner();
        assert!(dropped.executed, "round {round}: {dropped:?}");
    }
}

#[tokio::test]
async fn data_of_the_release_before_keep_their_readers() {
    let folder = tempfile::tempdir().unwrap();
    let start = || Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start();
    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    caller.send_event(event("log", "1", true)).await.unwrap();
    let mut reader = subscribed(&mut caller, "reader", "", EventsStoreType::StartFromFirst).await;
    assert_eq!(next(&mut reader).await.sequence, 1);
    becomes(&mut caller, &[("reader", (2, true))]).await;
    drop((reader, caller));
    broker.stop().await;

    let file = rusqlite::Connection::open(folder.path().join("broker.sqlite")).unwrap();
    file.execute_batch(
        "ALTER TABLE positions DROP COLUMN seen; ALTER TABLE delayed DROP COLUMN sum; PRAGMA user_version = 2",
    )
    .unwrap();
    drop(file);
    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    becomes(&mut caller, &[("reader", (2, false))]).await;
    broker.stop().await;
}
