//! Row J22 on Kafka: a million sends to a broker that has stalled keep memory below a bound. A process of its own, because resident
//! memory belongs to the whole of it.

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::relay::Relays;
use polymq_core::{Bus, ErrorKind, Message, WhenFull};
use polymq_testkit::{Broker, BrokerControl, Proxy, eventually};

const SENDS: usize = 1_000_000;
const WINDOW: usize = 256;
const BODY: usize = 1024;
/// Far below what a million messages would take, and above what the window does.
const MOST: usize = 64 * 1024 * 1024;
const PATIENCE: Duration = Duration::from_secs(60);

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = status.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
    pages * 4096
}

fn message(n: usize) -> Message {
    let mut body = vec![b'x'; BODY];
    body[..8].copy_from_slice(&n.to_be_bytes());
    Message::new(body)
}

#[track_caller]
fn bounded(before: usize) {
    let grown = resident().saturating_sub(before);
    assert!(grown < MOST, "memory grew by {} KiB", grown / 1024);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j22_a_million_sends_to_a_stalled_broker_stay_within_the_window() {
    let broker = tokio::task::block_in_place(Broker::kafka);
    let (proxy, relays) = (Proxy::start(broker.address()).await.expect("a proxy"), Relays::new(broker.address()));
    let at = relays.before(proxy.address());
    // So that the connection stays, for all that is sent into it.
    let url = format!("kafka://admin:secret@{at}?connect_timeout=60s&heartbeat=100s&delivery_timeout=1h");
    let bus = Bus::connect(&url).await.expect("connect");
    let queue = bus.queue("stalled").with_timeout(Duration::from_secs(3600));
    // Refuses at once when the window is full, or waits.
    let (refusing, waits) = (queue.with_window(WINDOW, WhenFull::Refuse), queue.with_window(WINDOW, WhenFull::Wait));
    for channel in [&refusing, &waits] {
        channel.send(&"before").await.expect("accepted");
    }
    proxy.pause();

    let before = resident();
    let (mut refused, mut waiting) = (0, Vec::new());
    for n in 0..SENDS {
        match refusing.enqueue(message(n)).await {
            Ok(completion) => waiting.push(completion),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
                refused += 1;
            }
        }
    }
    assert_eq!((waiting.len(), refused, refusing.in_flight()), (WINDOW, SENDS - WINDOW, WINDOW));
    bounded(before);

    // No more is taken from the million than the window holds.
    let taken = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&taken);
    let messages = (0..SENDS).map(move |n| {
        counted.fetch_add(1, Ordering::Relaxed);
        message(n)
    });
    let sending = tokio::spawn(async move { waits.send_all(messages).await.len() });
    eventually(PATIENCE, || async {
        if taken.load(Ordering::Relaxed) > 0 { Ok(()) } else { Err("no message was taken") }
    })
    .await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!sending.is_finished(), "the broker has stalled");
    let taken = taken.load(Ordering::Relaxed);
    assert!((1..=WINDOW).contains(&taken), "{taken} messages were taken");
    bounded(before);
    sending.abort();

    // What was accepted is confirmed when the broker goes on.
    proxy.resume();
    for completion in waiting {
        completion.await.expect("accepted in the end");
    }
    let _ = bus.close().await;
    tokio::task::block_in_place(|| drop(broker));
}
