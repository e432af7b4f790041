//! The typed client against a broker in this process: one file a topic.

mod bus;
mod channels;
mod closing;
mod events;
mod polls;
mod queues;
mod requests;
mod server;
mod transactions;

use std::time::Duration;

use polymq_broker::Broker;
use polymq_core::{Message, Settings};
use polymq_kubemq::{KubeMq, Policy};

const SECOND: Duration = Duration::from_secs(1);

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
