//! Queues over the wire: the life of a message, also across a restart.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use polymq_broker::Broker;
use polymq_kubemq_proto::{kubemq_client::KubemqClient, *};
use tonic::transport::Channel;

type Client = KubemqClient<Channel>;

async fn client(broker: &Broker) -> Client {
    let channel = Channel::from_shared(format!("http://{}", broker.address())).unwrap().connect().await.unwrap();
    KubemqClient::new(channel)
}

async fn broker() -> (Broker, Client) {
    let broker = Broker::builder().listen("127.0.0.1:0").start().await.unwrap();
    let client = client(&broker).await;
    (broker, client)
}

fn message(queue: &str, body: &str) -> QueueMessage {
    QueueMessage {
        client_id: "test".into(),
        channel: queue.into(),
        body: body.to_owned().into(),
        ..QueueMessage::default()
    }
}

async fn send(client: &mut Client, message: QueueMessage) -> SendQueueMessageResult {
    client.send_queue_message(message).await.unwrap().into_inner()
}

async fn receive(client: &mut Client, queue: &str, most: i32, peek: bool) -> Vec<String> {
    let request = ReceiveQueueMessagesRequest {
        client_id: "test".into(),
        channel: queue.into(),
        max_number_of_messages: most,
        wait_time_seconds: 1,
        is_peak: peek,
        ..ReceiveQueueMessagesRequest::default()
    };
    let answer = client.receive_queue_messages(request).await.unwrap().into_inner();
    assert!(!answer.is_error, "{}", answer.error);
    answer.messages.iter().map(|message| String::from_utf8(message.body.to_vec()).unwrap()).collect()
}

#[tokio::test]
async fn what_is_sent_is_received_in_order_and_once() {
    let (broker, mut client) = broker().await;
    for number in 0..10 {
        let result = send(&mut client, message("orders", &number.to_string())).await;
        assert!(!result.is_error && result.sent_at > 0 && !result.message_id.is_empty(), "{result:?}");
    }
    let all: Vec<_> = (0..10).map(|number| number.to_string()).collect();
    assert_eq!(receive(&mut client, "orders", 20, true).await, all, "a look");
    assert_eq!(receive(&mut client, "orders", 20, true).await, all, "leaves everything as it was");
    assert_eq!(receive(&mut client, "orders", 4, false).await, all[..4]);
    assert_eq!(receive(&mut client, "orders", 20, false).await, all[4..]);
    let started = Instant::now();
    assert!(receive(&mut client, "orders", 1, false).await.is_empty());
    assert!(started.elapsed() >= Duration::from_millis(900), "an empty queue is waited for");
    broker.stop().await;
}

#[tokio::test]
async fn wrong_messages_are_refused_with_the_protocols_numbers() {
    let (_broker, mut client) = broker().await;
    let nobody = QueueMessage { client_id: String::new(), ..message("q", "x") };
    let policy = |policy| QueueMessage { policy: Some(policy), ..message("q", "x") };
    let long = QueueMessagePolicy { expiration_seconds: 50_000, ..QueueMessagePolicy::default() };
    let early = QueueMessagePolicy { delay_seconds: -1, ..QueueMessagePolicy::default() };
    let often = QueueMessagePolicy { max_receive_count: 2000, ..QueueMessagePolicy::default() };
    for (wrong, number) in [
        (nobody, "101"),
        (message("a b", "x"), "120"),
        (message("q", ""), "110"),
        (policy(long), "133"),
        (policy(often), "134"),
        (policy(early), "135"),
    ] {
        let result = send(&mut client, wrong).await;
        assert!(result.is_error && result.error.contains(&format!("Error {number}: ")), "{number}: {result:?}");
        assert_eq!(result.sent_at, 0);
    }
}

#[tokio::test]
async fn what_was_answered_survives_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let start = || Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start();
    let broker = start().await.unwrap();
    let mut first = client(&broker).await;
    for number in 0..5 {
        assert!(!send(&mut first, message("orders", &number.to_string())).await.is_error);
    }
    let later = QueueMessagePolicy { delay_seconds: 6, ..QueueMessagePolicy::default() };
    let due = Instant::now() + Duration::from_secs(6);
    let result = send(&mut first, QueueMessage { policy: Some(later), ..message("orders", "later") }).await;
    assert!(result.delayed_to > result.sent_at, "{result:?}");
    assert_eq!(receive(&mut first, "orders", 2, false).await, ["0", "1"]);
    drop(first);
    broker.stop().await;

    let broker = start().await.unwrap();
    let mut second = client(&broker).await;
    let mut came = Vec::new();
    while came.len() < 4 {
        came.extend(receive(&mut second, "orders", 20, false).await);
        assert!(Instant::now() >= due || !came.contains(&"later".to_owned()), "not before its time");
    }
    assert_eq!(came, ["2", "3", "4", "later"]);
    let last = send(&mut second, message("orders", "last")).await;
    assert!(!last.is_error);
    broker.stop().await;
}

#[tokio::test]
async fn polls_are_settled_one_by_one_and_given_back_when_their_stream_ends() {
    let (_broker, mut client) = broker().await;
    for number in 0..4 {
        let policy =
            QueueMessagePolicy { max_receive_count: 2, max_receive_queue: "dead".into(), ..Default::default() };
        send(&mut client, QueueMessage { policy: Some(policy), ..message("orders", &number.to_string()) }).await;
    }
    let (requests, stream) = tokio::sync::mpsc::channel(8);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = client.queues_downstream(stream).await.unwrap().into_inner();
    let get = || QueuesDownstreamRequest {
        request_id: "get".into(),
        client_id: "test".into(),
        channel: "orders".into(),
        request_type_data: QueuesDownstreamRequestType::Get.into(),
        max_items: 10,
        wait_timeout: 1000,
        ..QueuesDownstreamRequest::default()
    };
    requests.send(get()).await.unwrap();
    let polled = answers.message().await.unwrap().unwrap();
    let sequences: Vec<_> =
        polled.messages.iter().map(|message| message.attributes.as_ref().unwrap().sequence.cast_signed()).collect();
    assert_eq!(sequences, [1, 2, 3, 4]);
    let settle = |kind: QueuesDownstreamRequestType, range: Vec<i64>| QueuesDownstreamRequest {
        request_id: "settle".into(),
        client_id: "test".into(),
        request_type_data: kind.into(),
        ref_transaction_id: polled.transaction_id.clone(),
        sequence_range: range,
        ..QueuesDownstreamRequest::default()
    };
    requests.send(settle(QueuesDownstreamRequestType::AckRange, vec![1])).await.unwrap();
    requests.send(settle(QueuesDownstreamRequestType::NAckRange, vec![2])).await.unwrap();
    // Not answered; a wrong one is.
    requests.send(settle(QueuesDownstreamRequestType::AckRange, vec![1])).await.unwrap();
    let refused = answers.message().await.unwrap().unwrap();
    assert!(refused.is_error && refused.error.contains("invalid ack sequence id 1"), "{refused:?}");
    requests.send(settle(QueuesDownstreamRequestType::ActiveOffsets, vec![])).await.unwrap();
    assert_eq!(answers.message().await.unwrap().unwrap().active_offsets, [3, 4]);

    // The nacked one is at the tail, with its count; a second nack makes it a dead letter.
    requests.send(get()).await.unwrap();
    let again = answers.message().await.unwrap().unwrap();
    let attributes = again.messages[0].attributes.clone().unwrap();
    assert_eq!((attributes.sequence, attributes.receive_count), (5, 2));
    let all = QueuesDownstreamRequest {
        ref_transaction_id: again.transaction_id.clone(),
        ..settle(QueuesDownstreamRequestType::NAckAll, vec![])
    };
    requests.send(all).await.unwrap();
    // Answered after it: the transaction is over.
    let status = QueuesDownstreamRequest {
        ref_transaction_id: again.transaction_id.clone(),
        ..settle(QueuesDownstreamRequestType::TransactionStatus, vec![])
    };
    requests.send(status).await.unwrap();
    assert!(answers.message().await.unwrap().unwrap().transaction_complete);
    let dead = receive(&mut client, "dead", 1, true).await;
    assert_eq!(dead, ["1"]);

    drop((requests, answers));
    let mut back = Vec::new();
    while back.len() < 2 {
        back.extend(receive(&mut client, "orders", 10, false).await);
    }
    assert_eq!(back, ["2", "3"], "in place");
}

async fn ack_all(client: &mut Client, queue: &str) -> u64 {
    let request = AckAllQueueMessagesRequest { client_id: "test".into(), channel: queue.into(), ..Default::default() };
    let answer = client.ack_all_queue_messages(request).await.unwrap().into_inner();
    assert!(!answer.is_error, "{}", answer.error);
    answer.affected_messages
}

async fn fill(client: &mut Client, queue: &str, numbers: std::ops::Range<usize>) {
    for first in numbers.clone().step_by(1000) {
        let messages = (first..(first + 1000).min(numbers.end)).map(|number| message(queue, &number.to_string()));
        let request = QueueMessagesBatchRequest { batch_id: "b".into(), messages: messages.collect() };
        let answer = client.send_queue_messages_batch(request).await.unwrap().into_inner();
        assert!(!answer.have_errors, "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_queue_is_emptied_in_steps_and_others_are_served_between_them() {
    let folder = tempfile::tempdir().unwrap();
    let start = || Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start();
    let broker = start().await.unwrap();
    let mut first = client(&broker).await;
    fill(&mut first, "orders", 0..20_000).await;
    let (requests, stream) = tokio::sync::mpsc::channel(8);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = first.queues_downstream(stream).await.unwrap().into_inner();
    let poll = |most: i32| QueuesDownstreamRequest {
        request_id: "get".into(),
        client_id: "test".into(),
        channel: "orders".into(),
        request_type_data: QueuesDownstreamRequestType::Get.into(),
        max_items: most,
        wait_timeout: 1000,
        ..QueuesDownstreamRequest::default()
    };
    // Ten are held, ten were held and are back at their place.
    requests.send(poll(10)).await.unwrap();
    let held = answers.message().await.unwrap().unwrap();
    requests.send(poll(10)).await.unwrap();
    let back = answers.message().await.unwrap().unwrap();
    let close = QueuesDownstreamRequest {
        request_type_data: QueuesDownstreamRequestType::CloseByClient.into(),
        ref_transaction_id: back.transaction_id,
        ..poll(0)
    };
    requests.send(close).await.unwrap();
    let status =
        QueuesDownstreamRequest { request_type_data: QueuesDownstreamRequestType::TransactionStatus.into(), ..poll(0) };
    requests.send(status).await.unwrap();
    answers.message().await.unwrap().unwrap();

    // Somebody sends and receives elsewhere all the time, and is answered in between.
    let mut other = client(&broker).await;
    let served = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&served);
    let beside = tokio::spawn(async move {
        while Arc::strong_count(&count) > 1 {
            assert!(!send(&mut other, message("others", "x")).await.is_error);
            count.fetch_add(1, Ordering::SeqCst);
        }
    });
    let mut rounds = 0;
    loop {
        let before = served.load(Ordering::SeqCst);
        assert_eq!(ack_all(&mut first, "orders").await, if rounds == 0 { 19_990 } else { 20_000 });
        if served.load(Ordering::SeqCst) > before {
            break;
        }
        // On a busy machine the other one may have had no turn: the next round begins when it goes on.
        rounds += 1;
        assert!(rounds < 20, "others are served while the queue is emptied");
        fill(&mut first, "orders", 0..20_000).await;
        let before = served.load(Ordering::SeqCst);
        while served.load(Ordering::SeqCst) == before && !beside.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    drop(served);
    beside.await.unwrap();
    assert!(receive(&mut first, "orders", 10, false).await.is_empty());
    assert_eq!(ack_all(&mut first, "orders").await, 0);
    drop((requests, answers));
    let mut found = Vec::new();
    while found.len() < 10 {
        // What is looked at stays: it comes again the next time.
        found = receive(&mut first, "orders", 10, true).await;
    }
    assert_eq!(found, (0..10).map(|number| number.to_string()).collect::<Vec<_>>(), "what was held is back");
    assert_eq!(held.messages.len(), 10);
    fill(&mut first, "orders", 0..1).await;
    drop(first);
    broker.stop().await;

    let broker = start().await.unwrap();
    let mut again = client(&broker).await;
    assert_eq!(receive(&mut again, "orders", 20, false).await.len(), 11, "and on disk");
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_and_two_who_empty_a_queue_share_it_and_the_counts_are_right() {
    let (broker, mut first) = broker().await;
    fill(&mut first, "orders", 0..30_000).await;
    let (mut second, mut consumer) = (client(&broker).await, client(&broker).await);
    let consuming = tokio::spawn(async move {
        let mut taken = 0;
        loop {
            let found = receive(&mut consumer, "orders", 100, false).await.len();
            if found == 0 {
                return taken;
            }
            taken += found as u64;
        }
    });
    let (one, two) = tokio::join!(ack_all(&mut first, "orders"), ack_all(&mut second, "orders"));
    let taken = consuming.await.unwrap();
    assert_eq!(one + two + taken, 30_000, "{one} {two} {taken}");
    let info = first.queues_info(QueuesInfoRequest::default()).await.unwrap().into_inner().info.unwrap();
    assert_eq!((info.queues[0].messages, info.queues[0].bytes), (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn what_is_received_has_the_digest_of_its_body() {
    let (broker, mut client) = broker().await;
    send(&mut client, message("orders", "hello")).await;
    for is_peak in [true, false] {
        let request = ReceiveQueueMessagesRequest {
            client_id: "test".into(),
            channel: "orders".into(),
            max_number_of_messages: 1,
            wait_time_seconds: 1,
            is_peak,
            ..ReceiveQueueMessagesRequest::default()
        };
        let answer = client.receive_queue_messages(request).await.unwrap().into_inner();
        let attributes = answer.messages[0].attributes.clone().unwrap();
        // As `printf hello | md5sum` tells it.
        assert_eq!(attributes.md5_of_body, "5d41402abc4b2a76b9719d911017c592");
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peek_hides_nothing_and_counts_as_nothing() {
    let (broker, mut consumer) = broker().await;
    let bodies: Vec<_> = (0..20).map(|number| format!("{number} {}", "x".repeat(1 << 20))).collect();
    for body in &bodies {
        assert!(!send(&mut consumer, message("orders", body)).await.is_error);
    }
    let looks = Arc::new(AtomicUsize::new(0));
    let looking = tokio::spawn({
        let (looks, mut other) = (Arc::clone(&looks), client(&broker).await);
        async move {
            loop {
                receive(&mut other, "orders", 1, true).await;
                looks.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    while looks.load(Ordering::Relaxed) == 0 {
        tokio::task::yield_now().await;
    }
    for body in &bodies {
        let found = receive(&mut consumer, "orders", 1, false).await;
        assert!(found == [&**body], "{:?} came before {:?}", &found[0][..2], &body[..2]);
    }
    looking.abort();
    let figures = async |consumer: &mut Client| {
        let info = consumer.queues_info(QueuesInfoRequest::default()).await.unwrap().into_inner().info.unwrap();
        (info.queues[0].first_sequence, info.queues[0].last_sequence)
    };
    assert_eq!(figures(&mut consumer).await, (21, 20), "all are gone");
    assert!(!send(&mut consumer, message("orders", "x")).await.is_error);
    assert_eq!(figures(&mut consumer).await, (21, 21));
    let peek = ReceiveQueueMessagesRequest {
        client_id: "test".into(),
        channel: "orders".into(),
        max_number_of_messages: 1,
        wait_time_seconds: 1,
        is_peak: true,
        ..ReceiveQueueMessagesRequest::default()
    };
    for _ in 0..2 {
        let seen = consumer.receive_queue_messages(peek.clone()).await.unwrap().into_inner().messages;
        assert_eq!(seen[0].attributes.as_ref().unwrap().receive_count, 1);
    }
    let info = consumer.queues_info(QueuesInfoRequest::default()).await.unwrap().into_inner().info.unwrap();
    assert_eq!(info.queues[0].delivered, 20, "of {} looks", looks.load(Ordering::Relaxed));
    broker.stop().await;
}
