//! ruststream-rdkafka with tracked commits, an idempotent producer and all replicas asked. Its publisher waits for each
//! delivery report, so the window is made by waiting for many publishes at a time.

use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{all_handled, handled, payload},
};
use ruststream::{Broker, OutgoingMessage, Publisher};
use ruststream_rdkafka::prelude::*;

use crate::{WINDOW, raw, topic};

#[derive(Deserialized)]
struct Frame<'a>(&'a [u8]);

#[subscriber(KafkaTopic::new("bench-256-2000000").commit(Commit::Tracked).start(StartOffset::Earliest))]
async fn consume_small(frame: &Frame<'_>) -> HandlerOutcome {
    handled(frame.0);
    HandlerOutcome::ack()
}

#[subscriber(KafkaTopic::new("bench-16384-50000").commit(Commit::Tracked).start(StartOffset::Earliest))]
async fn consume_large(frame: &Frame<'_>) -> HandlerOutcome {
    handled(frame.0);
    HandlerOutcome::ack()
}

fn broker(options: &Options) -> KafkaBroker {
    KafkaBroker::new([raw::servers(options)])
        .default_group(topic())
        .producer_config("acks", "all")
        .producer_config("enable.idempotence", "true")
        .producer_config("linger.ms", "0")
}

pub async fn publish(options: Options) -> Numbers {
    let topic = topic();
    raw::create(&options, &topic).await;
    let connected = broker(&options).connect().await.expect("a broker");
    let publisher = connected.publisher(Publish::default());
    let body = payload(&options);
    let meter = Meter::start(&options);
    let publishes =
        stream::iter(0..options.messages()).map(|_| publisher.publish(OutgoingMessage::new(&topic, &body), None));
    let mut publishes = std::pin::pin!(publishes.buffer_unordered(WINDOW));
    while let Some(result) = publishes.next().await {
        result.expect("delivered");
    }
    let numbers = meter.stop(options.messages());
    raw::expect_sent(&options, &topic, options.messages());
    raw::delete(&options, &topic).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let filled = raw::fill(&options).await;
    let app = RustStream::new(AppInfo::new("bench", "0.0.0"));
    let running = match filled.as_str() {
        "bench-256-2000000" => app.with_broker(broker(&options), |scope| {
            scope.include(consume_small);
        }),
        "bench-16384-50000" => app.with_broker(broker(&options), |scope| {
            scope.include(consume_large);
        }),
        other => panic!("no subscriber is written for {other}"),
    };
    let running = running.start().await.expect("starts");
    let numbers = all_handled(options.messages()).await;
    running.shutdown().await.expect("stopped");
    raw::expect_committed(&options, &filled, &topic());
    numbers
}
