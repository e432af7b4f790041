//! The whole path on the memory backend: send, dispatch, settle, retry, dead-letter, drain.
#![allow(missing_docs)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use polymq_core::*;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize, Clone, PartialEq)]
struct Order {
    id: u64,
    total: f64,
}

async fn bus(name: &str) -> Bus {
    Bus::builder().url(format!("memory://{name}")).environment(Environment::default()).connect().await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn retried_then_dead_lettered_with_everything_known() {
    let bus = bus("retried").await;
    let calls = Arc::new(AtomicUsize::new(0));
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Arc::clone(&calls));
    async fn fails(order: Order, calls: State<Arc<AtomicUsize>>, attempt: Attempt) -> Result<(), Failure> {
        assert_eq!(order.id, 1);
        assert_eq!(calls.fetch_add(1, Ordering::SeqCst) as u32 + 1, attempt.0);
        Err(Failure::new(format!("no luck {}", attempt.0)))
    }
    consumers.route("orders", fails).policy(FailurePolicy { max_attempts: 3, ..FailurePolicy::default() });
    let running = ConsumerRunner::new(consumers).start().await.unwrap();
    bus.queue("orders").send(&Order { id: 1, total: 9.5 }).await.unwrap();
    let mut letters = bus.queue("orders.dlq").subscribe(ConsumeOptions::default()).await.unwrap();
    let letter = letters.next().await.unwrap();
    let system = letter.message().system_headers();
    assert_eq!(system.get(dead_letter::ATTEMPTS), Some("3"));
    assert_eq!(system.get(dead_letter::FIRST_ERROR), Some("no luck 1"));
    assert_eq!(system.get(dead_letter::LAST_ERROR), Some("no luck 3"));
    assert_eq!(system.get(dead_letter::SOURCE), Some("queue orders"));
    letter.ack().await.unwrap();
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    running.stop().await.unwrap();
    assert_eq!(bus.queue("orders").stats(None).await.unwrap().consumers, 0);
}

#[tokio::test(start_paused = true)]
async fn poison_and_panic_do_not_stop_the_others() {
    let bus = bus("poison").await;
    let handled = Arc::new(std::sync::Mutex::new(Vec::<u64>::new()));
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(Arc::clone(&handled));
    async fn handle(order: Order, seen: State<Arc<std::sync::Mutex<Vec<u64>>>>) {
        assert!(order.id != 3, "three is a panic");
        seen.lock().unwrap().push(order.id);
    }
    consumers.route("orders", handle).concurrency(4);
    let running = ConsumerRunner::new(consumers).start().await.unwrap();
    let queue = bus.queue("orders");
    for id in 1..=5 {
        queue.send(&Order { id, total: 1.0 }).await.unwrap();
    }
    queue.send_message(Message::new("{broken").with_content_type("application/json")).await.unwrap();
    queue.send(&Order { id: 6, total: 1.0 }).await.unwrap();
    let mut letters = bus.queue("orders.dlq").subscribe(ConsumeOptions::default()).await.unwrap();
    let first = letters.next().await.unwrap();
    assert!(first.message().system_headers().get(dead_letter::REASON).unwrap().starts_with("undecodable"));
    first.ack().await.unwrap();
    let second = letters.next().await.unwrap();
    assert!(second.message().system_headers().get(dead_letter::REASON).unwrap().contains("three is a panic"));
    second.ack().await.unwrap();
    let mut seen = handled.lock().unwrap().clone();
    seen.sort_unstable();
    assert_eq!(seen, [1, 2, 4, 5, 6]);
    running.stop().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn drain_returns_what_was_not_handled() {
    let bus = bus("drain").await;
    let mut consumers = ConsumerFactory::new(&bus);
    async fn slow(_: Order) {
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
    consumers.route("orders", slow).concurrency(2);
    let running = ConsumerRunner::new(consumers).drain_timeout(Duration::from_secs(1)).start().await.unwrap();
    let queue = bus.queue("orders");
    let results = queue.send_all((0..10).map(|id| queue.message(&Order { id, total: 1.0 }).unwrap())).await;
    assert!(results.iter().all(Result::is_ok));
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(queue.stats(None).await.unwrap().unsettled.unwrap() > 0);
    running.stop().await.unwrap();
    let stats = queue.stats(None).await.unwrap();
    assert_eq!((stats.ready, stats.unsettled), (10, Some(0)));
    assert_eq!(running.stats("orders").unwrap().failed, 0);
}
