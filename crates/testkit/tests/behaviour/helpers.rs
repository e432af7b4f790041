//! The helpers for users' tests, by the rows of the mission table.

use std::{panic::AssertUnwindSafe, time::Duration};

use futures_util::FutureExt;
use polymq_core::{
    Attempt, Backoff, Bus, ConsumerFactory, Context, ErrorKind, Failure, FailurePolicy, Message, Result, dead_letter,
};
use polymq_testkit::{Recorder, TestBus, TestService, eventually, try_eventually};

/// A send returns after the handlers ran, and those that they have called.
#[tokio::test]
async fn i2_a_send_returns_after_the_handlers_ran() {
    let bus = TestBus::new().await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers
        .route("first", async |n: u64, context: Context| context.bus().queue("second").send(&(n + 1)).await.map(drop));
    consumers
        .route("second", async |n: u64, context: Context| context.bus().queue("third").send(&(n + 1)).await.map(drop));
    let service = TestService::start(consumers).await.expect("start");
    for n in 0..20_u64 {
        service.send_and_settle("first", &n).await.expect("send");
        let third = bus.recorder().to("third");
        assert_eq!(third.last().expect("it is there already").payload(), (n + 2).to_string().as_bytes());
    }
    assert_eq!((service.stats("first").handled, service.stats("second").handled), (20, 20));
    service.stop().await.expect("stop");
}

/// A nested send inside a handler is handled too, to the same queue as well.
#[tokio::test]
async fn i1_a_handler_may_send_to_its_own_queue() {
    let bus = TestBus::new().await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("countdown", async |n: u64, context: Context| -> Result<()> {
        if n > 0 {
            context.bus().queue("countdown").send(&(n - 1)).await?;
        }
        Ok(())
    });
    let service = TestService::start(consumers).await.expect("start");
    service.send_and_settle("countdown", &50_u64).await.expect("send");
    assert_eq!(service.stats("countdown").handled, 51);
    service.stop().await.expect("stop");
}

/// What was sent is asserted without a broker.
#[tokio::test]
async fn i3_a_recorder_remembers_and_refuses() {
    let recorder = Recorder::instead_of_sending();
    let bus = Bus::builder().url("memory://recorder").layer(recorder.clone()).connect().await.expect("connect");
    let queue = bus.queue("orders");
    let receipt = queue.send_message(Message::new("one").with_header("tenant", "acme")).await.expect("sent");
    recorder.refuse_next(ErrorKind::Unroutable);
    assert_eq!(queue.send(&2).await.expect_err("as wanted").kind(), ErrorKind::Unroutable);
    bus.topic("news").send(&3).await.expect("sent");
    let sent = recorder.to("orders");
    assert_eq!((sent.len(), recorder.sent().len()), (1, 2));
    assert_eq!((sent[0].id(), sent[0].headers().get("tenant")), (Some(&receipt.id), Some("acme")));
    assert!(queue.stats(None).await.is_err(), "the queue was never made");
    recorder.clear();
    assert!(recorder.sent().is_empty());
    let waiting = recorder.reaches("orders", 1, Duration::from_secs(5));
    let (sent, _) = tokio::join!(waiting, queue.send(&4));
    assert_eq!(sent[0].payload(), "4");
}

/// A probe that fails says what the last state was, and where it is.
#[tokio::test(start_paused = true)]
async fn i4_a_failing_probe_prints_the_last_state() {
    let mut calls = 0;
    let probe = eventually(Duration::from_secs(3), || {
        calls += 1;
        std::future::ready(Err::<(), _>(format!("{calls} orders of 1000")))
    });
    let panic = AssertUnwindSafe(probe).catch_unwind().await.expect_err("it fails");
    let text = panic.downcast_ref::<String>().expect("a text");
    assert!(text.contains("not within 3s") && text.contains("orders of 1000") && text.contains("helpers.rs"), "{text}");
    let last = try_eventually(Duration::ZERO, || std::future::ready(Err::<(), _>("no"))).await;
    assert_eq!(last, Err("no"));
}

async fn expired(_: Message) {
    panic!("its time has passed");
}

/// Backoff, time-outs, delays and expiry follow the clock of the test.
#[tokio::test(start_paused = true)]
async fn i5_hours_take_milliseconds() {
    let began = std::time::Instant::now();
    let bus = TestBus::new().await;
    let mut consumers = ConsumerFactory::new(&bus);
    let route = consumers.route("orders", async |attempt: Attempt| match attempt.0 {
        1 => Err(Failure::new("not yet")),
        2 => std::future::pending().await,
        _ => Ok(()),
    });
    route.timeout(Duration::from_secs(3600));
    route.policy(FailurePolicy { backoff: Backoff::fixed(Duration::from_secs(7200)), ..FailurePolicy::default() });
    let service = TestService::start(consumers).await.expect("start");
    let clock = tokio::time::Instant::now();
    bus.queue("orders").send(&1).await.expect("sent");
    eventually(Duration::from_secs(86_400), || async {
        if service.stats("orders").handled == 1 { Ok(()) } else { Err("not handled") }
    })
    .await;
    assert!(clock.elapsed() >= Duration::from_secs(2 * 7200 + 3600));
    let late = Message::new("late").with_content_type("application/json");
    bus.queue("later").send_message(late.expires_in(Duration::from_secs(60))).await.expect("sent");
    tokio::time::sleep(Duration::from_secs(61)).await;
    service.stop().await.expect("stop");
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("later", expired);
    let service = TestService::start(consumers).await.expect("start");
    service.settled().await;
    assert_eq!(service.stats("later").expired, 1);
    service.stop().await.expect("stop");
    let letters = bus.take_dead_letters("later").await;
    assert_eq!(letters[0].system_headers().get(dead_letter::REASON), Some("expired"));
    assert!(began.elapsed() < Duration::from_secs(60), "it took {:?}", began.elapsed());
}
