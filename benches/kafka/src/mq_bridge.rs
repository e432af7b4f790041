//! mq-bridge's Kafka endpoints in batches, with the window as their size. Its batches are packed with lz4, which this
//! turns off as on the other paths.

use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, all_handled, handled, payload},
};
use mq_bridge::{
    CanonicalMessage,
    endpoints::kafka::{KafkaConsumer, KafkaPublisher},
    models::KafkaConfig,
    traits::{MessageConsumer, MessageDisposition, MessagePublisher},
};

use crate::{WINDOW, raw, topic};

fn config(options: &Options, topic: &str, group: &str) -> KafkaConfig {
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    KafkaConfig {
        url: raw::servers(options).to_owned(),
        topic: Some(topic.to_owned()),
        group_id: Some(group.to_owned()),
        producer_options: Some(vec![pair("compression.type", "none"), pair("linger.ms", "0")]),
        create_topic: Some(false),
        ..KafkaConfig::default()
    }
}

pub async fn publish(options: Options) -> Numbers {
    let topic = topic();
    raw::create(&options, &topic).await;
    let publisher = KafkaPublisher::new(&config(&options, &topic, &topic)).await.expect("a publisher");
    let body = payload(&options);
    let meter = Meter::start(&options);
    let mut left = options.messages() as usize;
    while left > 0 {
        let count = left.min(WINDOW);
        let messages = (0..count).map(|_| CanonicalMessage::new(body.clone(), None)).collect();
        publisher.send_batch(messages).await.expect("accepted");
        left -= count;
    }
    let numbers = meter.stop(options.messages());
    raw::expect_sent(&options, &topic, options.messages());
    raw::delete(&options, &topic).await;
    numbers
}

pub async fn consume(options: Options) -> Numbers {
    let (filled, group) = (raw::fill(&options).await, topic());
    let mut consumer = KafkaConsumer::new(&config(&options, &filled, &group)).await.expect("a consumer");
    let reading = tokio::spawn(async move {
        while LATCH.remaining() > 0 {
            let received = consumer.receive_batch(WINDOW).await.expect("messages");
            received.messages.iter().for_each(|message| handled(&message.payload));
            let dispositions = received.messages.iter().map(|_| MessageDisposition::Ack).collect();
            (received.commit)(dispositions).await.expect("committed");
        }
    });
    let numbers = all_handled(options.messages()).await;
    reading.await.expect("no panic");
    numbers
}
