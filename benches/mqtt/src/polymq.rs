//! polymq with its default settings but the window and the prefetch, which are the same on both paths.

use harness::{
    Meter, Numbers, Options,
    broker::{WINDOW, all_handled},
    service::{self, Frame},
};
use polymq_core::{Bus, Channel, ConsumeOptions, Message, WhenFull};

use crate::{queue, raw};

async fn connect(options: &Options) -> Bus {
    // Links the backend.
    let _ = polymq_mqtt::NAME;
    service::connect(options).await
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

pub async fn publish(options: Options) -> Numbers {
    let bus = connect(&options).await;
    let queue = declared(&bus).await;
    queue.send_message(Message::new("first")).await.expect("kept by the broker");
    let meter = Meter::start(&options);
    service::send_all(&queue, &options, options.messages()).await;
    let numbers = meter.stop(options.messages());
    end(&bus).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let bus = connect(&options).await;
    let queue = declared(&bus).await;
    let name = crate::queue();
    let running = service::run(&bus, |factory| {
        factory.route(name, |_: Frame| async {}).prefetch(1000);
    })
    .await;
    service::send_all(&queue, &options, options.messages()).await;
    let numbers = all_handled(options.messages()).await;
    running.stop().await.expect("stopped");
    end(&bus).await;
    numbers
}

pub async fn resident(options: Options) -> Numbers {
    let bus = connect(&options).await;
    declared(&bus).await;
    raw::fill(&options, &queue()).await;
    let numbers = service::resident(&bus, &queue(), &options).await;
    end(&bus).await;
    numbers
}

pub async fn idle(options: Options) -> Numbers {
    let bus = connect(&options).await;
    declared(&bus).await;
    let numbers = service::idle(&bus, &queue(), &options).await;
    end(&bus).await;
    numbers
}
