//! What a time-out covers: opening, waiting for room and the answer together; and what flushing and closing wait for.

use std::{sync::Arc, time::Duration};

use crate::common::order;
use async_trait::async_trait;
use futures_util::future::join_all;
use polymq_core::{
    Address, Answer, Backend, Backoff, Bus, Capabilities, Connection, ConsumeOptions, Consumer, ConsumerFactory,
    ConsumerRunner, Environment, Error, ErrorKind, HealthWatch, Incoming, Key, Listed, Message, ProduceOptions,
    Producer, Registry, Result, Running, Settings, Settler, WhenFull, memory::MemoryBackend,
};
use tokio::time::{Instant, timeout};

const SECOND: Duration = Duration::from_secs(1);
/// The time-out of a send that asks for no other.
const LIMIT: Duration = Duration::from_secs(30);

/// The memory backend, where opening takes time, and may fail, and closing may never end.
#[derive(Debug, Clone, Default)]
struct Slow {
    opening: Duration,
    fails: bool,
    subscribing: Duration,
    closing: Duration,
    closes_badly: bool,
    never_closes: bool,
}

#[derive(Debug)]
struct SlowConnection(Slow, Arc<dyn Connection>);

#[async_trait]
impl Backend for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn schemes(&self) -> &'static [&'static str] {
        &["slow"]
    }

    fn keys(&self) -> &'static [Key] {
        &[]
    }

    fn capabilities(&self) -> Capabilities {
        MemoryBackend.capabilities()
    }

    fn check(&self, _: &Settings) -> Result<()> {
        Ok(())
    }

    async fn connect(&self, settings: &Settings) -> Result<Arc<dyn Connection>> {
        let space = settings.get("space").expect("each test has one");
        let memory = MemoryBackend.connect(&Settings::from_url(space)?).await?;
        Ok(Arc::new(SlowConnection(self.clone(), memory)))
    }
}

#[async_trait]
impl Connection for SlowConnection {
    fn backend(&self) -> &'static str {
        "slow"
    }

    fn capabilities(&self) -> &Capabilities {
        self.1.capabilities()
    }

    fn health(&self) -> HealthWatch {
        self.1.health()
    }

    async fn producer(&self, address: &Address, options: &ProduceOptions) -> Result<Box<dyn Producer>> {
        tokio::time::sleep(self.0.opening).await;
        if self.0.fails {
            return Err(Error::new(ErrorKind::Disconnected, "nobody answers"));
        }
        self.1.producer(address, options).await
    }

    async fn consumer(&self, address: &Address, options: &ConsumeOptions) -> Result<Box<dyn Consumer>> {
        tokio::time::sleep(self.0.subscribing).await;
        let consumer = self.1.consumer(address, options).await?;
        Ok(if self.0.never_closes { Box::new(Stuck(consumer)) } else { consumer })
    }

    async fn declare(&self, address: &Address, options: &ConsumeOptions) -> Result<()> {
        self.1.declare(address, options).await
    }

    async fn list(&self) -> Result<Vec<Listed>> {
        self.1.list().await
    }

    async fn delete(&self, address: &Address, group: Option<&str>) -> Result<()> {
        self.1.delete(address, group).await
    }

    async fn ping(&self) -> Result<()> {
        self.1.ping().await
    }

    async fn close(&self) -> Result<()> {
        tokio::time::sleep(self.0.closing).await;
        self.1.close().await?;
        if self.0.closes_badly { Err(Error::new(ErrorKind::Timeout, "not everything was sent")) } else { Ok(()) }
    }
}

/// A consumer that does not close.
#[derive(Debug)]
struct Stuck(Box<dyn Consumer>);

#[async_trait]
impl Consumer for Stuck {
    async fn receive(&mut self, max: usize, into: &mut Vec<Incoming>) -> Result<()> {
        self.0.receive(max, into).await
    }

    fn settler(&self) -> Arc<dyn Settler> {
        self.0.settler()
    }

    async fn close(&mut self) -> Result<()> {
        std::future::pending().await
    }
}

async fn slow(space: &str, opening: Duration, fails: bool) -> Bus {
    over(space, Slow { opening, fails, subscribing: opening, ..Slow::default() }).await
}

async fn over(space: &str, backend: Slow) -> Bus {
    let mut registry = Registry::new();
    registry.add(Arc::new(backend)).expect("free");
    let builder = Bus::builder().registry(registry).backend("slow").environment(Environment::default());
    builder.with("space", full_url(space)).connect().await.expect("connects")
}

/// A queue of this space holds one message.
fn full_url(space: &str) -> String {
    format!("memory://{space}?capacity=1")
}

/// A bus whose queue `orders` has no room left.
async fn full(space: &str) -> Bus {
    let builder = Bus::builder().url(full_url(space)).environment(Environment::default());
    let bus = builder.connect().await.expect("memory connects");
    bus.queue("orders").with_timeout(SECOND).send(&order(0)).await.expect("there is room for one");
    bus
}

/// The queues in which replies are awaited.
async fn reply_queues(bus: &Bus) -> usize {
    let listed = bus.list().await.expect("listed");
    listed.iter().filter(|listed| listed.address.name().starts_with("polymq-reply-")).count()
}

/// Handlers that answer with twice the number.
async fn doubling(bus: &Bus) -> Running {
    let mut consumers = ConsumerFactory::new(bus);
    consumers.route("double", async |n: u64| Ok::<_, Error>(Answer(n * 2)));
    ConsumerRunner::new(consumers).start().await.expect("starts")
}

/// It took the whole time-out, and no more.
fn assert_in_time(began: Instant) {
    let took = began.elapsed();
    assert!(took <= LIMIT + SECOND / 10, "took {took:?}");
}

#[tokio::test(start_paused = true)]
async fn first_sends_that_cannot_open_do_not_wait_for_each_other_beyond_their_time() {
    let bus = slow("cannot-open", 5 * SECOND, true).await;
    let (queue, began) = (bus.queue("orders"), Instant::now());
    let sends = (0..20).map(|n| {
        let queue = queue.clone();
        async move { queue.send(&order(n)).await.expect_err("nobody is there").kind() }
    });
    let kinds = join_all(sends).await;
    assert_in_time(began);
    let disconnected = kinds.iter().filter(|kind| **kind == ErrorKind::Disconnected).count();
    assert!(disconnected >= 5, "{kinds:?}: those whose turn came know why");
    assert!(kinds.iter().all(|kind| [ErrorKind::Disconnected, ErrorKind::Timeout].contains(kind)), "{kinds:?}");
}

#[tokio::test(start_paused = true)]
async fn opening_room_and_answer_have_one_time_out() {
    let _full = full("one-time-out").await;
    let bus = slow("one-time-out", 20 * SECOND, false).await;
    let (queue, began) = (bus.queue("orders").with_window(1, WhenFull::Wait), Instant::now());
    let (first, second) = (order(1), order(2));
    let (first, second) = tokio::join!(queue.send(&first), queue.send(&second));
    assert_eq!(first.expect_err("no room in the queue").kind(), ErrorKind::Timeout);
    assert_eq!(second.expect_err("no room in the window").kind(), ErrorKind::Timeout);
    assert_in_time(began);
}

#[tokio::test(start_paused = true)]
async fn each_message_of_many_has_one_time_out() {
    let queue = full("many").await.queue("orders").with_window(4, WhenFull::Wait);
    let began = Instant::now();
    let results = queue.send_all((0..12).map(|n| Message::new(n.to_string()))).await;
    assert!(results.iter().all(|result| result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Timeout)));
    let took = began.elapsed();
    assert!(took >= 3 * LIMIT && took < 3 * LIMIT + SECOND, "three windows, one after the other, took {took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_request_has_one_time_out() {
    let _full = full("request").await;
    let bus = slow("request", 20 * SECOND, false).await;
    let began = Instant::now();
    let error = bus.request("orders", &1_u64).await.expect_err("no room");
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert_in_time(began);

    let bus = slow("request", Duration::ZERO, true).await;
    let began = Instant::now();
    let asked = bus.queue("orders").with_repeats(100, Backoff::fixed(SECOND));
    assert_eq!(asked.request(&1_u64).await.expect_err("nobody is there").kind(), ErrorKind::Disconnected);
    assert_in_time(began);
}

#[tokio::test(start_paused = true)]
async fn flushing_ends_where_nobody_makes_room() {
    let bus = full("nobody-to-flush").await;
    let waits = bus.queue("orders").enqueue(Message::new("waits")).await.expect("handed over");
    let began = Instant::now();
    let flushed = timeout(100 * SECOND, bus.flush()).await.expect("a flush ends");
    assert_eq!(flushed.expect_err("no room").kind(), ErrorKind::Timeout);
    assert_in_time(began);
    assert_eq!(waits.await.expect_err("no room").kind(), ErrorKind::Timeout);
}

#[tokio::test(start_paused = true)]
async fn closing_ends_where_nobody_makes_room() {
    let bus = full("nobody-to-close").await;
    let queue = bus.queue("orders");
    let waits = queue.enqueue(Message::new("waits")).await.expect("handed over");
    let closed = timeout(100 * SECOND, bus.close()).await.expect("closing ends");
    let error = closed.expect_err("a message was not sent");
    assert_eq!((error.kind(), error.operation(), error.channel()), (ErrorKind::Timeout, Some("close"), Some("orders")));
    assert!(waits.await.is_err());
    assert_eq!(queue.send(&order(1)).await.expect_err("closed").kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn flushing_a_bus_waits_for_what_was_sent_over_any_handle() {
    let bus = full("any-handle").await;
    let other = bus.queue("orders").with_timeout(20 * SECOND).existing();
    let sent = other.enqueue(Message::new("waits for room")).await.expect("handed over");
    // Nobody holds the handle any more, and its message is on its way all the same.
    drop(other);
    let flushing = bus.flush();
    tokio::pin!(flushing);
    assert!(timeout(SECOND, &mut flushing).await.is_err(), "it is not sent yet");
    let mut subscription = bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribes");
    subscription.next().await.expect("received").ack().await.expect("acked");
    flushing.await.expect("flushed");
    sent.await.expect("sent");
}

#[test]
fn replies_come_when_the_runtime_of_the_first_request_has_ended() {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let main = runtime();
    let (bus, running) = main.block_on(async {
        let bus = crate::common::bus("two-runtimes").await;
        let running = doubling(&bus).await;
        (bus, running)
    });
    let ask =
        async |n: u64| -> Result<u64> { bus.queue("double").with_timeout(30 * SECOND).request(&n).await?.decode() };
    let first = runtime();
    assert_eq!(first.block_on(ask(1)).expect("answered"), 2);
    drop(first);
    assert_eq!(main.block_on(ask(2)).expect("answered over another queue"), 4);
    let deleted = async {
        while reply_queues(&bus).await > 1 {
            tokio::task::yield_now().await;
        }
    };
    main.block_on(async { timeout(60 * SECOND, deleted).await }).expect("the first one is deleted");
    main.block_on(running.stop()).expect("stops");
}

#[tokio::test(start_paused = true)]
async fn a_reply_queue_is_made_once_when_requests_are_too_short_for_it() {
    let space = "short-requests";
    let bus = over(space, Slow { subscribing: 20 * SECOND, ..Slow::default() }).await;
    let answering = Bus::builder().url(full_url(space)).environment(Environment::default());
    let running = doubling(&answering.connect().await.expect("memory connects")).await;
    let queue = bus.queue("double").with_timeout(6 * SECOND);
    for _ in 0..3 {
        assert_eq!(queue.request(&2_u64).await.expect_err("no reply queue yet").kind(), ErrorKind::Timeout);
    }
    let reply = queue.request(&2_u64).await.expect("the reply queue is open by now");
    assert_eq!(reply.decode::<u64>().expect("a number"), 4);
    assert_eq!(reply_queues(&bus).await, 1);
    running.stop().await.expect("stops");
    bus.close().await.expect("closes");
}

#[tokio::test(start_paused = true)]
async fn closing_does_not_wait_as_long_as_a_request() {
    let bus = over("close-and-request", Slow { subscribing: 1000 * SECOND, ..Slow::default() }).await;
    let queue = bus.queue("double").with_timeout(500 * SECOND);
    let asking = tokio::spawn(async move { queue.request(&1_u64).await.map(drop) });
    tokio::time::sleep(SECOND).await;
    let began = Instant::now();
    bus.close().await.expect("closes");
    assert!(began.elapsed() <= 6 * SECOND, "took {:?}", began.elapsed());
    assert!(asking.await.expect("no panic").is_err());
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_once_for_all_consumers_that_do_not_close() {
    let bus = over("never-close", Slow { never_closes: true, ..Slow::default() }).await;
    let mut consumers = ConsumerFactory::new(&bus);
    for queue in ["a", "b", "c", "d"] {
        consumers.route(queue, async |_: u64| {});
    }
    let running = ConsumerRunner::new(consumers).drain_timeout(SECOND).start().await.expect("starts");
    let began = Instant::now();
    assert_eq!(running.stop().await.expect_err("they do not close").kind(), ErrorKind::Timeout);
    assert!(began.elapsed() <= 7 * SECOND, "the drain time-out and five seconds, not {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_close_that_was_given_up_goes_on_and_who_closes_too_waits_for_its_end() {
    let bus = over("close-twice", Slow { closing: 3 * SECOND, ..Slow::default() }).await;
    let began = Instant::now();
    timeout(SECOND, bus.close()).await.expect_err("it takes longer");
    let closers = join_all((0..3).map(|_| async { (bus.close().await, began.elapsed()) })).await;
    for (closed, took) in closers {
        closed.expect("closes");
        assert!(took >= 3 * SECOND && took < 4 * SECOND, "the first close is the only one, and took {took:?}");
    }
    assert_eq!(bus.ping().await.expect_err("closed").kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn what_came_of_a_close_that_was_given_up_is_told_to_the_next_one() {
    let bus = over("close-badly", Slow { closing: 3 * SECOND, closes_badly: true, ..Slow::default() }).await;
    timeout(SECOND, bus.close()).await.expect_err("it takes longer");
    assert_eq!(bus.close().await.expect_err("not everything was sent").kind(), ErrorKind::Timeout);
    bus.close().await.expect("it was told");
}

/// Before its consumers have started there is nothing to drain: it ends at once.
#[cfg(unix)]
#[tokio::test]
async fn a_signal_ends_a_service_that_is_still_starting() {
    // From here on a signal does not end this process.
    let _ours = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("signals");
    let bus = slow("deadlines-signal", Duration::from_secs(3600), false).await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", async |_: Message| {});
    let mut running = tokio::spawn(ConsumerRunner::new(consumers).run());
    let ended = async {
        loop {
            // It may not listen yet.
            let id = std::process::id().to_string();
            assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().expect("runs").success());
            if let Ok(ended) = timeout(Duration::from_millis(100), &mut running).await {
                return ended;
            }
        }
    };
    timeout(LIMIT, ended).await.expect("it ends").expect("no panic").expect("in order");
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_is_closed_before_or_while_it_is_opened_takes_nothing() {
    let bus = slow("deadlines-closed", SECOND, false).await;
    bus.queue("before").close().await.expect("closed");
    let error = bus.queue("before").send_message(Message::new("1")).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    let queue = bus.queue("while");
    let (sent, closed) = tokio::join!(queue.send_message(Message::new("2")), queue.close());
    assert_eq!(sent.expect_err("closed").kind(), ErrorKind::Closed);
    closed.expect("closed");
}
