//! What the fuzz targets do with their input: talk to a broker in this process, over its own gRPC interface.
//!
//! The broker is one for all inputs, but for those with restarts, so what one leaves behind shows as memory that grows, for which libFuzzer has a
//! limit. Channels are named by the input's number and removed after it. A panic anywhere ends the process: libFuzzer
//! makes it an abort.

pub mod events;
pub mod queues;
pub mod requests;
pub mod restarts;

use std::{
    cell::OnceCell,
    sync::atomic::{AtomicU64, Ordering},
};

use polymq_broker::Broker;
use polymq_kubemq_proto::{Request, kubemq_client::KubemqClient, request::RequestType};
use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;

pub type Client = KubemqClient<Channel>;

struct World {
    runtime: Runtime,
    _broker: Broker,
    channel: Channel,
}

thread_local! {
    static WORLD: OnceCell<World> = const { OnceCell::new() };
}

impl World {
    fn new() -> Self {
        let runtime = runtime();
        let (broker, channel) = runtime.block_on(async {
            let broker = Broker::builder().listen("127.0.0.1:0").start().await.unwrap();
            let channel = connect(&broker).await;
            (broker, channel)
        });
        Self { runtime, _broker: broker, channel }
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

async fn connect(broker: &Broker) -> Channel {
    Channel::from_shared(format!("http://{}", broker.address())).unwrap().connect().await.unwrap()
}

/// What is there already, without waiting.
async fn at_once<T>(work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        done = work => Some(done),
        () = std::future::ready(()) => None,
    }
}

/// Runs one input's work: with a client, and a name that no other input has.
fn with_broker<F: Future<Output = ()>>(work: impl FnOnce(Channel, String) -> F) {
    static INPUTS: AtomicU64 = AtomicU64::new(0);
    WORLD.with(|world| {
        let world = world.get_or_init(World::new);
        let name = format!("f{}", INPUTS.fetch_add(1, Ordering::Relaxed));
        world.runtime.block_on(work(world.channel.clone(), name));
    });
}

/// Creates, deletes or lists channels.
async fn manage(client: &mut Client, operation: &str, kind: &str, channel: &str) -> Result<Vec<u8>, String> {
    let tags = [("channel_type", kind), ("channel", channel)];
    let request = Request {
        request_type_data: RequestType::Query.into(),
        client_id: "fuzz".into(),
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: operation.into(),
        timeout: 10_000,
        tags: tags.map(|(name, value)| (name.into(), value.into())).into(),
        ..Request::default()
    };
    let answer = client.send_request(request).await.unwrap().into_inner();
    if answer.executed { Ok(answer.body.to_vec()) } else { Err(answer.error) }
}
