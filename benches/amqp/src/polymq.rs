//! polymq with its default settings but the window and the prefetch, which are the same on every path.

use harness::{
    Meter, Numbers, Options,
    broker::{WINDOW, all_handled, spread, workers},
    service::{self, Frame},
};
use polymq_core::{Bus, Channel, ConsumeOptions, Message, WhenFull};

use crate::{POLYMQ_QUEUE, raw};

async fn connect(options: &Options) -> Bus {
    // Links the backend.
    let _ = polymq_amqp::NAME;
    service::connect(options).await
}

async fn queue(bus: &Bus) -> Channel {
    let queue = bus.queue(POLYMQ_QUEUE);
    let _ = queue.delete(None).await;
    queue.declare(ConsumeOptions::default()).await.expect("declared");
    queue
}

async fn end(bus: Bus, options: &Options, left: Option<u64>) {
    bus.close().await.expect("closed");
    if let Some(left) = left {
        raw::expect_left(options, POLYMQ_QUEUE, left).await;
    }
    raw::delete(options, POLYMQ_QUEUE).await;
}

pub async fn publish(options: Options) -> Numbers {
    let bus = connect(&options).await;
    let queue = queue(&bus).await.with_window(WINDOW, WhenFull::Wait);
    // Opens the channel, as the other paths do before the clock starts.
    queue.send_message(Message::new("first")).await.expect("confirmed");
    let meter = Meter::start(&options);
    spread(&options, |share| {
        let (queue, options) = (queue.clone(), options.clone());
        async move { service::send_all(&queue, &options, share).await }
    })
    .await;
    let numbers = meter.stop(options.messages());
    end(bus, &options, Some(options.messages() + 1)).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let bus = connect(&options).await;
    queue(&bus).await;
    raw::fill(&options, POLYMQ_QUEUE).await;
    let workers = workers(&options) as usize;
    let running = service::run(&bus, |factory| {
        let route = factory.route(POLYMQ_QUEUE, |_: Frame| async {});
        route.concurrency(workers).prefetch(WINDOW * workers);
    })
    .await;
    let numbers = all_handled(options.messages()).await;
    running.stop().await.expect("stopped");
    end(bus, &options, Some(0)).await;
    numbers
}

pub async fn resident(options: Options) -> Numbers {
    let bus = connect(&options).await;
    queue(&bus).await;
    raw::fill(&options, POLYMQ_QUEUE).await;
    let numbers = service::resident(&bus, POLYMQ_QUEUE, &options).await;
    end(bus, &options, None).await;
    numbers
}

pub async fn idle(options: Options) -> Numbers {
    let bus = connect(&options).await;
    queue(&bus).await;
    let numbers = service::idle(&bus, POLYMQ_QUEUE, &options).await;
    end(bus, &options, Some(0)).await;
    numbers
}
