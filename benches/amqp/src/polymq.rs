//! polymq with its default settings but the window and the prefetch, which are the same on every path.

use std::time::Duration;

use harness::{Meter, Numbers, Options, cpu_time, memory};
use polymq_core::{
    Body, Bus, Channel, ConsumeOptions, ConsumerFactory, ConsumerRunner, Environment, FromDelivery, Message, Result,
    Running, View, WhenFull,
};

use crate::{POLYMQ_QUEUE, WINDOW, all_handled, handled, payload, raw, spread, workers};

/// What a service's own type makes of the bytes.
struct Frame;

impl FromDelivery for Frame {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        handled(view.message().payload());
        Ok(Self)
    }
}

async fn bus(options: &Options) -> Bus {
    // Links the backend.
    let _ = polymq_amqp::NAME;
    Bus::builder().url(options.need("url")).environment(Environment::default()).connect().await.expect("a broker")
}

async fn queue(bus: &Bus) -> Channel {
    let queue = bus.queue(POLYMQ_QUEUE);
    let _ = queue.delete(None).await;
    queue.declare(ConsumeOptions::default()).await.expect("declared");
    queue
}

pub async fn publish(options: Options) -> Numbers {
    let bus = bus(&options).await;
    let queue = queue(&bus).await.with_window(WINDOW, WhenFull::Wait);
    // Opens the channel, as the other paths do before the clock starts.
    queue.send_message(Message::new("first")).await.expect("confirmed");
    let body = payload(&options);
    let meter = Meter::start(&options);
    spread(&options, |share| {
        let (queue, body) = (queue.clone(), body.clone());
        async move {
            let results = queue.send_all((0..share).map(|_| Message::new(body.clone()))).await;
            assert!(results.iter().all(|result| result.is_ok()));
        }
    })
    .await;
    let numbers = meter.stop(options.messages());
    bus.close().await.expect("closed");
    raw::expect_left(&options, POLYMQ_QUEUE, options.messages() + 1).await;
    raw::delete(&options, POLYMQ_QUEUE).await;
    numbers
}

async fn run(bus: &Bus, route: impl FnOnce(&mut ConsumerFactory)) -> Running {
    let mut factory = ConsumerFactory::new(bus);
    route(&mut factory);
    ConsumerRunner::new(factory).start().await.expect("starts")
}

pub async fn consume(options: Options) -> Numbers {
    let bus = bus(&options).await;
    queue(&bus).await;
    raw::fill(&options, POLYMQ_QUEUE).await;
    let workers = workers(&options) as usize;
    let running = run(&bus, |factory| {
        let route = factory.route(POLYMQ_QUEUE, |_: Frame| async {});
        route.concurrency(workers).prefetch(WINDOW * workers);
    })
    .await;
    let numbers = all_handled(options.messages()).await;
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
    raw::expect_left(&options, POLYMQ_QUEUE, 0).await;
    raw::delete(&options, POLYMQ_QUEUE).await;
    numbers
}

/// Growth of resident memory while everything waits behind a slow handler.
pub async fn resident(options: Options) -> Numbers {
    let bus = bus(&options).await;
    queue(&bus).await;
    raw::fill(&options, POLYMQ_QUEUE).await;
    let before = memory("VmRSS");
    let running = run(&bus, |factory| {
        let route = factory.route(POLYMQ_QUEUE, |body: Body| async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            std::hint::black_box(&body);
        });
        route.prefetch(WINDOW);
    })
    .await;
    tokio::time::sleep(Duration::from_secs(options.get("seconds", 4))).await;
    let after = memory("VmRSS");
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
    raw::delete(&options, POLYMQ_QUEUE).await;
    let size = payload(&options).len() as f64;
    vec![
        ("growth_bytes", after - before),
        ("bound_bytes", size * WINDOW as f64),
        ("waiting_bytes", size * options.messages() as f64),
    ]
}

/// Processor time of a process whose consumer has nothing to do.
pub async fn idle(options: Options) -> Numbers {
    let bus = bus(&options).await;
    queue(&bus).await;
    let running = run(&bus, |factory| {
        factory.route(POLYMQ_QUEUE, |body: Body| async move { drop(body) });
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let time = Duration::from_secs(options.get("seconds", 20));
    let before = cpu_time();
    tokio::time::sleep(time).await;
    let used = cpu_time() - before;
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
    raw::delete(&options, POLYMQ_QUEUE).await;
    vec![("cpu_percent", 100.0 * used.as_secs_f64() / time.as_secs_f64())]
}
