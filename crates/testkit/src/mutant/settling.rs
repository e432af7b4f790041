//! Mutants that settle something else than they are told.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{Capabilities, Completion, Connection, Consumer, Error, Incoming, Message, Result, Token};

use super::{Mutant, mutant};
use crate::{
    cx::lock,
    twist::{Receiving, Twist},
};

pub(super) const MUTANTS: &[Mutant] = &[
    mutant(
        "loses_acks",
        || Arc::new(LosesAcks::default()),
        &["S1_ack", "S1_drop", "S2_settle_from_other_tasks", "S6_acknowledgement_modes"],
    ),
    mutant(
        "retry_loses",
        || Arc::new(RetryLoses),
        &["S1_requeue", "S2_retry_while_closing", "S6_handler_panics", "S6_handler_times_out"],
    ),
    mutant("loses_what_often_returns", || Arc::new(LosesWhatOftenReturns::default()), &["S1_requeued_by_several"]),
    mutant(
        "ignores_delays",
        || Arc::new(IgnoresDelays),
        &["S1_delayed_nack", "R1_schedule", "R1_jitter", "R7_retries_do_not_block"],
    ),
    mutant("goes_by_the_wall_clock", || Arc::new(GoesByTheWallClock), &["F18_clock_jumps"]),
    mutant("refuses_long_delays", || Arc::new(RefusesLongDelays), &["S1_delay_bound"]),
    mutant("returns_what_is_acked_late", || Arc::new(ReturnsLateAcks::default()), &["S2_settle_after_consumer_close"]),
    mutant(
        "settles_after_close",
        || Arc::new(SettlesAfterClose::default()),
        &["S2_settle_after_bus_close", "L5_close_is_idempotent"],
    ),
    mutant("claims_leases", || Arc::new(ClaimsLeases), &["S2_lease_extension", "S2_settle_after_lease"]),
    mutant(
        "acks_what_is_dropped",
        || Arc::new(AcksWhatIsDropped),
        &[
            "S3_dropped_delivery_returns",
            "S6_handler_cancelled",
            "S9_released_comes_again",
            "L1_deadline_returns_the_rest",
            "L2_force",
            "F11_member_joins_and_leaves",
        ],
    ),
    mutant(
        "acks_cumulatively",
        || Arc::new(AcksCumulatively::default()),
        &["S4_out_of_order_acks", "S4_out_of_order_acks_kill"],
    ),
    mutant("retry_returns_all", || Arc::new(RetryReturnsAll::default()), &["S5_bad_message_in_a_batch"]),
    mutant("counts_cancelled", || Arc::new(CountsCancelled), &["S7_cancelled_is_not_failed"]),
    mutant("retries_to_the_front", || Arc::new(RetriesToTheFront), &["S9_retry_comes_as_declared"]),
    mutant("retry_forgets_state", || Arc::new(RetryForgetsState), &["R10_finished_handlers_rest"]),
    mutant("loses_delayed_at_close", || Arc::new(LosesDelayed::default()), &["R9_restart_in_backoff"]),
];

type Key = (u64, Token);

fn done() -> Completion<()> {
    Completion::ready(Ok(()))
}

/// What consumers hold, in the order in which they got it.
#[derive(Debug, Default)]
struct Held(Mutex<Holding>);

#[derive(Debug, Default)]
struct Holding {
    received: u64,
    messages: HashMap<Key, (u64, Message)>,
}

impl Held {
    fn add(&self, at: &Receiving, received: &[Incoming]) {
        let mut held = lock(&self.0);
        for incoming in received {
            held.received += 1;
            let order = held.received;
            held.messages.insert((at.id, incoming.token), (order, incoming.message.clone()));
        }
    }

    fn remove(&self, at: &Receiving, token: Token) -> Option<(u64, Message)> {
        lock(&self.0).messages.remove(&(at.id, token))
    }

    /// Takes those of this consumer that came before, or all.
    fn take(&self, at: &Receiving, before: u64) -> Vec<(Token, Message)> {
        let mut held = lock(&self.0);
        let of_before = |(key, (order, _)): &(&Key, &(u64, Message))| key.0 == at.id && *order < before;
        let keys: Vec<Key> = held.messages.iter().filter(of_before).map(|(key, _)| *key).collect();
        keys.into_iter().filter_map(|key| held.messages.remove(&key).map(|(_, message)| (key.1, message))).collect()
    }
}

/// Says yes and does nothing; the messages are back when the consumer closes.
#[derive(Debug, Default)]
struct LosesAcks {
    held: Held,
    lost: Held,
}

#[async_trait]
impl Twist for LosesAcks {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        self.held.add(at, &into[before..]);
        Ok(())
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        if let Some((_, message)) = self.held.remove(at, token) {
            self.lost.add(at, &[Incoming::new(message, token)]);
        }
        done()
    }

    async fn close_consumer(&self, at: &Receiving, consumer: &mut dyn Consumer) -> Result<()> {
        for (token, message) in self.lost.take(at, u64::MAX) {
            at.settler.release(token, message);
        }
        consumer.close().await
    }
}

#[derive(Debug)]
struct RetryLoses;

impl Twist for RetryLoses {
    fn retry(&self, at: &Receiving, token: Token, _: &Message, _: u32, _: Duration) -> Completion<()> {
        at.settler.ack(token)
    }
}

/// Returns a hundred messages, and no more.
#[derive(Debug, Default)]
struct LosesWhatOftenReturns(AtomicUsize);

impl Twist for LosesWhatOftenReturns {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if self.0.fetch_add(1, Ordering::SeqCst) < 100 {
            at.settler.retry(token, message, attempt, after)
        } else {
            at.settler.ack(token)
        }
    }
}

#[derive(Debug)]
struct IgnoresDelays;

impl Twist for IgnoresDelays {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, _: Duration) -> Completion<()> {
        at.settler.retry(token, message, attempt, Duration::ZERO)
    }
}

/// Looks at the clock on the wall until it is time.
#[derive(Debug)]
struct GoesByTheWallClock;

impl Twist for GoesByTheWallClock {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        let (settler, message, due) = (Arc::clone(&at.settler), message.clone(), polymq_core::now() + after);
        Completion::future(async move {
            while polymq_core::now() < due {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            settler.retry(token, &message, attempt, Duration::ZERO).await
        })
    }
}

#[derive(Debug)]
struct RefusesLongDelays;

impl Twist for RefusesLongDelays {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if after > Duration::from_secs(60) {
            return Completion::ready(Err(Error::unsupported("this", "a long delay")));
        }
        at.settler.retry(token, message, attempt, after)
    }
}

#[derive(Debug, Default)]
struct ReturnsLateAcks {
    held: Held,
    closed: AtomicBool,
}

#[async_trait]
impl Twist for ReturnsLateAcks {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        self.held.add(at, &into[before..]);
        Ok(())
    }

    async fn close_consumer(&self, _: &Receiving, consumer: &mut dyn Consumer) -> Result<()> {
        self.closed.store(true, Ordering::SeqCst);
        consumer.close().await
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        match self.held.remove(at, token) {
            Some((_, message)) if self.closed.load(Ordering::SeqCst) => at.settler.release(token, message),
            _ => return at.settler.ack(token),
        }
        done()
    }
}

#[derive(Debug, Default)]
struct SettlesAfterClose(AtomicBool);

#[async_trait]
impl Twist for SettlesAfterClose {
    async fn close(&self, connection: &dyn Connection) -> Result<()> {
        self.0.store(true, Ordering::SeqCst);
        connection.close().await
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        if self.0.load(Ordering::SeqCst) { done() } else { at.settler.ack(token) }
    }
}

#[derive(Debug)]
struct ClaimsLeases;

impl Twist for ClaimsLeases {
    fn capabilities(&self, own: Capabilities) -> Capabilities {
        Capabilities { leases: true, ..own }
    }
}

#[derive(Debug)]
struct AcksWhatIsDropped;

impl Twist for AcksWhatIsDropped {
    fn release(&self, at: &Receiving, token: Token, _: Message) {
        drop(at.settler.ack(token));
    }
}

#[derive(Debug, Default)]
struct AcksCumulatively(Held);

#[async_trait]
impl Twist for AcksCumulatively {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        self.0.add(at, &into[before..]);
        Ok(())
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        // What a later acknowledgement has covered is done already.
        let Some((order, _)) = self.0.remove(at, token) else { return done() };
        for (earlier, _) in self.0.take(at, order) {
            drop(at.settler.ack(earlier));
        }
        at.settler.ack(token)
    }

    fn release(&self, at: &Receiving, token: Token, message: Message) {
        if self.0.remove(at, token).is_some() {
            at.settler.release(token, message);
        }
    }
}

#[derive(Debug, Default)]
struct RetryReturnsAll(Held);

#[async_trait]
impl Twist for RetryReturnsAll {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        self.0.add(at, &into[before..]);
        Ok(())
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        if self.0.remove(at, token).is_some() { at.settler.ack(token) } else { done() }
    }

    fn release(&self, at: &Receiving, token: Token, message: Message) {
        if self.0.remove(at, token).is_some() {
            at.settler.release(token, message);
        }
    }

    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        if self.0.remove(at, token).is_none() {
            return done();
        }
        let answer = at.settler.retry(token, message, attempt, after);
        for (token, message) in self.0.take(at, u64::MAX) {
            at.settler.release(token, message);
        }
        answer
    }
}

#[derive(Debug)]
struct CountsCancelled;

impl Twist for CountsCancelled {
    fn release(&self, at: &Receiving, token: Token, message: Message) {
        drop(at.settler.retry(token, &message, 2, Duration::ZERO));
    }
}

#[derive(Debug)]
struct RetriesToTheFront;

impl Twist for RetriesToTheFront {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, _: u32, _: Duration) -> Completion<()> {
        at.settler.release(token, message.clone());
        done()
    }
}

/// The message comes again without what polymq has noted on it.
#[derive(Debug)]
struct RetryForgetsState;

impl Twist for RetryForgetsState {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        let mut message = message.clone();
        message.clear_system_headers();
        at.settler.retry(token, &message, attempt, after)
    }
}

/// Keeps delays in the process and forgets them when the connection closes.
#[derive(Debug, Default)]
struct LosesDelayed(Mutex<Vec<tokio::task::JoinHandle<()>>>);

#[async_trait]
impl Twist for LosesDelayed {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        let (settler, message) = (Arc::clone(&at.settler), message.clone());
        lock(&self.0).push(tokio::spawn(async move {
            tokio::time::sleep(after).await;
            drop(settler.retry(token, &message, attempt, Duration::ZERO).await);
        }));
        done()
    }

    async fn close(&self, connection: &dyn Connection) -> Result<()> {
        lock(&self.0).drain(..).for_each(|task| task.abort());
        connection.close().await
    }
}
