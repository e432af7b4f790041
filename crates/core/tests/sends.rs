//! What handlers return to be sent with the acknowledgement of their message.

use std::time::Duration;

use polymq_core::{
    Bus, ConsumeOptions, ConsumerFactory, ConsumerRunner, ErrorKind, FailurePolicy, Result, Sends, Subscription,
};

async fn subscribed(bus: &Bus, queue: &str) -> Subscription {
    bus.queue(queue).subscribe(ConsumeOptions::default()).await.expect("subscribed")
}

async fn bodies(subscription: &mut Subscription, count: usize) -> Vec<String> {
    let mut found = Vec::new();
    while found.len() < count {
        let delivery = tokio::time::timeout(Duration::from_secs(30), subscription.next()).await;
        let delivery = delivery.expect("in time").expect("a delivery");
        found.push(String::from_utf8_lossy(delivery.message().payload()).into_owned());
        delivery.ack().await.expect("acknowledged");
    }
    found
}

#[tokio::test]
async fn what_a_handler_returns_is_sent_before_its_message_is_acknowledged() {
    let bus = Bus::connect("memory://sends").await.expect("connect");
    let (mut invoices, mut audit) = (subscribed(&bus, "invoices").await, subscribed(&bus, "audit").await);
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |order: u64| -> Result<Sends> {
        Ok(Sends::new().to("invoices", order * 2).to("audit", order))
    });
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for order in [1_u64, 2] {
        bus.queue("orders").send(&order).await.expect("sent");
    }
    assert_eq!(bodies(&mut invoices, 2).await, ["2", "4"]);
    assert_eq!(bodies(&mut audit, 2).await, ["1", "2"]);
    running.stop().await.expect("stopped");
    assert_eq!(bus.queue("orders").stats(None).await.expect("counted").ready, 0);
}

#[tokio::test]
async fn what_cannot_be_sent_makes_a_dead_letter_of_its_source() {
    let bus = Bus::connect("memory://sends-refused").await.expect("connect");
    let mut letters = subscribed(&bus, "orders.dlq").await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |order: u64| Sends::new().to("a\u{7}name", order)).policy(FailurePolicy::default());
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&7_u64).await.expect("sent");
    assert_eq!(bodies(&mut letters, 1).await, ["7"]);
    running.stop().await.expect("stopped");
}

#[tokio::test]
async fn a_backend_without_transactions_refuses_them() {
    let bus = Bus::connect("memory://sends-transactional").await.expect("connect");
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |order: u64| Sends::new().to("invoices", order)).transactional();
    let error = ConsumerRunner::new(consumers).start().await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    let options = ConsumeOptions { transactional: true, ..ConsumeOptions::default() };
    let error = bus.queue("orders").subscribe(options).await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}
