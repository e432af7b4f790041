//! What consumers do, against peers that know nothing of polymq. The contract itself is tested by the shared suite.

#![allow(missing_docs, unreachable_pub)]

mod answers;
mod limits;
#[path = "../peer/mod.rs"]
mod peer;
mod routes;
mod service;

use peer::{Exchange, PATIENCE};
use polymq_core::Consumer;
use polymq_testkit::eventually;
use tokio::task::JoinHandle;

async fn answered(sender: JoinHandle<Exchange>) -> Exchange {
    sender.await.expect("the sender")
}

/// Waits until as many senders wait for an answer of this consumer.
async fn awaited(consumer: &dyn Consumer, count: usize) {
    eventually(PATIENCE, || async {
        let shown = format!("{:?}", consumer.settler());
        if shown.contains(&format!("awaited: {count}")) { Ok(()) } else { Err(shown) }
    })
    .await;
}
