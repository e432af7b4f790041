//! F3 to F7: the network between client and broker breaks, goes silent, crawls, or works in one direction only.

use std::{collections::HashSet, pin::pin, time::Duration};

use futures_util::StreamExt;
use polymq_core::{Delivery, ErrorKind};
use tokio::time::{Instant, timeout};

use super::{
    plan::connect,
    scenario::{Expect, Plan, Scenario, leaves_no_task, send_one},
    states::States,
};
use crate::{
    Case, Cx, Direction, Heartbeat, PATIENCE,
    case::run,
    drive::{closes, subscribe, text},
    eventually,
};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F3_reset_of_all_connections", run!(reset_of_all_connections)).broker(),
    Case::new("F3_stream_goes_on", run!(stream_goes_on)).broker(),
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

/// A stream of deliveries goes on over two losses of the connection, until it is given up (mission row C6).
pub async fn stream_goes_on(cx: Cx) {
    let (proxy, plan) = Plan::through_proxy(&cx).await;
    let (hope, states) = (cx.harness().recovery() * 2, States::default());
    let bus = connect(&cx, &plan, &plan.url, Some(&states)).await;
    let queue = cx.queue(&bus).with_timeout(plan.one_send);
    {
        let mut stream = pin!(subscribe(&queue).await.stream());
        for round in 0..3 {
            let downs = states.downs();
            if round > 0 {
                proxy.refuse(true);
                proxy.reset_all();
            }
            let mut missing: HashSet<_> = (0..3).map(|n| format!("{round}-{n}")).collect();
            let (bodies, to) = (missing.clone(), queue.clone());
            // In the background: without a broker between, a send waits for its acknowledgement.
            let sending = tokio::spawn(async move {
                for body in bodies {
                    send_one(hope, &to, &body).await;
                }
            });
            if round > 0 {
                states.goes_down(cx.harness().recovery(), downs).await;
                proxy.refuse(false);
            }
            while !missing.is_empty() {
                let delivery = timeout(hope, stream.next()).await;
                let delivery = delivery.unwrap_or_else(|_| panic!("{missing:?} did not come; {}", bus.health()));
                let delivery = delivery.expect("a stream has no end").expect("losses are no errors of the stream");
                missing.remove(&text(&delivery));
                acked(delivery).await;
            }
            sending.await.expect("the sender");
        }
    }
    let (last, to) = ("after the stream", queue.clone());
    let sending = tokio::spawn(async move { send_one(hope, &to, last).await });
    let mut next = subscribe(&queue).await;
    loop {
        let delivery = timeout(hope, next.next()).await.expect("in time").expect("receive");
        let is_last = text(&delivery) == last;
        acked(delivery).await;
        if is_last {
            break;
        }
    }
    sending.await.expect("the sender");
    next.close().await.expect("close");
    closes(&bus).await;
    leaves_no_task().await;
}

/// What was fetched before its connection was lost may be no one's to acknowledge any more: it comes again.
async fn acked(delivery: Delivery) {
    if let Err(error) = delivery.ack().await {
        assert!(matches!(error.error().kind(), ErrorKind::Stale | ErrorKind::Disconnected), "{error:?}");
    }
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
