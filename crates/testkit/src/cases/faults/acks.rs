//! F9, F16: acknowledgements and confirmations are lost, and messages come twice.

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{sync::Notify, time::Instant};

use super::scenario::{Expect, Plan, Scenario};
use crate::{Case, Cx, Direction, PATIENCE, case::run, drive::bodies, eventually};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F9_ack_fails_while_a_handler_runs", run!(ack_fails_while_a_handler_runs)).broker(),
    Case::new("F16_duplicates_have_one_id", run!(duplicates_have_one_id)).broker(),
];

/// What health tells of one short cut. Where nothing is tied to a connection, one that was lost between two requests, or is
/// made again before anybody has looked, is not even noticed. (F3 breaks them until it is told.)
fn told(cx: &Cx) -> Expect {
    if cx.deliveries_outlive_connections() { Expect::IsUp } else { Expect::Flips }
}

/// The connection is lost while a handler runs, so that its acknowledgement fails: the message is handled again, and
/// the service goes on. (What is lent for a time, or to a member of a group,
/// is not tied to a connection; there the acknowledgement may succeed.)
pub async fn ack_fails_while_a_handler_runs(cx: Cx) {
    let (proxy, mut plan) = Plan::through_proxy(&cx).await;
    let goes_on = Arc::new(Notify::new());
    plan.slow = Some(("m-000000", Arc::clone(&goes_on)));
    // A send that is given up before the connection is lost is made again, and counts as well.
    plan.one_send = PATIENCE;
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.send(3);
    if !cx.capabilities().direct {
        // What is not confirmed when the connection is lost is sent again, which would count as handled too often below.
        scenario.all_accepted().await;
    }
    let begun = || scenario.started.of("m-000000").len();
    eventually(cx.harness().recovery(), || async {
        if begun() >= 1 { Ok(()) } else { Err("the handler does not run") }
    })
    .await;
    let all = proxy.stats().resets + proxy.stats().open;
    proxy.reset_all();
    let reset = Instant::now();
    // Every one of them, or else an acknowledgement may pass on the last. One that has just closed by itself is not reset.
    for _ in 0..1000 {
        if proxy.stats().resets >= all {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    goes_on.notify_one();
    eventually(cx.harness().recovery(), || async {
        let again = begun() >= 2 || cx.deliveries_outlive_connections();
        if again { Ok(()) } else { Err(format!("handled {} times; {}", begun(), scenario.bus.health())) }
    })
    .await;
    scenario.works_again(reset).await;
    let most = bodies(3).map(|body| scenario.started.of(&body).len()).max();
    assert!(most <= Some(4), "handled far too often: {:?}", scenario.started.bodies());
    scenario.ends(told(&cx)).await;
}

/// Connections are cut between request and answer, and in the middle of what clients say, again and again: whatever
/// comes twice by that comes under the id that it had, so that a receiver who keeps ids has each effect once.
pub async fn duplicates_have_one_id(cx: Cx) {
    let count = cx.load(400);
    let (proxy, plan) = Plan::through_proxy(&cx).await;
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.send(count);
    for cut in 1..=6 {
        scenario.handled.reaches(count * cut / 12).await;
        if cut % 2 == 1 {
            proxy.cut_before_reply()
        } else {
            proxy.cut_after(Direction::Up, 100)
        }
        let began = Instant::now();
        while proxy.will_cut() {
            assert!(began.elapsed() < PATIENCE, "nothing passes");
            // All the others may have passed already.
            scenario.send(1);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    scenario.all_accepted().await;
    scenario.works_again(Instant::now()).await;
    let (mut inbox, mut effects) = (HashSet::new(), HashSet::new());
    for seen in scenario.handled.all() {
        if inbox.insert(seen.id) {
            assert!(effects.insert(seen.body.clone()), "{} has two effects", seen.body);
        }
    }
    scenario.ends(told(&cx)).await;
}
