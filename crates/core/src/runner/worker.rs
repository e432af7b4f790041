//! The loop of one subscription: fetch, hand to handlers within the limit, stop.

use std::{
    collections::{HashMap, VecDeque},
    panic::AssertUnwindSafe,
    sync::{Arc, atomic::Ordering},
};

use futures_util::FutureExt;
use tokio::task::JoinSet;

use super::{Env, Work, supervise::broke_off};
use crate::{Consumer, Error, Incoming, Result, consumer};

/// The most messages that are fetched at once.
const BATCH: usize = 128;

/// Runs one subscription.
#[derive(Debug)]
pub(crate) struct Worker {
    env: Arc<Env>,
    /// `None`: it has ended, and another one is to be opened.
    consumer: Option<Box<dyn Consumer>>,
    ordered_by_key: bool,
    /// One at a time, in this task: nothing is handed to another thread.
    work: Work,
    fetched: Vec<Incoming>,
    /// Several at a time, in tasks of their own.
    ready: VecDeque<Incoming>,
    running: JoinSet<Ended>,
    /// What starts before that, each with its key: kept over a pause, or the next of a key whose handler has ended.
    next: VecDeque<(Option<String>, Work)>,
    /// Keys with a handler that runs or is the next to, and what waits behind it.
    keys: HashMap<String, VecDeque<Incoming>>,
    waiting_for_key: usize,
    prefetch: usize,
    /// The most messages that one call of a handler takes.
    batch: usize,
    /// The limit has been above one: it may be again while a handler runs, which must not be alone in this task then.
    raised: bool,
}

/// A task of handlers has ended.
#[derive(Debug)]
struct Ended {
    key: Option<String>,
    /// With what is left, when it was paused or stopped before it was done.
    work: Work,
    /// It panicked outside of any handler.
    broke_off: Option<Error>,
}

impl Worker {
    pub(crate) fn new(env: Arc<Env>, consumer: Box<dyn Consumer>, ordered_by_key: bool, prefetch: usize) -> Self {
        Self {
            batch: env.entries.iter().map(|entry| entry.service.max_batch()).max().unwrap_or(1),
            work: Work::alone(Arc::clone(&env)),
            env,
            consumer: Some(consumer),
            ordered_by_key,
            fetched: Vec::new(),
            ready: VecDeque::new(),
            running: JoinSet::new(),
            next: VecDeque::new(),
            keys: HashMap::new(),
            waiting_for_key: 0,
            prefetch,
            raised: false,
        }
    }

    /// Fetches and handles until stopped; an error is final for this consumer, and handlers may go on then.
    pub(crate) async fn serve(&mut self) -> Result<()> {
        let Some(mut consumer) = self.consumer.take() else { return Ok(()) };
        let outcome = self.serve_from(&mut *consumer).await;
        self.consumer = Some(consumer);
        outcome
    }

    async fn serve_from(&mut self, consumer: &mut dyn Consumer) -> Result<()> {
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
                    self.spread();
                    self.start_ready(limit);
                }
            }
            self.tell_running(self.running.len());
            let room = self.room(limit);
            self.work.lend(&mut self.fetched);
            let outcome = tokio::select! {
                // What ends or changes this is looked at above too: messages at hand cannot hide it.
                biased;
                Some(ended) = self.running.join_next(), if !self.running.is_empty() => ended.map_or(Ok(()), |ended| self.ended(ended)),
                received = consumer::receive(consumer, room, &mut self.fetched), if room > 0 && !paused => received,
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
        let next: usize = self.next.iter().map(|(_, work)| work.len()).sum();
        let held = self.ready.len() + self.waiting_for_key + self.running.len() + self.work.len() + next;
        if limit == 1 || self.ready.len() < limit * self.batch {
            self.prefetch.saturating_sub(held).min(BATCH)
        } else {
            0
        }
    }

    async fn work_alone(&mut self) {
        self.tell_running(1);
        tokio::select! {
            biased;
            () = self.work.process() => {}
            // Inside a block, so that nothing is made while no handler waits.
            () = async { self.env.cancelled.cancelled().await } => {}
        }
        self.tell_running(0);
    }

    fn tell_running(&self, count: usize) {
        self.env.control.counters.running.store(count as u64, Ordering::Relaxed);
    }

    /// What was to be handled one at a time is for several from here on. No key has a handler yet when the front was tried.
    fn spread(&mut self) {
        if let Some(tried) = self.work.take_tried() {
            let key = if self.ordered_by_key { tried.view().message.key().map(str::to_owned) } else { None };
            self.keys.extend(key.clone().map(|key| (key, VecDeque::new())));
            self.next.push_back((key, tried));
        }
        self.ready.extend(self.work.take_all());
    }

    fn start_ready(&mut self, limit: usize) {
        while self.running.len() < limit {
            if let Some((key, work)) = self.next.pop_front() {
                self.start(work, key);
                continue;
            }
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
            let more = if self.ordered_by_key { 0 } else { self.packed_with(&incoming) };
            let mut work = Work::one(Arc::clone(&self.env), incoming);
            work.extend(self.ready.drain(..more));
            self.start(work, key);
        }
    }

    /// How many of the next ones the call of this message's handler takes too: others would stand still behind it.
    fn packed_with(&self, incoming: &Incoming) -> usize {
        let Some(index) = self.env.find(&incoming.message) else { return 0 };
        let most = self.env.entries[index].service.max_batch() - 1;
        self.ready.iter().take(most).take_while(|next| self.env.find(&next.message) == Some(index)).count()
    }

    fn start(&mut self, mut work: Work, key: Option<String>) {
        let env = Arc::clone(&work.env);
        self.running.spawn(async move {
            let working = AssertUnwindSafe(async {
                tokio::select! {
                    biased;
                    () = work.process() => {}
                    () = env.cancelled.cancelled() => {}
                }
            });
            let broke_off = working.catch_unwind().await.err().map(|panic| broke_off(panic.as_ref()));
            Ended { key, work, broke_off }
        });
    }

    /// What it has left, or the next of its key, starts as soon as the limit allows.
    fn ended(&mut self, ended: Ended) -> Result<()> {
        let Ended { key, mut work, broke_off } = ended;
        if broke_off.is_some() || !Arc::ptr_eq(&work.env, &self.env) {
            // Back to the broker; that of a consumer that has ended has given it to another one anyway.
            work = Work::new(Arc::clone(&self.env));
        }
        if let (true, Some(key)) = (work.is_empty(), &key) {
            let next = self.keys.get_mut(key).and_then(VecDeque::pop_front);
            self.waiting_for_key -= usize::from(next.is_some());
            if next.is_none() {
                self.keys.remove(key);
            }
            work.extend(next.into_iter());
        }
        if !work.is_empty() {
            self.next.push_back((key, work));
        }
        broke_off.map_or(Ok(()), Err)
    }

    /// Fetches nothing more, and gives back what no handler has. Those that run go on.
    pub(crate) async fn close(&mut self) -> Result<()> {
        let closed = self.close_consumer().await;
        let env = Arc::clone(&self.env);
        let release = |incoming: Incoming| env.origin.settler.release(incoming.token, incoming.message);
        self.fetched.drain(..).for_each(release);
        self.ready.drain(..).for_each(release);
        self.keys.values_mut().flat_map(|behind| behind.drain(..)).for_each(release);
        self.waiting_for_key = 0;
        // Dropped, they release what they hold.
        for (key, _) in self.next.drain(..) {
            key.and_then(|key| self.keys.remove(&key));
        }
        self.work = Work::alone(env);
        closed
    }

    /// Ends the consumer, after [`close`](Self::close): what handlers have settled since is told to the broker.
    pub(crate) async fn end_consumer(&mut self) -> Result<()> {
        let closed = self.close_consumer().await;
        self.consumer = None;
        closed
    }

    async fn close_consumer(&mut self) -> Result<()> {
        match &mut self.consumer {
            Some(consumer) => consumer.close().await,
            None => Ok(()),
        }
    }

    /// Goes on with another consumer. Handlers that still run keep their places and keys.
    pub(crate) fn reopened(&mut self, env: Arc<Env>, consumer: Box<dyn Consumer>) {
        self.consumer = Some(consumer);
        self.work = Work::alone(Arc::clone(&env));
        self.env = env;
    }

    /// Closes, and waits for the handlers that run; the runner cancels them when its deadline has passed. Every handler that
    /// was started has ended or was dropped when this returns, and what was not handled is back with the broker.
    pub(crate) async fn end(&mut self) -> Result<()> {
        let closed = self.close().await;
        while self.running.join_next().await.is_some() {
            self.tell_running(self.running.len());
        }
        // Once more: what the handlers have settled since then is told too, before the process may end.
        closed.and(self.end_consumer().await)
    }
}
