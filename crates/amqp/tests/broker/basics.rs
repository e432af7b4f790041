use std::time::{Duration, Instant};

use futures_util::future::join_all;
use lapin::{
    BasicProperties,
    options::{BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use polymq_amqp::AmqpConnection;
use polymq_core::{
    Address, Answer, Bus, Connection, ConsumeOptions, ConsumerFactory, ConsumerRunner, ErrorKind, HealthState,
    ProduceOptions, Retry, Settings,
};
use tokio::io::AsyncReadExt;

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
    // The broker may count a consumer for a moment after it has ended.
    eventually("nothing is left", || async {
        let stats = connection.stats(&queue, None).await.expect("counts");
        (stats.ready, stats.consumers) == (0, 0)
    })
    .await;
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

/// No attribute of a message stands for these, but copies of it do not lose them.
pub async fn a_copy_keeps_the_properties_that_amqp_alone_knows() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("encoded"));
    let mut consumer = consumer(&connection, &queue).await;
    let bare = raw(shared()).await;
    let properties = BasicProperties::default()
        .with_content_encoding("gzip".into())
        .with_priority(3)
        .with_app_id("billing".into())
        .with_delivery_mode(2);
    let options = BasicPublishOptions::default();
    let publish = bare.basic_publish("".into(), queue.name().into(), options, b"x", properties.clone());
    publish.await.expect("published").await.expect("confirmed");
    let first = receive(&mut *consumer, 1).await.remove(0);
    assert_eq!(first.message.headers().get("amqp-content-encoding"), Some("gzip"), "a handler must know");
    within(60, consumer.settler().retry(first.token, &first.message, 2, Duration::ZERO)).await.expect("retried");
    let mut again = receive(&mut *consumer, 1).await.remove(0);
    assert_eq!((again.message.header_attempt(), again.message.headers()), (2, first.message.headers()));
    // As a dead letter is sent.
    again.message.clear_system_headers();
    let letters = queue.dead_letters(None);
    send(&*producer(&connection, &letters).await, again.message).await.expect("sent");
    let got = bare.basic_get(letters.name().into(), BasicGetOptions { no_ack: true }).await.expect("a get");
    assert_eq!(got.expect("a message").properties, properties);
}

pub async fn a_login_that_fails_says_why() {
    let port = shared().port;
    let attempt = |url: String| async move {
        let start = Instant::now();
        let settings = Settings::from_url(&url).expect("a URL");
        let error = AmqpConnection::connect(&settings).await.expect_err("refused");
        assert!(start.elapsed() < Duration::from_secs(120));
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
        error
    };
    let error = attempt(format!("amqp://guest:hunter2@127.0.0.1:{port}?connect_timeout=60s")).await;
    assert_eq!(error.kind(), ErrorKind::Unauthenticated, "{error}");
    let error = attempt(format!("amqp://guest:guest@127.0.0.1:{port}/nowhere?connect_timeout=60s")).await;
    assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
    let error = attempt("amqp://127.0.0.1:1?connect_timeout=60s".into()).await;
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Disconnected, Retry::Now), "{error}");
    // A peer that takes the connection and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = silent.local_addr().expect("an address").port();
    let error = attempt(format!("amqp://127.0.0.1:{port}?connect_timeout=300ms")).await;
    assert_eq!(error.kind(), ErrorKind::Disconnected, "{error}");
}

/// A peer that takes the connection and says nothing; whoever connects waits no longer than they like.
pub async fn an_attempt_to_connect_that_is_dropped_ends() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = silent.local_addr().expect("an address").port();
    let settings = Settings::from_url(&format!("amqp://127.0.0.1:{port}?connect_timeout=1h")).expect("a URL");
    let attempt = tokio::spawn(async move { AmqpConnection::connect(&settings).await });
    let (mut peer, _) = within(60, silent.accept()).await.expect("a client");
    let mut greeting = [0; 8];
    within(60, peer.read_exact(&mut greeting)).await.expect("the client library is at work");
    assert!(greeting.starts_with(b"AMQP"), "{greeting:?}");
    attempt.abort();
    assert!(within(60, attempt).await.expect_err("dropped").is_cancelled());
    // The end of the stream, or a reset.
    assert_eq!(within(60, peer.read(&mut greeting)).await.unwrap_or(0), 0, "nothing more is said");
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
    assert_eq!((denied.kind(), denied.retry()), (ErrorKind::PermissionDenied, Retry::Never), "{denied}");
    send(&*producer, message("still allowed")).await.expect("sent");
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
            match within(60, answer).await {
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

/// One message to many queues, as a fan-out sends it: which of them is gone must not be mixed up.
pub async fn a_return_is_of_the_queue_that_is_gone() {
    let connection = connect(&format!("{}?channels=1", shared().url())).await;
    let (there, gone) = (Address::queue(unique("there")), Address::queue(unique("gone")));
    let (to_there, to_gone) = (producer(&connection, &there).await, producer(&connection, &gone).await);
    for producer in [&to_there, &to_gone] {
        send(&**producer, message("declared")).await.expect("sent");
    }
    raw(shared()).await.queue_delete(gone.name().into(), QueueDeleteOptions::default()).await.expect("deleted");
    let copy = message("copy");
    let (arrives, returns) = (to_there.send(copy.clone()), to_gone.send(copy));
    within(60, arrives).await.expect("its queue is there");
    assert_eq!(within(60, returns).await.expect_err("lost").kind(), ErrorKind::Unroutable);
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

/// One that has never consumed has no second connection yet, and gets none after it was closed.
pub async fn a_closed_connection_makes_no_other() {
    let connection = connect(&shared().url()).await;
    let queue = Address::queue(unique("late"));
    connection.declare(&queue, &ConsumeOptions::default()).await.expect("declared");
    connection.close().await.expect("closed");
    let error = connection.consumer(&queue, &ConsumeOptions::default()).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
}
