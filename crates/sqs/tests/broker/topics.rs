//! SNS before SQS.

use polymq_core::{ConsumeOptions, Message};
use polymq_sqs::aws_sdk_sqs::types::QueueAttributeName;

use crate::support::{bus, native, next, quiet, subscribe, text, unique, url, with};

fn rich() -> Message {
    Message::new(&b"{\"id\": 7}\n\xff"[..])
        .with_id("order-7")
        .with_content_type("application/json")
        .with_kind("order.created")
        .with_version(2)
        .with_key("customer 7 é")
        .with_correlation_id("saga-1")
        .with_reply_to("replies")
        .with_header("tenant", "acme é")
        .with_header("empty", "")
}

pub async fn a_message_is_the_same_through_queue_raw_topic_and_wrapped_topic() {
    let bus = bus(&url()).await;
    let (queue, topic) = (bus.queue(unique("same")), bus.topic(unique("same")));
    let mut all = vec![
        subscribe(&queue).await,
        topic.subscribe(with(Some("raw"), [])).await.expect("raw"),
        topic.subscribe(with(Some("wrapped"), [("raw_delivery", "false")])).await.expect("wrapped"),
    ];
    let sent = rich().with_time(std::time::SystemTime::now());
    queue.send_message(sent.clone()).await.expect("to the queue");
    topic.send_message(sent.clone()).await.expect("to the topic");
    for subscription in &mut all {
        let delivery = next(subscription).await;
        let (got, headers) = (delivery.message(), sent.headers());
        assert!(headers.iter().all(|(name, value)| got.headers().get(name) == Some(value)), "{got:?}");
        assert_eq!(got.headers().len(), headers.len());
        // Headers come in an order of SQS's own.
        assert_eq!(got.clone().with_headers(headers.clone()), sent);
        delivery.ack().await.expect("ack");
        quiet(subscription).await;
    }
}

pub async fn a_group_gets_the_kinds_it_asks_for() {
    let bus = bus(&url()).await;
    let topic = bus.topic(unique("kinds"));
    let kinds = |kinds| with(Some("billing"), [("kinds", kinds)]);
    let mut billing = topic.subscribe(kinds("order.paid,order.refunded")).await.expect("billing");
    let mut audit = topic.subscribe(with(Some("audit"), [])).await.expect("audit");
    for kind in ["order.created", "order.paid", "order.refunded"] {
        topic.send_message(Message::new(kind).with_kind(kind)).await.expect("sent");
    }
    let mut seen = Vec::new();
    for _ in 0..2 {
        let delivery = next(&mut billing).await;
        seen.push(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    seen.sort();
    assert_eq!(seen, ["order.paid", "order.refunded"]);
    quiet(&mut billing).await;
    for _ in 0..3 {
        next(&mut audit).await.ack().await.expect("ack");
    }
    // Who asks for others the next time gets others.
    billing.close().await.expect("close");
    let mut billing = topic.subscribe(kinds("order.created")).await.expect("billing");
    for kind in ["order.created", "order.paid"] {
        topic.send_message(Message::new(kind).with_kind(kind)).await.expect("sent");
    }
    let delivery = next(&mut billing).await;
    assert_eq!(text(&delivery), "order.created");
    delivery.ack().await.expect("ack");
    quiet(&mut billing).await;
}

pub async fn a_subject_is_read_by_others() {
    let bus = bus(&url()).await;
    let name = unique("subject");
    let topic = bus.topic(name.as_str());
    topic.declare(with(Some("others"), [("raw_delivery", "false")])).await.expect("declared");
    topic.with("subject", "an order").send_message(Message::new("body")).await.expect("sent");
    let client = native();
    let queue = client.get_queue_url().queue_name(format!("{name}---others")).send().await.expect("the queue");
    let got = client.receive_message().queue_url(queue.queue_url.expect("its URL")).wait_time_seconds(5).send().await;
    let body = got.expect("received").messages.unwrap_or_default().pop().expect("a message").body.expect("a body");
    let body: serde_json::Value = serde_json::from_str(&body).expect("SNS's JSON");
    assert_eq!((body["Subject"].as_str(), body["Message"].as_str()), (Some("an order"), Some("body")));
}

pub async fn a_queue_lets_in_its_topic_and_nobody_else() {
    let bus = bus(&url()).await;
    let name = unique("policy");
    bus.topic(name.as_str()).declare(with(Some("one"), [])).await.expect("declared");
    let client = native();
    let queue = client.get_queue_url().queue_name(format!("{name}---one")).send().await.expect("the queue");
    let attributes = client
        .get_queue_attributes()
        .queue_url(queue.queue_url.expect("its URL"))
        .attribute_names(QueueAttributeName::Policy)
        .send()
        .await
        .expect("attributes");
    let policy = &attributes.attributes.expect("attributes")[&QueueAttributeName::Policy];
    let policy: serde_json::Value = serde_json::from_str(policy).expect("JSON");
    let [statement] = &policy["Statement"].as_array().expect("statements")[..] else { panic!("{policy}") };
    assert_eq!((&statement["Effect"], &statement["Action"]), (&"Allow".into(), &"sqs:SendMessage".into()));
    assert_eq!(statement["Principal"]["Service"], "sns.amazonaws.com");
    let source = statement["Condition"]["ArnEquals"]["aws:SourceArn"].as_str().expect("a source");
    assert!(source.starts_with("arn:aws:sns:") && source.ends_with(&format!(":{name}")), "{source}");
    assert!(statement["Resource"].as_str().expect("a queue").ends_with(&format!("{name}---one")), "{policy}");
    assert!(!policy.to_string().contains('*'), "{policy}");
}

pub async fn a_subscription_without_a_group_leaves_nothing_behind() {
    let bus = bus(&url()).await;
    let name = unique("alone");
    let topic = bus.topic(name.as_str());
    let mut subscription = topic.subscribe(ConsumeOptions::default()).await.expect("a subscription");
    topic.send_message(Message::new("one")).await.expect("sent");
    next(&mut subscription).await.ack().await.expect("ack");
    let client = native();
    let queues = async || {
        let found = client.list_queues().queue_name_prefix(&name).send().await.expect("a list");
        found.queue_urls.unwrap_or_default().len()
    };
    // Its own, and its dead letters.
    assert!(queues().await >= 1);
    drop(subscription);
    polymq_testkit::eventually(std::time::Duration::from_secs(15), || async {
        let found = client.list_queues().queue_name_prefix(format!("{name}---")).send().await.expect("a list");
        match found.queue_urls.unwrap_or_default().len() {
            0 => Ok(()),
            left => Err(format!("{left} queues are left")),
        }
    })
    .await;
}
