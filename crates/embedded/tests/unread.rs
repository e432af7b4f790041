//! Without a wire there is no room that subscriptions could take from each other.
#![allow(missing_docs)]

use polymq_core::{Bus, ConsumeOptions, Message};
use polymq_embedded as _;

const MIB: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn who_stops_reading_stops_nobody_else() {
    let folder = tempfile::tempdir().expect("a folder");
    let bus = Bus::connect(&format!("embedded://{}", folder.path().display())).await.expect("opened");
    let one = ConsumeOptions { prefetch: 1, ..ConsumeOptions::default() };
    let mut unread = Vec::new();
    for topic in ["prices", "rates", "stocks"] {
        let topic = bus.topic(topic);
        unread.push(topic.subscribe(one.clone()).await.expect("subscribed"));
        for _ in 0..6 {
            topic.send_message(Message::new(vec![b'x'; MIB])).await.expect("sent");
        }
    }
    let queue = bus.queue("orders");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribed");
    for _ in 0..3 {
        queue.send_message(Message::new(vec![b'x'; MIB])).await.expect("sent");
        let delivery = subscription.next().await.expect("received");
        delivery.ack().await.expect("acknowledged");
    }
    assert_eq!(bus.health().reconnects, 0, "{}", bus.health());
    for subscription in &mut unread {
        for _ in 0..6 {
            subscription.next().await.expect("received").ack().await.expect("acknowledged");
        }
    }
    bus.close().await.expect("closed");
}
