//! kill -9 at random moments under load: nothing that was answered is lost.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use polymq_broker::Broker;
use polymq_kubemq_proto::{kubemq_client::KubemqClient, *};
use tonic::transport::Channel;

const CHILD: &str = "POLYMQ_CRASH_CHILD";
/// Rounds of starting, loading and killing; more with this variable.
const ROUNDS: &str = "POLYMQ_CRASH_ROUNDS";

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

#[derive(Default)]
struct Ledger {
    accepted: Mutex<BTreeSet<String>>,
    seen: Mutex<BTreeMap<String, u32>>,
    events: Mutex<BTreeSet<String>>,
}

async fn connect(address: &str) -> KubemqClient<Channel> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = channel.connect_timeout(Duration::from_millis(500)).timeout(Duration::from_secs(5));
    KubemqClient::new(channel.connect_lazy())
}

async fn sends(address: String, sender: u32, ledger: Arc<Ledger>, until: Instant) {
    let mut client = connect(&address).await;
    for number in 0.. {
        if Instant::now() > until {
            return;
        }
        let body = format!("{sender}-{number}");
        let message = QueueMessage {
            client_id: "crash".into(),
            channel: "orders".into(),
            body: body.clone().into(),
            ..QueueMessage::default()
        };
        match client.send_queue_message(message).await {
            Ok(result) if !result.get_ref().is_error => drop(ledger.accepted.lock().unwrap().insert(body.clone())),
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
        let event = Event {
            client_id: "crash".into(),
            channel: "log".into(),
            body: body.clone().into(),
            store: true,
            ..Event::default()
        };
        if client.send_event(event).await.is_ok_and(|result| result.get_ref().sent) {
            ledger.events.lock().unwrap().insert(body);
        }
    }
}

async fn receives(address: String, ledger: Arc<Ledger>, until: Instant) {
    let mut client = connect(&address).await;
    while Instant::now() < until {
        let (requests, stream) = tokio::sync::mpsc::channel(8);
        let Ok(answers) = client.queues_downstream(tokio_stream::wrappers::ReceiverStream::new(stream)).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let mut answers = answers.into_inner();
        let request = |kind: QueuesDownstreamRequestType| QueuesDownstreamRequest {
            request_id: "r".into(),
            client_id: "crash".into(),
            channel: "orders".into(),
            request_type_data: kind.into(),
            max_items: 50,
            wait_timeout: 500,
            ..QueuesDownstreamRequest::default()
        };
        while Instant::now() < until {
            if requests.send(request(QueuesDownstreamRequestType::Get)).await.is_err() {
                break;
            }
            let Ok(Some(answer)) = answers.message().await else { break };
            for message in &answer.messages {
                let body = String::from_utf8(message.body.to_vec()).unwrap();
                *ledger.seen.lock().unwrap().entry(body).or_default() += 1;
            }
            if answer.messages.is_empty() {
                continue;
            }
            let ack = QueuesDownstreamRequest {
                ref_transaction_id: answer.transaction_id,
                ..request(QueuesDownstreamRequestType::AckAll)
            };
            if requests.send(ack).await.is_err() {
                break;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loop_of_crashes_loses_nothing_that_was_answered() {
    let rounds = std::env::var(ROUNDS).ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(6_u32);
    let folder = tempfile::tempdir().unwrap();
    let address = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().to_string()
    };
    let ledger = Arc::<Ledger>::default();
    for round in 0..rounds {
        let killed = Killed::start(&address, folder.path().to_str().unwrap());
        let until = Instant::now() + Duration::from_millis(fastrand::u64(400..1500));
        let senders =
            (0..4).map(|sender| tokio::spawn(sends(address.clone(), round * 10 + sender, Arc::clone(&ledger), until)));
        let mut tasks: Vec<_> = senders.collect();
        tasks.push(tokio::spawn(receives(address.clone(), Arc::clone(&ledger), until)));
        tokio::time::sleep_until(until.into()).await;
        drop(killed);
        for task in tasks {
            task.await.unwrap();
        }
    }
    let _last = Killed::start(&address, folder.path().to_str().unwrap());
    let mut client = connect(&address).await;
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut silent = 0;
    while silent < 2 && Instant::now() < deadline {
        let request = ReceiveQueueMessagesRequest {
            client_id: "crash".into(),
            channel: "orders".into(),
            max_number_of_messages: 1000,
            wait_time_seconds: 1,
            ..ReceiveQueueMessagesRequest::default()
        };
        let Ok(answer) = client.receive_queue_messages(request).await else { continue };
        let messages = answer.into_inner().messages;
        silent = if messages.is_empty() { silent + 1 } else { 0 };
        for message in messages {
            *ledger.seen.lock().unwrap().entry(String::from_utf8(message.body.to_vec()).unwrap()).or_default() += 1;
        }
    }
    let (accepted, seen) = (ledger.accepted.lock().unwrap().clone(), ledger.seen.lock().unwrap().clone());
    let lost: Vec<_> = accepted.iter().filter(|body| !seen.contains_key(*body)).collect();
    let twice = seen.values().filter(|times| **times > 1).count();
    println!("{} accepted, {} handled, {} lost, {twice} more than once", accepted.len(), seen.len(), lost.len());
    assert!(lost.is_empty() && accepted.len() > 100, "{} accepted, lost: {lost:?}", accepted.len());

    let subscribe = Subscribe {
        subscribe_type_data: subscribe::SubscribeType::EventsStore.into(),
        client_id: "reader".into(),
        channel: "log".into(),
        events_store_type_data: subscribe::EventsStoreType::StartFromFirst.into(),
        ..Subscribe::default()
    };
    let mut stream = client.subscribe_to_events(subscribe).await.unwrap().into_inner();
    let mut missing = ledger.events.lock().unwrap().clone();
    while !missing.is_empty() {
        let event = tokio::time::timeout(Duration::from_secs(5), stream.message()).await;
        let event = event.unwrap_or_else(|_| panic!("lost events: {missing:?}")).unwrap().unwrap();
        missing.remove(std::str::from_utf8(&event.body).unwrap());
    }
}
