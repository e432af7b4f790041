//! What goes over the wire, how often, and what happens when it is refused.

use std::{
    pin::pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt;
use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, HealthState, Message, ProduceOptions, Settings};
use polymq_sqs::{
    SqsConnection,
    aws_sdk_sqs::{primitives::Blob, types::MessageAttributeValue},
};
use polymq_testkit::{Direction, Proxy};
use tokio::{sync::mpsc, time::timeout};

use crate::{
    harness::{Answer, front},
    support::{Counted, address, bus, native, next, quiet, subscribe, text, unique, url, url_of, with},
};

/// An address before the emulator that counts what is asked for.
fn counting() -> (String, Counted) {
    let counted = Counted::default();
    let counter = counted.clone();
    let at = front(address(), move |request| {
        counter.add(request.action());
        None
    });
    (url_of(at), counted)
}

pub async fn sends_and_acknowledgements_share_their_requests() {
    let (url, counted) = counting();
    let bus = bus(&url).await;
    let queue = bus.queue(unique("shared"));
    let results = queue.send_all((0..200).map(|n| Message::new(format!("{n}")))).await;
    results.into_iter().for_each(|result| drop(result.expect("sent")));
    let sends = counted.of("SendMessageBatch");
    assert!((20..=30).contains(&sends), "{sends} requests for 200 messages");
    let options = ConsumeOptions { prefetch: 250, ..ConsumeOptions::default() };
    let mut subscription = queue.subscribe(options).await.expect("a subscription");
    let mut held = Vec::new();
    while held.len() < 200 {
        held.extend(subscription.receive(50, Duration::from_secs(60)).await.expect("receive"));
    }
    // Until here: the polls of an empty queue go on.
    let polls = counted.of("ReceiveMessage");
    for delivery in held {
        delivery.ack().await.expect("ack");
    }
    subscription.close().await.expect("close");
    let deletes = counted.of("DeleteMessageBatch");
    assert!((20..=60).contains(&polls), "{polls} polls for 200 messages");
    assert!((20..=60).contains(&deletes), "{deletes} requests to acknowledge 200 messages");
    quiet(&mut subscribe(&queue).await).await;
}

pub async fn b7_of_twenty_five_items_one_bad_one_fails_alone() {
    // One that cannot be sent at all.
    let bus_of_25 = bus(&url()).await;
    let queue = bus_of_25.queue(unique("batch"));
    let body = |n: usize| if n == 13 { "x".repeat(800 * 1024) } else { format!("m-{n:02}") };
    let results = queue.send_all((0..25).map(|n| Message::new(body(n)))).await;
    for (n, result) in results.iter().enumerate() {
        assert_eq!(
            result.as_ref().err().map(polymq_core::Error::kind),
            (n == 13).then_some(ErrorKind::TooLarge),
            "{n}"
        );
    }
    let mut subscription = subscribe(&queue).await;
    let mut seen = Vec::new();
    for _ in 0..24 {
        let delivery = next(&mut subscription).await;
        seen.push(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    seen.sort();
    assert_eq!(seen, (0..25).filter(|n| *n != 13).map(body).collect::<Vec<_>>());

    // One that SQS refuses.
    let at = front(address(), |request| {
        if request.action() != "SendMessageBatch" {
            return None;
        }
        let body: serde_json::Value = serde_json::from_slice(&request.body).expect("JSON");
        let entries = body["Entries"].as_array().expect("entries");
        let (bad, good): (Vec<_>, Vec<_>) = entries.iter().partition(|entry| entry["MessageBody"] == "m-13");
        let good: Vec<_> = good
            .iter()
            .map(|entry| serde_json::json!({"Id": entry["Id"], "MessageId": "x", "MD5OfMessageBody": "x"}))
            .collect();
        let bad: Vec<_> = bad
            .iter()
            .map(|entry| serde_json::json!({"Id": entry["Id"], "Code": "InvalidMessageContents", "SenderFault": true}))
            .collect();
        let body = serde_json::json!({"Successful": good, "Failed": bad}).to_string();
        Some(Answer { status: 200, body })
    });
    let bus = bus(&url_of(at)).await;
    let queue = bus.queue(unique("partial"));
    let results = queue.send_all((0..25).map(|n| Message::new(format!("m-{n}")))).await;
    for (n, result) in results.into_iter().enumerate() {
        match result {
            Err(error) => assert_eq!((n, error.kind()), (13, ErrorKind::InvalidInput)),
            Ok(receipt) => {
                assert_ne!(n, 13);
                assert_eq!(receipt.broker_id.as_deref(), Some("x"));
            }
        }
    }
}

pub async fn what_is_throttled_is_sent_once_in_the_end() {
    let refused = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&refused);
    let at = front(address(), move |request| {
        let is_one = request.action() == "SendMessageBatch" && count.fetch_add(1, Ordering::SeqCst) < 4;
        is_one.then(|| request.refused(400, "RequestThrottled", "Rate exceeded"))
    });
    let bus = bus(&format!("{}&heartbeat=600s", url_of(at))).await;
    let queue = bus.queue(unique("throttled"));
    let results = queue.send_all((0..30).map(|n| Message::new(format!("{n:02}")))).await;
    results.into_iter().for_each(|result| drop(result.expect("sent in the end")));
    assert!(refused.load(Ordering::SeqCst) >= 4);
    assert_eq!(bus.health().state, HealthState::Up, "busy is not away");
    let mut subscription = subscribe(&queue).await;
    let mut seen = Vec::new();
    for _ in 0..30 {
        let delivery = next(&mut subscription).await;
        seen.push(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    seen.sort();
    assert_eq!(seen, (0..30).map(|n| format!("{n:02}")).collect::<Vec<_>>());
    quiet(&mut subscription).await;
}

/// Whoever answers 503 may have handed the request on: only a FIFO queue, which knows it again, gets it once more.
pub async fn what_is_answered_with_503_is_not_sent_again_by_itself() {
    for (fifo, code) in [(false, "ServiceUnavailable"), (false, ""), (true, "ServiceUnavailable")] {
        let seen = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&seen);
        let at = front(address(), move |request| {
            let is_first = request.action() == "SendMessageBatch" && count.fetch_add(1, Ordering::SeqCst) == 0;
            is_first.then(|| request.refused(503, code, "try later"))
        });
        let bus = bus(&format!("{}&fifo={fifo}", url_of(at))).await;
        let sent = bus.queue(unique("unavailable")).send_message(Message::new("once")).await;
        assert_eq!(sent.err().map(|error| error.kind()), (!fifo).then_some(ErrorKind::UnknownOutcome), "{fifo} {code}");
        assert_eq!(seen.load(Ordering::SeqCst), if fifo { 2 } else { 1 }, "{fifo} {code}");
    }
}

pub async fn what_is_throttled_in_a_batch_is_sent_once_in_the_end() {
    for fifo in [false, true] {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (arrived, mut arrivals) = mpsc::unbounded_channel();
        let (open, door) = std::sync::mpsc::channel();
        let (bodies, door) = (Arc::clone(&seen), Mutex::new(door));
        let at = front(address(), move |request| {
            if request.action() != "SendMessageBatch" {
                return None;
            }
            let body: serde_json::Value = serde_json::from_slice(&request.body).expect("JSON");
            let (mut good, mut bad) = (Vec::new(), Vec::new());
            for entry in body["Entries"].as_array().expect("entries") {
                let text = entry["MessageBody"].as_str().expect("text").to_owned();
                if text == "first" {
                    // The others gather behind it, for one request.
                    arrived.send(()).expect("the test");
                    door.lock().expect("a lock").recv().expect("the test");
                }
                let mut bodies = bodies.lock().expect("a lock");
                if matches!(text.as_str(), "a-0" | "b-0") && !bodies.contains(&text) {
                    bad.push(serde_json::json!({"Id": entry["Id"], "Code": "RequestThrottled", "SenderFault": false}));
                } else {
                    good.push(serde_json::json!({"Id": entry["Id"], "MessageId": "x", "MD5OfMessageBody": "x"}));
                }
                bodies.push(text);
            }
            let body = serde_json::json!({"Successful": good, "Failed": bad}).to_string();
            Some(Answer { status: 200, body })
        });
        let bus = bus(&format!("{}&fifo={fifo}", url_of(at))).await;
        let queue = bus.queue(unique("entries"));
        let mut first = pin!(queue.send_message(Message::new("first")));
        tokio::select! {
            sent = &mut first => panic!("not yet: {sent:?}"),
            _ = arrivals.recv() => {}
        }
        let mut others =
            pin!(queue.send_all(["a-0", "a-1", "b-0"].map(|text| Message::new(text).with_key(&text[..1]))));
        assert!((&mut others).now_or_never().is_none());
        open.send(()).expect("the front");
        first.await.expect("sent");
        let results = others.await;
        // Behind a later one of its key it would be out of order in a FIFO queue, so its sender decides.
        let kinds: Vec<_> = results.iter().map(|result| result.as_ref().err().map(polymq_core::Error::kind)).collect();
        assert_eq!(kinds, [fifo.then_some(ErrorKind::Busy), None, None], "{results:?}");
        let seen = seen.lock().expect("a lock");
        assert_eq!(seen[..4], ["first", "a-0", "a-1", "b-0"]);
        let again: &[&str] = if fifo { &["b-0"] } else { &["a-0", "b-0"] };
        assert_eq!(seen[4..], *again, "each once more");
    }
}

pub async fn c10_a_held_message_is_held_beyond_its_lease_and_not_beyond_the_cap() {
    // It is extended when half of it is over.
    let lease = Duration::from_secs(24);
    let options = || ConsumeOptions { lease, prefetch: 1, ..ConsumeOptions::default() };
    let name = unique("held");
    let bus_of = async |more: &str| bus(&format!("{}{more}", url())).await;
    let (patient, hasty) = (bus_of("").await, bus_of("&lease_cap=40s").await);
    let queue = patient.queue(name.as_str());
    queue.send_message(Message::new("held")).await.expect("sent");
    let mut first = queue.subscribe(options()).await.expect("a subscription");
    let delivery = next(&mut first).await;
    let mut other = hasty.queue(name.as_str()).subscribe(options()).await.expect("a subscription");
    let more = other.receive(1, lease + Duration::from_secs(6)).await.expect("receive");
    assert!(more.is_empty(), "it came again although it is held: {more:?}");
    delivery.ack().await.expect("ack in time");
    quiet(&mut other).await;

    first.close().await.expect("close");
    queue.send_message(Message::new("given up")).await.expect("sent");
    let delivery = next(&mut other).await;
    let again = next(&mut other).await;
    assert_eq!((text(&again).as_str(), again.attempt()), ("given up", 2));
    let error = delivery.ack().await.expect_err("it is not ours any more");
    assert_eq!(error.error().kind(), ErrorKind::Stale, "{error}");
    // Who asks for more than the cap gets what is left of it.
    tokio::time::sleep(Duration::from_secs(1)).await;
    again.extend(lease * 100).await.expect("up to the cap");
    let third = next(&mut other).await;
    assert_eq!(third.attempt(), 3, "forty seconds in all, whatever is asked for");
    third.ack().await.expect("ack");
}

pub async fn h5_sqs_itself_moves_to_the_dead_letters() {
    let bus = bus(&url()).await;
    let queue = bus.queue(unique("redrive"));
    let mut options = with(None, [("redrive", "2")]);
    options.dead_letters = Some(queue.address().dead_letters(None));
    let mut subscription = queue.subscribe(options).await.expect("a subscription");
    queue.send_message(Message::new("bad").with_id("bad")).await.expect("sent");
    for attempt in 1..=2 {
        let delivery = next(&mut subscription).await;
        assert_eq!(delivery.attempt(), attempt);
        delivery.retry(Duration::ZERO).await.expect("retry");
    }
    let mut letters = subscribe(&bus.channel(queue.address().dead_letters(None))).await;
    let letter = next(&mut letters).await;
    assert_eq!(letter.message().id().map(ToString::to_string).as_deref(), Some("bad"));
    letter.ack().await.expect("ack");
    quiet(&mut subscription).await;
    // Its own dead-letter queue it cannot be.
    let looped = bus.queue(unique("looped"));
    let options = ConsumeOptions { dead_letters: Some(looped.address().clone()), ..with(None, [("redrive", "2")]) };
    assert_eq!(looped.subscribe(options).await.expect_err("a loop").kind(), ErrorKind::Config);
}

/// Who counts on SQS to take messages away that fail is told when it would not.
pub async fn a_redrive_that_sqs_would_not_do_is_refused() {
    let bus = bus(&url()).await;
    let queue = bus.queue(unique("no-redrive"));
    let connection = SqsConnection::connect(&Settings::from_url(&url()).expect("a URL")).await.expect("a connection");
    let lone = connection.consumer(queue.address(), &with(None, [("redrive", "2")])).await;
    let error = lone.map(drop).expect_err("no dead letters");
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains("redrive"), "{error}");
    queue.declare(ConsumeOptions::default()).await.expect("declared");
    let options = |declare| ConsumeOptions {
        dead_letters: Some(queue.address().dead_letters(None)),
        declare,
        ..with(None, [("redrive", "2")])
    };
    let error = queue.subscribe(options(false)).await.expect_err("it has no such policy");
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains("redrive"), "{error}");
    queue.subscribe(options(true)).await.expect("it is given one").close().await.expect("closed");
    queue.subscribe(options(false)).await.expect("it has one").close().await.expect("closed");
    // As a setting it is for all queues that have dead letters.
    let settings = Settings::from_url(&format!("{}&redrive=2", url())).expect("a URL");
    let all = SqsConnection::connect(&settings).await.expect("a connection");
    all.consumer(queue.address(), &ConsumeOptions::default()).await.map(drop).expect("none to be moved");
}

pub async fn a_deleted_queue_is_made_again_or_final() {
    let bus = bus(&url()).await;
    let queue = bus.queue(unique("deleted"));
    let mut forgiving = subscribe(&queue).await;
    queue.send_message(Message::new("one")).await.expect("sent");
    next(&mut forgiving).await.ack().await.expect("ack");
    queue.delete(None).await.expect("deleted");
    queue.send_message(Message::new("two")).await.expect("sent to a queue that is made again");
    let delivery = next(&mut forgiving).await;
    assert_eq!(text(&delivery), "two");
    delivery.ack().await.expect("ack");
    forgiving.close().await.expect("close");

    let strict = ConsumeOptions { declare: false, ..ConsumeOptions::default() };
    let mut strict = queue.subscribe(strict).await.expect("it exists");
    queue.delete(None).await.expect("deleted");
    let error = tokio::time::timeout(Duration::from_secs(60), strict.next()).await.expect("an answer");
    assert_eq!(error.expect_err("the queue is gone").kind(), ErrorKind::NotFound);
}

pub async fn closing_does_not_wait_for_a_long_poll() {
    let proxy = Proxy::start(address()).await.expect("a proxy");
    let url = format!("{}&heartbeat=600s", url_of(proxy.address())).replace("poll_wait=1s", "poll_wait=20s");
    let bus = bus(&url).await;
    let queue = bus.queue(unique("closing"));
    let mut subscription = subscribe(&queue).await;
    // Who waits for the poll waits for fifty seconds.
    proxy.pause_one_way(Direction::Down);
    assert!(subscription.receive(1, Duration::from_millis(300)).await.expect("receive").is_empty());
    let began = Instant::now();
    subscription.close().await.expect("close");
    assert!(began.elapsed() < Duration::from_secs(30), "closing took {:?}", began.elapsed());
    let began = Instant::now();
    bus.close().await.expect("close");
    assert!(began.elapsed() < Duration::from_secs(30), "closing the bus took {:?}", began.elapsed());
}

pub async fn a_consumer_without_messages_asks_seldom() {
    let (url, counted) = counting();
    let bus = bus(&url.replace("poll_wait=1s", "poll_wait=20s")).await;
    let queue = bus.queue(unique("idle"));
    let mut subscription = subscribe(&queue).await;
    assert!(subscription.receive(1, Duration::from_secs(4)).await.expect("receive").is_empty());
    assert!(counted.of("ReceiveMessage") <= 1, "one long poll");
    // It is there at once all the same, and not when the poll is over.
    let mut took = Vec::new();
    loop {
        queue.send_message(Message::new("now")).await.expect("sent");
        let began = Instant::now();
        next(&mut subscription).await.ack().await.expect("ack");
        took.push(began.elapsed());
        // A busy machine may take as long once.
        if began.elapsed() < Duration::from_secs(15) {
            break;
        }
        assert!(took.len() < 3, "it took {took:?}");
    }
}

pub async fn the_native_clients_are_at_hand() {
    let settings = Settings::from_url(&url()).expect("a URL");
    let connection = SqsConnection::connect(&settings).await.expect("a connection");
    let name = unique("native");
    let made = connection.native().await.expect("SQS").create_queue().queue_name(&name).send().await.expect("made");
    assert!(made.queue_url.expect("a URL").ends_with(&name));
    connection.native_sns().await.expect("SNS").list_topics().send().await.expect("a list");
    native().delete_queue().queue_url(format!("http://localhost/000000000000/{name}")).send().await.expect("deleted");
}

/// The service answers one send with its own trouble: that send's outcome is not known, and the service is there.
pub async fn trouble_with_one_send_is_no_lost_service() {
    let at = front(address(), |request| {
        let sends = ["SendMessageBatch", "PublishBatch"].contains(&request.action().as_str());
        let cursed = sends && request.text().contains("cursed");
        cursed.then(|| request.refused(500, "InternalError", "our own trouble"))
    });
    // Its silence is not what this is about.
    let url = format!("{}&heartbeat=600s", url_of(at)).replace("poll_wait=1s", "poll_wait=20s");
    let bus = bus(&url).await;
    let (queue, topic) = (bus.queue(unique("troubled")), bus.topic(unique("troubled")));
    let mut subscription = subscribe(&queue).await;
    // A long poll is on its way from here on.
    assert!(subscription.receive(1, Duration::from_millis(300)).await.expect("receive").is_empty());
    for channel in [&queue, &topic] {
        let error = channel.send_message(Message::new("cursed")).await.expect_err("its outcome is not known");
        assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error}");
        let health = bus.health();
        assert_eq!((health.state, health.reconnects), (HealthState::Up, 0), "{health}");
    }
    queue.send_message(Message::new("fine")).await.expect("sent");
    let delivery = next(&mut subscription).await;
    assert_eq!((text(&delivery).as_str(), delivery.attempt()), ("fine", 1));
    delivery.ack().await.expect("ack");
    assert_eq!(bus.health().reconnects, 0);
}

/// A connection over a proxy, and what follows when the network is gone.
async fn through(proxy: &Proxy) -> SqsConnection {
    let url = format!("{}&reconnect_initial=50ms&reconnect_max=200ms", url_of(proxy.address()));
    SqsConnection::connect(&Settings::from_url(&url).expect("a URL")).await.expect("a connection")
}

async fn cut(proxy: &Proxy, connection: &SqsConnection) {
    proxy.refuse(true);
    proxy.reset_all();
    let mut health = connection.health();
    while health.now().state != HealthState::Down {
        timeout(Duration::from_secs(60), health.changed()).await.expect("the loss is seen");
    }
}

/// A handler fails while the service is away, and is told so when the loan is over by the time it is back.
pub async fn a_message_that_sqs_shows_again_is_not_copied() {
    let lease = Duration::from_secs(15);
    let proxy = Proxy::start(address()).await.expect("a proxy");
    let connection = through(&proxy).await;
    let queue = Address::queue(unique("late-copy"));
    let options = ConsumeOptions { lease, ..ConsumeOptions::default() };
    let mut consumer = connection.consumer(&queue, &options).await.expect("a consumer");
    let producer = connection.producer(&queue, &ProduceOptions::default()).await.expect("a producer");
    producer.send(Message::new("only one").with_id("1")).await.expect("sent");
    let mut got = Vec::new();
    timeout(Duration::from_secs(60), consumer.receive(1, &mut got)).await.expect("in time").expect("a message");
    let incoming = got.pop().expect("one");
    cut(&proxy, &connection).await;
    // An attempt that SQS does not count by itself: only a copy can carry it.
    let retried = consumer.settler().retry(incoming.token, &incoming.message, 7, Duration::ZERO);
    tokio::time::sleep(lease).await;
    proxy.refuse(false);
    let error = timeout(Duration::from_secs(60), retried).await.expect("in time").expect_err("too late");
    assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
    timeout(Duration::from_secs(60), consumer.receive(1, &mut got)).await.expect("in time").expect("it comes again");
    let again = got.pop().expect("one");
    assert_eq!(again.attempt(), 2);
    consumer.settler().ack(again.token).await.expect("ack");
    let more = timeout(Duration::from_secs(2), consumer.receive(1, &mut got)).await;
    assert!(more.is_err(), "one message has become two: {got:?}");
}

/// What another program has put into a message, and polymq has no place for, is still there when it was given back or tried again.
pub async fn a_foreign_message_goes_back_as_it_was() {
    let connection = SqsConnection::connect(&Settings::from_url(&url()).expect("a URL")).await.expect("a connection");
    let (queue, options) = (Address::queue(unique("foreign")), ConsumeOptions::default());
    let mut consumer = connection.consumer(&queue, &options).await.expect("a consumer");
    let client = native();
    let place =
        client.get_queue_url().queue_name(queue.name()).send().await.expect("it is there").queue_url.expect("a URL");
    let attribute = |kind: &str| MessageAttributeValue::builder().data_type(kind);
    let weight = attribute("Number").string_value("7.5").build().expect("a value");
    let seal = attribute("Binary").binary_value(Blob::new([0xff, 0x00])).build().expect("a value");
    let sending = client.send_message().queue_url(&place).message_body("foreign");
    sending.message_attributes("weight", weight).message_attributes("seal", seal).send().await.expect("sent");
    let mut got = Vec::new();
    timeout(Duration::from_secs(60), consumer.receive(1, &mut got)).await.expect("in time").expect("a message");
    let mut incoming = got.pop().expect("one");
    incoming.message.set_system_header(polymq_core::dead_letter::FIRST_ERROR, "no");
    let settler = consumer.settler();
    settler.retry(incoming.token, &incoming.message, 2, Duration::ZERO).await.expect("retried");
    timeout(Duration::from_secs(60), consumer.receive(1, &mut got)).await.expect("in time").expect("it comes again");
    let incoming = got.pop().expect("one");
    assert_eq!((incoming.attempt(), incoming.message.headers().get("weight")), (2, Some("7.5")));
    settler.release(incoming.token, incoming.message);
    consumer.close().await.expect("closed");
    let request = client.receive_message().queue_url(place).message_attribute_names("All").wait_time_seconds(20);
    let back = request.send().await.expect("received").messages.unwrap_or_default().pop().expect("it is back");
    let attributes = back.message_attributes.unwrap_or_default();
    let kind = |name: &str| attributes.get(name).map(|value| value.data_type());
    assert_eq!((kind("weight"), kind("seal")), (Some("Number"), Some("Binary")), "{attributes:?}");
    assert_eq!(attributes["seal"].binary_value().map(Blob::as_ref), Some(&[0xff, 0x00][..]));
}

/// What is withdrawn while the service is away is given up at once, and nobody waits for it.
pub async fn what_is_withdrawn_during_an_outage_is_not_kept() {
    let proxy = Proxy::start(address()).await.expect("a proxy");
    let connection = through(&proxy).await;
    let queue = Address::queue(unique("outage"));
    let producer = connection.producer(&queue, &ProduceOptions::default()).await.expect("a producer");
    let message = |body: &str| Message::new(body.to_owned()).with_id(polymq_core::MessageId::new());
    producer.send(message("before")).await.expect("sent");
    // Something must be asked for, or the loss is not seen before the next heartbeat.
    let consumer = connection.consumer(&queue, &ConsumeOptions::default()).await.expect("a consumer");
    cut(&proxy, &connection).await;
    drop(consumer);
    let withdrawn: Vec<_> = (0..20).map(|_| producer.send(message("withdrawn"))).collect();
    let mut flush = std::pin::pin!(producer.flush());
    assert!(timeout(Duration::from_millis(100), &mut flush).await.is_err(), "it waits for messages");
    assert!(withdrawn.iter().all(polymq_core::Completion::withdraw));
    timeout(Duration::from_secs(30), flush).await.expect("nothing is left to wait for").expect("flushed");
    let kept = producer.send(message("kept"));
    let (mut given_up, mut sends) = (0, Vec::new());
    for _ in 0..5_000 {
        let send = producer.send(message("withdrawn"));
        assert!(send.withdraw());
        sends.push(send);
    }
    for send in sends {
        given_up += usize::from(timeout(Duration::ZERO, send).await.is_ok());
    }
    assert!(given_up >= 3_000, "of 5000 withdrawn messages {given_up} are gone");
    proxy.refuse(false);
    timeout(Duration::from_secs(60), kept).await.expect("in time").expect("sent after all");
}
