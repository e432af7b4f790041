//! Positions, rebalances, replay.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::poll_fn,
    pin::pin,
    sync::{Arc, Mutex},
    task::Poll,
    time::{Duration, Instant, SystemTime},
};

use polymq_core::{
    Address, Backoff, Bus, Connection, ConsumeOptions, Consumer, ConsumerFactory, ConsumerRunner, ErrorKind, Failure,
    FailurePolicy, Incoming, Message, MessageId, Start,
};
use polymq_kafka::rdkafka::{
    Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
};
use polymq_testkit::eventually;
use tokio::sync::oneshot::{self, error::TryRecvError};

use crate::harness::{
    PATIENCE, bare, body, closed, connect, consumer, group, name, producer, quiet, send, settings, take, url,
};

fn bodies(count: usize) -> impl Iterator<Item = String> {
    (0..count).map(|n| format!("m-{n:04}"))
}

/// What a group has committed for partition 0.
pub fn committed(topic: &str, group: &str) -> (Offset, String) {
    let client: BaseConsumer = bare().config().set("group.id", group).create().expect("a client");
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, 0);
    let list = client.committed_offsets(list, PATIENCE).expect("positions");
    let found = list.find_partition(topic, 0).expect("asked for");
    (found.offset(), found.metadata().to_owned())
}

/// Mission row C18: one message blocks, nine are finished; what was committed covers none that is not finished, and
/// only the first comes again.
pub async fn c18_the_committed_position_never_passes_an_unfinished_message() {
    let queue = Address::queue(name("contiguous"));
    let connection = connect(&settings()).await;
    send(&*producer(&connection, &queue).await, bodies(10)).await;
    let mut first = consumer(&connection, &queue, ConsumeOptions::default()).await;
    let taken = take(&mut *first, 10).await;
    for incoming in &taken[1..] {
        first.settler().ack(incoming.token).await.expect("ack");
    }
    eventually(PATIENCE, || async {
        let found = tokio::task::block_in_place(|| committed(queue.name(), queue.name()));
        if found == (Offset::Offset(0), "pmq1 10;0".into()) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    closed(connection.close().await);
    assert_eq!(first.settler().ack(taken[0].token).await.expect_err("closed").kind(), ErrorKind::Closed);
    let connection = connect(&settings()).await;
    let mut second = consumer(&connection, &queue, ConsumeOptions::default()).await;
    let again = take(&mut *second, 1).await;
    assert_eq!(body(&again[0]), "m-0000");
    quiet(&mut *second).await;
    second.settler().ack(again[0].token).await.expect("ack");
    second.close().await.expect("close");
    eventually(PATIENCE, || async {
        let found = tokio::task::block_in_place(|| committed(queue.name(), queue.name()));
        if found == (Offset::Offset(10), String::new()) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    closed(connection.close().await);
}

/// A second process joins in the middle: both get something, nothing is lost, and as handlers end in time nothing
/// is handled twice.
pub async fn two_processes_share_by_partitions_and_nothing_is_handled_twice() {
    const SOME: usize = 100;
    let queue = Address::queue(name("shared"));
    let settings = settings().with("partitions", "6").with("revoke_wait", "60s");
    let (one, two) = (connect(&settings).await, connect(&settings).await);
    let mut first = consumer(&one, &queue, ConsumeOptions { prefetch: 10, ..ConsumeOptions::default() }).await;
    let sender = producer(&one, &queue).await;
    // As many as it takes until each of them has some.
    let (told, mut enough) = oneshot::channel::<()>();
    let mut sending = tokio::spawn(async move {
        let mut count = 0;
        while enough.try_recv() == Err(TryRecvError::Empty) {
            let message = Message::new(format!("m-{count:04}")).with_key(format!("key-{}", count % 50));
            sender.send(message).await.expect("accepted");
            count += 1;
        }
        count
    });
    let mut seen: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let (mut second, mut told, mut sent) = (None, Some(told), usize::MAX);
    let mut by_second = 0;
    let deadline = Instant::now() + PATIENCE * 3;
    while seen.len() < sent && Instant::now() < deadline {
        if seen.len() > SOME && second.is_none() {
            second = Some(consumer(&two, &queue, ConsumeOptions { prefetch: 10, ..ConsumeOptions::default() }).await);
        }
        for (number, consumer) in [Some(&mut first), second.as_mut()].into_iter().flatten().enumerate() {
            let mut got = Vec::new();
            let received = tokio::time::timeout(Duration::from_millis(20), consumer.receive(10, &mut got)).await;
            received.unwrap_or(Ok(())).expect("receive");
            for incoming in got {
                seen.entry(body(&incoming)).or_default().push(number);
                by_second += number;
                consumer.settler().ack(incoming.token).await.expect("ack");
            }
        }
        if by_second > SOME && told.take().is_some() {
            sent = (&mut sending).await.expect("the sender");
        }
    }
    assert_eq!(seen.len(), sent, "none is lost");
    assert!(seen.values().all(|by| by.len() == 1), "none is handled twice");
    closed(one.close().await);
    closed(two.close().await);
}

/// Two members, one of which comes and one of which goes while messages are sent and handlers fail at random: the messages of
/// each key are handled in their order, each once, whoever has them.
pub async fn o1_keys_keep_their_order_while_members_come_and_go() {
    const KEYS: usize = 16;
    const SOME: usize = 150;
    type Handled = Arc<Mutex<Vec<(usize, String)>>>;
    let (queue, handled) = (name("ordered"), Handled::default());
    let url = format!("{}&partitions=8&revoke_wait=60s", url());
    let connect = || async { Bus::builder().url(&url).connect().await.expect("connect") };
    let (one, two) = (connect().await, connect().await);
    let begin = |bus: &Bus, member: usize| {
        let handled = Arc::clone(&handled);
        let mut consumers = ConsumerFactory::new(bus);
        let route = consumers.route(&*queue, move |message: Message| {
            let handled = Arc::clone(&handled);
            async move {
                tokio::time::sleep(Duration::from_micros(fastrand::u64(0..500))).await;
                if fastrand::u8(..) < 40 {
                    return Err(Failure::new("at random"));
                }
                let body = String::from_utf8_lossy(message.payload()).into_owned();
                handled.lock().expect("no panic").push((member, body));
                Ok(())
            }
        });
        let backoff =
            Backoff { initial: Duration::from_millis(1), max: Duration::from_millis(20), ..Backoff::default() };
        let policy = FailurePolicy { max_attempts: 100, backoff, ..FailurePolicy::default() };
        route.ordered_by_key().concurrency(10).policy(policy);
        ConsumerRunner::new(consumers).start()
    };
    let by = |member: usize, count: usize| {
        let handled = &handled;
        eventually(PATIENCE * 2, move || async move {
            let found = handled.lock().expect("no panic").iter().filter(|(by, _)| *by == member).count();
            if found >= count { Ok(()) } else { Err(format!("{found} of {count} by {member}")) }
        })
    };
    let first = begin(&one, 0).await.expect("started");
    let (told, mut enough) = oneshot::channel::<()>();
    let sending = tokio::spawn({
        let channel = one.queue(&*queue);
        async move {
            let mut count = 0;
            while enough.try_recv() == Err(TryRecvError::Empty) {
                let of_key = |key: usize| Message::new(format!("{key:02}/{count:06}")).with_key(format!("key-{key}"));
                for result in channel.send_all((0..KEYS).map(of_key)).await {
                    result.expect("accepted");
                }
                count += 1;
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            count
        }
    });
    by(0, SOME).await;
    let second = begin(&two, 1).await.expect("started");
    by(1, SOME).await;
    first.stop().await.expect("stopped");
    let alone = handled.lock().expect("no panic").iter().filter(|(by, _)| *by == 1).count();
    by(1, alone + SOME).await;
    told.send(()).expect("it sends");
    let count = sending.await.expect("the sender");
    eventually(PATIENCE * 2, || async {
        let found = handled.lock().expect("no panic").len();
        if found >= count * KEYS { Ok(()) } else { Err(format!("{found} of {}", count * KEYS)) }
    })
    .await;
    second.stop().await.expect("stopped");
    let handled = handled.lock().expect("no panic");
    for key in 0..KEYS {
        let key = format!("{key:02}/");
        let of_key: Vec<_> = handled.iter().map(|(_, body)| body).filter(|body| body.starts_with(&key)).collect();
        let expected: Vec<_> = (0..count).map(|number| format!("{key}{number:06}")).collect();
        assert!(of_key.iter().copied().eq(&expected), "key {key}: {of_key:?}");
    }
}

/// A second process takes half of the partitions over; a handler that ends in time has its message to itself.
pub async fn a_partition_that_goes_waits_for_its_handlers() {
    let queue = Address::queue(name("waits"));
    let settings = settings().with("partitions", "2").with("revoke_wait", "60s");
    let (one, two) = (connect(&settings).await, connect(&settings).await);
    let (sender, mut first) = (producer(&one, &queue).await, consumer(&one, &queue, ConsumeOptions::default()).await);
    for n in 0..20 {
        sender.send(Message::new(format!("m-{n:04}")).with_key(format!("{n}"))).await.expect("accepted");
    }
    let held = take(&mut *first, 20).await;
    let mut second = consumer(&two, &queue, ConsumeOptions::default()).await;
    quiet(&mut *second).await;
    for incoming in held {
        first.settler().ack(incoming.token).await.expect("still ours");
    }
    // The rebalance goes on now: the second one has a partition, and nothing of what was handled.
    let deadline = Instant::now() + PATIENCE;
    let mut got = Vec::new();
    while got.is_empty() {
        assert!(Instant::now() < deadline, "the second process gets nothing");
        sender.send(Message::new("new").with_key(format!("{:?}", Instant::now()))).await.expect("accepted");
        let received = tokio::time::timeout(Duration::from_millis(100), second.receive(10, &mut got)).await;
        received.unwrap_or(Ok(())).expect("receive");
    }
    assert!(got.iter().all(|incoming| body(incoming) == "new"), "what was handled came again");
    closed(one.close().await);
    closed(two.close().await);
}

/// The same without any wait: the deliveries are stale, and come to the other process.
pub async fn what_is_out_when_a_partition_goes_is_stale() {
    let queue = Address::queue(name("stale"));
    let settings = settings().with("partitions", "2").with("revoke_wait", "0s");
    let (one, two) = (connect(&settings).await, connect(&settings).await);
    let mut first = consumer(&one, &queue, ConsumeOptions::default()).await;
    let sender = producer(&one, &queue).await;
    for n in 0..20 {
        sender.send(Message::new(format!("m-{n:04}")).with_key(format!("{n}"))).await.expect("accepted");
    }
    let held = take(&mut *first, 20).await;
    let mut second = consumer(&two, &queue, ConsumeOptions::default()).await;
    let moved = take(&mut *second, 1).await;
    let (mut stale, mut ours) = (Vec::new(), 0);
    for incoming in &held {
        match first.settler().ack(incoming.token).await {
            Ok(()) => ours += 1,
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
                stale.push(body(incoming));
            }
        }
    }
    assert!(ours > 0 && stale.contains(&body(&moved[0])), "{ours} ours, stale: {stale:?}");
    let rest = take(&mut *second, stale.len() - 1).await;
    let mut came: Vec<String> = moved.iter().chain(&rest).map(body).collect();
    came.sort();
    stale.sort();
    assert_eq!(came, stale, "exactly those come again");
    quiet(&mut *second).await;
    closed(one.close().await);
    closed(two.close().await);
}

/// A process that is full has paused its partitions; one of them goes to another process and comes back.
pub async fn a_partition_that_went_away_while_it_was_paused_is_read_again() {
    const COUNT: usize = 40;
    let queue = Address::queue(name("paused"));
    let settings = settings().with("partitions", "2").with("revoke_wait", "0s");
    let (one, two) = (connect(&settings).await, connect(&settings).await);
    let few = || ConsumeOptions { prefetch: 4, ..ConsumeOptions::default() };
    let (sender, mut first) = (producer(&one, &queue).await, consumer(&one, &queue, few()).await);
    for n in 0..COUNT {
        sender.send(Message::new(format!("m-{n:04}")).with_key(format!("{n}"))).await.expect("accepted");
    }
    let held = take(&mut *first, 4).await;
    // Longer than it takes until a consumer without room pauses its partitions, which nobody outside sees.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut second = consumer(&two, &queue, few()).await;
    take(&mut *second, 1).await;
    // With room again, what is left to the first one goes on.
    let mut seen = BTreeSet::new();
    let handle = async |first: &mut dyn Consumer, incoming: Incoming, seen: &mut BTreeSet<String>| {
        if first.settler().ack(incoming.token).await.is_ok() {
            seen.insert(body(&incoming));
        }
    };
    for incoming in held {
        handle(&mut *first, incoming, &mut seen).await;
    }
    let next = take(&mut *first, 1).await.remove(0);
    handle(&mut *first, next, &mut seen).await;
    closed(two.close().await);
    while seen.len() < COUNT {
        for incoming in take(&mut *first, 1).await {
            handle(&mut *first, incoming, &mut seen).await;
        }
    }
    closed(one.close().await);
}

/// Whoever is no longer interested while a consumer is being made leaves nothing behind that others would wait for.
pub async fn a_consumer_that_is_given_up_while_it_is_made_is_in_nobodys_way() {
    let queue = Address::queue(name("given-up"));
    let connection = connect(&settings()).await;
    let sender = producer(&connection, &queue).await;
    connection.declare(&queue, &ConsumeOptions::default()).await.expect("declare");
    for times in 1.. {
        let options = ConsumeOptions::default();
        let mut making = pin!(connection.consumer(&queue, &options));
        let mut polls = 0;
        let made = poll_fn(|context| match making.as_mut().poll(context) {
            Poll::Ready(made) => Poll::Ready(Some(made)),
            Poll::Pending => {
                polls += 1;
                if polls == times { Poll::Ready(None) } else { Poll::Pending }
            }
        });
        let made = made.await;
        if let Some(made) = made {
            made.expect("a consumer");
            assert!(times > 1, "it has waited at least once, so it was given up there");
            break;
        }
        making.set(connection.consumer(&queue, &options));
        let mut reader = making.await.expect("a consumer");
        send(&*sender, [format!("after {times}")]).await;
        let taken = take(&mut *reader, 1).await;
        assert_eq!(body(&taken[0]), format!("after {times}"));
        reader.settler().ack(taken[0].token).await.expect("ack");
        reader.close().await.expect("close");
    }
    closed(connection.close().await);
}

/// Both groups of a topic have a message; one of them wants it again, now and later.
pub async fn a_retry_in_one_group_is_no_message_to_another() {
    let topic = Address::topic(name("groups"));
    let connection = connect(&settings()).await;
    let mut audit = consumer(&connection, &topic, group("audit")).await;
    let mut billing = consumer(&connection, &topic, group("billing")).await;
    send(&*producer(&connection, &topic).await, bodies(1)).await;
    for (attempt, after) in [(2, Duration::ZERO), (3, Duration::from_millis(300))] {
        let taken = take(&mut *audit, 1).await;
        let retried = audit.settler().retry(taken[0].token, &taken[0].message, attempt, after);
        retried.await.expect("retry");
    }
    let last = take(&mut *audit, 1).await;
    assert_eq!((body(&last[0]).as_str(), last[0].message.header_attempt()), ("m-0000", 3));
    assert_eq!(take(&mut *billing, 1).await[0].message.header_attempt(), 1);
    quiet(&mut *billing).await;
    closed(connection.close().await);
}

/// The names of both are the same when they are read with dots between them.
pub async fn a_queue_that_is_named_like_a_group_has_nothing_to_do_with_it() {
    let topic = Address::topic(name("orders"));
    let queue = Address::queue(format!("{}.billing", topic.name()));
    let connection = connect(&settings()).await;
    let mut theirs = consumer(&connection, &topic, group("billing")).await;
    let mut others = consumer(&connection, &queue, ConsumeOptions::default()).await;
    for address in [&topic, &queue] {
        send(&*producer(&connection, address).await, bodies(1)).await;
        let taken = take(&mut *theirs, 1).await;
        let later = theirs.settler().retry(taken[0].token, &taken[0].message, 2, Duration::from_millis(300));
        later.await.expect("retry");
        let again = take(&mut *theirs, 1).await;
        assert_eq!(again[0].message.header_attempt(), 2);
        theirs.settler().ack(again[0].token).await.expect("ack");
        quiet(&mut *others).await;
        std::mem::swap(&mut theirs, &mut others);
    }
    closed(connection.close().await);
}

/// Replay from first, last, offset and time; and a group that is being consumed cannot be moved.
pub async fn a_group_begins_where_it_is_told_to() {
    let topic = Address::topic(name("replay"));
    let connection = connect(&settings()).await;
    let sender = producer(&connection, &topic).await;
    send(&*sender, bodies(5)).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    let between = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
    tokio::time::sleep(Duration::from_millis(20)).await;
    send(&*sender, (5..10).map(|n| format!("m-{n:04}"))).await;
    let all: Vec<String> = bodies(10).collect();
    let at = |position: String| ConsumeOptions { extra: vec![("position".into(), position)], ..group("again") };
    for (position, expected) in [
        ("first".to_owned(), &all[..]),
        ("last:3".to_owned(), &all[7..]),
        ("offset:4".to_owned(), &all[4..]),
        (format!("time:{between}"), &all[5..]),
        ("end".to_owned(), &all[..0]),
        ("first".to_owned(), &all[..]),
    ] {
        let options = at(position.clone());
        // The one before may still be about to leave the group: its close does not wait for ever.
        let mut again = eventually(PATIENCE, || async {
            match connection.consumer(&topic, &options).await {
                Err(error) if error.kind() == ErrorKind::Conflict => Err(error),
                made => Ok(made.expect("a consumer")),
            }
        })
        .await;
        let taken = take(&mut *again, expected.len()).await;
        assert_eq!(taken.iter().map(body).collect::<Vec<_>>(), expected, "from {position}");
        quiet(&mut *again).await;
        for incoming in taken {
            again.settler().ack(incoming.token).await.expect("ack");
        }
        if position == "first" {
            let error = connection.consumer(&topic, &at("end".into())).await.expect_err("it has a consumer");
            assert_eq!(error.kind(), ErrorKind::Conflict);
            let other = connect(&settings()).await;
            let error = other.consumer(&topic, &at("end".into())).await.expect_err("it has a consumer elsewhere");
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
            closed(other.close().await);
        }
        again.close().await.expect("close");
    }
    let error = connection.consumer(&topic, &at("noon".into())).await.expect_err("no position");
    assert_eq!(error.kind(), ErrorKind::Config);
    closed(connection.close().await);
}

/// A group that was declared has what was sent since, though none of its members was there.
pub async fn a_declared_group_misses_nothing() {
    let topic = Address::topic(name("declared"));
    let connection = connect(&settings()).await;
    let sender = producer(&connection, &topic).await;
    send(&*sender, ["before".to_owned()]).await;
    connection.declare(&topic, &group("late")).await.expect("declare");
    send(&*sender, ["after".to_owned()]).await;
    // Harmless when it exists.
    connection.declare(&topic, &group("late")).await.expect("declare");
    let mut late = consumer(&connection, &topic, group("late")).await;
    assert_eq!(take(&mut *late, 1).await.iter().map(body).collect::<Vec<_>>(), ["after"]);
    quiet(&mut *late).await;
    let earliest = ConsumeOptions { start: Start::Earliest, ..ConsumeOptions::default() };
    let mut alone = consumer(&connection, &topic, earliest).await;
    assert_eq!(take(&mut *alone, 2).await.iter().map(body).collect::<Vec<_>>(), ["before", "after"]);
    closed(connection.close().await);
}

/// Large messages fill the prefetch before it is full by their number.
pub async fn the_prefetch_is_bounded_in_bytes() {
    let queue = Address::queue(name("bytes"));
    let connection = connect(&settings()).await;
    send(&*producer(&connection, &queue).await, (0..20).map(|n| format!("{n:02}{}", "x".repeat(100_000)))).await;
    let options = ConsumeOptions { prefetch_bytes: 250_000, ..ConsumeOptions::default() };
    let mut narrow = consumer(&connection, &queue, options).await;
    let mut taken = take(&mut *narrow, 3).await;
    quiet(&mut *narrow).await;
    for n in 3..20 {
        let done = taken.remove(0);
        narrow.settler().ack(done.token).await.expect("ack");
        taken.extend(take(&mut *narrow, 1).await);
        assert_eq!(body(&taken[2])[..2], format!("{n:02}"));
    }
    closed(connection.close().await);
}

/// Headers count too, although how large they are is only known when they have been parsed.
pub async fn the_prefetch_is_bounded_in_bytes_of_headers() {
    let queue = Address::queue(name("headers"));
    let connection = connect(&settings()).await;
    let sender = producer(&connection, &queue).await;
    for n in 0..6 {
        let message = Message::new(n.to_string()).with_id(MessageId::new()).with_header("large", "x".repeat(100_000));
        sender.send(message).await.expect("accepted");
    }
    let options = ConsumeOptions { prefetch_bytes: 250_000, ..ConsumeOptions::default() };
    let mut narrow = consumer(&connection, &queue, options).await;
    let taken = take(&mut *narrow, 3).await;
    quiet(&mut *narrow).await;
    for done in &taken {
        narrow.settler().ack(done.token).await.expect("ack");
    }
    let rest = take(&mut *narrow, 3).await;
    assert_eq!(taken.iter().chain(&rest).map(body).collect::<Vec<_>>(), ["0", "1", "2", "3", "4", "5"]);
    closed(connection.close().await);
}
