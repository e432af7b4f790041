//! S2: a connection that is closed while deliveries are being settled.

use std::{future::ready, pin::pin, time::Duration};

use futures_util::future::join_all;

use crate::{
    Case, Cx, PATIENCE,
    case::run,
    drive::{bodies, closes, counts, publish, rest, subscribe, take, text},
};

pub(super) const CASES: &[Case] = &[Case::new("S2_retry_while_closing", run!(retry_while_closing)).when(
    "requeue",
    |c| c.requeue.is_available(),
    run!(super::settlement::requeue_refused),
)];

/// Messages that are being returned for another attempt when their connection is closed come again: once where the
/// return was answered with success, and at least once where it was not.
pub async fn retry_while_closing(cx: Cx) {
    const COUNT: usize = 20;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(COUNT)).await;
    let mut subscription = subscribe(&queue).await;
    let mut answers = pin!(join_all(take(&mut subscription, COUNT).await.into_iter().map(async |delivery| {
        let body = text(&delivery);
        (body, delivery.retry(Duration::ZERO).await.map_err(|error| error.error().kind()))
    })));
    // Each has begun, and none is waited for.
    let early = tokio::select! { biased; answers = &mut answers => Some(answers), () = ready(()) => None };
    closes(&bus).await;
    let answers = match early {
        Some(answers) => answers,
        None => tokio::time::timeout(PATIENCE, answers).await.expect("each is answered"),
    };
    let came = counts(rest(&cx, &queue, COUNT).await);
    for (body, answer) in &answers {
        let times = came.get(body).copied().unwrap_or(0);
        assert!(times == 1 || times > 1 && answer.is_err(), "{body} was answered {answer:?} and came {times} times");
    }
    let done = answers.iter().filter(|(_, answer)| answer.is_ok()).count();
    cx.note(format_args!("{done} of {COUNT} were returned in time"));
}
