//! What fails here is this backend's, although it is built on another one.
#![allow(missing_docs)]

use polymq_core::{Bus, ConsumeOptions, ErrorKind, Message};
use polymq_embedded as _;

#[tokio::test]
async fn errors_name_this_backend() {
    let folder = tempfile::tempdir().expect("a folder");
    let bus = Bus::connect(&format!("embedded://{}", folder.path().display())).await.expect("opened");
    let (queue, topic) = (bus.queue("orders"), bus.topic("events"));
    let later = Message::new("x").deliver_in(std::time::Duration::from_secs(5));
    queue.send_message(Message::new("x")).await.expect("sent");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    let delivery = subscription.next().await.expect("a delivery");
    let mut errors = vec![
        (ErrorKind::NotFound, bus.queue("none").existing().send_message(Message::new("x")).await.expect_err("refused")),
        (ErrorKind::Unsupported, bus.queue("none").stats(None).await.expect_err("refused")),
        (ErrorKind::InvalidInput, bus.queue("a b").send_message(Message::new("x")).await.expect_err("refused")),
        (ErrorKind::InvalidInput, bus.queue("a b").subscribe(ConsumeOptions::default()).await.expect_err("refused")),
        (ErrorKind::Unsupported, topic.send_message(later).await.expect_err("refused")),
        (ErrorKind::Unsupported, topic.peek(None, 1).await.expect_err("refused")),
    ];
    bus.close().await.expect("closed");
    errors.push((ErrorKind::Closed, queue.send_message(Message::new("x")).await.expect_err("closed")));
    errors.push((ErrorKind::Closed, subscription.next().await.expect_err("closed")));
    errors.push((ErrorKind::Closed, delivery.ack().await.expect_err("gone").into()));
    for (kind, error) in errors {
        assert_eq!((error.kind(), error.backend()), (kind, Some("embedded")), "{error:?}");
        assert!(!error.to_string().contains("kubemq"), "{error}");
    }
}
