//! Events, stored events, commands and queries over the wire.

use std::time::{Duration, Instant};

use polymq_broker::Broker;
use polymq_kubemq_proto::{
    kubemq_client::KubemqClient,
    request::RequestType,
    subscribe::{EventsStoreType, SubscribeType},
    *,
};
use tonic::{Streaming, transport::Channel};

type Client = KubemqClient<Channel>;

async fn broker() -> (Broker, Client) {
    let broker = Broker::builder().listen("127.0.0.1:0").start().await.unwrap();
    let client = connect(&broker).await;
    (broker, client)
}

async fn connect(broker: &Broker) -> Client {
    let channel = Channel::from_shared(format!("http://{}", broker.address())).unwrap().connect().await.unwrap();
    KubemqClient::new(channel)
}

fn event(channel: &str, body: &str, store: bool) -> Event {
    Event { client_id: "test".into(), channel: channel.into(), body: body.to_owned().into(), store, ..Event::default() }
}

fn subscribe(kind: SubscribeType, channel: &str, group: &str, client: &str) -> Subscribe {
    Subscribe {
        subscribe_type_data: kind.into(),
        client_id: client.into(),
        channel: channel.into(),
        group: group.into(),
        ..Subscribe::default()
    }
}

async fn next(stream: &mut Streaming<EventReceive>) -> String {
    let event =
        tokio::time::timeout(Duration::from_secs(60), stream.message()).await.expect("in time").unwrap().unwrap();
    String::from_utf8(event.body.to_vec()).unwrap()
}

#[tokio::test]
async fn events_reach_patterns_and_one_member_of_each_group() {
    let (_broker, mut client) = broker().await;
    let listen = |pattern: &'static str, group: &'static str, mut client: Client| async move {
        let request = subscribe(SubscribeType::Events, pattern, group, "listener");
        client.subscribe_to_events(request).await.unwrap().into_inner()
    };
    let mut all = listen("a.>", "", client.clone()).await;
    let mut one = listen("a.*", "g", client.clone()).await;
    let mut other = listen("a.>", "g", client.clone()).await;
    for number in 0..20 {
        let sent = client.send_event(event("a.b", &number.to_string(), false)).await.unwrap().into_inner();
        assert!(sent.sent && !sent.event_id.is_empty());
    }
    client.send_event(event("b.c", "elsewhere", false)).await.unwrap();
    for number in 0..20 {
        assert_eq!(next(&mut all).await, number.to_string());
    }
    let (mut shared, mut ended) = (Vec::new(), 0);
    while shared.len() < 20 && ended < 2 {
        tokio::select! {
            body = next(&mut one) => shared.push(body),
            body = next(&mut other) => shared.push(body),
        }
        ended = 0;
    }
    shared.sort_by_key(|body| body.parse::<u32>().unwrap());
    assert_eq!(shared, (0..20).map(|number| number.to_string()).collect::<Vec<_>>(), "each once in the group");
    let refused = client.send_event(event("a.>", "x", false)).await.unwrap_err();
    assert_eq!((refused.code(), refused.message().starts_with("Error 107: ")), (tonic::Code::Internal, true));
}

#[tokio::test]
async fn stored_events_are_read_from_every_start_and_positions_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let start = || Broker::builder().listen("127.0.0.1:0").data_dir(folder.path()).start();
    let broker = start().await.unwrap();
    let mut client = connect(&broker).await;
    for number in 1..=5 {
        assert!(client.send_event(event("log", &number.to_string(), true)).await.unwrap().into_inner().sent);
    }
    let from = |kind: EventsStoreType, value: i64, name: &'static str| Subscribe {
        events_store_type_data: kind.into(),
        events_store_type_value: value,
        ..subscribe(SubscribeType::EventsStore, "log", "", name)
    };
    for (kind, value, first) in [
        (EventsStoreType::StartFromFirst, 0, "1"),
        (EventsStoreType::StartFromLast, 0, "5"),
        (EventsStoreType::StartAtSequence, 3, "3"),
        (EventsStoreType::StartAtTime, 1, "1"),
        (EventsStoreType::StartAtTimeDelta, 3600, "1"),
    ] {
        let name = kind.as_str_name();
        let mut stream = client.subscribe_to_events(from(kind, value, name)).await.unwrap().into_inner();
        assert_eq!(next(&mut stream).await, first, "{name}");
    }
    let mut fresh =
        client.subscribe_to_events(from(EventsStoreType::StartNewOnly, 0, "new")).await.unwrap().into_inner();
    client.send_event(event("log", "6", true)).await.unwrap();
    assert_eq!(next(&mut fresh).await, "6");
    let twice = client.subscribe_to_events(from(EventsStoreType::StartNewOnly, 0, "new")).await.unwrap_err();
    assert!(twice.message().contains("already registered"), "{twice}");
    drop((fresh, client));
    broker.stop().await;

    let broker = start().await.unwrap();
    let mut client = connect(&broker).await;
    client.send_event(event("log", "7", true)).await.unwrap();
    let mut again =
        client.subscribe_to_events(from(EventsStoreType::StartFromFirst, 0, "new")).await.unwrap().into_inner();
    assert_eq!(next(&mut again).await, "7", "where it was, whatever it asks for");
    broker.stop().await;
}

/// Done differently on purpose: who asks for a sequence that is not there yet reads what comes next, be its number lower.
#[tokio::test]
async fn a_start_beyond_the_end_is_the_end() {
    let (_broker, mut client) = broker().await;
    for body in ["1", "2"] {
        assert!(client.send_event(event("log", body, true)).await.unwrap().into_inner().sent);
    }
    for (value, name) in [(4, "near"), (i64::MAX, "far")] {
        let beyond = Subscribe {
            events_store_type_data: EventsStoreType::StartAtSequence.into(),
            events_store_type_value: value,
            ..subscribe(SubscribeType::EventsStore, "log", "", name)
        };
        let mut stream = client.subscribe_to_events(beyond).await.unwrap().into_inner();
        let body = format!("for {name}");
        client.send_event(event("log", &body, true)).await.unwrap();
        assert_eq!(next(&mut stream).await, body, "the first one after the end");
    }
}

#[tokio::test]
async fn requests_are_answered_or_time_out_and_queries_are_cached() {
    let (_broker, mut client) = broker().await;
    let mut responder = client
        .subscribe_to_requests(subscribe(SubscribeType::Queries, "ask", "", "responder"))
        .await
        .unwrap()
        .into_inner();
    let mut answering = client.clone();
    let answers = tokio::spawn(async move {
        let mut count = 0;
        while let Ok(Some(request)) = responder.message().await {
            count += 1;
            let response = Response {
                client_id: "responder".into(),
                request_id: request.request_id,
                reply_channel: request.reply_channel,
                body: format!("answer {count}").into(),
                executed: true,
                ..Response::default()
            };
            answering.send_response(response).await.unwrap();
        }
    });
    let ask = |timeout: i32, key: &str| Request {
        request_type_data: RequestType::Query.into(),
        client_id: "test".into(),
        channel: "ask".into(),
        body: "?".into(),
        timeout,
        cache_key: key.into(),
        cache_ttl: i32::from(!key.is_empty()) * 60,
        ..Request::default()
    };
    let first = client.send_request(ask(60_000, "key")).await.unwrap().into_inner();
    assert_eq!((&*first.body, first.cache_hit, first.executed), (&b"answer 1"[..], false, true));
    let hit = client.send_request(ask(60_000, "key")).await.unwrap().into_inner();
    assert_eq!((&*hit.body, hit.cache_hit), (&b"answer 1"[..], true));
    let fresh = client.send_request(ask(60_000, "")).await.unwrap().into_inner();
    assert_eq!((&*fresh.body, fresh.cache_hit), (&b"answer 2"[..], false));

    let started = Instant::now();
    let nobody = Request { request_type_data: RequestType::Command.into(), ..ask(300, "") };
    let late = client.send_request(nobody).await.unwrap_err();
    assert!(late.message().starts_with("Error 301: "), "{late}");
    assert!(started.elapsed() >= Duration::from_millis(300), "not before its time");
    answers.abort();
}

#[tokio::test]
async fn channels_are_made_listed_and_removed_by_queries() {
    let (_broker, mut client) = broker().await;
    let mut manage = async |operation: &str, tags: &[(&str, &str)]| {
        let request = Request {
            request_type_data: RequestType::Query.into(),
            client_id: "test".into(),
            channel: "kubemq.cluster.internal.requests".into(),
            metadata: operation.into(),
            timeout: 60_000,
            tags: tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            ..Request::default()
        };
        let answer = client.send_request(request).await.unwrap().into_inner();
        (answer.executed, answer.error, String::from_utf8(answer.body.to_vec()).unwrap())
    };
    for kind in ["queues", "events_store", "events", "commands", "queries"] {
        let tags = [("channel_type", kind), ("channel", "made"), ("client_id", "test")];
        assert!(manage("create-channel", &tags).await.0, "{kind}");
        let (_, _, listed) = manage("list-channels", &[("channel_type", kind), ("channel_search", "ma*")]).await;
        assert!(listed.contains("\"name\":\"made\"") && listed.contains(&format!("\"type\":\"{kind}\"")), "{listed}");
        assert!(manage("delete-channel", &tags).await.0, "{kind}");
        let (done, error, _) = manage("delete-channel", &tags).await;
        assert!(!done && error.contains("channel not found"), "{error}");
        assert_eq!(manage("list-channels", &[("channel_type", kind)]).await.2, "[]");
    }
}
