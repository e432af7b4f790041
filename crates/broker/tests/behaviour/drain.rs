//! A stop: bounded, nothing answered is lost, nothing acknowledged comes again; and what time has to do with a restart.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::common::*;
use polymq_broker::Broker;
use polymq_kubemq_proto::{subscribe::*, *};
use polymq_testkit::free_port;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

async fn start(folder: &Path) -> Broker {
    // When it has stopped, no other program has its port.
    let builder = Broker::builder().listen(format!("127.0.0.1:{}", free_port())).data_dir(folder);
    // Never reached: what a stop has to wait for ends by itself.
    builder.drain(Duration::from_secs(60)).start().await.unwrap()
}

fn get(queue: &str, wait: i32) -> QueuesDownstreamRequest {
    QueuesDownstreamRequest {
        request_id: "get".into(),
        client_id: "test".into(),
        channel: queue.into(),
        request_type_data: QueuesDownstreamRequestType::Get.into(),
        max_items: 10,
        wait_timeout: wait,
        ..QueuesDownstreamRequest::default()
    }
}

async fn downstream(
    client: &mut Client,
) -> (mpsc::Sender<QueuesDownstreamRequest>, Streaming<QueuesDownstreamResponse>) {
    let (requests, stream) = mpsc::channel(16);
    (requests, client.queues_downstream(ReceiverStream::new(stream)).await.unwrap().into_inner())
}

fn ack(polled: &QueuesDownstreamResponse) -> QueuesDownstreamRequest {
    QueuesDownstreamRequest {
        request_type_data: QueuesDownstreamRequestType::AckAll.into(),
        ref_transaction_id: polled.transaction_id.clone(),
        ..get("", 0)
    }
}

#[tokio::test]
async fn everything_that_waits_ends_and_what_is_held_goes_back() {
    let folder = tempfile::tempdir().unwrap();
    let broker = start(folder.path()).await;
    let mut caller = client(&broker).await;
    for number in 0..4 {
        send(&mut caller, message("orders", number.to_string())).await;
    }
    // Held by a poll, held by an older transaction, and whoever waits for something.
    let (requests, mut answers) = downstream(&mut caller).await;
    requests.send(QueuesDownstreamRequest { max_items: 2, ..get("orders", 0) }).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().messages.len(), 2);
    let (older, stream) = mpsc::channel(4);
    let mut held = caller.stream_queue_message(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let receive_one = StreamQueueMessagesRequest {
        client_id: "test".into(),
        channel: "orders".into(),
        stream_request_type_data: StreamRequestType::ReceiveMessage.into(),
        visibility_seconds: 600,
        ..StreamQueueMessagesRequest::default()
    };
    older.send(receive_one).await.unwrap();
    assert!(held.message().await.unwrap().unwrap().message.is_some());
    requests.send(get("empty", 60_000)).await.unwrap();
    let events = subscribe(SubscribeType::Events, "news", EventsStoreType::Undefined);
    let mut events = caller.subscribe_to_events(events).await.unwrap().into_inner();
    let stored = subscribe(SubscribeType::EventsStore, "log", EventsStoreType::StartNewOnly);
    let mut stored = caller.subscribe_to_events(stored).await.unwrap().into_inner();
    let mut waiting = caller.clone();
    let waiting = tokio::spawn(async move {
        let request = ReceiveQueueMessagesRequest { wait_time_seconds: 60, ..receiving("alone", 1) };
        waiting.receive_queue_messages(request).await
    });
    for queue in ["empty", "alone"] {
        while broker_waits(&mut caller, queue).await < 1 {}
    }

    let started = Instant::now();
    broker.stop().await;
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    let ended = waiting.await.unwrap();
    assert!(ended.as_ref().map_or(true, |answer| answer.get_ref().is_error), "{ended:?}");
    assert!(events.message().await.ok().flatten().is_none());
    assert!(stored.message().await.ok().flatten().is_none());
    assert!(answers.message().await.ok().flatten().is_none());
    let refused = caller.send_queue_message(message("orders", "late")).await.unwrap_err();
    // The second where the call was on the connection when the client heard of its end.
    assert!(matches!(refused.code(), Code::Unavailable | Code::Cancelled), "{refused}");

    let broker = start(folder.path()).await;
    let answer = client(&broker).await.receive_queue_messages(receiving("orders", 10)).await.unwrap().into_inner();
    let found: Vec<_> = answer
        .messages
        .iter()
        .map(|message| (message.body[0], message.attributes.as_ref().unwrap().receive_count))
        .collect();
    assert_eq!(found, [(b'0', 1), (b'1', 1), (b'2', 1), (b'3', 1)], "in place, uncounted");
}

/// Known once the waiting call has reached its queue, which it makes.
async fn broker_waits(client: &mut Client, queue: &str) -> usize {
    let info = client.queues_info(QueuesInfoRequest { queue_name: queue.into(), ..Default::default() }).await;
    info.unwrap().into_inner().info.unwrap().queues.len()
}

#[tokio::test]
async fn acknowledgements_on_their_way_count() {
    let folder = tempfile::tempdir().unwrap();
    let broker = start(folder.path()).await;
    let mut caller = client(&broker).await;
    for number in 0..50 {
        send(&mut caller, message("orders", number.to_string())).await;
    }
    let (requests, mut answers) = downstream(&mut caller).await;
    let mut polled = Vec::new();
    for _ in 0..5 {
        requests.send(get("orders", 0)).await.unwrap();
        polled.push(answers.message().await.unwrap().unwrap());
    }
    for poll in &polled {
        requests.send(ack(poll)).await.unwrap();
    }
    // On the wire when the stop begins: this is answered after them.
    requests
        .send(QueuesDownstreamRequest {
            request_type_data: QueuesDownstreamRequestType::TransactionStatus.into(),
            ..get("", 0)
        })
        .await
        .unwrap();
    assert!(answers.message().await.unwrap().is_some());
    broker.stop().await;
    let broker = start(folder.path()).await;
    assert_eq!(receive(&mut client(&broker).await, "orders", 100).await, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stops_under_load_lose_nothing_answered_and_repeat_nothing_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let (mut answered, mut acknowledged, mut seen) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    // Acknowledgements without an answer: taken or not.
    let mut unsure = BTreeSet::new();
    for round in 0..4 {
        let broker = start(folder.path()).await;
        let mut tasks = Vec::new();
        let busy = Arc::new(AtomicUsize::new(0));
        for sender in 0..3 {
            let mut caller = client(&broker).await;
            let busy = Arc::clone(&busy);
            tasks.push(tokio::spawn(async move {
                let (mut sent, mut acked, mut unsure) = (Vec::new(), Vec::new(), Vec::new());
                for number in 0.. {
                    let body = format!("{round}-{sender}-{number}");
                    match caller.send_queue_message(message("orders", body.clone())).await {
                        Ok(result) if !result.get_ref().is_error => sent.push(body),
                        _ => break,
                    }
                    // The older transactions answer an acknowledgement.
                    let (requests, stream) = mpsc::channel(2);
                    let Ok(answers) = caller.stream_queue_message(ReceiverStream::new(stream)).await else { break };
                    let mut answers = answers.into_inner();
                    let request = |kind: StreamRequestType, sequence| StreamQueueMessagesRequest {
                        client_id: "test".into(),
                        channel: "orders".into(),
                        stream_request_type_data: kind.into(),
                        ref_sequence: sequence,
                        ..StreamQueueMessagesRequest::default()
                    };
                    // The stop may end the stream before anything is asked for.
                    if requests.send(request(StreamRequestType::ReceiveMessage, 0)).await.is_err() {
                        break;
                    }
                    let Ok(Some(StreamQueueMessagesResponse { message: Some(held), .. })) = answers.message().await
                    else {
                        break;
                    };
                    let sequence = held.attributes.unwrap().sequence;
                    let body = String::from_utf8(held.body.to_vec()).unwrap();
                    let asked = requests.send(request(StreamRequestType::AckMessage, sequence)).await;
                    match answers.message().await {
                        Ok(Some(answer)) if !answer.is_error => {
                            acked.push(body);
                            busy.fetch_add(1, Ordering::Relaxed);
                        }
                        _ if asked.is_ok() => unsure.push(body),
                        _ => {}
                    }
                }
                (sent, acked, unsure)
            }));
        }
        // Long enough that all of them are at it.
        while busy.load(Ordering::Relaxed) < 10 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let started = Instant::now();
        broker.stop().await;
        assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
        for task in tasks {
            let (sent, acked, not_answered) = task.await.unwrap();
            answered.extend(sent);
            unsure.extend(not_answered);
            for body in acked {
                assert!(acknowledged.insert(body.clone()), "{body} was acknowledged twice");
            }
        }
    }
    let broker = start(folder.path()).await;
    let mut caller = client(&broker).await;
    loop {
        let found = receive(&mut caller, "orders", 1000).await;
        if found.is_empty() {
            break;
        }
        seen.extend(found);
    }
    assert!(acknowledged.len() > 20, "{}", acknowledged.len());
    let again: Vec<_> = seen.intersection(&acknowledged).collect();
    assert!(again.is_empty(), "came again: {again:?}");
    let known = |body: &&String| seen.contains(*body) || acknowledged.contains(*body) || unsure.contains(*body);
    let lost: Vec<_> = answered.iter().filter(|body| !known(body)).collect();
    assert!(lost.is_empty(), "lost: {lost:?}");
}

#[tokio::test]
async fn a_connection_that_does_not_end_is_cut() {
    let broker = Broker::builder().listen("127.0.0.1:0").drain(Duration::from_millis(300)).start().await.unwrap();
    let mut caller = client(&broker).await;
    // A subscriber that never reads: what it is sent fills its window, and its stream cannot end.
    let events = subscribe(SubscribeType::Events, "news", EventsStoreType::Undefined);
    let unread = caller.subscribe_to_events(events).await.unwrap().into_inner();
    for _ in 0..20 {
        caller.send_event(event("news", vec![b'x'; 500_000], false)).await.unwrap();
    }
    let started = Instant::now();
    broker.stop().await;
    assert!(started.elapsed() < Duration::from_secs(30), "{:?}", started.elapsed());
    drop(unread);
}

#[tokio::test]
async fn time_goes_on_over_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let broker = start(folder.path()).await;
    let mut caller = client(&broker).await;
    let policy = |policy| QueueMessage { policy: Some(policy), ..message("orders", "") };
    let with = |body: &str, asked: QueueMessagePolicy| QueueMessage { body: body.to_owned().into(), ..policy(asked) };
    let expires = QueueMessagePolicy { expiration_seconds: 1, ..Default::default() };
    let delayed = QueueMessagePolicy { delay_seconds: 40, ..Default::default() };
    let twice = QueueMessagePolicy { max_receive_count: 2, max_receive_queue: "dead".into(), ..Default::default() };
    // Long, so that what comes before it does, also on a machine that stands still now and then.
    let due = Instant::now() + Duration::from_secs(40);
    for sent in [with("twice", twice), with("expires", expires), with("delayed", delayed)] {
        assert!(!send(&mut caller, sent).await.is_error);
    }
    // The first of two deliveries fails.
    let nack = |polled: &QueuesDownstreamResponse| QueuesDownstreamRequest {
        request_type_data: QueuesDownstreamRequestType::NAckAll.into(),
        ..ack(polled)
    };
    let one = QueuesDownstreamRequest { max_items: 1, ..get("orders", 0) };
    let (requests, mut answers) = downstream(&mut caller).await;
    requests.send(one.clone()).await.unwrap();
    let polled = answers.message().await.unwrap().unwrap();
    assert_eq!(&*polled.messages[0].body, b"twice");
    requests.send(nack(&polled)).await.unwrap();
    // Answered after it: the transaction is over.
    let status = QueuesDownstreamRequestType::TransactionStatus.into();
    requests.send(QueuesDownstreamRequest { request_type_data: status, ..ack(&polled) }).await.unwrap();
    assert!(answers.message().await.unwrap().unwrap().transaction_complete);
    drop((requests, answers, caller));
    broker.stop().await;

    let expired = Instant::now() + Duration::from_millis(1100);
    tokio::time::sleep_until(expired.into()).await;
    let broker = start(folder.path()).await;
    let mut caller = client(&broker).await;
    let (requests, mut answers) = downstream(&mut caller).await;
    requests.send(one).await.unwrap();
    let polled = answers.message().await.unwrap().unwrap();
    assert_eq!(&*polled.messages[0].body, b"twice");
    assert_eq!(polled.messages[0].attributes.as_ref().unwrap().receive_count, 2, "counted over the restart");
    requests.send(nack(&polled)).await.unwrap();
    requests.send(QueuesDownstreamRequest { request_type_data: status, ..ack(&polled) }).await.unwrap();
    assert!(answers.message().await.unwrap().unwrap().transaction_complete);
    let dead = receive(&mut caller, "dead", 1).await;
    assert_eq!(dead, ["twice"], "the second failure was the last one allowed");
    requests.send(get("orders", 60_000)).await.unwrap();
    let polled = answers.message().await.unwrap().unwrap();
    let bodies: Vec<_> = polled.messages.iter().map(|message| message.body.to_vec()).collect();
    assert_eq!(bodies, [b"delayed"], "the other one has expired");
    assert!(Instant::now() >= due, "not before its time");
}
