//! S1 to S4, S8, S9: settling by hand.
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

use polymq_core::{ConsumeOptions, DeliveryCount, ErrorKind, Message, RedeliveryOrder, Subscription, dead_letter};
use tokio::time::Instant;

use crate::{
    Case, Cx, Ledger,
    case::run,
    drive::{
        bodies, dead_letters, in_order, is_written_down, next, prefetch, publish, quiet, subscribe, subscribe_with,
        take, take_acked, text,
    },
};

pub(super) const CASES: &[Case] = &[
    Case::new("S1_ack", run!(ack)),
    Case::new("S1_requeue", run!(requeue)).when("requeue", |c| c.requeue.is_available(), run!(requeue_refused)),
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
    Case::new("S2_settle_from_other_tasks", run!(settle_from_other_tasks)),
    Case::new("S2_settle_after_consumer_close", run!(settle_after_consumer_close)),
    Case::new("S2_settle_after_bus_close", run!(settle_after_bus_close)),
    Case::new("S2_lease_extension", run!(lease_extension)).when("leases", |c| c.leases, run!(lease_extension_refused)),
    Case::new("S2_settle_after_lease", run!(settle_after_lease)).when(
        "leases",
        |c| c.leases,
        run!(lease_extension_refused),
    ),
    Case::new("S3_dropped_delivery_returns", run!(dropped_delivery_returns)),
    Case::new("S4_out_of_order_acks", run!(out_of_order_acks)),
    Case::new("S4_out_of_order_acks_kill", run!(out_of_order_acks_kill))
        .when("persistent", |c| c.persistent, run!(out_of_order_acks))
        .own_broker(),
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

/// Another connection finds nothing in the queue.
async fn empty_for_others(cx: &Cx, queue: &polymq_core::Channel) {
    let bus = cx.bus().await;
    let again = bus.channel(queue.address().clone());
    quiet(&mut subscribe(&again).await).await;
    if cx.capabilities().stats {
        assert_eq!(again.stats(None).await.expect("stats").ready, 0, "messages that wait");
    }
    bus.close().await.expect("close");
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
    bus.close().await.expect("close");
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
    bus.close().await.expect("close");
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
    bus.close().await.expect("close");
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
    assert!(answered.elapsed() < DELAY + Duration::from_secs(30), "came {:?} late", after - DELAY);
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

/// Deliveries are settled by tasks that did not receive them, many at once.
pub async fn settle_from_other_tasks(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(40)).await;
    let mut subscription = subscribe(&queue).await;
    let tasks: Vec<_> = take(&mut subscription, 40)
        .await
        .into_iter()
        .map(|delivery| tokio::spawn(async move { delivery.ack().await.expect("ack") }))
        .collect();
    for task in tasks {
        task.await.expect("a settling task");
    }
    quiet(&mut subscription).await;
    subscription.close().await.expect("close");
    bus.close().await.expect("close");
    empty_for_others(&cx, &queue).await;
}

/// After its consumer was closed, a delivery can still be acknowledged or returned.
pub async fn settle_after_consumer_close(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(4)).await;
    let mut subscription = subscribe(&queue).await;
    let mut taken = take(&mut subscription, 3).await;
    subscription.close().await.expect("close");
    let (third, second, first) = (taken.pop(), taken.pop(), taken.pop());
    let first = first.expect("three were taken");
    first.ack().await.expect("ack after the consumer was closed");
    drop((second, third));
    let mut seen = take_acked(&mut subscribe(&queue).await, 3).await;
    seen.sort();
    assert_eq!(seen, ["m-000001", "m-000002", "m-000003"]);
    bus.close().await.expect("close");
    empty_for_others(&cx, &queue).await;
}

/// After the connection was closed, settling is `Closed` or `Stale`, gives the delivery back, and the message comes again.
pub async fn settle_after_bus_close(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(3)).await;
    let mut subscription = subscribe(&queue).await;
    let taken = take(&mut subscription, 3).await;
    bus.close().await.expect("close");
    for delivery in taken {
        let expected = text(&delivery);
        let error = match expected.as_str() {
            "m-000000" => delivery.ack().await,
            "m-000001" => delivery.retry(Duration::ZERO).await,
            _ => delivery.reject("late").await,
        }
        .expect_err("the connection is closed");
        assert!(matches!(error.error().kind(), ErrorKind::Closed | ErrorKind::Stale), "{error:?}");
        let delivery = error.into_delivery();
        assert_eq!(text(&delivery), expected, "the delivery is in the error");
    }
    let bus = cx.bus().await;
    let mut seen = take_acked(&mut subscribe(&bus.channel(queue.address().clone())).await, 3).await;
    seen.sort();
    assert_eq!(seen, bodies(3).collect::<Vec<_>>());
}

/// A message that is lent for a time and extended does not come again, though it is held for longer than that.
pub async fn lease_extension(cx: Cx) {
    let lease = Duration::from_secs(20);
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["lent".to_owned()]).await;
    let options = ConsumeOptions { lease, ..ConsumeOptions::default() };
    let mut subscription = subscribe_with(&queue, options).await;
    let delivery = next(&mut subscription).await;
    for _ in 0..4 {
        delivery.extend(lease).await.expect("extend");
        let more = subscription.receive(1, lease * 3 / 10).await.expect("receive");
        assert!(more.is_empty(), "came again although its loan was extended");
    }
    delivery.ack().await.expect("ack");
}

/// A loan that was not extended ends: the message comes again, the first delivery is `Stale` and gives itself back,
/// the second one is settled as usual.
pub async fn settle_after_lease(cx: Cx) {
    let lease = Duration::from_secs(8);
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["lent".to_owned()]).await;
    // A backend may extend loans by itself; not beyond this.
    let options = ConsumeOptions { lease, max_lease: lease, ..ConsumeOptions::default() };
    let mut subscription = subscribe_with(&queue, options).await;
    let first = next(&mut subscription).await;
    let mut second = next(&mut subscription).await;
    assert_eq!((text(&first), text(&second)), ("lent".to_owned(), "lent".to_owned()));
    assert_eq!(first.extend(lease).await.expect_err("the loan is over").kind(), ErrorKind::Stale);
    let error = first.ack().await.expect_err("the loan is over");
    assert_eq!(error.error().kind(), ErrorKind::Stale, "{error}");
    assert_eq!(text(&error.into_delivery()), "lent", "the delivery is in the error");
    for _ in 0..5 {
        let Err(error) = second.ack().await else { break };
        // On a machine that stands still, this loan may be over too.
        assert_eq!(error.error().kind(), ErrorKind::Stale, "{error}");
        second = next(&mut subscription).await;
    }
    assert!(subscription.receive(1, lease * 3 / 2).await.expect("receive").is_empty(), "it was acknowledged");
}

/// Where nothing is lent, asking for an extension is `Unsupported`, and the delivery is still ours.
pub async fn lease_extension_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["ours".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    let error = delivery.extend(Duration::from_secs(1)).await.expect_err("nothing is lent");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    delivery.ack().await.expect("ack");
    quiet(&mut subscription).await;
}

/// A delivery that is dropped without settling comes again.
pub async fn dropped_delivery_returns(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(2)).await;
    let mut subscription = subscribe(&queue).await;
    drop(take(&mut subscription, 2).await);
    let mut seen = take_acked(&mut subscription, 2).await;
    seen.sort();
    assert_eq!(seen, bodies(2).collect::<Vec<_>>());
    quiet(&mut subscription).await;
}

/// Receives ten, acknowledges the odd ones backwards, and gives what is left.
async fn ack_odd_ones(subscription: &mut Subscription) -> Vec<polymq_core::Delivery> {
    let mut even = Vec::new();
    for (at, delivery) in take(subscription, 10).await.into_iter().enumerate().rev() {
        if at % 2 == 1 {
            delivery.ack().await.expect("ack");
        } else {
            even.push(delivery);
        }
    }
    even
}

/// Acknowledging later messages never acknowledges earlier ones: exactly the others come again.
pub async fn out_of_order_acks(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(10)).await;
    let mut subscription = subscribe(&queue).await;
    let left = ack_odd_ones(&mut subscription).await;
    drop(left);
    bus.close().await.expect("close");
    drop(subscription);
    let bus = cx.bus().await;
    let mut again = subscribe(&bus.channel(queue.address().clone())).await;
    let mut seen = take_acked(&mut again, 5).await;
    seen.sort();
    assert_eq!(seen, bodies(10).step_by(2).collect::<Vec<_>>());
    quiet(&mut again).await;
}

/// The same when the broker is killed before the others are settled: none of them is lost.
pub async fn out_of_order_acks_kill(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(10)).await;
    is_written_down(&cx, &bus).await;
    let mut subscription = subscribe(&queue).await;
    let left = ack_odd_ones(&mut subscription).await;
    // What is acknowledged is written down too: twice, as a broker that writes after it has answered has written the
    // first when it answers the second.
    for _ in 0..2 {
        is_written_down(&cx, &bus).await;
    }
    cx.broker().kill().await;
    cx.broker().start().await;
    let mut unacknowledged = Vec::new();
    for delivery in left {
        let body = text(&delivery);
        match delivery.ack().await {
            Err(error) => {
                assert!(matches!(error.error().kind(), ErrorKind::Stale | ErrorKind::Disconnected), "{error:?}");
                unacknowledged.push(body);
            }
            // What is lent for a time is not tied to a connection: settled in time, it is settled.
            Ok(()) => assert!(cx.deliveries_outlive_connections(), "its connection was lost"),
        }
    }
    let mut ledger = Ledger::sent(unacknowledged);
    let deadline = Instant::now() + cx.harness().recovery() * 2;
    while !ledger.is_complete() && Instant::now() < deadline {
        for delivery in subscription.receive(10, Duration::from_secs(1)).await.expect("receive") {
            ledger.see(text(&delivery));
            delivery.ack().await.expect("ack");
        }
    }
    if !ledger.is_complete() && cx.capabilities().stats {
        cx.note(format_args!("the queue in the end: {:?}", queue.stats(None).await));
    }
    // An acknowledgement on its way when the broker died may be lost; an unacknowledged message may not.
    cx.note(format_args!("{} acknowledged ones came again", ledger.surplus().len()));
    ledger.assert_nothing_lost();
}

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
    bus.close().await.expect("close");
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
