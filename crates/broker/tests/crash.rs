//! kill -9 at chosen moments: what was answered is there, also when the store is busy. Random moments under load are in
//! `crates/cli/tests/crash.rs`.

use std::{
    process::{Child, Command, Stdio},
    time::Duration,
};

use polymq_broker::Broker;
use polymq_kubemq_proto::{QueuesDownstreamRequestType as Kind, kubemq_client::KubemqClient, *};
use tonic::transport::Channel;

const CHILD: &str = "POLYMQ_CRASH_CHILD";

/// Not a test of its own: the process that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Ok(asked) = std::env::var(CHILD) else { return };
    let (address, folder) = asked.split_once(' ').unwrap();
    let _broker = Broker::builder().listen(address).data_dir(folder).start().await.unwrap();
    std::future::pending::<()>().await;
}

struct Killed(Child);

impl Killed {
    fn start(address: &str, folder: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["child", "--exact", "--nocapture"]).env(CHILD, format!("{address} {folder}"));
        Self(command.stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        // SIGKILL on Unix.
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

fn text(body: &[u8]) -> String {
    String::from_utf8(body.to_vec()).unwrap()
}

fn connect(address: &str) -> KubemqClient<Channel> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = channel.connect_timeout(Duration::from_millis(500)).timeout(Duration::from_secs(60));
    KubemqClient::new(channel.connect_lazy())
}

fn message(body: &str) -> QueueMessage {
    QueueMessage {
        client_id: "crash".into(),
        channel: "orders".into(),
        body: body.to_owned().into(),
        ..QueueMessage::default()
    }
}

fn request(kind: Kind) -> QueuesDownstreamRequest {
    QueuesDownstreamRequest {
        request_id: "r".into(),
        client_id: "crash".into(),
        channel: "orders".into(),
        request_type_data: kind.into(),
        max_items: 50,
        wait_timeout: 500,
        ..QueuesDownstreamRequest::default()
    }
}

/// Waits until the broker answers.
async fn up(client: &mut KubemqClient<Channel>) {
    while client.ping(Empty {}).await.is_err() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_while_a_queue_is_emptied_leaves_its_tail() {
    const MESSAGES: u64 = 60_000;
    let folder = tempfile::tempdir().unwrap();
    let address = format!("127.0.0.1:{}", polymq_testkit::free_port());
    let mut client = connect(&address);
    let start = || Killed::start(&address, folder.path().to_str().unwrap());
    let left = async |client: &mut KubemqClient<Channel>| {
        let info = QueuesInfoRequest { queue_name: "orders".into(), ..QueuesInfoRequest::default() };
        let info = client.queues_info(info).await.unwrap().into_inner().info.unwrap();
        info.queues[0].messages.unsigned_abs()
    };
    let mut rounds = 0;
    let (counted, _again) = loop {
        let killed = start();
        up(&mut client).await;
        for first in (0..MESSAGES).step_by(1000) {
            let messages = (first..first + 1000).map(|number| message(&number.to_string())).collect();
            let request = QueueMessagesBatchRequest { batch_id: "b".into(), messages };
            assert!(!client.send_queue_messages_batch(request).await.unwrap().get_ref().have_errors);
        }
        let emptying = tokio::spawn({
            let mut client = client.clone();
            let all = AckAllQueueMessagesRequest {
                client_id: "crash".into(),
                channel: "orders".into(),
                ..AckAllQueueMessagesRequest::default()
            };
            async move { client.ack_all_queue_messages(all).await }
        });
        // In the middle: more than a step has begun, so that the first one is on disk, and there are more.
        while left(&mut client).await + 5_000 >= MESSAGES {}
        drop(killed);
        let emptied = emptying.await.unwrap().is_ok();
        let again = start();
        up(&mut client).await;
        let counted = left(&mut client).await;
        if counted > 0 {
            assert!(!emptied, "nobody was told that it is empty");
            break (counted, again);
        }
        // This test stood still, and all was done before the crash.
        rounds += 1;
        assert!(rounds < 10, "it was emptied before anybody saw it");
    };
    let mut found = Vec::new();
    loop {
        let some = ReceiveQueueMessagesRequest {
            client_id: "crash".into(),
            channel: "orders".into(),
            max_number_of_messages: 1000,
            wait_time_seconds: 1,
            ..ReceiveQueueMessagesRequest::default()
        };
        let messages = client.receive_queue_messages(some).await.unwrap().into_inner().messages;
        if messages.is_empty() {
            break;
        }
        found.extend(messages.iter().map(|message| text(&message.body).parse::<u64>().unwrap()));
    }
    println!("{} of {MESSAGES} were left", found.len());
    assert!(counted < MESSAGES && counted == found.len() as u64, "{counted} counted, {} found", found.len());
    assert_eq!(found, (MESSAGES - counted..MESSAGES).collect::<Vec<_>>(), "the tail, in order");
}

/// Keeps the store busy with large transactions, so that what is handed to it waits.
fn busy(address: &str) -> Vec<tokio::task::JoinHandle<()>> {
    let sends = |n: usize| {
        let mut client = connect(address);
        tokio::spawn(async move {
            let one = |number| QueueMessage { channel: format!("bulk{n}"), ..message(&format!("{number:0200}")) };
            let messages: Vec<_> = (0..4000).map(one).collect();
            let request = QueueMessagesBatchRequest { batch_id: "b".into(), messages };
            while client.send_queue_messages_batch(request.clone()).await.is_ok() {}
        })
    };
    (0..3).map(sends).collect()
}

/// Waits until something was stored by those who keep the store busy.
async fn is_busy(client: &mut KubemqClient<Channel>) {
    loop {
        let info = client.queues_info(QueuesInfoRequest::default()).await.unwrap().into_inner().info.unwrap();
        if info.queues.iter().filter(|queue| queue.name.starts_with("bulk")).any(|queue| queue.sent > 0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_acknowledgement_that_was_answered_is_not_undone_by_a_crash() {
    const MESSAGES: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    let address = format!("127.0.0.1:{}", polymq_testkit::free_port());
    let mut client = connect(&address);
    let start = || Killed::start(&address, folder.path().to_str().unwrap());
    let killed = start();
    up(&mut client).await;
    for number in 0..2 * MESSAGES {
        let sent = client.send_queue_message(message(&format!("now-{number}"))).await.unwrap().into_inner();
        assert!(!sent.is_error, "{}", sent.error);
    }
    // Half of them in transactions, the others in a poll.
    let mut transactions = Vec::new();
    for _ in 0..MESSAGES {
        let (requests, stream) = tokio::sync::mpsc::channel(8);
        let receive = StreamQueueMessagesRequest {
            client_id: "crash".into(),
            stream_request_type_data: StreamRequestType::ReceiveMessage.into(),
            channel: "orders".into(),
            visibility_seconds: 600,
            ..StreamQueueMessagesRequest::default()
        };
        requests.send(receive.clone()).await.unwrap();
        let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
        let mut answers = client.stream_queue_message(stream).await.unwrap().into_inner();
        let held = answers.message().await.unwrap().unwrap().message.unwrap();
        let ack = StreamQueueMessagesRequest {
            stream_request_type_data: StreamRequestType::AckMessage.into(),
            ref_sequence: held.attributes.unwrap().sequence,
            ..receive
        };
        transactions.push((requests, ack, answers, text(&held.body)));
    }
    let (requests, stream) = tokio::sync::mpsc::channel(8);
    requests.send(request(Kind::Get)).await.unwrap();
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = client.queues_downstream(stream).await.unwrap().into_inner();
    let polled = answers.message().await.unwrap().unwrap();
    assert_eq!(polled.messages.len(), MESSAGES);

    let busy = busy(&address);
    is_busy(&mut client).await;
    let id = polled.transaction_id;
    requests.send(QueuesDownstreamRequest { ref_transaction_id: id.clone(), ..request(Kind::AckAll) }).await.unwrap();
    let status = QueuesDownstreamRequest { ref_transaction_id: id, ..request(Kind::TransactionStatus) };
    requests.send(status).await.unwrap();
    let mut acks = tokio::task::JoinSet::new();
    for (requests, ack, mut answers, body) in transactions {
        acks.spawn(async move {
            // The broker may be gone by now.
            requests.send(ack).await.ok()?;
            matches!(answers.message().await, Ok(Some(answer)) if !answer.is_error).then_some(body)
        });
    }
    let status = answers.message().await.unwrap().unwrap();
    assert!(status.transaction_complete, "{status:?}");
    let first = acks.join_next().await.unwrap().unwrap();
    drop(killed);
    let mut answered: Vec<_> = acks.join_all().await.into_iter().chain([first]).flatten().collect();
    assert!(!answered.is_empty());
    answered.extend(polled.messages.iter().map(|message| text(&message.body)));
    for task in busy {
        task.await.unwrap();
    }

    let _again = start();
    up(&mut client).await;
    let all = ReceiveQueueMessagesRequest {
        client_id: "crash".into(),
        channel: "orders".into(),
        max_number_of_messages: 1000,
        wait_time_seconds: 1,
        ..ReceiveQueueMessagesRequest::default()
    };
    let left = client.receive_queue_messages(all).await.unwrap().into_inner().messages;
    let again: Vec<_> = left.iter().map(|message| text(&message.body)).filter(|body| answered.contains(body)).collect();
    println!("{} answered, {} of them again", answered.len(), again.len());
    assert!(again.is_empty(), "answered and came again: {again:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_channel_that_was_made_is_there_after_a_crash() {
    let folder = tempfile::tempdir().unwrap();
    let address = format!("127.0.0.1:{}", polymq_testkit::free_port());
    let mut client = connect(&address);
    let start = || Killed::start(&address, folder.path().to_str().unwrap());
    let manage = |operation: &str, kind: &str| Request {
        request_type_data: request::RequestType::Query.into(),
        client_id: "crash".into(),
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: operation.into(),
        timeout: 10_000,
        tags: [("channel_type", kind), ("channel", "made")].map(|(name, tag)| (name.to_owned(), tag.to_owned())).into(),
        ..Request::default()
    };
    for kind in ["queues", "events_store"] {
        let killed = start();
        up(&mut client).await;
        let busy = busy(&address);
        is_busy(&mut client).await;
        let made = client.send_request(manage("create-channel", kind)).await.unwrap().into_inner();
        assert!(made.executed, "{made:?}");
        drop(killed);
        for task in busy {
            task.await.unwrap();
        }
        let _again = start();
        up(&mut client).await;
        let listed = client.send_request(manage("list-channels", kind)).await.unwrap().into_inner();
        assert!(text(&listed.body).contains("\"made\""), "{kind}: {}", text(&listed.body));
    }
}
