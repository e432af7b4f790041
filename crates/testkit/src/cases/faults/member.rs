//! The consumers of a scenario.

use std::{sync::Arc, time::Duration};

use polymq_core::{Attempt, Bus, ConsumerFactory, ConsumerRunner, Message, Running, State};
use tokio::sync::{Notify, OwnedRwLockWriteGuard, RwLock};

use crate::{
    Cx,
    drive::{Log, closes, retry_every},
    eventually,
};

/// What handlers do with each message.
#[derive(Debug, Clone, Default)]
pub(super) struct Handling {
    pub(super) started: Log,
    pub(super) handled: Log,
    pub(super) slow: Option<(&'static str, Arc<Notify>)>,
    /// Of one consumer alone.
    pub(super) own: Log,
    /// Held up while somebody has it for writing.
    pub(super) gate: Arc<RwLock<()>>,
}

async fn handle(message: Message, attempt: Attempt, of: State<Handling>) {
    of.started.add(&message, attempt.0);
    drop(of.gate.read().await);
    match &of.slow {
        Some((body, goes_on)) if &message.payload()[..] == body.as_bytes() && of.started.of(body).len() == 1 => {
            goes_on.notified().await;
        }
        _ => tokio::time::sleep(Duration::from_millis(2)).await,
    }
    of.handled.add(&message, attempt.0);
    of.own.add(&message, attempt.0);
}

/// A consumer with these handlers.
pub(super) async fn consume(cx: &Cx, bus: &Bus, name: &str, handling: Handling) -> Running {
    eventually(cx.harness().recovery(), || {
        let mut consumers = ConsumerFactory::new(bus);
        let route = consumers.state(handling.clone()).route(name, handle);
        route.concurrency(4).prefetch(20).policy(retry_every(Duration::from_millis(100), 100));
        ConsumerRunner::new(consumers).start()
    })
    .await
}

/// A second consumer of a scenario, over a connection of its own.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) handled: Log,
    pub(super) bus: Bus,
    pub(super) running: Running,
    pub(super) gate: Arc<RwLock<()>>,
}

impl Member {
    /// From here on its handlers wait, until this is dropped.
    pub(super) async fn is_held_up(&self) -> OwnedRwLockWriteGuard<()> {
        Arc::clone(&self.gate).write_owned().await
    }

    /// Its handlers go on when it has begun to leave.
    pub(super) async fn leaves(self, held_up: OwnedRwLockWriteGuard<()>) {
        let (stopped, ()) = tokio::join!(self.running.stop(), async { drop(held_up) });
        stopped.expect("stop");
        closes(&self.bus).await;
    }
}
