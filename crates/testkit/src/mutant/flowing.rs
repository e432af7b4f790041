//! Mutants whose messages stop flowing, or flow again when they should not.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    ATTEMPT, Address, Completion, Connection, ConsumeOptions, Consumer, Error, HealthState, Incoming, Message,
    ProduceOptions, Result, Token,
};
use tokio::time::Instant;

use super::{Mutant, mutant};
use crate::{
    cx::lock,
    twist::{Receiving, Twist},
};

pub(super) const MUTANTS: &[Mutant] = &[
    mutant("stops_when_it_was_full", || Arc::new(StopsWhenFull::default()), &["O6_saturated_then_acked"]),
    mutant(
        "keeps_delays_in_memory",
        || Arc::new(KeepsDelaysInMemory),
        &["R9_killed_in_backoff", "R9_broker_killed_in_backoff"],
    ),
    mutant("takes_back_what_takes_long", || Arc::new(TakesBack::default()), &["O8_long_handler_runs_once"]),
    mutant("sleeps_through_a_pause", || Arc::new(SleepsThroughPauses::default()), &["O9_pause_keeps_the_session"]),
    mutant("jams_when_many_close", || Arc::new(JamsWhenManyClose::default()), &["L5_many_close_at_once"]),
    mutant("serves_one_queue", || Arc::new(ServesOneQueue::default()), &["O10_queues_are_served_fairly"]),
];

/// A consumer that has once held as much as it may is never served again.
#[derive(Debug, Default)]
struct StopsWhenFull {
    prefetch: Mutex<usize>,
    held: Mutex<HashMap<u64, usize>>,
    full: Mutex<HashSet<u64>>,
}

#[async_trait]
impl Twist for StopsWhenFull {
    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        *lock(&self.prefetch) = options.prefetch;
        connection.consumer(address, options).await
    }

    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        if lock(&self.full).contains(&at.id) {
            std::future::pending::<()>().await;
        }
        let before = into.len();
        consumer.receive(max, into).await?;
        let mut held = lock(&self.held);
        let count = held.entry(at.id).or_default();
        *count += into.len() - before;
        if *count >= *lock(&self.prefetch) {
            lock(&self.full).insert(at.id);
        }
        Ok(())
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        if let Some(count) = lock(&self.held).get_mut(&at.id) {
            *count -= 1;
        }
        at.settler.ack(token)
    }
}

type Lent = HashMap<(u64, Token), Message>;

/// What is not settled within three seconds is given to somebody else, whoever asks for more time.
#[derive(Debug, Default)]
struct TakesBack(Arc<Mutex<Lent>>);

#[async_trait]
impl Twist for TakesBack {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let before = into.len();
        consumer.receive(max, into).await?;
        for incoming in &into[before..] {
            let key = (at.id, incoming.token);
            lock(&self.0).insert(key, incoming.message.clone());
            let (lent, settler) = (Arc::clone(&self.0), Arc::clone(&at.settler));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(3)).await;
                let taken_back = lock(&lent).remove(&key);
                if let Some(message) = taken_back {
                    settler.release(key.1, message);
                }
            });
        }
        Ok(())
    }

    fn ack(&self, at: &Receiving, token: Token) -> Completion<()> {
        match lock(&self.0).remove(&(at.id, token)) {
            Some(_) => at.settler.ack(token),
            None => Completion::ready(Ok(())),
        }
    }

    fn release(&self, at: &Receiving, token: Token, message: Message) {
        if lock(&self.0).remove(&(at.id, token)).is_some() {
            at.settler.release(token, message);
        }
    }

    fn extend(&self, _: &Receiving, _: Token, _: Duration) -> Completion<()> {
        Completion::ready(Ok(()))
    }
}

/// A consumer that did not ask for three seconds is forgotten.
#[derive(Debug, Default)]
struct SleepsThroughPauses(Mutex<HashMap<u64, Instant>>);

/// Remembers when a call ended, however it ended.
struct Asking<'a>(&'a Mutex<HashMap<u64, Instant>>, u64);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        lock(self.0).insert(self.1, Instant::now());
    }
}

#[async_trait]
impl Twist for SleepsThroughPauses {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let asked = lock(&self.0).get(&at.id).copied();
        if asked.is_some_and(|asked| asked.elapsed() > Duration::from_secs(3)) {
            std::future::pending::<()>().await;
        }
        let _asking = Asking(&self.0, at.id);
        consumer.receive(max, into).await
    }
}

/// The first queue that has a message is served, and no other.
#[derive(Debug, Default)]
struct ServesOneQueue(Mutex<Option<u64>>);

#[async_trait]
impl Twist for ServesOneQueue {
    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        let served = *lock(&self.0);
        if served.is_some_and(|served| served != at.id) {
            std::future::pending::<()>().await;
        }
        let before = into.len();
        consumer.receive(max, into).await?;
        if into.len() > before {
            lock(&self.0).get_or_insert(at.id);
        }
        Ok(())
    }
}

/// When a consumer closes while many others of its queue are there, the queue is served no more.
#[derive(Debug, Default)]
struct JamsWhenManyClose {
    open: Mutex<HashMap<Address, usize>>,
    jammed: Mutex<HashSet<Address>>,
}

#[async_trait]
impl Twist for JamsWhenManyClose {
    async fn consumer(
        &self,
        connection: &dyn Connection,
        address: &Address,
        options: &ConsumeOptions,
    ) -> Result<Box<dyn Consumer>> {
        *lock(&self.open).entry(address.clone()).or_default() += 1;
        connection.consumer(address, options).await
    }

    async fn receive(
        &self,
        at: &Receiving,
        consumer: &mut dyn Consumer,
        max: usize,
        into: &mut Vec<Incoming>,
    ) -> Result<()> {
        if lock(&self.jammed).contains(&at.address) {
            std::future::pending::<()>().await;
        }
        consumer.receive(max, into).await
    }

    async fn close_consumer(&self, at: &Receiving, consumer: &mut dyn Consumer) -> Result<()> {
        if let Some(open) = lock(&self.open).get_mut(&at.address) {
            *open -= 1;
            if *open > 3 {
                lock(&self.jammed).insert(at.address.clone());
            }
        }
        consumer.close().await
    }
}

/// Settles what is to be tried later and remembers it as long as the process lives and the connection is up.
#[derive(Debug)]
struct KeepsDelaysInMemory;

impl Twist for KeepsDelaysInMemory {
    fn retry(&self, at: &Receiving, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        let (connection, address, mut message) = (Arc::clone(&at.connection), at.address.clone(), message.clone());
        message.set_system_header(ATTEMPT, attempt.to_string());
        tokio::spawn(async move {
            let mut health = connection.health();
            let is_lost = async { while health.changed().await.is_some_and(|now| now.state != HealthState::Down) {} };
            if tokio::time::timeout(after, is_lost).await.is_err() {
                let producer = connection.producer(&address, &ProduceOptions::default()).await?;
                producer.send(message).await?;
            }
            Ok::<(), Error>(())
        });
        at.settler.ack(token)
    }
}
