//! Sending many messages with one call.

use std::{collections::VecDeque, future::poll_fn, mem, task::Poll, time::Duration};

use futures_util::FutureExt;
use tokio::{
    task::coop,
    time::{Instant, timeout_at},
};

use super::{Channel, counters::Counters};
use crate::{Completion, Error, Message, Outgoing, Receipt, Result, message::Stamp};

/// After so many messages sent in one call other tasks get their turn, as tokio's own budget has it.
const YIELD_AFTER: usize = 128;

impl Channel {
    /// Sends many messages with a sliding window of unconfirmed ones; answers in their order, one each.
    ///
    /// Each message has the time-out of a send, from when it is handed over. The window is the call's own: sends beside it do not
    /// count, and it waits for room whatever [`with_window`](Self::with_window) says about a full one. What
    /// [`with_repeats`](Self::with_repeats) repeats is sent again behind all others. Layers are run around single messages:
    /// with any, one is sent after the other.
    ///
    /// Never waits for a whole batch: that costs a quarter of the throughput on some brokers and nearly all on others. Where
    /// answers come many at a time (Kafka), half of the window is waited for at once.
    pub async fn send_all(&self, messages: impl IntoIterator<Item = Message>) -> Vec<Result<Receipt>> {
        let messages = messages.into_iter();
        if !self.0.parts.layers.is_empty() {
            let mut results = Vec::with_capacity(messages.size_hint().0);
            for message in messages {
                results.push(self.send_message(message).await);
            }
            return results;
        }
        if self.0.sending.repeats > 0 {
            return Box::pin(self.send_all_repeatedly(messages.collect())).await;
        }
        self.send_all_once(messages, &self.0.sent).await
    }

    /// All of them, then those that failed, and so on.
    async fn send_all_repeatedly(&self, mut messages: Vec<Message>) -> Vec<Result<Receipt>> {
        let pending: Vec<_> = messages.iter().map(|_| self.0.sent.pending()).collect();
        let own_ids: Vec<_> = messages.iter().map(|message| message.id().is_some()).collect();
        let mut now = Stamp::for_many();
        messages.iter_mut().for_each(|message| message.stamp(|| now.take()));
        // What counts is the last answer.
        let counters = Counters::default();
        let mut answers = self.send_all_once(messages.iter().cloned(), &counters).await;
        for attempt in 1..=self.0.sending.repeats {
            let mut pause = Duration::ZERO;
            let mut failed = Vec::new();
            for (at, answer) in answers.iter().enumerate() {
                if let Err(error) = answer
                    && let Some(least) = self.repeat_after(error, own_ids[at], attempt)
                {
                    pause = pause.max(least);
                    failed.push(at);
                }
            }
            if failed.is_empty() {
                break;
            }
            tracing::warn!(channel = self.0.address.name(), count = failed.len(), attempt, "not sent; trying again");
            tokio::time::sleep(pause).await;
            let again = failed.iter().map(|at| messages[*at].clone());
            let again = self.send_all_once(again, &counters).await;
            failed.into_iter().zip(again).for_each(|(at, answer)| answers[at] = answer);
        }
        pending.into_iter().zip(answers).map(|(pending, answer)| pending.answered(answer)).collect()
    }

    async fn send_all_once(
        &self,
        mut messages: impl Iterator<Item = Message>,
        counters: &Counters,
    ) -> Vec<Result<Receipt>> {
        let mut answers = Answers::new(counters, messages.size_hint().0);
        let producer = match self.producer(self.deadline()).await {
            Ok(producer) => producer,
            Err(error) => {
                answers.given.extend(messages.map(|_| Err(copy(&error))));
                return answers.take();
            }
        };
        let (window, at_once) = (self.0.options.window, producer.at_once().max(1));
        let together = producer.answered_together(window);
        // One clock read and one random number for the whole call; each id comes after the one before.
        let mut now = Stamp::for_many();
        // When those must be answered that are handed over now; it holds until something was waited for.
        let mut deadline = None;
        let mut chunk = Outgoing::default();
        let mut since_yield = 0;
        loop {
            if answers.waiting.len() >= window {
                answers.wait_for(together).await;
            }
            if answers.waiting.len() >= window
                && let Some((until, first)) = answers.waiting.front_mut()
            {
                let answer = self.answer(first, *until).await;
                answers.came(answer);
                deadline = None;
                // One confirmation often answers many: what follows then leaves together.
                while let Some(answer) = answers.waiting.front_mut().and_then(|(_, first)| first.now_or_never()) {
                    answers.came(answer.map_err(|error| self.locate(error)));
                }
            }
            // Written at once to where they are prepared and taken from: each is moved as seldom as can be.
            chunk.extend(messages.by_ref().take((window - answers.waiting.len()).min(at_once)));
            let count = chunk.len();
            if count == 0 {
                break;
            }
            let refused = self.prepare_all(&mut chunk, &mut now);
            // Where answers are always at hand, a producer that never waits must not keep other tasks from running.
            since_yield += count;
            if since_yield >= YIELD_AFTER {
                since_yield = 0;
                give_way().await;
                deadline = None;
            } else {
                coop::consume_budget().await;
            }
            if answers.waiting.is_empty() && refused.is_empty() {
                producer.send_many(&mut chunk, &mut answers.given);
            }
            let mut refused = refused.into_iter().peekable();
            for at in count - chunk.len()..count {
                let Some(message) = chunk.pop() else { break };
                let answer = match refused.next_if(|(refused, _)| *refused == at) {
                    Some((_, error)) => Ok(Err(error)),
                    None => producer.send(message).at_hand(),
                };
                match answer {
                    Ok(result) if answers.waiting.is_empty() => {
                        answers.given.push(result.map_err(|error| self.locate(error)));
                    }
                    answer => {
                        let until = *deadline.get_or_insert_with(|| self.deadline());
                        let completion = answer.map_or_else(|completion| completion, Completion::ready);
                        answers.waiting.push_back((until, completion));
                    }
                }
            }
            answers.count();
        }
        if together > 1 {
            answers.wait_for(answers.waiting.len()).await;
        }
        while let Some((until, first)) = answers.waiting.front_mut() {
            let answer = self.answer(first, *until).await;
            answers.came(answer);
        }
        answers.take()
    }
}

/// The answers of one call in the order of its messages. All of them are counted, also when the call is given up.
struct Answers<'a> {
    counters: &'a Counters,
    given: Vec<Result<Receipt>>,
    counted: usize,
    /// Those behind the first one that waits for its answer, and until when each does.
    waiting: VecDeque<(Instant, Completion<Receipt>)>,
}

impl<'a> Answers<'a> {
    fn new(counters: &'a Counters, expected: usize) -> Self {
        Self { counters, given: Vec::with_capacity(expected), counted: 0, waiting: VecDeque::new() }
    }

    /// Waits for the last of so many, with which the others mostly come; not longer than the first one does.
    async fn wait_for(&mut self, together: usize) {
        let Some((until, _)) = self.waiting.front() else { return };
        let until = *until;
        if together > 1
            && let Some((_, last)) = self.waiting.get_mut(together - 1)
            && let Ok(answer) = timeout_at(until, &mut *last).await
        {
            *last = Completion::ready(answer);
        }
    }

    /// The answer of the first one that waits.
    fn came(&mut self, answer: Result<Receipt>) {
        self.waiting.pop_front();
        self.given.push(answer);
    }

    fn count(&mut self) {
        self.counters.count_all(&self.given[self.counted..]);
        self.counted = self.given.len();
    }

    fn take(mut self) -> Vec<Result<Receipt>> {
        self.count();
        self.counted = 0;
        mem::take(&mut self.given)
    }
}

impl Drop for Answers<'_> {
    fn drop(&mut self) {
        self.count();
        let mut unknown = 0;
        for (_, mut answer) in self.waiting.drain(..) {
            match (&mut answer).now_or_never() {
                Some(answer) => self.counters.count(&answer),
                None => unknown += 1,
            }
        }
        if unknown > 0 {
            self.counters.count_unknown(unknown);
        }
    }
}

/// Lets other tasks that are ready have their turn. Unlike tokio's own, without a look at sockets and timers first:
/// the runtime takes that by itself every few dozen turns.
async fn give_way() {
    let mut given = false;
    poll_fn(|cx| {
        if mem::replace(&mut given, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cold]
fn copy(error: &Error) -> Error {
    let mut copy = Error::new(error.kind(), error.message().to_owned()).with_retry(error.retry());
    if let Some(backend) = error.backend() {
        copy = copy.with_backend(backend.to_owned());
    }
    if let Some(operation) = error.operation() {
        copy = copy.with_operation(operation);
    }
    if let Some(channel) = error.channel() {
        copy = copy.with_channel(channel);
    }
    match error.hint() {
        Some(hint) => copy.with_hint(hint.to_owned()),
        None => copy,
    }
}
