use std::{
    collections::HashSet,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use lapin::options::{ExchangeDeleteOptions, QueueDeleteOptions};
use polymq_amqp::AmqpConnection;
use polymq_core::{
    Address, Connection, ConsumeOptions, ErrorKind, Health, HealthState, ProduceOptions, Retry, Settings,
};

use super::harness::*;

pub async fn a_deleted_queue_is_made_again_or_final() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("fragile"));
    let producer = producer(&connection, &queue).await;
    let mut keeps = consumer(&connection, &queue).await;
    let ends = ConsumeOptions { declare: false, ..ConsumeOptions::default() };
    let mut ends_on = Address::queue(unique("fragile-too"));
    connection.declare(&ends_on, &ConsumeOptions::default()).await.expect("declared");
    let mut ending = connection.consumer(&ends_on, &ends).await.expect("a consumer");
    let bare = raw(shared()).await;
    for name in [queue.name(), ends_on.name()] {
        bare.queue_delete(name.into(), QueueDeleteOptions::default()).await.expect("deleted");
    }
    let error = within(60, ending.receive(1, &mut Vec::new())).await.expect_err("deleted");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    ends_on = queue.clone();
    eventually("the queue is there again", || async { connection.stats(&ends_on, None).await.is_ok() }).await;
    send(&*producer, message("again")).await.expect("sent");
    assert_eq!(text(&receive(&mut *keeps, 1).await[0]), "again");
    assert_eq!(connection.health().now().state, HealthState::Up);
}

pub async fn a_deleted_exchange_fails_only_its_own_messages() {
    let exchange = unique("exchange");
    let connection = connect(&format!("{}?channels=1&exchange={exchange}", shared().url())).await;
    let topic = producer(&connection, &Address::topic("t")).await;
    let queue = producer(&connection, &Address::queue(unique("bystander"))).await;
    send(&*topic, message("x")).await.expect("sent");
    raw(shared())
        .await
        .exchange_delete(exchange.as_str().into(), ExchangeDeleteOptions::default())
        .await
        .expect("deleted");
    let error = send(&*topic, message("x")).await.expect_err("no exchange");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::NotFound, Retry::Now), "{error}");
    send(&*queue, message("x")).await.expect("the channel is open again");
    // A new channel makes its topology again.
    send(&*topic, message("x")).await.expect("the exchange is there again");
    assert_eq!(connection.health().now().state, HealthState::Up);
}

pub async fn a_cut_connection_is_resumed_and_old_deliveries_are_stale() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&proxy.url()).await;
    let queue = Address::queue(unique("cut"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let settler = consumer.settler();
    join_all((0..20).map(|n| producer.send(message(&n.to_string())))).await;
    let held = receive(&mut *consumer, 5).await;
    proxy.cut(true);
    eventually("the loss is seen", || async { connection.health().now().state == HealthState::Down }).await;
    for incoming in &held {
        // The two connections do not notice at the same time.
        eventually("old deliveries are stale", || async {
            let mut answer = settler.retry(incoming.token, &incoming.message, 2, Duration::ZERO);
            match answer.try_take() {
                Some(result) => result.is_err_and(|error| error.kind() == ErrorKind::Stale),
                None => !answer.withdraw(),
            }
        })
        .await;
        assert_eq!(settler.ack(incoming.token).await.expect_err("stale").kind(), ErrorKind::Stale);
    }
    proxy.mend();
    let all = receive(&mut *consumer, 20).await;
    assert_eq!(all.iter().map(text).collect::<HashSet<_>>().len(), 20);
    for incoming in &all {
        settler.ack(incoming.token).await.expect("acknowledged");
    }
    // The other connection may take a little longer.
    eventually("both are back", || async {
        let health = connection.health().now();
        health.state != HealthState::Down && health.reconnects >= 1
    })
    .await;
    consumer.close().await.expect("closed");
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 0);
}

/// What ends each connection ends all that uses it, so it must not be made again without a pause.
pub async fn connections_that_do_not_last_are_made_again_ever_later() {
    let proxy = Proxy::start(shared().port).await;
    let url =
        format!("amqp://guest:guest@127.0.0.1:{}?heartbeat=60s&reconnect_initial=3s&reconnect_max=3s", proxy.port);
    let connection = connect(&url).await;
    let queue = Address::queue(unique("short-lived"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("once")).await.expect("sent");
    proxy.cut(false);
    let health = || connection.health().now();
    let up_again = |times: u64| move |health: Health| health.reconnects >= times && health.state != HealthState::Down;
    eventually("the first loss is made good", || async { up_again(1)(health()) }).await;
    send(&*producer, message("again")).await.expect("sent");
    let (before, cut) = (health().reconnects, Instant::now());
    proxy.cut(false);
    let told = |health: Health| health.reason.is_some_and(|reason| reason.contains("2 connections in a row"));
    eventually("health says why", || async { told(health()) }).await;
    eventually("the second one too", || async { up_again(before + 1)(health()) }).await;
    assert!(cut.elapsed() >= Duration::from_millis(1500), "after {:?}", cut.elapsed());
    send(&*producer, message("and again")).await.expect("sent");
}

/// The client library ends the connection over such a message. Its consumers must not come back as fast as they can, health
/// says why, and all goes on when the message has been taken away.
pub async fn a_message_that_cannot_be_read_is_waited_for() {
    let queue = Address::queue(unique("unreadable"));
    let url = format!("{}?reconnect_initial=1s&reconnect_max=1s", shared().url());
    let connection = connect(&url).await;
    let producer = producer(&connection, &queue).await;
    let garbling = garbling(shared().port).await;
    let url = format!("amqp://guest:guest@127.0.0.1:{garbling}");
    let foreign = lapin::Connection::connect(&url, Default::default()).await.expect("lapin");
    let foreign = foreign.create_channel().await.expect("a channel");
    foreign.confirm_select(Default::default()).await.expect("confirms");
    let properties = lapin::BasicProperties::default().with_correlation_id(MARK.into());
    let sent = foreign.basic_publish("".into(), queue.name().into(), Default::default(), b"x", properties).await;
    sent.expect("published").await.expect("confirmed");
    let mut consumer = consumer(&connection, &queue).await;
    let told = |health: Health| health.reason.is_some_and(|reason| reason.contains("connections in a row"));
    eventually("health says why", || async { told(connection.health().now()) }).await;
    println!("{}", connection.health().now());
    let contents = format!("queues/%2F/{}/contents", queue.name());
    // While the consumer has the message it looks like that too, but not for long.
    let calm = std::sync::Mutex::new(None);
    eventually("the message is gone, and the consumer is back", || async {
        shared().management("DELETE", &contents, "").await;
        let stats = connection.stats(&queue, None).await;
        let mut calm = calm.lock().expect("not poisoned");
        if !stats.is_ok_and(|stats| (stats.ready, stats.consumers) == (0, 1)) {
            *calm = None;
            return false;
        }
        calm.get_or_insert_with(std::time::Instant::now).elapsed() > Duration::from_secs(3)
    })
    .await;
    send(&*producer, message("good")).await.expect("sent");
    assert_eq!(text(&receive(&mut *consumer, 1).await[0]), "good");
}

pub async fn messages_wait_for_the_connection_and_can_be_withdrawn() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&proxy.url()).await;
    let queue = Address::queue(unique("waits"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("before")).await.expect("sent");
    proxy.cut(true);
    eventually("the loss is seen", || async { connection.health().now().state == HealthState::Down }).await;
    within(60, producer.flush()).await.expect("there is nothing to wait for");
    let withdrawn = producer.send(message("withdrawn"));
    let mut flush = std::pin::pin!(producer.flush());
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut flush).await.is_err());
    assert!(withdrawn.withdraw());
    within(60, flush).await.expect("there is nothing left to wait for");
    let withdrawn = producer.send(message("withdrawn"));
    let waiting: Vec<_> = (0..50).map(|n| producer.send(message(&n.to_string()))).collect();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(withdrawn.withdraw());
    proxy.mend();
    for answer in waiting {
        within(60, answer).await.expect("sent after all");
    }
    within(60, producer.flush()).await.expect("flushed");
    let mut consumer = consumer(&connection, &queue).await;
    let received: Vec<_> = receive(&mut *consumer, 51).await.iter().map(text).collect();
    assert_eq!(received[0], "before");
    assert_eq!(received[1..], (0..50).map(|n| n.to_string()).collect::<Vec<_>>());
    silence(&mut *consumer, 300).await;
}

pub async fn a_first_connection_may_be_tried_for_ever() {
    let proxy = Proxy::start(shared().port).await;
    proxy.cut(true);
    let settings = Settings::from_url(&proxy.url()).expect("a URL");
    AmqpConnection::connect(&settings).await.expect_err("nobody there");
    let limited = settings.clone().with("connect_retry", "true").with("reconnect_limit", "3");
    let limited = AmqpConnection::connect(&limited).await.expect("trying");
    eventually("given up", || async { limited.health().now().state == HealthState::Closed }).await;
    let connection = AmqpConnection::connect(&settings.with("connect_retry", "true")).await.expect("trying");
    assert_eq!(connection.health().now().state, HealthState::Down);
    let queue = Address::queue(unique("early"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let early = producer.send(message("early"));
    proxy.mend();
    within(60, early).await.expect("sent");
    assert_eq!(text(&receive(&mut *consumer, 1).await[0]), "early");
    eventually("health tells", || async { connection.health().now().state == HealthState::Up }).await;
}

pub async fn a_broker_out_of_memory_blocks_nobody_for_ever() {
    let proxy = Proxy::start(shared().port).await;
    // What is held up is the heartbeat too.
    let connection = connect(&format!("{}&heartbeat=60s", proxy.url())).await;
    let queue = Address::queue(unique("blocked"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("before")).await.expect("sent");
    proxy.block();
    eventually("health tells", || async {
        let health = connection.health().now();
        health.state == HealthState::Down && health.reason.is_some_and(|reason| reason.contains("low on memory"))
    })
    .await;
    let (kept, withdrawn) = (producer.send(message("kept")), producer.send(message("withdrawn")));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(withdrawn.withdraw(), "what was not written can be withdrawn");
    assert_eq!(connection.ping().await.expect_err("bounded").kind(), ErrorKind::Busy);
    proxy.unblock();
    within(60, kept).await.expect("sent after all");
    eventually("health tells", || async { connection.health().now().state != HealthState::Down }).await;
    let mut consumer = consumer(&connection, &queue).await;
    assert_eq!(receive(&mut *consumer, 2).await.iter().map(text).collect::<Vec<_>>(), ["before", "kept"]);
    silence(&mut *consumer, 300).await;
}

/// A delay queue is declared before each message; the broker runs out of memory, or falls silent, before it answers.
pub async fn a_declaration_without_an_answer_holds_nobody_up() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&format!("{}&heartbeat=60s&connect_timeout=10s&channels=1", proxy.url())).await;
    let queue = Address::queue(unique("undeclared"));
    let producer = producer(&connection, &queue).await;
    let soon = |body| producer.send(message(body).deliver_in(Duration::from_millis(100)));
    within(60, soon("first")).await.expect("sent");
    let held = || async {
        proxy.kept.store(0, Ordering::SeqCst);
        proxy.hold.store(true, Ordering::SeqCst);
    };
    let asked = || async { proxy.kept.load(Ordering::SeqCst) > 0 };

    held().await;
    let waits = soon("silence");
    eventually("it is declared", asked).await;
    let error = within(60, waits).await.expect_err("no answer");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Timeout, Retry::Now), "{error}");
    // Nor does each of those that follow hold up all others: a declaration is longer than what a heartbeat takes.
    proxy.kept.store(0, Ordering::SeqCst);
    let error = within(60, soon("silence")).await.expect_err("not asked for again");
    assert!(matches!((error.kind(), error.retry()), (ErrorKind::Timeout, Retry::After(_))), "{error}");
    assert!(proxy.kept.load(Ordering::SeqCst) < 32, "the broker is asked again");
    proxy.unblock();
    within(60, producer.send(message("at once"))).await.expect("it needs no declaration");
    eventually("the broker is asked again", || async { within(60, soon("second")).await.is_ok() }).await;

    held().await;
    let (withdrawn, kept) = (soon("withdrawn"), soon("third"));
    eventually("it is declared", asked).await;
    proxy.block();
    eventually("health tells", || async { connection.health().now().state == HealthState::Down }).await;
    assert!(withdrawn.withdraw() && kept.withdraw(), "they were not written");
    within(30, producer.flush()).await.expect("what is withdrawn is looked for");
    let kept = soon("third");
    proxy.unblock();
    within(60, kept).await.expect("sent after all");
    let mut consumer = consumer(&connection, &queue).await;
    let seen: Vec<_> = receive(&mut *consumer, 4).await.iter().map(text).collect();
    assert_eq!(seen, ["first", "at once", "second", "third"]);
    silence(&mut *consumer, 300).await;
}

pub async fn a_killed_broker_loses_nothing_confirmed() {
    let broker = breakable();
    let connection = connect(&format!("{}?reconnect_max=500ms", broker.url())).await;
    let queue = Address::queue(unique("killed"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let settler = consumer.settler();
    // Read a third meanwhile.
    let mut confirmed = HashSet::new();
    let mut unknown = 0;
    let mut received = Vec::new();
    let mut killed = false;
    let mut pending = std::collections::VecDeque::new();
    for n in 0..10_000 {
        pending.push_back((n, producer.send(message(&n.to_string()))));
        if n == 5_000 && !killed {
            killed = true;
            broker.kill("KILL");
            eventually("the loss is seen", || async { connection.health().now().state == HealthState::Down }).await;
            tokio::task::block_in_place(|| broker.up());
        }
        while pending.len() > 128 || (n == 9_999 && !pending.is_empty()) {
            let Some((n, answer)) = pending.pop_front() else { break };
            match within(60, answer).await {
                Ok(_) => {
                    confirmed.insert(n.to_string());
                }
                Err(error) => {
                    assert_eq!(
                        (error.kind(), error.retry()),
                        (ErrorKind::UnknownOutcome, Retry::UnknownOutcome),
                        "{error}"
                    );
                    unknown += 1;
                }
            }
        }
        if n % 3 == 0 && consumer_has(&mut *consumer, &mut received).await {
            for incoming in &received[received.len().saturating_sub(1)..] {
                let _ = settler.ack(incoming.token).await;
            }
        }
    }
    assert!(unknown <= 129, "{unknown} unknown outcomes, more than the window");
    let mut seen: HashSet<String> = received.iter().map(text).collect();
    while !confirmed.is_subset(&seen) {
        let mut batch = Vec::new();
        let came = tokio::time::timeout(Duration::from_secs(60), consumer.receive(256, &mut batch)).await;
        let Ok(came) = came else {
            let missing = confirmed.difference(&seen).count();
            panic!(
                "{missing} confirmed messages do not come; {:?}, {}",
                connection.stats(&queue, None).await,
                connection.health().now()
            );
        };
        came.expect("messages");
        for incoming in &batch {
            settler.ack(incoming.token).await.expect("acknowledged");
            seen.insert(text(incoming));
        }
    }
    // A broker that is starting may refuse a connection that it has taken; and it is up again after a while.
    eventually("it is up again", || async {
        let health = connection.health().now();
        health.state != HealthState::Down && health.reconnects >= 1
    })
    .await;
}

async fn consumer_has(consumer: &mut dyn polymq_core::Consumer, into: &mut Vec<polymq_core::Incoming>) -> bool {
    tokio::time::timeout(Duration::from_millis(1), consumer.receive(1, into)).await.is_ok()
}

/// Sends it until it is taken: a heartbeat this short loses the connection of a machine that stands still, too.
async fn send_at_last(producer: &dyn polymq_core::Producer, body: &str) {
    let start = Instant::now();
    while let Err(error) = send(producer, message(body)).await {
        assert!(error.retry() != Retry::Never && start.elapsed() < Duration::from_secs(60), "{error}");
    }
}

pub async fn a_broker_that_says_nothing_is_found_out() {
    let broker = breakable();
    let connection = connect(&format!("{}?heartbeat=10s&connect_timeout=60s", broker.url())).await;
    let patient = connect(&format!("{}?heartbeat=60s&connect_timeout=60s", broker.url())).await;
    let queue = Address::queue(unique("silent"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    send_at_last(&*producer, "before").await;
    let before = receive(&mut *consumer, 1).await.remove(0);
    broker.kill("STOP");
    // Its last thread stops a little later.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let written = producer.send(message("into the hole"));
    eventually("the silence is noticed", || async { connection.health().now().state == HealthState::Down }).await;
    let beside = patient.health().now().state;
    let lost = tokio::time::timeout(Duration::from_secs(60), written).await;
    broker.kill("CONT");
    let lost = lost.expect("an answer in time");
    // It is the heartbeat that counts: who has a longer one has not noticed yet, however slow this machine is.
    assert_ne!(beside, HealthState::Down, "found out with a heartbeat of a minute too");
    assert_eq!(lost.expect_err("no answer").kind(), ErrorKind::UnknownOutcome);
    eventually("connected again", || async { connection.health().now().state == HealthState::Degraded }).await;
    send_at_last(&*producer, "after").await;
    // The connection that consumes has been lost too, or just not: then the broker still holds the message for us.
    let again = match consumer.settler().ack(before.token).await {
        Ok(()) => None,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
            Some("before")
        }
    };
    let mut seen = HashSet::new();
    while !seen.contains("after") || again.is_some_and(|again| !seen.contains(again)) {
        seen.insert(text(&receive(&mut *consumer, 1).await[0]));
    }
    let options = ProduceOptions::default();
    connection.producer(&queue, &options).await.expect("declarations work again");
}
