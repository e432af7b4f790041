//! omniqueue. It sends batches one after the other, does not look at entries that are refused, and deletes each message in a
//! request of its own.

use std::{sync::Arc, time::Duration};

use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, all_handled, handled},
};
use omniqueue::{QueueProducer, backends::SqsBackend};

use crate::{BATCH, REQUESTS, queue, raw, text};

pub async fn publish(options: Options) -> Numbers {
    let client = raw::client(&options);
    let url = raw::create(&client, &queue()).await;
    let builder = SqsBackend::builder(url.clone()).sqs_config(raw::config(&options));
    let producer = builder.build_producer().await.expect("a producer");
    let body = Arc::new(text(&options));
    let meter = Meter::start(&options);
    producer.send_raw_batch((0..options.messages()).map(|_| Arc::clone(&body))).await.expect("accepted");
    let numbers = meter.stop(options.messages());
    raw::expect_left(&client, &url, options.messages()).await;
    raw::delete(&client, &url).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let client = raw::client(&options);
    let url = raw::create(&client, &queue()).await;
    raw::fill(&options, &client, &url).await;
    for _ in 0..REQUESTS {
        let builder = SqsBackend::builder(url.clone()).sqs_config(raw::config(&options));
        let consumer = builder.build_consumer().await.expect("a consumer");
        tokio::spawn(async move {
            while LATCH.remaining() > 0 {
                for delivery in consumer.receive_all(BATCH, Duration::from_secs(20)).await.expect("an answer") {
                    handled(delivery.borrow_payload().unwrap_or_default());
                    delivery.ack().await.expect("deleted");
                }
            }
        });
    }
    let numbers = all_handled(options.messages()).await;
    raw::expect_left(&client, &url, 0).await;
    numbers
}
