//! One message a millisecond, and how long each is under way to its handler, through the broker.

use std::{
    sync::{LazyLock, Mutex},
    time::{Duration, Instant},
};

use harness::{Numbers, Options, broker::LATCH, percentile, service};
use polymq_core::{FromDelivery, Message, Result, View};
use rdkafka::{
    Message as _,
    consumer::{BaseConsumer, CommitMode, Consumer},
    producer::{FutureProducer, FutureRecord},
};

use crate::{raw as bare, topic};

static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);
static TAKEN: Mutex<Vec<f64>> = Mutex::new(Vec::new());

fn stamp() -> Vec<u8> {
    let mut payload = vec![1; 256];
    payload[..8].copy_from_slice(&(ZERO.elapsed().as_nanos() as u64).to_le_bytes());
    payload
}

fn arrived(payload: &[u8]) {
    let sent_at = u64::from_le_bytes(payload[..8].try_into().expect("eight bytes"));
    let taken = ZERO.elapsed().as_nanos() as u64 - sent_at;
    TAKEN.lock().expect("no panic").push(taken as f64);
    LATCH.arrived();
}

struct Stamp;

impl FromDelivery for Stamp {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        arrived(view.message().payload());
        Ok(Self)
    }
}

/// Sends with the expression once a millisecond. A macro, because the future of an async closure is not known to be `Send`.
macro_rules! each_millisecond {
    ($options:expr, $send:expr) => {{
        let n = $options.messages();
        LazyLock::force(&ZERO);
        // The group has its partitions by then.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut ticks = tokio::time::interval(Duration::from_millis(1));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for _ in 0..n {
            ticks.tick().await;
            $send;
        }
        LATCH.wait().await;
        let mut taken = std::mem::take(&mut *TAKEN.lock().expect("no panic"));
        taken.sort_by(f64::total_cmp);
        vec![("p50_us", percentile(&taken, 50.0) / 1e3), ("p99_us", percentile(&taken, 99.0) / 1e3)]
    }};
}

pub async fn raw(options: Options) -> Numbers {
    let topic = topic();
    bare::create(&options, &topic).await;
    let consumer: BaseConsumer = bare::config(&options)
        .set("group.id", &topic)
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.commit", "false")
        .create()
        .expect("a consumer");
    consumer.subscribe(&[&topic]).expect("subscribed");
    let reading = tokio::task::spawn_blocking(move || {
        let mut committed = Instant::now();
        while LATCH.remaining() > 0 {
            let Some(record) = consumer.poll(Duration::from_millis(100)) else { continue };
            let record = record.expect("a record");
            arrived(record.payload().unwrap_or_default());
            if committed.elapsed() > Duration::from_millis(100) {
                committed = Instant::now();
                consumer.commit_message(&record, CommitMode::Async).expect("on its way");
            }
        }
    });
    let producer: FutureProducer = bare::config(&options)
        .set("enable.idempotence", "true")
        .set("linger.ms", "0")
        .set("socket.nagle.disable", "true")
        .create()
        .expect("a producer");
    let numbers = each_millisecond!(options, {
        let body = stamp();
        let record: FutureRecord<'_, [u8], [u8]> = FutureRecord::to(&topic).payload(&body);
        drop(producer.send_result(record).map_err(|(error, _)| error).expect("taken"));
    });
    reading.await.expect("no panic");
    bare::delete(&options, &topic).await;
    numbers
}

pub async fn polymq(options: Options) -> Numbers {
    let (bus, topic) = (crate::polymq::connect(&options).await, topic());
    bare::create(&options, &topic).await;
    let queue = bus.queue(topic.as_str());
    let running = service::run(&bus, |factory| {
        factory.route(topic.as_str(), |_: Stamp| async {});
    })
    .await;
    let numbers = each_millisecond!(options, {
        drop(queue.enqueue(Message::new(stamp())).await.expect("taken"));
    });
    running.stop().await.expect("stopped");
    queue.delete(None).await.expect("deleted");
    bus.close().await.expect("closed");
    numbers
}
