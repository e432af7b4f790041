//! What senders do, against peers that know nothing of polymq. The contract itself is tested by the shared suite.

use std::{
    error::Error as _,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::peer::{Act, PATIENCE, Stub, answer, bus, free_url, order, read};
use futures_util::FutureExt;
use polymq_core::{Backoff, Error, ErrorKind, HealthState, Message, Retry};
use polymq_http::Refusal;
use polymq_testkit::{Proxy, eventually, golden_message};
use tokio::{io::AsyncWriteExt, net::TcpListener};

async fn error_of(url: &str, message: Message) -> Error {
    error_within(Duration::from_secs(60), url, message).await
}

async fn error_within(limit: Duration, url: &str, message: Message) -> Error {
    let bus = bus(url).await;
    let queue = bus.queue("orders").with_timeout(limit);
    let error = queue.send_message(message).await.expect_err("it cannot succeed");
    bus.close().await.expect("close");
    error
}

#[tokio::test]
async fn b12_a_message_is_a_post_to_the_queues_path() {
    let stub = Stub::start(|_| answer("204 No Content", "", "")).await;
    let bus = bus(&format!("{}/shop/", stub.url())).await;
    bus.queue("orders/new one").send_message(golden_message()).await.expect("204 is the acknowledgement");
    let requests = stub.requests();
    let [request] = requests.as_slice() else { panic!("one request: {requests:?}") };
    assert_eq!(request.first_line, "POST /shop/orders/new%20one HTTP/1.1");
    assert_eq!(request.text(), "{\"id\": 7}", "the body is the user's");
    let mut sent: Vec<_> = request.headers.iter().map(|(name, value)| format!("{name}: {value}")).collect();
    sent.retain(|line| !line.starts_with("host: ") && !line.starts_with("user-agent: polymq/"));
    sent.sort();
    assert_eq!(
        sent,
        [
            "accept: */*",
            "ce-correlationid: saga-1",
            "ce-dataversion: 2",
            "ce-id: 0190a0a0-0000-7000-8000-000000000007",
            "ce-partitionkey: customer-7",
            "ce-replyto: replies",
            "ce-source: http",
            "ce-specversion: 1.0",
            "ce-time: 2023-11-14T22:13:20.123000000Z",
            "ce-type: order.created",
            "content-length: 9",
            "content-type: application/json",
            "polymq-headers: tenant=acme%20%C3%A9",
        ]
    );
}

#[tokio::test]
async fn b12_method_endpoint_and_content_type_can_be_chosen() {
    let stub = Stub::start(|_| answer("200 OK", "", "thanks")).await;
    let bus = bus(&stub.url()).await;
    let queue = bus.queue("orders").with("method", "GET").with("endpoint", "/legacy?kind=order");
    queue.with("content_type", "application/xml").send_message(Message::new("<a/>")).await.expect("sent");
    let other = bus.queue("orders").with("endpoint", format!("{}/else", stub.url()));
    other.send_message(order(1).with_header("x-tenant", "acme")).await.expect("sent");
    let requests = stub.requests();
    assert_eq!(requests[0].first_line, "GET /legacy?kind=order HTTP/1.1");
    assert_eq!(requests[1].header("x-tenant"), Some("acme"), "the user's header, under its own name");
    assert_eq!(requests[0].header("content-type"), Some("application/xml"));
    assert_eq!(
        (requests[1].first_line.as_str(), requests[1].header("content-type")),
        ("POST /else HTTP/1.1", Some("application/json"))
    );
    for (key, value, expected) in [
        ("method", "SHOUT", "is no method"),
        ("endpoint", "ftp://x", "expected http://"),
        ("qos", "1", "unknown option \"qos\""),
    ] {
        let error = bus.queue("orders").with(key, value).send_message(order(1)).await.expect_err("refused");
        assert!(error.to_string().contains(expected), "{error}");
    }
    assert_eq!(stub.requests().len(), 2);
}

#[tokio::test]
async fn b21_what_a_server_can_do_wrong_has_kinds_of_its_own() {
    let mut kinds = Vec::new();
    for (act, retry) in [
        (0, Retry::UnknownOutcome),
        (1, Retry::Never),
        (2, Retry::UnknownOutcome),
        (3, Retry::Never),
        (4, Retry::Never),
    ] {
        let stub = Stub::start(move |_| match act {
            0 => answer("500 Internal Server Error", "content-type: text/plain\r\n", "out of paper"),
            1 => answer("302 Found", "location: http://elsewhere.example/\r\n", ""),
            2 => Act::Silence,
            3 => Act::Flood,
            _ => Act::Answer("HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\nthe first of many".into()),
        })
        .await;
        let url = format!("{}?max_reply=100000", stub.url());
        let started = Instant::now();
        // Silence ends with the send's own time; if that passes before anything was written, nothing was shown.
        let mut error = match act {
            2 => error_within(Duration::from_secs(2), &url, order(1)).await,
            _ => error_of(&url, order(1)).await,
        };
        while act == 2 && error.kind() == ErrorKind::Timeout && started.elapsed() < PATIENCE {
            error = error_within(Duration::from_secs(2), &url, order(1)).await;
        }
        assert!(started.elapsed() < 2 * PATIENCE, "{error}");
        assert_eq!(error.retry(), retry, "{error:?}");
        // What was written may be read later. Never sent twice by itself, and no redirect followed.
        eventually(PATIENCE, || async {
            let requests = stub.requests().len();
            if requests == 1 { Ok(()) } else { Err(format!("{requests} requests")) }
        })
        .await;
        kinds.push(error.kind());
        // What the system holds for a connection comes on top of what was read.
        assert!(stub.flooded() < 16 * 1024 * 1024, "{} bytes were taken", stub.flooded());
        match act {
            0 => assert!(error.to_string().contains("500 Internal Server Error: out of paper"), "{error}"),
            1 => assert!(error.hint().is_some_and(|hint| hint.contains("redirects")), "{error}"),
            _ => {}
        }
    }
    use ErrorKind::{Handler, TooLarge, UnknownOutcome, Unroutable};
    assert_eq!(kinds, [Handler, Unroutable, UnknownOutcome, TooLarge, TooLarge]);
}

#[tokio::test]
async fn a_lost_connection_is_unknown_only_when_something_may_have_been_read() {
    let stub = Stub::start(|_| Act::HangUp).await;
    let error = error_of(&stub.url(), order(1)).await;
    assert_eq!((error.kind(), error.retry()), (ErrorKind::UnknownOutcome, Retry::UnknownOutcome), "{error:?}");
    assert_eq!(stub.requests().len(), 1);
    let error = error_of(&free_url(), order(1)).await;
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Disconnected, Retry::Now), "{error:?}");
}

#[tokio::test]
async fn a_sender_comes_again_when_it_was_told_to() {
    let count = std::sync::atomic::AtomicUsize::new(0);
    let stub = Stub::start(move |_| match count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
        0 => answer("503 Service Unavailable", "retry-after: 1\r\npolymq-attempt: 2\r\n", ""),
        1 => answer("429 Too Many Requests", "retry-after: 9\r\npolymq-retry-after-ms: 300\r\n", ""),
        _ => answer("202 Accepted", "", ""),
    })
    .await;
    let bus = bus(&stub.url()).await;
    let error = bus.queue("orders").send_message(order(1)).await.expect_err("503");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Busy, Retry::After(Duration::from_secs(1))));
    let refusal = error.source().and_then(|source| source.downcast_ref::<Refusal>()).expect("the answer itself");
    assert_eq!((refusal.status(), refusal.next_attempt()), (503, Some(2)));
    let started = Instant::now();
    let patient = bus.queue("orders").with_repeats(1, Backoff::fixed(Duration::from_millis(1)));
    patient.send_message(order(1)).await.expect("the third");
    assert!(started.elapsed() >= Duration::from_millis(300), "the server's time is kept");
    let requests = stub.requests();
    assert_eq!(requests.len(), 3);
    assert!(requests.iter().all(|request| request.header("ce-id") == Some("order-1")), "the id stays");
}

/// A gateway says 503 and 408 too, when it has handed the request on already.
#[tokio::test]
async fn what_a_gateway_may_have_handed_on_is_not_sent_again_by_itself() {
    for status in ["503 Service Unavailable", "408 Request Timeout"] {
        let stub = Stub::start(move |_| answer(status, "", "")).await;
        let bus = bus(&stub.url()).await;
        let patient = bus.queue("orders").with_repeats(3, Backoff::fixed(Duration::from_millis(1)));
        // With an id of the caller's it would be: receivers could tell.
        let error = patient.send_message(Message::new("x")).await.expect_err("refused");
        assert_eq!((error.kind(), error.retry()), (ErrorKind::UnknownOutcome, Retry::UnknownOutcome), "{error:?}");
        assert_eq!(stub.requests().len(), 1, "{status}");
    }
}

#[tokio::test]
async fn a_topic_goes_to_each_of_its_endpoints() {
    let (one, two) = (Stub::start(|_| answer("200 OK", "", "")).await, Stub::start(|_| answer("200 OK", "", "")).await);
    let full = Stub::start(|_| answer("503 Service Unavailable", "retry-after: 5\r\n", "")).await;
    let endpoints = format!("endpoints={}/a,{}", one.url(), two.url());
    let bus = bus(&format!("{}?{endpoints}", free_url())).await;
    bus.topic("prices").send_message(order(1)).await.expect("both took it");
    assert_eq!(one.requests()[0].first_line, "POST /a/prices HTTP/1.1");
    assert_eq!(two.requests()[0].first_line, "POST /prices HTTP/1.1");
    let listed = bus.topic("prices").with("endpoints", format!("{}/x,{}/y", one.url(), full.url()));
    let error = listed.send_message(order(2)).await.expect_err("one did not");
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Busy, Retry::UnknownOutcome), "the other has it: {error:?}");
    assert!(error.to_string().contains("1 of 2 endpoints"), "{error}");
    let alone = bus.topic("prices").with("endpoints", full.url());
    let error = alone.send_message(order(3)).await.expect_err("it did not");
    assert_eq!(error.retry(), Retry::After(Duration::from_secs(5)), "nobody has it");
}

#[tokio::test]
async fn the_most_careful_of_several_endpoints_speaks_for_all_that_failed() {
    let lost = Stub::start(|_| Act::HangUp).await;
    let full = Stub::start(|_| answer("503 Service Unavailable", "retry-after: 5\r\n", "")).await;
    let strict = Stub::start(|_| answer("422 Unprocessable Content", "", "")).await;
    let (lost, full, strict, nobody) = (&lost.url(), &full.url(), &strict.url(), &free_url());
    let bus = bus(nobody).await;
    let wait = Retry::After(Duration::from_secs(5));
    for (one, other, retry) in [
        (nobody, lost, Retry::UnknownOutcome),
        (strict, lost, Retry::UnknownOutcome),
        (full, strict, Retry::Never),
        (nobody, full, wait),
    ] {
        for endpoints in [format!("{one},{other}"), format!("{other},{one}")] {
            let topic = bus.topic("prices").with("endpoints", endpoints.as_str());
            let error = topic.send_message(order(1)).await.expect_err("nobody took it");
            assert_eq!(error.retry(), retry, "{endpoints}: {error:?}");
        }
    }
}

#[tokio::test]
async fn credentials_are_sent_and_never_shown() {
    let stub = Stub::start(|request| match request.header("authorization") {
        Some("Bearer s3cret" | "Basic bWU6czNjcmV0") => answer("200 OK", "", ""),
        _ => answer("401 Unauthorized", "", ""),
    })
    .await;
    for url in [format!("{}?token=s3cret", stub.url()), format!("http://me:s3cret@{}", stub.address)] {
        let bus = bus(&url).await;
        bus.queue("orders").send_message(order(1)).await.expect("authenticated");
        assert!(!format!("{bus:?} {:?}", bus.connection()).contains("s3cret"));
    }
    let error = error_of(&format!("http://me:wr0ng@{}", stub.address), order(1)).await;
    assert_eq!(error.kind(), ErrorKind::Unauthenticated);
    let unreachable = free_url().replace("://", "://me:wr0ng@");
    let lost = error_of(&unreachable, order(1)).await;
    for error in [error, lost] {
        let mut shown = format!("{error} {error:?}");
        let mut source = error.source();
        while let Some(inner) = source {
            shown += &format!(" {inner} {inner:?}");
            source = inner.source();
        }
        assert!(!shown.contains("wr0ng"), "{shown}");
    }
}

/// The token is for the servers of the settings; others, and those whose URL has a login, never see it.
#[tokio::test]
async fn a_token_is_shown_to_the_servers_of_the_settings_only() {
    let (ours, listed) =
        (Stub::start(|_| answer("200 OK", "", "")).await, Stub::start(|_| answer("200 OK", "", "")).await);
    let partner = Stub::start(|_| answer("200 OK", "", "")).await;
    let bus = bus(&format!("{}?token=s3cret&endpoints={}", ours.url(), listed.url())).await;
    let queue = bus.queue("orders");
    for endpoint in [
        "/path".to_owned(),
        format!("{}/whole", ours.url()),
        format!("{}/listed", listed.url()),
        format!("http://me:s3cret@{}/login", ours.address),
        format!("{}/hook", partner.url()),
        format!("http://me:s3cret@{}/login", partner.address),
        format!("//{}/path", partner.address),
    ] {
        queue.with("endpoint", endpoint).send_message(order(1)).await.expect("sent");
    }
    bus.topic("prices").send_message(order(2)).await.expect("sent");
    let both = format!("{},{}", listed.url(), partner.url());
    bus.topic("prices").with("endpoints", both).send_message(order(3)).await.expect("sent");
    bus.connection().ping().await.expect("it answers");
    let shown = |stub: &Stub| -> Vec<Option<String>> {
        stub.requests().iter().map(|request| request.header("authorization").map(str::to_owned)).collect()
    };
    let (token, login) = (Some("Bearer s3cret".to_owned()), Some("Basic bWU6czNjcmV0".to_owned()));
    assert_eq!(shown(&ours), [token.clone(), token.clone(), login.clone(), token.clone()], "the last one is the ping");
    assert_eq!(shown(&listed), [token.clone(), token.clone(), token]);
    assert_eq!(shown(&partner), [None, login, None, None]);
    // What is not sent there does not keep anybody from sending in clear text; a login does.
    let remote =
        bus.queue("orders").with("endpoint", "http://partner.invalid/hook").with_timeout(Duration::from_secs(5));
    assert_ne!(remote.send_message(order(4)).await.expect_err("no such host").kind(), ErrorKind::Config);
    let remote = bus.queue("orders").with("endpoint", "http://me:s3cret@partner.invalid/hook");
    assert_eq!(remote.send_message(order(5)).await.expect_err("clear text").kind(), ErrorKind::Config);
}

#[tokio::test]
async fn a_cut_wire_is_unknown_and_the_next_message_goes_on() {
    let stub = Stub::start(|_| answer("204 No Content", "", "")).await;
    let proxy = Proxy::start(stub.address).await.expect("a proxy");
    let bus = bus(&format!("http://{}", proxy.address())).await;
    let queue = bus.queue("orders");
    queue.send_message(order(1)).await.expect("sent");
    proxy.cut_before_reply();
    let error = queue.send_message(order(2)).await.expect_err("the answer was cut off");
    assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error:?}");
    assert_eq!(bus.health().state, HealthState::Down);
    queue.send_message(order(3)).await.expect("a new connection is made");
    assert_eq!(bus.health().state, HealthState::Degraded, "up again, lately");
    proxy.refuse(true);
    proxy.reset_all();
    let error = queue.send_message(order(4)).await.expect_err("refused");
    assert!(matches!(error.kind(), ErrorKind::Disconnected | ErrorKind::UnknownOutcome), "{error:?}");
    proxy.refuse(false);
    eventually(PATIENCE, || async { queue.send_message(order(5)).await.map_err(|error| error.to_string()) }).await;
    let ids: Vec<_> = stub.requests().iter().filter_map(|request| request.header("ce-id").map(str::to_owned)).collect();
    assert!(ids.starts_with(&["order-1".to_owned(), "order-2".to_owned(), "order-3".to_owned()]), "{ids:?}");
}

#[tokio::test]
async fn a_place_that_answers_again_is_found_without_a_message() {
    let stub = Stub::start(|_| answer("204 No Content", "", "")).await;
    let proxy = Proxy::start(stub.address).await.expect("a proxy");
    let bus = bus(&format!("http://{}", proxy.address())).await;
    let queue = bus.queue("orders");
    proxy.refuse(true);
    queue.send_message(order(1)).await.expect_err("nobody is there");
    assert_eq!(bus.health().state, HealthState::Down);
    proxy.refuse(false);
    eventually(PATIENCE, || async {
        if bus.health().state == HealthState::Degraded { Ok(()) } else { Err(bus.health().to_string()) }
    })
    .await;
    assert!(
        stub.requests().iter().all(|request| request.first_line.starts_with("OPTIONS /orders ")),
        "{:?}",
        stub.requests()
    );
    queue.send_message(order(2)).await.expect("sent");
    bus.close().await.expect("close");
}

#[tokio::test]
async fn j21_a_hole_in_the_network_is_bounded_by_the_time_out() {
    let stub = Stub::start(|_| answer("204 No Content", "", "")).await;
    let proxy = Proxy::start(stub.address).await.expect("a proxy");
    let bus = bus(&format!("http://{}", proxy.address())).await;
    let queue = bus.queue("orders");
    queue.send_message(order(1)).await.expect("sent");
    proxy.pause();
    let started = Instant::now();
    let short = queue.with_timeout(Duration::from_secs(1));
    let mut error = short.send_message(order(2)).await.expect_err("nothing can have been answered");
    // Its time may pass before anything was written, and then there was no hole to fall into.
    while error.kind() == ErrorKind::Timeout && started.elapsed() < PATIENCE {
        error = short.send_message(order(2)).await.expect_err("nothing can have been answered");
    }
    assert_eq!(error.kind(), ErrorKind::UnknownOutcome, "{error:?}");
    assert!(started.elapsed() < 2 * PATIENCE);
    eventually(PATIENCE, || async {
        if bus.health().state == HealthState::Down { Ok(()) } else { Err(bus.health().to_string()) }
    })
    .await;
    proxy.resume();
    queue.send_message(order(3)).await.expect("it goes on");
    bus.close().await.expect("close");
    let error = queue.send_message(order(4)).await.expect_err("closed");
    assert_eq!(error.kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn connections_are_kept_and_pings_tell_the_truth() {
    let stub = Stub::start(|_| answer("404 Not Found", "", "")).await;
    let proxy = Proxy::start(stub.address).await.expect("a proxy");
    let url = format!("http://{}", proxy.address());
    let bus = bus(&url).await;
    for n in 0..20 {
        let error = bus.queue("orders").send_message(order(n)).await.expect_err("404");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    bus.ping().await.expect("any answer will do");
    let accepted = proxy.stats().accepted;
    assert!(accepted <= 3, "{accepted} connections for one send after the other: they are kept");
    let lonely = crate::peer::bus(&free_url()).await;
    let error = lonely.ping().await.expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Disconnected);
}

/// As long as it takes.
#[tokio::test]
async fn the_longest_time_out_is_a_time_out() {
    let stub = Stub::start(|_| answer("200 OK", "", "{}")).await;
    let bus = bus(&stub.url()).await;
    let queue = bus.queue("orders").with_timeout(Duration::MAX);
    queue.send_message(order(1)).await.expect("sent");
    queue.request_message(order(2)).await.expect("answered");
}

/// Each operation against a server that takes connections and requests, and never says a word.
#[tokio::test]
async fn j21_every_operation_ends_at_its_time_against_a_silent_server() {
    let stub = Stub::start(|_| Act::Silence).await;
    let bus = bus(&format!("{}?connect_timeout=400ms", stub.url())).await;
    let queue = bus.queue("orders").with_timeout(Duration::from_millis(400));
    let kept = |started: Instant, what: &str| {
        let took = started.elapsed();
        assert!((300..25_000).contains(&took.as_millis()), "{what} ended after {took:?}");
    };
    let unanswered = |id: u32, error: Error| {
        let id = format!("order-{id}");
        assert!(stub.is_unanswered(&error, |request| request.header("ce-id") == Some(&id)), "{id}: {error:?}");
    };
    let started = Instant::now();
    unanswered(1, queue.send_message(order(1)).await.expect_err("silence"));
    kept(started, "send");
    let started = Instant::now();
    for (id, sent) in (100..).zip(queue.send_all((100..150).map(order)).await) {
        unanswered(id, sent.expect_err("silence"));
    }
    kept(started, "a batch");
    let started = Instant::now();
    unanswered(2, queue.request_message(order(2)).await.expect_err("silence"));
    kept(started, "request");
    let started = Instant::now();
    let sent = queue.enqueue(order(3)).await.expect("handed over");
    // It waits as long as a send may take, for a request that ends at nearly the same time.
    let flushed = queue.flush().await;
    assert!(flushed.is_ok() || flushed.is_err_and(|error| error.kind() == ErrorKind::Timeout));
    kept(started, "flush");
    unanswered(3, sent.await.expect_err("silence"));
    let started = Instant::now();
    assert_eq!(bus.ping().await.expect_err("silence").kind(), ErrorKind::Timeout);
    kept(started, "ping");
    let started = Instant::now();
    let sent = queue.enqueue(order(4)).await.expect("handed over");
    let closed = bus.close().await;
    assert!(closed.is_ok() || closed.is_err_and(|error| error.kind() == ErrorKind::Timeout));
    kept(started, "close");
    unanswered(4, sent.await.expect_err("silence"));
}

/// A flush ends with what was sent before it, however much is sent later.
#[tokio::test]
async fn a_flush_waits_for_nothing_that_is_sent_later() {
    let server = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let bus = bus(&format!("http://{}", server.local_addr().expect("an address"))).await;
    let queue = bus.queue("orders");
    let before = queue.enqueue(order(1)).await.expect("handed over");
    let (mut first, _) = server.accept().await.expect("a connection");
    read(&mut first).await.expect("a request");
    let mut flushing = Box::pin(queue.flush());
    assert!(flushing.as_mut().now_or_never().is_none(), "the first is not answered");
    let later = queue.enqueue(order(2)).await.expect("handed over");
    let (mut second, _) = server.accept().await.expect("a connection");
    read(&mut second).await.expect("a request");
    first.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("write");
    flushing.await.expect("flushed, while the second is on its way");
    before.await.expect("acknowledged");
    second.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.expect("write");
    later.await.expect("acknowledged");
}

/// A server that does not even take connections: its backlog is full, and the system drops what else comes.
#[tokio::test]
async fn j21_connecting_is_bounded() {
    let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
    socket.bind("127.0.0.1:0".parse().expect("an address")).expect("bound");
    let full = socket.listen(0).expect("listening");
    let address = full.local_addr().expect("an address");
    let mut taken = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_secs(1), tokio::net::TcpStream::connect(address)).await {
        taken.push(stream.expect("the backlog has room"));
        assert!(taken.len() < 100, "this system takes every connection");
    }
    let started = Instant::now();
    let error = error_of(&format!("http://{address}?connect_timeout=500ms"), order(1)).await;
    assert_eq!((error.kind(), error.retry()), (ErrorKind::Timeout, Retry::Now), "{error:?}");
    assert!((450..25_000).contains(&started.elapsed().as_millis()), "{:?}", started.elapsed());
}

/// A token of a file that is replaced while connections are kept: the next request on each of them has the new one, and a
/// consumer that asks for both loses nobody meanwhile.
#[tokio::test]
async fn j5_a_rotated_token_is_in_the_next_request_of_every_connection() {
    let folder = std::env::temp_dir().join(format!("polymq-http-token-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a directory");
    let (shown, asked) = (folder.join("shown"), folder.join("asked"));
    std::fs::write(&shown, "old-s3cret\n").expect("written");
    std::fs::write(&asked, "old-s3cret\n").expect("written");
    let url = format!("{}/in", free_url());
    let files = format!("token_file={}&accept_token_file={}", shown.display(), asked.display());
    let bus = bus(&format!("{url}?{files}")).await;
    let mut consumers = polymq_core::ConsumerFactory::new(&bus);
    let handled = async |_: polymq_core::Body| tokio::time::sleep(Duration::from_millis(50)).await;
    consumers.route("orders", handled).concurrency(16);
    let running = polymq_core::ConsumerRunner::new(consumers).start().await.expect("started");
    let queue = bus.queue("orders");
    // Many at once, so that many connections are kept.
    let all = |from: u32| queue.send_all((from..from + 8).map(order));
    assert!(all(0).await.iter().all(Result::is_ok), "the old one");
    std::fs::write(&asked, "old-s3cret\nnew-s3cret\n").expect("written");
    assert!(all(10).await.iter().all(Result::is_ok), "the old one still");
    std::fs::write(&shown, "new-s3cret").expect("written");
    std::fs::write(&asked, "new-s3cret\n").expect("written");
    assert!(all(20).await.iter().all(Result::is_ok), "only the new one is asked for, so all have shown it");
    std::fs::write(&shown, "old-s3cret").expect("written");
    for result in all(30).await {
        assert_eq!(result.expect_err("the old one is worth nothing").kind(), ErrorKind::Unauthenticated);
    }
    assert!(!format!("{:?}", bus.connection()).contains("s3cret"));
    std::fs::remove_file(&asked).expect("removed");
    let error = queue.send_message(order(40)).await.expect_err("nobody comes in");
    assert_eq!(error.kind(), ErrorKind::Busy, "the sender may come again: {error}");
    std::fs::remove_file(&shown).expect("removed");
    let error = queue.send_message(order(41)).await.expect_err("nothing to show");
    assert!(error.kind() == ErrorKind::Config && error.to_string().contains("token_file"), "{error}");
    assert_eq!(error.retry(), Retry::Now, "it may be there again soon: no message must become a dead letter for it");
    running.stop().await.expect("stopped");
    bus.close().await.expect("closed");
    std::fs::remove_dir_all(folder).expect("removed");
}

/// A server that sends so many requests back before it takes one; how many it has seen.
async fn refusing(first: usize) -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let seen = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
            while let Some(Ok((_, mut respond))) = connection.accept().await {
                if counted.fetch_add(1, Ordering::SeqCst) < first {
                    respond.send_reset(h2::Reason::REFUSED_STREAM);
                } else {
                    let answer = http::Response::builder().status(204).body(()).expect("an answer");
                    respond.send_response(answer, true).expect("written");
                }
            }
        }
    });
    (format!("http://{address}?http2=only"), seen)
}

#[tokio::test]
async fn b12_what_a_server_of_http2_sends_back_unseen_is_sent_again() {
    let (url, seen) = refusing(2).await;
    let bus = bus(&url).await;
    bus.queue("orders").send_message(order(1)).await.expect("the third time");
    assert_eq!(seen.load(Ordering::SeqCst), 3);
    bus.close().await.expect("close");
    let (url, seen) = refusing(usize::MAX).await;
    let error = error_of(&url, order(1)).await;
    assert_eq!(
        (error.kind(), error.retry()),
        (ErrorKind::Disconnected, Retry::Now),
        "nobody has looked at it: {error}"
    );
    assert_eq!(seen.load(Ordering::SeqCst), 3, "and then it is for the caller to decide");
}

#[tokio::test]
async fn who_asks_for_a_sign_of_life_from_elsewhere_keeps_no_connection() {
    let stub = Stub::start(|_| answer("204 No Content", "", "")).await;
    let bus = bus(&stub.url()).await;
    let (asking, (asked, has_asked)) = (bus.clone(), std::sync::mpsc::channel());
    let (end, ends) = std::sync::mpsc::channel::<()>();
    let elsewhere = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(asking.ping()).expect("it answers");
        asked.send(()).expect("awaited");
        // It stands still from here on, and what lives in it too.
        let _ = ends.recv();
    });
    tokio::task::spawn_blocking(move || has_asked.recv()).await.expect("no panic").expect("asked");
    bus.queue("orders").send_message(order(1)).await.expect("over a connection that is served");
    drop(end);
    elsewhere.join().expect("no panic");
    bus.close().await.expect("close");
}
