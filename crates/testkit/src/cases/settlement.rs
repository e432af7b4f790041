//! S1: settling by hand.
//!
//! Settling twice is no case: a delivery is settled by value, so a program that tries does not compile.
//!
//! ```compile_fail,E0382
//! # use polymq_core::{Delivery, SettleError};
//! async fn acknowledge_twice(delivery: Delivery) -> Result<(), SettleError> {
//!     delivery.ack().await?;
//!     delivery.ack().await // it was moved into the first call
//! }
//! ```
//!
//! ```compile_fail,E0382
//! # use polymq_core::{Delivery, SettleError};
//! async fn acknowledge_what_was_returned(delivery: Delivery) -> Result<(), SettleError> {
//!     delivery.retry(std::time::Duration::ZERO).await?;
//!     delivery.ack().await
//! }
//! ```

use std::time::Duration;

use polymq_core::{DeliveryCount, ErrorKind, dead_letter};
use tokio::time::Instant;

use crate::{
    Case, Cx, Ledger,
    case::run,
    drive::{bodies, closes, dead_letters, in_order, next, publish, quiet, subscribe, take, take_acked, text},
};

pub(super) const CASES: &[Case] = &[
    Case::new("S1_ack", run!(ack)),
    Case::new("S1_requeue", run!(requeue)).when("requeue", |c| c.requeue.is_available(), run!(requeue_refused)),
    Case::new("S1_requeued_by_several", run!(requeued_by_several)).when(
        "requeue",
        |c| c.requeue.is_available(),
        run!(requeue_refused),
    ),
    Case::new("S1_drop", run!(drop_message)),
    Case::new("S1_reject", run!(reject)),
    Case::new("S1_delayed_nack", run!(delayed_nack)).when(
        "delayed_retry",
        |c| c.delayed_retry.support.is_available(),
        run!(delayed_nack_refused),
    ),
    Case::new("S1_delay_bound", run!(delay_bound)).when(
        "delayed_retry",
        |c| c.delayed_retry.support.is_available(),
        run!(delayed_nack_refused),
    ),
];

/// Another connection finds nothing in the queue.
pub(super) async fn empty_for_others(cx: &Cx, queue: &polymq_core::Channel) {
    let bus = cx.bus().await;
    let again = bus.channel(queue.address().clone());
    quiet(&mut subscribe(&again).await).await;
    if cx.capabilities().stats {
        assert_eq!(again.stats(None).await.expect("stats").ready, 0, "messages that wait");
    }
    closes(&bus).await;
}

/// An acknowledged message never comes again, not even on another connection.
pub async fn ack(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(20)).await;
    let mut subscription = subscribe(&queue).await;
    assert_eq!(in_order(&cx, take_acked(&mut subscription, 20).await), bodies(20).collect::<Vec<_>>());
    quiet(&mut subscription).await;
    subscription.close().await.expect("close");
    closes(&bus).await;
    empty_for_others(&cx, &queue).await;
}

/// A message that is returned for another attempt comes again, at once, as attempt 2, unchanged.
pub async fn requeue(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let sent = polymq_core::Message::new("again")
        .with_id("id-1")
        .with_header("tenant", "acme")
        .with_content_type("text/plain");
    queue.send_message(sent).await.expect("send");
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    let first = delivery.message().clone();
    assert_eq!(delivery.attempt(), 1);
    delivery.retry(Duration::ZERO).await.expect("retry");
    let delivery = next(&mut subscription).await;
    let message = delivery.message();
    assert_eq!((message.payload(), message.id(), message.headers()), (first.payload(), first.id(), first.headers()));
    assert_eq!((message.content_type(), message.time()), (first.content_type(), first.time()));
    if cx.capabilities().delivery_count != DeliveryCount::None {
        assert_eq!(delivery.attempt(), 2);
    }
    delivery.ack().await.expect("ack");
    quiet(&mut subscription).await;
}

/// Three consumers, one after the other and each over a connection of its own, return a hundred times what they get. Then all
/// of it can be read, each message once, and none of the attempts was forgotten.
pub async fn requeued_by_several(cx: Cx) {
    const COUNT: usize = 50;
    const CONSUMERS: u32 = 3;
    const RETURNS: u32 = 100;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(COUNT)).await;
    for _ in 0..CONSUMERS {
        let bus = cx.bus().await;
        let mut subscription = subscribe(&bus.channel(queue.address().clone())).await;
        for _ in 0..RETURNS {
            next(&mut subscription).await.retry(Duration::ZERO).await.expect("retry");
        }
        subscription.close().await.expect("close");
        closes(&bus).await;
    }
    let mut ledger = Ledger::sent(bodies(COUNT));
    let mut failed = 0;
    let mut subscription = subscribe(&queue).await;
    for delivery in take(&mut subscription, COUNT).await {
        ledger.see(text(&delivery));
        failed += delivery.attempt() - 1;
        delivery.ack().await.expect("ack");
    }
    quiet(&mut subscription).await;
    ledger.assert_exact();
    if cx.capabilities().delivery_count != DeliveryCount::None {
        // A broker's own count may have those in it that were fetched and given back unseen.
        assert!(failed >= CONSUMERS * RETURNS, "{failed} attempts of {} are known", CONSUMERS * RETURNS);
    }
}

/// Where nothing can be returned, asking for it is `Unsupported` and the delivery is still ours.
pub async fn requeue_refused(cx: Cx) {
    refusal(&cx, Duration::ZERO).await;
}

/// Where no delay is possible, asking for one is `Unsupported` and the delivery is still ours.
pub async fn delayed_nack_refused(cx: Cx) {
    refusal(&cx, Duration::from_secs(1)).await;
}

async fn refusal(cx: &Cx, after: Duration) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["ours".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    let error = next(&mut subscription).await.retry(after).await.expect_err("this must be refused");
    assert_eq!(error.error().kind(), ErrorKind::Unsupported, "{error}");
    error.into_delivery().ack().await.expect("ack");
    quiet(&mut subscription).await;
}

/// A message that is dropped is gone, and no dead letter.
pub async fn drop_message(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["unwanted".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    next(&mut subscription).await.drop_message("not wanted").await.expect("drop");
    quiet(&mut subscription).await;
    subscription.close().await.expect("close");
    quiet(&mut dead_letters(&bus, &queue).await).await;
    closes(&bus).await;
    empty_for_others(&cx, &queue).await;
}

/// A rejected message is a dead letter, with the reason, and gone from its queue.
pub async fn reject(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["bad".to_owned(), "good".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    next(&mut subscription).await.reject("no such customer").await.expect("reject");
    assert_eq!(take_acked(&mut subscription, 1).await, ["good"]);
    quiet(&mut subscription).await;
    let mut letters = dead_letters(&bus, &queue).await;
    let letter = next(&mut letters).await;
    assert_eq!(text(&letter), "bad");
    assert_eq!(letter.message().system_headers().get(dead_letter::REASON), Some("no such customer"));
    letter.ack().await.expect("ack");
    quiet(&mut letters).await;
    closes(&bus).await;
    empty_for_others(&cx, &queue).await;
}

/// A delayed return comes not before its time and not long after, and holds nobody else up.
pub async fn delayed_nack(cx: Cx) {
    const DELAY: Duration = Duration::from_secs(15);
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["late".to_owned(), "other".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    assert_eq!(text(&delivery), "late");
    let returned = Instant::now();
    delivery.retry(DELAY).await.expect("retry");
    let answered = Instant::now();
    assert_eq!(take_acked(&mut subscription, 1).await, ["other"]);
    assert!(answered.elapsed() < DELAY, "the other one was held up for {:?}", answered.elapsed());
    let delivery = next(&mut subscription).await;
    let after = returned.elapsed();
    assert_eq!(text(&delivery), "late");
    assert!(after >= DELAY, "came {:?} too early", DELAY - after);
    assert!(answered.elapsed() < DELAY + Duration::from_secs(30), "came {:?} late", answered.elapsed() - DELAY);
    cx.note(format_args!("came {:?} after its time", after - DELAY));
    delivery.ack().await.expect("ack");
    quiet(&mut subscription).await;
}

/// A delay beyond the declared bound is `Unsupported`; one below it, or any where no bound is declared, is taken.
pub async fn delay_bound(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["far".to_owned(), "ours".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    let [far, ours]: [_; 2] = take(&mut subscription, 2).await.try_into().expect("two");
    far.retry(Duration::from_secs(3600)).await.expect("an hour is possible");
    let ours = match cx.capabilities().delayed_retry.max {
        Some(max) => {
            let error = ours.retry(max + Duration::from_secs(1)).await.expect_err("beyond the bound");
            assert_eq!(error.error().kind(), ErrorKind::Unsupported, "{error}");
            error.into_delivery()
        }
        None => ours,
    };
    quiet(&mut subscription).await;
    ours.ack().await.expect("ack");
}
