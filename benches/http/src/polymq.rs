//! polymq with its default settings but the window and the prefetch.

use std::net::SocketAddr;

use ::bytes::Bytes;
use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, WINDOW, payload},
    service::{self, Frame},
};
use polymq_core::{Bus, Channel, Environment, Message, Running, WhenFull};

use crate::raw;

/// A bus that sends to this address, and whose consumers would listen there.
pub async fn bus(address: SocketAddr) -> Bus {
    // Links the backend.
    let _ = polymq_http::NAME;
    let builder = Bus::builder().url(format!("http://{address}")).environment(Environment::default());
    builder.connect().await.expect("no I/O")
}

fn queue(bus: &Bus) -> Channel {
    bus.queue("orders").with_window(WINDOW, WhenFull::Wait)
}

/// A handler, and where it listens.
pub async fn serving() -> (Bus, Running, SocketAddr) {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("an address");
    drop(free);
    let bus = bus(address).await;
    let running = service::run(&bus, |factory| {
        factory.route("orders", |_: Frame| async {}).prefetch(2 * WINDOW);
    })
    .await;
    (bus, running, address)
}

/// The body is shared by all messages, as in the loops beside it.
async fn send_all(queue: &Channel, body: &Bytes, messages: u64) {
    for result in queue.send_all((0..messages).map(|_| Message::new(body.clone()))).await {
        result.expect("handled");
    }
}

/// Sends with polymq to whoever listens.
async fn sending(address: SocketAddr, options: &Options) -> Numbers {
    let bus = bus(address).await;
    let (queue, body) = (queue(&bus), Bytes::from(payload(options)));
    LATCH.expect(options.messages() + 2 * WINDOW as u64);
    send_all(&queue, &body, 2 * WINDOW as u64).await;
    let meter = Meter::start(options);
    send_all(&queue, &body, options.messages()).await;
    let numbers = meter.stop(options.messages());
    bus.close().await.expect("closed");
    numbers
}

pub async fn send(options: Options) -> Numbers {
    sending(raw::serving().await, &options).await
}

pub async fn serve(options: Options) -> Numbers {
    let (_bus, _running, address) = serving().await;
    raw::warmed(address, &options).await;
    let meter = Meter::start(&options);
    raw::post_all(address, &options, options.messages(), false).await;
    meter.stop(options.messages())
}

pub async fn both(options: Options) -> Numbers {
    let (_bus, _running, address) = serving().await;
    sending(address, &options).await
}

pub async fn idle(options: Options) -> Numbers {
    let (bus, running, _) = serving().await;
    running.stop().await.expect("stopped");
    service::idle(&bus, "orders", &options).await
}
