//! What waiting costs, in memory and in processor time. Both belong to the whole process, so this is one test, and a
//! program of its own.

#![allow(missing_docs, unreachable_pub)]

mod peer;

use std::{net::SocketAddr, time::Duration};

use peer::{Act, PATIENCE, Stub, bus, free_url, request};
use polymq_core::{Body, ConsumerFactory, ConsumerRunner, ErrorKind, Message, WhenFull};
use polymq_testkit::eventually;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const MIB: usize = 1024 * 1024;

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = status.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
    pages * 4096
}

/// The time that processors have spent on this process, in ticks of 10 ms.
fn ticks() -> u64 {
    let status = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    let fields: Vec<_> = status.rsplit(')').next().expect("fields").split_whitespace().collect();
    [fields[11], fields[12]].iter().map(|field| field.parse::<u64>().expect("a number")).sum()
}

fn grown_less_than(most: usize, before: usize, what: &str) {
    let grown = resident().saturating_sub(before);
    assert!(grown < most, "{what}: {grown} bytes more are resident");
}

/// A million messages for a server that takes connections and never reads.
async fn a_stalled_server() {
    let stalled = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}?connect_timeout=60s", stalled.local_addr().expect("an address"));
    let accepting = tokio::spawn(async move {
        let mut taken = Vec::new();
        while let Ok((stream, _)) = stalled.accept().await {
            taken.push(stream);
        }
    });
    let bus = bus(&url).await;
    let body = bytes::Bytes::from(vec![b'x'; 4096]);
    // A body of its own for each, so that what is kept is seen.
    let message = |_| Message::new(body.to_vec());
    let before = resident();
    let refusing = bus.queue("orders").with_timeout(Duration::from_secs(600)).with_window(256, WhenFull::Refuse);
    let mut refused = 0;
    for n in 0..1_000_000 {
        if let Err(error) = refusing.enqueue(message(n)).await {
            assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
            refused += 1;
        }
    }
    assert_eq!((refused, refusing.in_flight()), (1_000_000 - 256, 256));
    grown_less_than(64 * MIB, before, "a million sends, refused when 256 wait");
    // The same where a send waits for its turn.
    let waiting = bus.queue("orders").with_timeout(Duration::from_secs(600));
    let sent = tokio::time::timeout(Duration::from_secs(2), waiting.send_all((0..1_000_000).map(message))).await;
    sent.expect_err("nothing is answered");
    grown_less_than(64 * MIB, before, "a million sends that wait");
    accepting.abort();
}

/// An answer without end.
async fn a_flooding_server() {
    let stub = Stub::start(|_| Act::Flood).await;
    let bus = bus(&format!("{}?max_reply=1000000", stub.url())).await;
    let before = resident();
    for _ in 0..20 {
        let error = bus.queue("orders").send_message(Message::new("x")).await.expect_err("too large");
        assert_eq!(error.kind(), ErrorKind::TooLarge);
    }
    grown_less_than(16 * MIB, before, "answers without end");
}

/// A hundred senders of 8 MiB each, at once, to a handler that takes its time.
async fn a_crowd_of_large_bodies() {
    let url = free_url();
    let address: SocketAddr = url.trim_start_matches("http://").parse().expect("an address");
    let bus = bus(&format!("{url}?max_buffered=33554432")).await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Body| tokio::time::sleep(Duration::from_millis(300)).await).concurrency(8);
    let running = ConsumerRunner::new(consumers).start().await.expect("started");
    let before = resident();
    // One body for all: this process is their sender too.
    let sent: &'static str = Box::leak(request("POST", "/orders", "", &"x".repeat(8 * MIB)).into_boxed_str());
    let crowd: Vec<_> = (0..100)
        .map(|_| {
            tokio::spawn(async move {
                let mut stream = TcpStream::connect(address).await.expect("connect");
                let (mut reading, mut writing) = stream.split();
                let mut answer = vec![0; 12];
                // Whoever is refused is not read to its end.
                let (read, _) = tokio::join!(reading.read_exact(&mut answer), writing.write_all(sent.as_bytes()));
                read.is_ok().then(|| String::from_utf8_lossy(&answer).into_owned())
            })
        })
        .collect();
    let (mut handled, mut refused) = (0, 0);
    for sender in crowd {
        match sender.await.expect("no panic").as_deref() {
            Some("HTTP/1.1 204") => handled += 1,
            // A reset may overtake the answer.
            Some("HTTP/1.1 503") | None => refused += 1,
            Some(other) => panic!("{other}"),
        }
    }
    assert!(handled >= 1 && refused >= 1, "{handled} handled, {refused} refused");
    // Those that have room, the body of this test, and what the system and the allocator keep.
    grown_less_than((32 + 8 + 64) * MIB, before, "a hundred bodies of 8 MiB");
    eventually(PATIENCE, || async {
        bus.queue("orders").send_message(Message::new("small")).await.map_err(|error| error.to_string())
    })
    .await;
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
}

/// A consumer and a sender with their connection, which have nothing to do.
async fn idle() {
    let bus = bus(&free_url()).await;
    let mut consumers = ConsumerFactory::new(&bus);
    for queue in ["one", "two", "three"] {
        consumers.route(queue, async |_: Body| {});
    }
    let running = ConsumerRunner::new(consumers).start().await.expect("started");
    bus.queue("one").send_message(Message::new("x")).await.expect("handled");
    // The best of three: on a crowded machine the same work takes more ticks.
    let mut used = u64::MAX;
    for _ in 0..3 {
        let before = ticks();
        tokio::time::sleep(Duration::from_secs(10)).await;
        used = used.min(ticks() - before);
        if used < 10 {
            break;
        }
    }
    assert!(used < 10, "{used} ticks of 10 ms in ten idle seconds are 1 % of a processor or more");
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j11_j22_waiting_costs_neither_memory_nor_time() {
    a_stalled_server().await;
    a_flooding_server().await;
    a_crowd_of_large_bodies().await;
    idle().await;
}
