//! The best loops that can be written by hand on reqwest and axum.

use std::{net::SocketAddr, time::Duration};

use ::bytes::Bytes;
use axum::{Router, http::StatusCode, routing::post, serve::ListenerExt};
use futures::{StreamExt, stream};
use harness::{
    Meter, Numbers, Options,
    broker::{LATCH, WINDOW, handled, payload},
};
use reqwest::{Client, Url};
use tokio::net::TcpListener;

/// As any client that is meant to end has one.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Handles what is posted to `/orders`; answers when it has.
pub async fn serving() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let orders = post(async |body: Bytes| {
        handled(&body);
        StatusCode::NO_CONTENT
    });
    let listener = listener.tap_io(|stream| stream.set_nodelay(true).expect("a socket"));
    let service = Router::new().route("/orders", orders);
    tokio::spawn(async move { axum::serve(listener, service).await.expect("serving") });
    address
}

pub fn client() -> Client {
    let client = Client::builder().no_proxy().tcp_nodelay(true).timeout(TIMEOUT);
    client.pool_max_idle_per_host(WINDOW).build().expect("a client")
}

pub fn url(address: SocketAddr) -> Url {
    format!("http://{address}/orders").parse().expect("a URL")
}

pub async fn post_one(client: &Client, url: &Url, body: Bytes, id: bool) {
    let mut request = client.post(url.clone()).body(body);
    if id {
        request = request.header("idempotency-key", uuid::Uuid::now_v7().to_string());
    }
    let answer = request.send().await.expect("an answer");
    assert!(answer.status().is_success(), "{}", answer.status());
    answer.bytes().await.expect("read to its end");
}

/// As many tasks as requests may be on their way, each with one.
pub async fn post_all(address: SocketAddr, options: &Options, messages: u64, ids: bool) {
    let (client, url, body) = (client(), url(address), Bytes::from(payload(options)));
    let tasks = (0..WINDOW as u64).map(|task| {
        let (client, url, body) = (client.clone(), url.clone(), body.clone());
        let share = messages / WINDOW as u64 + u64::from(task < messages % WINDOW as u64);
        tokio::spawn(async move {
            for _ in 0..share {
                post_one(&client, &url, body.clone(), ids).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.expect("no panic");
    }
}

/// Connections are made before the clock starts.
pub async fn warmed(address: SocketAddr, options: &Options) {
    LATCH.expect(options.messages() + 2 * WINDOW as u64);
    post_all(address, options, 2 * WINDOW as u64, false).await;
}

pub async fn send(options: Options) -> Numbers {
    sending(options, false).await
}

/// With an id for each message, by which a receiver can tell a copy from another message.
pub async fn send_with_ids(options: Options) -> Numbers {
    sending(options, true).await
}

async fn sending(options: Options, ids: bool) -> Numbers {
    let address = serving().await;
    warmed(address, &options).await;
    let meter = Meter::start(&options);
    post_all(address, &options, options.messages(), ids).await;
    meter.stop(options.messages())
}

/// One task that polls as many requests at a time.
pub async fn send_stream(options: Options) -> Numbers {
    let address = serving().await;
    warmed(address, &options).await;
    let (client, url, body) = (client(), url(address), Bytes::from(payload(&options)));
    let meter = Meter::start(&options);
    let posts = stream::iter(0..options.messages()).map(|_| post_one(&client, &url, body.clone(), false));
    posts.buffer_unordered(WINDOW).collect::<()>().await;
    meter.stop(options.messages())
}

/// The same as [`send`], under the name of the other end.
pub async fn serve(options: Options) -> Numbers {
    sending(options, false).await
}
