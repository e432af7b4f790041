use std::time::Duration;

use futures_util::future::join_all;
use lapin::{
    options::QueueDeclareOptions,
    types::{AMQPValue, FieldTable},
};
use polymq_core::{
    Address, Connection, ConsumeOptions, ErrorKind, HealthState, ProduceOptions, RedeliveryOrder, Retry,
};

use super::harness::*;

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

/// The broker ends a channel over such a declaration (406). Only who has declared hears of it, and the neighbours on the same
/// connection go on: a foreign one's, and the producer and consumer of ours whose delay is in the way.
pub async fn a_declaration_with_other_arguments_is_a_conflict_of_its_own() {
    let connection = connect(&format!("{}?channels=1", shared().url())).await;
    let (queue, beside) = (Address::queue(unique("argued")), Address::queue(unique("beside")));
    let (to_queue, to_beside) = (producer(&connection, &queue).await, producer(&connection, &beside).await);
    let mut reader = consumer(&connection, &queue).await;
    let durable = || QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let mut arguments = FieldTable::default();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(2));
    let foreign = connection.native().await.expect("connected").create_channel().await.expect("a channel");
    let refused = foreign.queue_declare(queue.name().into(), durable(), arguments.clone()).await;
    let refused = refused.expect_err("other arguments");
    assert!(refused.is_amqp_soft_error() && refused.to_string().contains("PRECONDITION"), "{refused}");
    assert!(!foreign.status().connected(), "the broker has ended the channel");
    send(&*to_queue, message("first")).await.expect("sent");
    let first = receive(&mut *reader, 1).await.remove(0);

    // Steps of ten minutes: a machine that stands still asks for the same one.
    let late = Duration::from_secs(2 * 86_400);
    let waits = format!("{}.wait.{}", queue.name(), late.as_millis());
    raw(shared()).await.queue_declare(waits.as_str().into(), durable(), arguments).await.expect("declared first");
    let (delayed, others) = (
        to_queue.send(message("delayed").deliver_in(late)),
        join_all([&to_queue, &to_beside].map(|producer| producer.send(message("beside")))),
    );
    let error = within(60, delayed).await.expect_err("it exists with other arguments");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Conflict, Retry::Never), "{error}");
    assert!(within(60, others).await.iter().all(Result::is_ok), "they are not of that declaration");
    let retried = within(60, reader.settler().retry(first.token, &first.message, 2, late)).await;
    assert_eq!(retried.expect_err("the same queue").kind(), ErrorKind::Conflict);
    reader.settler().ack(first.token).await.expect("it is ours still");
    send(&*to_queue, message("soon").deliver_in(Duration::from_millis(100))).await.expect("another delay");
    let seen: Vec<_> = receive(&mut *reader, 2).await.iter().map(text).collect();
    assert_eq!(seen, ["beside", "soon"]);
    let health = connection.health().now();
    assert_eq!((health.state, health.reconnects), (HealthState::Up, 0), "{health}");
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
        assert_eq!(incoming.channel(), Some(&*format!("{base}.{}", text(&incoming))));
        consumer
            .settler()
            .retry(incoming.token, &incoming.message, 2, Duration::from_millis(50))
            .await
            .expect("retried");
        let again = receive(&mut *consumer, 1).await.remove(0);
        assert_eq!((text(&again), again.channel()), (text(&incoming), incoming.channel()));
    }
    let wrong = connection.producer(&Address::topic("a.*"), &ProduceOptions::default()).await.expect_err("a wildcard");
    assert_eq!(wrong.kind(), ErrorKind::InvalidInput);
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

/// `declare` is about what programs share.
pub async fn what_is_a_consumers_own_is_made_whatever_is_declared() {
    let topic = Address::topic(unique("told"));
    let all = connect(&shared().url()).await;
    all.declare(&topic, &ConsumeOptions::default()).await.expect("the exchange is there");
    for declare in ["passive", "none"] {
        let connection = connect(&format!("{}?declare={declare}", shared().url())).await;
        let mut own = connection.consumer(&topic, &ConsumeOptions::default()).await.expect("a queue of its own");
        send(&*producer(&connection, &topic).await, message("news")).await.expect("sent");
        assert_eq!(text(&receive(&mut *own, 1).await[0]), "news", "{declare}");

        let replies = Address::queue(unique("replies"));
        let options = ConsumeOptions { temporary: true, ..ConsumeOptions::default() };
        let mut asker = connection.consumer(&replies, &options).await.expect("a queue for replies");
        let options = ProduceOptions { temporary: true, declare: false, ..ProduceOptions::default() };
        let answers = connection.producer(&replies, &options).await.expect("a producer");
        send(&*answers, message("answer")).await.expect("sent");
        assert_eq!(text(&receive(&mut *asker, 1).await[0]), "answer", "{declare}");

        let missing = Address::queue(unique("missing"));
        let error = connection.consumer(&missing, &ConsumeOptions::default()).await.expect_err("not to be made");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{declare}: {error}");
        // Nor an exchange, or dead letters.
        let elsewhere = vec![("exchange".to_owned(), unique("elsewhere"))];
        let options = ConsumeOptions { extra: elsewhere, ..ConsumeOptions::default() };
        let error = connection.consumer(&topic, &options).await.expect_err("no such exchange");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{declare}: {error}");
        let letters = Address::queue(unique("letters"));
        let options = ConsumeOptions { dead_letters: Some(letters.clone()), ..ConsumeOptions::default() };
        drop(connection.consumer(&topic, &options).await.expect("a queue of its own"));
        assert!(!all.exists(&letters, None).await.expect("an answer"), "{declare}");
    }
}

/// Who binds says so: `declare` is about what is made in passing.
pub async fn a_binding_is_made_whatever_is_declared() {
    let all = connect(&shared().url()).await;
    for declare in ["auto", "passive", "none"] {
        let connection = connect(&format!("{}?declare={declare}", shared().url())).await;
        let (queue, topic) = (Address::queue(unique("bound")), Address::topic(unique("news")));
        all.declare(&queue, &ConsumeOptions::default()).await.expect("declared");
        connection.bind(&queue, &topic).await.expect("bound");
        connection.bind(&queue, &topic).await.expect("bound again");
        let to_topic = producer(&connection, &topic).await;
        send(&*to_topic, message("news")).await.expect("sent");
        let mut reader = consumer(&connection, &queue).await;
        assert_eq!(text(&receive(&mut *reader, 1).await[0]), "news", "{declare}");
        connection.unbind(&queue, &topic).await.expect("unbound");
        send(&*to_topic, message("unheard")).await.expect("sent");
        send(&*producer(&connection, &queue).await, message("straight")).await.expect("sent");
        assert_eq!(text(&receive(&mut *reader, 1).await[0]), "straight", "{declare}");

        let missing = Address::queue(unique("missing"));
        match (declare, connection.bind(&missing, &topic).await) {
            ("auto", made) => made.expect("made and bound"),
            (_, bound) => assert_eq!(bound.expect_err("no queue").kind(), ErrorKind::NotFound, "{declare}"),
        }
    }
}

/// The delay queues whose names begin like this, as soon as the management API shows one. Without figures: the list with them is cached
/// for as long as it took to make, many times over.
async fn delay_queues(prefix: &str) -> Vec<serde_json::Value> {
    let named = |queue: &serde_json::Value| {
        queue["name"].as_str().is_some_and(|name| name.starts_with(prefix) && name.contains(".wait"))
    };
    within(60, async {
        loop {
            let mut queues =
                shared().management("GET", "queues/%2F?disable_stats=true&enable_queue_totals=true", "").await;
            let queues = std::mem::take(queues.as_array_mut().expect("queues"));
            let found: Vec<_> = queues.into_iter().filter(named).collect();
            if !found.is_empty() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
}

pub async fn a_queue_of_delayed_messages_stays_while_one_waits() {
    let bare = raw(shared()).await;
    for kind in ["classic", "quorum"] {
        let connection = connect(&format!("{}?queue_type={kind}", shared().url())).await;
        let name = unique("waits");
        // As older versions made them, where the virtual host's default is quorum too: RabbitMQ deletes such a queue when
        // its time is over, declared again or not, and with what is in it.
        let mut arguments = FieldTable::default();
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        arguments.insert("x-message-ttl".into(), AMQPValue::LongLongInt(59_000));
        arguments.insert("x-expires".into(), AMQPValue::LongLongInt(179_000));
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        let old = format!("{name}.delay.59000");
        bare.queue_declare(old.as_str().into(), options, arguments).await.expect("declared");

        let producer = producer(&connection, &Address::queue(&*name)).await;
        send(&*producer, message("x").deliver_in(Duration::from_secs(59)))
            .await
            .expect("no queue of before is in its way");
        let waits = delay_queues(&format!("{name}.")).await;
        let [waits] = waits.as_slice() else { panic!("one queue for the delay: {waits:?}") };
        let arguments = &waits["arguments"];
        assert_eq!(arguments["x-queue-type"], kind, "whatever the virtual host's default is: {waits}");
        // Only a classic queue lives longer when it is declared again.
        assert_eq!(arguments["x-expires"].is_null(), kind == "quorum", "{waits}");
    }
}

/// One program may have queues of both types.
pub async fn delays_are_of_the_type_that_their_channel_asks_for() {
    for (usual, own) in [("classic", "quorum"), ("quorum", "classic")] {
        let connection = connect(&format!("{}?queue_type={usual}", shared().url())).await;
        let extra = vec![("queue_type".to_owned(), own.to_owned())];
        let produce = ProduceOptions { extra: extra.clone(), ..ProduceOptions::default() };
        let consume = ConsumeOptions { extra, ..ConsumeOptions::default() };
        let (sent, retried) = (Address::queue(unique("sent")), Address::queue(unique("retried")));
        let late = Duration::from_secs(3600);
        let to_sent = connection.producer(&sent, &produce).await.expect("a producer");
        send(&*to_sent, message("x").deliver_in(late)).await.expect("sent");
        let mut reader = connection.consumer(&retried, &consume).await.expect("a consumer");
        send(&*producer(&connection, &retried).await, message("x")).await.expect("sent");
        let first = receive(&mut *reader, 1).await.remove(0);
        within(60, reader.settler().retry(first.token, &first.message, 2, late)).await.expect("retried");
        for queue in [sent, retried] {
            let waits = delay_queues(&format!("{}.", queue.name())).await;
            let [waits] = waits.as_slice() else { panic!("one queue for the delay: {waits:?}") };
            assert_eq!(waits["arguments"]["x-queue-type"], own, "{waits}");
        }
    }
}

/// The queue of a delay leads to one exchange, whatever the name of the topic is.
pub async fn topics_of_one_name_on_two_exchanges_are_delayed_apart() {
    let topic = Address::topic(unique("two"));
    let exchanges = [unique("exchange"), unique("exchange"), "amq.topic".to_owned()];
    for exchange in &exchanges {
        let connection = connect(&format!("{}?exchange={exchange}", shared().url())).await;
        let options = ConsumeOptions { group: Some(exchange.clone()), ..ConsumeOptions::default() };
        let mut consumer = connection.consumer(&topic, &options).await.expect("a consumer");
        let soon = message(exchange).deliver_in(Duration::from_millis(100));
        send(&*producer(&connection, &topic).await, soon).await.expect("sent");
        assert_eq!(text(&receive(&mut *consumer, 1).await[0]), *exchange);
        silence(&mut *consumer, 200).await;
    }
}

/// The names of such queues never come back, so nobody would clean up after them.
pub async fn delays_of_what_ends_with_its_connection_leave_no_queue_for_good() {
    let connection = connect(&format!("{}?queue_type=quorum", shared().url())).await;
    let topic = Address::topic(unique("own"));
    let mut own = consumer(&connection, &topic).await;
    send(&*producer(&connection, &topic).await, message("news")).await.expect("sent");
    let first = receive(&mut *own, 1).await.remove(0);
    let retried = own.settler().retry(first.token, &first.message, 2, Duration::from_millis(100));
    within(60, retried).await.expect("retried");
    assert_eq!(receive(&mut *own, 1).await[0].message.header_attempt(), 2);

    let replies = Address::queue(unique("replies"));
    let options = ConsumeOptions { temporary: true, ..ConsumeOptions::default() };
    let mut asker = connection.consumer(&replies, &options).await.expect("a queue for replies");
    let options = ProduceOptions { temporary: true, declare: false, ..ProduceOptions::default() };
    let answers = connection.producer(&replies, &options).await.expect("a producer");
    send(&*answers, message("answer").deliver_in(Duration::from_millis(100))).await.expect("sent");
    receive(&mut *asker, 1).await;

    for prefix in [format!("{}@", topic.name()), format!("{}.", replies.name())] {
        let waits = delay_queues(&prefix).await;
        let [waits] = waits.as_slice() else { panic!("one queue for the delay: {waits:?}") };
        assert_eq!(waits["arguments"]["x-queue-type"], "classic", "{waits}");
        assert!(waits["arguments"]["x-expires"].is_u64(), "it goes away when unused: {waits}");
    }
}

pub async fn a_topic_that_nobody_listens_to_forgets_delayed_messages_too() {
    let connection = connect(&format!("{}?queue_type=quorum", shared().url())).await;
    let topic = Address::topic(unique("unheard"));
    let producer = producer(&connection, &topic).await;
    send(&*producer, message("soon").deliver_in(Duration::from_secs(2))).await.expect("sent");
    send(&*producer, message("later").deliver_in(Duration::from_secs(600))).await.expect("sent");
    // Counts are late: when that of the second queue is there, that of the first one, which is older, is not from before.
    eventually("the second message waits, and the first one does not", || async {
        let waits = delay_queues(&format!("{}@.", topic.name())).await;
        let held = |later: bool| {
            let of =
                |queue: &&serde_json::Value| (queue["arguments"]["x-message-ttl"].as_u64() > Some(10_000)) == later;
            waits.iter().find(of).and_then(|queue| queue["messages"].as_u64())
        };
        (held(false), held(true)) == (Some(0), Some(1))
    })
    .await;
}

/// RabbitMQ 4 drops what has come back twenty times, unless it is told another limit.
pub async fn a_quorum_queue_gives_no_message_up() {
    let connection = connect(&format!("{}?queue_type=quorum", shared().url())).await;
    let name = unique("never-dropped");
    producer(&connection, &Address::queue(&*name)).await;
    let queue = shared().management("GET", &format!("queues/%2F/{name}"), "").await;
    // It takes back what is returned in the order in which that comes.
    assert_eq!(connection.capabilities().redelivery, RedeliveryOrder::Any);
    let arguments = &queue["arguments"];
    assert_eq!(
        (&arguments["x-queue-type"], &arguments["x-delivery-limit"]),
        (&"quorum".into(), &i32::MAX.into()),
        "{queue}"
    );
}
