//! polymq with its default settings but the window and the prefetch, which are the same on both paths.

use std::time::Duration;

use harness::{Meter, Numbers, Options, cpu_time, memory};
use polymq_core::{
    Body, Bus, Channel, ConsumeOptions, ConsumerFactory, ConsumerRunner, Environment, FromDelivery, Message, Result,
    Running, View, WhenFull,
};

use crate::{WINDOW, all_handled, handled, payload, queue, raw};

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
    let _ = polymq_mqtt::NAME;
    Bus::builder().url(options.need("url")).environment(Environment::default()).connect().await.expect("a broker")
}

async fn declared(bus: &Bus) -> Channel {
    let queue = bus.queue(queue());
    queue.declare(ConsumeOptions::default()).await.expect("declared");
    queue.with_window(WINDOW, WhenFull::Wait)
}

async fn end(bus: &Bus) {
    let _ = bus.queue(queue()).delete(None).await;
    let _ = bus.queue(format!("{}.dlq", queue())).delete(None).await;
    bus.close().await.expect("closed");
}

async fn send_all(queue: &Channel, options: &Options) {
    let body = payload(options);
    let results = queue.send_all((0..options.messages()).map(|_| Message::new(body.clone()))).await;
    for result in results {
        result.expect("kept by the broker");
    }
}

async fn run(bus: &Bus, route: impl FnOnce(&mut ConsumerFactory)) -> Running {
    let mut factory = ConsumerFactory::new(bus);
    route(&mut factory);
    ConsumerRunner::new(factory).start().await.expect("starts")
}

pub async fn publish(options: Options) -> Numbers {
    let bus = bus(&options).await;
    let queue = declared(&bus).await;
    queue.send_message(Message::new("first")).await.expect("kept by the broker");
    let meter = Meter::start(&options);
    send_all(&queue, &options).await;
    let numbers = meter.stop(options.messages());
    end(&bus).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let bus = bus(&options).await;
    let queue = declared(&bus).await;
    let name = crate::queue();
    let running = run(&bus, |factory| {
        factory.route(name, |_: Frame| async {}).prefetch(1000);
    })
    .await;
    send_all(&queue, &options).await;
    let numbers = all_handled(options.messages()).await;
    running.stop().await.expect("stopped");
    end(&bus).await;
    numbers
}

/// Growth of resident memory while everything waits behind a slow handler.
pub async fn resident(options: Options) -> Numbers {
    let bus = bus(&options).await;
    declared(&bus).await;
    raw::fill(&options, &queue()).await;
    let before = memory("VmRSS");
    let name = queue();
    let running = run(&bus, |factory| {
        let route = factory.route(name, |body: Body| async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            std::hint::black_box(&body);
        });
        route.prefetch(WINDOW);
    })
    .await;
    tokio::time::sleep(Duration::from_secs(options.get("seconds", 4))).await;
    let after = memory("VmRSS");
    running.stop().await.expect("stopped");
    end(&bus).await;
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
    declared(&bus).await;
    let name = queue();
    let running = run(&bus, |factory| {
        factory.route(name, |body: Body| async move { drop(body) });
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let time = Duration::from_secs(options.get("seconds", 20));
    let before = cpu_time();
    tokio::time::sleep(time).await;
    let used = cpu_time() - before;
    running.stop().await.expect("stopped");
    end(&bus).await;
    vec![("cpu_percent", 100.0 * used.as_secs_f64() / time.as_secs_f64())]
}
