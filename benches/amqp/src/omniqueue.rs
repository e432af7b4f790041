//! omniqueue. It has no publisher confirms, so what it publishes is weaker than everything beside it. It runs on lapin 2
//! and that one's own executor.

use harness::{
    Meter, Numbers, Options,
    broker::{WINDOW, all_handled, handled, payload, spread, workers},
};
use omniqueue::backends::{
    RabbitMqBackend, RabbitMqConfig,
    rabbitmq::{BasicConsumeOptions, BasicProperties, BasicPublishOptions, ConnectionProperties, FieldTable},
};

use crate::{QUEUE, raw};

fn config(options: &Options) -> RabbitMqConfig {
    RabbitMqConfig {
        uri: options.need("url").to_owned(),
        connection_properties: ConnectionProperties::default(),
        publish_exchange: String::new(),
        publish_routing_key: QUEUE.to_owned(),
        publish_options: BasicPublishOptions::default(),
        publish_properties: BasicProperties::default().with_delivery_mode(2),
        consume_queue: QUEUE.to_owned(),
        consumer_tag: String::new(),
        consume_options: BasicConsumeOptions::default(),
        consume_arguments: FieldTable::default(),
        consume_prefetch_count: Some(WINDOW as u16),
        requeue_on_nack: true,
    }
}

pub async fn publish(options: Options) -> Numbers {
    let connection = raw::connect(&options).await;
    raw::empty_queue(&connection).await;
    let producer = RabbitMqBackend::builder(config(&options)).build_producer().await.expect("a producer");
    let producer = std::sync::Arc::new(producer);
    let body = payload(&options);
    let meter = Meter::start(&options);
    spread(&options, |share| {
        let (producer, body) = (std::sync::Arc::clone(&producer), body.clone());
        async move {
            for _ in 0..share {
                producer.send_raw(&body).await.expect("queued");
            }
        }
    })
    .await;
    let numbers = meter.stop(options.messages());
    // Nothing else tells when the broker has them: what is still under way when this process ends arrives in the middle
    // of the next measurement.
    raw::expect_left(&options, QUEUE, options.messages()).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let connection = raw::connect(&options).await;
    raw::empty_queue(&connection).await;
    raw::fill(&options, QUEUE).await;
    let mut tasks = Vec::new();
    for _ in 0..workers(&options) {
        let mut consumer = RabbitMqBackend::builder(config(&options)).build_consumer().await.expect("a consumer");
        tasks.push(tokio::spawn(async move {
            loop {
                let delivery = consumer.receive().await.expect("a message");
                handled(delivery.borrow_payload().unwrap_or_default());
                delivery.ack().await.expect("acknowledged");
            }
        }));
    }
    let numbers = all_handled(options.messages()).await;
    tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    tasks.into_iter().for_each(|task| task.abort());
    raw::expect_left(&options, QUEUE, 0).await;
    numbers
}
