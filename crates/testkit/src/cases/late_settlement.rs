//! S2 to S4: settling from elsewhere, late, out of order, or not at all.

use std::time::Duration;

use polymq_core::{ConsumeOptions, ErrorKind, Subscription};
use tokio::time::Instant;

use super::settlement::empty_for_others;
use crate::{
    Case, Cx, Ledger,
    case::run,
    drive::{bodies, closes, is_written_down, next, publish, quiet, subscribe, subscribe_with, take, take_acked, text},
};

pub(super) const CASES: &[Case] = &[
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
];

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
    closes(&bus).await;
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
    closes(&bus).await;
    empty_for_others(&cx, &queue).await;
}

/// After the connection was closed, settling is `Closed` or `Stale`, gives the delivery back, and the message comes again.
pub async fn settle_after_bus_close(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(3)).await;
    let mut subscription = subscribe(&queue).await;
    let taken = take(&mut subscription, 3).await;
    closes(&bus).await;
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
    closes(&bus).await;
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
        let settled = delivery.ack().await;
        if let Err(error) = &settled {
            assert!(matches!(error.error().kind(), ErrorKind::Stale | ErrorKind::Disconnected), "{error:?}");
        }
        // What is lent for a time is not tied to a connection: settled in time, it is settled. On a lost connection nothing is,
        // even if the loss was not noticed yet.
        if settled.is_err() || !cx.deliveries_outlive_connections() {
            unacknowledged.push(body);
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
