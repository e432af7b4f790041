//! What handlers return to be sent with the acknowledgement of their message.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use polymq_core::{
    Bus, ConsumeOptions, ConsumerFactory, ConsumerRunner, Environment, Error, ErrorKind, FailurePolicy, Layer, Message,
    NextSend, Receipt, Result, Sends, Subscription,
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

/// A channel that the program has closed takes nothing more. That says nothing of the message that was to be sent with it: it is held
/// and tried again with pauses, not handled over and over.
#[tokio::test(start_paused = true)]
async fn a_closed_target_does_not_make_a_handler_run_again_and_again() {
    let bus = Bus::connect("memory://sends-closed").await.expect("connect");
    let calls = Arc::new(AtomicUsize::new(0));
    let mut consumers = ConsumerFactory::new(&bus);
    let counted = Arc::clone(&calls);
    consumers.route("orders", move |order: u64| {
        counted.fetch_add(1, Ordering::SeqCst);
        async move { Sends::new().to("invoices", order) }
    });
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("invoices").send(&0_u64).await.expect("sent");
    bus.queue("invoices").close().await.expect("closed");
    bus.queue("orders").send(&7_u64).await.expect("sent");
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    running.stop().await.expect("stopped");
    assert_eq!(bus.queue("orders").stats(None).await.expect("counted").ready, 1);
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

/// Refuses what is sent to the invoices for some time.
#[derive(Debug, Default)]
struct Away(AtomicUsize);

#[async_trait]
impl Layer for Away {
    async fn send(&self, message: Message, next: NextSend<'_>) -> Result<Receipt> {
        if next.address().name() == "invoices" && self.0.fetch_add(1, Ordering::SeqCst) < 5 {
            return Err(Error::new(ErrorKind::Busy, "later"));
        }
        next.send(message).await
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_accepted_is_not_sent_again_when_the_next_one_has_to_wait() {
    let builder = Bus::builder().url("memory://sends-partly").environment(Environment::default());
    let bus = builder.layer(Away::default()).connect().await.expect("connects");
    let (mut invoices, mut audit) = (subscribed(&bus, "invoices").await, subscribed(&bus, "audit").await);
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |order: u64| Sends::new().to("audit", order).to("invoices", order));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    for order in [7_u64, 8] {
        bus.queue("orders").send(&order).await.expect("sent");
    }
    assert_eq!(bodies(&mut invoices, 2).await, ["7", "8"]);
    assert_eq!(bodies(&mut audit, 2).await, ["7", "8"], "each once");
    running.stop().await.expect("stopped");
    drop((invoices, audit));
    assert_eq!(bus.queue("audit").stats(None).await.expect("counted").ready, 0);
}

/// A bus that was closed first says nothing of the message.
#[tokio::test(start_paused = true)]
async fn what_a_handler_needs_and_is_closed_makes_no_dead_letter_at_once() {
    let bus = Bus::connect("memory://sends-other").await.expect("connect");
    let other = Bus::connect("memory://sends-other-2").await.expect("connect");
    other.close().await.expect("closed");
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", move |order: u64| {
        let other = other.clone();
        async move { other.queue("x").send(&order).await.map(drop) }
    });
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    bus.queue("orders").send(&7_u64).await.expect("sent");
    while running.stats("orders").expect("known").retried == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(running.stats("orders").expect("known").dead_lettered, 0);
    running.stop().await.expect("stopped");
}
