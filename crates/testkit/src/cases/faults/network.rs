//! F3 to F7: the network between client and broker breaks, goes silent, crawls, or works in one direction only.

use std::time::Duration;

use polymq_core::ErrorKind;
use tokio::time::Instant;

use super::scenario::{Expect, Plan, Scenario};
use crate::{Case, Cx, Direction, Heartbeat, PATIENCE, case::run, eventually};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F3_reset_of_all_connections", run!(reset_of_all_connections)).broker(),
    Case::new("F4_black_hole", run!(black_hole)).broker(),
    Case::new("F5_latency_and_loss", run!(latency_and_loss)).broker(),
    Case::new("F6_narrow_line", run!(narrow_line)).broker(),
    Case::new("F7_half_open", run!(half_open)).when("a broker between", |c| !c.direct, run!(answers_are_lost)).broker(),
];

/// How long a black hole lasts, at least.
const HOLE: Duration = Duration::from_secs(30);
/// What an error may say when nobody has answered.
pub(super) const NO_ANSWER: [ErrorKind; 3] = [ErrorKind::UnknownOutcome, ErrorKind::Timeout, ErrorKind::Disconnected];

/// Every TCP connection is reset at a third and at half of the messages: nothing that was accepted is lost.
pub async fn reset_of_all_connections(cx: Cx) {
    let count = cx.load(600);
    let (proxy, plan) = Plan::through_proxy(&cx).await;
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.send(count);
    for at in [count / 3, count / 2] {
        scenario.resets(at, &proxy).await;
    }
    scenario.ends(Expect::Flips).await;
    assert!(proxy.stats().resets >= 2, "{proxy:?}");
}

fn heartbeat(cx: &Cx) -> Heartbeat {
    cx.harness().heartbeat().expect("a backend with a broker must declare its heartbeat")
}

impl Scenario {
    /// A send that nobody answers says so after its time-out of two seconds, and health within the declared time (some
    /// seconds more, because the timers of both sides are coarse and machines busy).
    async fn is_noticed(&mut self, heartbeat: &Heartbeat) {
        let began = Instant::now();
        let error = self.perhaps(Duration::from_secs(2)).await.expect_err("nothing can have been accepted");
        assert!(NO_ANSWER.contains(&error.kind()), "{error:?}");
        let bound = heartbeat.bound + Duration::from_secs(25);
        self.states.goes_down(bound.saturating_sub(began.elapsed()), 0).await;
        self.cx.note(format_args!("noticed after {:?}, declared {:?}", began.elapsed(), heartbeat.bound));
    }
}

/// Packets vanish without a reset: that is noticed within the declared time, nothing is reported as sent meanwhile,
/// and afterwards everything goes on.
pub async fn black_hole(cx: Cx) {
    let (proxy, mut plan) = Plan::through_proxy(&cx).await;
    let heartbeat = heartbeat(&cx);
    plan.settings = heartbeat.settings.clone();
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(5).await;
    let began = Instant::now();
    proxy.pause();
    scenario.is_noticed(&heartbeat).await;
    tokio::time::sleep(HOLE.saturating_sub(began.elapsed())).await;
    proxy.resume();
    let resumed = Instant::now();
    scenario.send(20);
    scenario.works_again(resumed).await;
    scenario.ends(Expect::Flips).await;
}

/// Every packet takes half a second each way, and one in twenty is lost, which over TCP means that it and all behind it
/// come later, when it was sent again: nothing is lost, and nothing fails that was given the time.
pub async fn latency_and_loss(cx: Cx) {
    let (proxy, mut plan) = Plan::through_proxy(&cx).await;
    (plan.senders, plan.one_send) = (32, Duration::from_secs(30));
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(20).await;
    proxy.latency(Duration::from_millis(500));
    proxy.stalls(20, Duration::from_millis(1500));
    scenario.send(cx.load(120));
    scenario.all_accepted().await;
    proxy.latency(Duration::ZERO);
    proxy.stalls(0, Duration::ZERO);
    scenario.works_again(Instant::now()).await;
    scenario.ends(Expect::IsUp).await;
}

/// 1 KiB a second, each way: everything arrives in the end, and nothing fails that was given the time.
pub async fn narrow_line(cx: Cx) {
    let (proxy, mut plan) = Plan::through_proxy(&cx).await;
    (plan.senders, plan.one_send) = (4, Duration::from_secs(60));
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(5).await;
    proxy.bandwidth(Some(1024));
    scenario.send(12);
    scenario.all_accepted().await;
    proxy.bandwidth(None);
    scenario.works_again(Instant::now()).await;
    scenario.ends(Expect::IsUp).await;
}

/// The sender's path works, and nothing comes to the consumer: the sender goes on, the consumer's side notices within the
/// declared time, and when the path is whole again, everything is handled.
pub async fn half_open(cx: Cx) {
    let (proxy, mut plan) = Plan::through_proxy(&cx).await;
    let heartbeat = heartbeat(&cx);
    plan.settings = heartbeat.settings.clone();
    plan.sender = Some(cx.harness().url(None));
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(10).await;
    proxy.pause_one_way(Direction::Down);
    let began = Instant::now();
    scenario.send(50);
    scenario.all_accepted().await;
    assert!(began.elapsed() < PATIENCE * 2, "the sender's own path took {:?}", began.elapsed());
    scenario.is_noticed(&heartbeat).await;
    eventually(cx.harness().recovery(), || async {
        let state = scenario.health_of_sender();
        if state == Some(polymq_core::HealthState::Down) { Err("the sender's own path is down") } else { Ok(()) }
    })
    .await;
    proxy.resume();
    let resumed = Instant::now();
    scenario.send(20);
    scenario.works_again(resumed).await;
    scenario.ends(Expect::Flips).await;
}

/// Without a broker between, the one path is the sender's: requests arrive and are handled, and no answer comes back. The
/// outcome is unknown to the sender, who sends again under the same id.
pub async fn answers_are_lost(cx: Cx) {
    let (proxy, mut plan) = Plan::through_proxy(&cx).await;
    let heartbeat = heartbeat(&cx);
    plan.settings = heartbeat.settings.clone();
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(10).await;
    proxy.pause_one_way(Direction::Down);
    scenario.is_noticed(&heartbeat).await;
    // One that was given up before it was written has not arrived.
    let began = Instant::now();
    while scenario.handled.len() < 11 {
        assert!(began.elapsed() < PATIENCE * 2, "no request arrives");
        let _ = scenario.perhaps(Duration::from_secs(2)).await;
    }
    scenario.send(20);
    proxy.resume();
    scenario.works_again(Instant::now()).await;
    scenario.ends(Expect::Flips).await;
}
