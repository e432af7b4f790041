//! FIFO queues: order by key, and ids that are seen once.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use polymq_core::{
    Backoff, ConsumerFactory, ConsumerRunner, DeliveryCount, ErrorKind, Failure, FailurePolicy, Message, Order, State,
};
use polymq_sqs::aws_sdk_sqs::types::QueueAttributeName;

use crate::support::{bus, native, next, quiet, subscribe, text, unique, url};

type Log = Arc<Mutex<Vec<String>>>;

pub async fn b10_messages_of_a_key_keep_their_order_through_failures() {
    async fn handle(message: Message, log: State<Log>) -> Result<(), Failure> {
        if fastrand::u8(..) < 40 {
            return Err(Failure::new("at random"));
        }
        log.lock().expect("a lock").push(String::from_utf8_lossy(message.payload()).into_owned());
        Ok(())
    }
    let bus = bus(&format!("{}&fifo=true", url())).await;
    assert_eq!(bus.capabilities().order, Order::PerKey);
    let queue = bus.queue(unique("keys"));
    let names: Vec<String> = (0..20).flat_map(|n| (0..6).map(move |key| format!("{key}/{n:03}"))).collect();
    let message = |name: &String| Message::new(name.clone()).with_key(format!("key {}", &name[..1]));
    let messages: Vec<Message> = names.iter().map(message).collect();
    queue.send_all(messages).await.into_iter().for_each(|result| drop(result.expect("sent")));
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    let backoff = Backoff::fixed(Duration::from_millis(5));
    let policy = FailurePolicy { max_attempts: 100, backoff, ..FailurePolicy::default() };
    let route = consumers.state(Arc::clone(&log)).route(queue.address().name(), handle);
    route.ordered_by_key().concurrency(5).policy(policy);
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    polymq_testkit::eventually(Duration::from_secs(180), || async {
        let seen = log.lock().expect("a lock").len();
        if seen >= names.len() { Ok(()) } else { Err(format!("{seen} of {}", names.len())) }
    })
    .await;
    running.stop().await.expect("stop");
    let seen = log.lock().expect("a lock").clone();
    for key in 0..6 {
        let of_key: Vec<&String> = seen.iter().filter(|name| name.starts_with(&format!("{key}/"))).collect();
        assert!(of_key.is_sorted() && of_key.len() == 20, "key {key}: {of_key:?}");
    }
}

pub async fn b11_a_repeated_id_is_delivered_once() {
    let bus = bus(&url()).await;
    assert_eq!(bus.capabilities().delivery_count, DeliveryCount::Native);
    let queue = bus.queue(format!("{}.fifo", unique("once")));
    for _ in 0..3 {
        queue.send_message(Message::new("once").with_id("order-7 é")).await.expect("sent");
    }
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.message().id().map(ToString::to_string).as_deref(), Some("order-7 é"));
    assert_eq!(delivery.message().key(), None, "the group that stands for no key is no key");
    assert!(delivery.details().is_some_and(|details| details.sequence.is_some()), "{:?}", delivery.details());
    delivery.ack().await.expect("ack");
    quiet(&mut subscription).await;
}

pub async fn h6_a_hundred_messages_come_in_order() {
    let bus = bus(&url()).await;
    let queue = bus.queue(format!("{}.fifo", unique("hundred")));
    let names: Vec<String> = (0..100).map(|n| format!("{n:03}")).collect();
    let message = |name: &String| Message::new(name.clone()).with_key("one");
    queue.send_all(names.iter().map(message)).await.into_iter().for_each(|result| drop(result.expect("sent")));
    let mut subscription = subscribe(&queue).await;
    let mut seen = Vec::new();
    for _ in &names {
        let delivery = next(&mut subscription).await;
        seen.push(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    assert_eq!(seen, names);
    quiet(&mut subscription).await;
}

pub async fn the_group_of_a_foreign_producer_is_the_key() {
    let bus = bus(&url()).await;
    let name = unique("foreign");
    let queue = bus.queue(format!("{name}.fifo"));
    queue.declare(polymq_core::ConsumeOptions::default()).await.expect("declared");
    let client = native();
    let url = client.get_queue_url().queue_name(format!("{name}.fifo")).send().await.expect("the queue");
    let url = url.queue_url.expect("its URL");
    // Its dead letters are a FIFO queue too, or SQS itself could not move anything there.
    let letters = client.get_queue_url().queue_name(format!("{name}--dlq.fifo")).send().await.expect("dead letters");
    let attributes = client.get_queue_attributes().queue_url(letters.queue_url.expect("a URL"));
    let attributes = attributes.attribute_names(QueueAttributeName::All).send().await.expect("attributes");
    assert_eq!(attributes.attributes.expect("attributes")[&QueueAttributeName::FifoQueue], "true");
    let request = client.send_message().queue_url(&url).message_body("hello").message_group_id("customer-7");
    request.message_deduplication_id("1").send().await.expect("sent");
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    assert_eq!((text(&delivery).as_str(), delivery.message().key()), ("hello", Some("customer-7")));
    delivery.ack().await.expect("ack");
}

pub async fn what_a_fifo_queue_cannot_do_is_refused() {
    let bus = bus(&url()).await;
    let queue = bus.queue(format!("{}.fifo", unique("refused")));
    let error = queue.send_message(Message::new("late").deliver_in(Duration::from_secs(5))).await;
    assert_eq!(error.expect_err("no delays in FIFO queues").kind(), ErrorKind::Unsupported);
    let queue = bus.queue(unique("refused"));
    let error = queue.send_message(Message::new("late").deliver_in(Duration::from_secs(901))).await;
    assert_eq!(error.expect_err("more than fifteen minutes").kind(), ErrorKind::Unsupported);
    let topic = bus.topic(unique("refused"));
    let error = topic.send_message(Message::new("late").deliver_in(Duration::from_secs(5))).await;
    assert_eq!(error.expect_err("no delays of topics").kind(), ErrorKind::Unsupported);
    let error = topic.send_message(Message::new(vec![b'x'; 300 * 1024])).await.expect_err("SNS takes 256 KiB");
    assert_eq!(error.kind(), ErrorKind::TooLarge, "{error}");
}
