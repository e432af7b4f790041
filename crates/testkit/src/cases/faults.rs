//! F1 to F15: the broker and the network fail while messages are on their way.
//!
//! After every fault: what was accepted is handled at least once, duplicates are counted, health went down and came
//! up again, and the time to recover is in the summary.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq_core::{
    Attempt, Bus, BusBuilder, Channel, ConsumerFactory, ErrorKind, HealthState, Message, Retry, Running, State,
};
use tokio::{task::JoinSet, time::Instant};

use crate::{
    Case, Cx, Ledger, PATIENCE, Proxy,
    case::run,
    child::{self, Mode},
    cx::lock,
    drive::{Log, bodies, publish, quiet, retry_every, start, subscribe, text},
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("F1_graceful_restart", run!(graceful_restart))
        .when("persistent", |c| c.persistent, run!(super::connecting::not_persistent))
        .own_broker(),
    Case::new("F2_kill", run!(kill))
        .when("persistent", |c| c.persistent, run!(super::connecting::not_persistent))
        .own_broker(),
    Case::new("F3_reset_of_all_connections", run!(reset_of_all_connections)).broker(),
    Case::new("F4_black_hole", run!(black_hole)).broker(),
    Case::new("F8_starts_before_the_broker", run!(starts_before_the_broker)).own_broker(),
    Case::new("F8_refused_for_a_while", run!(refused_for_a_while)).broker(),
    Case::new("F8_gives_up_at_the_limit", run!(gives_up_at_the_limit)).broker(),
    Case::new("F9_ack_fails_while_a_handler_runs", run!(ack_fails_while_a_handler_runs)).broker(),
    Case::new("F15_consumer_killed_mid_handler", run!(consumer_killed_mid_handler)).broker(),
    Case::new("F15_consumer_killed_mid_batch", run!(consumer_killed_mid_batch)).broker(),
    Case::new("F15_consumer_killed_mid_drain", run!(consumer_killed_mid_drain)).broker(),
];

/// How many messages are on their way while things break.
const COUNT: usize = 600;
/// How long a black hole lasts, at least.
const HOLE: Duration = Duration::from_secs(30);
/// How long a broker refuses connections.
const AWAY: Duration = Duration::from_secs(120);
/// The time-out of one send while things break.
const ONE_SEND: Duration = Duration::from_secs(5);

/// The states that a connection went through.
#[derive(Debug, Clone, Default)]
struct States(Arc<Mutex<Vec<(HealthState, Instant)>>>);

impl States {
    fn watched(&self, builder: BusBuilder) -> BusBuilder {
        let states = Arc::clone(&self.0);
        builder.on_health(move |health| lock(&states).push((health.state, Instant::now())))
    }

    fn all(&self) -> Vec<HealthState> {
        lock(&self.0).iter().map(|(state, _)| *state).collect()
    }

    fn downs(&self) -> usize {
        self.all().iter().filter(|state| **state == HealthState::Down).count()
    }

    /// It has been down, and is not any more.
    async fn recovered(&self, cx: &Cx, bus: &Bus) {
        eventually(cx.harness().recovery(), || async {
            let (states, now) = (self.all(), bus.health());
            let is_up = matches!(now.state, HealthState::Up | HealthState::Degraded);
            if self.downs() > 0 && is_up { Ok(()) } else { Err(format!("{states:?}, now {now}")) }
        })
        .await;
    }

    async fn goes_down(&self, within: Duration, before: usize) {
        eventually(within, || async {
            if self.downs() > before { Ok(()) } else { Err(format!("health did not notice: {:?}", self.all())) }
        })
        .await;
    }
}

/// Stops and closes, which must not take for ever whatever has happened before.
async fn end(running: &Running, bus: &Bus) {
    let within = Duration::from_secs(45);
    tokio::time::timeout(within, running.stop()).await.expect("stopping is bounded").expect("stop");
    tokio::time::timeout(within, bus.close()).await.expect("closing is bounded").expect("close");
}

/// Settings under which a lost connection is looked for again soon.
async fn connect(cx: &Cx, states: &States, url: String) -> Bus {
    let builder = states.watched(cx.builder_to(url)).with("reconnect_max", "1s").with("connect_timeout", "3s");
    builder.connect().await.expect("connect")
}

/// Sends with retries as the errors allow, eight at a time; every message is accepted in the end, perhaps twice.
async fn send_persistently(cx: Cx, queue: Channel, count: usize) {
    send_logged(cx, queue, count, Log::default()).await;
}

/// The same; each message is in the log when it was accepted.
async fn send_logged(cx: Cx, queue: Channel, count: usize, accepted: Log) {
    let mut senders = JoinSet::new();
    let queue = queue.with_timeout(ONE_SEND);
    for body in bodies(count) {
        let (cx, queue, accepted) = (cx.clone(), queue.clone(), accepted.clone());
        senders.spawn(async move {
            send_one(&cx, &queue, &body).await;
            accepted.add(&Message::new(body), 1);
        });
        if senders.len() >= 8 {
            senders.join_next().await.expect("there are some").expect("a sender");
        }
    }
    while let Some(sender) = senders.join_next().await {
        sender.expect("a sender");
    }
}

/// Sends until it is accepted, as long as the errors allow it.
async fn send_one(cx: &Cx, queue: &Channel, body: &str) {
    let message = Message::new(body.to_owned()).with_id(body);
    let deadline = Instant::now() + cx.harness().recovery() * 2;
    while let Err(error) = queue.send_message(message.clone()).await {
        assert!(error.retry() != Retry::Never, "an error without hope during a fault: {error:?}");
        assert!(Instant::now() < deadline, "not sent in the end: {error:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn handle(message: Message, attempt: Attempt, log: State<Log>) {
    tokio::time::sleep(Duration::from_millis(2)).await;
    log.add(&message, attempt.0);
}

async fn consume(bus: &Bus, queue: &Channel, log: &Log) -> Running {
    let mut consumers = ConsumerFactory::new(bus);
    let route = consumers.state(log.clone()).route(queue.address().name(), handle);
    route.concurrency(4).prefetch(20).policy(retry_every(Duration::from_millis(100), 100));
    start(consumers).await
}

/// Sends `count` messages and breaks something when a third and when half of them were handled. The fault tells when
/// a killed broker was gone.
async fn traffic_with_faults(cx: &Cx, url: String, count: usize, fault: impl AsyncFn(usize) -> Option<Instant>) {
    let states = States::default();
    let bus = connect(cx, &states, url).await;
    let queue = cx.queue(&bus);
    let log = Log::default();
    let running = consume(&bus, &queue, &log).await;
    let queue = queue.with_timeout(ONE_SEND);
    let accepted = Log::default();
    let sending = tokio::spawn(send_logged(cx.clone(), queue.clone(), count, accepted.clone()));
    let mut unwritten = Vec::new();
    for (number, at) in [count / 3, count / 2].into_iter().enumerate() {
        log.reaches(at).await;
        let downs = states.downs();
        let began = Instant::now();
        if let Some(gone) = fault(number).await {
            unwritten.push((began - cx.harness().write_lag(), gone));
        }
        let ended = Instant::now();
        states.goes_down(PATIENCE, downs).await;
        // Sent after the fault, so that what was fetched before does not count.
        let marker = format!("after fault {number}");
        send_one(cx, &queue, &marker).await;
        eventually(cx.harness().recovery(), || async {
            if !log.of(&marker).is_empty() {
                return Ok(());
            }
            let last = log.all().last().map(|seen| (seen.body.clone(), seen.at.elapsed()));
            Err(format!(
                "{marker}, a message that was accepted is not handled; {} accepted, {} handled, the last {last:?} ago; {}",
                accepted.len(),
                log.len(),
                bus.health()
            ))
        })
        .await;
        cx.note(format_args!("fault {number}: works again after {:?}", ended.elapsed()));
    }
    sending.await.expect("the sender");
    // What the broker had accepted and not written when it was killed is lost by it, if it says that it writes late.
    let may_be_lost = |body: &str| {
        let lag = !cx.harness().write_lag().is_zero();
        lag && accepted.of(body).iter().any(|seen| unwritten.iter().any(|(from, to)| (*from..=*to).contains(&seen.at)))
    };
    let ledger = || {
        let markers = (0..2).map(|number| format!("after fault {number}"));
        let mut ledger = Ledger::sent(bodies(count).chain(markers));
        log.bodies().into_iter().for_each(|body| ledger.see(body));
        ledger
    };
    eventually(cx.harness().recovery(), || async {
        let ledger = ledger();
        let missing: Vec<_> = ledger.missing().into_iter().filter(|body| !may_be_lost(body)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let example = accepted.of(missing[0]).first().map(|seen| seen.at.elapsed());
        Err(format!(
            "{} of {count} are missing, {} accepted {example:?} ago; {}",
            missing.len(),
            missing[0],
            bus.health()
        ))
    })
    .await;
    for lost in ledger().missing() {
        let answered = accepted.of(lost).first().map(|seen| seen.at);
        let before =
            unwritten.iter().filter_map(|(_, gone)| answered.map(|at| gone.saturating_duration_since(at))).min();
        cx.note(format_args!("{lost} is lost: the broker answered it {before:?} before it was gone, and writes later"));
    }
    states.recovered(cx, &bus).await;
    assert_eq!(states.all().first(), Some(&HealthState::Up), "callbacks come in order");
    cx.note(format_args!("duplicate ratio {:.4}, states {:?}", ledger().duplicate_ratio(), states.all()));
    end(&running, &bus).await;
    drop(running);
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    eventually(PATIENCE, || async { if tasks() <= 4 { Ok(()) } else { Err(format!("{} tasks are left", tasks())) } })
        .await;
}

/// The broker is restarted in order at a third and at half of the messages: nothing that was accepted is lost.
pub async fn graceful_restart(cx: Cx) {
    let url = cx.harness().url(None);
    let of_fault = cx.clone();
    traffic_with_faults(&cx, url, COUNT, async move |_| {
        of_fault.broker().stop().await;
        of_fault.broker().start().await;
        None
    })
    .await;
}

/// The same with SIGKILL, and 10 000 messages.
pub async fn kill(cx: Cx) {
    const COUNT: usize = 10_000;
    let url = cx.harness().url(None);
    let of_fault = cx.clone();
    traffic_with_faults(&cx, url, COUNT, async move |_| {
        of_fault.broker().kill().await;
        let gone = Instant::now();
        of_fault.broker().start().await;
        Some(gone)
    })
    .await;
}

async fn proxy(cx: &Cx) -> (Arc<Proxy>, String) {
    let proxy = Proxy::start(cx.broker().address()).await.expect("a proxy");
    let url = cx.harness().url(Some(proxy.address()));
    (Arc::new(proxy), url)
}

/// Every TCP connection is reset at a third and at half of the messages: nothing that was accepted is lost.
pub async fn reset_of_all_connections(cx: Cx) {
    let (proxy, url) = proxy(&cx).await;
    let of_fault = Arc::clone(&proxy);
    traffic_with_faults(&cx, url, COUNT, async move |_| {
        of_fault.reset_all();
        None
    })
    .await;
    assert!(proxy.stats().resets >= 2, "{proxy:?}");
}

/// Packets vanish without a reset: that is noticed within the declared time, nothing is reported as sent meanwhile,
/// and afterwards everything goes on.
pub async fn black_hole(cx: Cx) {
    let heartbeat = cx.harness().heartbeat().expect("a backend with a broker must declare its heartbeat");
    let (proxy, url) = proxy(&cx).await;
    let states = States::default();
    let mut builder = states.watched(cx.builder_to(url)).with("reconnect_max", "1s").with("connect_timeout", "2s");
    for (key, value) in &heartbeat.settings {
        builder = builder.with(key, value);
    }
    let bus = builder.connect().await.expect("connect");
    let queue = cx.queue(&bus);
    let log = Log::default();
    let running = consume(&bus, &queue, &log).await;
    publish(&queue, ["before".to_owned()]).await;
    log.reaches(1).await;
    let began = Instant::now();
    proxy.pause();
    let sending = tokio::spawn({
        let queue = queue.with_timeout(Duration::from_secs(2));
        async move { queue.send_message(Message::new("into the hole")).await }
    });
    let answer = sending.await.expect("the sender");
    let error = answer.expect_err("nothing can have been accepted");
    let kinds = [ErrorKind::UnknownOutcome, ErrorKind::Timeout, ErrorKind::Disconnected];
    assert!(kinds.contains(&error.kind()), "{error:?}");
    // Two seconds more, because the timers of both sides are coarse.
    let bound = heartbeat.bound + Duration::from_secs(2);
    states.goes_down(bound.saturating_sub(began.elapsed()), 0).await;
    cx.note(format_args!("noticed after {:?}, declared {:?}", began.elapsed(), heartbeat.bound));
    tokio::time::sleep(HOLE.saturating_sub(began.elapsed())).await;
    proxy.resume();
    let resumed = Instant::now();
    states.recovered(&cx, &bus).await;
    send_persistently(cx.clone(), queue.clone(), 20).await;
    eventually(cx.harness().recovery(), || async {
        let seen = log.bodies();
        let missing = bodies(20).filter(|body| !seen.contains(body)).count();
        if missing == 0 { Ok(()) } else { Err(format!("{missing} are missing; {}", bus.health())) }
    })
    .await;
    cx.note(format_args!("works again after {:?}", resumed.elapsed()));
    end(&running, &bus).await;
}

/// A service that is started before its broker waits for it where that was asked for, and is an error otherwise.
pub async fn starts_before_the_broker(cx: Cx) {
    cx.broker().stop().await;
    let error = cx.builder().connect().await.expect_err("there is no broker");
    assert!(matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::Timeout), "{error:?}");
    let states = States::default();
    let builder = states.watched(cx.builder()).with("connect_retry", "true").with("reconnect_max", "500ms");
    let connecting = tokio::spawn(builder.connect());
    tokio::time::sleep(Duration::from_secs(2)).await;
    cx.broker().start().await;
    let started = Instant::now();
    let bus = tokio::time::timeout(cx.harness().recovery(), connecting)
        .await
        .expect("it connects in time")
        .expect("the connecting task");
    let bus = bus.expect("connect");
    eventually(cx.harness().recovery(), || async { bus.ping().await.map_err(|error| error.to_string()) }).await;
    let queue = cx.queue(&bus);
    send_persistently(cx.clone(), queue.clone(), 5).await;
    let mut subscription = subscribe(&queue).await;
    let mut ledger = Ledger::sent(bodies(5));
    for delivery in crate::drive::take(&mut subscription, 5).await {
        ledger.see(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    ledger.assert_nothing_lost();
    cx.note(format_args!("works {:?} after the broker", started.elapsed()));
    bus.close().await.expect("close");
}

/// While the broker refuses connections, it is asked again without end and without haste; then everything goes on.
pub async fn refused_for_a_while(cx: Cx) {
    let (proxy, url) = proxy(&cx).await;
    let states = States::default();
    let bus = connect(&cx, &states, url).await;
    let queue = cx.queue(&bus);
    let log = Log::default();
    let running = consume(&bus, &queue, &log).await;
    send_persistently(cx.clone(), queue.clone(), 5).await;
    log.reaches(5).await;
    proxy.refuse(true);
    proxy.reset_all();
    let before = proxy.stats().accepted;
    states.goes_down(PATIENCE, 0).await;
    let waiting = tokio::spawn({
        let queue = queue.with_timeout(Duration::from_secs(1));
        async move { queue.send_message(Message::new("not now")).await }
    });
    let error = waiting.await.expect("the sender").expect_err("nobody is there");
    assert!(matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::UnknownOutcome), "{error:?}");
    tokio::time::sleep(AWAY).await;
    let tried = proxy.stats().accepted - before;
    // A client library may hold a handful of connections, each of which is tried about once in `reconnect_max`.
    assert!((10..=1_000).contains(&tried), "{tried} attempts to connect in {AWAY:?}");
    assert_eq!(bus.health().state, HealthState::Down);
    proxy.refuse(false);
    let back = Instant::now();
    send_persistently(cx.clone(), queue.clone(), 20).await;
    eventually(cx.harness().recovery(), || async {
        let seen = log.bodies();
        let missing = bodies(20).filter(|body| !seen.contains(body)).count();
        if missing == 0 { Ok(()) } else { Err(format!("{missing} are missing; {}", bus.health())) }
    })
    .await;
    states.recovered(&cx, &bus).await;
    cx.note(format_args!("{tried} attempts in {AWAY:?}; works again after {:?}", back.elapsed()));
    end(&running, &bus).await;
}

/// With a limit of attempts, a connection that cannot be made again is closed after that many, and says so to those
/// who use it (mission row J10).
pub async fn gives_up_at_the_limit(cx: Cx) {
    let (proxy, url) = proxy(&cx).await;
    let states = States::default();
    let builder = states.watched(cx.builder_to(url)).with("reconnect_limit", "3").with("reconnect_initial", "100ms");
    let bus = builder.with("connect_timeout", "2s").connect().await.expect("connect");
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
    assert!((3..=20).contains(&tried), "{tried} attempts with a limit of 3");
    assert!(bus.health().reason.is_some(), "it says why");
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
    let _ = bus.close().await;
}

/// The connection is lost while a handler runs, so that its acknowledgement fails: the message is handled again, and
/// the service goes on. (What is lent for a time, or to a member of a group,
/// is not tied to a connection; there the acknowledgement may succeed.)
pub async fn ack_fails_while_a_handler_runs(cx: Cx) {
    async fn slow_first(message: Message, attempt: Attempt, log: State<Log>) {
        log.add(&message, attempt.0);
        if &message.payload()[..] == b"m-000000" && log.of("m-000000").len() == 1 {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    }
    let (proxy, url) = proxy(&cx).await;
    let states = States::default();
    let bus = connect(&cx, &states, url).await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(3)).await;
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.state(log.clone()).route(queue.address().name(), slow_first);
    route.concurrency(2).policy(retry_every(Duration::from_millis(100), 10));
    let running = start(consumers).await;
    log.reaches(1).await;
    proxy.reset_all();
    eventually(cx.harness().recovery(), || async {
        let seen = log.of("m-000000").len();
        let again = seen >= 2 || cx.deliveries_outlive_connections();
        if again { Ok(()) } else { Err(format!("handled {seen} times; {}", bus.health())) }
    })
    .await;
    // Where nothing is tied to a connection, one that was lost between two requests is not even noticed.
    if !cx.capabilities().leases {
        states.recovered(&cx, &bus).await;
    }
    send_one(&cx, &queue, "after").await;
    eventually(cx.harness().recovery(), || async {
        let seen = log.bodies();
        let missing: Vec<_> =
            ["m-000001", "m-000002", "after"].into_iter().filter(|body| !seen.iter().any(|s| s == body)).collect();
        if missing.is_empty() { Ok(()) } else { Err(format!("{missing:?} are missing; {}", bus.health())) }
    })
    .await;
    running.stop().await.expect("stop");
    assert!(log.len() <= 8, "handled far too often: {:?}", log.bodies());
    quiet(&mut subscribe(&queue).await).await;
    bus.close().await.expect("close");
}

/// Messages that a killed process held come again, each of them.
async fn killed(cx: &Cx, mode: Mode, drain: bool) {
    const COUNT: usize = 12;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(COUNT)).await;
    let (of_child, name) = (cx.clone(), queue.address().name().to_owned());
    let held = tokio::task::spawn_blocking(move || {
        let child = child::Running::start(&of_child, mode, &name);
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
    let mut subscription = subscribe(&queue).await;
    let mut ledger = Ledger::sent(bodies(COUNT));
    let deadline = Instant::now() + cx.harness().recovery();
    while !ledger.is_complete() && Instant::now() < deadline {
        for delivery in subscription.receive(COUNT, Duration::from_millis(500)).await.expect("receive") {
            ledger.see(text(&delivery));
            delivery.ack().await.expect("ack");
        }
    }
    ledger.assert_exact();
    assert!(held.iter().all(|body| body.starts_with("m-")), "{held:?}");
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
