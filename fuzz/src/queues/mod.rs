//! The life of messages in queues, by steps over both of the protocol's streams and its single calls.
//!
//! What must hold, whatever the order: each delivery is of a message that was accepted and that nobody has finished with; and
//! at the end every accepted message is either finished with or still there, once. Polls are answered once, also those that
//! wait beside each other, and whoever waits gets what comes. Expirations and delays are left out,
//! because they make messages come and go by the clock; dropping for good is expected where a message had its last delivery.

mod calls;
mod model;
mod older;
mod polls;
mod settle;
mod step;
mod streams;

pub use self::{
    older::Old,
    step::{Settle, Step},
};

use std::time::{Duration, Instant};

pub(crate) use self::model::Model;
use crate::{Client, manage, with_broker};

/// Queues of an input; the last one is nobody's but the dead letters'.
const QUEUES: usize = 3;
/// Streams of each kind that an input has open.
const STREAMS: usize = 2;
/// Steps of an input; more say nothing new.
const STEPS: usize = 48;
/// Whatever must come comes within it.
const PATIENCE: Duration = Duration::from_secs(10);

pub fn run(steps: &[Step]) {
    if steps.is_empty() {
        return;
    }
    with_broker(async |channel, name| {
        let mut model = Model::new(Client::new(channel), name);
        for step in steps.iter().take(STEPS) {
            model.step(step).await;
        }
        model.end().await;
    });
}

impl Model {
    /// Before the broker stops under its streams.
    pub(crate) async fn before_stop(&mut self) {
        for stream in 0..STREAMS {
            self.part(stream).await;
        }
    }

    /// All streams break: with a broker that stops, or that only sees its client go.
    pub(crate) async fn leave(&mut self) {
        for stream in 0..STREAMS {
            self.break_off(stream).await;
        }
        for older in 0..STREAMS {
            if let Some((_, body)) = self.older[older].take().and_then(|older| older.held) {
                self.failed(body);
            }
        }
    }

    /// Everything that is left comes, each once; then nothing does.
    pub(crate) async fn end(mut self) {
        for transaction in 0..self.transactions.len().min(4) as u8 {
            self.ask(0, transaction, false, true).await;
        }
        self.leave().await;
        // Streams that broke give back when the broker has seen it; the counts of the queues tell when.
        let mut last = Instant::now();
        loop {
            let mut came = 0;
            for queue in 0..QUEUES as u8 {
                came += self.receive(queue, 16, false).await;
            }
            let left: Vec<_> = self.there.keys().filter(|body| !self.may_be_gone.contains(body)).collect();
            if left.is_empty() && came == 0 {
                break;
            }
            assert!(came > 0 || last.elapsed() < PATIENCE, "lost: {left:?}");
            if came == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            } else {
                last = Instant::now();
            }
        }
        for queue in 0..QUEUES as u8 {
            let name = self.queue(queue);
            let _ = manage(&mut self.client, "delete-channel", "queues", &name).await;
        }
    }
}
