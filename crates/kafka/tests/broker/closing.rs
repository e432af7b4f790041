//! What closing commits, who waits for it, and what comes too late.

use std::{
    future::poll_fn,
    net::SocketAddr,
    pin::pin,
    task::Poll,
    time::{Duration, Instant},
};

use polymq_core::{Address, Connection, ConsumeOptions, Consumer, ErrorKind, Incoming, Settings};
use polymq_kafka::{KafkaConnection, rdkafka::Offset};
use polymq_testkit::Proxy;

use crate::{
    common::relay::Relays,
    groups::committed,
    harness::{bare, closed, connect, consumer, name, producer, send, settings, take},
};

/// A connection through a proxy.
async fn proxied() -> (Relays, Proxy, KafkaConnection) {
    let broker: SocketAddr = bare().servers.parse().expect("an address");
    let (proxy, relays) = (Proxy::start(broker).await.expect("a proxy"), Relays::new(broker));
    let url =
        format!("kafka://admin:secret@{}?session_timeout=30s&connect_timeout=60s", relays.before(proxy.address()));
    let connection = connect(&Settings::from_url(&url).expect("a URL")).await;
    (relays, proxy, connection)
}

/// Two messages, received.
async fn two(connection: &KafkaConnection, queue: &Address) -> (Box<dyn Consumer>, Vec<Incoming>) {
    send(&*producer(connection, queue).await, ["a".to_owned(), "b".to_owned()]).await;
    let mut reader = consumer(connection, queue, ConsumeOptions::default()).await;
    let taken = take(&mut *reader, 2).await;
    (reader, taken)
}

fn position(queue: &Address) -> Offset {
    tokio::task::block_in_place(|| committed(queue.name(), queue.name())).0
}

/// Begins, and goes no further than to the first wait.
async fn begin<T>(future: std::pin::Pin<&mut impl Future<Output = T>>) {
    let mut future = future;
    let waits = poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_pending())).await;
    assert!(waits, "there is something to wait for");
}

/// The broker is silent: the close ends all the same, and from then on nothing is said to be done that nobody will commit.
pub async fn nothing_is_acknowledged_after_a_close() {
    let queue = Address::queue(name("sealed"));
    let (_relays, proxy, connection) = proxied().await;
    let (mut reader, taken) = two(&connection, &queue).await;
    reader.settler().ack(taken[0].token).await.expect("ack");
    proxy.pause();
    // It tells when it has given up waiting.
    let _ = connection.close().await;
    let error = reader.settler().ack(taken[1].token).await.expect_err("nobody commits it");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    let error = reader.receive(1, &mut Vec::new()).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    proxy.resume();
}

/// Whoever closes after a close that was dropped waits for what that one had begun.
pub async fn a_close_that_was_dropped_is_waited_for() {
    let queue = Address::queue(name("dropped"));
    let (_relays, proxy, connection) = proxied().await;
    let (reader, taken) = two(&connection, &queue).await;
    proxy.pause();
    reader.settler().ack(taken[0].token).await.expect("ack");
    begin(pin!(connection.close())).await;
    let again = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        proxy.resume();
    };
    // Looked at as soon as it answers.
    let closing = async { (connection.close().await, position(&queue)) };
    let ((closed, position), ()) = tokio::join!(closing, again);
    match closed {
        Ok(()) => assert_eq!(position, Offset::Offset(1)),
        Err(error) => assert_eq!(error.kind(), ErrorKind::Timeout, "{error}"),
    }
}

/// Nobody is added to those who are closed.
pub async fn nobody_begins_to_consume_while_the_connection_closes() {
    let connection = connect(&settings()).await;
    let queue = Address::queue(name("late"));
    let mut closing = pin!(connection.close());
    begin(closing.as_mut()).await;
    let made = connection.consumer(&queue, &ConsumeOptions::default()).await;
    assert_eq!(made.map(drop).expect_err("it closes").kind(), ErrorKind::Closed);
    closed(closing.await);
}

/// A program may end when its consumer is closed: what was acknowledged is committed, although other messages are not settled yet.
pub async fn a_closed_consumer_has_committed() {
    let queue = Address::queue(name("flushed"));
    let connection = connect(&settings().with("commit_interval", "60s")).await;
    let (mut reader, taken) = two(&connection, &queue).await;
    reader.settler().ack(taken[0].token).await.expect("ack");
    for (number, done) in [(1, &taken[1]), (2, &taken[0])] {
        let began = Instant::now();
        reader.close().await.expect("closed");
        // On a machine that stands still it gives up waiting, as it may.
        if began.elapsed() < Duration::from_secs(5) {
            assert_eq!(position(&queue), Offset::Offset(number));
        }
        if number == 1 {
            reader.settler().ack(done.token).await.expect("ack");
        }
    }
    closed(connection.close().await);
}

/// A body that is not copied stays readable, and is in the way of nobody: its consumer leaves the group all the same.
pub async fn a_body_that_is_kept_outlives_its_consumer() {
    let queue = Address::queue(name("kept"));
    let connection = connect(&settings()).await;
    let large = |byte: &str| byte.repeat(100_000);
    send(&*producer(&connection, &queue).await, [large("a")]).await;
    let mut reader = consumer(&connection, &queue, ConsumeOptions::default()).await;
    let taken = take(&mut *reader, 1).await.remove(0);
    reader.settler().ack(taken.token).await.expect("ack");
    let kept = taken.message.payload().clone();
    drop(taken);
    reader.close().await.expect("closed");
    drop(reader);
    closed(connection.close().await);
    let other = connect(&settings()).await;
    send(&*producer(&other, &queue).await, [large("b")]).await;
    let mut reader = consumer(&other, &queue, ConsumeOptions::default()).await;
    // Much less than the time after which a silent member is forgotten.
    let next = tokio::time::timeout(Duration::from_secs(20), take(&mut *reader, 1)).await.expect("nobody else has it");
    assert!(*next[0].message.payload() == *large("b").as_bytes() && *kept == *large("a").as_bytes());
    drop(kept);
    closed(other.close().await);
}

/// A message that was settled otherwise while its successor was written is not said to have been retried too.
pub async fn a_message_is_retried_or_acknowledged() {
    let queue = Address::queue(name("either"));
    let connection = connect(&settings()).await;
    let (reader, taken) = two(&connection, &queue).await;
    let settler = reader.settler();
    let retried = settler.retry(taken[0].token, &taken[0].message, 2, Duration::ZERO);
    let done = settler.ack(taken[0].token).await;
    let answers = [done, retried.await];
    let said: Vec<_> = answers.iter().map(|answer| answer.as_ref().map_err(polymq_core::Error::kind)).collect();
    assert!(said.contains(&Ok(&())) && said.contains(&Err(ErrorKind::Stale)), "{said:?}");
    closed(connection.close().await);
}
