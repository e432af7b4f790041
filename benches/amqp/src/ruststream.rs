//! ruststream-lapin with publisher confirms. Its publisher waits for each confirm, so the window is made by waiting for
//! many publishes at a time.

use std::sync::Arc;

use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{WINDOW, all_handled, handled, payload, spread, workers},
};
use ruststream::OutgoingMessage;
use ruststream_lapin::{LapinPublish, prelude::*};

use crate::{QUEUE, raw};

#[derive(Deserialized)]
struct Frame<'a>(&'a [u8]);

#[subscriber(RabbitQueue::new("bench.plain").durable(true).prefetch(nonzero!(128)))]
async fn consume_one(frame: &Frame<'_>) -> HandlerOutcome {
    handled(frame.0);
    HandlerOutcome::ack()
}

#[subscriber(RabbitQueue::new("bench.plain").durable(true).prefetch(nonzero!(1024)), workers(8))]
async fn consume_eight(frame: &Frame<'_>) -> HandlerOutcome {
    handled(frame.0);
    HandlerOutcome::ack()
}

pub async fn publish(options: Options) -> Numbers {
    let connection = raw::connect(&options).await;
    raw::empty_queue(&connection).await;
    let connected = LapinBroker::new(options.need("url")).connect().await.expect("a broker");
    let publisher = Arc::new(connected.publisher(LapinPublish::default().confirms()));
    let body = payload(&options);
    publisher.publish(OutgoingMessage::new(QUEUE, &body), None).await.expect("confirmed");
    let meter = Meter::start(&options);
    spread(&options, |share| {
        let (publisher, body) = (Arc::clone(&publisher), body.clone());
        async move {
            let publishes = stream::iter(0..share).map(|_| publisher.publish(OutgoingMessage::new(QUEUE, &body), None));
            let mut publishes = std::pin::pin!(publishes.buffer_unordered(WINDOW));
            while let Some(result) = publishes.next().await {
                result.expect("confirmed");
            }
        }
    })
    .await;
    let numbers = meter.stop(options.messages());
    raw::expect_left(&options, QUEUE, options.messages() + 1).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let connection = raw::connect(&options).await;
    raw::empty_queue(&connection).await;
    raw::fill(&options, QUEUE).await;
    let broker = LapinBroker::new(options.need("url"));
    let app = RustStream::new(AppInfo::new("bench", "0.0.0"));
    let running = if workers(&options) == 1 {
        app.with_broker(broker, |scope| {
            scope.include(consume_one);
        })
        .start()
        .await
    } else {
        app.with_broker(broker, |scope| {
            scope.include(consume_eight);
        })
        .start()
        .await
    }
    .expect("starts");
    let numbers = all_handled(options.messages()).await;
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    running.shutdown().await.expect("stopped");
    raw::expect_left(&options, QUEUE, 0).await;
    numbers
}
