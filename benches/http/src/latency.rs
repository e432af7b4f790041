//! One message a millisecond, and how long each takes there, through its handler and back.

use std::time::{Duration, Instant};

use ::bytes::Bytes;
use ::mq_bridge::{CanonicalMessage, traits::MessagePublisher};
use harness::{
    Numbers, Options,
    broker::{LATCH, payload},
    percentile,
};
use polymq_core::Message;

use crate::{mq_bridge, polymq, raw};

/// A macro, because the future of an async closure is not known to be `Send`.
macro_rules! each_millisecond {
    ($options:expr, $send:expr) => {{
        let (messages, mut taken) = ($options.messages(), Vec::new());
        LATCH.expect(messages + 100);
        for _ in 0..100 {
            $send;
        }
        let mut ticks = tokio::time::interval(Duration::from_millis(1));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for _ in 0..messages {
            ticks.tick().await;
            let started = Instant::now();
            $send;
            taken.push(started.elapsed().as_nanos() as f64);
        }
        taken.sort_by(f64::total_cmp);
        vec![("p50_us", percentile(&taken, 50.0) / 1e3), ("p99_us", percentile(&taken, 99.0) / 1e3)]
    }};
}

pub async fn raw(options: Options) -> Numbers {
    let address = raw::serving().await;
    let (client, url, body) = (raw::client(), raw::url(address), Bytes::from(payload(&options)));
    each_millisecond!(options, raw::post_one(&client, &url, body.clone(), false).await)
}

pub async fn polymq(options: Options) -> Numbers {
    let (_serving, _running, address) = polymq::serving().await;
    let (bus, body) = (polymq::bus(address).await, Bytes::from(payload(&options)));
    let queue = bus.queue("orders");
    each_millisecond!(options, queue.send_message(Message::new(body.clone())).await.expect("handled"))
}

pub async fn mq_bridge(options: Options) -> Numbers {
    let publisher = mq_bridge::publisher(mq_bridge::serving().await).await;
    let body = Bytes::from(payload(&options));
    each_millisecond!(options, publisher.send(CanonicalMessage::new_bytes(body.clone(), None)).await.expect("handled"))
}
