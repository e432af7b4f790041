//! mq-bridge's memory endpoint in batches, with and without the ability to give messages back.

use harness::{Meter, Numbers, Options};
use mq_bridge::{
    CanonicalMessage,
    endpoints::memory::{MemoryConsumer, MemoryPublisher},
    models::MemoryConfig,
    traits::{MessageConsumer, MessageDisposition, MessagePublisher},
};

use crate::{BATCH, CAPACITY, LATCH, handled, payload, size};

/// As it comes: what is dropped or refused is lost.
pub async fn batch(options: Options) -> Numbers {
    measure(options, false).await
}

/// What is refused comes again, as with every other path here.
pub async fn batch_nack(options: Options) -> Numbers {
    measure(options, true).await
}

async fn measure(options: Options, nack: bool) -> Numbers {
    let config = MemoryConfig {
        topic: "orders".to_owned(),
        capacity: Some(CAPACITY),
        enable_nack: nack,
        ..MemoryConfig::default()
    };
    let publisher = MemoryPublisher::new(&config).expect("a publisher");
    let mut consumer = MemoryConsumer::new(&config).expect("a consumer");
    tokio::spawn(async move {
        loop {
            let received = consumer.receive_batch(BATCH).await.expect("messages");
            received.messages.iter().for_each(|message| handled(&message.payload));
            let dispositions = received.messages.iter().map(|_| MessageDisposition::Ack).collect();
            (received.commit)(dispositions).await.expect("committed");
        }
    });
    let (n, size) = (options.messages(), size(&options));
    let meter = Meter::start(&options);
    let mut left = n as usize;
    while left > 0 {
        let count = left.min(BATCH);
        let messages = (0..count).map(|_| CanonicalMessage::new(payload(size), None)).collect();
        publisher.send_batch(messages).await.expect("accepted");
        left -= count;
    }
    LATCH.wait().await;
    meter.stop(n)
}
