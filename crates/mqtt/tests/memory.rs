//! What is fetched stays bounded, in messages and in bytes, under both protocol versions.
//!
//! One test, because resident memory belongs to the whole process; the backlog is sent by another one.

mod harness;

use std::{
    io::Write,
    process::{Command, Stdio},
    time::Duration,
};

use harness::Broker;
use polymq_core::{Address, ConsumeOptions};
use tokio::time::sleep;

const MIB: usize = 1024 * 1024;

/// Sends lines to a topic with a client of the broker's own package.
fn publish(broker: &Broker, topic: &str, count: usize, size: usize) {
    let port = broker.port.to_string();
    let mut client = Command::new("mosquitto_pub")
        .args(["-h", "127.0.0.1", "-p", &port, "-V", "mqttv5", "-q", "1", "-l", "-t", topic])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap_or_else(|cause| panic!("this test needs mosquitto_pub of the package mosquitto-clients: {cause}"));
    let mut lines = client.stdin.take().expect("piped");
    let line = format!("{}\n", "x".repeat(size));
    for _ in 0..count {
        lines.write_all(line.as_bytes()).expect("written");
    }
    drop(lines);
    assert!(client.wait().expect("ended").success());
}

/// Resident memory of this process, in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages: usize = status.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).expect("a number");
    pages * 4096
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backlog_is_not_fetched_before_it_is_wanted() {
    let broker = Broker::start_with(&["--volatile"]).await;
    for (protocol, count, size, prefetch, prefetch_bytes, most) in [
        // A hundred thousand messages wait, as many as a slow handler is given at a time come.
        ("5", 100_000, 1000, 128, 64 * MIB, 8 * MIB),
        // Large bodies: the receive maximum would let a thousand of them come, 64 MiB.
        ("5", 2000, 64 * 1024, 1000, MIB, 12 * MIB),
        // No receive maximum, and this broker has up to a thousand messages in flight.
        ("3.1.1", 2000, 64 * 1024, 8, 64 * MIB, 12 * MIB),
        ("3.1.1", 2000, 64 * 1024, 1000, MIB, 12 * MIB),
    ] {
        let case = format!("{count} of {size} bytes, prefetch {prefetch} and {prefetch_bytes} bytes, MQTT {protocol}");
        let bus = broker.connect_with(&[("protocol", protocol)]).await;
        let queue = Address::queue("backlog");
        bus.declare(&queue, &ConsumeOptions::default()).await.expect("declared");
        let topic = queue.name().to_owned();
        let broker = &broker;
        tokio::task::block_in_place(|| publish(broker, &topic, count, size));
        let before = resident();
        let options = ConsumeOptions { prefetch, prefetch_bytes, ..ConsumeOptions::default() };
        let mut consumer = bus.consumer(&queue, &options).await.expect("consumer");
        let settler = consumer.settler();
        // A slow handler: each message is held for a moment, then acknowledged.
        let (mut handled, mut grown, mut got) = (0, 0, Vec::new());
        while handled < 200 {
            consumer.receive(1, &mut got).await.expect("a message");
            sleep(Duration::from_millis(5)).await;
            for incoming in got.drain(..) {
                settler.ack(incoming.token).await.expect("acknowledged");
                handled += 1;
            }
            grown = grown.max(resident().saturating_sub(before));
        }
        println!("{case}: {} KiB more", grown / 1024);
        assert!(grown < most, "{case}: memory grew by {} KiB", grown / 1024);
        // A link that does not read still hears the end.
        consumer.close().await.expect("closed");
        bus.delete(&queue, None).await.expect("deleted");
        bus.close().await.expect("closed");
    }
}
