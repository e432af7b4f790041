//! omniqueue's memory backend behind its own erased handles. Its queue is unbounded. It copies what it is lent, so that
//! copy is the message's allocation.

use harness::{Meter, Numbers, Options};
use omniqueue::backends::InMemoryBackend;

use crate::{BATCH, LATCH, handled, payload, size};

pub async fn by_hand(options: Options) -> Numbers {
    let (producer, mut consumer) = InMemoryBackend::builder().make_dynamic().build_pair().await.expect("a pair");
    tokio::spawn(async move {
        loop {
            let delivery = consumer.receive().await.expect("a message");
            handled(delivery.borrow_payload().unwrap_or_default());
            delivery.ack().await.expect("acknowledged");
        }
    });
    let (n, size) = (options.messages(), size(&options));
    let lent = payload(size);
    let meter = Meter::start(&options);
    for sent in 1..=n {
        producer.send_raw(&lent).await.expect("accepted");
        if sent % BATCH as u64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    LATCH.wait().await;
    meter.stop(n)
}
