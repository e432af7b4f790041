//! L3 to L8: closing, and starting again.

use std::{sync::Arc, time::Duration};

use polymq_core::{Channel, ConsumerFactory, ErrorKind, Message, State};
use tokio::{sync::Barrier, time::Instant};

use crate::{
    Case, Cx, Ledger, PATIENCE, Proxy,
    case::run,
    drive::{
        CLOSE_FOR, Log, bodies, closes, counted, in_order, publish, quiet, refused, rest, rest_until, start, subscribe,
        take, take_acked, text,
    },
    eventually,
};

pub(super) const CASES: &[Case] = &[
    Case::new("L3_close_flushes", run!(close_flushes)),
    Case::new("L4_after_close", run!(after_close)),
    Case::new("L5_close_is_idempotent", run!(close_is_idempotent)),
    Case::new("L5_close_with_a_blocked_consumer", run!(close_with_a_blocked_consumer)),
    Case::new("L5_many_close_at_once", run!(many_close_at_once)),
    Case::new("L6_open_and_close", run!(open_and_close)).alone(),
    Case::new("L6_connections_are_shared", run!(connections_are_shared)).broker(),
    Case::new("L7_add_again_under_load", run!(add_again_under_load)),
    Case::new("L8_cancelled_sends", run!(cancelled_sends)),
    Case::new("L8_cancelled_receives", run!(cancelled_receives)),
];

/// Closing a bus waits for what was handed over before: every message is with the broker.
pub async fn close_flushes(cx: Cx) {
    // As many as the slowest broker takes in the time that closing gives it.
    const COUNT: usize = 60;
    // A broker that stands still for longer than closing waits is no answer to the question.
    for round in 1.. {
        let bus = cx.bus().await;
        let queue = cx.queue(&bus).with_window(1000, polymq_core::WhenFull::Wait);
        let shared = bus.channel(queue.address().clone());
        let mut answers = Vec::new();
        for body in bodies(COUNT) {
            answers.push(shared.enqueue(Message::new(body)).await.expect("enqueue"));
        }
        let began = Instant::now();
        match bus.close().await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Timeout && began.elapsed() >= CLOSE_FOR && round < 5 => continue,
            Err(error) => panic!("close: {error:?}"),
        }
        for answer in answers {
            answer.await.expect("answered before the close was over");
        }
        return every_one_is_there(&cx, &queue, COUNT).await;
    }
}

async fn every_one_is_there(cx: &Cx, queue: &Channel, count: usize) {
    let mut ledger = Ledger::sent(bodies(count));
    rest(cx, queue, count).await.into_iter().for_each(|body| ledger.see(body));
    ledger.assert_exact();
}

/// Everything that is used after it was closed answers `Closed`, at once.
pub async fn after_close(cx: Cx) {
    let closed = &[ErrorKind::Closed];
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(1)).await;
    let mut subscription = subscribe(&queue).await;
    subscription.close().await.expect("close");
    refused(subscription.next().await, closed);
    refused(subscription.receive(1, Duration::ZERO).await, closed);

    queue.close().await.expect("close");
    refused(queue.send_message(Message::new("late")).await, closed);
    let other = cx.queue(&bus);
    publish(&other, bodies(1)).await;

    let mut subscription = subscribe(&other).await;
    closes(&bus).await;
    let used = Instant::now();
    refused(subscription.next().await, closed);
    refused(other.send_message(Message::new("late")).await, closed);
    refused(cx.queue(&bus).send_message(Message::new("late")).await, closed);
    for result in other.send_all([Message::new("late"), Message::new("later")]).await {
        refused(result, closed);
    }
    match other.enqueue(Message::new("late")).await {
        Ok(answer) => drop(refused(answer.await, closed)),
        Err(error) => drop(refused::<()>(Err(error), closed)),
    }
    refused(other.subscribe(polymq_core::ConsumeOptions::default()).await, closed);
    refused(other.declare(polymq_core::ConsumeOptions::default()).await, closed);
    refused(bus.ping().await, closed);
    assert_eq!(bus.health().state, polymq_core::HealthState::Closed);
    assert!(used.elapsed() < Duration::from_secs(20), "refusing took {:?}", used.elapsed());
    let mut seen = rest(&cx, &other, 1).await;
    seen.extend(rest(&cx, &queue, 1).await);
    assert_eq!(seen, ["m-000000", "m-000000"], "nothing was sent after the close");
}

/// Closing twice, and by many tasks at once, is the same as closing once: when any of these is over, nothing can be
/// settled any more.
pub async fn close_is_idempotent(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(6)).await;
    let mut subscription = subscribe(&queue).await;
    let mut taken = take(&mut subscription, 6).await;
    let delivery = taken.pop();
    let closers: Vec<_> = taken
        .into_iter()
        .map(|delivery| {
            let bus = bus.clone();
            tokio::spawn(async move {
                closes(&bus).await;
                let error = delivery.ack().await.expect_err("the connection is closed");
                assert!(matches!(error.error().kind(), ErrorKind::Closed | ErrorKind::Stale), "{error:?}");
            })
        })
        .collect();
    for closer in closers {
        closer.await.expect("a closer");
    }
    closes(&bus).await;
    queue.close().await.expect("close of a channel after its bus");
    tokio::time::timeout(PATIENCE, subscription.close()).await.expect("bounded").expect("close");
    subscription.close().await.expect("the second close");
    drop(delivery);
    let mut seen = rest(&cx, &queue, 6).await;
    seen.sort();
    assert_eq!(seen, bodies(6).collect::<Vec<_>>(), "what was fetched and not settled");
}

/// Closing works while a consumer waits for a message, which answers `Closed` then.
pub async fn close_with_a_blocked_consumer(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    let waiting = tokio::spawn(async move { subscription.next().await.map(drop) });
    quiet(&mut subscribe(&queue).await).await;
    closes(&bus).await;
    let answer = tokio::time::timeout(PATIENCE, waiting).await.expect("the consumer wakes up");
    refused(answer.expect("the waiting task"), &[ErrorKind::Closed]);
}

/// Ten consumers of one queue, each over a connection of its own, that begin at once and close at once: messages flow as before,
/// those that they had fetched and those that are sent then, each once.
pub async fn many_close_at_once(cx: Cx) {
    const MANY: usize = 10;
    const COUNT: usize = 50;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, bodies(COUNT)).await;
    let all = Arc::new(Barrier::new(MANY));
    let closers: Vec<_> = (0..MANY)
        .map(|n| {
            let (cx, all, address) = (cx.clone(), Arc::clone(&all), queue.address().clone());
            tokio::spawn(async move {
                let bus = cx.bus().await;
                all.wait().await;
                let mut subscription = subscribe(&bus.channel(address)).await;
                all.wait().await;
                // The others leave that to their connection.
                if n % 2 == 0 {
                    subscription.close().await.expect("close");
                }
                closes(&bus).await;
            })
        })
        .collect();
    for closer in closers {
        closer.await.expect("a closer");
    }
    publish(&queue, bodies(COUNT * 2).skip(COUNT)).await;
    let mut ledger = Ledger::sent(bodies(COUNT * 2));
    let mut subscription = subscribe(&queue).await;
    take_acked(&mut subscription, COUNT * 2).await.into_iter().for_each(|body| ledger.see(body));
    quiet(&mut subscription).await;
    ledger.assert_exact();
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

/// 50 connections that are opened, used and closed leave no task, no socket, no consumer and no unsettled message.
pub async fn open_and_close(cx: Cx) {
    async fn cycle(cx: &Cx, queue: &str) {
        let bus = cx.bus().await;
        let queue = bus.queue(queue);
        let mut subscription = subscribe(&queue).await;
        publish(&queue, bodies(1)).await;
        take_acked(&mut subscription, 1).await;
        subscription.close().await.expect("close");
        closes(&bus).await;
    }
    let queue = cx.name();
    for _ in 0..3 {
        cycle(&cx, &queue).await;
    }
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    eventually(PATIENCE, || async { if tasks() <= 3 { Ok(()) } else { Err(format!("{} tasks", tasks())) } }).await;
    let before = (tasks(), open_files());
    for _ in 0..50 {
        cycle(&cx, &queue).await;
    }
    eventually(PATIENCE, || async {
        let after = (tasks(), open_files());
        if after.0 <= before.0 && after.1 <= before.1 + 2 { Ok(()) } else { Err(format!("{after:?} after {before:?}")) }
    })
    .await;
    let bus = cx.bus().await;
    if cx.capabilities().stats {
        eventually(PATIENCE, || async {
            let stats = bus.queue(queue.as_str()).stats(None).await.map_err(|error| error.to_string())?;
            let left = (stats.ready, stats.consumers, stats.unsettled.unwrap_or(0));
            if left == (0, 0, 0) { Ok(()) } else { Err(format!("{stats:?}")) }
        })
        .await;
    }
    quiet(&mut subscribe(&bus.queue(queue.as_str())).await).await;
}

/// Many producers share the connections of their bus (mission row J20).
pub async fn connections_are_shared(cx: Cx) {
    const FEW: usize = 4;
    let proxy = Proxy::start(cx.broker().address()).await.expect("a proxy");
    let bus = cx.builder_to(cx.harness().url(Some(proxy.address()))).connect().await.expect("connect");
    let first = cx.queue(&bus);
    publish(&first, bodies(1)).await;
    let before = proxy.stats().open;
    let queues: Vec<_> = (0..20).map(|_| cx.queue(&bus)).collect();
    for queue in &queues {
        publish(queue, bodies(3)).await;
    }
    eventually(PATIENCE, || async {
        let open = proxy.stats().open;
        // A pool of HTTP connections has as many as requests have met at a time, whoever has sent them.
        if open <= before.max(FEW) {
            Ok(())
        } else {
            Err(format!("{open} connections for 21 producers, {before} for one"))
        }
    })
    .await;
    assert!(before <= FEW, "{before} connections for one producer");
    closes(&bus).await;
    eventually(PATIENCE, || async {
        let open = proxy.stats().open;
        if open == 0 { Ok(()) } else { Err(format!("{open} connections are left open")) }
    })
    .await;
}

/// A subscription that is taken away and added again, over and over, under load: nothing is lost, nothing comes twice.
/// 5000 messages, or as many as the harness says that the broker bears, in five rounds.
pub async fn add_again_under_load(cx: Cx) {
    const ROUNDS: usize = 5;
    let count = cx.harness().backlog().min(5000);
    async fn handle(message: Message, log: State<Log>) {
        tokio::time::sleep(Duration::from_millis(1)).await;
        log.add(&message, 1);
    }
    async fn other(_: Message) {}
    let bus = cx.bus().await;
    let (queue, beside) = (cx.queue(&bus), cx.queue(&bus));
    let log = Log::default();
    let make = || {
        let mut consumers = ConsumerFactory::new(&bus);
        consumers.state(log.clone()).route(queue.address().name(), handle).concurrency(4).prefetch(40);
        consumers
    };
    let mut first = make();
    first.route(beside.address().name(), other);
    let running = start(first).await;
    let sending = tokio::spawn({
        let queue = queue.clone();
        async move {
            for chunk in 0..8 {
                publish(&queue, bodies(count).skip(chunk * count / 8).take(count / 8)).await;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    for round in 1..ROUNDS {
        log.reaches(count / ROUNDS * round).await;
        running.detach(queue.address().name()).await.expect("detach");
        publish(&beside, bodies(5)).await;
        counted(&running, beside.address().name(), "handled", 5 * round as u64).await;
        running.attach(make()).await.expect("attach");
    }
    sending.await.expect("the sender");
    log.reaches(count).await;
    running.stop().await.expect("stop");
    let mut ledger = Ledger::sent(bodies(count));
    log.bodies().into_iter().for_each(|body| ledger.see(body));
    rest(&cx, &queue, count.saturating_sub(log.len())).await.into_iter().for_each(|body| ledger.see(body));
    ledger.assert_exact();
}

/// Sends whose futures are dropped leave the channel in order: no place of its window is lost, no message comes twice.
pub async fn cancelled_sends(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus).with_window(4, polymq_core::WhenFull::Wait);
    publish(&queue, ["first".to_owned()]).await;
    for body in bodies(100) {
        tokio::select! {
            biased;
            result = queue.send_message(Message::new(body)) => drop(result.expect("sent")),
            () = std::future::ready(()) => {}
        }
    }
    for body in ["second", "third", "fourth", "fifth", "sixth"] {
        publish(&queue, [body.to_owned()]).await;
    }
    eventually(PATIENCE, || async {
        match queue.in_flight() {
            0 => Ok(()),
            count => Err(format!("{count} places of the window are taken")),
        }
    })
    .await;
    closes(&bus).await;
    let awaited = ["first", "second", "third", "fourth", "fifth", "sixth"].map(str::to_owned);
    let seen = rest_until(&cx, &queue, |seen| awaited.iter().all(|body| seen.contains(body))).await;
    let of_ours = |body: &&String| !body.starts_with("m-");
    let ours = in_order(&cx, seen.iter().filter(of_ours).cloned().collect());
    assert_eq!(ours, in_order(&cx, awaited.into()), "those that were awaited");
    let mut cancelled: Vec<_> = seen.iter().filter(|body| !of_ours(body)).collect();
    let count = cancelled.len();
    cancelled.sort();
    cancelled.dedup();
    assert_eq!(cancelled.len(), count, "a cancelled one came twice");
    cx.note(format_args!("{count} of 100 cancelled sends were sent all the same"));
}

/// Receives whose futures are dropped lose nothing. A few messages at a time: were all of them there at once, one
/// receive that is left in peace could bring them all.
pub async fn cancelled_receives(cx: Cx) {
    const COUNT: usize = 200;
    const TOGETHER: usize = 4;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    let mut seen = Vec::new();
    for sent in (TOGETHER..=COUNT).step_by(TOGETHER) {
        let sending = tokio::spawn({
            let queue = queue.clone();
            async move { publish(&queue, bodies(sent).skip(sent - TOGETHER)).await }
        });
        // On a busy machine all of them take long; a receive that lost its message stops everything.
        let deadline = Instant::now() + PATIENCE;
        while seen.len() < sent && Instant::now() < deadline {
            let patience = Duration::from_millis(fastrand::u64(0..6));
            if let Ok(delivery) = tokio::time::timeout(patience, subscription.next()).await {
                let delivery = delivery.expect("receive");
                seen.push(text(&delivery));
                delivery.ack().await.expect("ack");
            }
        }
        sending.await.expect("the sender");
        assert_eq!(seen.len(), sent, "received");
    }
    assert_eq!(in_order(&cx, seen), bodies(COUNT).collect::<Vec<_>>());
    quiet(&mut subscription).await;
}
