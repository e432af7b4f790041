//! F1, F2: the broker is restarted in order, or killed.

use tokio::time::Instant;

use super::scenario::{Expect, Plan, Scenario};
use crate::{Case, Cx, case::run, cases::connecting::not_persistent};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F1_graceful_restart", run!(graceful_restart))
        .when("persistent", |c| c.persistent, run!(not_persistent))
        .own_broker(),
    Case::new("F2_kill", run!(kill)).when("persistent", |c| c.persistent, run!(not_persistent)).own_broker(),
];

/// The broker is restarted in order at a third and at half of the messages: nothing that was accepted is lost.
pub async fn graceful_restart(cx: Cx) {
    let count = cx.load(600);
    let mut scenario = Scenario::start(&cx, Plan::at(cx.harness().url(None))).await;
    scenario.send(count);
    for at in [count / 3, count / 2] {
        let broker = cx.broker();
        scenario
            .breaks(at, async || {
                broker.stop().await;
                broker.start().await;
                None
            })
            .await;
    }
    scenario.ends(Expect::Flips).await;
}

/// The same with SIGKILL, and 10 000 messages.
pub async fn kill(cx: Cx) {
    const COUNT: usize = 10_000;
    let mut scenario = Scenario::start(&cx, Plan::at(cx.harness().url(None))).await;
    scenario.send(COUNT);
    for at in [COUNT / 3, COUNT / 2] {
        let broker = cx.broker();
        scenario
            .breaks(at, async || {
                broker.kill().await;
                let gone = Instant::now();
                broker.start().await;
                Some(gone)
            })
            .await;
    }
    scenario.ends(Expect::Flips).await;
}
