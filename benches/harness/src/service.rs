//! A polymq service as users write one, for any backend, with its default settings but what the caller sets.

use std::time::Duration;

use polymq_core::{
    Body, Bus, Channel, ConsumerFactory, ConsumerRunner, Environment, FromDelivery, Message, Result, Running, View,
};

use crate::{
    Numbers, Options,
    broker::{WINDOW, handled, payload},
    cpu_time, memory,
};

/// What a service's own type makes of the bytes.
pub struct Frame;

impl FromDelivery for Frame {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        handled(view.message().payload());
        Ok(Self)
    }
}

/// Connects to `url=`, whose scheme says with which of the linked backends.
pub async fn connect(options: &Options) -> Bus {
    Bus::builder().url(options.need("url")).environment(Environment::default()).connect().await.expect("a broker")
}

/// Sends so many messages of `size=` bytes, all of which must be accepted.
pub async fn send_all(queue: &Channel, options: &Options, messages: u64) {
    let body = payload(options);
    for result in queue.send_all((0..messages).map(|_| Message::new(body.clone()))).await {
        result.expect("accepted by the broker");
    }
}

/// Starts consumers.
pub async fn run(bus: &Bus, route: impl FnOnce(&mut ConsumerFactory)) -> Running {
    let mut factory = ConsumerFactory::new(bus);
    route(&mut factory);
    ConsumerRunner::new(factory).start().await.expect("starts")
}

/// Growth of resident memory while all that is in a queue waits behind a slow handler.
pub async fn resident(bus: &Bus, queue: &str, options: &Options) -> Numbers {
    let before = memory("VmRSS");
    let running = run(bus, |factory| {
        let route = factory.route(queue, |body: Body| async move {
            tokio::time::sleep(Duration::from_millis(10)).await;
            std::hint::black_box(&body);
        });
        route.prefetch(WINDOW);
    })
    .await;
    tokio::time::sleep(Duration::from_secs(options.get("seconds", 4))).await;
    let after = memory("VmRSS");
    running.stop().await.expect("stopped");
    let size = payload(options).len() as f64;
    vec![
        ("growth_bytes", after - before),
        ("bound_bytes", size * WINDOW as f64),
        ("waiting_bytes", size * options.messages() as f64),
    ]
}

/// Processor time of a process whose consumer has nothing to do.
pub async fn idle(bus: &Bus, queue: &str, options: &Options) -> Numbers {
    let running = run(bus, |factory| {
        factory.route(queue, |body: Body| async move { drop(body) });
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let time = Duration::from_secs(options.get("seconds", 20));
    let before = cpu_time();
    tokio::time::sleep(time).await;
    let used = cpu_time() - before;
    running.stop().await.expect("stopped");
    vec![("cpu_percent", 100.0 * used.as_secs_f64() / time.as_secs_f64())]
}
