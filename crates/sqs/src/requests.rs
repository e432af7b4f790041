//! The requests of a consumer's task: polls, and what SQS is told about messages, in batches with a result for each.

use std::{future::Future, sync::Arc, time::Duration};

use polymq_core::{Error, ErrorKind, Incoming, Result};
use tokio::time::{Instant, sleep};

use crate::{
    clients::Live,
    error::{self, Effect, native, of_entry},
    link::Link,
    poll::{Reading, Url, poll},
    sends,
    shared::{Change, Copied, Delete, Held, Purpose, Shared, final_error},
};

/// Wait after an answer that says "not now".
pub(crate) const PAUSE: Duration = Duration::from_secs(1);

/// Wait after an empty answer where polls do not wait themselves.
const SHORT_POLLS: Duration = Duration::from_millis(200);

/// What a request of the task has come to.
pub(crate) enum Done {
    Polled { asked: usize, answer: Result<Vec<(Incoming, Held)>> },
    Told(Told),
}

/// What SQS is told about messages, each in requests of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Deletes,
    Changes,
    Copies,
}

/// What a request works with.
pub(crate) struct Context {
    pub(crate) link: Arc<Link>,
    pub(crate) live: Live,
    pub(crate) shared: Arc<Shared>,
    pub(crate) url: Url,
}

impl Context {
    async fn call<T>(&self, effect: Effect, request: impl Future<Output = Result<T>>) -> Result<T> {
        self.link.call(&self.live, "settle", effect, self.link.config.request_timeout, request).await
    }
}

/// Whether it may help to ask again, after a pause where the service asks for one.
async fn may_repeat(error: &Error) -> bool {
    match error.kind() {
        // Expired credentials are looked for again, as a lost service is.
        ErrorKind::Disconnected | ErrorKind::Unauthenticated => true,
        ErrorKind::Busy => {
            sleep(PAUSE).await;
            true
        }
        _ => false,
    }
}

pub(crate) async fn polling(cx: Context, asked: usize, reading: Reading) -> Done {
    let answer = poll(&cx.link, &cx.live, &cx.url, asked, reading).await;
    if let Err(error) = &answer
        && !final_error(error.kind())
        && error.kind() != ErrorKind::Disconnected
    {
        tracing::warn!(%error, "a poll was refused, trying again");
        sleep(PAUSE).await;
    }
    if cx.link.config.poll_wait.is_zero() && answer.as_ref().is_ok_and(Vec::is_empty) {
        sleep(SHORT_POLLS).await;
    }
    Done::Polled { asked, answer }
}

/// The errors of a batch, by the place of their entries.
fn failures(failed: Vec<aws_sdk_sqs::types::BatchResultErrorEntry>) -> Vec<(usize, Error)> {
    let error = |entry: aws_sdk_sqs::types::BatchResultErrorEntry| {
        let at = entry.id.parse().ok()?;
        Some((at, of_entry("settle", &entry.code, entry.message.as_deref(), entry.sender_fault)))
    };
    failed.into_iter().filter_map(error).collect()
}

fn unbuilt(error: impl std::error::Error) -> Error {
    error::invalid(error.to_string())
}

pub(crate) async fn deleting(cx: Context, batch: Vec<Delete>) -> Done {
    use aws_sdk_sqs::types::DeleteMessageBatchRequestEntry as Entry;
    let request = async {
        let mut request = cx.live.sqs.delete_message_batch().queue_url(&*cx.url);
        for (at, delete) in batch.iter().enumerate() {
            let entry = Entry::builder().id(at.to_string()).receipt_handle(&*delete.receipt).build();
            request = request.entries(entry.map_err(unbuilt)?);
        }
        let answer = request.send().await.map_err(|error| native("settle", Effect::Idempotent, error))?;
        Ok(failures(answer.failed))
    };
    let answer = Box::pin(cx.call(Effect::Idempotent, request)).await;
    match answer {
        Ok(failed) => {
            let mut batch: Vec<Option<Delete>> = batch.into_iter().map(Some).collect();
            for (at, error) in failed {
                let delete = batch.get_mut(at).and_then(Option::take);
                if may_repeat(&error).await {
                    cx.shared.again(delete.into_iter().collect(), Vec::new());
                } else {
                    tracing::warn!(%error, "not acknowledged; the message comes again");
                }
            }
        }
        Err(error) if may_repeat(&error).await => cx.shared.again(batch, Vec::new()),
        Err(error) => tracing::warn!(%error, count = batch.len(), "not acknowledged; the messages come again"),
    }
    Done::Told(Told::Deletes)
}

pub(crate) async fn changing(cx: Context, batch: Vec<Change>) -> Done {
    use aws_sdk_sqs::types::ChangeMessageVisibilityBatchRequestEntry as Entry;
    let began = Instant::now();
    let request = async {
        let mut request = cx.live.sqs.change_message_visibility_batch().queue_url(&*cx.url);
        for (at, change) in batch.iter().enumerate() {
            let entry = Entry::builder().id(at.to_string()).receipt_handle(&*change.receipt);
            request = request.entries(entry.visibility_timeout(change.seconds).build().map_err(unbuilt)?);
        }
        let answer = request.send().await.map_err(|error| native("settle", Effect::Idempotent, error))?;
        Ok(failures(answer.failed))
    };
    let answer = Box::pin(cx.call(Effect::Idempotent, request)).await;
    let mut failed = match answer {
        Ok(failed) => failed,
        Err(error) if may_repeat(&error).await => {
            cx.shared.again(Vec::new(), batch);
            return Done::Told(Told::Changes);
        }
        Err(error) => (0..batch.len()).map(|at| (at, error::copy(&error))).collect(),
    };
    for (at, change) in batch.into_iter().enumerate() {
        let error = failed.iter().position(|(failed, _)| *failed == at).map(|place| failed.swap_remove(place).1);
        match error {
            Some(error) if may_repeat(&error).await => cx.shared.again(Vec::new(), vec![change]),
            error => changed(&cx.shared, change, error, began),
        }
    }
    Done::Told(Told::Changes)
}

/// Spreads the news of one change.
fn changed(shared: &Shared, change: Change, error: Option<Error>, began: Instant) {
    let result = match &error {
        Some(error) => Err(error::copy(error)),
        None => Ok(()),
    };
    match change.purpose {
        Purpose::Release => {
            if let Err(error) = result {
                tracing::debug!(%error, "not returned; the message comes again when its loan is over");
            }
        }
        Purpose::Retry(answer) => answer.complete(result),
        Purpose::Extend(token, answer) => {
            let seconds = Duration::from_secs(u64::try_from(change.seconds).unwrap_or_default());
            shared.extended(token, &change.receipt, error.is_none().then(|| began + seconds));
            match (answer, result) {
                (Some(answer), result) => answer.complete(result),
                (None, Err(error)) => tracing::warn!(%error, "the loan of a message was not extended; it comes again"),
                (None, Ok(())) => {}
            }
        }
    }
}

pub(crate) async fn copying(cx: Context, batch: Vec<Copied>) -> Done {
    let request = sends::to_queue(&cx.live, &cx.url, batch.iter().map(|copy| &copy.letter));
    let results = match Box::pin(cx.call(Effect::Once, request)).await {
        Ok(results) => results,
        Err(error) => batch.iter().map(|_| Err(error::copy(&error))).collect(),
    };
    for (copy, result) in batch.into_iter().zip(results) {
        let Copied { held, answer, .. } = copy;
        match (result, answer) {
            // The original is given up when its successor is safe.
            (Ok(_), answer) => {
                cx.shared.delete(&held);
                if let Some((_, answer)) = answer {
                    answer.complete(Ok(()));
                }
            }
            (Err(error), Some((token, answer))) => {
                cx.shared.unclaim(token, held);
                answer.complete(Err(error.with_operation("settle")));
            }
            (Err(_), None) => cx.shared.change(&held, 0, Purpose::Release),
        }
    }
    Done::Told(Told::Copies)
}
