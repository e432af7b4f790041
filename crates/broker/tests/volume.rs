//! Many stored messages: memory does not grow with them, and a start takes no longer.
//!
//! `POLYMQ_VOLUME=10000000 cargo test -p polymq-broker --release --test volume -- --nocapture` stores ten million of 256 bytes, and as
//! many events.

mod common;

use std::time::{Duration, Instant};

use common::*;
use polymq_broker::Broker;
use polymq_kubemq_proto::*;

const MESSAGES: &str = "POLYMQ_VOLUME";
const BATCH: usize = 500;
/// Without that: so many, and so large, that those of one kind alone would not fit into the growth that is allowed.
const USUAL: (usize, usize) = (24_000, 4096);
/// What SQLite caches is bounded by 64 MiB.
const GROWTH: u64 = 72 << 20;

/// Bytes of this process that are in memory.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? << 10)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_the_start_do_not_grow_with_what_is_stored() {
    let asked: Option<usize> = std::env::var(MESSAGES).ok().and_then(|count| count.parse().ok());
    let (messages, size) = asked.map_or(USUAL, |messages| (messages, 256));
    let folder = tempfile::tempdir().unwrap();
    let start = || Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start();
    let broker = start().await.unwrap();
    let mut caller = client(&broker).await;
    let began = Instant::now();
    let (mut after_a_tenth, mut most) = (None, 0);
    for batch in 0..messages / BATCH {
        let bodies = (0..BATCH).map(|number| {
            let mut body = format!("{}", batch * BATCH + number).into_bytes();
            body.resize(size, b' ');
            body
        });
        let events: Vec<_> = bodies.clone().map(|body| stored_event("log", body)).collect();
        let mut kept = caller.send_events_stream(tokio_stream::iter(events)).await.unwrap().into_inner();
        for _ in 0..BATCH {
            assert!(kept.message().await.unwrap().expect("an answer each").sent);
        }
        let sent = bodies.map(|body| message("orders", body));
        let request = QueueMessagesBatchRequest { batch_id: "b".into(), messages: sent.collect() };
        let answer = caller.send_queue_messages_batch(request).await.unwrap().into_inner();
        assert!(!answer.have_errors, "{:?}", answer.results.iter().find(|result| result.is_error));
        if batch * 10 >= messages / BATCH {
            most = most.max(resident().unwrap_or(0));
            after_a_tenth.get_or_insert(most);
        }
    }
    let took = began.elapsed();
    let first = after_a_tenth.unwrap_or(0);
    println!(
        "{messages} messages and events of {size} B in {took:.1?} ({:.0} a second); resident: {} MiB after a tenth, {} MiB at most",
        2.0 * messages as f64 / took.as_secs_f64(),
        first >> 20,
        most >> 20
    );
    assert!(most < first + GROWTH, "{first} bytes after a tenth, {most} at most");
    drop(caller);
    broker.stop().await;

    let began = Instant::now();
    let broker = start().await.unwrap();
    let took = began.elapsed();
    println!(
        "started again in {took:.1?}, {} MiB on disk, resident {} MiB",
        disk(folder.path()) >> 20,
        resident().unwrap_or(0) >> 20
    );
    assert!(took < Duration::from_secs(30), "{took:?}");
    let mut caller = client(&broker).await;
    let info = caller.queues_info(QueuesInfoRequest::default()).await.unwrap().into_inner().info.unwrap();
    assert_eq!(info.queues[0].messages, (messages / BATCH * BATCH) as i64);

    // From the head, in order, and quickly.
    let began = Instant::now();
    for batch in 0..20.min(messages / BATCH) {
        let found = receive(&mut caller, "orders", BATCH as i32).await;
        assert!(found.len() == BATCH && found[0].trim() == (batch * BATCH).to_string(), "{} of {batch}", found.len());
    }
    println!("20 receives of {BATCH} in {:.1?}", began.elapsed());
    let began = Instant::now();
    let empty = AckAllQueueMessagesRequest { client_id: "test".into(), channel: "orders".into(), ..Default::default() };
    let emptied = caller.ack_all_queue_messages(empty).await.unwrap().into_inner();
    assert_eq!(emptied.affected_messages as usize, messages / BATCH * BATCH - 20.min(messages / BATCH) * BATCH);
    println!("emptied in {:.1?}, resident {} MiB", began.elapsed(), resident().unwrap_or(0) >> 20);
    broker.stop().await;
}

fn stored_event(channel: &str, body: Vec<u8>) -> Event {
    Event { client_id: "test".into(), channel: channel.into(), body: body.into(), store: true, ..Event::default() }
}

fn disk(folder: &std::path::Path) -> u64 {
    std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum()
}
