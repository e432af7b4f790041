//! kill -9 of `polymq broker` at random moments under load: nothing that was answered is lost, and nothing is in two places.
//!
//! Half a dozen crashes by default. `POLYMQ_CRASH_SECONDS=300 cargo test -p polymq-cli --release --test crash -- --nocapture`
//! goes on for five minutes and prints what it counted.

mod common;
#[path = "crash/consumers.rs"]
mod consumers;
#[path = "crash/events.rs"]
mod events;
#[path = "crash/ledger.rs"]
mod ledger;
#[path = "crash/movers.rs"]
mod movers;
#[path = "crash/senders.rs"]
mod senders;

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use common::Broker;
use ledger::{Ledger, Phase, is_moved};
use polymq_kubemq_proto::{QueueMessage, QueueMessagePolicy, kubemq_client::KubemqClient};
use tokio::{task::JoinSet, time::sleep};
use tonic::transport::Channel;

/// How long to go on starting, loading and killing.
const SECONDS: &str = "POLYMQ_CRASH_SECONDS";
/// Deliveries of a message that always fails.
const ATTEMPTS: i32 = 2;
/// Before what failed is tried again: the broker is being killed all the time.
const AGAIN: Duration = Duration::from_millis(20);
/// No broker needs so long to give what it has.
const DRAIN: Duration = Duration::from_secs(300);
/// Longer than a delay: what comes twice has come by then.
const QUIET: Duration = Duration::from_secs(2);

fn text(body: &[u8]) -> String {
    String::from_utf8(body.to_vec()).unwrap()
}

/// Of a client that outlives the broker.
fn connect(address: &str) -> KubemqClient<Channel> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = channel.connect_timeout(Duration::from_millis(500)).timeout(Duration::from_secs(60));
    KubemqClient::new(channel.connect_lazy())
}

/// What its body says: to be handled, at once or later, to be rejected at each delivery, or to be moved.
fn message(body: &str) -> QueueMessage {
    let fails = ledger::fails(body);
    let policy = QueueMessagePolicy {
        delay_seconds: i32::from(body.starts_with("late")),
        max_receive_count: if fails { ATTEMPTS } else { 0 },
        max_receive_queue: if fails { "letters".into() } else { String::new() },
        ..QueueMessagePolicy::default()
    };
    QueueMessage {
        client_id: "crash".into(),
        channel: if is_moved(body) { "inbox" } else { "orders" }.into(),
        body: body.to_owned().into(),
        policy: Some(policy),
        ..QueueMessage::default()
    }
}

/// Kills a broker that still starts, or has just begun to serve.
async fn kill_early(address: &str, data: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_polymq"));
    command.args(["broker", "--listen", address, "--data-dir", data]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = command.spawn().unwrap();
    sleep(Duration::from_millis(fastrand::u64(1..80))).await;
    process.kill().unwrap();
    process.wait().unwrap();
}

/// A moment of load; on a busy machine it lasts until something was accepted.
async fn round(ledger: &Ledger) {
    let (begun, before) = (Instant::now(), ledger.load());
    sleep(Duration::from_millis(fastrand::u64(20..1500))).await;
    while ledger.load() == before && begun.elapsed() < Duration::from_secs(60) {
        sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_loop_of_crashes_loses_nothing_that_was_answered() {
    let longest = std::env::var(SECONDS).ok().map(|seconds| Duration::from_secs(seconds.parse().unwrap()));
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let data = data.to_str().unwrap();
    let mut broker = Broker::start(folder.path(), &["--data-dir", data]).unwrap();
    let (address, ledger) = (broker.address.clone(), Arc::<Ledger>::default());
    let (mut load, mut consumers) = (JoinSet::new(), JoinSet::new());
    senders::start(&mut load, &address, &ledger);
    movers::start(&mut load, &address, &ledger);
    consumers::start(&mut consumers, &address, &ledger);
    consumers.spawn(events::reads(address.clone(), Arc::clone(&ledger)));

    let begin = Instant::now();
    let mut crashes = 0;
    let usual = |crashes| crashes < 6 || (crashes < 60 && !ledger.is_loaded());
    while longest.map_or_else(|| usual(crashes), |longest| begin.elapsed() < longest) {
        round(&ledger).await;
        let killed = broker.id();
        assert!(!broker.stop("KILL").unwrap().success());
        crashes += 1;
        if crashes % 4 == 0 {
            kill_early(&address, data).await;
            crashes += 1;
        }
        broker.keep_up().unwrap();
        assert_ne!(broker.id(), killed);
        for ended in [load.try_join_next(), consumers.try_join_next()].into_iter().flatten() {
            ended.unwrap();
        }
    }
    let lasted = begin.elapsed();

    // This one is not killed.
    ledger.go(Phase::Drains);
    load.join_all().await;
    consumers::drain(&mut consumers, &address, &ledger);
    let deadline = Instant::now() + DRAIN;
    let mut left = ledger.lock().accepted.clone();
    while !(left.is_empty() && ledger.silent() > QUIET) && Instant::now() < deadline {
        sleep(Duration::from_millis(100)).await;
        let ledger = ledger.lock();
        left.retain(|body| !ledger.came(body));
    }
    let stored = ledger.lock().stored.clone();
    let stored = events::all(&address, stored).await;
    while !ledger.has_read(&stored) && Instant::now() < deadline {
        sleep(Duration::from_millis(100)).await;
    }
    ledger.go(Phase::Ends);
    consumers.join_all().await;
    report(&ledger, &stored, &format!("{crashes} crashes in {lasted:.0?}"));
    assert!(ledger.is_loaded(), "there was hardly any load");
    assert!(broker.stop("TERM").unwrap().success(), "{}", broker.logs());
}

/// Counts, in one line, and what must not be.
fn report(ledger: &Ledger, stored: &BTreeMap<u64, String>, crashes: &str) {
    let ledger = ledger.lock();
    let more = |counts: &BTreeMap<String, u32>| counts.values().filter(|times| **times > 1).count();
    let lost: Vec<_> = ledger.accepted.iter().filter(|body| !ledger.came(body)).collect();
    let letters = ledger.found.get("letters").cloned().unwrap_or_default();
    let places = ledger.places();
    let astray: Vec<_> = ledger.moved.iter().filter(|(body, queue)| !ledger.is_in(queue, body)).collect();
    let mut kept = BTreeMap::new();
    stored.values().for_each(|body| *kept.entry(body.clone()).or_default() += 1);
    let gone: Vec<_> = ledger.stored.iter().filter(|body| !kept.contains_key(*body)).collect();
    let missed: Vec<_> = stored.keys().filter(|sequence| !ledger.read.contains_key(*sequence)).collect();
    let again = ledger.read.values().filter(|times| **times > 1).count();
    println!(
        "{crashes}: {} messages accepted, {} lost; {} handled, {} of them more than once, {} although their acknowledgement was \
         answered; {} dead letters, {} of them more than once; {} to be moved, {} of them in two places, {} not where the answer \
         said, {} moves answered; {} events stored, {} lost, {} more than once; {} of them read by one reader, {} more than once, \
         {} missed",
        ledger.accepted.len(),
        lost.len(),
        ledger.handled.len(),
        more(&ledger.handled),
        ledger.undone.len(),
        letters.len(),
        more(&letters),
        places.len(),
        more(&places),
        astray.len(),
        ledger.moved.len(),
        ledger.stored.len(),
        gone.len(),
        more(&kept),
        ledger.read.len(),
        again,
        missed.len(),
    );
    assert!(lost.is_empty(), "lost: {lost:?}");
    assert!(gone.is_empty(), "lost events: {gone:?}");
    assert!(missed.is_empty(), "the reader missed {missed:?}");
    assert!(astray.is_empty(), "moves that were answered and undone: {astray:?}");
    assert!(ledger.undone.is_empty(), "answered and came again: {:?}", ledger.undone);
    assert_eq!((more(&letters), more(&places), more(&kept)), (0, 0, 0), "a move or an event that was done twice");
}
