//! sea-streamer-kafka: offsets are stored after handling and committed in the background; the last ones are committed by
//! its user.

use std::{collections::VecDeque, time::Duration};

use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, all_handled, handled, payload},
};
use sea_streamer_kafka::{
    AutoOffsetReset, KafkaConsumer, KafkaConsumerOptions, KafkaProducer, KafkaProducerOptions, KafkaStreamer,
};
use sea_streamer_types::{
    Buffer, Consumer, ConsumerGroup, ConsumerMode, ConsumerOptions, Message, Producer, StreamKey, Streamer,
};

use crate::{WINDOW, raw, topic};

async fn connect(options: &Options) -> KafkaStreamer {
    let uri = format!("kafka://{}", raw::servers(options)).parse().expect("an address");
    KafkaStreamer::connect(uri, Default::default()).await.expect("a broker")
}

pub async fn publish(options: Options) -> Numbers {
    let topic = topic();
    raw::create(&options, &topic).await;
    let mut settings = KafkaProducerOptions::default();
    settings.add_custom_option("enable.idempotence", "true").add_custom_option("linger.ms", "0");
    let key = StreamKey::new(topic.as_str()).expect("a name");
    let mut producer: KafkaProducer = connect(&options).await.create_producer(key, settings).await.expect("a producer");
    let body = payload(&options);
    let meter = Meter::start(&options);
    let mut waiting = VecDeque::new();
    for _ in 0..options.messages() {
        if waiting.len() == WINDOW
            && let Some(report) = waiting.pop_front()
        {
            Future::await_report(report).await;
        }
        waiting.push_back(producer.send(body.as_slice()).expect("taken"));
    }
    for report in waiting {
        Future::await_report(report).await;
    }
    let numbers = meter.stop(options.messages());
    producer.flush().await.expect("flushed");
    raw::expect_sent(&options, &topic, options.messages());
    raw::delete(&options, &topic).await;
    numbers
}

struct Future;

impl Future {
    async fn await_report(report: sea_streamer_kafka::SendFuture) {
        report.await.expect("delivered");
    }
}

pub async fn consume(options: Options) -> Numbers {
    let (filled, group) = (raw::fill(&options).await, topic());
    let mut settings = KafkaConsumerOptions::new(ConsumerMode::LoadBalanced);
    settings.set_consumer_group(ConsumerGroup::new(group.clone())).expect("a group");
    settings
        .set_auto_offset_reset(AutoOffsetReset::Earliest)
        .set_enable_auto_commit(true)
        .set_auto_commit_interval(Duration::from_millis(100))
        .set_enable_auto_offset_store(false);
    let key = StreamKey::new(filled.as_str()).expect("a name");
    let mut consumer: KafkaConsumer =
        connect(&options).await.create_consumer(&[key], settings).await.expect("a consumer");
    let reading = tokio::spawn(async move {
        let mut last = std::collections::BTreeMap::new();
        while LATCH.remaining() > 0 {
            let identifier = {
                let message = consumer.next().await.expect("a message");
                handled(message.message().as_bytes());
                message.identifier()
            };
            consumer.store_offset_with(&identifier).expect("stored");
            last.insert(identifier.1.id(), identifier);
        }
        for (key, shard, sequence) in last.into_values() {
            consumer.commit(&key, &shard, &sequence).await.expect("committed");
        }
    });
    let numbers = all_handled(options.messages()).await;
    reading.await.expect("no panic");
    numbers
}
