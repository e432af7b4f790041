//! Health and metrics over HTTP.

use crate::common::*;
use polymq_broker::{Broker, BrokerError, Limits};
use polymq_kubemq_proto::{subscribe::*, *};
use tokio::net::TcpStream;

#[tokio::test]
async fn health_and_figures_are_told() {
    let limits = Limits { store_bytes: Some(1 << 20), ..Limits::default() };
    // When it has stopped, no other program has its port.
    let http = format!("127.0.0.1:{}", polymq_testkit::free_port());
    let builder = Broker::builder().listen("127.0.0.1:0").http(http).limits(limits);
    let broker = builder.start().await.unwrap();
    let http = broker.http_address().unwrap();
    assert_eq!(get(http, "/health/live").await, (200, r#"{"status":"live"}"#.to_owned()));
    let (code, ready) = get(http, "/health/ready").await;
    assert!(code == 200 && ready.contains(r#""status":"ready""#) && ready.contains(r#""refuses":null"#), "{ready}");
    assert_eq!(get(http, "/").await.0, 404);

    let mut caller = client(&broker).await;
    for _ in 0..3 {
        send(&mut caller, message("orders\"eu", "x")).await;
    }
    receive(&mut caller, "orders\"eu", 1).await;
    caller.send_event(event("log", "x", true)).await.unwrap();
    let (code, figures) = get(http, "/metrics").await;
    assert_eq!(code, 200);
    for line in [
        r#"polymq_broker_queue_messages{queue="orders\"eu"} 2"#,
        r#"polymq_broker_queue_sent_total{queue="orders\"eu"} 3"#,
        r#"polymq_broker_queue_delivered_total{queue="orders\"eu"} 1"#,
        "polymq_broker_all_queues_messages 2",
        "polymq_broker_connections 1",
        r#"polymq_broker_events_stored_total{channel="log"} 1"#,
        r#"polymq_broker_events_kept{channel="log"} 1"#,
        "polymq_broker_store_full 0",
        "polymq_broker_store_damaged 0",
        "# TYPE polymq_broker_queue_sent_total counter",
    ] {
        assert!(figures.lines().any(|found| found == line), "{line} is not in\n{figures}");
    }
    // As Prometheus reads it: a name with a type before it, then a number.
    for line in figures.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.rsplit_once(' ').unwrap();
        let name = name.split('{').next().unwrap();
        assert!(value.parse::<f64>().is_ok() && figures.contains(&format!("# TYPE {name} ")), "{line}");
    }

    while !send(&mut caller, message("big", vec![b'x'; 100_000])).await.is_error {}
    let (code, ready) = get(http, "/health/ready").await;
    assert!(code == 200 && ready.contains("the store has reached its limit of 1048576 bytes"), "{ready}");
    assert!(get(http, "/metrics").await.1.contains("polymq_broker_store_full 1"));
    drop(caller);
    broker.stop().await;
    assert!(TcpStream::connect(http).await.is_err(), "gone with the broker");
}

#[tokio::test]
async fn what_was_refused_is_counted() {
    let folder = tempfile::tempdir().unwrap();
    let (key, rules) = (folder.path().join("key"), folder.path().join("rules"));
    std::fs::write(&key, "secret").unwrap();
    std::fs::write(&rules, "[[rule]]\nallow = ['read']").unwrap();
    let algorithm = "HS256".parse().unwrap();
    let broker = Broker::builder().listen("127.0.0.1:0").http("127.0.0.1:0").token_key(algorithm, key).start();
    let broker = broker.await.unwrap();
    client(&broker).await.send_event(event("e", "x", false)).await.unwrap_err();
    let figures = get(broker.http_address().unwrap(), "/metrics").await.1;
    assert!(figures.contains("polymq_broker_unauthenticated_total 1\n"), "{figures}");

    let broker = Broker::builder().listen("127.0.0.1:0").http("127.0.0.1:0").rules(&rules).start().await.unwrap();
    assert!(send(&mut client(&broker).await, message("q", "x")).await.is_error);
    // Who asks for what it may see is refused nothing.
    let allowed = "[[rule]]
resources = ['queues', 'events']
channel = '[^s].*'
allow = ['read']
[[rule]]
client = 'root'
allow = ['write']";
    std::fs::write(&rules, allowed).unwrap();
    broker.reload().await.unwrap();
    let mut caller = client(&broker).await;
    let root = QueueMessage { client_id: "root".into(), ..message("secret", "x") };
    assert!(!send(&mut caller, root).await.is_error);
    let all = subscribe(SubscribeType::Events, ">", EventsStoreType::Undefined);
    let mut events = caller.subscribe_to_events(all).await.unwrap().into_inner();
    for channel in ["secret", "open"] {
        caller.send_event(Event { client_id: "root".into(), ..event(channel, "x", false) }).await.unwrap();
    }
    assert_eq!(next(&mut events).await.channel, "open");
    let list = Request {
        request_type_data: request::RequestType::Query.into(),
        client_id: "test".into(),
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: "list-channels".into(),
        timeout: 1000,
        tags: [("channel_type".into(), "queues".into())].into(),
        ..Request::default()
    };
    assert_eq!(&*caller.send_request(list).await.unwrap().into_inner().body, b"[]");
    let figures = get(broker.http_address().unwrap(), "/metrics").await.1;
    assert!(figures.contains("polymq_broker_denied_total 1\n"), "{figures}");
}

#[tokio::test]
async fn an_address_that_is_taken_is_told() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = Broker::builder().listen("127.0.0.1:0").http(&address).start().await.unwrap_err();
    assert!(matches!(&error, BrokerError::Listen { .. }) && error.to_string().contains(&address), "{error}");
}
