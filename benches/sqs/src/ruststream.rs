//! ruststream-sqs-sns. Its publisher sends each message in a request of its own, so as many of these are on their way at a
//! time as the others have messages on their way.

use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{all_handled, handled},
};
use ruststream::{Broker, OutgoingMessage, Publisher};
use ruststream_sqs_sns::prelude::*;

use crate::{BATCH, REQUESTS, endpoint, raw, text};

const QUEUE: &str = "bench-ruststream";

#[derive(Deserialized)]
struct Frame<'a>(&'a [u8]);

#[subscriber(SqsQueue::new("bench-ruststream"), workers(8))]
async fn consume_all(frame: &Frame<'_>) -> HandlerOutcome {
    handled(frame.0);
    HandlerOutcome::ack()
}

fn broker(options: &Options) -> SqsBroker {
    SqsBroker::new().endpoint(endpoint(options)).region("us-east-1").test_credentials()
}

pub async fn publish(options: Options) -> Numbers {
    let client = raw::client(&options);
    let url = raw::create(&client, QUEUE).await;
    let connected = broker(&options).connect().await.expect("a broker");
    let publisher = connected.publisher();
    let body = text(&options);
    let meter = Meter::start(&options);
    let publishes = stream::iter(0..options.messages())
        .map(|_| publisher.publish(OutgoingMessage::new(QUEUE, body.as_bytes()), None));
    let mut publishes = std::pin::pin!(publishes.buffer_unordered(REQUESTS * BATCH));
    while let Some(result) = publishes.next().await {
        result.expect("accepted");
    }
    let numbers = meter.stop(options.messages());
    raw::expect_left(&client, &url, options.messages()).await;
    raw::delete(&client, &url).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let client = raw::client(&options);
    let url = raw::create(&client, QUEUE).await;
    raw::fill(&options, &client, &url).await;
    let app = RustStream::new(AppInfo::new("bench", "0.0.0")).with_broker(broker(&options), |scope| {
        scope.include(consume_all);
    });
    let running = app.start().await.expect("starts");
    let numbers = all_handled(options.messages()).await;
    raw::expect_left(&client, &url, 0).await;
    running.shutdown().await.expect("stopped");
    raw::delete(&client, &url).await;
    numbers
}
