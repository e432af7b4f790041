//! Queues: single calls, and the streams of polls and sends.

use std::time::Duration;

use kubemq::{
    AckAllQueueMessagesRequest, KubemqClient, PollRequest, PollResponse, QueueDownstreamReceiver, QueueMessage,
};
use tokio::time::{Instant, sleep};

use crate::{client, numbers};

crate::cases! {
    ping send_and_receive batch peek ack_all expiration delay dead_letter ack reject requeue resend_modified auto_ack
    upstream consumer_that_goes_away refusals queue_channels
}

fn message(body: &str) -> kubemq::QueueMessageBuilder {
    QueueMessage::builder().channel("orders").metadata("about").add_tag("key", "value").body(body.as_bytes().to_vec())
}

async fn send(client: &KubemqClient, message: kubemq::QueueMessageBuilder) {
    let sent = client.send_queue_message(message.build()).await.expect("an answer");
    assert!(!sent.is_error, "{sent:?}");
}

fn text(message: &QueueMessage) -> String {
    String::from_utf8_lossy(&message.body).into_owned()
}

async fn receive(client: &KubemqClient, channel: &str, wait: i32) -> Vec<String> {
    let found = client.receive_queue_messages(channel, 100, wait, false).await.expect("an answer");
    found.iter().map(text).collect()
}

async fn poll(receiver: &mut QueueDownstreamReceiver, channel: &str, auto_ack: bool) -> PollResponse {
    let request = PollRequest { channel: channel.into(), max_items: 100, wait_timeout_seconds: 20, auto_ack };
    let found = receiver.poll(request).await.expect("an answer");
    assert!(!found.is_error, "{found:?}");
    found
}

fn about(found: &PollResponse) -> Vec<(String, i32)> {
    let count = |message: &QueueMessage| message.attributes.as_ref().map_or(0, |attributes| attributes.receive_count);
    found.messages.iter().map(|held| (text(&held.message), count(&held.message))).collect()
}

fn counted(body: &str, count: i32) -> (String, i32) {
    (body.to_owned(), count)
}

async fn ping() {
    let found = client("rust").await.ping().await.expect("an answer");
    assert!(found.version.starts_with("2.") && !found.host.is_empty(), "{found:?}");
}

async fn send_and_receive() {
    let client = client("rust").await;
    let sent = client.send_queue_message(message("a").build()).await.expect("an answer");
    assert!(!sent.is_error && !sent.message_id.is_empty() && sent.sent_at > 0, "{sent:?}");
    let found = client.receive_queue_messages("orders", 10, 1, false).await.expect("an answer");
    let [first] = &found[..] else { panic!("{found:?}") };
    assert_eq!((&first.id, &*first.channel, &*first.metadata), (&sent.message_id, "orders", "about"));
    assert_eq!(first.tags.get("key").map(String::as_str), Some("value"));
    let attributes = first.attributes.clone().expect("attributes");
    assert_eq!((attributes.sequence, attributes.receive_count, attributes.re_routed), (1, 1, false));
    assert_eq!(receive(&client, "orders", 1).await, [""; 0], "an empty queue");
}

async fn batch() {
    let client = client("rust").await;
    let bodies = numbers(20);
    let messages = bodies.iter().map(|body| message(body).build()).collect();
    let sent = client.send_queue_messages(messages).await.expect("an answer");
    assert!(sent.len() == 20 && sent.iter().all(|result| !result.is_error), "{sent:?}");
    assert_eq!(receive(&client, "orders", 1).await, bodies);
}

async fn peek() {
    let client = client("rust").await;
    send(&client, message("a")).await;
    for _ in 0..2 {
        let found = client.receive_queue_messages("orders", 10, 1, true).await.expect("an answer");
        assert_eq!(found.iter().map(text).collect::<Vec<_>>(), ["a"]);
    }
    assert_eq!(receive(&client, "orders", 1).await, ["a"], "after the peeks");
}

async fn ack_all() {
    let client = client("rust").await;
    for body in ["a", "b", "c"] {
        send(&client, message(body)).await;
    }
    let request = AckAllQueueMessagesRequest {
        request_id: String::new(),
        client_id: String::new(),
        channel: "orders".into(),
        wait_time_seconds: 1,
    };
    for expected in [3, 0] {
        let found = client.ack_all_queue_messages(&request).await.expect("an answer");
        assert_eq!((found.affected_messages, found.is_error), (expected, false), "{found:?}");
    }
}

async fn expiration() {
    let client = client("rust").await;
    send(&client, message("short").expiration_seconds(1)).await;
    send(&client, message("long").expiration_seconds(600)).await;
    sleep(Duration::from_millis(1200)).await;
    assert_eq!(receive(&client, "orders", 1).await, ["long"]);
}

async fn delay() {
    let client = client("rust").await;
    let start = Instant::now();
    send(&client, message("late").delay_seconds(20)).await;
    send(&client, message("now")).await;
    assert_eq!(receive(&client, "orders", 1).await, ["now"]);
    assert_eq!(receive(&client, "orders", 40).await, ["late"]);
    assert!(start.elapsed() > Duration::from_millis(19_900), "when it was due");
}

async fn dead_letter() {
    let client = client("rust").await;
    send(&client, message("bad").max_receive_count(3).max_receive_queue("letters")).await;
    let mut receiver = client.new_queue_downstream_receiver().await.expect("a stream");
    for attempt in 1..=3 {
        let found = poll(&mut receiver, "orders", false).await;
        assert_eq!(about(&found), [counted("bad", attempt)]);
        found.nack_all().await.expect("a settlement");
    }
    let found = poll(&mut receiver, "letters", false).await;
    assert_eq!(about(&found), [counted("bad", 1)]);
    let attributes = found.messages[0].message.attributes.clone().expect("attributes");
    assert_eq!((attributes.re_routed, &*attributes.re_routed_from_queue), (true, "orders"));
    found.ack_all().await.expect("a settlement");
    assert_eq!(receive(&client, "orders", 1).await, [""; 0], "delivered three times, never a fourth");
}

async fn ack() {
    let client = client("rust").await;
    let bodies = numbers(3);
    for body in &bodies {
        send(&client, message(body)).await;
    }
    let mut receiver = client.new_queue_downstream_receiver().await.expect("a stream");
    let found = poll(&mut receiver, "orders", false).await;
    assert_eq!(found.messages.iter().map(|held| text(&held.message)).collect::<Vec<_>>(), bodies);
    for held in &found.messages {
        held.ack().await.expect("a settlement");
    }
    send(&client, message("next")).await;
    let next = poll(&mut receiver, "orders", false).await;
    assert_eq!(about(&next), [counted("next", 1)], "this poll gets its own answer, not a settlement's");
}

async fn reject() {
    let client = client("rust").await;
    for body in ["a", "b"] {
        send(&client, message(body)).await;
    }
    let mut receiver = client.new_queue_downstream_receiver().await.expect("a stream");
    let found = poll(&mut receiver, "orders", false).await;
    found.messages[0].nack().await.expect("a settlement");
    found.messages[1].ack().await.expect("a settlement");
    let found = poll(&mut receiver, "orders", false).await;
    assert_eq!(about(&found), [counted("a", 2)]);
    found.ack_all().await.expect("a settlement");
}

async fn requeue() {
    let client = client("rust").await;
    for body in ["a", "b"] {
        send(&client, message(body)).await;
    }
    let mut receiver = client.new_queue_downstream_receiver().await.expect("a stream");
    let found = poll(&mut receiver, "orders", false).await;
    found.messages[0].re_queue("other").await.expect("a settlement");
    found.messages[1].ack().await.expect("a settlement");
    assert_eq!(receive(&client, "other", 20).await, ["a"]);
    send(&client, message("c")).await;
    poll(&mut receiver, "orders", false).await.re_queue_all("other").await.expect("a settlement");
    assert_eq!(receive(&client, "other", 20).await, ["c"]);
    assert_eq!(receive(&client, "orders", 1).await, [""; 0]);
}

// No case extends a visibility time: this SDK has no call for it, only its generated descriptors know it.

/// This SDK has no call for it: its users send the new message and acknowledge the old one.
async fn resend_modified() {
    let client = client("rust").await;
    send(&client, message("before")).await;
    let mut receiver = client.new_queue_downstream_receiver().await.expect("a stream");
    let found = poll(&mut receiver, "orders", false).await;
    let mut modified = found.messages[0].message.clone();
    (modified.channel, modified.body, modified.id) = ("other".into(), b"after".to_vec(), String::new());
    assert!(!client.send_queue_message(modified).await.expect("an answer").is_error);
    found.ack_all().await.expect("a settlement");
    assert_eq!(receive(&client, "other", 1).await, ["after"]);
    assert_eq!(receive(&client, "orders", 1).await, [""; 0]);
}

async fn auto_ack() {
    let client = client("rust").await;
    send(&client, message("a")).await;
    let mut receiver = client.new_queue_downstream_receiver().await.expect("a stream");
    assert_eq!(about(&poll(&mut receiver, "orders", true).await), [counted("a", 1)]);
    receiver.close().await.expect("an end");
    assert_eq!(receive(&client, "orders", 1).await, [""; 0]);
}

async fn upstream() {
    let client = client("rust").await;
    let mut upstream = client.queue_upstream().await.expect("a stream");
    let bodies = numbers(30);
    for (number, part) in bodies.chunks(10).enumerate() {
        let messages = part.iter().map(|body| message(body).build()).collect();
        upstream.send(&number.to_string(), messages).await.expect("a send");
    }
    for expected in 0..3 {
        let result = upstream.results().recv().await.expect("a result");
        assert_eq!((&*result.ref_request_id, result.is_error), (&*expected.to_string(), false), "{result:?}");
        assert!(result.results.len() == 10 && result.results.iter().all(|sent| !sent.is_error), "{result:?}");
    }
    assert_eq!(receive(&client, "orders", 1).await, bodies);
}

async fn consumer_that_goes_away() {
    let client = client("rust").await;
    send(&client, message("a")).await;
    let mut receiver = client.new_queue_downstream_receiver().await.expect("a stream");
    assert_eq!(about(&poll(&mut receiver, "orders", false).await), [counted("a", 1)]);
    drop(receiver);
    let mut receiver = client.new_queue_downstream_receiver().await.expect("a stream");
    let found = poll(&mut receiver, "orders", false).await;
    assert_eq!(about(&found), [counted("a", 1)], "back in place, uncounted");
}

async fn refusals() {
    let client = client("rust").await;
    let sent = client.send_queue_message(message("a").delay_seconds(43_201).build()).await.expect("an answer");
    assert!(sent.is_error && sent.error.contains("135"), "{sent:?}");
}

async fn queue_channels() {
    let client = client("rust").await;
    client.create_queues_channel("orders").await.expect("a channel");
    send(&client, message("a")).await;
    let found = client.list_queues_channels("ord").await.expect("a list");
    let about: Vec<_> =
        found.iter().map(|channel| (&*channel.name, &*channel.channel_type, channel.is_active)).collect();
    assert_eq!(about, [("orders", "queues", true)]);
    assert_eq!(found[0].incoming.as_ref().map(|stats| stats.messages), Some(1), "{found:?}");
    client.delete_queues_channel("orders").await.expect("a deletion");
    assert!(client.list_queues_channels("").await.expect("a list").is_empty());
    let unknown = client.delete_queues_channel("nothing like it").await;
    assert!(unknown.is_err(), "{unknown:?}");
}
