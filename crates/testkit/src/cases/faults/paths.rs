//! F17: messages overtake each other on different paths.

use std::{sync::Arc, time::Duration};

use polymq_core::{Channel, Message, Order};
use tokio::time::Instant;

use super::{
    scenario::{leaves_no_connection, leaves_no_task},
    states::States,
};
use crate::{
    Case, Cx, Figures, Ledger, Proxy,
    case::run,
    drive::{closes, prefetch, subscribe_with, text},
};

pub(in crate::cases) const CASES: &[Case] = &[Case::new("F17_paths_of_different_speed", run!(paths)).broker()];

/// Sends twenty at a time, in order.
async fn send(channel: Channel, sender: &'static str, count: usize) {
    for first in (0..count).step_by(20) {
        let message = |n| {
            let body = format!("{sender}-{n:06}");
            Message::new(body.clone()).with_id(body).with_key(sender)
        };
        for sent in channel.send_all((first..count.min(first + 20)).map(message)).await {
            sent.expect("accepted");
        }
    }
}

/// Two senders, one on a path whose delay changes all the time and one on a fast path: nothing is lost, nothing comes
/// twice, and where order is declared, what each has sent comes in the order in which it was sent.
pub async fn paths(cx: Cx) {
    const STEPS: [u64; 6] = [120, 5, 80, 0, 200, 10];
    let count = cx.load(120);
    let proxy = Arc::new(Proxy::start(cx.broker().address()).await.expect("a proxy"));
    let states = States::default();
    let slow = states.watched(cx.builder_to(cx.harness().url(Some(proxy.address()))));
    let slow = slow.connect().await.expect("connect");
    // Without a broker between, both must go where the consumer listens.
    let fast = if cx.capabilities().direct { slow.clone() } else { cx.bus().await };
    let queue = cx.queue(&slow);
    let mut subscription = subscribe_with(&queue, prefetch(100)).await;
    let changing = tokio::spawn({
        let proxy = Arc::clone(&proxy);
        async move {
            for step in STEPS.iter().cycle() {
                proxy.latency(Duration::from_millis(*step));
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    });
    let of_fast = fast.channel(queue.address().clone());
    let sending = tokio::spawn(async move { tokio::join!(send(queue, "slow", count), send(of_fast, "fast", count)) });
    let mut seen = Vec::new();
    let mut all_accepted = None;
    while seen.len() < 2 * count && all_accepted.is_none_or(|at: Instant| at.elapsed() < cx.harness().recovery()) {
        if all_accepted.is_none() && sending.is_finished() {
            all_accepted = Some(Instant::now());
        }
        for delivery in subscription.receive(20, Duration::from_millis(500)).await.expect("receive") {
            seen.push(text(&delivery));
            delivery.ack().await.expect("ack");
        }
    }
    sending.await.expect("the senders");
    changing.abort();
    proxy.latency(Duration::ZERO);
    let every = |sender: &'static str| (0..count).map(move |n| format!("{sender}-{n:06}"));
    let mut ledger = Ledger::sent(every("slow").chain(every("fast")));
    seen.iter().for_each(|body| ledger.see(body.as_str()));
    ledger.assert_exact();
    if cx.capabilities().order != Order::None {
        for sender in ["slow", "fast"] {
            let of_one: Vec<_> = seen.iter().filter(|body| body.starts_with(sender)).cloned().collect();
            assert_eq!(of_one, every(sender).collect::<Vec<_>>(), "the order of what {sender} has sent");
        }
    }
    let (accepted, handled) = (2 * count, seen.len());
    cx.record(Figures { accepted, handled, health: states.to_string(), ..Figures::default() });
    subscription.close().await.expect("close");
    closes(&fast).await;
    closes(&slow).await;
    leaves_no_connection(&proxy).await;
    leaves_no_task().await;
}
