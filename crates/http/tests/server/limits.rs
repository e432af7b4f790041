//! What senders may do, and no more.

use std::{net::SocketAddr, time::Duration};

use polymq_core::{Address, Connection, ConsumeOptions, Message};
use polymq_testkit::eventually;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    answered, awaited,
    peer::{PATIENCE, ask, listening, next, post, read, request},
};

#[tokio::test]
async fn c23_no_more_are_taken_than_were_asked_for() {
    let options = ConsumeOptions { prefetch: 2, ..ConsumeOptions::default() };
    // Nobody is cut for being slow, however long a busy machine takes.
    let limits = [("max_requests", "3"), ("idle_timeout", "120s"), ("body_timeout", "120s")];
    let (connection, mut consumer, address) = listening(&limits, &options).await;
    let senders = [post(address, "/in/orders", "1"), post(address, "/in/orders", "2")];
    let held = [next(&mut consumer).await, next(&mut consumer).await];
    let answer = answered(post(address, "/in/orders", "3")).await;
    assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("1")));
    assert!(answer.text().contains("as much as they may have"), "{}", answer.text());
    for incoming in held {
        consumer.settler().ack(incoming.token).await.expect("ack");
    }
    for sender in senders {
        assert_eq!(answered(sender).await.status(), 204);
    }
    // Bytes are counted too: no more are taken while this many wait.
    let options = ConsumeOptions { prefetch_bytes: 1000, ..ConsumeOptions::default() };
    let large = connection.consumer(&Address::queue("large"), &options).await.expect("consume");
    let sender = post(address, "/in/large", &"x".repeat(1500));
    awaited(large.as_ref(), 1).await;
    let answer = answered(post(address, "/in/large", "x")).await;
    assert_eq!(answer.status(), 503, "{}", answer.text());
    drop(large);
    assert_eq!(answered(sender).await.status(), 503, "given back");
    // Three that read their bodies slowly are as many as are served.
    let mut slow = Vec::new();
    for _ in 0..3 {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        let head = "POST /in/orders HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nx";
        stream.write_all(head.as_bytes()).await.expect("write");
        slow.push(stream);
    }
    eventually(PATIENCE, || async {
        let answer = ask(address, &request("POST", "/in/other", "", "")).await;
        if answer.status() == 503 { Ok(()) } else { Err(answer.status().to_string()) }
    })
    .await;
    drop(slow);
    eventually(PATIENCE, || async {
        let answer = ask(address, &request("POST", "/in/other", "", "")).await;
        if answer.status() == 404 { Ok(()) } else { Err(answer.status().to_string()) }
    })
    .await;
}

#[tokio::test]
async fn c23_slow_senders_are_cut_and_others_are_served_meanwhile() {
    let limits = [("header_timeout", "8s"), ("idle_timeout", "8s"), ("body_timeout", "12s")];
    let (_connection, mut consumer, address) = listening(&limits, &ConsumeOptions::default()).await;
    let mut streams = Vec::new();
    for begun in ["", "P", "PRI", "POST /in/orders HTTP/1.1\r\nHost"] {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        stream.write_all(begun.as_bytes()).await.expect("write");
        streams.push(stream);
    }
    let mut body = TcpStream::connect(address).await.expect("connect");
    body.write_all(b"POST /in/orders HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nx").await.expect("write");
    // Never silent, and never done: a byte now and then, of a header and of a body.
    let dripping =
        ["POST /in/orders HTTP/1.1\r\nX: ", "POST /in/orders HTTP/1.1\r\nHost: h\r\nContent-Length: 999\r\n\r\n"].map(
            |begun| {
                tokio::spawn(async move {
                    let mut stream = TcpStream::connect(address).await.expect("connect");
                    stream.write_all(begun.as_bytes()).await.expect("write");
                    let (mut reading, mut writing) = stream.split();
                    let mut answer = Vec::new();
                    let drip = async {
                        loop {
                            tokio::time::sleep(Duration::from_millis(50)).await;
                            if writing.write_all(b"x").await.is_err() {
                                std::future::pending::<()>().await;
                            }
                        }
                    };
                    tokio::select! {
                        // A connection that is cut may also be reset.
                        _ = reading.read_to_end(&mut answer) => {}
                        () = drip => {}
                    }
                    String::from_utf8_lossy(&answer).into_owned()
                })
            },
        );
    let sender = post(address, "/in/orders", "quick");
    let incoming = next(&mut consumer).await;
    consumer.settler().ack(incoming.token).await.expect("ack");
    assert_eq!(answered(sender).await.status(), 204);
    let answer = read(&mut body).await.expect("an answer");
    assert_eq!((answer.status(), answer.header("polymq-retry-after-ms")), (408, Some("0")), "nobody saw it");
    for stream in &mut streams {
        if let Some(answer) = tokio::time::timeout(PATIENCE, read(stream)).await.expect("it is cut in time") {
            assert_eq!(answer.status(), 408);
        }
    }
    for drip in dripping {
        let answer = tokio::time::timeout(PATIENCE, drip).await.expect("it is cut").expect("no panic");
        assert!(answer.is_empty() || answer.contains(" 408 "), "{answer}");
    }
}

/// Whoever sends more than it may is told so and cut off, whatever it announced; the memory of all bodies is bounded too.
#[tokio::test]
async fn c23_oversize_senders_are_cut_and_others_are_served_meanwhile() {
    let limits = [("max_payload", "100000"), ("max_buffered", "250000")];
    let (_connection, mut consumer, address) = listening(&limits, &ConsumeOptions::default()).await;
    for head in ["Content-Length: 10000000000", "Transfer-Encoding: chunked"] {
        let mut stream = TcpStream::connect(address).await.expect("connect");
        let head = format!("POST /in/orders HTTP/1.1\r\nHost: h\r\n{head}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.expect("write");
        let (mut reading, mut writing) = stream.into_split();
        let flood = tokio::spawn(async move {
            let chunk = format!("2710\r\n{}\r\n", "x".repeat(10_000));
            let mut written = 0;
            // It ends when the other side has closed.
            while writing.write_all(chunk.as_bytes()).await.is_ok() {
                written += chunk.len();
            }
            written
        });
        let mut answer = Vec::new();
        let told = tokio::time::timeout(PATIENCE, reading.read_to_end(&mut answer)).await.expect("cut in time");
        let answer = String::from_utf8_lossy(&answer).into_owned();
        // A reset may overtake the answer.
        assert!(answer.contains(" 413 ") || told.is_err(), "{answer}");
        let written = tokio::time::timeout(PATIENCE, flood).await.expect("it cannot go on").expect("no panic");
        assert!(written < 64 * 1024 * 1024, "{written} bytes were taken");
    }
    // Three bodies that nobody has handled yet are all that there is room for.
    let body = "x".repeat(80_000);
    let senders: Vec<_> = (0..3).map(|_| post(address, "/in/orders", &body)).collect();
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(next(&mut consumer).await);
    }
    let answer = answered(post(address, "/in/orders", &body)).await;
    assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("1")), "{}", answer.text());
    let small = post(address, "/in/orders", "small");
    held.push(next(&mut consumer).await);
    for incoming in held {
        consumer.settler().ack(incoming.token).await.expect("ack");
    }
    for sender in senders.into_iter().chain([small]) {
        assert_eq!(answered(sender).await.status(), 204);
    }
}

/// Asks, and never takes what is answered.
async fn ask_over_http1(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).await.expect("connect");
    stream.write_all(request("POST", "/in/orders", "", "x").as_bytes()).await.expect("write");
    std::future::pending::<()>().await;
}

/// The same with a window of so many bytes; what the protocol asks on the way is answered.
async fn ask_over_http2(address: SocketAddr, window: u32) {
    let stream = TcpStream::connect(address).await.expect("connect");
    let builder = h2::client::Builder::new().initial_window_size(window).handshake::<_, bytes::Bytes>(stream).await;
    let (mut client, connection) = builder.expect("HTTP/2");
    let asked = http::Request::post(format!("http://{address}/in/orders")).body(()).expect("a request");
    let (answer, _) = client.send_request(asked, true).expect("sent");
    let (_, _answer) = tokio::join!(connection, answer);
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn c23_an_answer_that_nobody_takes_is_given_up() {
    let limits = [("idle_timeout", "1s"), ("body_timeout", "1s"), ("drain_timeout", "1h")];
    for window in [None, Some(0), Some(1)] {
        let (_connection, mut consumer, address) = listening(&limits, &ConsumeOptions::default()).await;
        let asking = tokio::spawn(async move {
            match window {
                None => ask_over_http1(address).await,
                Some(window) => ask_over_http2(address, window).await,
            }
        });
        let incoming = next(&mut consumer).await;
        let answer = Message::new(vec![b'x'; 64 << 20]);
        consumer.settler().answer(incoming.token, &answer).expect("HTTP answers").await.expect("told");
        // It waits for what is not written, for as long as an hour.
        let closed = tokio::time::timeout(PATIENCE, consumer.close()).await;
        closed.unwrap_or_else(|_| panic!("held for a client with the window {window:?}")).expect("closed");
        asking.abort();
    }
}
