//! F8: nobody is there: at first, for a while, or for good.

use std::time::Duration;

use polymq_core::{ConsumeOptions, Error, ErrorKind, HealthState, Message};
use tokio::time::Instant;

use super::{
    network::NO_ANSWER,
    scenario::{Expect, Plan, Scenario, leaves_no_connection, leaves_no_task, send_one},
    states::States,
};
use crate::{
    Case, Cx, Ledger, PATIENCE, Proxy,
    case::run,
    drive::{bodies, closes, publish, subscribe, text},
    eventually,
};

pub(in crate::cases) const CASES: &[Case] = &[
    Case::new("F8_starts_before_the_broker", run!(starts_before_the_broker))
        .when("a connection to keep", |c| !c.direct, run!(sends_before_anybody_listens))
        .own_broker(),
    Case::new("F8_refused_for_a_while", run!(refused_for_a_while)).broker(),
    Case::new("F8_gives_up_at_the_limit", run!(gives_up_at_the_limit))
        .when("a connection to keep", |c| !c.direct, run!(asks_each_time))
        .broker(),
];

/// How long a broker refuses connections.
const AWAY: Duration = Duration::from_secs(120);

/// A service that is started before its broker waits for it where that was asked for, and is an error otherwise.
pub async fn starts_before_the_broker(cx: Cx) {
    cx.broker().stop().await;
    let error = cx.builder().connect().await.expect_err("there is no broker");
    assert!(matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::Timeout), "{error:?}");
    let states = States::default();
    let builder = states.watched(cx.builder()).with("connect_retry", "true").with("reconnect_max", "500ms");
    let name = cx.name();
    let mut starting = tokio::spawn({
        let name = name.clone();
        async move {
            let bus = builder.connect().await?;
            let subscription = bus.queue(name).subscribe(ConsumeOptions::default()).await;
            Ok::<_, Error>((bus, subscription))
        }
    });
    let early = tokio::time::timeout(Duration::from_secs(2), &mut starting).await;
    cx.broker().start().await;
    let started = Instant::now();
    let was_early = early.is_ok();
    let ready = match early {
        Ok(ready) => ready,
        Err(_) => tokio::time::timeout(cx.harness().recovery(), starting).await.expect("it starts in time"),
    };
    let (bus, subscription) = ready.expect("the starting task").expect("it has waited for its broker");
    let queue = bus.queue(name);
    eventually(cx.harness().recovery(), || async { bus.ping().await.map_err(|error| error.to_string()) }).await;
    let mut subscription = match subscription {
        Ok(subscription) => subscription,
        Err(error) if was_early => panic!("a consumer has not waited for its broker: {error:?}"),
        // A broker may need longer to start than one operation waits.
        Err(_) => {
            let again =
                || async { queue.subscribe(ConsumeOptions::default()).await.map_err(|error| error.to_string()) };
            eventually(cx.harness().recovery(), again).await
        }
    };
    for body in bodies(5) {
        send_one(cx.harness().recovery(), &queue, &body).await;
    }
    let mut ledger = Ledger::sent(bodies(5));
    // What was sent again after an unknown outcome may come twice.
    let deadline = Instant::now() + cx.harness().recovery();
    while !ledger.is_complete() && Instant::now() < deadline {
        for delivery in subscription.receive(5, Duration::from_secs(1)).await.expect("receive") {
            ledger.see(text(&delivery));
            delivery.ack().await.expect("ack");
        }
    }
    ledger.assert_nothing_lost();
    cx.record(crate::Figures {
        accepted: 5,
        handled: 5 + ledger.surplus().len(),
        duplicated: ledger.surplus().len(),
        recovery: Some(started.elapsed()),
        health: states.to_string(),
        ..crate::Figures::default()
    });
    subscription.close().await.expect("close");
    closes(&bus).await;
    leaves_no_task().await;
}

/// Where nothing is connected before it is used, a send before anybody listens is an error that may be repeated, and
/// health tells; afterwards everything goes on.
pub async fn sends_before_anybody_listens(cx: Cx) {
    cx.broker().stop().await;
    let mut scenario = Scenario::start(&cx, Plan::at(cx.harness().url(None))).await;
    let error = scenario.perhaps(Duration::from_secs(5)).await.expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error:?}");
    scenario.states.goes_down(PATIENCE, 0).await;
    cx.broker().start().await;
    let started = Instant::now();
    scenario.send(20);
    scenario.works_again(started).await;
    scenario.ends(Expect::Flips).await;
}

/// While the broker refuses connections, it is asked again without end and without haste; then everything goes on.
pub async fn refused_for_a_while(cx: Cx) {
    let (proxy, mut plan) = Plan::through_proxy(&cx).await;
    plan.hope = Some(AWAY + cx.harness().recovery() * 2);
    let mut scenario = Scenario::start(&cx, plan).await;
    scenario.sends_and_handles(5).await;
    proxy.refuse(true);
    proxy.reset_all();
    let before = proxy.stats().accepted;
    // Where nothing is connected without need, this is what notices; sooner than a declaration gives up.
    let error = scenario.perhaps(Duration::from_secs(2)).await.expect_err("nobody is there");
    assert!(NO_ANSWER.contains(&error.kind()), "{error:?}");
    scenario.states.goes_down(PATIENCE, 0).await;
    scenario.send(20);
    tokio::time::sleep(AWAY).await;
    let tried = proxy.stats().accepted - before;
    // A few connections ask about once a second each; where each send asks, eight senders do that ten times a second.
    let most = if cx.capabilities().direct { 12_000 } else { 1_200 };
    assert!((10..=most).contains(&tried), "{tried} attempts to connect in {AWAY:?}");
    assert_eq!(scenario.bus.health().state, HealthState::Down);
    proxy.refuse(false);
    let back = Instant::now();
    cx.note(format_args!("{tried} attempts in {AWAY:?}"));
    scenario.works_again(back).await;
    scenario.ends(Expect::Flips).await;
}

/// With a limit of attempts, a connection that cannot be made again is closed after that many, and says so to those
/// who use it (mission row J10).
pub async fn gives_up_at_the_limit(cx: Cx) {
    let proxy = Proxy::start(cx.broker().address()).await.expect("a proxy");
    let url = cx.harness().url(Some(proxy.address()));
    let states = States::default();
    let builder = states.watched(cx.builder_to(url)).with("reconnect_limit", "3").with("reconnect_initial", "100ms");
    let bus = builder.connect().await.expect("connect");
    let queue = cx.queue(&bus);
    publish(&queue, ["before".to_owned()]).await;
    let mut subscription = subscribe(&queue).await;
    proxy.refuse(true);
    let before = proxy.stats().accepted;
    proxy.reset_all();
    eventually(cx.harness().recovery(), || async {
        let now = bus.health();
        if now.state == HealthState::Closed { Ok(()) } else { Err(format!("{now}")) }
    })
    .await;
    let tried = proxy.stats().accepted - before;
    // Some client libraries try on their own as long as they live: at a pace, so thousands are an error and dozens are not.
    assert!((3..=100).contains(&tried), "{tried} attempts with a limit of 3");
    // Those of polymq itself are as many as were asked for.
    let reason = bus.health().reason.unwrap_or_default();
    assert!(reason.contains("given up after 3 attempts"), "it says why: {reason:?}");
    let error = queue.send_message(Message::new("after")).await.expect_err("it is closed");
    assert!(matches!(error.kind(), ErrorKind::Closed | ErrorKind::Disconnected), "{error:?}");
    let ended = tokio::time::timeout(PATIENCE, async {
        loop {
            match subscription.next().await {
                // What was fetched before may still be handed out.
                Ok(delivery) => drop(delivery),
                Err(error) => return error,
            }
        }
    });
    let error = ended.await.expect("the consumer ends");
    assert!(matches!(error.kind(), ErrorKind::Closed | ErrorKind::Disconnected), "{error:?}");
    drop(subscription);
    let _ = bus.close().await;
    leaves_no_connection(&proxy).await;
    leaves_no_task().await;
}

/// Where there is no connection to give up, each send asks anew, and none waits longer than it may.
pub async fn asks_each_time(cx: Cx) {
    let (proxy, plan) = Plan::through_proxy(&cx).await;
    let mut scenario = Scenario::start(&cx, plan).await;
    proxy.refuse(true);
    for _ in 0..5 {
        let asked = (Instant::now(), proxy.stats().accepted);
        let error = scenario.perhaps(Duration::from_secs(5)).await.expect_err("nobody is there");
        assert!(NO_ANSWER.contains(&error.kind()), "{error:?}");
        assert!(asked.0.elapsed() < PATIENCE, "an answer took {:?}", asked.0.elapsed());
        assert!(proxy.stats().accepted > asked.1, "nobody was asked");
    }
    assert_eq!(scenario.bus.health().state, HealthState::Down, "it is not given up");
    proxy.refuse(false);
    scenario.works_again(Instant::now()).await;
    scenario.ends(Expect::Flips).await;
}
