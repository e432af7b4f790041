//! The typed client against a broker in this process: one file a topic.

mod bounds;
mod bus;
mod channels;
mod closing;
mod events;
mod losses;
mod polls;
mod queues;
mod requests;
mod server;
mod tokens;
mod transactions;

use std::time::Duration;

use std::{net::SocketAddr, sync::Arc};

use polymq_broker::Broker;
use polymq_core::{Backend, Bus, Delivery, Environment, Message, Registry, Settings, Subscription};
use polymq_kubemq::{KubeMq, KubeMqBackend, Policy};
use tokio::time::timeout;

const SECOND: Duration = Duration::from_secs(1);
/// How long something that must come may take.
const PATIENCE: Duration = Duration::from_secs(30);

async fn start() -> (Broker, KubeMq) {
    let broker = Broker::builder().listen("127.0.0.1:0").start().await.expect("a broker");
    let client = connect(&broker).await;
    (broker, client)
}

/// A broker that keeps its data in a folder, at an address where there may have been one before.
async fn start_again(folder: &std::path::Path, address: &str) -> Broker {
    Broker::builder().data_dir(folder).listen(address).start().await.expect("a broker")
}

async fn connect(broker: &Broker) -> KubeMq {
    let settings = Settings::from_url(&format!("kubemq://{}", broker.address())).expect("a URL");
    KubeMq::connect(&settings).await.expect("connect")
}

/// A bus of the broker at this address, or of what is between.
async fn bus(address: SocketAddr) -> Bus {
    bus_of(&format!("kubemq://{address}")).await
}

async fn bus_of(url: &str) -> Bus {
    let mut registry = Registry::new();
    let backend: Arc<dyn Backend> = Arc::new(KubeMqBackend);
    registry.add(backend).expect("one backend");
    let builder = Bus::builder().registry(registry).environment(Environment::default());
    builder.url(url).connect().await.expect("connect")
}

async fn next(subscription: &mut Subscription) -> Delivery {
    timeout(PATIENCE, subscription.next()).await.expect("in time").expect("received")
}

fn body(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().payload()).into_owned()
}

/// The next bodies, acknowledged.
async fn take(subscription: &mut Subscription, count: usize) -> Vec<String> {
    let mut taken = Vec::new();
    for _ in 0..count {
        let delivery = next(subscription).await;
        taken.push(body(&delivery));
        delivery.ack().await.expect("acknowledged");
    }
    taken
}

/// Nothing comes for longer than whatever was refused waits before it is tried again.
async fn quiet(subscription: &mut Subscription) {
    let more = subscription.receive(1, 3 * SECOND).await.expect("receive");
    assert!(more.is_empty(), "came although nothing may come: {:?}", more.iter().map(body).collect::<Vec<_>>());
}

fn bodies(messages: &[polymq_kubemq_proto::QueueMessage]) -> Vec<String> {
    messages.iter().map(|message| String::from_utf8_lossy(&message.body).into_owned()).collect()
}

/// Sends bodies to a queue, without a policy.
async fn fill(client: &KubeMq, queue: &str, bodies: impl IntoIterator<Item = String>) {
    let messages: Vec<_> = bodies.into_iter().map(Message::new).collect();
    for sent in client.send_batch(queue, &messages, &Policy::default()).await.expect("sent") {
        sent.expect("accepted");
    }
}

/// What waits in a queue.
async fn waiting(client: &KubeMq, queue: &str) -> Vec<polymq_kubemq_proto::QueueMessage> {
    client.peek(queue, 1024, SECOND).await.expect("peeked")
}
