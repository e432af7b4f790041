//! One message every five milliseconds, and how long each is under way to its handler, through the emulator.

use std::{
    sync::{LazyLock, Mutex},
    time::{Duration, Instant},
};

use harness::{Numbers, Options, broker::LATCH, percentile, service};
use polymq_core::{FromDelivery, Message, Result, View};

use crate::{queue, raw as bare};

static ZERO: LazyLock<Instant> = LazyLock::new(Instant::now);
static TAKEN: Mutex<Vec<f64>> = Mutex::new(Vec::new());

/// The time of sending, and text up to 256 characters.
fn stamp() -> String {
    format!("{:<256}", ZERO.elapsed().as_nanos())
}

fn arrived(body: &[u8]) {
    let sent_at: u64 = std::str::from_utf8(body).ok().and_then(|text| text.trim_end().parse().ok()).expect("a time");
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

/// Sends with the expression, at the beat. A macro, because the future of an async closure is not known to be `Send`.
macro_rules! at_the_beat {
    ($options:expr, $send:expr) => {{
        LazyLock::force(&ZERO);
        // The first poll is waiting by then.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut ticks = tokio::time::interval(Duration::from_millis(5));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        for _ in 0..$options.messages() {
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
    let client = bare::client(&options);
    let url = bare::create(&client, &queue()).await;
    let reading = tokio::spawn({
        let (client, url) = (client.clone(), url.clone());
        async move {
            while LATCH.remaining() > 0 {
                let messages = bare::poll(&client, &url).await;
                messages.iter().for_each(|message| arrived(message.body().unwrap_or_default().as_bytes()));
                let (client, url) = (client.clone(), url.clone());
                tokio::spawn(async move { bare::acknowledge(&client, &url, messages).await });
            }
        }
    });
    let numbers = at_the_beat!(options, {
        let request = client.send_message().queue_url(&url).message_body(stamp());
        tokio::spawn(async move { drop(request.send().await.expect("sent")) });
    });
    reading.await.expect("no panic");
    bare::expect_left(&client, &url, 0).await;
    numbers
}

pub async fn polymq(options: Options) -> Numbers {
    let bus = crate::polymq::connect(&options).await;
    let running = service::run(&bus, |factory| {
        factory.route(queue(), |_: Stamp| async {});
    })
    .await;
    let channel = bus.queue(queue());
    let numbers = at_the_beat!(options, {
        drop(channel.enqueue(Message::new(stamp())).await.expect("taken"));
    });
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
    numbers
}
