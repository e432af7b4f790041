//! Servers that are not polymq's: each fallback of the client against one that needs it. See `stub.rs` for how they differ.

#![allow(missing_docs)]

mod client;
mod groups;
mod old;
mod queues;
mod stub;

use std::{sync::Arc, time::Duration};

use polymq_core::{Backend, Bus, ConsumeOptions, Delivery, Environment, Message, Registry, Subscription};
use polymq_kubemq::KubeMqBackend;
use tokio::time::timeout;

use crate::stub::{Age, Foreign};

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(30);

async fn start(age: Age) -> (Foreign, Bus) {
    let server = Foreign::start(age).await;
    let bus = connect(&server, &[]).await;
    (server, bus)
}

async fn connect(server: &Foreign, settings: &[(&str, &str)]) -> Bus {
    let mut registry = Registry::new();
    let backend: Arc<dyn Backend> = Arc::new(KubeMqBackend);
    registry.add(backend).expect("one backend");
    let builder = Bus::builder().registry(registry).environment(Environment::default()).url(&*server.url);
    settings.iter().fold(builder, |builder, (key, value)| builder.with(*key, *value)).connect().await.expect("connect")
}

fn group(name: &str) -> ConsumeOptions {
    ConsumeOptions { group: Some(name.to_owned()), ..ConsumeOptions::default() }
}

/// Sends bodies to a topic or queue, in order.
async fn send(channel: &polymq_core::Channel, bodies: impl IntoIterator<Item = u32>) {
    for body in bodies {
        channel.send_message(Message::new(body.to_string())).await.expect("sent");
    }
}

async fn next(subscription: &mut Subscription) -> Delivery {
    timeout(PATIENCE, subscription.next()).await.expect("in time").expect("received")
}

fn body(delivery: &Delivery) -> u32 {
    String::from_utf8_lossy(delivery.message().payload()).parse().expect("a number")
}

/// The next bodies, acknowledged.
async fn take(subscription: &mut Subscription, count: usize) -> Vec<u32> {
    let mut taken = Vec::new();
    for _ in 0..count {
        let delivery = next(subscription).await;
        taken.push(body(&delivery));
        delivery.ack().await.expect("acknowledged");
    }
    taken
}

/// Nothing comes for longer than a poll takes.
async fn quiet(subscription: &mut Subscription) {
    let more = subscription.receive(1, 3 * SECOND).await.expect("receive");
    assert!(more.is_empty(), "came although nothing may come: {:?}", more.iter().map(body).collect::<Vec<_>>());
}
