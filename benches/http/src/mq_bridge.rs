//! mq-bridge's HTTP endpoints, as many requests at a time as the others have.

use std::net::SocketAddr;

use ::bytes::Bytes;
use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, WINDOW, handled, payload},
};
use mq_bridge::{
    CanonicalMessage, SentBatch,
    endpoints::http::{HttpConsumer, HttpPublisher},
    models::HttpConfig,
    traits::{MessageConsumer, MessageDisposition, MessagePublisher},
};

use crate::raw;

fn config(url: String) -> HttpConfig {
    HttpConfig { batch_concurrency: Some(WINDOW), internal_buffer_size: Some(2 * WINDOW), ..HttpConfig::new(url) }
}

pub async fn publisher(address: SocketAddr) -> HttpPublisher {
    // It makes a TLS configuration for every URL, of the process's default. A second one changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
    HttpPublisher::new(&config(raw::url(address).into())).await.expect("a publisher")
}

/// A loop that handles what comes, and where it listens.
pub async fn serving() -> SocketAddr {
    let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = free.local_addr().expect("an address");
    drop(free);
    let mut consumer = HttpConsumer::new(&config(address.to_string())).await.expect("it listens");
    tokio::spawn(async move {
        loop {
            let received = consumer.receive_batch(WINDOW).await.expect("messages");
            received.messages.iter().for_each(|message| handled(&message.payload));
            let dispositions = received.messages.iter().map(|_| MessageDisposition::Ack).collect();
            (received.commit)(dispositions).await.expect("committed");
        }
    });
    address
}

/// Batches far larger than the window, so that waiting for the end of each costs little.
async fn send_all(publisher: &HttpPublisher, options: &Options, messages: u64) {
    const BATCH: u64 = 20 * WINDOW as u64;
    let (body, mut left) = (Bytes::from(payload(options)), messages);
    while left > 0 {
        let count = left.min(BATCH);
        let batch = (0..count).map(|_| CanonicalMessage::new_bytes(body.clone(), None)).collect();
        // Bodies of answers come back as a batch that is partial, with nothing in it that failed.
        if let SentBatch::Partial { failed, .. } = publisher.send_batch(batch).await.expect("sent") {
            assert!(failed.is_empty(), "{:?}", failed[0].1);
        }
        left -= count;
    }
}

async fn sending(address: SocketAddr, options: &Options) -> Numbers {
    let publisher = publisher(address).await;
    LATCH.expect(options.messages() + 2 * WINDOW as u64);
    send_all(&publisher, options, 2 * WINDOW as u64).await;
    let meter = Meter::start(options);
    send_all(&publisher, options, options.messages()).await;
    meter.stop(options.messages())
}

pub async fn send(options: Options) -> Numbers {
    sending(raw::serving().await, &options).await
}

pub async fn serve(options: Options) -> Numbers {
    let address = serving().await;
    raw::warmed(address, &options).await;
    let meter = Meter::start(&options);
    raw::post_all(address, &options, options.messages(), false).await;
    meter.stop(options.messages())
}

pub async fn both(options: Options) -> Numbers {
    sending(serving().await, &options).await
}
