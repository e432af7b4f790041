//! Requests that begin and do not end: bounded for all connections together.

use std::{result::Result, time::Duration};

use bytes::Bytes;
use http_body::Frame;
use polymq_broker::{Broker, Limits};
use polymq_kubemq_proto::*;
use tonic::{Code, Status, body::Body, client::GrpcService as _, codegen::http, transport::Channel};

use crate::common::*;

/// What a sender of raw bytes has to send.
struct Pieces(tokio::sync::mpsc::Receiver<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Status>>> {
        self.0.poll_recv(context).map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

/// Begins a request of some size and sends a part of it. What it gives keeps the request open.
async fn begin(
    channel: &Channel,
    call: &str,
    size: u32,
    part: usize,
) -> (tokio::sync::mpsc::Sender<Bytes>, tokio::task::JoinHandle<http::Response<Body>>) {
    let (pieces, sent) = tokio::sync::mpsc::channel(1);
    let request = http::Request::post(format!("http://broker/kubemq.kubemq/{call}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(Body::new(Pieces(sent)))
        .unwrap();
    let mut channel = channel.clone();
    std::future::poll_fn(|context| channel.poll_ready(context)).await.unwrap();
    let answer = tokio::spawn(async move { channel.call(request).await.unwrap() });
    let [a, b, c, d] = size.to_be_bytes();
    // Numbers in a field that no request has: what is whole can be decoded.
    for piece in [vec![0, a, b, c, d], [15 << 3, 0].repeat(part / 2)] {
        // Who is refused at once sends no more.
        let _ = pieces.send(Bytes::from(piece)).await;
    }
    (pieces, answer)
}

/// The status that ends an answer.
async fn status(answer: http::Response<Body>) -> (String, String) {
    let (head, mut body) = answer.into_parts();
    let mut headers = head.headers;
    while let Some(frame) =
        std::future::poll_fn(|context| http_body::Body::poll_frame(std::pin::Pin::new(&mut body), context)).await
    {
        if let Ok(trailers) = frame.unwrap().into_trailers() {
            headers = trailers;
        }
    }
    let text = |name: &str| headers.get(name).map_or(String::new(), |value| value.to_str().unwrap().to_owned());
    (text("grpc-status"), text("grpc-message"))
}

async fn sent(client: &mut Client, bytes: usize) -> Result<(), Status> {
    let answer = client.send_queue_message(message("orders", vec![b'x'; bytes])).await?.into_inner();
    assert!(!answer.is_error, "{answer:?}");
    Ok(())
}

/// Until all of so many bytes have reached the broker.
async fn come(broker: &Broker, bytes: usize) {
    let count = async {
        while requests_bytes(broker).await < bytes {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), count).await.expect("the bytes come");
}

/// Until fewer than so many bytes are left.
async fn gone(broker: &Broker, bytes: usize) {
    let count = async {
        while requests_bytes(broker).await >= bytes {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), count).await.expect("the bytes go");
}

async fn requests_bytes(broker: &Broker) -> usize {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut stream = tokio::net::TcpStream::connect(broker.http_address().unwrap()).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n").await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("polymq_broker_requests_bytes ")).unwrap();
    line.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_received_requests_are_bounded_for_all_connections_together() {
    let limits = Limits { requests: 4 << 20, ..Limits::default() };
    let broker = Broker::builder().listen("127.0.0.1:0").http("127.0.0.1:0").limits(limits).start().await.unwrap();
    let mut honest = client(&broker).await;
    sent(&mut honest, 1 << 20).await.unwrap();

    // Three connections, a megabyte and a little each of a request that never ends.
    let mut begun = Vec::new();
    for call in ["SendQueueMessage", "QueuesUpstream", "SendEventsStream"] {
        let channel = channel(&broker).await;
        begun.push((begin(&channel, call, 50 << 20, 1_100_000).await, channel));
    }
    come(&broker, 3_300_000).await;
    let refused = sent(&mut honest, 1 << 20).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("the most this broker allows is 4194304"), "{refused}");
    sent(&mut honest, 10_000).await.unwrap();

    // Who goes on is refused too, on a stream of requests as in a call with one.
    let mut others = Vec::new();
    for ((pieces, answer), channel) in begun {
        // It may be cut while it still sends.
        let _ = pieces.send(Bytes::from(vec![0; 1_000_000])).await;
        let answer = tokio::time::timeout(Duration::from_secs(30), answer).await.expect("an answer").unwrap();
        let (code, what) = status(answer).await;
        assert_eq!(code, (Code::ResourceExhausted as i32).to_string(), "{what}");
        drop((pieces, channel));
        gone(&broker, 3_300_000).await;
        // The first to go makes room for the next; so fill it again.
        let filled = self::channel(&broker).await;
        let kept = begin(&filled, "SendQueueMessage", 50 << 20, 1_100_000).await;
        come(&broker, 3_300_000).await;
        others.push((kept, filled));
    }
    drop(others);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strangers_request_is_refused_unread() {
    let file = |name: &str| std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokens").join(name);
    let limits = Limits { requests: 4 << 20, ..Limits::default() };
    let builder = Broker::builder().listen("127.0.0.1:0").http("127.0.0.1:0").limits(limits);
    let builder = builder.token_key("HS256".parse().unwrap(), file("HS256.key"));
    let broker = builder.start().await.unwrap();
    let mut honest = client_with(&broker, &std::fs::read_to_string(file("HS256.token")).unwrap()).await;
    let mut begun = Vec::new();
    for call in ["SendQueueMessage", "QueuesUpstream", "SendEventsStream", "SendRequest", "QueuesDownstream"] {
        let channel = channel(&broker).await;
        let (pieces, answer) = begin(&channel, call, 50 << 20, 1_000_000).await;
        let answer =
            tokio::time::timeout(Duration::from_secs(30), answer).await.expect("it is not waited for").unwrap();
        let (code, what) = status(answer).await;
        assert_eq!(code, (Code::Unauthenticated as i32).to_string(), "{call}: {what}");
        begun.push((pieces, channel));
    }
    assert_eq!(requests_bytes(&broker).await, 0);
    sent(&mut honest, 3 << 20).await.unwrap();
    drop((begun, honest));
    broker.stop().await;
}

/// Its connection may live on; another stream that is between two requests is left alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_stays_unfinished_is_refused_and_gives_its_room_back() {
    let limits = Limits { request_idle: Duration::from_millis(500), requests: 30_000, ..Limits::default() };
    let broker = Broker::builder().listen("127.0.0.1:0").http("127.0.0.1:0").limits(limits).start().await.unwrap();
    let mut honest = client(&broker).await;
    let (requests, stream) = tokio::sync::mpsc::channel(1);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = honest.queues_upstream(stream).await.unwrap().into_inner();
    let upstream =
        || QueuesUpstreamRequest { request_id: "r".into(), messages: vec![message("orders", b"x".to_vec())] };
    requests.send(upstream()).await.unwrap();
    assert!(!answers.message().await.unwrap().unwrap().results[0].is_error);

    // The last one is whole, but for the end of its call.
    let mut begun = Vec::new();
    for (call, size, part) in [
        ("SendQueueMessage", 50_000, 20_000),
        ("QueuesUpstream", 50_000, 20_000),
        ("SendQueueMessage", 20_000, 20_000_usize),
    ] {
        let channel = channel(&broker).await;
        let (pieces, answer) = begin(&channel, call, size, part).await;
        let answer = tokio::time::timeout(Duration::from_secs(30), answer).await.expect("an answer").unwrap();
        let (code, what) = status(answer).await;
        assert_eq!(code, (Code::DeadlineExceeded as i32).to_string(), "{call}: {what}");
        let told: &[&str] =
            if size as usize > part { &["50000", "20000", "500ms"] } else { &["but%20its%20end", "500ms"] };
        assert!(told.iter().all(|told| what.contains(told)), "{call}: {what}");
        begun.push((pieces, channel));
        // The next one needs the room.
        gone(&broker, 1).await;
    }
    requests.send(upstream()).await.unwrap();
    assert!(!answers.message().await.unwrap().unwrap().results[0].is_error, "it was between two requests");
    drop((begun, requests, answers, honest));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_worked_on_or_cut_is_counted_no_more() {
    let limits = Limits { requests: 4 << 20, ..Limits::default() };
    let broker = Broker::builder().listen("127.0.0.1:0").http("127.0.0.1:0").limits(limits).start().await.unwrap();
    let mut honest = client(&broker).await;
    {
        let channel = channel(&broker).await;
        let _begun = begin(&channel, "QueuesUpstream", 50 << 20, 3_000_000).await;
        come(&broker, 3_000_000).await;
    }
    // The task that holds the channel's request ends with its runtime's next turn.
    let again = async {
        while requests_bytes(&broker).await > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), again).await.expect("what a connection held goes with it");

    let (requests, stream) = tokio::sync::mpsc::channel(1);
    let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
    let mut answers = honest.queues_upstream(stream).await.unwrap().into_inner();
    for _ in 0..10 {
        let messages = vec![message("orders", vec![b'x'; 2 << 20])];
        requests.send(QueuesUpstreamRequest { request_id: "r".into(), messages }).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert!(!answer.results[0].is_error, "{answer:?}");
    }
    for _ in 0..10 {
        sent(&mut honest, 2 << 20).await.unwrap();
    }
    let again = async {
        while requests_bytes(&broker).await > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), again).await.expect("nothing is under way");
    broker.stop().await;
}
