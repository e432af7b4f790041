//! X1: health tells the truth, while nothing fails and while the broker is away.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq_core::{ConsumerFactory, ErrorKind, HealthState, Message, State};

use crate::{
    Case, Cx, PATIENCE,
    case::run,
    cx::lock,
    drive::{Log, bodies, closes, publish, refused, start},
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("X1_health_without_a_fault", run!(health_without_a_fault)),
    Case::new("X1_health_while_the_broker_is_away", run!(health_while_the_broker_is_away)).own_broker(),
];

/// Up from the first moment on, not down while all is well, and closed after it was closed; a ping says the same.
pub async fn health_without_a_fault(cx: Cx) {
    let states = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&states);
    let builder = cx.steady(cx.builder()).on_health(move |health| lock(&told).push(health.state));
    let bus = builder.connect().await.expect("connect");
    assert_eq!(bus.health().state, HealthState::Up, "{}", bus.health());
    bus.ping().await.expect("ping");
    let queue = cx.queue(&bus);
    publish(&queue, bodies(3)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let health = bus.health();
    assert_eq!((health.state, health.reconnects), (HealthState::Up, 0), "{health}");
    closes(&bus).await;
    assert_eq!(bus.health().state, HealthState::Closed, "{}", bus.health());
    refused(bus.ping().await, &[ErrorKind::Closed]);
    eventually(PATIENCE, || async {
        let states = lock(&states).clone();
        if states == [HealthState::Up, HealthState::Closed] { Ok(()) } else { Err(format!("told: {states:?}")) }
    })
    .await;
}

/// While the broker is away: down, with a reason, not ready, and no ping; when it is back: up or degraded, counted as a
/// reconnect, ready, and messages flow. Nothing says otherwise at any time.
pub async fn health_while_the_broker_is_away(cx: Cx) {
    async fn note_down(message: Message, log: State<Log>) {
        log.add(&message, 1);
    }
    let mut builder = cx.builder().with("reconnect_max", "1s").with("connect_timeout", "15s");
    for (key, value) in cx.harness().heartbeat().map(|heartbeat| heartbeat.settings).unwrap_or_default() {
        builder = builder.with(key, value);
    }
    let bus = builder.connect().await.expect("connect");
    let queue = cx.queue(&bus);
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone()).route(queue.address().name(), note_down);
    let running = start(consumers).await;
    // A connection with so short a heartbeat may be lost on a busy machine, and the answer with it.
    eventually(cx.harness().recovery(), || queue.send_message(Message::new("before"))).await;
    log.reaches(1).await;
    eventually(PATIENCE, || async {
        let health = bus.health();
        // Degraded, if it was lost on the way here.
        if running.is_ready() && matches!(health.state, HealthState::Up | HealthState::Degraded) {
            Ok(())
        } else {
            Err(format!("all is well and it is {health}"))
        }
    })
    .await;

    cx.broker().stop().await;
    eventually(PATIENCE, || async {
        let health = bus.health();
        if health.state == HealthState::Down { Ok(()) } else { Err(format!("the broker is away and it is {health}")) }
    })
    .await;
    assert!(bus.health().reason.is_some(), "the reason is told");
    let ping = tokio::time::timeout(PATIENCE, bus.ping()).await.expect("a ping is bounded");
    assert!(ping.is_err() && !running.is_ready(), "there is no broker: {ping:?}");

    cx.broker().start().await;
    eventually(cx.harness().recovery(), || async {
        let health = bus.health();
        let is_up = matches!(health.state, HealthState::Up | HealthState::Degraded);
        match bus.ping().await {
            Ok(()) if is_up && running.is_ready() => Ok(()),
            ping => Err(format!("the broker is back and it is {health}, {ping:?}")),
        }
    })
    .await;
    assert!(bus.health().reconnects > 0, "{:?}", bus.health());
    eventually(cx.harness().recovery(), || queue.send_message(Message::new("after"))).await;
    eventually(cx.harness().recovery(), || async {
        if log.bodies().iter().any(|body| body == "after") { Ok(()) } else { Err("not handled yet") }
    })
    .await;
    running.stop().await.expect("stop");
    closes(&bus).await;
    assert_eq!(bus.health().state, HealthState::Closed);
}
