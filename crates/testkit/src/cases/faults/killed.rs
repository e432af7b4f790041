//! F15: the consumer's process is killed.

use std::time::Duration;

use tokio::time::Instant;

use super::{scenario::send_one, states::States};
use crate::{
    Case, Cx, Figures, Ledger, PATIENCE,
    case::run,
    child::{self, Mode},
    drive::{bodies, quiet, subscribe, text},
};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F15_consumer_killed_mid_handler", run!(consumer_killed_mid_handler)).broker(),
    Case::new("F15_consumer_killed_mid_batch", run!(consumer_killed_mid_batch)).broker(),
    Case::new("F15_consumer_killed_mid_drain", run!(consumer_killed_mid_drain)).broker(),
];

/// Messages that a killed process held come again, each of them.
async fn killed(cx: &Cx, mode: Mode, drain: bool) {
    const COUNT: usize = 12;
    let url = cx.harness().url(None);
    let states = States::default();
    let bus = states.watched(cx.builder_to(url.clone())).connect().await.expect("connect");
    let queue = cx.queue(&bus);
    // In the background, because without anybody between, a send waits for its handler.
    let sending = tokio::spawn({
        // A send that has timed out is sent again: without a broker between it has to, and else it would come twice.
        let one = Duration::from_secs(if cx.capabilities().direct { 12 } else { 30 });
        let (hope, queue) = (cx.harness().recovery() * 2, queue.with_timeout(one));
        async move {
            let sends = bodies(COUNT).map(|body| {
                let queue = queue.clone();
                async move { send_one(hope, &queue, &body).await }
            });
            futures_util::future::join_all(sends).await;
        }
    });
    let (of_child, name) = (cx.clone(), queue.address().name().to_owned());
    let held = tokio::task::spawn_blocking(move || {
        let child = child::Running::start_at(&of_child, mode, &name, url);
        let mut held = Vec::new();
        let wanted = if mode == Mode::Hold { 4 } else { 1 };
        while held.len() < wanted {
            let line = child.line(PATIENCE).expect("the child handles messages");
            held.push(line.trim_start_matches("handling ").to_owned());
        }
        if drain {
            child.signal("TERM");
            std::thread::sleep(Duration::from_millis(500));
        }
        child.kill();
        held
    });
    let held = held.await.expect("the child's watcher");
    let killed = Instant::now();
    let mut subscription = subscribe(&queue).await;
    let mut ledger = Ledger::sent(bodies(COUNT));
    let deadline = Instant::now() + cx.harness().recovery();
    while !ledger.is_complete() && Instant::now() < deadline {
        for delivery in subscription.receive(COUNT, Duration::from_millis(500)).await.expect("receive") {
            ledger.see(text(&delivery));
            delivery.ack().await.expect("ack");
        }
    }
    sending.await.expect("the sender");
    if drain && cx.capabilities().leases {
        // What is lent may be given back as a copy, and the kill may come before the original is taken away.
        ledger.assert_nothing_lost();
    } else {
        ledger.assert_exact();
    }
    assert!(held.iter().all(|body| body.starts_with("m-")), "{held:?}");
    cx.record(Figures {
        accepted: COUNT,
        handled: COUNT + ledger.surplus().len(),
        duplicated: ledger.surplus().len(),
        recovery: Some(killed.elapsed()),
        health: states.to_string(),
        ..Figures::default()
    });
    quiet(&mut subscription).await;
}

/// A consumer that is killed with SIGKILL while its handlers run: everything it held comes again.
pub async fn consumer_killed_mid_handler(cx: Cx) {
    killed(&cx, Mode::Hold, false).await;
}

/// The same in the middle of a batch.
pub async fn consumer_killed_mid_batch(cx: Cx) {
    killed(&cx, Mode::HoldBatch, false).await;
}

/// The same in the middle of a drain.
pub async fn consumer_killed_mid_drain(cx: Cx) {
    killed(&cx, Mode::Hold, true).await;
}
