//! What closing waits for, and what it does not; and runtimes that end while the connection goes on.

use std::{future::Future, sync::Arc, time::Duration};

use crate::peer::{Act, PATIENCE, Stub, answer, bus, free_url, listening, next, order, plain, read, request};
use futures_util::FutureExt;
use polymq_core::{
    Address, Bus, Completion, Connection, ConsumeOptions, Error, ErrorKind, Message, ProduceOptions, Receipt, Result,
    Settings, Subscription,
};
use polymq_http::HttpConnection;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    time::timeout,
};

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("in time")
}

/// A connection with one message on its way, which may take an hour.
async fn sending(settings: Settings) -> (HttpConnection, Completion<Receipt>) {
    let connection = HttpConnection::connect(&settings).expect("valid settings");
    let options = ProduceOptions { timeout: Duration::from_secs(3600), ..ProduceOptions::default() };
    let producer = connection.producer(&Address::queue("orders"), &options).await.expect("a producer");
    let sent = producer.send(order(1));
    (connection, sent)
}

#[tokio::test]
async fn whoever_closes_too_waits_for_the_same_end() {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", server.local_addr().expect("an address"));
    let settings = Settings::from_url(&url).expect("a URL").with("drain_timeout", "1h");
    let (connection, sent) = sending(settings).await;
    let (mut stream, _) = soon(server.accept()).await.expect("a connection");
    soon(read(&mut stream)).await.expect("a request");
    assert!(connection.close().now_or_never().is_none(), "it is not answered; and this close is cancelled");
    let (mut one, mut two) = (connection.close(), connection.close());
    for close in [&mut one, &mut two] {
        assert!(close.now_or_never().is_none(), "it is not answered");
    }
    stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("write");
    for close in [one, two, connection.close()] {
        soon(close).await.expect("closed");
    }
    soon(sent).await.expect("acknowledged");
}

#[tokio::test]
async fn closing_does_not_wait_as_long_as_a_send() {
    let stub = Stub::start(|_| Act::Silence).await;
    let settings = Settings::from_url(&stub.url()).expect("a URL").with("drain_timeout", "300ms");
    let (connection, _sent) = sending(settings).await;
    let error = soon(connection.close()).await.expect_err("it is not answered");
    assert_eq!((error.kind(), error.operation()), (ErrorKind::Timeout, Some("close")), "{error}");
    connection.close().await.expect("told once");
}

/// The handle may live on; what it kept open does not.
#[tokio::test]
async fn kept_connections_end_with_the_close() {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let url = format!("http://{}", server.local_addr().expect("an address"));
    let (connection, sent) = sending(Settings::from_url(&url).expect("a URL")).await;
    let (mut stream, _) = soon(server.accept()).await.expect("a connection");
    soon(read(&mut stream)).await.expect("a request");
    stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("write");
    soon(sent).await.expect("acknowledged");
    assert!(stream.read_u8().now_or_never().is_none(), "it is kept for the next message");
    soon(connection.close()).await.expect("closed");
    assert_eq!(soon(stream.read(&mut [0])).await.expect("an orderly end"), 0);
    assert_eq!(connection.native().map(drop).expect_err("closed").kind(), ErrorKind::Closed);
}

/// The runner counts on the second call: handlers in tasks end after the first, and then the process may.
#[tokio::test]
async fn closing_a_consumer_waits_until_its_answers_are_written() {
    let (_connection, mut consumer, address) = listening(&[("drain_timeout", "1h")], &ConsumeOptions::default()).await;
    let mut stream = TcpStream::connect(address).await.expect("connect");
    stream.write_all(request("POST", "/in/orders", "", "x").as_bytes()).await.expect("write");
    let incoming = next(&mut consumer).await;
    soon(consumer.close()).await.expect("nothing is settled, so there is nothing to wait for");
    // More than the system takes from a server whose client does not read.
    let long = Message::new(vec![b'x'; 64 * 1024 * 1024]);
    consumer.settler().answer(incoming.token, &long).expect("HTTP answers").await.expect("answer");
    let early = timeout(Duration::from_millis(300), consumer.close()).await;
    assert!(early.is_err(), "the answer is not written");
    let reading = tokio::spawn(async move {
        let mut left = 64 * 1024 * 1024;
        while left > 0 {
            left -= stream.read(&mut [0; 65536]).await.expect("read").min(left);
        }
    });
    soon(consumer.close()).await.expect("closed");
    soon(reading).await.expect("all of it came");
}

/// A sender that keeps its connection for the next request, and one that has not begun its first.
#[tokio::test]
async fn kept_connections_of_senders_do_not_hold_up_the_close() {
    let (connection, mut consumer, address) = listening(&[("drain_timeout", "1h")], &ConsumeOptions::default()).await;
    let _silent = TcpStream::connect(address).await.expect("connect");
    let mut stream = TcpStream::connect(address).await.expect("connect");
    for _ in 0..2 {
        stream.write_all(request("POST", "/in/orders", "", "x").as_bytes()).await.expect("write");
        let incoming = next(&mut consumer).await;
        consumer.settler().ack(incoming.token).await.expect("ack");
        soon(read(&mut stream)).await.expect("an answer");
    }
    soon(consumer.close()).await.expect("closed");
    soon(connection.close()).await.expect("closed");
}

#[tokio::test]
async fn closing_a_consumer_does_not_wait_for_ever() {
    let (_connection, mut consumer, address) =
        listening(&[("drain_timeout", "300ms")], &ConsumeOptions::default()).await;
    let mut stream = TcpStream::connect(address).await.expect("connect");
    stream.write_all(request("POST", "/in/orders", "", "x").as_bytes()).await.expect("write");
    let incoming = next(&mut consumer).await;
    let long = Message::new(vec![b'x'; 64 * 1024 * 1024]);
    consumer.settler().answer(incoming.token, &long).expect("HTTP answers").await.expect("answer");
    soon(consumer.close()).await.expect("closed");
}

/// Whoever got a consumer learns that the connection has closed, in whatever order the two came.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_is_made_while_the_connection_closes_ends() {
    for _ in 0..300 {
        let (connection, _first, _) = plain().await;
        let connection = Arc::new(connection);
        let closing = tokio::spawn({
            let connection = Arc::clone(&connection);
            async move { connection.close().await }
        });
        let made = connection.consumer(&Address::queue("invoices"), &ConsumeOptions::default()).await;
        soon(closing).await.expect("no panic").expect("closed");
        let error: Error = match made {
            Ok(mut consumer) => soon(consumer.receive(1, &mut Vec::new())).await.expect_err("closed"),
            Err(error) => error,
        };
        assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

#[test]
fn a_channel_sends_when_the_runtime_of_its_first_message_has_ended() {
    let main = runtime();
    let (_stub, bus) = main.block_on(async {
        let stub = Stub::start(|_| answer("200 OK", "", "{}")).await;
        let bus = bus(&stub.url()).await;
        (stub, bus)
    });
    let (queue, topic) = (bus.queue("orders"), bus.topic("prices"));
    let all = async || -> Result<()> {
        queue.send_message(order(1)).await?;
        topic.send_message(order(2)).await?;
        queue.request_message(order(3)).await.map(drop)
    };
    let first = runtime();
    first.block_on(async { soon(all()).await.expect("sent") });
    drop(first);
    main.block_on(async { soon(all()).await.expect("sent again") });
}

#[test]
fn consumers_receive_when_the_runtime_of_the_first_one_has_ended() {
    async fn round_trip(bus: &Bus, subscription: &mut Subscription) {
        let queue = bus.queue("orders");
        let receiving = async { subscription.next().await.expect("received").ack().await.expect("acknowledged") };
        let (sent, ()) = soon(async { tokio::join!(queue.send_message(order(1)), receiving) }).await;
        sent.expect("sent");
    }
    let main = runtime();
    let bus = main.block_on(async { bus(&free_url()).await });
    let subscribed = async || bus.queue("orders").subscribe(ConsumeOptions::default()).await.expect("subscribed");
    let first = runtime();
    let mut kept = first.block_on(async {
        let mut subscription = subscribed().await;
        round_trip(&bus, &mut subscription).await;
        subscription
    });
    drop(first);
    main.block_on(round_trip(&bus, &mut kept));
    drop(kept);
    main.block_on(async { round_trip(&bus, &mut subscribed().await).await });
    main.block_on(async { soon(bus.close()).await.expect("closed") });
}

#[test]
fn a_connection_needs_a_runtime() {
    let error = HttpConnection::connect(&Settings::new()).expect_err("there is none");
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains("runtime"), "{error}");
}
