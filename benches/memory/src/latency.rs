//! One message a millisecond, and how long each is under way to its handler.

use std::{
    sync::{LazyLock, Mutex},
    time::{Duration, Instant},
};

use ::ruststream::{OutgoingMessage, memory::prelude::*};
use harness::{Numbers, Options, percentile};
use polymq_core::{FromDelivery, Message, Result, View};

use crate::{CAPACITY, LATCH};

static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);
static TAKEN: Mutex<Vec<f64>> = Mutex::new(Vec::new());

fn stamp() -> Vec<u8> {
    let mut payload = vec![1; 256];
    payload[..8].copy_from_slice(&(ZERO.elapsed().as_nanos() as u64).to_le_bytes());
    payload
}

fn sent_at(payload: &[u8]) -> u64 {
    u64::from_le_bytes(payload[..8].try_into().expect("eight bytes"))
}

fn arrived(sent_at: u64) {
    let taken = ZERO.elapsed().as_nanos() as u64 - sent_at;
    TAKEN.lock().expect("no panic").push(taken as f64);
    LATCH.arrived();
}

struct Stamp(u64);

impl FromDelivery for Stamp {
    fn from_delivery(view: &View<'_>) -> Result<Self> {
        Ok(Self(sent_at(view.message().payload())))
    }
}

/// Sends with the expression once a millisecond. A macro, because the future of an async closure is not known to be `Send`.
macro_rules! each_millisecond {
    ($options:expr, $send:expr) => {{
        let n = $options.messages();
        LazyLock::force(&ZERO);
        TAKEN.lock().expect("no panic").reserve(n as usize);
        let mut ticks = tokio::time::interval(Duration::from_millis(1));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for _ in 0..n {
            ticks.tick().await;
            $send.await.expect("accepted");
        }
        LATCH.wait().await;
        percentiles()
    }};
}

fn percentiles() -> Numbers {
    let mut taken = std::mem::take(&mut *TAKEN.lock().expect("no panic"));
    taken.sort_by(f64::total_cmp);
    vec![("p50_us", percentile(&taken, 50.0) / 1e3), ("p99_us", percentile(&taken, 99.0) / 1e3)]
}

pub async fn mpsc(options: Options) -> Numbers {
    let (sender, mut receiver) = tokio::sync::mpsc::channel::<Vec<u8>>(CAPACITY);
    tokio::spawn(async move {
        while let Some(message) = receiver.recv().await {
            arrived(sent_at(&message));
        }
    });
    each_millisecond!(options, sender.send(stamp()))
}

pub async fn polymq(options: Options) -> Numbers {
    let bus = crate::polymq::bus().await;
    let _running = crate::polymq::run(&bus, |factory| {
        factory.route("orders", |stamp: Stamp| async move { arrived(stamp.0) });
    })
    .await;
    let queue = bus.queue("orders");
    each_millisecond!(options, queue.send_message(Message::new(stamp())))
}

#[subscriber("orders")]
async fn consume(frame: &crate::ruststream::Frame<'_>) -> HandlerOutcome {
    arrived(sent_at(frame.0));
    HandlerOutcome::ack()
}

pub async fn ruststream(options: Options) -> Numbers {
    let broker = MemoryBroker::new();
    let _running = crate::ruststream::start!(broker, consume);
    let publisher = broker.publisher();
    let message = || OutgoingMessage::produced("orders", BytesMut::from(stamp().as_slice()));
    each_millisecond!(options, publisher.publish(message(), None))
}
