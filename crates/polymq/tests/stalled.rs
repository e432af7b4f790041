//! Row J22: a million sends to a broker that has stalled keep memory below a bound. One test, because resident memory belongs
//! to the whole process.
#![cfg(all(feature = "amqp", feature = "kubemq", feature = "mqtt"))]
#![allow(missing_docs)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq::{Environment, Message, WhenFull, prelude::*};
use polymq_testkit::{Broker, BrokerControl, Proxy, closes};

const SENDS: usize = 1_000_000;
const WINDOW: usize = 256;
const BODY: usize = 1024;
/// Far below what a million messages would take, and above what the window does.
const MOST: usize = 64 * 1024 * 1024;

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn j22_a_million_sends_to_a_stalled_broker_stay_within_the_window() {
    let (rabbitmq, mosquitto) = (Broker::rabbitmq(), Broker::mosquitto(&["--volatile"]));
    // In this process, which costs nothing: it gets no more than what is in the window.
    let kubemq = polymq_broker::Broker::builder().listen("127.0.0.1:0").start().await.unwrap();
    for (scheme, address) in [("amqp", rabbitmq.address()), ("mqtt", mosquitto.address()), ("kubemq", kubemq.address())]
    {
        let proxy = Proxy::start(address).await.unwrap();
        // So that the connection stays, for all that is sent into it.
        let patient = match scheme {
            "mqtt" => &["keep_alive"][..],
            "kubemq" => &["heartbeat", "request_timeout"],
            _ => &["heartbeat"],
        };
        let builder = Bus::builder().environment(Environment::default()).url(format!("{scheme}://{}", proxy.address()));
        let builder = patient.iter().fold(builder, |builder, key| builder.with(*key, "600s"));
        let bus = builder.with("connect_timeout", "60s").connect().await.unwrap();
        let queue = bus.queue("stalled").with_timeout(Duration::from_secs(600));
        // Refuses at once when the window is full, or waits.
        let (refusing, waits) =
            (queue.with_window(WINDOW, WhenFull::Refuse), queue.with_window(WINDOW, WhenFull::Wait));
        for channel in [&refusing, &waits] {
            channel.send(&"before").await.unwrap();
        }
        proxy.pause();

        let before = resident();
        let (mut accepted, mut refused, mut waiting) = (0, 0, Vec::new());
        for n in 0..SENDS {
            match refusing.enqueue(message(n)).await {
                Ok(completion) => {
                    accepted += 1;
                    waiting.push(completion);
                }
                Err(error) => {
                    assert_eq!(error.kind(), polymq::ErrorKind::Busy, "{error}");
                    refused += 1;
                }
            }
        }
        let grown = resident().saturating_sub(before);
        assert_eq!((accepted, refused), (WINDOW, SENDS - WINDOW), "{scheme}");
        assert_eq!(refusing.in_flight(), WINDOW);
        println!("{scheme}: {SENDS} sends, {refused} refused, {} KiB more", grown / 1024);
        assert!(grown < MOST, "{scheme}: memory grew by {} KiB", grown / 1024);

        // No more is taken from the million than the window holds.
        let taken = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&taken);
        let messages = (0..SENDS).map(move |n| {
            counted.fetch_add(1, Ordering::Relaxed);
            message(n)
        });
        let sending = tokio::spawn(async move { waits.send_all(messages).await.len() });
        polymq_testkit::eventually(Duration::from_secs(30), || async {
            if taken.load(Ordering::Relaxed) > 0 { Ok(()) } else { Err("no message was taken") }
        })
        .await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(!sending.is_finished(), "{scheme}: the broker has stalled");
        let taken = taken.load(Ordering::Relaxed);
        assert!((1..=WINDOW).contains(&taken), "{scheme}: {taken} messages were taken");
        let grown = resident().saturating_sub(before);
        assert!(grown < MOST, "{scheme}: memory grew by {} KiB", grown / 1024);
        sending.abort();

        // What was accepted is confirmed when the broker goes on.
        proxy.resume();
        for completion in waiting {
            completion.await.unwrap();
        }
        closes(&bus).await;
    }
    kubemq.stop().await;
}
