//! What consumers do, against peers that know nothing of polymq. The contract itself is tested by the shared suite.

#![allow(missing_docs, unreachable_pub)]

mod peer;

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use peer::{Exchange, PATIENCE, ask, ask_over, bus, free_url, order, post, read, request};
use polymq_core::{
    Address, Attempt, Backoff, Connection, ConsumeOptions, Consumer, ConsumerFactory, ConsumerRunner, DeadLetters,
    Delivery, ErrorKind, Failure, FailurePolicy, Incoming, Message, Retry, RetryMode, Running, Settings, Subscription,
};
use polymq_http::HttpConnection;
use polymq_testkit::eventually;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
};

/// A connection that listens, with the consumer of one queue.
async fn listening(
    settings: &[(&str, &str)],
    options: &ConsumeOptions,
) -> (HttpConnection, Box<dyn Consumer>, SocketAddr) {
    let here = Settings::new().with("listen", "127.0.0.1:0/in");
    let settings = settings.iter().fold(here, |settings, (key, value)| settings.with(*key, *value));
    let connection = HttpConnection::connect(&settings).expect("valid settings");
    let consumer = connection.consumer(&Address::queue("orders"), options).await.expect("listen");
    let address = connection.local_address().await.expect("it listens");
    (connection, consumer, address)
}

async fn plain() -> (HttpConnection, Box<dyn Consumer>, SocketAddr) {
    listening(&[], &ConsumeOptions::default()).await
}

async fn next(consumer: &mut Box<dyn Consumer>) -> Incoming {
    let mut received = Vec::new();
    tokio::time::timeout(PATIENCE, consumer.receive(1, &mut received)).await.expect("in time").expect("receive");
    received.remove(0)
}

async fn answered(sender: JoinHandle<Exchange>) -> Exchange {
    sender.await.expect("the sender")
}

#[tokio::test]
async fn an_acknowledgement_is_204_and_the_connection_goes_on() {
    let (_connection, mut consumer, address) = plain().await;
    let mut stream = TcpStream::connect(address).await.expect("connect");
    for n in 0..3 {
        let body = format!("{{\"id\":{n}}}");
        let headers = "content-type: application/json\r\nTenant: acme\r\nce-id: o-1\r\nce-type: order%20created\r\n";
        let asking = request("POST", "/in/orders", headers, &body);
        let (answer, ()) = tokio::join!(ask_over(&mut stream, &asking), async {
            let incoming = next(&mut consumer).await;
            let message = &incoming.message;
            assert_eq!(message.payload(), body.as_bytes());
            assert_eq!((message.content_type(), message.kind()), (Some("application/json"), Some("order created")));
            assert_eq!(message.headers().get("tenant"), Some("acme"));
            consumer.settler().ack(incoming.token).await.expect("ack");
        });
        assert_eq!((answer.status(), answer.text().as_str()), (204, ""));
    }
}

#[tokio::test]
async fn every_settlement_is_told_to_the_sender() {
    let (_connection, mut consumer, address) = plain().await;
    let settler = consumer.settler();

    let sender = post(address, "/in/orders", "retry");
    let incoming = next(&mut consumer).await;
    settler.retry(incoming.token, &incoming.message, 2, Duration::from_millis(1200)).await.expect("retry");
    let answer = answered(sender).await;
    assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("2")), "never too early");
    assert_eq!((answer.header("polymq-retry-after-ms"), answer.header("polymq-attempt")), (Some("1200"), Some("2")));

    let sender = post(address, "/in/orders", "reject");
    let incoming = next(&mut consumer).await;
    settler.reject(incoming.token, "no such \"customer\"").await.expect("reject");
    let answer = answered(sender).await;
    assert_eq!((answer.status(), answer.header("content-type")), (422, Some("application/problem+json")));
    assert!(answer.text().contains(r#"no such \"customer\""#), "{}", answer.text());

    let sender = post(address, "/in/orders", "release");
    let incoming = next(&mut consumer).await;
    settler.release(incoming.token, incoming.message);
    let answer = answered(sender).await;
    assert_eq!(
        (answer.status(), answer.header("retry-after"), answer.header("polymq-attempt")),
        (503, Some("1"), None)
    );

    let sender = post(address, "/in/orders", "answer");
    let incoming = next(&mut consumer).await;
    let value = Message::new("{\"price\":5}").with_content_type("application/json").with_kind("price");
    settler.answer(incoming.token, &value).expect("HTTP answers").await.expect("answer");
    let answer = answered(sender).await;
    assert_eq!((answer.status(), answer.text().as_str()), (200, "{\"price\":5}"));
    assert_eq!((answer.header("content-type"), answer.header("ce-type")), (Some("application/json"), Some("price")));

    let error = settler.ack(incoming.token).await.expect_err("settled before");
    assert_eq!(error.kind(), ErrorKind::Stale);
}

#[tokio::test]
async fn what_is_no_message_for_us_is_refused_with_its_reason() {
    let (_connection, mut consumer, address) =
        listening(&[("max_payload", "1000"), ("busy_retry", "0s")], &ConsumeOptions::default()).await;
    let long = "x".repeat(1001);
    let many = format!("x-long: {}\r\n", "x".repeat(200_000));
    let chunked =
        format!("POST /in/orders HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3e9\r\n{long}\r\n0\r\n\r\n");
    for (bytes, status) in [
        (request("POST", "/in/other", "", "x"), 404),
        (request("POST", "/orders", "", "x"), 404),
        (request("GET", "/in/orders", "", ""), 405),
        (request("POST", "/in/orders", "", &long), 413),
        (chunked, 413),
        (request("POST", "/in/orders", "ce-type: %ff\r\n", "x"), 400),
        (request("POST", "/in/%ff", "", "x"), 400),
        (request("POST", "/in/orders", &many, "x"), 431),
        ("BROKEN\r\n\r\n".to_owned(), 400),
    ] {
        let answer = ask(address, &bytes).await;
        assert_eq!(answer.status(), status, "{}", bytes.lines().next().unwrap_or_default());
        if status == 405 {
            assert_eq!(answer.header("allow"), Some("POST"));
        }
    }
    let sender = post(address, "/in/orders", "fine");
    let incoming = next(&mut consumer).await;
    assert_eq!(&incoming.message.payload()[..], b"fine", "nothing of the above arrived");
    consumer.settler().ack(incoming.token).await.expect("ack");
    assert_eq!(answered(sender).await.status(), 204);
}

#[tokio::test]
async fn c23_no_more_are_taken_than_were_asked_for() {
    let options = ConsumeOptions { prefetch: 2, ..ConsumeOptions::default() };
    let (connection, mut consumer, address) = listening(&[("max_requests", "3")], &options).await;
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
    let limits = [("header_timeout", "500ms"), ("idle_timeout", "500ms"), ("body_timeout", "1500ms")];
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
                    let started = Instant::now();
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
                    (String::from_utf8_lossy(&answer).into_owned(), started.elapsed())
                })
            },
        );
    let started = Instant::now();
    let sender = post(address, "/in/orders", "quick");
    let incoming = next(&mut consumer).await;
    consumer.settler().ack(incoming.token).await.expect("ack");
    assert_eq!(answered(sender).await.status(), 204);
    assert_eq!(read(&mut body).await.expect("an answer").status(), 408);
    for stream in &mut streams {
        if let Some(answer) = tokio::time::timeout(PATIENCE, read(stream)).await.expect("it is cut in time") {
            assert_eq!(answer.status(), 408);
        }
    }
    for (drip, most) in dripping.into_iter().zip([2500, 4000]) {
        let (answer, took) = tokio::time::timeout(PATIENCE, drip).await.expect("it is cut").expect("no panic");
        assert!(took.as_millis() < most, "cut after {took:?}: {answer}");
        assert!(answer.is_empty() || answer.contains(" 408 "), "{answer}");
    }
    assert!(started.elapsed() < Duration::from_secs(5), "cut after {:?}", started.elapsed());
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

/// Waits until as many senders wait for an answer of this consumer.
async fn awaited(consumer: &dyn Consumer, count: usize) {
    eventually(PATIENCE, || async {
        let shown = format!("{:?}", consumer.settler());
        if shown.contains(&format!("awaited: {count}")) { Ok(()) } else { Err(shown) }
    })
    .await;
}

#[tokio::test]
async fn a_sender_that_has_gone_away_keeps_its_message() {
    let (_connection, mut consumer, address) = plain().await;
    let sender = post(address, "/in/orders", "gone while it is handled");
    let incoming = next(&mut consumer).await;
    sender.abort();
    awaited(consumer.as_ref(), 0).await;
    let error = consumer.settler().ack(incoming.token).await.expect_err("nobody waits");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Stale, Retry::Now));

    let early = post(address, "/in/orders", "gone before it is handled");
    awaited(consumer.as_ref(), 1).await;
    early.abort();
    awaited(consumer.as_ref(), 0).await;
    let sender = post(address, "/in/orders", "stays");
    let incoming = next(&mut consumer).await;
    assert_eq!(&incoming.message.payload()[..], b"stays", "the other is not handled, its sender would not know");
    consumer.settler().ack(incoming.token).await.expect("ack");
    assert_eq!(answered(sender).await.status(), 204);
}

#[tokio::test]
async fn a_path_without_a_consumer_is_no_mistake_while_the_service_starts() {
    let (connection, _consumer, address) = listening(&[("busy_retry", "1h")], &ConsumeOptions::default()).await;
    let early = request("POST", "/in/invoices", "", "x");
    let answer = ask(address, &early).await;
    assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("3600")));
    let mut consumer =
        connection.consumer(&Address::queue("invoices"), &ConsumeOptions::default()).await.expect("its consumer");
    let sender = post(address, "/in/invoices", "x");
    let incoming = next(&mut consumer).await;
    consumer.settler().ack(incoming.token).await.expect("ack");
    assert_eq!(answered(sender).await.status(), 204);
}

#[tokio::test]
async fn closing_sends_everyone_away_who_may_come_again() {
    let (connection, mut consumer, address) = plain().await;
    let waiting = post(address, "/in/orders", "not received");
    let held = post(address, "/in/orders", "received");
    let incoming = next(&mut consumer).await;
    // One of the two is received, the other waits.
    awaited(consumer.as_ref(), 2).await;
    consumer.close().await.expect("close");
    consumer.close().await.expect("a second call does nothing");
    let answer = answered(post(address, "/in/orders", "late")).await;
    assert_eq!((answer.status(), answer.header("retry-after")), (503, Some("1")), "not 404: it may come back");
    let error = consumer.receive(1, &mut Vec::new()).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed);
    // What was received can still be settled.
    consumer.settler().ack(incoming.token).await.expect("ack");
    let mut statuses = [answered(waiting).await.status(), answered(held).await.status()];
    statuses.sort_unstable();
    assert_eq!(statuses, [204, 503]);

    let mut consumer = connection.consumer(&Address::queue("orders"), &ConsumeOptions::default()).await.expect("again");
    let held = post(address, "/in/orders", "unsettled");
    let incoming = next(&mut consumer).await;
    connection.close().await.expect("close");
    assert_eq!(answered(held).await.status(), 503);
    let error = consumer.settler().ack(incoming.token).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
    connection.close().await.expect("a second call does nothing");
    let error = connection.consumer(&Address::queue("orders"), &ConsumeOptions::default()).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn consumers_of_one_path_share_it_and_a_topic_has_one() {
    let (connection, mut first, address) = plain().await;
    let mut second = connection.consumer(&Address::queue("orders"), &ConsumeOptions::default()).await.expect("another");
    let senders = [post(address, "/in/orders", "1"), post(address, "/in/orders", "2")];
    for consumer in [&mut first, &mut second] {
        let incoming = next(consumer).await;
        consumer.settler().ack(incoming.token).await.expect("ack");
    }
    for sender in senders {
        assert_eq!(answered(sender).await.status(), 204);
    }
    let topic = Address::topic("prices");
    let only = connection.consumer(&topic, &ConsumeOptions::default()).await.expect("a topic's subscriber");
    let error = connection.consumer(&topic, &ConsumeOptions::default()).await.expect_err("a second one");
    assert_eq!(error.kind(), ErrorKind::Conflict);
    drop(only);
    connection.consumer(&topic, &ConsumeOptions::default()).await.expect("in its place");
}

#[tokio::test]
async fn c19_method_and_path_of_a_consumer_can_be_chosen() {
    let (connection, _orders, address) = listening(&[("accept_token", "s3cret")], &ConsumeOptions::default()).await;
    let extra = vec![("method".to_owned(), "get".to_owned()), ("endpoint".to_owned(), "/v1/price list".to_owned())];
    let options = ConsumeOptions { extra, ..ConsumeOptions::default() };
    let mut prices = connection.consumer(&Address::queue("prices"), &options).await.expect("consume");
    let token = "Authorization: Bearer s3cret\r\n";
    assert_eq!(ask(address, &request("POST", "/v1/price%20list", token, "")).await.status(), 405);
    for wrong in ["", "Authorization: Bearer wrong!\r\n", "Authorization: Basic s3cret\r\n"] {
        let answer = ask(address, &request("GET", "/v1/price%20list", wrong, "")).await;
        assert_eq!((answer.status(), answer.header("www-authenticate")), (401, Some("Bearer")));
    }
    let asking = request("GET", "/v1/price%20list", token, "");
    let (answer, ()) = tokio::join!(ask(address, &asking), async {
        let incoming = next(&mut prices).await;
        assert!(incoming.message.headers().get("authorization").is_none(), "credentials are not a message's");
        prices.settler().answer(incoming.token, &Message::new("5")).expect("HTTP answers").await.expect("answer");
    });
    assert_eq!((answer.status(), answer.text().as_str()), (200, "5"));
    for (key, value) in [("endpoint", "http://x/"), ("methode", "GET"), ("method", "SHOUT")] {
        let options = ConsumeOptions { extra: vec![(key.into(), value.into())], ..ConsumeOptions::default() };
        assert!(connection.consumer(&Address::queue("x"), &options).await.is_err(), "{key}={value}");
    }
}

#[tokio::test]
async fn one_port_speaks_both_versions() {
    let (_connection, mut consumer, address) = plain().await;
    let client = |http2: &str| {
        let sending = HttpConnection::connect(&Settings::new().with("http2", http2)).expect("valid settings");
        sending.native().clone()
    };
    let (one, two) = (client("off"), client("only"));
    let settler = consumer.settler();
    let acknowledging = tokio::spawn(async move {
        for _ in 0..20 {
            let incoming = next(&mut consumer).await;
            settler.ack(incoming.token).await.expect("ack");
        }
        consumer
    });
    for n in 0..10 {
        for (client, version) in [(&one, http::Version::HTTP_11), (&two, http::Version::HTTP_2)] {
            let answer =
                client.post(format!("http://{address}/in/orders")).body(n.to_string()).send().await.expect("sent");
            assert_eq!((answer.status().as_u16(), answer.version()), (204, version));
        }
    }
    drop(acknowledging.await.expect("20 messages"));
    let bus = bus(&format!("http://{address}/in?http2=only&listen=127.0.0.1:0")).await;
    let error = bus.queue("orders").send_message(order(1)).await.expect_err("its consumer has ended");
    assert_eq!(error.kind(), ErrorKind::Busy, "over HTTP/2: {error}");
}

/// A service on a bus whose consumers listen where its messages are sent.
async fn service(policy: FailurePolicy, url: &str) -> (polymq_core::Bus, Running) {
    async fn handle(order: String, attempt: Attempt) -> Result<(), Failure> {
        match (order.as_str(), attempt.0) {
            ("bad", _) => Err(Failure::permanent("no such customer")),
            ("broken", 1..3) => Err(Failure::new("the printer is out of paper")),
            ("panics", _) => panic!("as the test wants"),
            _ => Ok(()),
        }
    }
    let bus = bus(url).await;
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.route("orders", handle).policy(policy).concurrency(4);
    let running = ConsumerRunner::new(consumers).start().await.expect("start");
    (bus, running)
}

fn soon() -> FailurePolicy {
    FailurePolicy { backoff: Backoff::fixed(Duration::from_millis(50)), ..FailurePolicy::default() }
}

#[tokio::test]
async fn a_send_ends_as_its_handler_ends() {
    let (bus, running) = service(soon(), &free_url().await).await;
    let queue = bus.queue("orders");
    queue.send(&"fine").await.expect("handled");
    let error = queue.send(&"bad").await.expect_err("rejected");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Refused, Retry::Never));
    assert!(error.to_string().contains("no such customer"), "{error}");
    for body in ["broken", "panics"] {
        let error = queue.send(&body).await.expect_err("failed");
        assert_eq!(
            (error.kind(), error.retry()),
            (ErrorKind::Busy, Retry::After(Duration::from_millis(50))),
            "{error}"
        );
    }
    let undecodable = queue.send_message(Message::new("{").with_content_type("application/json")).await;
    let error = undecodable.expect_err("no JSON");
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("undecodable"), "{error}");
    let stats = running.stats("orders").expect("stats");
    assert_eq!((stats.handled, stats.dead_lettered, stats.retried, stats.undecodable), (1, 2, 2, 1), "{stats:?}");
    running.stop().await.expect("stop");
    let error = queue.send(&"late").await.expect_err("stopped");
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    bus.close().await.expect("close");
}

#[tokio::test]
async fn retries_in_place_hold_the_sender_until_they_succeed() {
    let policy = FailurePolicy { mode: RetryMode::InPlace, ..soon() };
    let (bus, running) = service(policy, &free_url().await).await;
    let started = Instant::now();
    bus.queue("orders").send(&"broken").await.expect("the third attempt succeeds");
    assert!(started.elapsed() >= Duration::from_millis(100));
    assert_eq!(running.stats("orders").expect("stats").retried, 2);
    running.stop().await.expect("stop");
    bus.close().await.expect("close");
}

#[tokio::test]
async fn dead_letters_may_go_to_another_queue_instead() {
    let policy = FailurePolicy { dead_letters: DeadLetters::To(Address::queue("bad orders")), ..soon() };
    let (bus, running) = service(policy, &free_url().await).await;
    let mut letters: Subscription =
        bus.queue("bad orders").subscribe(ConsumeOptions::default()).await.expect("subscribe");
    let sending = tokio::spawn({
        let queue = bus.queue("orders");
        async move { queue.send(&"bad").await }
    });
    let letter: Delivery = letters.next().await.expect("a dead letter");
    assert_eq!(letter.message().system_headers().get("polymq-reason"), Some("no such customer"));
    assert!(!sending.is_finished(), "the original waits for the copy");
    letter.ack().await.expect("ack");
    sending.await.expect("the sender").expect("taken care of");
    running.stop().await.expect("stop");
    bus.close().await.expect("close");
}

#[tokio::test]
async fn where_nobody_can_listen_the_consumer_says_so() {
    let (_connection, _consumer, address) = plain().await;
    let taken = HttpConnection::connect(&Settings::new().with("listen", address.to_string())).expect("valid");
    let error = taken.consumer(&Address::queue("orders"), &ConsumeOptions::default()).await.expect_err("taken");
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains(&address.to_string()), "{error}");
    for name in ["a//b", "..", "a/./b"] {
        let error = bus("http://127.0.0.1:1").await.queue(name).send_message(order(1)).await.expect_err("no path");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}
