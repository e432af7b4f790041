//! The loop of one subscription: fetch, hand to handlers within the limit, stop.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::task::JoinSet;

use super::{Env, Work};
use crate::{Consumer, Error, Incoming, Result};

/// The most messages that are fetched at once.
const BATCH: usize = 128;

/// Runs one subscription.
#[derive(Debug)]
pub(crate) struct Worker {
    env: Arc<Env>,
    consumer: Box<dyn Consumer>,
    ordered_by_key: bool,
    /// One at a time, in this task: nothing is handed to another thread.
    work: Work,
    fetched: Vec<Incoming>,
    /// Several at a time, in tasks of their own.
    ready: VecDeque<Incoming>,
    running: JoinSet<Option<String>>,
    /// Keys with a handler that runs, and what waits behind it.
    keys: HashMap<String, VecDeque<Incoming>>,
    waiting_for_key: usize,
    prefetch: usize,
    /// The most messages that one call of a handler takes.
    batch: usize,
    /// The limit has been above one: it may be again while a handler runs, which must not be alone in this task then.
    raised: bool,
}

impl Worker {
    pub(crate) fn new(env: Arc<Env>, consumer: Box<dyn Consumer>, ordered_by_key: bool, prefetch: usize) -> Self {
        Self {
            batch: env.entries.iter().map(|entry| entry.service.max_batch()).max().unwrap_or(1),
            work: Work::new(Arc::clone(&env)),
            env,
            consumer,
            ordered_by_key,
            fetched: Vec::new(),
            ready: VecDeque::new(),
            running: JoinSet::new(),
            keys: HashMap::new(),
            waiting_for_key: 0,
            prefetch,
            raised: false,
        }
    }

    /// Fetches and handles until stopped; an error is final for this consumer. Every handler that was started has
    /// ended or was dropped when this returns, and what was not handled is back with the broker.
    pub(crate) async fn run(mut self) -> Result<()> {
        let outcome = self.serve().await;
        let closed = self.consumer.close().await;
        self.drain().await;
        // Once more: what the handlers have settled since then is told too, before the process may end.
        let flushed = self.consumer.close().await;
        outcome.and(closed).and(flushed)
    }

    async fn serve(&mut self) -> Result<()> {
        let env = Arc::clone(&self.env);
        // Made once: to register with them anew for each fetch would cost more than the fetch.
        let (said, changed) = (env.stop.said(), env.control.changed());
        tokio::pin!(said, changed);
        while !env.stop.is_said() {
            let limit = env.control.concurrency();
            let paused = env.control.is_paused();
            self.raised |= limit > 1;
            if !paused {
                if limit == 1
                    && !self.raised
                    && self.running.is_empty()
                    && self.ready.is_empty()
                    && self.waiting_for_key == 0
                {
                    if !self.work.is_empty() {
                        self.work_alone().await;
                        continue;
                    }
                } else {
                    self.ready.extend(self.work.take_all());
                    self.start_ready(limit);
                }
            }
            self.tell_running(self.running.len());
            let room = self.room(limit);
            self.work.lend(&mut self.fetched);
            let outcome = tokio::select! {
                // What ends or changes this is looked at above too: messages at hand cannot hide it.
                biased;
                Some(ended) = self.running.join_next(), if !self.running.is_empty() => {
                    self.ended(ended.ok().flatten());
                    Ok(())
                }
                received = self.consumer.receive(room, &mut self.fetched), if room > 0 && !paused => received,
                () = &mut said => Ok(()),
                () = &mut changed => {
                    changed.set(env.control.changed());
                    Ok(())
                }
            };
            // Also what a call has fetched that was given up or failed.
            self.work.refill(&mut self.fetched);
            outcome?;
        }
        Ok(())
    }

    /// How many more messages to fetch: what can start soon, and within the prefetch in all.
    fn room(&self, limit: usize) -> usize {
        let held = self.ready.len() + self.waiting_for_key + self.running.len() + self.work.len();
        if limit == 1 || self.ready.len() < limit * self.batch {
            self.prefetch.saturating_sub(held).min(BATCH)
        } else {
            0
        }
    }

    async fn work_alone(&mut self) {
        self.tell_running(1);
        {
            // Pinned here: the macro would move it.
            let working = std::pin::pin!(self.work.process_alone());
            tokio::select! {
                biased;
                () = working => {}
                // Inside a block, so that nothing is made while no handler waits.
                () = async { self.env.cancelled.cancelled().await } => {}
            }
        }
        self.tell_running(0);
    }

    fn tell_running(&self, count: usize) {
        self.env.control.counters.running.store(count as u64, Ordering::Relaxed);
    }

    fn start_ready(&mut self, limit: usize) {
        while self.running.len() < limit {
            let Some(incoming) = self.ready.pop_front() else { return };
            let key = if self.ordered_by_key { incoming.message.key().map(str::to_owned) } else { None };
            if let Some(key) = &key {
                if let Some(behind) = self.keys.get_mut(key) {
                    behind.push_back(incoming);
                    self.waiting_for_key += 1;
                    continue;
                }
                self.keys.insert(key.clone(), VecDeque::new());
            }
            let mut work = Work::one(Arc::clone(&self.env), incoming);
            if !self.ordered_by_key {
                let more = self.ready.len().min(self.batch - 1);
                work.extend(self.ready.drain(..more));
            }
            self.start(work, key);
        }
    }

    fn start(&mut self, mut work: Work, key: Option<String>) {
        let env = Arc::clone(&self.env);
        self.running.spawn(async move {
            tokio::select! {
                biased;
                () = work.process() => {}
                () = env.cancelled.cancelled() => {}
            }
            key
        });
    }

    /// A handler has ended: the next of its key may start.
    fn ended(&mut self, key: Option<String>) {
        let Some(key) = key else { return };
        let Some(behind) = self.keys.get_mut(&key) else { return };
        if self.env.control.is_paused() {
            let behind = self.keys.remove(&key).unwrap_or_default();
            self.waiting_for_key -= behind.len();
            behind.into_iter().rev().for_each(|incoming| self.ready.push_front(incoming));
            return;
        }
        match behind.pop_front() {
            Some(next) => {
                // Takes the place of the one that has ended, so the limit holds.
                self.waiting_for_key -= 1;
                self.start(Work::one(Arc::clone(&self.env), next), Some(key));
            }
            None => drop(self.keys.remove(&key)),
        }
    }

    /// Waits for the handlers that run; the runner cancels them when its deadline has passed.
    async fn drain(&mut self) {
        let env = Arc::clone(&self.env);
        let release = |incoming: Incoming| env.origin.settler.release(incoming.token, incoming.message);
        self.ready.drain(..).for_each(release);
        self.keys.drain().flat_map(|(_, behind)| behind).for_each(release);
        // Dropped, it releases what it holds.
        self.work = Work::new(Arc::clone(&env));
        while self.running.join_next().await.is_some() {
            self.tell_running(self.running.len());
        }
    }
}

/// The pause before a consumer is opened again after a final error.
pub(crate) fn reopen_after(failures: u32) -> Duration {
    Duration::from_millis(500).saturating_mul(1 << failures.min(6))
}

/// Whether opening the consumer again can help.
pub(crate) fn is_final(error: &Error) -> bool {
    matches!(error.kind(), crate::ErrorKind::Closed | crate::ErrorKind::Unsupported | crate::ErrorKind::Config)
}
