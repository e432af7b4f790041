//! What a sender is told about its message.

use std::time::Duration;

use polymq_core::{ConsumeOptions, ErrorKind, Message, Retry, Settings};
use polymq_http::HttpConnection;
use tokio::net::TcpStream;

use crate::{
    answered, awaited,
    peer::{PATIENCE, ask, ask_over, bus, listening, next, order, plain, post, request},
};

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
async fn one_port_speaks_both_versions() {
    let (_connection, mut consumer, address) = listening(&[("drain_timeout", "1h")], &ConsumeOptions::default()).await;
    let client = |http2: &str| {
        let sending = HttpConnection::connect(&Settings::new().with("http2", http2)).expect("valid settings");
        sending.native().expect("open")
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
            let request = http::Request::post(format!("http://{address}/in/orders")).body(n.to_string().into());
            let answer = client.request(request.expect("a request")).await.expect("sent");
            assert_eq!((answer.status().as_u16(), answer.version()), (204, version));
        }
    }
    let mut consumer = acknowledging.await.expect("20 messages");
    // Every answer is written, so there is nothing to wait for.
    tokio::time::timeout(PATIENCE, consumer.close()).await.expect("in time").expect("closed");
    drop(consumer);
    let bus = bus(&format!("http://{address}/in?http2=only&listen=127.0.0.1:0")).await;
    let error = bus.queue("orders").send_message(order(1)).await.expect_err("its consumer has ended");
    assert_eq!(error.kind(), ErrorKind::Busy, "over HTTP/2: {error}");
}

/// What is compressed would be taken for the message itself.
#[tokio::test]
async fn a_coded_body_is_refused_and_its_sender_is_told_what_is_taken() {
    let (_connection, mut consumer, address) = plain().await;
    for coding in ["gzip", "identity, br"] {
        let asking = request("POST", "/in/orders", &format!("Content-Encoding: {coding}\r\n"), "x");
        let answer = ask(address, &asking).await;
        assert_eq!((answer.status(), answer.header("accept-encoding")), (415, Some("identity")), "{coding}");
    }
    let mut stream = TcpStream::connect(address).await.expect("connect");
    let asking = request("POST", "/in/orders", "Content-Encoding: Identity\r\n", "as it is");
    let (answer, ()) = tokio::join!(ask_over(&mut stream, &asking), async {
        let incoming = next(&mut consumer).await;
        assert_eq!(&incoming.message.payload()[..], b"as it is");
        consumer.settler().ack(incoming.token).await.expect("ack");
    });
    assert_eq!(answer.status(), 204);
}
