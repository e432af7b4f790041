//! polymq with its default settings but partitions, window and prefetch.

use harness::{
    Meter, Numbers, Options,
    broker::all_handled,
    service::{self, Frame},
};
use polymq_core::{Bus, WhenFull};

use crate::{WINDOW, filled, raw, topic};

pub async fn connect(options: &Options) -> Bus {
    // Links the backend.
    let _ = polymq_kafka::NAME;
    service::connect(options).await
}

pub async fn publish(options: Options) -> Numbers {
    let (bus, topic) = (connect(&options).await, topic());
    raw::create(&options, &topic).await;
    let queue = bus.queue(topic.as_str()).with_window(WINDOW, WhenFull::Wait);
    // Makes what belongs to a queue, before the clock starts.
    queue.declare(Default::default()).await.expect("declared");
    let meter = Meter::start(&options);
    service::send_all(&queue, &options, options.messages()).await;
    let numbers = meter.stop(options.messages());
    raw::expect_sent(&options, &topic, options.messages());
    queue.delete(None).await.expect("deleted");
    bus.close().await.expect("closed");
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let topic = raw::fill(&options).await;
    let bus = connect(&options).await;
    let running = service::run(&bus, |factory| {
        let route = factory.route(topic.as_str(), |_: Frame| async {});
        route.prefetch(WINDOW).with("position", "first");
    })
    .await;
    let numbers = all_handled(options.messages()).await;
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
    raw::expect_committed(&options, &topic, &topic);
    numbers
}

pub async fn resident(options: Options) -> Numbers {
    raw::fill(&options).await;
    let bus = connect(&options).await;
    let numbers = service::resident(&bus, &filled(&options), &options).await;
    bus.close().await.expect("closed");
    numbers
}

pub async fn idle(options: Options) -> Numbers {
    let (bus, topic) = (connect(&options).await, topic());
    let queue = bus.queue(topic.as_str());
    queue.declare(Default::default()).await.expect("declared");
    let numbers = service::idle(&bus, &topic, &options).await;
    queue.delete(None).await.expect("deleted");
    bus.close().await.expect("closed");
    numbers
}
