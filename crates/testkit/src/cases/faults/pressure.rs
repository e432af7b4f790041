//! F13, F14: the broker has no room, does not read, or asks for patience.

use std::{sync::Arc, time::Duration};

use polymq_core::{Error, ErrorKind, Retry};
use tokio::time::Instant;

use super::scenario::{Expect, Plan, Scenario};
use crate::{Case, Cx, Direction, PATIENCE, case::run};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F13_alarm", run!(alarm)).with("an alarm", |harness| harness.alarm().map(drop)).own_broker(),
    Case::new("F13_broker_does_not_read", run!(broker_does_not_read)).broker(),
    Case::new("F14_throttled", run!(throttled))
        .with("throttling replies", |harness| harness.throttle().map(drop))
        .own_broker(),
];

/// The time-out of a send that cannot succeed.
const SHORT: Duration = Duration::from_secs(2);

/// An error that leaves hope, soon after the time-out of two seconds.
#[track_caller]
fn assert_in_time(error: &Error, began: Instant, kinds: &[ErrorKind]) {
    assert!(kinds.contains(&error.kind()), "{error:?} is none of {kinds:?}");
    assert_ne!(error.retry(), Retry::Never, "{error:?}");
    assert!(
        began.elapsed() < SHORT + Duration::from_secs(45),
        "a send with a time-out of {SHORT:?} took {:?}",
        began.elapsed()
    );
}

const NO_ROOM: &[ErrorKind] =
    &[ErrorKind::Busy, ErrorKind::Timeout, ErrorKind::UnknownOutcome, ErrorKind::Disconnected];

/// While the broker's alarm lasts it takes nothing: a send ends at its time-out, with an error and not for ever; when
/// the alarm is over, everything goes on.
pub async fn alarm(cx: Cx) {
    let alarm = cx.harness().alarm().expect("decided before");
    let mut scenario = Scenario::start(&cx, Plan::at(alarm.url())).await;
    scenario.sends_and_handles(20).await;
    alarm.turn(true).await;
    for _ in 0..2 {
        let began = Instant::now();
        let error = scenario.perhaps(SHORT).await.expect_err("the broker takes nothing");
        assert_in_time(&error, began, NO_ROOM);
    }
    scenario.states.goes_down(PATIENCE, 0).await;
    scenario.send(20);
    tokio::time::sleep(SHORT).await;
    alarm.turn(false).await;
    scenario.works_again(Instant::now()).await;
    scenario.ends(Expect::Flips).await;
}

/// The broker reads nothing more, so that what is sent fills every buffer on its way: each send ends at its time-out, its
/// outcome unknown; when the broker reads again, everything goes on.
pub async fn broker_does_not_read(cx: Cx) {
    const SENDS: usize = 24;
    let (proxy, plan) = Plan::through_proxy(&cx).await;
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(10).await;
    let room = cx.capabilities().max_payload.unwrap_or(usize::MAX).min(200 * 1024);
    proxy.pause_one_way(Direction::Up);
    let began = Instant::now();
    let body = Arc::new("x".repeat(room - 64));
    let sends = (0..SENDS).map(|_| scenario.perhaps_large(SHORT, &body));
    for outcome in futures_util::future::join_all(sends).await {
        assert_in_time(&outcome.expect_err("nobody reads"), began, NO_ROOM);
    }
    proxy.resume();
    let resumed = Instant::now();
    scenario.send(20);
    scenario.works_again(resumed).await;
    scenario.ends(Expect::IsUp).await;
}

/// The broker says "not so fast": that is an error that says when to come again, and a sender who does loses nothing.
pub async fn throttled(cx: Cx) {
    let throttle = cx.harness().throttle().expect("decided before");
    let mut scenario = Scenario::start(&cx, Plan::at(throttle.url())).await;
    scenario.sends_and_handles(20).await;
    throttle.turn(true).await;
    let began = Instant::now();
    let error = scenario.perhaps(SHORT).await.expect_err("throttled");
    // A client library may come again by itself until the time is over, and one more try may be under way then.
    assert_in_time(&error, began, &[ErrorKind::Busy, ErrorKind::Timeout, ErrorKind::UnknownOutcome]);
    scenario.send(50);
    tokio::time::sleep(SHORT).await;
    throttle.turn(false).await;
    scenario.works_again(Instant::now()).await;
    scenario.ends(Expect::IsUp).await;
}
