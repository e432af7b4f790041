//! The fault proxy before an echo server.

use std::{io, net::SocketAddr, time::Duration};

use polymq_testkit::{Direction, Proxy, eventually};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

const SOON: Duration = Duration::from_secs(60);
const QUIET: Duration = Duration::from_millis(150);

async fn echo() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.expect("accept");
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    address
}

async fn proxied() -> (Proxy, TcpStream) {
    let proxy = Proxy::start(echo().await).await.expect("a proxy");
    let client = TcpStream::connect(proxy.address()).await.expect("connect");
    (proxy, client)
}

async fn round_trip(client: &mut TcpStream, text: &str) -> io::Result<String> {
    client.write_all(text.as_bytes()).await?;
    let mut answer = vec![0; text.len()];
    timeout(SOON, client.read_exact(&mut answer)).await.map_err(|_| io::ErrorKind::TimedOut)??;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[tokio::test]
async fn it_forwards_many_connections_and_counts() {
    let (proxy, mut first) = proxied().await;
    let mut second = TcpStream::connect(proxy.address()).await.expect("connect");
    assert_eq!(round_trip(&mut first, "one").await.expect("echo"), "one");
    assert_eq!(round_trip(&mut second, "second").await.expect("echo"), "second");
    let stats = proxy.stats();
    assert_eq!((stats.accepted, stats.open, stats.up, stats.down, stats.resets), (2, 2, 9, 9, 0), "{stats:?}");
}

#[tokio::test]
async fn an_orderly_end_is_passed_on() {
    let (_proxy, mut client) = proxied().await;
    assert_eq!(round_trip(&mut client, "bye").await.expect("echo"), "bye");
    client.shutdown().await.expect("shutdown");
    assert_eq!(timeout(SOON, client.read(&mut [0; 8])).await.expect("soon").expect("no reset"), 0);
}

#[tokio::test]
async fn a_pause_holds_everything_back_and_loses_nothing() {
    let (proxy, mut client) = proxied().await;
    proxy.pause();
    client.write_all(b"held").await.expect("the kernel takes it");
    assert!(timeout(QUIET, client.read(&mut [0; 8])).await.is_err(), "nothing passes");
    proxy.resume();
    let mut answer = [0; 4];
    timeout(SOON, client.read_exact(&mut answer)).await.expect("soon").expect("read");
    assert_eq!(&answer, b"held");
}

#[tokio::test]
async fn one_direction_is_paused_alone() {
    let (proxy, mut client) = proxied().await;
    proxy.pause_one_way(Direction::Down);
    client.write_all(b"x").await.expect("write");
    assert!(timeout(QUIET, client.read(&mut [0; 8])).await.is_err());
    eventually(SOON, || async {
        let stats = proxy.stats();
        if (stats.up, stats.down) == (1, 0) { Ok(()) } else { Err(format!("{stats:?}")) }
    })
    .await;
}

#[tokio::test]
async fn a_reset_is_a_reset() {
    let (proxy, mut client) = proxied().await;
    assert_eq!(round_trip(&mut client, "one").await.expect("echo"), "one");
    proxy.reset_all();
    let error = timeout(SOON, client.read(&mut [0; 8])).await.expect("soon").expect_err("a reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let mut again = TcpStream::connect(proxy.address()).await.expect("new connections are served");
    assert_eq!(round_trip(&mut again, "two").await.expect("echo"), "two");
}

#[tokio::test]
async fn new_connections_are_refused() {
    let (proxy, mut client) = proxied().await;
    assert_eq!(round_trip(&mut client, "one").await.expect("echo"), "one");
    proxy.refuse(true);
    let mut other = TcpStream::connect(proxy.address()).await.expect("the listener is there");
    assert!(round_trip(&mut other, "x").await.is_err());
    assert_eq!(round_trip(&mut client, "old ones go on").await.expect("echo"), "old ones go on");
    proxy.refuse(false);
    let mut other = TcpStream::connect(proxy.address()).await.expect("connect");
    assert_eq!(round_trip(&mut other, "x").await.expect("echo"), "x");
}

#[tokio::test]
async fn latency_and_bandwidth_slow_down() {
    let (proxy, mut client) = proxied().await;
    proxy.latency(Duration::from_millis(100));
    let started = Instant::now();
    round_trip(&mut client, "x").await.expect("echo");
    assert!(started.elapsed() >= Duration::from_millis(200), "once each way");
    proxy.latency(Duration::ZERO);
    proxy.bandwidth(Some(2000));
    let started = Instant::now();
    round_trip(&mut client, &"x".repeat(1000)).await.expect("echo");
    assert!(started.elapsed() >= Duration::from_millis(500), "{:?}", started.elapsed());
}

#[tokio::test]
async fn it_cuts_in_the_middle_of_a_message() {
    let (proxy, mut client) = proxied().await;
    proxy.cut_after(Direction::Up, 5);
    assert!(proxy.will_cut());
    assert!(round_trip(&mut client, "0123456789").await.is_err());
    assert_eq!(proxy.stats().up, 5);
    assert!(!proxy.will_cut());
}

#[tokio::test]
async fn it_cuts_between_request_and_reply() {
    let (proxy, mut client) = proxied().await;
    proxy.cut_before_reply();
    assert!(round_trip(&mut client, "done and not known").await.is_err());
    assert_eq!((proxy.stats().up, proxy.stats().down), (18, 0));
}
