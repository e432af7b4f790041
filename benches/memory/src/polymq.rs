//! polymq on its memory backend, through the same registry, bus and runner as any other backend.

use harness::{Meter, Numbers, Options};
use polymq_core::{
    Batch, Body, Bus, Channel, ConsumeOptions, ConsumerFactory, ConsumerRunner, Environment, FromDelivery, Message,
    Result, Running, View,
};

use crate::{BATCH, CAPACITY, LATCH, ORDER, Order, handled, handled_order, payload, size};

/// What a service's own type makes of the bytes, without a serializer: the raw lane. RustStream's counterpart lends
/// the same slice.
pub struct Frame(Option<u8>);

impl FromDelivery for Frame {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(Self(view.message().payload().first().copied()))
    }
}

pub async fn bus() -> Bus {
    Bus::builder()
        .backend("memory")
        .with("capacity", CAPACITY.to_string())
        .environment(Environment::default())
        .connect()
        .await
        .expect("memory is always there")
}

pub async fn run(bus: &Bus, route: impl FnOnce(&mut ConsumerFactory)) -> Running {
    let mut factory = ConsumerFactory::new(bus);
    route(&mut factory);
    ConsumerRunner::new(factory).start().await.expect("starts")
}

async fn send_single(options: &Options, queue: Channel) -> Numbers {
    let (n, size) = (options.messages(), size(options));
    let meter = Meter::start(options);
    for _ in 0..n {
        queue.send_message(Message::new(payload(size))).await.expect("accepted");
    }
    LATCH.wait().await;
    meter.stop(n)
}

async fn send_batches(options: &Options, queue: Channel) -> Numbers {
    let (n, size) = (options.messages(), size(options));
    let meter = Meter::start(options);
    let mut left = n as usize;
    while left > 0 {
        let count = left.min(BATCH);
        let results = queue.send_all((0..count).map(|_| Message::new(payload(size)))).await;
        assert!(results.iter().all(|result| result.is_ok()));
        left -= count;
    }
    LATCH.wait().await;
    meter.stop(n)
}

pub async fn single(options: Options) -> Numbers {
    let bus = bus().await;
    let _running = run(&bus, |factory| {
        factory.route("orders", |frame: Frame| async move { handled(frame.0.as_slice()) });
    })
    .await;
    send_single(&options, bus.queue("orders")).await
}

pub async fn single_bytes(options: Options) -> Numbers {
    let bus = bus().await;
    let _running = run(&bus, |factory| {
        factory.route("orders", |body: Body| async move { handled(&body) });
    })
    .await;
    send_single(&options, bus.queue("orders")).await
}

pub async fn batch(options: Options) -> Numbers {
    let bus = bus().await;
    let _running = run(&bus, |factory| {
        factory.route_batch("orders", BATCH, |frames: Batch<Frame>| async move {
            frames.iter().for_each(|frame| handled(frame.0.as_slice()));
        });
    })
    .await;
    send_batches(&options, bus.queue("orders")).await
}

pub async fn batch_bytes(options: Options) -> Numbers {
    let bus = bus().await;
    let _running = run(&bus, |factory| {
        factory.route_batch("orders", BATCH, |bodies: Batch<Body>| async move {
            bodies.iter().for_each(|body| handled(body));
        });
    })
    .await;
    send_batches(&options, bus.queue("orders")).await
}

/// Without handlers: the caller receives and acknowledges. Producer, consumer and settler are trait objects.
pub async fn by_hand(options: Options) -> Numbers {
    let bus = bus().await;
    let queue = bus.queue("orders");
    let mut subscription = queue.subscribe(ConsumeOptions::default()).await.expect("subscribes");
    tokio::spawn(async move {
        loop {
            let delivery = subscription.next().await.expect("a message");
            handled(delivery.message().payload());
            delivery.ack().await.expect("acknowledged");
        }
    });
    send_single(&options, queue).await
}

pub async fn json(options: Options) -> Numbers {
    let bus = bus().await;
    let _running = run(&bus, |factory| {
        factory.route("orders", |order: Order| async move { handled_order(&order) });
    })
    .await;
    let (n, queue) = (options.messages(), bus.queue("orders"));
    let meter = Meter::start(&options);
    for _ in 0..n {
        queue.send(&ORDER).await.expect("accepted");
    }
    LATCH.wait().await;
    meter.stop(n)
}

pub async fn json_batch(options: Options) -> Numbers {
    let bus = bus().await;
    let _running = run(&bus, |factory| {
        factory.route_batch("orders", BATCH, |orders: Batch<Order>| async move {
            orders.iter().for_each(handled_order);
        });
    })
    .await;
    let (n, queue) = (options.messages(), bus.queue("orders"));
    let meter = Meter::start(&options);
    let mut left = n as usize;
    while left > 0 {
        let count = left.min(BATCH);
        let results = queue.send_all((0..count).map(|_| queue.message(&ORDER).expect("encodes"))).await;
        assert!(results.iter().all(|result| result.is_ok()));
        left -= count;
    }
    LATCH.wait().await;
    meter.stop(n)
}
