//! Which consumer a request is for, and whose requests are none.

use polymq_core::{Address, Connection, ConsumeOptions, ErrorKind, Message, ProduceOptions, Settings};
use polymq_http::HttpConnection;
use tokio::net::TcpStream;

use crate::{
    answered, awaited,
    peer::{ask, bus, listening, next, order, plain, post, request},
};

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

/// A token that is empty, because its variable is, lets nobody in: it is refused, and so is a file without any.
#[tokio::test]
async fn a_token_that_is_empty_is_none() {
    let folder = std::env::temp_dir().join(format!("polymq-http-empty-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a directory");
    let file = folder.join("tokens");
    std::fs::write(&file, "\n \n").expect("written");
    let path = file.to_str().expect("UTF-8");
    for (key, value) in
        [("accept_token", ""), ("accept_token", " "), ("token", ""), ("accept_token_file", path), ("token_file", path)]
    {
        let settings = Settings::new().with("listen", "127.0.0.1:0").with(key, value);
        let refused = match HttpConnection::connect(&settings) {
            Err(error) => error,
            Ok(connection) => connection
                .consumer(&Address::queue("orders"), &ConsumeOptions::default())
                .await
                .expect_err("nobody can come in"),
        };
        assert!(refused.kind() == ErrorKind::Config && refused.message().contains(key), "{key}: {refused}");
    }
    // Emptied while it is used: nobody comes in, and those who ask may come again.
    std::fs::write(&file, "s3cret\n").expect("written");
    let (_connection, _consumer, address) = listening(&[("accept_token_file", path)], &ConsumeOptions::default()).await;
    assert_eq!(ask(address, &request("POST", "/in/orders", "", "{}")).await.status(), 401);
    let nothing = "Authorization: Bearer \r\n";
    assert_eq!(ask(address, &request("POST", "/in/orders", nothing, "{}")).await.status(), 401);
    std::fs::write(&file, "\n").expect("written");
    let known = "Authorization: Bearer s3cret\r\n";
    assert_eq!(ask(address, &request("POST", "/in/orders", known, "{}")).await.status(), 503);
    std::fs::remove_dir_all(folder).expect("removed");
}

#[tokio::test]
async fn j8_a_mistaken_address_is_told_without_its_login() {
    let (connection, _consumer, _address) = plain().await;
    let login = "https://me:s3cr3t-marker@shop.example/in";
    let mut options = ConsumeOptions::default();
    options.extra.push(("endpoint".into(), login.into()));
    let error = connection.consumer(&Address::queue("orders"), &options).await.map(drop).expect_err("no path");
    assert!(error.to_string().contains("is no path") && !format!("{error:?}").contains("s3cr3t"), "{error:?}");
    let settings = Settings::new().with("listen", login);
    let error = HttpConnection::connect(&settings).map(drop).expect_err("no place to listen at");
    assert!(error.to_string().contains("to listen at") && !format!("{error:?}").contains("s3cr3t"), "{error:?}");
    let options =
        ProduceOptions { extra: vec![("endpoint".into(), format!("{login}?token=s3cr3t"))], ..Default::default() };
    let producer = connection.producer(&Address::queue("orders"), &options).await.expect("a place");
    assert!(!format!("{producer:?}").contains("s3cr3t"), "{producer:?}");
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

#[tokio::test]
async fn closing_sends_everyone_away_who_may_come_again() {
    // A port that nobody gets when it is closed.
    let listen = format!("127.0.0.1:{}/in", polymq_testkit::free_port());
    let (connection, mut consumer, address) = listening(&[("listen", &listen)], &ConsumeOptions::default()).await;
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
