//! What the tests of the runner share.
#![allow(dead_code, missing_docs)]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq_core::{Bus, ConsumeOptions, Delivery, Environment, Subscription};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) id: u64,
}

pub(crate) fn order(id: u64) -> Order {
    Order { id }
}

/// A bus on a memory space of the test's own.
pub(crate) async fn bus(space: &str) -> Bus {
    let builder = Bus::builder().url(format!("memory://{space}")).environment(Environment::default());
    builder.connect().await.expect("memory connects")
}

/// A log that handlers write to.
#[derive(Debug, Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    pub(crate) fn add(&self, entry: impl Into<String>) {
        self.0.lock().expect("not poisoned").push(entry.into());
    }

    pub(crate) fn entries(&self) -> Vec<String> {
        self.0.lock().expect("not poisoned").clone()
    }

    /// Waits, on the paused clock, until there are `count` entries.
    pub(crate) async fn wait(&self, count: usize) -> Vec<String> {
        for _ in 0..100_000 {
            let entries = self.entries();
            if entries.len() >= count {
                return entries;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{count} entries awaited, there are {:?}", self.entries());
    }
}

/// The next dead letter of a queue.
pub(crate) async fn dead_letter(bus: &Bus, queue: &str) -> Delivery {
    letters(bus, queue).await.next().await.expect("a dead letter")
}

pub(crate) async fn letters(bus: &Bus, queue: &str) -> Subscription {
    bus.queue(format!("{queue}.dlq")).subscribe(ConsumeOptions::default()).await.expect("subscribes")
}

/// Nothing waits and nothing is unsettled.
pub(crate) async fn assert_empty(bus: &Bus, queue: &str) {
    let stats = bus.queue(queue).stats(None).await.expect("counts");
    assert_eq!((stats.ready, stats.unsettled), (0, Some(0)), "{queue}");
}
