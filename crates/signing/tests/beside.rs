//! Copies of a signed message that come beside each other.
#![allow(missing_docs)]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, SystemTime},
};

use polymq_core::{Bus, ConsumerFactory, ConsumerRunner, Environment, Message, Outcome, RouteStats, Running};
use polymq_signing::{PublicKeys, Signer, SigningKey, Verifier};
use tokio::{sync::Semaphore, time::sleep};

/// One that signs and one that believes it, in a broker of this name.
async fn buses(name: &str) -> (Bus, Bus) {
    let (key, _) = SigningKey::generate("ours").expect("a key");
    let known = PublicKeys::new().with(key.id(), key.public()).expect("a public key");
    let bus = || Bus::builder().url(format!("memory://{name}")).environment(Environment::default());
    let sender = bus().layer(Signer::new(key)).connect().await.expect("connects");
    (sender, bus().layer(Verifier::new(known)).connect().await.expect("connects"))
}

/// Waits, by the clock of the test.
async fn until(running: &Running, is_so: impl Fn(&RouteStats) -> bool) {
    let stats = || running.stats("orders").expect("known");
    for _ in 0..6000 {
        if is_so(&stats()) {
            return;
        }
        sleep(Duration::from_millis(100)).await;
    }
    panic!("it has come to this: {:?}", stats());
}

/// A copy that comes while the first one is being handled waits, and is judged when that has ended.
#[tokio::test(start_paused = true)]
async fn a_copy_waits_for_the_one_that_is_being_handled() {
    for (name, succeeds) in [("signing-beside", true), ("signing-beside-fails", false)] {
        let (sender, receiver) = buses(name).await;
        let (may_end, began) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicU32::new(0)));
        let mut consumers = ConsumerFactory::new(&receiver);
        let handler = {
            let (may_end, began) = (Arc::clone(&may_end), Arc::clone(&began));
            move |_: Message| {
                let (may_end, began) = (Arc::clone(&may_end), Arc::clone(&began));
                async move {
                    let number = began.fetch_add(1, Ordering::Relaxed);
                    let _permit = may_end.acquire().await;
                    if succeeds || number > 0 { Outcome::Ack } else { Outcome::reject("it fails") }
                }
            }
        };
        consumers.route("orders", handler).concurrency(4);
        let running = ConsumerRunner::new(consumers).start().await.expect("starts");
        let message = Message::new("x").with_id("one").with_time(SystemTime::now());
        for _ in 0..3 {
            sender.queue("orders").send_message(message.clone()).await.expect("sent");
        }
        until(&running, |stats| stats.deferred >= 4).await;
        assert_eq!(began.load(Ordering::Relaxed), 1, "the others have not begun");
        may_end.add_permits(1);
        until(&running, |stats| stats.handled + stats.dead_lettered == 3).await;
        running.stop().await.expect("stops");
        let stats = running.stats("orders").expect("known");
        // Where the first one failed for good, another one is the one that is handled.
        let (untrusted, rejected) = if succeeds { (2, 0) } else { (1, 1) };
        assert_eq!((stats.handled, stats.untrusted, stats.failed), (1, untrusted, rejected), "{stats:?}");
    }
}

/// A handler that is cancelled leaves nothing behind: its message is handled when it comes again.
#[tokio::test(start_paused = true)]
async fn a_handler_that_was_cancelled_may_have_its_message_again() {
    let (sender, receiver) = buses("signing-cancelled").await;
    let began = Arc::new(AtomicU32::new(0));
    let mut consumers = ConsumerFactory::new(&receiver);
    let handler = {
        let began = Arc::clone(&began);
        move |_: Message| {
            let first = began.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                if first {
                    std::future::pending::<()>().await;
                }
            }
        }
    };
    consumers.route("orders", handler).timeout(Duration::from_secs(5));
    let running = ConsumerRunner::new(consumers).start().await.expect("starts");
    sender.queue("orders").send_message(Message::new("x")).await.expect("sent");
    until(&running, |stats| stats.handled == 1).await;
    running.stop().await.expect("stops");
    let stats = running.stats("orders").expect("known");
    assert_eq!((stats.timed_out, stats.deferred, stats.untrusted), (1, 0, 0), "{stats:?}");
}

/// Each subscription of a topic without a group has the message, also two of one bus.
#[tokio::test(start_paused = true)]
async fn subscriptions_without_a_group_do_not_take_each_others_message_for_a_copy() {
    let (sender, receiver) = buses("signing-broadcast").await;
    let start = async || {
        let mut consumers = ConsumerFactory::new(&receiver);
        consumers.route("orders", async |_: Message| sleep(Duration::from_secs(1)).await).broadcast();
        ConsumerRunner::new(consumers).start().await.expect("starts")
    };
    let (one, two) = (start().await, start().await);
    let message = Message::new("x").with_id("one").with_time(SystemTime::now());
    sender.topic("orders").send_message(message.clone()).await.expect("sent");
    for running in [&one, &two] {
        until(running, |stats| stats.handled + stats.dead_lettered == 1).await;
        assert_eq!(running.stats("orders").expect("known").untrusted, 0);
    }
    // A copy is one for each of them.
    sender.topic("orders").send_message(message).await.expect("sent");
    for running in [&one, &two] {
        until(running, |stats| stats.untrusted == 1).await;
        assert_eq!(running.stats("orders").expect("known").handled, 1);
        running.stop().await.expect("stops");
    }
}
