//! kill -9 at random moments under load: nothing that was answered is lost, and nothing is in two places.
//!
//! Half a dozen crashes by default. `POLYMQ_CRASH_SECONDS=300 cargo test -p polymq-broker --release --test crash -- --nocapture`
//! goes on for five minutes and prints what it counted.

use std::{
    collections::{BTreeMap, BTreeSet},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use polymq_broker::Broker;
use polymq_kubemq_proto::{QueuesDownstreamRequestType as Kind, kubemq_client::KubemqClient, *};
use tonic::transport::Channel;

const CHILD: &str = "POLYMQ_CRASH_CHILD";
/// How long to go on starting, loading and killing.
const SECONDS: &str = "POLYMQ_CRASH_SECONDS";
/// Deliveries of a message that always fails.
const ATTEMPTS: i32 = 2;

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

/// What was answered, and what came.
#[derive(Default)]
struct Ledger {
    accepted: Mutex<BTreeSet<String>>,
    handled: Mutex<BTreeMap<String, u32>>,
    letters: Mutex<BTreeMap<String, u32>>,
    stored: Mutex<BTreeSet<String>>,
}

impl Ledger {
    fn count(counts: &Mutex<BTreeMap<String, u32>>, messages: &[QueueMessage]) {
        let mut counts = counts.lock().unwrap();
        for message in messages {
            *counts.entry(text(&message.body)).or_default() += 1;
        }
    }
}

fn text(body: &[u8]) -> String {
    String::from_utf8(body.to_vec()).unwrap()
}

/// A message that is rejected at each delivery.
fn fails(body: &str) -> bool {
    body.starts_with("bad")
}

fn connect(address: &str) -> KubemqClient<Channel> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = channel.connect_timeout(Duration::from_millis(500)).timeout(Duration::from_secs(5));
    KubemqClient::new(channel.connect_lazy())
}

fn message(body: &str) -> QueueMessage {
    let policy = QueueMessagePolicy {
        delay_seconds: i32::from(body.starts_with("late")),
        max_receive_count: if fails(body) { ATTEMPTS } else { 0 },
        max_receive_queue: if fails(body) { "letters".into() } else { String::new() },
        ..QueueMessagePolicy::default()
    };
    QueueMessage {
        client_id: "crash".into(),
        channel: "orders".into(),
        body: body.to_owned().into(),
        policy: Some(policy),
        ..QueueMessage::default()
    }
}

/// Sends messages, some delayed and some that will fail, and stores events.
async fn sends(address: String, sender: u32, ledger: Arc<Ledger>, until: Instant) {
    let mut client = connect(&address);
    for number in 0.. {
        if Instant::now() > until {
            return;
        }
        let kind = ["now", "late", "now", "bad"][number % 4];
        let body = format!("{kind}-{sender}-{number}");
        match client.send_queue_message(message(&body)).await {
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
            ledger.stored.lock().unwrap().insert(body);
        }
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

/// Handles what comes, and rejects what fails, until a time or until nothing came twice.
async fn receives(address: String, ledger: Arc<Ledger>, until: Instant, drain: bool) {
    let mut client = connect(&address);
    let mut silent = 0;
    while Instant::now() < until {
        let (requests, stream) = tokio::sync::mpsc::channel(8);
        let Ok(answers) = client.queues_downstream(tokio_stream::wrappers::ReceiverStream::new(stream)).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let mut answers = answers.into_inner();
        while Instant::now() < until {
            if requests.send(request(Kind::Get)).await.is_err() {
                break;
            }
            let Ok(Some(answer)) = answers.message().await else { break };
            if answer.messages.is_empty() {
                silent += 1;
                if drain && silent == 4 {
                    return;
                }
                continue;
            }
            silent = 0;
            let (bad, good): (Vec<_>, Vec<_>) =
                answer.messages.into_iter().partition(|message| fails(&text(&message.body)));
            Ledger::count(&ledger.handled, &good);
            for (kind, messages) in [(Kind::AckRange, good), (Kind::NAckRange, bad)] {
                let sequence = |message: QueueMessage| message.attributes.unwrap().sequence.cast_signed();
                let settle = QueuesDownstreamRequest {
                    ref_transaction_id: answer.transaction_id.clone(),
                    sequence_range: messages.into_iter().map(sequence).collect(),
                    ..request(kind)
                };
                if !settle.sequence_range.is_empty() && requests.send(settle).await.is_err() {
                    break;
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loop_of_crashes_loses_nothing_that_was_answered() {
    let longest = std::env::var(SECONDS).ok().map(|seconds| Duration::from_secs(seconds.parse().unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let address = {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().to_string()
    };
    let ledger = Arc::<Ledger>::default();
    let begin = Instant::now();
    let mut crashes = 0;
    while longest.map_or(crashes < 6, |longest| begin.elapsed() < longest) {
        let killed = Killed::start(&address, folder.path().to_str().unwrap());
        // Now and then while it still starts.
        let until = Instant::now() + Duration::from_millis(fastrand::u64(20..1500));
        let senders = (0..4)
            .map(|sender| tokio::spawn(sends(address.clone(), crashes * 10 + sender, Arc::clone(&ledger), until)));
        let mut tasks: Vec<_> = senders.collect();
        tasks.push(tokio::spawn(receives(address.clone(), Arc::clone(&ledger), until, false)));
        tokio::time::sleep_until(until.into()).await;
        drop(killed);
        for task in tasks {
            task.await.unwrap();
        }
        crashes += 1;
    }
    let _last = Killed::start(&address, folder.path().to_str().unwrap());
    let deadline = Instant::now() + Duration::from_secs(60);
    // Longer silent than a delay.
    receives(address.clone(), Arc::clone(&ledger), deadline, true).await;
    let mut client = connect(&address);
    loop {
        let all = ReceiveQueueMessagesRequest {
            client_id: "crash".into(),
            channel: "letters".into(),
            max_number_of_messages: 1000,
            wait_time_seconds: 1,
            ..ReceiveQueueMessagesRequest::default()
        };
        let messages = client.receive_queue_messages(all).await.unwrap().into_inner().messages;
        if messages.is_empty() {
            break;
        }
        Ledger::count(&ledger.letters, &messages);
    }
    let wanted = ledger.stored.lock().unwrap().clone();
    let events = read_all(&mut client, wanted).await;

    let (accepted, stored) = (ledger.accepted.lock().unwrap(), ledger.stored.lock().unwrap());
    let (handled, letters) = (ledger.handled.lock().unwrap(), ledger.letters.lock().unwrap());
    let came = |body: &String| if fails(body) { letters.contains_key(body) } else { handled.contains_key(body) };
    let lost: Vec<_> = accepted.iter().filter(|body| !came(body)).collect();
    let missing: Vec<_> = stored.iter().filter(|body| !events.contains_key(*body)).collect();
    let more = |counts: &BTreeMap<String, u32>| counts.values().filter(|times| **times > 1).count();
    println!(
        "{crashes} crashes in {:.0?}: {} messages accepted, {} lost; {} handled, {} of them more than once; {} dead letters, {} of \
         them more than once; {} events stored, {} lost, {} more than once",
        begin.elapsed(),
        accepted.len(),
        lost.len(),
        handled.len(),
        more(&handled),
        letters.len(),
        more(&letters),
        stored.len(),
        missing.len(),
        more(&events),
    );
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert!(missing.is_empty(), "lost events: {missing:?}");
    assert_eq!((more(&letters), more(&events)), (0, 0), "a move or an event that was done twice");
    assert!(accepted.len() > 100 && stored.len() > 100 && letters.len() > 10, "there was hardly any load");
}

/// Every stored event, once all that are wanted have come or none has for a while; in the order of unbroken sequences.
async fn read_all(client: &mut KubemqClient<Channel>, mut wanted: BTreeSet<String>) -> BTreeMap<String, u32> {
    let subscribe = Subscribe {
        subscribe_type_data: subscribe::SubscribeType::EventsStore.into(),
        client_id: "reader".into(),
        channel: "log".into(),
        events_store_type_data: subscribe::EventsStoreType::StartFromFirst.into(),
        ..Subscribe::default()
    };
    let mut stream = client.subscribe_to_events(subscribe).await.unwrap().into_inner();
    let (mut found, mut last) = (BTreeMap::new(), 0);
    while !wanted.is_empty() {
        let Ok(event) = tokio::time::timeout(Duration::from_secs(5), stream.message()).await else { break };
        let event = event.unwrap().unwrap();
        assert_eq!(event.sequence, last + 1, "a gap");
        last = event.sequence;
        let body = text(&event.body);
        wanted.remove(&body);
        *found.entry(body).or_default() += 1;
    }
    found
}
