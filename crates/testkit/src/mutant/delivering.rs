//! Mutants that deliver the wrong things, at the wrong time, in the wrong order, or to nobody.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    ATTEMPT, Address, Completion, Connection, ConsumeOptions, Consumer, Incoming, MessageId, Result, Settler, Token,
};

use super::{Mutant, mutant};
use crate::{
    cx::lock,
    twist::{Receiving, Twist},
};

pub(super) const MUTANTS: &[Mutant] = &[
    mutant("always_the_first_attempt", || Arc::new(AlwaysFirst), &["S8_attempts_count", "S8_attempts_survive_restart"]),
    mutant(
        "swaps_neighbours",
        || Arc::new(SwapsNeighbours),
        &["O1_per_key_order", "O1_order_over_rebalance", "R7_in_place_blocks_the_key", "F17_paths_of_different_speed"],
    ),
    mutant(
        "lends_one_at_a_time",
        || Arc::new(Prefetches(1)),
        &["O2_limit_is_kept_and_reached", "O3_raise_and_lower", "O7_stuck_handler"],
    ),
    mutant("ignores_prefetch", || Arc::new(Prefetches(100_000)), &["O4_prefetch_is_a_bound"]),
    mutant(
        "hoards",
        || Arc::new(Hoards::default()),
        &["O4_waiting_is_free_for_others", "O5_slow_consumer", "L1_drain_under_load", "L7_add_again_under_load"],
    ),
    mutant("drops_what_is_late", || Arc::new(DropsLate), &["F5_latency_and_loss", "F6_narrow_line"]),
    mutant("stops_when_deleted", || Arc::new(StopsWhenDeleted::default()), &["F10_queue_deleted_in_use"]),
    mutant("renames_what_comes_again", || Arc::new(Renames::default()), &["F16_duplicates_have_one_id"]),
    mutant("loses_what_is_cancelled", || Arc::new(LosesCancelled), &["L8_cancelled_receives"]),
    mutant("acks_foreign_messages", || Arc::new(AcksForeign), &["B9_foreign_message_is_handled"]),
    mutant("stops_after_reconnect", || Arc::new(StopsAfterReconnect), &["F1_graceful_restart", "F3_stream_goes_on"]),
    mutant("loses_after_reconnect", || Arc::new(LosesAfterReconnect::default()), &["F3_reset_of_all_connections"]),
    mutant("swallows_redelivered", || Arc::new(SwallowsRedelivered::default()), &["F9_ack_fails_while_a_handler_runs"]),
    mutant(
        "acks_on_receipt",
        || Arc::new(AcksOnReceipt),
        &[
            "L1_sigterm_drains",
            "F15_consumer_killed_mid_handler",
            "F15_consumer_killed_mid_batch",
            "F15_consumer_killed_mid_drain",
            "F15_member_of_a_group_killed",
        ],
    ),
];

#[derive(Debug)]
struct AlwaysFirst;

#[async_trait]
impl Twist for AlwaysFirst {
    async fn receive(
        &self,
        _: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        for incoming in &mut into[before..] {
            if let Some(details) = &mut incoming.details {
                details.attempt = None;
            }
            if incoming.message.system_headers().get(ATTEMPT).is_some() {
                incoming.message.set_system_header(ATTEMPT, "1");
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
struct SwapsNeighbours;

#[async_trait]
impl Twist for SwapsNeighbours {
    async fn receive(
        &self,
        _: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        into[before..].reverse();
        Ok(())
    }
}

#[derive(Debug)]
struct Prefetches(usize);

#[async_trait]
impl Twist for Prefetches {
    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        connection.consumer(address, &ConsumeOptions { prefetch: self.0, ..options.clone() }).await
    }
}

/// Takes all there is, whatever the prefetch, and loses what it has not handed out when it is closed.
#[derive(Debug, Default)]
struct Hoards(Mutex<HashMap<u64, Vec<Incoming>>>);

#[async_trait]
impl Twist for Hoards {
    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        connection.consumer(address, &ConsumeOptions { prefetch: 100_000, ..options.clone() }).await
    }

    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        if lock(&self.0).entry(at.id).or_default().is_empty() {
            let mut all = Vec::new();
            consumer.receive(10_000, &mut all).await?;
            lock(&self.0).entry(at.id).or_default().extend(all);
        }
        let mut hoards = lock(&self.0);
        let hoard = hoards.entry(at.id).or_default();
        let count = hoard.len().min(max);
        into.extend(hoard.drain(..count));
        Ok(())
    }
}

#[derive(Debug)]
struct LosesCancelled;

#[async_trait]
impl Twist for LosesCancelled {
    async fn receive(
        &self,
        _: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let mut taken = Vec::new();
        consumer.receive(max, &mut taken).await?;
        tokio::time::sleep(Duration::from_millis(3)).await;
        into.append(&mut taken);
        Ok(())
    }
}

/// Receives until something is left after `keep` has decided about each; the others are acknowledged.
async fn receive_some(
    at: &Receiving,
    consumer: &mut dyn Consumer,
    max: usize,
    into: &mut Vec<Incoming>,
    mut keep: impl FnMut(&Incoming) -> bool + Send,
) -> Result<()> {
    let before = into.len();
    while into.len() == before {
        let mut taken = Vec::new();
        consumer.receive(max, &mut taken).await?;
        for incoming in taken {
            if keep(&incoming) {
                into.push(incoming);
            } else {
                drop(at.settler.ack(incoming.token));
            }
        }
    }
    Ok(())
}

#[derive(Debug)]
struct AcksForeign;

#[async_trait]
impl Twist for AcksForeign {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        receive_some(at, consumer, max, into, |incoming| incoming.message.id().is_some()).await
    }
}

#[derive(Debug)]
struct StopsAfterReconnect;

#[async_trait]
impl Twist for StopsAfterReconnect {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        if at.connection.health().now().reconnects > 0 {
            std::future::pending::<()>().await;
        }
        consumer.receive(max, into).await
    }
}

/// Gives the first messages after a reconnect up.
#[derive(Debug, Default)]
struct LosesAfterReconnect(AtomicUsize);

#[async_trait]
impl Twist for LosesAfterReconnect {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let reconnected = || at.connection.health().now().reconnects > 0;
        receive_some(at, consumer, max, into, |_| !reconnected() || self.0.fetch_add(1, Ordering::SeqCst) >= 40).await
    }
}

#[derive(Debug, Default)]
struct SwallowsRedelivered(Mutex<HashSet<MessageId>>);

#[async_trait]
impl Twist for SwallowsRedelivered {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let is_new = |incoming: &Incoming| incoming.message.id().is_none_or(|id| lock(&self.0).insert(id.clone()));
        receive_some(at, consumer, max, into, is_new).await
    }
}

/// Acknowledges unread what has been on its way for long.
#[derive(Debug)]
struct DropsLate;

#[async_trait]
impl Twist for DropsLate {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let is_fresh = |incoming: &Incoming| {
            let age = incoming.message.time().and_then(|sent| polymq_core::now().duration_since(sent).ok());
            age.is_none_or(|age| age < Duration::from_millis(400))
        };
        receive_some(at, consumer, max, into, is_fresh).await
    }
}

/// Does not come back to a queue that was deleted.
#[derive(Debug, Default)]
struct StopsWhenDeleted(Mutex<HashSet<Address>>);

#[async_trait]
impl Twist for StopsWhenDeleted {
    async fn delete(&self, connection: &dyn Connection, address: &Address, group: Option<&str>) -> Result<()> {
        lock(&self.0).insert(address.clone());
        connection.delete(address, group).await
    }

    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        receive_some(at, consumer, max, into, |_| !lock(&self.0).contains(&at.address)).await
    }
}

/// Gives what comes again another id.
#[derive(Debug, Default)]
struct Renames(Mutex<HashSet<MessageId>>);

#[async_trait]
impl Twist for Renames {
    async fn receive(
        &self,
        _: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        for incoming in &mut into[before..] {
            let known = incoming.message.id().is_some_and(|id| !lock(&self.0).insert(id.clone()));
            if known {
                incoming.message = incoming.message.clone().with_id(MessageId::new());
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
struct AcksOnReceipt;

#[async_trait]
impl Twist for AcksOnReceipt {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        let settler: &Arc<dyn Settler> = &at.settler;
        for incoming in &into[before..] {
            settler.ack(incoming.token).await?;
        }
        // Until they are on the wire.
        tokio::time::sleep(Duration::from_secs(1)).await;
        Ok(())
    }

    fn ack(&self, _: &Receiving, _: Token) -> Completion<()> {
        Completion::ready(Ok(()))
    }
}
