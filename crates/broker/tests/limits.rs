//! Limits: what is kept, what is refused, and what goes on all the same.

mod common;

use std::{collections::HashMap, time::Duration};

use common::*;
use polymq_broker::{Broker, Limits};
use polymq_kubemq_proto::{request::RequestType, subscribe::*, *};

async fn broker(limits: Limits) -> Broker {
    Broker::builder().listen("127.0.0.1:0").limits(limits).start().await.unwrap()
}

/// The first stored event that there is; one more is sent first, so that there is one.
async fn first(client: &mut Client, reader: &str) -> EventReceive {
    let request = Subscribe {
        client_id: reader.into(),
        ..subscribe(SubscribeType::EventsStore, "log", EventsStoreType::StartFromFirst)
    };
    next(&mut client.subscribe_to_events(request).await.unwrap().into_inner()).await
}

/// Asks until retention has had its turn.
async fn first_after(client: &mut Client, sequence: u64) -> EventReceive {
    loop {
        // A reader of its own each time: one that was here before goes on where it was.
        let event = first(client, &format!("reader {}", fastrand::u64(..))).await;
        if event.sequence > sequence {
            return event;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn stored_events_go_by_number_and_sequences_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { event_count: Some(3), ..Limits::default() };
    let start = || Broker::builder().listen("127.0.0.1:0").limits(limits.clone()).data_dir(folder.path()).start();
    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    for number in 1..=10 {
        assert!(caller.send_event(event("log", number.to_string(), true)).await.unwrap().into_inner().sent);
    }
    // The first seven go at once or one after the other, as retention has its turns.
    let kept = first_after(&mut caller, 7).await;
    assert_eq!((kept.sequence, &*kept.body), (8, &b"8"[..]));
    drop(caller);
    broker.stop().await;

    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    caller.send_event(event("log", "11", true)).await.unwrap();
    let kept = first_after(&mut caller, 8).await;
    assert_eq!((kept.sequence, &*kept.body), (9, &b"9"[..]));
}

#[tokio::test]
async fn stored_events_go_by_bytes_and_by_age() {
    let limits = Limits { event_bytes: Some(5_000), ..Limits::default() };
    let broker = broker(limits).await;
    let mut caller = client(&broker).await;
    for _ in 0..10 {
        caller.send_event(event("log", vec![b'x'; 1000], true)).await.unwrap();
    }
    assert_eq!(first_after(&mut caller, 6).await.sequence, 7, "four of about 1050 bytes fit in");

    let limits = Limits { event_age: Some(Duration::from_secs(3)), ..Limits::default() };
    let broker = self::broker(limits).await;
    let mut caller = client(&broker).await;
    // It listens before: what is sent later comes to it as long as it is kept.
    let mut live = {
        let all = Subscribe {
            client_id: "live".into(),
            ..subscribe(SubscribeType::EventsStore, "log", EventsStoreType::StartFromFirst)
        };
        caller.subscribe_to_events(all).await.unwrap().into_inner()
    };
    // On a machine that stood still, one may be gone before it has come.
    let mut old = 0;
    loop {
        caller.send_event(event("log", "old", true)).await.unwrap();
        old += 1;
        assert!(old < 20, "it comes while it is kept");
        if tokio::time::timeout(Duration::from_secs(5), live.message()).await.is_ok_and(|came| came.unwrap().is_some())
        {
            break;
        }
    }
    // There is a younger one whenever retention has its turn.
    let kept = loop {
        caller.send_event(event("log", "young", true)).await.unwrap();
        let reader = format!("reader {}", fastrand::u64(..));
        let looked = tokio::time::timeout(Duration::from_secs(2), first(&mut caller, &reader)).await;
        // On a machine that stood still, that one has gone too.
        if let Ok(kept) = looked
            && kept.sequence > old
        {
            break kept;
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    };
    assert_eq!(&*kept.body, b"young");
}

#[tokio::test]
async fn a_full_queue_refuses_until_something_is_received() {
    for limits in
        [Limits { queue_count: Some(3), ..Limits::default() }, Limits { queue_bytes: Some(3_000), ..Limits::default() }]
    {
        let broker = broker(limits).await;
        let mut caller = client(&broker).await;
        let big = || message("orders", vec![b'x'; 1000]);
        for _ in 0..3 {
            assert_eq!(send(&mut caller, big()).await.error, "");
        }
        let refused = send(&mut caller, big()).await;
        assert!(refused.error.contains("queue \"orders\" has 3"), "{refused:?}");
        assert_eq!(send(&mut caller, message("others", "x")).await.error, "");
        assert_eq!(receive(&mut caller, "orders", 1).await.len(), 1);
        assert_eq!(send(&mut caller, big()).await.error, "");
        assert!(send(&mut caller, big()).await.is_error);
    }
}

#[tokio::test]
async fn a_full_store_refuses_what_comes_in_and_goes_on_giving() {
    let folder = tempfile::tempdir().unwrap();
    for builder in [Broker::builder(), Broker::builder().data_dir(folder.path())] {
        let limits = Limits { store_bytes: Some(2 << 20), ..Limits::default() };
        let broker = builder.listen("127.0.0.1:0").limits(limits).start().await.unwrap();
        let mut caller = client(&broker).await;
        let mut sent = 0;
        let refused = loop {
            let result = send(&mut caller, message("orders", vec![b'x'; 100_000])).await;
            if result.is_error {
                break result.error;
            }
            sent += 1;
        };
        assert!(refused.contains("the store has reached its limit of 2097152 bytes"), "{refused}");
        assert!((15..30).contains(&sent), "{sent}");
        let refused = caller.send_event(event("log", "x", true)).await.unwrap_err();
        assert!(refused.message().contains("has reached its limit"), "{refused}");

        // Nothing that was accepted is lost, a message can be returned, and what is received makes room.
        let get = QueuesDownstreamRequest {
            client_id: "test".into(),
            channel: "orders".into(),
            request_type_data: QueuesDownstreamRequestType::Get.into(),
            max_items: 1,
            ..QueuesDownstreamRequest::default()
        };
        let (requests, stream) = tokio::sync::mpsc::channel(1);
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut answers = caller.queues_downstream(stream).await.unwrap().into_inner();
        requests.send(get.clone()).await.unwrap();
        let polled = answers.message().await.unwrap().unwrap();
        let nack = QueuesDownstreamRequest {
            request_type_data: QueuesDownstreamRequestType::NAckAll.into(),
            ref_transaction_id: polled.transaction_id,
            ..get
        };
        requests.send(nack).await.unwrap();
        let mut received = 0;
        while received < sent {
            received += receive(&mut caller, "orders", 100).await.len();
        }
        assert_eq!((received, receive(&mut caller, "orders", 1).await.len()), (sent, 0));
        // The writer's next look finds the room.
        while send(&mut caller, message("orders", "again")).await.is_error {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn a_disk_with_little_left_is_kept_for_settling() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { free_disk: u64::MAX, ..Limits::default() };
    let broker = Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).limits(limits).start().await.unwrap();
    let mut caller = client(&broker).await;
    let refused = send(&mut caller, message("orders", "x")).await.error;
    assert!(refused.contains("the disk is full: free space in the data directory; nothing was stored"), "{refused}");
}

#[tokio::test]
async fn one_answer_has_bounded_bytes_and_a_stream_holds_bounded_messages() {
    let limits = Limits { answer: 250_000, held_count: 5, ..Limits::default() };
    let broker = broker(limits).await;
    let mut caller = client(&broker).await;
    for number in 0..6_u8 {
        send(&mut caller, message("orders", vec![b'0' + number; 100_000])).await;
    }
    let big = QueueMessage { channel: "big".into(), ..message("big", vec![b'x'; 1_000_000]) };
    send(&mut caller, big).await;
    assert_eq!(receive(&mut caller, "big", 10).await.len(), 1, "one that is larger comes alone");

    let (requests, stream) = tokio::sync::mpsc::channel(4);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = caller.queues_downstream(stream).await.unwrap().into_inner();
    let get = QueuesDownstreamRequest {
        client_id: "test".into(),
        channel: "orders".into(),
        request_type_data: QueuesDownstreamRequestType::Get.into(),
        max_items: 10,
        ..QueuesDownstreamRequest::default()
    };
    let mut polls = Vec::new();
    for expected in [2, 2, 1] {
        requests.send(get.clone()).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!(answer.messages.len(), expected);
        polls.push(answer);
    }
    let order: Vec<_> = polls.iter().flat_map(|poll| &poll.messages).map(|message| message.body[0]).collect();
    assert_eq!(order, b"01234");
    requests.send(get.clone()).await.unwrap();
    let refused = answers.message().await.unwrap().unwrap();
    assert!(refused.error.contains("this stream holds 5 messages of 5"), "{refused:?}");
    let ack = QueuesDownstreamRequest {
        request_type_data: QueuesDownstreamRequestType::AckAll.into(),
        ref_transaction_id: polls[0].transaction_id.clone(),
        ..get.clone()
    };
    requests.send(ack).await.unwrap();
    requests.send(get).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().error, "");
}

#[tokio::test]
async fn polls_that_wait_together_take_no_more_than_their_stream_may_hold() {
    let broker = broker(Limits { held_count: 2, ..Limits::default() }).await;
    let mut caller = client(&broker).await;
    let (requests, stream) = tokio::sync::mpsc::channel(4);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = caller.queues_downstream(stream).await.unwrap().into_inner();
    let get = |id: &str, channel: &str, wait_timeout| QueuesDownstreamRequest {
        request_id: id.into(),
        client_id: "test".into(),
        channel: channel.into(),
        request_type_data: QueuesDownstreamRequestType::Get.into(),
        max_items: 1,
        wait_timeout,
        ..QueuesDownstreamRequest::default()
    };
    for id in ["a", "b", "c"] {
        requests.send(get(id, "orders", 600_000)).await.unwrap();
    }
    // Answered after they were asked for.
    requests.send(get("d", "empty", 0)).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().ref_request_id, "d");
    for number in 0..4_u8 {
        send(&mut caller, message("orders", vec![b'0' + number])).await;
    }
    let (mut given, mut refused) = (0, 0);
    for _ in 0..3 {
        let answer = answers.message().await.unwrap().unwrap();
        given += answer.messages.len();
        refused += usize::from(answer.error.contains("this stream holds 2 messages"));
    }
    assert_eq!((given, refused), (2, 1));
    assert_eq!(receive(&mut caller, "orders", 10).await, ["2", "3"], "the others wait for others");
}

#[tokio::test]
async fn a_subscriber_that_does_not_read_loses_events_and_nobody_else_does() {
    let broker = broker(Limits { waiting: 1 << 20, ..Limits::default() }).await;
    let mut caller = client(&broker).await;
    let listen = || subscribe(SubscribeType::Events, "news", EventsStoreType::Undefined);
    let mut slow = client(&broker).await.subscribe_to_events(listen()).await.unwrap().into_inner();
    let mut quick = client(&broker).await.subscribe_to_events(listen()).await.unwrap().into_inner();
    for number in 0..100_u8 {
        let mut body = vec![b'x'; 100_000];
        body[0] = number;
        caller.send_event(event("news", body, false)).await.unwrap();
        assert_eq!(next(&mut quick).await.body[0], number);
    }
    caller.send_event(event("news", "the end", false)).await.unwrap();
    next(&mut quick).await;
    // Who comes late finds what had room for it, in order; then it is told again.
    let (mut seen, mut silences) = (Vec::new(), 0);
    loop {
        let Ok(came) = tokio::time::timeout(Duration::from_secs(3), slow.message()).await else {
            // On a machine that stood still there may be no room yet: then it is lost, and the next one is not.
            silences += 1;
            assert!(silences < 20, "it is told again: {seen:?}");
            caller.send_event(event("news", "later", false)).await.unwrap();
            continue;
        };
        let body = came.unwrap().unwrap().body;
        if &*body == b"later" {
            break;
        }
        seen.push(body[0]);
    }
    assert!(seen.len() > 5 && seen.len() < 60 && seen.is_sorted(), "{seen:?}");
}

#[tokio::test]
async fn channels_and_names_are_bounded() {
    let broker = broker(Limits { channels: 2, ..Limits::default() }).await;
    let mut caller = client(&broker).await;
    for queue in ["a", "b"] {
        assert_eq!(send(&mut caller, message(queue, "x")).await.error, "");
    }
    let refused = send(&mut caller, message("c", "x")).await.error;
    assert_eq!(refused, "there are 2 channels, the most this broker allows: delete some, or raise the limit");
    let asked = caller.receive_queue_messages(receiving("d", 1)).await.unwrap().into_inner();
    assert!(asked.error.contains("there are 2 channels"), "{asked:?}");
    assert_eq!(send(&mut caller, message("a", "x")).await.error, "", "known ones go on");
    let long = "x".repeat(2000);
    assert!(send(&mut caller, message(&long, "x")).await.error.starts_with("Error 120: "));
    assert!(caller.send_event(event(&long, "x", true)).await.unwrap_err().message().contains("1024 bytes"));
}

#[tokio::test]
async fn requeueing_makes_no_queue_beyond_the_limit() {
    let broker = broker(Limits { channels: 1, ..Limits::default() }).await;
    let mut caller = client(&broker).await;
    assert_eq!(send(&mut caller, message("a", "x")).await.error, "");
    let (requests, stream) = tokio::sync::mpsc::channel(4);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = caller.queues_downstream(stream).await.unwrap().into_inner();
    let poll = QueuesDownstreamRequest {
        client_id: "test".into(),
        channel: "a".into(),
        request_type_data: QueuesDownstreamRequestType::Get.into(),
        max_items: 1,
        ..QueuesDownstreamRequest::default()
    };
    requests.send(poll.clone()).await.unwrap();
    let polled = answers.message().await.unwrap().unwrap();
    let requeue = QueuesDownstreamRequest {
        request_type_data: QueuesDownstreamRequestType::ReQueueAll.into(),
        ref_transaction_id: polled.transaction_id,
        re_queue_channel: "b".into(),
        ..poll
    };
    requests.send(requeue).await.unwrap();
    let refused = tokio::time::timeout(Duration::from_secs(30), answers.message()).await.expect("it is refused");
    let refused = refused.unwrap().unwrap().error;
    assert!(refused.contains("there are 1 channels, the most this broker allows"), "{refused}");
    assert_eq!(receive(&mut caller, "a", 1).await, ["x"], "it is back at its place");
}

/// The file beside the broker, which may hold it for long on a slow disk.
fn opened(folder: &std::path::Path) -> rusqlite::Connection {
    let file = rusqlite::Connection::open(folder.join("broker.sqlite")).unwrap();
    file.busy_timeout(Duration::from_secs(60)).unwrap();
    file
}

/// Statements of the file beside the broker's. They wait for no disk, and so the broker waits for them for a moment only.
fn beside(folder: &std::path::Path, sql: &str) {
    let file = opened(folder);
    file.execute_batch("PRAGMA synchronous = OFF").unwrap();
    file.execute_batch(sql).unwrap();
}

#[tokio::test]
async fn what_was_removed_on_a_full_disk_is_removed_when_there_is_room_however_much_is_going_on() {
    let folder = tempfile::tempdir().unwrap();
    // With 64 MiB beyond the limit the engine's file is full.
    let limits = Limits { store_bytes: Some(8 << 20), ..Limits::default() };
    let broker = Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).limits(limits).start().await.unwrap();
    let mut caller = client(&broker).await;
    assert_eq!(send(&mut caller, message("orders", "x")).await.error, "");
    beside(
        folder.path(),
        "CREATE TABLE waste (bytes BLOB); CREATE TRIGGER full BEFORE DELETE ON messages
         BEGIN INSERT INTO waste VALUES (zeroblob(90000000)); END",
    );
    assert_eq!(receive(&mut caller, "orders", 1).await, ["x"]);
    let left = || {
        let file = opened(folder.path());
        let sql = "SELECT count(*) FROM messages WHERE key >> 44 = (SELECT id FROM channels WHERE name = 'orders')";
        file.query_row(sql, [], |row| row.get::<_, u64>(0)).unwrap()
    };
    // Written before what follows, if it could have been.
    assert_eq!(send(&mut caller, message("others", "x")).await.error, "");
    assert_eq!(left(), 1, "the disk is full");
    beside(folder.path(), "DROP TRIGGER full");
    let until = std::time::Instant::now() + Duration::from_secs(120);
    while left() > 0 {
        assert!(std::time::Instant::now() < until, "still there");
        assert_eq!(send(&mut caller, message("others", "x")).await.error, "");
    }
}

#[tokio::test]
async fn the_cache_of_answers_is_bounded_by_bytes() {
    let broker = broker(Limits { cache: 150_000, ..Limits::default() }).await;
    let mut caller = client(&broker).await;
    let listen = subscribe(SubscribeType::Queries, "ask", EventsStoreType::Undefined);
    let mut asked = caller.subscribe_to_requests(listen).await.unwrap().into_inner();
    let mut responder = client(&broker).await;
    let answering = tokio::spawn(async move {
        while let Ok(Some(request)) = asked.message().await {
            let response = Response {
                client_id: "responder".into(),
                request_id: request.request_id,
                reply_channel: request.reply_channel,
                body: vec![b'x'; 100_000].into(),
                executed: true,
                ..Response::default()
            };
            responder.send_response(response).await.unwrap();
        }
    });
    let ask = |key: &str| Request {
        request_type_data: RequestType::Query.into(),
        client_id: "test".into(),
        channel: "ask".into(),
        body: "?".into(),
        timeout: 60_000,
        cache_key: key.into(),
        cache_ttl: 60,
        ..Request::default()
    };
    for (key, hit) in [("a", false), ("a", true), ("b", false), ("b", false), ("a", true)] {
        assert_eq!(caller.send_request(ask(key)).await.unwrap().into_inner().cache_hit, hit, "{key}");
    }
    answering.abort();
}

/// A small file system of its own; gone with the value.
struct Mounted(tempfile::TempDir);

impl Mounted {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        let mounted = mount.args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(folder.path()).status().unwrap();
        assert!(mounted.success(), "a file system can be mounted here");
        Self(folder)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

#[tokio::test]
#[ignore = "mounts a file system: as root, cargo test -p polymq-broker --test limits -- --ignored"]
async fn a_file_system_that_is_full_to_the_last_byte_loses_nothing() {
    let disk = Mounted::new();
    let data = disk.0.path().join("data");
    let limits = Limits { free_disk: 0, ..Limits::default() };
    let start = || Broker::builder().listen("127.0.0.1:0").data_dir(&data).limits(limits.clone()).start();
    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    for number in 0..100 {
        assert_eq!(send(&mut caller, message("orders", number.to_string())).await.error, "");
    }
    // Somebody else fills the disk.
    let other = disk.0.path().join("other");
    let mut file = std::fs::File::create(&other).unwrap();
    let mut size = 1 << 20;
    while size > 0 {
        if std::io::Write::write_all(&mut file, &vec![0; size]).is_err() {
            size /= 2;
        }
    }
    let refused = loop {
        let result = send(&mut caller, message("other", vec![b'x'; 100_000])).await;
        if result.is_error {
            break result.error;
        }
    };
    assert!(refused.contains("the disk is full: free space in the data directory"), "{refused}");
    // What is there is given, and acknowledged for good as soon as there is room.
    assert_eq!(receive(&mut caller, "orders", 60).await.len(), 60);
    assert!(send(&mut caller, message("other", vec![b'x'; 100_000])).await.is_error);
    drop(file);
    std::fs::remove_file(&other).unwrap();
    while send(&mut caller, message("other", "x")).await.is_error {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(caller);
    broker.stop().await;
    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    let left = receive(&mut caller, "orders", 100).await;
    assert_eq!(left, (60..100).map(|number| number.to_string()).collect::<Vec<_>>());
    drop(caller);
    broker.stop().await;
}

/// One size for everything that is sent: what is taken as an event can be passed on to a queue.
#[tokio::test]
async fn messages_events_and_requests_have_the_same_bound() {
    let broker = broker(Limits { message: 1000, ..Limits::default() }).await;
    let mut caller = client(&broker).await;
    let asking = |size: usize| Request {
        request_type_data: RequestType::Query.into(),
        client_id: "test".into(),
        channel: "q".into(),
        body: vec![0; size].into(),
        timeout: 10,
        ..Request::default()
    };
    let too_large = "the message has 1001 bytes, this broker takes 1000 at most";
    let refused = send(&mut caller, message("q", vec![0; 1001])).await;
    assert!(refused.error.contains(too_large), "{refused:?}");
    let accepted = send(&mut caller, message("q", vec![0; 1000])).await;
    assert!(!accepted.is_error, "{accepted:?}");
    for store in [false, true] {
        let refused = caller.send_event(event("log", vec![0; 1001], store)).await.unwrap_err();
        assert!(refused.message().contains(too_large), "{refused:?}");
        assert!(caller.send_event(event("log", vec![0; 1000], store)).await.unwrap().get_ref().sent);
    }
    let refused = caller.send_request(asking(1001)).await.unwrap_err();
    assert!(refused.message().contains(too_large), "{refused:?}");
    let unanswered = caller.send_request(asking(1000)).await.unwrap_err();
    assert!(unanswered.message().contains("Error 301"), "{unanswered:?}");
    let tags = HashMap::from([("name".to_owned(), "x".repeat(996))]);
    let refused = send(&mut caller, QueueMessage { tags, ..message("q", "x") }).await;
    assert!(refused.error.contains(too_large), "{refused:?}");
}
