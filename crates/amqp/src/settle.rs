//! Acknowledgements: as few frames as the broker allows, and never one that covers an unfinished message.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::FutureExt;
use lapin::{
    Channel,
    options::{BasicAckOptions, BasicNackOptions},
};
use polymq_core::{ATTEMPT, Completion, Error, ErrorKind, Incoming, Message, Result, Settler, Token, now};
use tokio::{sync::Notify, time::Instant};

use crate::{
    config::QueueType,
    error,
    pool::{Answer, Outgoing, Publishers, Route},
    topology::QueuePlan,
    window::{Ack, AckWindow},
};

/// How long an acknowledgement may wait for company. Nobody sees the wait: the prefetch window is refilled at half, and
/// after a pause nothing waits. Shorter makes more frames under load, each of which costs the broker a wake-up.
pub(crate) const TICK: Duration = Duration::from_millis(5);
/// The most acknowledgements that wait; half the prefetch window if that is less, so that it never runs dry.
const MAX_PENDING: usize = 64;

/// What one consumer's reader, handlers and background task share.
#[derive(Debug)]
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Something arrived, or reading is over.
    pub(crate) arrived: Notify,
    /// The background task has something to do.
    pub(crate) work: Notify,
    publishers: Arc<Publishers>,
    limit: usize,
    /// The queue ends with its connection.
    exclusive: bool,
    queue_type: QueueType,
}

#[derive(Debug)]
struct State {
    generation: u64,
    channel: Option<Channel>,
    queue: Arc<str>,
    window: AckWindow,
    buffer: VecDeque<Incoming>,
    last_flush: Instant,
    /// The background task will come back within a tick.
    armed: bool,
    closing: bool,
    /// Nobody can settle any more.
    abandoned: bool,
    /// Why reading is over.
    end: Option<(ErrorKind, String)>,
}

/// Tags are counted from one on every channel; the generation of the channel makes them unique.
const TAG_BITS: u32 = 40;

fn split(token: Token) -> (u64, u64) {
    (token.0 >> TAG_BITS, token.0 & ((1 << TAG_BITS) - 1))
}

impl State {
    fn tag(&self, token: Token) -> Option<u64> {
        let (generation, tag) = split(token);
        (self.channel.is_some() && !self.abandoned && generation == self.generation).then_some(tag)
    }

    fn flush(&mut self, tick: bool, all: bool) {
        let Some(channel) = &self.channel else { return };
        for Ack { tag, multiple } in self.window.flush(tick, all) {
            // The first poll hands the frame to the connection. If there is none any more, its end is on its way.
            let _ = channel.basic_ack(tag, BasicAckOptions { multiple }).now_or_never();
        }
        self.last_flush = Instant::now();
    }

    fn give_back(&mut self, tag: u64) {
        if let Some(channel) = self.channel.as_ref().filter(|_| self.window.returned(tag)) {
            let requeue = BasicNackOptions { requeue: true, multiple: false };
            let _ = channel.basic_nack(tag, requeue).now_or_never();
        }
    }
}

impl Shared {
    pub(crate) fn new(plan: &QueuePlan, prefetch: usize, publishers: Arc<Publishers>) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                generation: 0,
                channel: None,
                queue: Arc::clone(&plan.name),
                window: AckWindow::default(),
                buffer: VecDeque::new(),
                last_flush: Instant::now(),
                armed: false,
                closing: false,
                abandoned: false,
                end: None,
            }),
            arrived: Notify::new(),
            work: Notify::new(),
            publishers,
            limit: MAX_PENDING.min(prefetch / 2).max(1),
            exclusive: plan.exclusive,
            queue_type: plan.queue_type,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new channel reads now; tokens of before are stale.
    pub(crate) fn begin(&self, channel: Channel, queue: Arc<str>) -> u64 {
        let mut state = self.lock();
        state.generation += 1;
        state.channel = Some(channel);
        state.queue = queue;
        state.window = AckWindow::default();
        state.generation
    }

    /// The channel is gone, and with it everything that was fetched: the broker delivers it again.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        state.channel = None;
        state.buffer.clear();
        state.window = AckWindow::default();
    }

    pub(crate) fn push(&self, generation: u64, batch: &mut Vec<Incoming>) {
        let mut state = self.lock();
        for incoming in batch.drain(..) {
            let tag = incoming.token.0;
            state.window.delivered(tag);
            state.buffer.push_back(Incoming { token: Token(generation << TAG_BITS | tag), ..incoming });
        }
        drop(state);
        self.arrived.notify_one();
    }

    /// Up to `max` messages; `None` when there is none yet.
    pub(crate) fn take(&self, max: usize, into: &mut Vec<Incoming>) -> Option<Result<()>> {
        let mut state = self.lock();
        if let Some((kind, reason)) = &state.end {
            let error = Error::new(*kind, reason.clone()).with_backend(crate::NAME).with_operation("receive");
            return Some(Err(error.with_channel(&*state.queue)));
        }
        if state.closing {
            return Some(Err(error::closed("receive")));
        }
        if state.buffer.is_empty() {
            return None;
        }
        let count = max.max(1).min(state.buffer.len());
        into.extend(state.buffer.drain(..count));
        Some(Ok(()))
    }

    /// Reading is over for good.
    pub(crate) fn fail(&self, error: &Error) {
        self.lock().end = Some((error.kind(), error.message().to_owned()));
        self.arrived.notify_one();
    }

    /// Asks the background task to stop fetching. From now on no acknowledgement waits for company: the answer to the cancellation
    /// comes after what was handed over before it. A quorum queue keeps what exceeds some thirty commands on their way, as the returns
    /// that follow may, and forgets it with the channel.
    pub(crate) fn start_close(&self) {
        let mut state = self.lock();
        state.flush(false, true);
        state.closing = true;
        drop(state);
        self.arrived.notify_one();
        self.work.notify_one();
    }

    /// Hands the last acknowledgements over, and asks the background task to end, settled or not. What is settled from
    /// now on is stale: the task may take its time.
    pub(crate) fn abandon(&self) {
        let mut state = self.lock();
        state.flush(false, true);
        state.abandoned = true;
        drop(state);
        self.work.notify_one();
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.lock().closing
    }

    /// Nothing is left to settle, or nobody who could.
    pub(crate) fn is_finished(&self) -> bool {
        let state = self.lock();
        state.abandoned || state.window.is_empty()
    }

    /// Returns what was fetched and not received, and hands all acknowledgements over.
    pub(crate) fn wind_up(&self) {
        let mut state = self.lock();
        let unread: Vec<Token> = state.buffer.drain(..).map(|incoming| incoming.token).collect();
        for token in unread {
            state.give_back(split(token).1);
        }
        state.flush(false, true);
    }

    /// Whether acknowledgements wait for company.
    pub(crate) fn is_armed(&self) -> bool {
        self.lock().armed
    }

    /// Sends what has waited long enough.
    pub(crate) fn tick(&self) {
        let mut state = self.lock();
        state.flush(true, false);
        state.armed = state.window.pending() > 0;
    }

    /// Whether a delivery is ours and unsettled.
    pub(crate) fn is_open(&self, token: Token) -> bool {
        self.queue_of(token).is_ok()
    }

    /// The queue that a delivery came from, while it is ours.
    fn queue_of(&self, token: Token) -> Result<Arc<str>> {
        let state = self.lock();
        match state.tag(token) {
            Some(tag) if state.window.is_open(tag) => Ok(Arc::clone(&state.queue)),
            _ => Err(error::stale()),
        }
    }

    /// The message is done.
    pub(crate) fn finish(&self, token: Token) -> Result<()> {
        let mut state = self.lock();
        match state.tag(token) {
            Some(tag) if state.window.done(tag) => {}
            _ => return Err(error::stale()),
        }
        let full = state.window.pending() >= self.limit;
        // After a pause there is no company to wait for.
        if full || (state.window.has_prefix() && state.last_flush.elapsed() >= TICK) || state.closing {
            let all = !state.window.has_prefix();
            state.flush(false, all);
        }
        let wake = state.closing || (!state.armed && state.window.pending() > 0);
        if wake {
            state.armed = true;
            drop(state);
            self.work.notify_one();
        }
        Ok(())
    }

    fn release(&self, token: Token) {
        let mut state = self.lock();
        if let Some(tag) = state.tag(token) {
            state.give_back(tag);
            if state.closing {
                self.work.notify_one();
            }
        }
    }
}

/// The settler of one consumer. An acknowledgement of AMQP has no answer, so it is done when it is handed over; if the
/// connection ends before it is written, the broker delivers the message again, as it does when it ends right after.
#[derive(Debug)]
pub(crate) struct AmqpSettler(pub(crate) Arc<Shared>);

impl Settler for AmqpSettler {
    fn ack(&self, token: Token) -> Completion<()> {
        Completion::ready(self.0.finish(token))
    }

    fn release(&self, token: Token, _message: Message) {
        self.0.release(token);
    }

    fn retry(&self, token: Token, message: &Message, attempt: u32, after: Duration) -> Completion<()> {
        let queue = match self.0.queue_of(token) {
            Ok(queue) => queue,
            Err(error) => return Completion::ready(Err(error)),
        };
        let mut copy = message.clone().without_deliver_at();
        copy.set_system_header(ATTEMPT, attempt.to_string());
        if !after.is_zero() {
            copy = copy.with_deliver_at(now() + after);
        }
        let (completer, completion) = Completion::queued();
        let answer = Answer::Retry { completer, shared: Arc::clone(&self.0), token };
        let route = Route::to_queue(queue, self.0.exclusive, self.0.queue_type);
        self.0.publishers.send(Outgoing { message: copy, route, answer });
        completion
    }
}

impl Drop for AmqpSettler {
    fn drop(&mut self) {
        self.0.abandon();
    }
}
