use std::sync::{Mutex, atomic::Ordering};

use futures_util::future::join_all;
use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, HealthState, Retry};

use super::harness::*;

/// The broker answers when nobody waits for the subscription any more: messages must not go there.
pub async fn a_subscription_that_is_given_up_ends() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&format!("{}&heartbeat=60s&connect_timeout=10s", proxy.url())).await;
    let queue = Address::queue(unique("given-up"));
    send(&*producer(&connection, &queue).await, message("kept")).await.expect("sent");
    proxy.hold_from(BASIC_CONSUME);
    let error = connection.consumer(&queue, &ConsumeOptions::default()).await.expect_err("no answer");
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    proxy.unblock();
    let other = connect(&shared().url()).await;
    let mut consumer = consumer(&other, &queue).await;
    assert_eq!(text(&receive(&mut *consumer, 1).await[0]), "kept");
    let alone = || async { other.stats(&queue, None).await.is_ok_and(|stats| stats.consumers == 1) };
    eventually("nobody else is subscribed", alone).await;
}

pub async fn health_tells_of_a_consumer_that_cannot_subscribe() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&format!("{}&heartbeat=60s&connect_timeout=10s", proxy.url())).await;
    let queue = Address::queue(unique("unsubscribed"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    assert_eq!(connection.health().now().state, HealthState::Up);
    proxy.hold_from(BASIC_CONSUME);
    let bare = raw(shared()).await;
    bare.queue_delete(queue.name().into(), Default::default()).await.expect("deleted");
    eventually("health tells", || async {
        let health = connection.health().now();
        let told =
            health.reason.is_some_and(|reason| reason.contains("cannot subscribe to") && reason.contains(queue.name()));
        health.state == HealthState::Down && told
    })
    .await;
    proxy.unblock();
    eventually("it is subscribed", || async { connection.health().now().state != HealthState::Down }).await;
    send(&*producer, message("again")).await.expect("sent");
    assert_eq!(text(&receive(&mut *consumer, 1).await[0]), "again");
}

/// What is written and not confirmed is kept, so there must be an end to it: the rest waits, and can be withdrawn.
pub async fn what_a_broker_does_not_confirm_has_a_bound() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&format!("{}&heartbeat=60s&channels=1", proxy.url())).await;
    let queue = Address::queue(unique("unconfirmed"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("before")).await.expect("sent");
    proxy.hold.store(true, Ordering::SeqCst);
    let body = "x".repeat(LARGEST / 2);
    let mut sent: Vec<_> = (0..160).map(|_| producer.send(message(&body))).collect();
    let most = || async { proxy.kept.load(Ordering::SeqCst) > 60 * LARGEST as u64 };
    eventually("as much as may be is written", most).await;
    assert!(!sent[0].withdraw(), "it was written");
    assert!(sent.pop().expect("the last one").withdraw(), "written, with all others unconfirmed");
    proxy.unblock();
    for answer in within(60, join_all(sent)).await {
        answer.expect("sent after all");
    }
    within(60, producer.flush()).await.expect("flushed");
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 160);
    connection.delete(&queue, None).await.expect("deleted");
}

/// A broker that takes nothing opens no channel either; who waits for the first message on one must be heard.
pub async fn a_channel_is_not_opened_while_the_broker_takes_nothing() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&format!("{}&heartbeat=60s", proxy.url())).await;
    let producer = producer(&connection, &Address::queue(unique("unopened"))).await;
    proxy.block();
    eventually("health tells", || async { connection.health().now().state == HealthState::Down }).await;
    let (withdrawn, kept) = (producer.send(message("withdrawn")), producer.send(message("kept")));
    let mut flush = std::pin::pin!(producer.flush());
    assert!(futures_util::poll!(&mut flush).is_pending());
    assert!(withdrawn.withdraw() && kept.withdraw());
    within(60, flush).await.expect("there is nothing to wait for");
    let kept = producer.send(message("kept"));
    proxy.unblock();
    within(60, kept).await.expect("sent after all");
}

/// A purge that nobody answers may still be done, so it must not be taken for not done.
pub async fn a_change_without_an_answer_has_an_unknown_outcome() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&format!("{}&heartbeat=60s&connect_timeout=10s", proxy.url())).await;
    let queue = Address::queue(unique("purged"));
    send(&*producer(&connection, &queue).await, message("purged")).await.expect("sent");
    proxy.hold_from(QUEUE_PURGE);
    let error = connection.purge(&queue).await.expect_err("no answer");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::UnknownOutcome, Retry::UnknownOutcome), "{error}");
    let error = connection.stats(&queue, None).await.expect_err("no answer");
    assert_eq!(error.kind(), ErrorKind::Timeout, "nothing was to be changed: {error}");
    proxy.unblock();
    let purged = || async { connection.stats(&queue, None).await.is_ok_and(|stats| stats.ready == 0) };
    eventually("it was done", purged).await;
}

/// Requests under way fail before the client library tells why: it must be waited for.
pub async fn the_brokers_reason_for_ending_a_connection_is_told() {
    let name = unique("reason");
    let connection = connect(&format!("{}?name={name}&heartbeat=60s", shared().url())).await;
    let producer = producer(&connection, &Address::queue(unique("ended"))).await;
    let mut ended = Vec::new();
    for _ in 0..3 {
        let mut health = connection.health();
        // The management shows one that has ended for a while yet.
        let found = Mutex::new(None);
        eventually("the management knows of it", || async {
            let name = connection_of(&format!("{name} (publish)"), &ended).await;
            let is_found = name.is_some();
            *found.lock().expect("no panic") = name;
            is_found
        })
        .await;
        let open = found.into_inner().expect("no panic").expect("found");
        let busy = async {
            loop {
                let _ = join_all((0..20).map(|_| producer.send(message("x")))).await;
            }
        };
        let end = async {
            shared().management("DELETE", &format!("connections/{open}"), "").await;
            loop {
                let now = health.changed().await.expect("not closed");
                if now.state == HealthState::Down {
                    return now.reason;
                }
            }
        };
        let reason = within(60, async { tokio::select!(reason = end => reason, () = busy => None) }).await;
        let told = reason.as_deref().is_some_and(|reason| reason.contains("management plugin"));
        assert!(told, "{reason:?}");
        ended.push(open);
    }
}

/// What the management calls a connection that its client calls so, as part of a path, but none of these.
async fn connection_of(name: &str, ended: &[String]) -> Option<String> {
    let all = shared().management("GET", "connections", "").await;
    let named = all.as_array()?.iter().filter(|one| one["user_provided_name"] == name);
    let mut paths =
        named.filter_map(|one| Some(one["name"].as_str()?.bytes().map(|byte| format!("%{byte:02x}")).collect()));
    paths.find(|path| !ended.contains(path))
}
