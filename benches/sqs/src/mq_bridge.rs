//! mq-bridge's endpoints of SQS in batches.

use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, all_handled, handled},
};
use mq_bridge::{
    CanonicalMessage,
    endpoints::aws::{AwsConsumer, AwsPublisher},
    models::AwsConfig,
    traits::{MessageConsumer, MessageDisposition, MessagePublisher},
};

use crate::{BATCH, REQUESTS, endpoint, queue, raw, text};

fn config(options: &Options, url: &str) -> AwsConfig {
    AwsConfig {
        queue_url: Some(url.to_owned()),
        region: Some("us-east-1".to_owned()),
        endpoint_url: Some(endpoint(options)),
        access_key: Some("test".to_owned()),
        secret_key: Some("test".to_owned()),
        max_messages: Some(BATCH as i32),
        wait_time_seconds: Some(20),
        ..AwsConfig::default()
    }
}

pub async fn publish(options: Options) -> Numbers {
    let client = raw::client(&options);
    let url = raw::create(&client, &queue()).await;
    let publisher = AwsPublisher::new(&config(&options, &url)).await.expect("a publisher");
    let body = text(&options).into_bytes();
    let meter = Meter::start(&options);
    let mut left = options.messages() as usize;
    while left > 0 {
        let count = left.min(REQUESTS * BATCH);
        let messages = (0..count).map(|_| CanonicalMessage::new(body.clone(), None)).collect();
        publisher.send_batch(messages).await.expect("accepted");
        left -= count;
    }
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
        let mut consumer = AwsConsumer::new(&config(&options, &url)).await.expect("a consumer");
        tokio::spawn(async move {
            while LATCH.remaining() > 0 {
                let received = consumer.receive_batch(BATCH).await.expect("messages");
                received.messages.iter().for_each(|message| handled(&message.payload));
                let dispositions = received.messages.iter().map(|_| MessageDisposition::Ack).collect();
                (received.commit)(dispositions).await.expect("deleted");
            }
        });
    }
    let numbers = all_handled(options.messages()).await;
    raw::expect_left(&client, &url, 0).await;
    numbers
}
