//! Services, whose handlers answer their senders.

use std::time::{Duration, Instant};

use polymq_core::{
    Address, Attempt, Backoff, ConsumeOptions, ConsumerFactory, ConsumerRunner, DeadLetters, Delivery, ErrorKind,
    Failure, FailurePolicy, HandlerPair, Message, Retry, RetryMode, Running, Subscription,
};

use crate::peer::{bus, free_url};

/// A service on a bus whose consumers listen where its messages are sent.
async fn service(policy: FailurePolicy, url: &str) -> (polymq_core::Bus, Running) {
    async fn handle(order: String, attempt: Attempt) -> Result<(), Failure> {
        match (order.as_str(), attempt.0) {
            ("bad", _) => Err(Failure::permanent("no such customer")),
            ("broken", 1..3) => Err(Failure::new("the printer is out of paper")),
            ("panics", _) => panic!("as the test wants"),
            _ => Ok(()),
        }
    }
    let bus = bus(url).await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", handle).policy(policy).concurrency(4);
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    (bus, running)
}

fn soon() -> FailurePolicy {
    FailurePolicy { backoff: Backoff::fixed(Duration::from_millis(50)), ..FailurePolicy::default() }
}

#[tokio::test]
async fn a_send_ends_as_its_handler_ends() {
    let (bus, running) = service(soon(), &free_url()).await;
    let queue = bus.queue("orders");
    queue.send(&"fine").await.expect("handled");
    let error = queue.send(&"bad").await.expect_err("rejected");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Refused, Retry::Never));
    assert!(error.to_string().contains("no such customer"), "{error}");
    for body in ["broken", "panics"] {
        let error = queue.send(&body).await.expect_err("failed");
        assert_eq!(
            (error.kind(), error.retry()),
            (ErrorKind::Busy, Retry::After(Duration::from_millis(50))),
            "{error}"
        );
    }
    let undecodable = queue.send_message(Message::new("{").with_content_type("application/json")).await;
    let error = undecodable.expect_err("no JSON");
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("undecodable"), "{error}");
    let stats = running.stats("orders").expect("stats");
    assert_eq!((stats.handled, stats.dead_lettered, stats.retried, stats.undecodable), (1, 2, 2, 1), "{stats:?}");
    running.stop().await.expect("stop");
    let error = queue.send(&"late").await.expect_err("stopped");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    bus.close().await.expect("close");
}

#[tokio::test]
async fn retries_in_place_hold_the_sender_until_they_succeed() {
    let policy = FailurePolicy { mode: RetryMode::InPlace, ..soon() };
    let (bus, running) = service(policy, &free_url()).await;
    let started = Instant::now();
    bus.queue("orders").send(&"broken").await.expect("the third attempt succeeds");
    assert!(started.elapsed() >= Duration::from_millis(100));
    assert_eq!(running.stats("orders").expect("stats").retried, 2);
    running.stop().await.expect("stop");
    bus.close().await.expect("close");
}

#[tokio::test]
async fn dead_letters_may_go_to_another_queue_instead() {
    let policy = FailurePolicy { dead_letters: DeadLetters::To(Address::queue("bad orders")), ..soon() };
    let (bus, running) = service(policy, &free_url()).await;
    let mut letters: Subscription =
        bus.queue("bad orders").subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let sending = tokio::spawn({
        let queue = bus.queue("orders");
        async move { queue.send(&"bad").await }
    });
    let letter: Delivery = letters.next().await.expect("a dead letter");
    assert_eq!(letter.message().system_headers().get("polymq-reason"), Some("no such customer"));
    assert!(!sending.is_finished(), "the original waits for the copy");
    letter.ack().await.expect("ack");
    sending.await.expect("the sender").expect("taken care of");
    running.stop().await.expect("stop");
    bus.close().await.expect("close");
}

#[tokio::test]
async fn a_bridge_tells_its_sender_to_come_again_while_the_target_is_away() {
    let (source, target) = (bus(&free_url()).await, bus(&free_url()).await);
    let pair = HandlerPair::new("orders", &source, &target);
    let running = pair.bridge().await.expect("two places").start().await.expect("start");
    let error = source.queue("orders").send(&"x").await.expect_err("the target is away");
    assert!(matches!((error.kind(), error.retry()), (ErrorKind::Busy, Retry::After(_))), "{error:?}");
    running.stop().await.expect("stop");
}
