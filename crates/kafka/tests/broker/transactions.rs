//! What handlers hand back and the positions of their sources, as one.

use std::{
    collections::BTreeMap,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use polymq_core::{
    Address, Bus, Connection, ConsumeOptions, ConsumerFactory, ConsumerRunner, ErrorKind, Message, Outcome, Retry,
    Running, Sends, Settings,
};
use polymq_kafka::rdkafka::{
    ClientConfig, Message as _, Offset,
    admin::{AdminOptions, NewTopic, TopicReplication},
    consumer::{BaseConsumer, Consumer as _},
    producer::{BaseProducer, Producer as _},
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use polymq_testkit::eventually;

use crate::{
    groups::committed,
    harness::{PATIENCE, bare, body, closed, connect, consumer, name, producer, quiet, send, settings, take, url},
    topics::admin,
};

/// The source of a child process, and the beginning of the names of its targets.
const CHILD: &str = "TEST_KAFKA_TRANSACTIONS";
const CHILD_URL: &str = "TEST_KAFKA_TRANSACTIONS_URL";
const CHILD_MOST: &str = "TEST_KAFKA_TRANSACTIONS_MOST";

/// What a topic holds: what is committed, or also what was given up.
fn held(topic: &str, committed_only: bool) -> Vec<String> {
    let isolation = if committed_only { "read_committed" } else { "read_uncommitted" };
    let mut config = bare().config();
    config.set("group.id", "held").set("isolation.level", isolation).set("enable.partition.eof", "true");
    let reader: BaseConsumer = config.create().expect("a consumer");
    let mut list = polymq_kafka::rdkafka::TopicPartitionList::new();
    list.add_partition_offset(topic, 0, Offset::Beginning).expect("a partition");
    reader.assign(&list).expect("assign");
    let (mut found, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    loop {
        assert!(Instant::now() < deadline, "the end of {topic} is not reached");
        match reader.poll(Duration::from_millis(100)) {
            Some(Ok(record)) => found.push(String::from_utf8_lossy(record.payload().unwrap_or_default()).into_owned()),
            Some(Err(polymq_kafka::rdkafka::error::KafkaError::PartitionEOF(_))) => return found,
            // A topic that is still to be made, or a broker that is busy: there is a deadline.
            Some(Err(_)) | None => {}
        }
    }
}

fn held_committed(topic: &str) -> Vec<String> {
    tokio::task::block_in_place(|| held(topic, true))
}

async fn fill(queue: &Address, count: usize) {
    let connection = connect(&settings()).await;
    send(&*producer(&connection, queue).await, (0..count).map(|n| format!("m-{n:04}"))).await;
    closed(connection.close().await);
}

/// Hands each message on to two queues, and after so many none.
async fn fan_out(bus: &Bus, source: &str, most: usize) -> Running {
    let handled = Arc::new(AtomicUsize::new(0));
    let mut consumers = ConsumerFactory::new(bus);
    let targets = [format!("{source}.a"), format!("{source}.b")];
    let route = consumers.route(source, move |message: Message| {
        let sends = targets.iter().fold(Sends::new(), |sends, target| {
            sends.message(Address::queue(target.as_str()), Message::new(message.payload().clone()))
        });
        let stops = handled.fetch_add(1, Ordering::SeqCst) >= most;
        async move {
            if stops {
                std::future::pending::<()>().await;
            }
            sends
        }
    });
    route.transactional().concurrency(16).prefetch(64);
    ConsumerRunner::new(consumers).start().await.expect("starts")
}

/// Each message is handed on once, and the position is behind the last one.
pub async fn what_is_sent_and_the_position_are_one() {
    let source = name("tx-source");
    fill(&Address::queue(source.as_str()), 100).await;
    let bus = Bus::connect(&url()).await.expect("connect");
    let running = fan_out(&bus, &source, usize::MAX).await;
    let mut expected: Vec<_> = (0..100).map(|n| format!("m-{n:04}")).collect();
    expected.sort();
    for target in [format!("{source}.a"), format!("{source}.b")] {
        eventually(PATIENCE, || async {
            let mut found = held_committed(&target);
            found.sort();
            if found == expected { Ok(()) } else { Err(format!("{} in {target}", found.len())) }
        })
        .await;
    }
    running.stop().await.expect("stopped");
    closed(bus.close().await);
    // A close that has given up waiting leaves the end of the last transaction to come.
    eventually(PATIENCE, || async {
        let position = tokio::task::block_in_place(|| committed(&source, &source));
        if position == (Offset::Offset(100), String::new()) { Ok(()) } else { Err(format!("{position:?}")) }
    })
    .await;
}

/// The second of two messages is refused by the broker when the first is written already: that one is not delivered, and
/// the source is a dead letter instead of being asked for ever.
pub async fn what_is_given_up_leaves_nothing() {
    let (source, narrow) = (name("tx-refused"), name("tx-narrow"));
    let topic = NewTopic::new(&narrow, 1, TopicReplication::Fixed(1)).set("max.message.bytes", "1000");
    admin().create_topics(&[topic], &AdminOptions::new()).await.expect("asked").remove(0).expect("made");
    fill(&Address::queue(source.as_str()), 1).await;
    let bus = Bus::connect(&url()).await.expect("connect");
    let wide = format!("{source}.wide");
    bus.queue(wide.as_str()).declare(ConsumeOptions::default()).await.expect("declared");
    let mut consumers = ConsumerFactory::new(&bus);
    let (to, large) = (wide.clone(), narrow.clone());
    consumers
        .route(source.as_str(), move |message: Message| {
            let sends = Sends::new()
                .message(Address::queue(to.as_str()), message)
                .message(Address::queue(large.as_str()), Message::new("x".repeat(50_000)));
            async move { sends }
        })
        .transactional();
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    let connection = connect(&settings()).await;
    let mut letters = consumer(&connection, &Address::queue(format!("{source}.dlq")), ConsumeOptions::default()).await;
    let letter = take(&mut *letters, 1).await.remove(0);
    assert_eq!(body(&letter), "m-0000");
    running.stop().await.expect("stopped");
    assert_eq!((held_committed(&wide), held_committed(&narrow)), (Vec::new(), Vec::new()));
    assert_eq!(tokio::task::block_in_place(|| held(&wide, false)), ["m-0000"], "it was written, and given up");
    closed(connection.close().await);
    closed(bus.close().await);
}

/// A handler that fails sends nothing, whatever it had put together, and its message is handled again.
pub async fn what_fails_sends_nothing_and_is_tried_again() {
    let source = name("tx-fails");
    let target = format!("{source}.out");
    fill(&Address::queue(source.as_str()), 1).await;
    let bus = Bus::connect(&url()).await.expect("connect");
    bus.queue(target.as_str()).declare(ConsumeOptions::default()).await.expect("declared");
    let mut consumers = ConsumerFactory::new(&bus);
    let to = target.clone();
    let attempts = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let counted = std::sync::Arc::clone(&attempts);
    consumers
        .route(source.as_str(), move |message: Message| {
            let attempt = counted.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let sends = Sends::new().message(Address::queue(to.as_str()), message);
            async move {
                match attempt {
                    0 => Outcome::retry_after(Duration::from_millis(200), "not yet"),
                    _ => Outcome::Send(sends),
                }
            }
        })
        .transactional();
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    eventually(PATIENCE, || async {
        let found = held_committed(&target);
        if found == ["m-0000"] { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
    assert_eq!(attempts.load(std::sync::atomic::Ordering::SeqCst), 2);
    running.stop().await.expect("stopped");
    closed(bus.close().await);
}

/// One group is transactional as a whole, and only a group can be.
pub async fn transactional_consumers_are_not_mixed_with_others() {
    let queue = Address::queue(name("tx-mixed"));
    let connection = connect(&settings()).await;
    let transactional = ConsumeOptions { transactional: true, ..ConsumeOptions::default() };
    let mut first = consumer(&connection, &queue, transactional.clone()).await;
    let error = connection.consumer(&queue, &ConsumeOptions::default()).await.expect_err("mixed");
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    let topic = Address::topic(name("tx-topic"));
    let error = connection.consumer(&topic, &transactional).await.expect_err("no group");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    quiet(&mut *first).await;
    closed(connection.close().await);
}

/// A group is shared anew, a broker has lost its way, another producer has taken the place of this one: nothing of that is the
/// fault of a message whose handler has succeeded. It is settled with the next transaction.
pub async fn what_ends_a_transaction_is_not_held_against_its_message() {
    use RDKafkaApiKey as Request;
    use RDKafkaRespErr::*;
    // The client library's own broker refuses what it is told to.
    let host: BaseProducer = ClientConfig::new().set("test.mock.num.brokers", "1").create().expect("a client");
    let cluster = || host.client().mock_cluster().expect("it has one");
    let (source, target) = (Address::queue("source"), Address::queue("target"));
    for address in [&source, &target] {
        cluster().create_topic(address.name(), 1, 1).expect("a topic");
    }
    // No positions are committed meanwhile, which might be refused in the place of a message.
    let url =
        format!("kafka://{}?declare=passive&connect_timeout=60s&commit_interval=60s", cluster().bootstrap_servers());
    let connection = connect(&Settings::from_url(&url).expect("a URL")).await;
    let transactional = ConsumeOptions { transactional: true, ..ConsumeOptions::default() };
    let mut reader = consumer(&connection, &source, transactional).await;
    let sender = producer(&connection, &source).await;
    for (request, refused, expected) in [
        (Request::TxnOffsetCommit, RD_KAFKA_RESP_ERR_ILLEGAL_GENERATION, ErrorKind::Busy),
        (Request::TxnOffsetCommit, RD_KAFKA_RESP_ERR_UNKNOWN_MEMBER_ID, ErrorKind::Busy),
        (Request::AddOffsetsToTxn, RD_KAFKA_RESP_ERR_INVALID_TXN_STATE, ErrorKind::Busy),
        (Request::AddPartitionsToTxn, RD_KAFKA_RESP_ERR_INVALID_TXN_STATE, ErrorKind::Busy),
        (Request::Produce, RD_KAFKA_RESP_ERR_INVALID_TXN_STATE, ErrorKind::Busy),
        (Request::EndTxn, RD_KAFKA_RESP_ERR_INVALID_TXN_STATE, ErrorKind::Busy),
        (Request::EndTxn, RD_KAFKA_RESP_ERR_PRODUCER_FENCED, ErrorKind::Busy),
        // What is the message's own is told apart.
        (Request::Produce, RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE, ErrorKind::TooLarge),
        (Request::Produce, RD_KAFKA_RESP_ERR_POLICY_VIOLATION, ErrorKind::Refused),
    ] {
        send(&*sender, [format!("{refused:?}")]).await;
        let taken = take(&mut *reader, 1).await;
        let handed_on = || vec![(target.clone(), Message::new(taken[0].message.payload().clone()))];
        cluster().request_errors(request, &[refused]);
        let settled = reader.settler().ack_and_send(taken[0].token, handed_on()).await;
        let error = settled.expect_err("refused");
        assert_eq!(error.kind(), expected, "{request:?} {refused:?}: {error}");
        cluster().clear_request_errors(request);
        // Not always with the next one: the client library has to begin a new epoch first.
        let mut tries = 0;
        while let Err(error) = reader.settler().ack_and_send(taken[0].token, handed_on()).await {
            tries += 1;
            assert!(error.retry() != Retry::Never && tries < 10, "{request:?} {refused:?}, then: {error:?}");
        }
    }
    drop(connection);
}

fn child(source: &str, most: usize) -> Child {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(program);
    // Killed, it is to be given up soon.
    let url = url().replace("session_timeout=30s", "session_timeout=6s");
    command.env(CHILD, source).env(CHILD_URL, url).env(CHILD_MOST, most.to_string());
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    command.spawn().expect("a child")
}

/// Becomes the child, if this process was started as one.
pub fn run_if_child() {
    let (Ok(source), Ok(url)) = (std::env::var(CHILD), std::env::var(CHILD_URL)) else { return };
    // A parent that was killed must not leave a child behind.
    std::thread::spawn(|| {
        let _ = std::io::Read::read(&mut std::io::stdin(), &mut [0]);
        std::process::exit(3);
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
    runtime.block_on(async {
        let bus = Bus::connect(&url).await.expect("connect");
        let most = std::env::var(CHILD_MOST).ok().and_then(|most| most.parse().ok()).expect("a number");
        let _running = fan_out(&bus, &source, most).await;
        std::future::pending::<()>().await;
    });
}

/// How many messages of a queue its group has committed.
fn position(queue: &str) -> i64 {
    match tokio::task::block_in_place(|| committed(queue, queue)).0 {
        Offset::Offset(offset) => offset,
        _ => 0,
    }
}

async fn reaches(queue: &str, least: usize) {
    eventually(PATIENCE * 3, || async {
        let found = position(queue);
        if found >= least as i64 { Ok(()) } else { Err(format!("{found} handed on")) }
    })
    .await;
}

/// A process is killed in the middle, twice: in the end each message was handed on exactly once, to both targets.
pub async fn a_kill_leaves_all_or_nothing() {
    const COUNT: usize = 3000;
    let source = name("tx-killed");
    fill(&Address::queue(source.as_str()), COUNT).await;
    let targets = [format!("{source}.a"), format!("{source}.b")];
    let connection = connect(&settings()).await;
    for target in &targets {
        connection.declare(&Address::queue(target.as_str()), &ConsumeOptions::default()).await.expect("declared");
    }
    for least in [COUNT / 6, COUNT / 2] {
        // However late it is killed, it cannot be done by then.
        let mut running = child(&source, 1400);
        reaches(&source, least).await;
        running.kill().expect("killed");
        running.wait().expect("gone");
    }
    assert!(position(&source) < COUNT as i64, "it was killed in the middle");
    let mut last = child(&source, usize::MAX);
    reaches(&source, COUNT).await;
    last.kill().expect("killed");
    last.wait().expect("gone");
    for target in &targets {
        let mut times: BTreeMap<String, usize> = BTreeMap::new();
        held_committed(target).into_iter().for_each(|body| *times.entry(body).or_default() += 1);
        let twice: Vec<_> = times.iter().filter(|(_, count)| **count != 1).collect();
        assert!(times.len() == COUNT && twice.is_empty(), "{} different, not once: {twice:?}", times.len());
    }
    closed(connection.close().await);
}
