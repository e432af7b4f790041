//! The yardstick: a bounded channel of tokio and nothing else. Nothing can be retried or acknowledged here.

use harness::{Meter, Numbers, Options};
use tokio::sync::mpsc;

use crate::{BATCH, CAPACITY, LATCH, ORDER, handled, handled_order, payload, size};

pub async fn single(options: Options) -> Numbers {
    let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(CAPACITY);
    let (n, size) = (options.messages(), size(&options));
    tokio::spawn(async move {
        while let Some(message) = receiver.recv().await {
            handled(&message);
        }
    });
    let meter = Meter::start(&options);
    for _ in 0..n {
        sender.send(payload(size)).await.expect("a receiver");
    }
    LATCH.wait().await;
    meter.stop(n)
}

pub async fn many(options: Options) -> Numbers {
    let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(CAPACITY);
    let (n, size) = (options.messages(), size(&options));
    tokio::spawn(async move {
        let mut batch = Vec::with_capacity(BATCH);
        while receiver.recv_many(&mut batch, BATCH).await > 0 {
            batch.drain(..).for_each(|message| handled(&message));
        }
    });
    let meter = Meter::start(&options);
    for _ in 0..n {
        sender.send(payload(size)).await.expect("a receiver");
    }
    LATCH.wait().await;
    meter.stop(n)
}

/// A batch as one item: what no path that answers for each message can reach.
pub async fn vectors(options: Options) -> Numbers {
    let (sender, mut receiver) = mpsc::channel::<Vec<Vec<u8>>>(CAPACITY / BATCH);
    let (n, size) = (options.messages(), size(&options));
    tokio::spawn(async move {
        while let Some(batch) = receiver.recv().await {
            batch.iter().for_each(|message| handled(message));
        }
    });
    let meter = Meter::start(&options);
    let mut left = n as usize;
    while left > 0 {
        let count = left.min(BATCH);
        sender.send((0..count).map(|_| payload(size)).collect()).await.expect("a receiver");
        left -= count;
        // As every other producer here gives way after a batch.
        tokio::task::yield_now().await;
    }
    LATCH.wait().await;
    meter.stop(n)
}

pub async fn json(options: Options) -> Numbers {
    let (sender, mut receiver) = mpsc::channel::<Vec<u8>>(CAPACITY);
    let n = options.messages();
    tokio::spawn(async move {
        while let Some(message) = receiver.recv().await {
            handled_order(&serde_json::from_slice(&message).expect("an order"));
        }
    });
    let meter = Meter::start(&options);
    for _ in 0..n {
        sender.send(serde_json::to_vec(&ORDER).expect("encodes")).await.expect("a receiver");
    }
    LATCH.wait().await;
    meter.stop(n)
}
