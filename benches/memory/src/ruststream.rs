//! RustStream on its memory broker. Its queue is unbounded, so the producer lets the consumer run after each batch.

use futures::StreamExt;
use harness::{Meter, Numbers, Options};
use ruststream::{BytesMut, OutgoingMessage, Subscriber, memory::prelude::*};

use crate::{BATCH, LATCH, ORDER, Order, handled, handled_order, size};

#[derive(Deserialized)]
pub struct Frame<'a>(pub &'a [u8]);

#[subscriber("orders")]
async fn consume_frame(frame: &Frame<'_>) -> HandlerOutcome {
    handled(frame.0);
    HandlerOutcome::ack()
}

#[subscriber("orders")]
async fn consume_frames(frames: &[Frame<'_>]) -> HandlerOutcome {
    frames.iter().for_each(|frame| handled(frame.0));
    HandlerOutcome::ack()
}

#[subscriber("orders")]
async fn consume_order(order: &Order) -> HandlerOutcome {
    handled_order(order);
    HandlerOutcome::ack()
}

#[subscriber("orders")]
async fn consume_orders(orders: &[Order]) -> HandlerOutcome {
    orders.iter().for_each(handled_order);
    HandlerOutcome::ack()
}

pub fn payload(size: usize) -> BytesMut {
    let mut payload = BytesMut::with_capacity(size);
    payload.resize(size, 1);
    payload
}

async fn send(options: &Options, broker: &MemoryBroker) -> Numbers {
    let publisher = broker.publisher();
    let (n, size) = (options.messages(), size(options));
    let meter = Meter::start(options);
    for sent in 1..=n {
        publisher.publish(OutgoingMessage::produced("orders", payload(size)), None).await.expect("accepted");
        if sent % BATCH as u64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    LATCH.wait().await;
    meter.stop(n)
}

async fn send_orders(options: &Options, broker: &MemoryBroker) -> Numbers {
    let publisher = broker.publisher();
    let n = options.messages();
    let meter = Meter::start(options);
    for sent in 1..=n {
        publisher.message(&ORDER).publish().await.expect("accepted");
        if sent % BATCH as u64 == 0 {
            tokio::task::yield_now().await;
        }
    }
    LATCH.wait().await;
    meter.stop(n)
}

macro_rules! start {
    ($broker:expr, $($mount:tt)*) => {
        RustStream::new(AppInfo::new("bench", "0.0.0"))
            .with_broker($broker.clone(), |scope| {
                scope.include($($mount)*);
            })
            .start()
            .await
            .expect("starts")
    };
}
pub(crate) use start;

pub async fn single(options: Options) -> Numbers {
    let broker = MemoryBroker::new();
    let _running = start!(broker, consume_frame);
    send(&options, &broker).await
}

pub async fn batch(options: Options) -> Numbers {
    let broker = MemoryBroker::new();
    let _running = start!(broker, consume_frames.batch(nonzero!(128)));
    send(&options, &broker).await
}

pub async fn by_hand(options: Options) -> Numbers {
    let broker = MemoryBroker::new();
    let mut subscriber = broker.subscribe("orders");
    tokio::spawn(async move {
        let mut stream = std::pin::pin!(subscriber.stream());
        while let Some(message) = stream.next().await {
            let message = message.expect("a message");
            handled(message.payload());
            message.ack().await.expect("acknowledged");
        }
    });
    send(&options, &broker).await
}

pub async fn json(options: Options) -> Numbers {
    let broker = MemoryBroker::new();
    let _running = start!(broker, consume_order);
    send_orders(&options, &broker).await
}

pub async fn json_batch(options: Options) -> Numbers {
    let broker = MemoryBroker::new();
    let _running = start!(broker, consume_orders.batch(nonzero!(128)));
    send_orders(&options, &broker).await
}
