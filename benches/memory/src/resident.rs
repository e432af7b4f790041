//! How much memory waiting messages take while a slow handler works them off.

use std::time::Duration;

use harness::{Numbers, Options, memory};
use polymq_core::{Body, Message};

use crate::{payload, size};

pub async fn polymq(options: Options) -> Numbers {
    let n = options.messages();
    // Here the process is the broker too: what waits is its own, and its capacity bounds it.
    let bus = polymq_core::Bus::builder()
        .backend("memory")
        .environment(polymq_core::Environment::default())
        .connect()
        .await
        .expect("memory is always there");
    let _running = crate::polymq::run(&bus, |factory| {
        factory.route("orders", |body: Body| async move {
            std::hint::black_box(&body);
            tokio::time::sleep(Duration::from_millis(1)).await;
        });
    })
    .await;
    let (queue, size) = (bus.queue("orders"), size(&options));
    let before = memory("VmRSS");
    let sending = tokio::spawn(async move {
        for _ in 0..n {
            if queue.send_message(Message::new(payload(size))).await.is_err() {
                break;
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(options.get("seconds", 3))).await;
    let after = memory("VmRSS");
    sending.abort();
    vec![("growth_bytes", after - before), ("payload_bytes", (n * size as u64) as f64)]
}
