//! polymq with its default settings but window and prefetch.

use harness::{
    Meter, Numbers, Options,
    broker::all_handled,
    service::{self, Frame},
};
use polymq_core::{Bus, Message, WhenFull};

use crate::{BATCH, REQUESTS, queue, raw, text};

pub async fn connect(options: &Options) -> Bus {
    // Links the backend.
    let _ = polymq_sqs::NAME;
    service::connect(options).await
}

pub async fn publish(options: Options) -> Numbers {
    let bus = connect(&options).await;
    // What eight requests of ten can hold, and as much that waits for them.
    let queue = bus.queue(queue()).with_window(2 * REQUESTS * BATCH, WhenFull::Wait);
    queue.declare(Default::default()).await.expect("declared");
    let body = text(&options);
    let meter = Meter::start(&options);
    for result in queue.send_all((0..options.messages()).map(|_| Message::new(body.clone()))).await {
        result.expect("accepted");
    }
    let numbers = meter.stop(options.messages());
    let client = raw::client(&options);
    let url = raw::create(&client, &crate::queue()).await;
    raw::expect_left(&client, &url, options.messages()).await;
    end(&bus).await;
    numbers
}

async fn end(bus: &Bus) {
    let queue = bus.queue(queue());
    queue.delete(None).await.expect("deleted");
    bus.channel(queue.address().dead_letters(None)).delete(None).await.expect("deleted");
    bus.close().await.expect("closed");
}

pub async fn consume(options: Options) -> Numbers {
    let client = raw::client(&options);
    let url = raw::create(&client, &queue()).await;
    raw::fill(&options, &client, &url).await;
    let bus = connect(&options).await;
    let running = service::run(&bus, |factory| {
        factory.route(queue(), |_: Frame| async {}).prefetch(2 * REQUESTS * BATCH);
    })
    .await;
    let numbers = all_handled(options.messages()).await;
    running.stop().await.expect("stopped");
    raw::expect_left(&client, &url, 0).await;
    end(&bus).await;
    numbers
}

pub async fn resident(options: Options) -> Numbers {
    let client = raw::client(&options);
    let url = raw::create(&client, &queue()).await;
    raw::fill(&options, &client, &url).await;
    let bus = connect(&options).await;
    let numbers = service::resident(&bus, &queue(), &options).await;
    end(&bus).await;
    numbers
}

pub async fn idle(options: Options) -> Numbers {
    let bus = connect(&options).await;
    bus.queue(queue()).declare(Default::default()).await.expect("declared");
    let numbers = service::idle(&bus, &queue(), &options).await;
    end(&bus).await;
    numbers
}
