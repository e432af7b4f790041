use std::time::{Duration, Instant, SystemTime};

use futures_util::future::join_all;
use lapin::{
    BasicProperties,
    options::{
        BasicConsumeOptions, BasicGetOptions, BasicNackOptions, BasicPublishOptions, QueueDeclareOptions,
        QueueDeleteOptions,
    },
    types::{AMQPValue, FieldTable},
};
use polymq_amqp::AmqpConnection;
use polymq_core::{
    Address, Answer, Bus, Connection, ConsumeOptions, ConsumerFactory, ConsumerRunner, ErrorKind, HealthState,
    ProduceOptions, Retry, Settings,
};

use super::harness::*;

pub async fn what_is_sent_is_received_and_gone_when_acknowledged() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("round"));
    let producer = producer(&connection, &queue).await;
    let sent = join_all((0..200).map(|n| producer.send(message(&n.to_string())))).await;
    assert!(sent.iter().all(Result::is_ok), "{sent:?}");
    let mut consumer = consumer(&connection, &queue).await;
    let settler = consumer.settler();
    let received = receive(&mut *consumer, 200).await;
    for (n, incoming) in received.iter().enumerate() {
        assert_eq!(text(incoming), n.to_string());
        settler.ack(incoming.token).await.expect("acknowledged");
    }
    assert_eq!(settler.ack(received[0].token).await.expect_err("a second time").kind(), ErrorKind::Stale);
    consumer.close().await.expect("closed");
    assert_eq!(consumer.receive(1, &mut Vec::new()).await.expect_err("after close").kind(), ErrorKind::Closed);
    let stats = connection.stats(&queue, None).await.expect("counts");
    assert_eq!((stats.ready, stats.consumers), (0, 0));
    connection.ping().await.expect("an answer");
    assert_eq!(connection.health().now().state, HealthState::Up);
    producer.close().await.expect("closed");
    assert_eq!(send(&*producer, message("late")).await.expect_err("after close").kind(), ErrorKind::Closed);
    connection.close().await.expect("closed");
    connection.close().await.expect("closed twice");
    assert_eq!(connection.health().now().state, HealthState::Closed);
    assert_eq!(connection.ping().await.expect_err("after close").kind(), ErrorKind::Closed);
}

pub async fn a_bare_client_reads_ours_and_we_read_its() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("foreign"));
    let producer = producer(&connection, &queue).await;
    let ours = message("{}")
        .with_kind("order")
        .with_key("k")
        .with_header("tenant", "ácme")
        .with_content_type("application/json");
    send(&*producer, ours.clone()).await.expect("sent");
    let bare = raw(shared()).await;
    let got =
        bare.basic_get(queue.name().into(), BasicGetOptions { no_ack: true }).await.expect("a get").expect("a message");
    assert_eq!(got.data, b"{}");
    assert_eq!(got.properties.kind().as_ref().map(|kind| kind.as_str()), Some("order"));
    assert_eq!(got.properties.delivery_mode(), &Some(2));
    let table = got.properties.headers().clone().expect("headers");
    assert_eq!(table.inner().get("tenant"), Some(&AMQPValue::LongString("ácme".into())));
    assert_eq!(table.inner().get("cloudEvents:partitionkey"), Some(&AMQPValue::LongString("k".into())));

    let mut headers = FieldTable::default();
    headers.insert("count".into(), AMQPValue::LongInt(3));
    let with = BasicProperties::default().with_headers(headers).with_message_id("mine".into());
    for (body, properties) in [("bare", BasicProperties::default()), ("dressed", with)] {
        let publish = bare.basic_publish(
            "".into(),
            queue.name().into(),
            BasicPublishOptions::default(),
            body.as_bytes(),
            properties,
        );
        publish.await.expect("published").await.expect("confirmed");
    }
    let mut consumer = consumer(&connection, &queue).await;
    let received = receive(&mut *consumer, 2).await;
    assert_eq!(received[0].message, polymq_core::Message::new("bare"));
    assert_eq!(received[1].message.headers().get("count"), Some("3"));
    assert_eq!(received[1].message.id(), Some(&"mine".into()));
    // A message without an id can be retried too.
    let settler = consumer.settler();
    settler.retry(received[0].token, &received[0].message, 2, Duration::ZERO).await.expect("retried");
    assert_eq!(receive(&mut *consumer, 1).await[0].message.header_attempt(), 2);
}

pub async fn a_login_that_fails_says_why() {
    let port = shared().port;
    let attempt = |url: String| async move {
        let start = Instant::now();
        let settings = Settings::from_url(&url).expect("a URL");
        let error = AmqpConnection::connect(&settings).await.expect_err("refused");
        assert!(start.elapsed() < Duration::from_secs(10));
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        error
    };
    let error = attempt(format!("amqp://guest:hunter2@127.0.0.1:{port}")).await;
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    let error = attempt(format!("amqp://guest:guest@127.0.0.1:{port}/nowhere")).await;
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    let error = attempt("amqp://127.0.0.1:1".into()).await;
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Disconnected, Retry::Now), "{error}");
    // A peer that takes the connection and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = silent.local_addr().expect("an address").port();
    let error = attempt(format!("amqp://127.0.0.1:{port}?connect_timeout=300ms")).await;
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
}

pub async fn what_is_not_allowed_is_told_apart() {
    let broker = shared();
    let user = unique("limited");
    broker.management("PUT", &format!("users/{user}"), r#"{"password":"pw","tags":""}"#).await;
    let rights = r#"{"configure":"^mine-","write":"^(mine-|amq.default)","read":"^mine-"}"#;
    broker.management("PUT", &format!("permissions/%2F/{user}"), rights).await;
    let connection = connect(&format!("amqp://{user}:pw@127.0.0.1:{}", broker.port)).await;
    let denied =
        connection.consumer(&Address::queue(unique("yours")), &ConsumeOptions::default()).await.expect_err("denied");
    assert_eq!(denied.kind(), ErrorKind::PermissionDenied, "{denied}");
    let queue = Address::queue(unique("mine"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("allowed")).await.expect("sent");
    // No permission to write to amq.topic: the broker ends the channel, and only the guilty message fails for good.
    let topic = connection.producer(&Address::topic("t"), &ProduceOptions::default()).await.expect("a producer");
    let denied = send(&*topic, message("x")).await.expect_err("denied");
    assert_eq!(denied.kind(), ErrorKind::PermissionDenied, "{denied}");
    send(&*producer, message("still allowed")).await.expect("sent");
}

pub async fn a_missing_queue_is_not_found_or_made() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("missing"));
    let produce = ProduceOptions { declare: false, ..ProduceOptions::default() };
    let consume = ConsumeOptions { declare: false, ..ConsumeOptions::default() };
    for error in [
        connection.producer(&queue, &produce).await.map(drop).expect_err("no queue"),
        connection.consumer(&queue, &consume).await.map(drop).expect_err("no queue"),
        connection.declare(&queue, &consume).await.expect_err("no queue"),
        connection.stats(&queue, None).await.map(drop).expect_err("no queue"),
    ] {
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
    }
    connection.declare(&queue, &ConsumeOptions::default()).await.expect("declared");
    connection.declare(&queue, &ConsumeOptions::default()).await.expect("declared again");
    connection.producer(&queue, &produce).await.expect("a producer");
    connection.stats(&queue.dead_letters(None), None).await.expect("the dead-letter queue was made too");
    let unknown = ConsumeOptions { extra: vec![("colour".into(), "red".into())], ..ConsumeOptions::default() };
    assert_eq!(connection.consumer(&queue, &unknown).await.expect_err("unknown").kind(), ErrorKind::Config);
}

pub async fn a_queue_made_by_another_tool_is_taken_as_it_is() {
    let bare = raw(shared()).await;
    let name = unique("other-tool");
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(2));
    arguments.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    bare.queue_declare(name.as_str().into(), durable, arguments).await.expect("declared");
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(name);
    let producer = producer(&connection, &queue).await;
    let answers = join_all((0..5).map(|n| producer.send(message(&n.to_string())))).await;
    assert!(answers[0].is_ok() && answers[1].is_ok());
    let error = answers.into_iter().find_map(Result::err).expect("a full queue refuses");
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    let mut consumer = consumer(&connection, &queue).await;
    assert_eq!(text(&receive(&mut *consumer, 1).await[0]), "0");
}

pub async fn an_unroutable_message_is_an_error_and_only_that_one() {
    // One channel for both, so that returns and confirms mix.
    let connection = connect(&format!("{}?channels=1", shared().url())).await;
    let (here, gone) = (Address::queue(unique("here")), Address::queue(unique("gone")));
    let good = producer(&connection, &here).await;
    connection.declare(&gone, &ConsumeOptions::default()).await.expect("declared");
    let as_it_is = ProduceOptions { declare: false, ..ProduceOptions::default() };
    let bad = connection.producer(&gone, &as_it_is).await.expect("a producer");
    connection.delete(&gone, None).await.expect("deleted");
    connection.delete(&gone, None).await.expect("deleted twice");
    for round in 0..20 {
        let mut sent = Vec::new();
        for n in 0..100 {
            // The same body everywhere: only the id tells them apart.
            let lost = (n + round) % 3 == 0;
            sent.push((lost, if lost { &bad } else { &good }.send(message("same"))));
        }
        for (lost, answer) in sent {
            match within(20, answer).await {
                Ok(_) => assert!(!lost),
                Err(error) => {
                    assert!(lost, "{error}");
                    assert_eq!((error.kind(), error.channel()), (ErrorKind::Unroutable, Some(gone.name())), "{error}");
                }
            }
        }
    }
    // A producer that may make its queue says so once, and then makes it.
    let heals = producer(&connection, &gone).await;
    connection.delete(&gone, None).await.expect("deleted");
    assert_eq!(send(&*heals, message("x")).await.expect_err("deleted").kind(), ErrorKind::Unroutable);
    send(&*heals, message("x")).await.expect("made again");
    // Nobody listening to a topic is no error.
    let topic = producer(&connection, &Address::topic(unique("nobody"))).await;
    send(&*topic, message("x")).await.expect("sent");
}

pub async fn a_delayed_message_comes_in_time_and_never_early() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("delayed"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let start = SystemTime::now();
    let delays = [1500, 250, 700, 30];
    for millis in delays {
        let due = start + Duration::from_millis(millis);
        send(&*producer, message(&millis.to_string()).with_deliver_at(due)).await.expect("sent");
    }
    for expected in [30, 250, 700, 1500] {
        let incoming = receive(&mut *consumer, 1).await.remove(0);
        let waited = start.elapsed().expect("a clock");
        let expected_at = Duration::from_millis(expected);
        assert_eq!(text(&incoming), expected.to_string());
        assert!(waited >= expected_at && waited < expected_at + Duration::from_secs(2), "{expected}: {waited:?}");
        assert!(incoming.message.headers().is_empty(), "{:?}", incoming.message);
        consumer.settler().ack(incoming.token).await.expect("acknowledged");
    }
    let topic = Address::topic(unique("later"));
    let mut listener = connection.consumer(&topic, &ConsumeOptions::default()).await.expect("a consumer");
    let topic = connection.producer(&topic, &ProduceOptions::default()).await.expect("a producer");
    let start = Instant::now();
    send(&*topic, message("x").deliver_in(Duration::from_millis(400))).await.expect("sent");
    receive(&mut *listener, 1).await;
    assert!(start.elapsed() >= Duration::from_millis(400));
}

pub async fn a_retried_message_counts_its_attempts() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("retried"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    let settler = consumer.settler();
    let original = message("x").with_header("tenant", "acme").with_key("k").expires_in(Duration::from_secs(60));
    send(&*producer, original.clone()).await.expect("sent");
    let mut due = Instant::now();
    for attempt in 1..=4 {
        let incoming = receive(&mut *consumer, 1).await.remove(0);
        let mut seen = incoming.message.clone();
        assert_eq!(seen.header_attempt(), attempt);
        seen.clear_system_headers();
        assert_eq!(
            (seen.id(), seen.key(), seen.headers(), seen.expires_at()),
            (original.id(), original.key(), original.headers(), original.expires_at())
        );
        if attempt == 4 {
            settler.ack(incoming.token).await.expect("acknowledged");
            break;
        }
        assert!(Instant::now() >= due, "attempt {attempt} is early");
        let after = Duration::from_millis(300) * (attempt - 1);
        due = Instant::now() + after;
        within(10, settler.retry(incoming.token, &incoming.message, attempt + 1, after)).await.expect("retried");
        let again = settler.retry(incoming.token, &incoming.message, attempt + 1, after).await;
        assert_eq!(again.expect_err("settled").kind(), ErrorKind::Stale);
    }
    silence(&mut *consumer, 500).await;
    consumer.close().await.expect("closed");
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 0);
}

pub async fn what_a_foreign_consumer_rejects_is_a_dead_letter() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("rejected"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("bad")).await.expect("sent");
    let bare = raw(shared()).await;
    let got = bare.basic_get(queue.name().into(), BasicGetOptions::default()).await.expect("a get").expect("a message");
    got.nack(BasicNackOptions { requeue: false, multiple: false }).await.expect("rejected");
    let mut dead = consumer(&connection, &queue.dead_letters(None)).await;
    let incoming = receive(&mut *dead, 1).await.remove(0);
    assert_eq!(text(&incoming), "bad");
    assert!(incoming.message.headers().is_empty(), "{:?}", incoming.message);
}

pub async fn each_group_of_a_topic_sees_each_message_once() {
    let connection = connect(&shared().url()).await;
    let topic = Address::topic(unique("prices"));
    let group = |name: &str| ConsumeOptions { group: Some(name.into()), ..ConsumeOptions::default() };
    let mut one = connection.consumer(&topic, &group("a")).await.expect("a consumer");
    let mut two = connection.consumer(&topic, &group("a")).await.expect("a consumer");
    let mut other = connection.consumer(&topic, &group("b")).await.expect("a consumer");
    let mut own = connection.consumer(&topic, &ConsumeOptions::default()).await.expect("a consumer");
    let producer = producer(&connection, &topic).await;
    for n in 0..20 {
        send(&*producer, message(&n.to_string())).await.expect("sent");
    }
    assert_eq!(receive(&mut *one, 10).await.len() + receive(&mut *two, 10).await.len(), 20);
    let mine = receive(&mut *other, 20).await;
    receive(&mut *own, 20).await;
    // A retry goes to the group that asked for it, and to no other.
    other.settler().retry(mine[0].token, &mine[0].message, 2, Duration::ZERO).await.expect("retried");
    assert_eq!(receive(&mut *other, 1).await[0].message.header_attempt(), 2);
    tokio::join!(silence(&mut *one, 300), silence(&mut *two, 300), silence(&mut *own, 300));
    // A group keeps what is sent while it is away; a subscription without a group ends with its consumer.
    other.close().await.expect("closed");
    drop((other, mine));
    send(&*producer, message("away")).await.expect("sent");
    eventually("the queue of the group holds it all", || async {
        connection.stats(&topic, Some("b")).await.expect("counts").ready >= 1
    })
    .await;
    connection.delete(&topic, Some("b")).await.expect("deleted");
    assert_eq!(connection.stats(&topic, Some("b")).await.expect_err("deleted").kind(), ErrorKind::NotFound);
    assert_eq!(connection.stats(&topic, None).await.expect_err("no group").kind(), ErrorKind::InvalidInput);
}

pub async fn wildcards_tell_the_concrete_topic_even_after_a_retry() {
    let connection = connect(&shared().url()).await;
    let base = unique("w");
    let mut consumer = consumer(&connection, &Address::topic(format!("{base}.*.price"))).await;
    for (topic, fits) in [("eur.price", true), ("price", false), ("usd.price", true), ("usd.price.low", false)] {
        let producer = producer(&connection, &Address::topic(format!("{base}.{topic}"))).await;
        send(&*producer, message(if fits { topic } else { "wrong" })).await.expect("sent");
    }
    for incoming in receive(&mut *consumer, 2).await {
        assert_eq!(incoming.channel.as_deref(), Some(&*format!("{base}.{}", text(&incoming))));
        consumer
            .settler()
            .retry(incoming.token, &incoming.message, 2, Duration::from_millis(50))
            .await
            .expect("retried");
        let again = receive(&mut *consumer, 1).await.remove(0);
        assert_eq!((text(&again), again.channel), (text(&incoming), incoming.channel));
    }
    let wrong = connection.producer(&Address::topic("a.*"), &ProduceOptions::default()).await.expect_err("a wildcard");
    assert_eq!(wrong.kind(), ErrorKind::InvalidInput);
}

pub async fn acknowledgements_are_coalesced() {
    let proxy = Proxy::start(shared().port).await;
    let connection = connect(&proxy.url()).await;
    let queue = Address::queue(unique("coalesced"));
    let producer = producer(&connection, &queue).await;
    join_all((0..5_000).map(|n| producer.send(message(&n.to_string())))).await;
    let mut consumer = consumer(&connection, &queue).await;
    let settler = consumer.settler();
    let mut left = 5_000;
    while left > 0 {
        let mut batch = Vec::new();
        within(10, consumer.receive(128, &mut batch)).await.expect("messages");
        for incoming in &batch {
            settler.ack(incoming.token).await.expect("acknowledged");
        }
        left -= batch.len();
    }
    consumer.close().await.expect("closed");
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 0);
    let frames = proxy.acks.load(std::sync::atomic::Ordering::SeqCst);
    assert!(frames < 5_000 / 4, "{frames} acknowledgements for 5000 messages");
}

pub async fn one_stuck_message_does_not_stop_the_others() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("stuck"));
    let producer = producer(&connection, &queue).await;
    join_all((0..200).map(|n| producer.send(message(&n.to_string())))).await;
    let options = ConsumeOptions { prefetch: 4, ..ConsumeOptions::default() };
    let mut consumer = connection.consumer(&queue, &options).await.expect("a consumer");
    let settler = consumer.settler();
    let stuck = receive(&mut *consumer, 1).await.remove(0);
    for n in 1..200 {
        let incoming = receive(&mut *consumer, 1).await.remove(0);
        assert_eq!(text(&incoming), n.to_string());
        settler.ack(incoming.token).await.expect("acknowledged");
    }
    eventually("all but one are acknowledged", || async {
        let queue = shared().management("GET", &format!("queues/%2F/{}", queue.name()), "").await;
        queue["messages"] == 1 && queue["messages_unacknowledged"] == 1
    })
    .await;
    // The prefetch window is visible, and full of what was sent meanwhile.
    join_all((0..10).map(|n| producer.send(message(&n.to_string())))).await;
    eventually("the prefetch window is full", || async {
        let queue = shared().management("GET", &format!("queues/%2F/{}", queue.name()), "").await;
        queue["messages"] == 11 && queue["messages_unacknowledged"] == 4
    })
    .await;
    settler.ack(stuck.token).await.expect("acknowledged");
}

pub async fn close_returns_what_was_not_received() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("returned"));
    let producer = producer(&connection, &queue).await;
    join_all((0..10).map(|n| producer.send(message(&n.to_string())))).await;
    let mut first = consumer(&connection, &queue).await;
    let received = receive(&mut *first, 3).await;
    let settler = first.settler();
    first.close().await.expect("closed");
    first.close().await.expect("closed twice");
    drop(first);
    let mut second = consumer(&connection, &queue).await;
    let rest = receive(&mut *second, 7).await;
    assert_eq!(rest.iter().map(text).collect::<Vec<_>>(), ["3", "4", "5", "6", "7", "8", "9"]);
    // What was received can still be settled, and given back.
    settler.ack(received[0].token).await.expect("acknowledged");
    settler.ack(received[2].token).await.expect("acknowledged");
    settler.release(received[1].token, received[1].message.clone());
    let again = receive(&mut *second, 1).await.remove(0);
    assert_eq!(text(&again), "1");
    assert!(again.details.is_some_and(|details| details.redelivered));
    silence(&mut *second, 300).await;
    // A settler that goes away gives back what it held.
    drop((settler, second));
    let mut third = consumer(&connection, &queue).await;
    assert_eq!(receive(&mut *third, 8).await.len(), 8);
}

pub async fn an_expired_message_is_not_delivered() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("expired"));
    let producer = producer(&connection, &queue).await;
    send(&*producer, message("short").expires_in(Duration::from_millis(200))).await.expect("sent");
    send(&*producer, message("long").expires_in(Duration::from_secs(60))).await.expect("sent");
    tokio::time::sleep(Duration::from_millis(600)).await;
    let mut consumer = consumer(&connection, &queue).await;
    let incoming = receive(&mut *consumer, 1).await.remove(0);
    assert_eq!(text(&incoming), "long");
    assert!(incoming.message.expires_at().is_some());
    silence(&mut *consumer, 300).await;
}

pub async fn a_quorum_queue_does_it_all_too() {
    let connection = connect(&format!("{}?queue_type=quorum", shared().url())).await;
    let queue = Address::queue(unique("quorum"));
    let producer = producer(&connection, &queue).await;
    let mut consumer = consumer(&connection, &queue).await;
    send(&*producer, message("x")).await.expect("sent");
    let incoming = receive(&mut *consumer, 1).await.remove(0);
    let start = Instant::now();
    let settler = consumer.settler();
    settler.retry(incoming.token, &incoming.message, 2, Duration::from_millis(300)).await.expect("retried");
    let again = receive(&mut *consumer, 1).await.remove(0);
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_eq!((again.message.header_attempt(), again.message.headers().len()), (2, 0));
    let kind = shared().management("GET", &format!("queues/%2F/{}", queue.name()), "").await;
    assert_eq!(kind["type"], "quorum");
}

pub async fn whoever_asks_is_answered_on_a_queue_of_their_own() {
    async fn double(n: u64) -> Answer<u64> {
        Answer(n * 2)
    }
    let bus = Bus::connect(&shared().url()).await.expect("connected");
    let queue = unique("asked");
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route(queue.as_str(), double);
    let running = ConsumerRunner::new(consumers).start().await.expect("started");
    let bare = raw(shared()).await;
    let exclusive = QueueDeclareOptions { exclusive: true, auto_delete: true, ..QueueDeclareOptions::default() };
    let own = bare.queue_declare("".into(), exclusive, FieldTable::default()).await.expect("a queue");
    assert!(own.name().as_str().starts_with("amq.gen-"), "the broker has named it: {own:?}");
    let properties = BasicProperties::default()
        .with_content_type("application/json".into())
        .with_correlation_id("c-1".into())
        .with_reply_to(own.name().clone());
    let sent = bare.basic_publish("".into(), queue.as_str().into(), BasicPublishOptions::default(), b"21", properties);
    sent.await.expect("sent");
    let got = tokio::sync::Mutex::new(None);
    eventually("an answer", || async {
        let answer = bare.basic_get(own.name().clone(), BasicGetOptions { no_ack: true }).await.expect("a get");
        let there = answer.is_some();
        *got.lock().await = answer;
        there
    })
    .await;
    let answer = got.into_inner().expect("an answer");
    assert_eq!(answer.data, b"42");
    assert_eq!(answer.properties.correlation_id().as_ref().map(|id| id.as_str()), Some("c-1"));
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
}

pub async fn counts_purge_and_delete() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("counted"));
    let producer = producer(&connection, &queue).await;
    join_all((0..7).map(|n| producer.send(message(&n.to_string())))).await;
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 7);
    assert_eq!(connection.purge(&queue).await.expect("purged"), 7);
    assert_eq!(connection.stats(&queue, None).await.expect("counts").ready, 0);
    connection.delete(&queue, None).await.expect("deleted");
    assert_eq!(connection.purge(&queue).await.expect_err("deleted").kind(), ErrorKind::NotFound);
    connection.stats(&queue.dead_letters(None), None).await.expect("dead letters stay");
}

pub async fn the_native_connection_is_at_hand() {
    let connection = connect(&shared().url()).await;
    let name = unique("native");
    let channel = connection.native().await.expect("connected").create_channel().await.expect("a channel");
    channel
        .queue_declare(name.as_str().into(), QueueDeclareOptions::default(), FieldTable::default())
        .await
        .expect("declared");
    assert_eq!(connection.stats(&Address::queue(name.clone()), None).await.expect("counts").ready, 0);
    channel.queue_delete(name.as_str().into(), QueueDeleteOptions::default()).await.expect("deleted");
}

pub async fn what_is_dropped_ends() {
    let broker = shared();
    let name = unique("dropped");
    let queue = Address::queue(name.clone());
    for _ in 0..10 {
        let connection = connect(&format!("{}?name={name}", broker.url())).await;
        let producer = producer(&connection, &queue).await;
        let consumer = consumer(&connection, &queue).await;
        send(&*producer, message("x")).await.expect("sent");
        drop((connection, producer, consumer));
    }
    let settings = Settings::from_url(&broker.url()).expect("a URL").with("name", name.clone());
    let connection = AmqpConnection::connect(&settings).await.expect("a connection");
    eventually("every connection has ended, and every message is back", || async {
        let open = broker.management("GET", "connections", "").await;
        let ours = open.as_array().into_iter().flatten().filter(|open| {
            open["client_properties"]["connection_name"].as_str().is_some_and(|found| found.starts_with(&name))
        });
        ours.count() <= 1 && connection.stats(&queue, None).await.expect("counts").ready == 10
    })
    .await;
    let bare = raw(broker).await;
    let consumed =
        bare.basic_consume(queue.name().into(), "".into(), BasicConsumeOptions::default(), FieldTable::default()).await;
    consumed.expect("nobody holds the queue");
}
