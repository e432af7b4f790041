//! S8, S9: the count of attempts, and where a returned message comes.

use std::time::Duration;

use polymq_core::{DeliveryCount, Message, RedeliveryOrder};

use super::settlement::requeue_refused;
use crate::{
    Case, Cx,
    case::run,
    drive::{closes, in_order, next, prefetch, publish, quiet, subscribe, subscribe_with, take_acked, text},
};

pub(super) const CASES: &[Case] = &[
    Case::new("S8_attempts_count", run!(attempts_count)).when(
        "delivery_count",
        |c| c.delivery_count != DeliveryCount::None,
        run!(attempts_start_at_one),
    ),
    Case::new("S8_attempts_survive_restart", run!(attempts_survive_restart)).when(
        "delivery_count",
        |c| c.delivery_count != DeliveryCount::None,
        run!(attempts_start_at_one),
    ),
    Case::new("S9_retry_comes_as_declared", run!(retry_comes_as_declared)).when(
        "requeue",
        |c| c.requeue.is_available(),
        run!(requeue_refused),
    ),
    Case::new("S9_released_comes_again", run!(released_comes_again)),
];

/// Attempts count 1, 2, 3 as a message is returned, and a deferred one counts none.
pub async fn attempts_count(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["counted".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    for attempt in 1..=3 {
        let delivery = next(&mut subscription).await;
        assert_eq!(delivery.attempt(), attempt);
        delivery.retry(Duration::ZERO).await.expect("retry");
    }
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.attempt(), 4);
    delivery.defer(Duration::ZERO).await.expect("defer");
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.attempt(), 4, "after having been deferred");
    delivery.ack().await.expect("ack");
}

/// Where attempts are not counted, every delivery is the first.
pub async fn attempts_start_at_one(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["uncounted".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.attempt(), 1);
    delivery.retry(Duration::ZERO).await.expect("retry");
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.attempt(), 1);
    delivery.ack().await.expect("ack");
}

/// The count goes with the message to another consumer and to another connection.
pub async fn attempts_survive_restart(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["counted".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    next(&mut subscription).await.retry(Duration::ZERO).await.expect("retry");
    subscription.close().await.expect("close");
    let mut other = subscribe(&queue).await;
    let delivery = next(&mut other).await;
    assert_eq!(delivery.attempt(), 2, "with another consumer");
    delivery.retry(Duration::ZERO).await.expect("retry");
    other.close().await.expect("close");
    closes(&bus).await;
    let bus = cx.bus().await;
    let mut subscription = subscribe(&bus.channel(queue.address().clone())).await;
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.attempt(), 3, "with another connection");
    delivery.ack().await.expect("ack");
}

/// A message that is returned for another attempt comes where the backend declares that it does: before those that
/// wait, after them, or anywhere.
pub async fn retry_comes_as_declared(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    // Of one key: what a broker that keeps the order of keys says, it says about these.
    let messages = ["a", "b", "c"].map(|body| Message::new(body).with_key("one"));
    queue.send_all(messages).await.into_iter().for_each(|sent| drop(sent.expect("sent")));
    let mut subscription = subscribe_with(&queue, prefetch(1)).await;
    let delivery = next(&mut subscription).await;
    assert_eq!(text(&delivery), "a");
    delivery.retry(Duration::ZERO).await.expect("retry");
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.extend(take_acked(&mut subscription, 1).await);
    }
    match cx.capabilities().redelivery {
        RedeliveryOrder::Front => assert_eq!(seen, ["a", "b", "c"]),
        RedeliveryOrder::Back => assert_eq!(seen, ["b", "c", "a"]),
        RedeliveryOrder::Any => {
            cx.note(format_args!("a retried message came as {seen:?}"));
            seen.sort();
            assert_eq!(seen, ["a", "b", "c"]);
        }
    }
    quiet(&mut subscription).await;
}

/// A message that is returned unsettled comes again, once, and the others keep their order among themselves.
pub async fn released_comes_again(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["a", "b", "c"].map(str::to_owned)).await;
    let mut subscription = subscribe_with(&queue, prefetch(1)).await;
    let delivery = next(&mut subscription).await;
    assert_eq!(text(&delivery), "a");
    drop(delivery);
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.extend(take_acked(&mut subscription, 1).await);
    }
    let place = seen.iter().position(|body| body == "a").expect("the released one");
    let others: Vec<_> = seen.iter().filter(|body| *body != "a").cloned().collect();
    assert_eq!(in_order(&cx, others), ["b", "c"], "{seen:?}");
    cx.note(format_args!("a released message comes at place {} of 3", place + 1));
    quiet(&mut subscription).await;
}
