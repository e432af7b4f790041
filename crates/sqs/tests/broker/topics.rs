//! SNS before SQS.

use std::time::{Duration, Instant, SystemTime};

use polymq_core::{ConsumeOptions, ErrorKind, HealthState, Message, Subscription};
use polymq_sqs::aws_sdk_sqs::types::{MessageSystemAttributeName, QueueAttributeName};
use polymq_testkit::{Proxy, eventually, free_port};

use crate::{
    harness::front_at,
    support::{address, bus, native, native_sns, next, quiet, subscribe, text, unique, url, with},
};

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

pub async fn c26_a_message_is_the_same_through_queue_raw_topic_and_wrapped_topic() {
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

pub async fn c12_three_queues_and_two_filters_route_exactly() {
    let bus = bus(&url()).await;
    let topic = bus.topic(unique("kinds"));
    let group = async |name: &str, kinds: &[&str]| {
        let kinds = kinds.iter().map(|kind| (*kind).to_owned()).collect();
        topic.subscribe(ConsumeOptions { kinds, ..with(Some(name), []) }).await.expect("a group")
    };
    let mut billing = group("billing", &["order.paid", "order.refunded"]).await;
    let mut shipping = group("shipping", &["order.paid"]).await;
    let mut audit = group("audit", &[]).await;
    let publish = async |kinds: &[&str]| {
        for kind in kinds {
            topic.send_message(Message::new(kind.to_string()).with_kind(kind.to_string())).await.expect("sent");
        }
    };
    publish(&["order.created", "order.paid", "order.refunded"]).await;
    assert_eq!(all(&mut billing, 2).await, ["order.paid", "order.refunded"]);
    assert_eq!(all(&mut shipping, 1).await, ["order.paid"]);
    assert_eq!(all(&mut audit, 3).await, ["order.created", "order.paid", "order.refunded"]);
    // SNS itself has left the others out: nothing of them is in the queues.
    let name = topic.address().name();
    for (group, kinds) in [("billing", 2), ("shipping", 1), ("audit", 0)] {
        let policy = filter_policy(name, group).await;
        assert_eq!(
            policy.as_ref().map_or(0, |policy| policy["ce-type"].as_array().map_or(0, Vec::len)),
            kinds,
            "{policy:?}"
        );
    }
    // Who asks for others the next time gets others.
    billing.close().await.expect("close");
    let mut billing = group("billing", &["order.created"]).await;
    publish(&["order.created", "order.paid"]).await;
    assert_eq!(all(&mut billing, 1).await, ["order.created"]);
}

/// The bodies of so many messages, sorted, and nothing else.
async fn all(subscription: &mut Subscription, count: usize) -> Vec<String> {
    let mut seen = Vec::new();
    for _ in 0..count {
        let delivery = next(subscription).await;
        seen.push(text(&delivery));
        delivery.ack().await.expect("ack");
    }
    quiet(subscription).await;
    seen.sort();
    seen
}

async fn filter_policy(topic: &str, group: &str) -> Option<serde_json::Value> {
    let client = native_sns().await;
    let listed = client.list_subscriptions().send().await.expect("a list").subscriptions.unwrap_or_default();
    let ending = format!(":{topic}---{group}");
    let of_group = |endpoint: Option<&str>| endpoint.is_some_and(|endpoint| endpoint.ends_with(&ending));
    let found = listed.into_iter().find(|subscription| of_group(subscription.endpoint())).expect("a subscription");
    let arn = found.subscription_arn.expect("its ARN");
    let attributes = client.get_subscription_attributes().subscription_arn(arn).send().await.expect("attributes");
    let policy = attributes.attributes.expect("attributes").remove("FilterPolicy")?;
    serde_json::from_str(&policy).ok()
}

pub async fn b17_attributes_are_read_by_a_raw_subscriber_however_many_there_are() {
    let bus = bus(&url()).await;
    let name = unique("raw");
    let topic = bus.topic(name.as_str());
    let mut ours = topic.subscribe(with(Some("ours"), [])).await.expect("a group");
    topic.declare(with(Some("others"), [])).await.expect("declared");
    let message = Message::new("body").with_id("1").with_kind("order.created").with_header("tenant", "acme");
    let message = (0..12).fold(message, |message, n| message.with_header(format!("h-{n:02}"), format!("{n}")));
    topic.send_message(message.clone()).await.expect("sent");
    let client = native();
    let queue = client.get_queue_url().queue_name(format!("{name}---others")).send().await.expect("the queue");
    let request = client.receive_message().queue_url(queue.queue_url.expect("its URL")).message_attribute_names("All");
    let got = request.wait_time_seconds(20).send().await.expect("received").messages.unwrap_or_default().remove(0);
    assert_eq!(got.body(), Some("body"));
    let attributes = got.message_attributes.expect("attributes");
    let value = |name: &str| attributes.get(name).and_then(|value| value.string_value());
    assert_eq!((value("ce-id"), value("ce-type"), value("tenant")), (Some("1"), Some("order.created"), Some("acme")));
    assert_eq!(attributes.len(), 10, "SQS takes no more: {attributes:?}");
    let packed: Vec<(String, String)> = serde_json::from_str(value("polymq-packed").expect("the rest")).expect("JSON");
    assert!(packed.contains(&("h-11".to_owned(), "11".to_owned())), "{packed:?}");
    // And all of them by polymq.
    let delivery = next(&mut ours).await;
    let headers = delivery.message().headers();
    assert_eq!(headers.len(), 13);
    assert!(message.headers().iter().all(|(name, value)| headers.get(name) == Some(value)), "{headers:?}");
    delivery.ack().await.expect("ack");
}

/// Mission row C17: what a delivery tells is what SQS shows somebody else. Its tool shows a message by receiving it, which counts.
pub async fn c17_a_delivery_tells_what_sqs_shows() {
    let bus = bus(&url()).await;
    let name = unique("shown");
    let queue = bus.queue(name.as_str());
    queue.send_message(Message::new("body")).await.expect("sent");
    let client = native();
    let found = client.get_queue_url().queue_name(&name).send().await.expect("the queue");
    let request = client.receive_message().queue_url(found.queue_url.expect("its URL")).wait_time_seconds(20);
    let request = request.visibility_timeout(0).message_system_attribute_names(MessageSystemAttributeName::All);
    let shown = request.send().await.expect("received").messages.unwrap_or_default().pop().expect("a message");
    let shown = shown.attributes.expect("attributes");
    let number = |name| shown.get(&name).and_then(|text| text.parse::<u64>().ok()).expect("a number");
    let sent = number(MessageSystemAttributeName::SentTimestamp);
    let delivery = next(&mut subscribe(&queue).await).await;
    let told = delivery.details().and_then(|details| details.broker_time).expect("a time");
    assert_eq!(told, SystemTime::UNIX_EPOCH + Duration::from_millis(sent));
    let before = number(MessageSystemAttributeName::ApproximateReceiveCount);
    assert_eq!((u64::from(delivery.attempt()), delivery.channel()), (before + 1, name.as_str()));
    delivery.ack().await.expect("ack");
}

pub async fn a_subject_is_read_by_others() {
    let bus = bus(&url()).await;
    let name = unique("subject");
    let topic = bus.topic(name.as_str());
    topic.declare(with(Some("others"), [("raw_delivery", "false")])).await.expect("declared");
    topic.with("subject", "an order").send_message(Message::new("body")).await.expect("sent");
    let client = native();
    let queue = client.get_queue_url().queue_name(format!("{name}---others")).send().await.expect("the queue");
    let got = client.receive_message().queue_url(queue.queue_url.expect("its URL")).wait_time_seconds(20).send().await;
    let body = got.expect("received").messages.unwrap_or_default().pop().expect("a message").body.expect("a body");
    let body: serde_json::Value = serde_json::from_str(&body).expect("SNS's JSON");
    assert_eq!((body["Subject"].as_str(), body["Message"].as_str()), (Some("an order"), Some("body")));
}

pub async fn h13_a_queue_lets_in_its_topic_and_nobody_else() {
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
    polymq_testkit::eventually(Duration::from_secs(60), || async {
        let found = client.list_queues().queue_name_prefix(format!("{name}---")).send().await.expect("a list");
        match found.queue_urls.unwrap_or_default().len() {
            0 => Ok(()),
            left => Err(format!("{left} queues are left")),
        }
    })
    .await;
}

/// It waits for messages with a long poll, for longer than anybody waits who closes it.
pub async fn an_idle_subscription_without_a_group_leaves_nothing_behind() {
    let (client, sns) = (native(), native_sns().await);
    for tries in 1.. {
        let bus = bus(&url().replace("poll_wait=1s", "poll_wait=20s")).await;
        let name = unique("idle");
        let mut subscription = bus.topic(name.as_str()).subscribe(ConsumeOptions::default()).await.expect("subscribed");
        assert!(subscription.receive(1, Duration::from_secs(1)).await.expect("receive").is_empty());
        let arn = sns.create_topic().name(&name).send().await.expect("it is there").topic_arn.expect("an ARN");
        let began = Instant::now();
        subscription.close().await.expect("close");
        bus.close().await.expect("close");
        let took = began.elapsed();
        let queues = client.list_queues().queue_name_prefix(format!("{name}---")).send().await.expect("a list");
        let subscriptions = sns.list_subscriptions_by_topic().topic_arn(arn).send().await.expect("a list");
        let left = (queues.queue_urls.unwrap_or_default().len(), subscriptions.subscriptions().len());
        // On a machine that stands still it gives up waiting for the emulator, as it may.
        if left != (0, 0) && took >= Duration::from_secs(5) && tries < 3 {
            continue;
        }
        assert_eq!(left, (0, 0), "queues and subscriptions are left, after {took:?}");
        return;
    }
}

/// SNS is away and SQS is not: queues go on, and what is sent to topics waits.
pub async fn queues_go_on_while_sns_is_away() {
    let proxy = Proxy::start_on(free_port(), address()).await.expect("a proxy");
    let away = proxy.address();
    let bus = bus(&format!("{}&sns_endpoint=http://{away}&heartbeat=600s", url())).await;
    let (queue, topic) = (bus.queue(unique("goes-on")), bus.topic(unique("away")));
    let (mut queued, mut published) =
        (subscribe(&queue).await, topic.subscribe(with(Some("group"), [])).await.expect("a group"));
    let (hasty, patient) = (topic.with_timeout(Duration::from_secs(2)), topic.with_timeout(Duration::from_secs(60)));
    patient.send_message(Message::new("before")).await.expect("sent");
    eventually(Duration::from_secs(60), || async { hasty.send_message(Message::new("before")).await.map(drop) }).await;
    let mut goes_on = async || {
        queue.send_message(Message::new("meanwhile")).await.expect("sent");
        next(&mut queued).await.ack().await.expect("ack");
        let health = bus.health();
        assert_eq!((health.state, health.reconnects), (HealthState::Up, 0), "{health}");
    };
    // Its connections end before they answer, and later there are none.
    proxy.refuse(true);
    proxy.reset_all();
    hasty.send_message(Message::new("lost")).await.expect_err("SNS does not answer");
    goes_on().await;
    drop(proxy);
    hasty.send_message(Message::new("given up")).await.expect_err("SNS is away");
    goes_on().await;
    let waiting = patient.enqueue(Message::new("after")).await.expect("handed over");
    goes_on().await;
    front_at(std::net::TcpListener::bind(away).expect("its port is free"), address(), |_| None);
    waiting.await.expect("sent after all");
    while text(&next(&mut published).await) != "after" {}
}

/// A sender that made a topic again, without the groups that went with it, would lose what it sends.
pub async fn a_deleted_topic_is_not_made_again_by_its_senders() {
    let bus = bus(&url()).await;
    let topic = bus.topic(unique("deleted"));
    let mut group = topic.subscribe(with(Some("group"), [])).await.expect("a group");
    topic.send_message(Message::new("one")).await.expect("sent");
    next(&mut group).await.ack().await.expect("ack");
    topic.delete(None).await.expect("deleted");
    for _ in 0..2 {
        let error = topic.send_message(Message::new("nobody's")).await.expect_err("it is gone");
        assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
        assert!(error.hint().is_some_and(|hint| hint.contains("groups")), "{error:?}");
    }
    assert!(!topic.exists(None).await.expect("an answer"));
    // Whoever declares its groups goes on with the same senders.
    topic.declare(with(Some("group"), [])).await.expect("declared");
    topic.send_message(Message::new("two")).await.expect("sent");
    assert_eq!(text(&next(&mut group).await), "two");
}
