//! The task that sends: one stream after the other, as connections come and go.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use futures_util::{FutureExt, StreamExt};
use polymq_core::ErrorKind;
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::{Answer, BATCH, Kind, Outbox, REQUESTS};
use crate::{
    error::{self, Effect},
    link::Live,
};

/// Requests without an answer, by their numbers: of each message its number, and who hears of the outcome.
type Flight = BTreeMap<u64, VecDeque<(u64, Answer)>>;

impl<K: Kind> Outbox<K> {
    pub(super) async fn run(self: Arc<Self>) {
        loop {
            while !self.may_send(0) && !self.is_finished() {
                tokio::select! {
                    () = self.work.notified() => {}
                    () = self.link.closed() => break,
                }
            }
            if self.is_finished() {
                return;
            }
            match self.link.live().await {
                Ok(live) => self.stream(&live).await,
                Err(error) => {
                    self.lock().closing = true;
                    return self.fail_waiting(&error);
                }
            }
        }
    }

    /// Sends over one stream until it ends.
    async fn stream(&self, live: &Live) {
        let (requests, receiver) = mpsc::channel(BATCH.0 * REQUESTS);
        let mut client = live.client.clone();
        let opening = async move { K::open(&mut client, ReceiverStream::new(receiver)).await }.fuse();
        tokio::pin!(opening);
        let mut answers: Option<Streaming<K::Response>> = None;
        let mut flight = Flight::new();
        let mut number = 0;
        let mut deadline = Instant::now();
        let limit = self.link.config.request_timeout;
        let reason = loop {
            if flight.is_empty() && self.is_finished() {
                break None;
            }
            tokio::select! {
                // Some servers answer the opening with the first answer only.
                opened = &mut opening, if answers.is_none() => match opened {
                    Ok(opened) => answers = Some(opened.into_inner()),
                    Err(status) => break Some(error::native("send", Effect::Once, status)),
                },
                answer = next(&mut answers) => match answer {
                    Some(Ok(answer)) => {
                        self.link.answered();
                        self.answered(&mut flight, answer);
                        deadline = Instant::now() + limit;
                    }
                    Some(Err(status)) => break Some(error::native("send", Effect::Once, status)),
                    None => break Some(error::lost("send", Effect::Once, "the broker ended the stream")),
                },
                permit = requests.reserve(), if self.may_send(flight.len()) => {
                    let Ok(permit) = permit else {
                        break Some(error::lost("send", Effect::Once, "the stream has ended"));
                    };
                    if flight.is_empty() {
                        deadline = Instant::now() + limit;
                    }
                    let (items, waiting) = self.take();
                    if items.is_empty() {
                        continue;
                    }
                    number += 1;
                    let mut batch = K::requests(number, items).into_iter();
                    if let Some(first) = batch.next() {
                        permit.send(first);
                    }
                    // There is room for all of them: as many as may be on their way.
                    batch.for_each(|request| drop(requests.try_send(request)));
                    if K::ANSWERS {
                        flight.insert(number, waiting);
                    } else {
                        waiting.into_iter().for_each(|(number, answer)| self.answer(number, answer, Ok(())));
                    }
                }
                () = self.work.notified() => {}
                () = sleep_until(deadline), if !flight.is_empty() => {
                    break Some(error::lost("send", Effect::Once, "the broker did not answer in time"));
                }
                () = self.link.over(live) => {
                    break Some(error::lost("send", Effect::Once, &self.link.reason()));
                }
            }
        };
        let Some(error) = reason else { return };
        self.link.failed(live, &error);
        // A request that is too large for the server ends the stream: it is the one that would be answered next, and says nothing of
        // those behind it.
        let meant = match (error.kind(), flight.first_key_value()) {
            (ErrorKind::TooLarge, Some((_, first))) if K::WHOLE => first.len(),
            (ErrorKind::TooLarge, _) => 1,
            _ => usize::MAX,
        };
        for (at, (number, answer)) in flight.into_values().flatten().enumerate() {
            let error = match at < meant {
                true => error::copy(&error).with_operation("send"),
                false => error::lost("send", Effect::Once, "the stream ended with another message"),
            };
            self.answer(number, answer, Err(error));
        }
        if error::is_final(error.kind()) {
            self.fail_waiting(&error);
        }
    }

    fn answered(&self, flight: &mut Flight, response: K::Response) {
        let (number, results) = K::results(response);
        let Some(mut batch) = (match number {
            Some(number) => flight.remove(&number),
            None => flight.pop_first().map(|(number, batch)| {
                if batch.len() > results.len() {
                    // Its other messages are answered one by one.
                    let mut batch = batch;
                    let answered = batch.drain(..results.len()).collect();
                    flight.insert(number, batch);
                    answered
                } else {
                    batch
                }
            }),
        }) else {
            if let Some(Err(error)) = results.into_iter().find(Result::is_err) {
                tracing::warn!(%error, "what was sent without waiting for an answer was refused");
            }
            return;
        };
        for result in results {
            let Some((number, answer)) = batch.pop_front() else { break };
            self.answer(number, answer, result);
        }
        for (number, answer) in batch {
            self.answer(number, answer, Err(error::lost("send", Effect::Once, "the broker said nothing about it")));
        }
    }
}

/// The next answer of a stream that may not be open yet.
async fn next<T>(answers: &mut Option<Streaming<T>>) -> Option<std::result::Result<T, Status>> {
    match answers {
        Some(answers) => answers.next().await,
        None => std::future::pending().await,
    }
}
