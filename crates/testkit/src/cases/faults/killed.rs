//! F15: the consumer's process is killed.

use std::time::Duration;

use polymq_core::{Capabilities, ConsumeOptions};
use tokio::time::Instant;

use super::{
    scenario::{leaves_no_task, send_one},
    states::States,
};
use crate::{
    Case, Cx, Figures, Ledger, PATIENCE,
    case::run,
    cases::{connecting::not_persistent, names::topics_refused, topics::group_misses_what_it_is_away_for},
    child::{self, GROUP, LISTENS, Mode},
    drive::{bodies, closes, counts, publish, quiet, subscribe, subscribe_with, text},
};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F15_consumer_killed_mid_handler", run!(consumer_killed_mid_handler)).broker(),
    Case::new("F15_consumer_killed_mid_batch", run!(consumer_killed_mid_batch)).broker(),
    Case::new("F15_consumer_killed_mid_drain", run!(consumer_killed_mid_drain)).broker(),
    Case::new("F15_member_of_a_group_killed", run!(member_of_a_group_killed))
        .when("persistent, groups, topics that keep", keeps_for_groups, run!(nothing_is_kept))
        .broker(),
];

fn keeps_for_groups(capabilities: &Capabilities) -> bool {
    capabilities.persistent && capabilities.topics && capabilities.groups && !capabilities.at_most_once_topics
}

/// Without groups, one is refused; with topics that keep nothing, a group has nothing to come back to, as T3 shows.
async fn nothing_is_kept(cx: Cx) {
    if !cx.capabilities().topics {
        topics_refused(cx).await;
    } else if !cx.capabilities().persistent {
        not_persistent(cx).await;
    } else {
        group_misses_what_it_is_away_for(cx).await;
    }
}

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
    let held = child::watched(held).await;
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
    subscription.close().await.expect("close");
    closes(&bus).await;
    leaves_no_task().await;
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

/// A member of a topic's group is killed with SIGKILL when it has handled five of ten: another member of the group gets the
/// other five, and of the first five at most those whose acknowledgement had not arrived (mission row G16).
pub async fn member_of_a_group_killed(cx: Cx) {
    const COUNT: usize = 10;
    let url = cx.harness().url(None);
    let states = States::default();
    let bus = states.watched(cx.builder_to(url.clone())).connect().await.expect("connect");
    let topic = bus.topic(cx.topic_name(&[GROUP]));
    let (of_child, name) = (cx.clone(), topic.address().name().to_owned());
    let joining = tokio::task::spawn_blocking(move || {
        let child = child::Running::start_at(&of_child, Mode::Member, &name, url);
        child.says(LISTENS);
        child
    });
    let child = child::watched(joining).await;
    publish(&topic, bodies(COUNT)).await;
    let killing = tokio::task::spawn_blocking(move || {
        let mut begun = Vec::new();
        while begun.len() < 6 {
            let line = child.line(PATIENCE).expect("the child handles messages");
            begun.push(line.trim_start_matches("handling ").to_owned());
        }
        child.kill();
        begun
    });
    let begun = child::watched(killing).await;
    let killed = Instant::now();
    let options = ConsumeOptions { group: Some(GROUP.to_owned()), ..ConsumeOptions::default() };
    let mut member = subscribe_with(&topic, options).await;
    let handled = &begun[..5];
    let left: Vec<_> = bodies(COUNT).filter(|body| !handled.contains(body)).collect();
    assert_eq!(left.len(), 5, "five different ones were handled: {begun:?}");
    let mut seen = Vec::new();
    let deadline = Instant::now() + cx.harness().recovery();
    while !left.iter().all(|body| seen.contains(body)) && Instant::now() < deadline {
        for delivery in member.receive(COUNT, Duration::from_millis(500)).await.expect("receive") {
            seen.push(text(&delivery));
            delivery.ack().await.expect("ack");
        }
    }
    let recovery = Some(killed.elapsed());
    for delivery in member.receive(COUNT, Duration::from_secs(2)).await.expect("receive") {
        seen.push(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    let mut ledger = Ledger::sent(left);
    let (again, rest): (Vec<_>, Vec<_>) = seen.into_iter().partition(|body| handled.contains(body));
    rest.into_iter().for_each(|body| ledger.see(body));
    ledger.assert_nothing_lost();
    // Where members put a topic's events into the group's queue, the one that was killed may not have said yet how far it was:
    // beside what it had not acknowledged, a second copy of each may come.
    assert!(counts(&again).values().all(|times| *times <= 2), "more than twice again: {again:?}");
    assert!(ledger.surplus().iter().all(|(_, more)| *more == 1), "more than twice: {:?}", ledger.surplus());
    let duplicated = again.len() + ledger.surplus().len();
    cx.note(format_args!(
        "of five that were handled before the kill, {} came again, and {} of the others twice",
        again.len(),
        ledger.surplus().len()
    ));
    let (handled, health) = (COUNT + duplicated, states.to_string());
    cx.record(Figures { accepted: COUNT, handled, duplicated, recovery, health, ..Figures::default() });
    member.close().await.expect("close");
    closes(&bus).await;
    leaves_no_task().await;
}
