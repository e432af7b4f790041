//! Tokens and rules over the wire. Keys and tokens were made with OpenSSL.

use std::{
    path::{Path, PathBuf},
    result::Result,
};

use crate::common::*;
use polymq_broker::{Broker, BrokerError, TokenAlgorithm};
use polymq_kubemq_proto::{request::RequestType, subscribe::*, *};
use tonic::Code;

const ALGORITHMS: [&str; 9] = ["HS256", "HS384", "HS512", "RS256", "RS384", "RS512", "ES256", "ES384", "ES512"];

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tokens").join(name)
}

fn token(name: &str) -> String {
    std::fs::read_to_string(file(&format!("{name}.token"))).unwrap()
}

async fn start(algorithm: &str, key: PathBuf) -> Result<Broker, BrokerError> {
    Broker::builder().listen("127.0.0.1:0").token_key(algorithm.parse().unwrap(), key).start().await
}

async fn refused(broker: &Broker, token: &str) -> String {
    let status = client_with(broker, token).await.send_queue_message(message("q", "x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated, "{status}");
    status.message().to_owned()
}

#[tokio::test]
async fn tokens_of_all_algorithms_are_checked() {
    for algorithm in ALGORITHMS {
        let broker = start(algorithm, file(&format!("{algorithm}.key"))).await.unwrap();
        let good = token(algorithm);
        let sent = send(&mut client_with(&broker, &good).await, message("q", "x")).await;
        assert!(!sent.is_error, "{algorithm}: {sent:?}");

        // The signature's first letter is another one, then the claims are another token's.
        let (signed, signature) = good.trim().rsplit_once('.').unwrap();
        let other = if signature.starts_with('B') { 'C' } else { 'B' };
        let forged = format!("{signed}.{other}{}", &signature[1..]);
        assert_eq!(
            refused(&broker, &forged).await,
            "Error 421: authentication verification failed, signature is invalid"
        );
        let header = good.split('.').next().unwrap();
        let claims = token("nobody").split('.').nth(1).unwrap().to_owned();
        let forged = format!("{header}.{claims}.{signature}");
        assert!(refused(&broker, &forged).await.ends_with("signature is invalid"), "{algorithm}");
        for other in ALGORITHMS.into_iter().filter(|other| *other != algorithm) {
            assert!(refused(&broker, &token(other)).await.contains("another way"), "{other} to {algorithm}");
        }
    }
}

#[tokio::test]
async fn every_call_but_ping_asks_for_a_token() {
    let broker = start("HS256", file("HS256.key")).await.unwrap();
    let mut nobody = client(&broker).await;
    assert!(!nobody.ping(Empty {}).await.unwrap().into_inner().version.is_empty());
    let statuses = [
        nobody.send_event(event("e", "x", false)).await.unwrap_err(),
        nobody.send_events_stream(tokio_stream::empty()).await.unwrap_err(),
        nobody.subscribe_to_events(Subscribe::default()).await.unwrap_err(),
        nobody.subscribe_to_requests(Subscribe::default()).await.unwrap_err(),
        nobody.send_request(Request::default()).await.unwrap_err(),
        nobody.send_response(Response::default()).await.unwrap_err(),
        nobody.send_queue_message(message("q", "x")).await.unwrap_err(),
        nobody.send_queue_messages_batch(QueueMessagesBatchRequest::default()).await.unwrap_err(),
        nobody.receive_queue_messages(receiving("q", 1)).await.unwrap_err(),
        nobody.ack_all_queue_messages(AckAllQueueMessagesRequest::default()).await.unwrap_err(),
        nobody.stream_queue_message(tokio_stream::empty()).await.unwrap_err(),
        nobody.queues_downstream(tokio_stream::empty()).await.unwrap_err(),
        nobody.queues_upstream(tokio_stream::empty()).await.unwrap_err(),
        nobody.queues_info(QueuesInfoRequest::default()).await.unwrap_err(),
    ];
    for status in statuses {
        assert_eq!((status.code(), status.message()), (Code::Unauthenticated, "Authorization token is not supplied"));
    }
    for (wrong, why) in [
        (token("expired"), "token is expired"),
        (token("early"), "token is not valid yet"),
        ("no token".to_owned(), "token is malformed"),
        ("e30.e30.e30".to_owned(), "token is malformed"),
        (format!("{}.x", "y".repeat(10_000)), "token is too long"),
    ] {
        assert_eq!(refused(&broker, &wrong).await, format!("Error 421: authentication verification failed, {why}"));
    }
}

#[tokio::test]
async fn a_new_key_is_taken_while_the_broker_runs() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("key");
    std::fs::copy(file("HS256.key"), &key).unwrap();
    let broker = start("HS256", key.clone()).await.unwrap();
    let mut caller = client_with(&broker, &token("HS256")).await;
    assert!(!send(&mut caller, message("q", "x")).await.is_error);

    std::fs::write(&key, "").unwrap();
    let kept = broker.reload().await.unwrap_err().to_string();
    assert!(kept.contains("the token key is empty"), "{kept}");
    assert!(!send(&mut caller, message("q", "x")).await.is_error, "a wrong file changes nothing");

    std::fs::write(&key, "another secret").unwrap();
    broker.reload().await.unwrap();
    assert!(refused(&broker, &token("HS256")).await.ends_with("signature is invalid"));
}

#[tokio::test]
async fn wrong_keys_are_told_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text");
    std::fs::write(&text, "not a key").unwrap();
    for (algorithm, key, sentence) in [
        (
            "RS256",
            text.clone(),
            "RS256 needs an RSA public key of 2048 bits or more, found none: the file must hold a public key as PEM",
        ),
        ("RS256", file("ES256.key"), "found a key of another curve"),
        ("ES256", file("RS256.key"), "ES256 needs a public key of the curve P-256, found an RSA key"),
        ("ES384", file("ES512.key"), "ES384 needs a public key of the curve P-384, found a key of another curve"),
        ("ES512", file("ES384.key"), "ES512 needs a public key of the curve P-521, found a key of another curve"),
        ("HS256", folder.path().join("none"), "the token key cannot be read: No such file"),
    ] {
        let error = start(algorithm, key.clone()).await.unwrap_err().to_string();
        assert!(error.starts_with(&*key.to_string_lossy()) && error.contains(sentence), "{error}");
    }
    assert!("none".parse::<TokenAlgorithm>().unwrap_err().contains("expected HS256, "));
}

const RULES: &str = r#"
[[rule]]
resources = ["queues"]
client = "shop|billing"
channel = "orders\\..*"
allow = ["write"]

[[rule]]
resources = ["queues", "queries"]
client = "billing"
allow = ["read"]

[[rule]]
resources = ["events", "events_store"]
channel = "[a-z.>]+"
allow = ["read", "write"]
"#;

async fn with_rules(text: &str) -> Result<Broker, BrokerError> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("rules.toml");
    std::fs::write(&file, text).unwrap();
    Broker::builder().listen("127.0.0.1:0").rules(file).start().await
}

const DENIED: &str = "Error 412: access denied to resource";

#[tokio::test]
async fn rules_say_who_may_do_what() {
    let broker = with_rules(RULES).await.unwrap();
    let mut client = client(&broker).await;
    let from = |id: &str, queue: &str| QueueMessage { client_id: id.into(), ..message(queue, "x") };
    let dead = QueueMessagePolicy { max_receive_queue: "secret".into(), ..QueueMessagePolicy::default() };
    for (asked, allowed) in [
        (from("shop", "orders.eu"), true),
        (from("shop", "orders"), false),
        (from("shop2", "orders.eu"), false),
        (from("billing", "invoices"), false),
        (QueueMessage { policy: Some(dead), ..from("shop", "orders.eu") }, false),
    ] {
        let sent = send(&mut client, asked.clone()).await;
        assert_eq!(
            (sent.error.as_str(), sent.message_id.is_empty()),
            (if allowed { "" } else { DENIED }, false),
            "{asked:?}"
        );
    }
    let receive = |id: &str| ReceiveQueueMessagesRequest { client_id: id.into(), ..receiving("orders.eu", 5) };
    let denied = client.receive_queue_messages(receive("shop")).await.unwrap().into_inner();
    assert_eq!((denied.is_error, denied.error.as_str()), (true, DENIED));
    let received = client.receive_queue_messages(receive("billing")).await.unwrap().into_inner();
    assert_eq!(received.messages_received, 1);
    let empty =
        AckAllQueueMessagesRequest { client_id: "billing".into(), channel: "invoices".into(), ..Default::default() };
    assert_eq!(client.ack_all_queue_messages(empty).await.unwrap().into_inner().error, DENIED);

    let ask = Request {
        request_type_data: RequestType::Query.into(),
        client_id: "billing".into(),
        channel: "prices".into(),
        body: "?".into(),
        timeout: 100,
        ..Request::default()
    };
    let denied = client.send_request(ask).await.unwrap_err();
    assert_eq!((denied.code(), denied.message()), (Code::Internal, DENIED));
    let listen = |id: &str, kind: SubscribeType| Subscribe {
        client_id: id.into(),
        ..subscribe(kind, "prices", EventsStoreType::Undefined)
    };
    client.subscribe_to_requests(listen("billing", SubscribeType::Queries)).await.unwrap();
    for (id, kind) in [("shop", SubscribeType::Queries), ("billing", SubscribeType::Commands)] {
        assert_eq!(client.subscribe_to_requests(listen(id, kind)).await.unwrap_err().message(), DENIED);
    }

    // Polls and their settlement, the older transactions, and sending over a stream.
    let get = QueuesDownstreamRequest {
        client_id: "shop".into(),
        channel: "orders.eu".into(),
        request_type_data: QueuesDownstreamRequestType::Get.into(),
        ..QueuesDownstreamRequest::default()
    };
    let mut polled = client.queues_downstream(tokio_stream::iter([get])).await.unwrap().into_inner();
    assert_eq!(polled.message().await.unwrap().unwrap().error, DENIED);
    let receive = StreamQueueMessagesRequest {
        client_id: "shop".into(),
        channel: "orders.eu".into(),
        stream_request_type_data: StreamRequestType::ReceiveMessage.into(),
        ..StreamQueueMessagesRequest::default()
    };
    let mut answers = client.stream_queue_message(tokio_stream::iter([receive])).await.unwrap().into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().error, DENIED);
    let upstream =
        QueuesUpstreamRequest { messages: vec![from("shop", "orders.eu"), from("shop", "else")], ..Default::default() };
    let mut answers = client.queues_upstream(tokio_stream::iter([upstream])).await.unwrap().into_inner();
    let results = answers.message().await.unwrap().unwrap().results;
    assert_eq!(results.iter().map(|result| result.error.as_str()).collect::<Vec<_>>(), ["", DENIED]);
}

#[tokio::test]
async fn a_pattern_shows_only_what_its_reader_may_read() {
    let broker = with_rules(RULES).await.unwrap();
    let mut client = client(&broker).await;
    let everything = subscribe(SubscribeType::Events, ">", EventsStoreType::Undefined);
    let mut events = client.subscribe_to_events(everything).await.unwrap().into_inner();
    let denied = client.send_event(event("a.1", "x", false)).await.unwrap_err();
    assert_eq!((denied.code(), denied.message()), (Code::Internal, DENIED));
    client.send_event(event("a.b", "seen", false)).await.unwrap();
    assert_eq!(next(&mut events).await.channel, "a.b");
    let denied =
        client.subscribe_to_events(subscribe(SubscribeType::EventsStore, "a1", EventsStoreType::StartFromFirst)).await;
    assert_eq!(denied.unwrap_err().message(), DENIED);

    // A reader of everything who may only read a part.
    let rules = "[[rule]]\nclient = 'test'\nchannel = 'a\\..*|>'\nallow = ['read']\n[[rule]]\nclient = 'sender'\nallow = ['write']";
    let broker = with_rules(rules).await.unwrap();
    let mut client = crate::common::client(&broker).await;
    let everything = subscribe(SubscribeType::Events, ">", EventsStoreType::Undefined);
    let mut events = client.subscribe_to_events(everything).await.unwrap().into_inner();
    for channel in ["b.secret", "a.open"] {
        let sent = Event { client_id: "sender".into(), ..event(channel, "x", false) };
        client.send_event(sent).await.unwrap();
    }
    assert_eq!(next(&mut events).await.channel, "a.open");
}

#[tokio::test]
async fn the_client_of_a_token_is_who_it_says() {
    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    std::fs::write(&rules, RULES).unwrap();
    let key = file("HS256.key");
    let broker = Broker::builder().listen("127.0.0.1:0").token_key(TokenAlgorithm::HS256, key).rules(&rules).start();
    let broker = broker.await.unwrap();
    let mut billing = client_with(&broker, &token("HS256")).await;
    let receive = |id: &str| ReceiveQueueMessagesRequest { client_id: id.into(), ..receiving("q", 1) };
    assert_eq!(billing.receive_queue_messages(receive("whoever")).await.unwrap().into_inner().error, "");
    let mut nobody = client_with(&broker, &token("nobody")).await;
    assert_eq!(nobody.receive_queue_messages(receive("billing")).await.unwrap().into_inner().error, "");
    assert_eq!(nobody.receive_queue_messages(receive("whoever")).await.unwrap().into_inner().error, DENIED);

    // Rules that change hold for the next request.
    std::fs::write(&rules, "[[rule]]\nallow = ['write']").unwrap();
    broker.reload().await.unwrap();
    assert_eq!(billing.receive_queue_messages(receive("billing")).await.unwrap().into_inner().error, DENIED);
}

#[tokio::test]
async fn channels_are_managed_and_listed_as_far_as_rules_go() {
    let broker = with_rules(RULES).await.unwrap();
    let mut client = client(&broker).await;
    let ask = |id: &str, operation: &str, channel: &str| Request {
        request_type_data: RequestType::Query.into(),
        client_id: id.into(),
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: operation.into(),
        timeout: 1000,
        tags: [("channel_type".into(), "queues".into()), ("channel".into(), channel.into())].into(),
        ..Request::default()
    };
    for (id, operation, channel, error) in [
        ("shop", "create-channel", "orders.eu", ""),
        ("shop", "create-channel", "other", DENIED),
        ("shop", "delete-channel", "other", DENIED),
    ] {
        let answer = client.send_request(ask(id, operation, channel)).await.unwrap().into_inner();
        assert_eq!((answer.executed, answer.error.as_str()), (error.is_empty(), error), "{operation} {channel}");
    }
    let listed = client.send_request(ask("shop", "list-channels", "")).await.unwrap().into_inner();
    assert!(String::from_utf8_lossy(&listed.body).contains("orders.eu"), "{listed:?}");
    let listed = client.send_request(ask("stranger", "list-channels", "")).await.unwrap().into_inner();
    assert_eq!(&*listed.body, b"[]");
}

const OWN_RULES: &str = r#"
[[rule]]
client = "shop"
channel = "orders"
allow = ["write"]

[[rule]]
client = "billing"
channel = "orders|bills"
allow = ["read"]

[[rule]]
client = "admin"
channel = "secret"
allow = ["read", "write"]
"#;

/// Names and numbers of messages.
async fn shown(client: &mut Client, queue: &str) -> Result<Vec<(String, i64)>, String> {
    let asked = QueuesInfoRequest { queue_name: queue.into(), ..QueuesInfoRequest::default() };
    let info = client.queues_info(asked).await.map_err(|status| status.message().to_owned())?.into_inner().info;
    Ok(info.unwrap().queues.into_iter().map(|queue| (queue.name, queue.messages)).collect())
}

/// Who asks for queues says no name: where no token does either, it is anybody's whom a rule lets read or write.
#[tokio::test]
async fn who_may_read_or_write_a_queue_sees_that_it_is_there() {
    let broker = with_rules(OWN_RULES).await.unwrap();
    let mut nobody = client(&broker).await;
    for (id, queue) in [("shop", "orders"), ("admin", "secret")] {
        let sent = send(&mut nobody, QueueMessage { client_id: id.into(), ..message(queue, "x") }).await;
        assert_eq!(sent.error, "");
    }
    let (orders, secret) = (("orders".to_owned(), 0), ("secret".to_owned(), 0));
    assert_eq!(shown(&mut nobody, "").await.unwrap(), []);
    assert_eq!(shown(&mut nobody, "orders").await.unwrap(), [orders], "and not what is in it");
    assert_eq!(shown(&mut nobody, "secret").await.unwrap(), [secret]);
    assert_eq!(shown(&mut nobody, "bills").await.unwrap(), []);
    assert_eq!(shown(&mut nobody, "other").await.unwrap_err(), DENIED);
    // Nothing else has become possible.
    assert_eq!(send(&mut nobody, message("orders", "x")).await.error, DENIED);
    for asked in
        [receiving("secret", 1), ReceiveQueueMessagesRequest { client_id: "shop".into(), ..receiving("orders", 1) }]
    {
        assert_eq!(nobody.receive_queue_messages(asked).await.unwrap().into_inner().error, DENIED);
    }

    let folder = tempfile::tempdir().unwrap();
    let rules = folder.path().join("rules.toml");
    std::fs::write(&rules, format!("{OWN_RULES}[[rule]]\nclient = 'billing'\nchannel = 'sent'\nallow = ['write']"))
        .unwrap();
    let builder = Broker::builder().listen("127.0.0.1:0").rules(rules);
    let broker = builder.token_key(TokenAlgorithm::HS256, file("HS256.key")).start().await.unwrap();
    let (mut billing, mut nobody) =
        (client_with(&broker, &token("HS256")).await, client_with(&broker, &token("nobody")).await);
    for (id, queue) in [("shop", "orders"), ("admin", "secret"), ("billing", "sent")] {
        let sent = send(&mut nobody, QueueMessage { client_id: id.into(), ..message(queue, "x") }).await;
        assert_eq!(sent.error, "");
    }
    let (orders, sent) = (("orders".to_owned(), 1), ("sent".to_owned(), 0));
    assert_eq!(shown(&mut billing, "").await.unwrap(), [orders]);
    assert_eq!(shown(&mut billing, "sent").await.unwrap(), [sent]);
    assert_eq!(shown(&mut billing, "secret").await.unwrap_err(), DENIED);
    assert_eq!(shown(&mut nobody, "secret").await.unwrap(), [("secret".to_owned(), 0)]);
}

#[tokio::test]
async fn mistakes_in_rules_are_told_in_a_sentence() {
    for (text, sentence) in [
        ("", "there is no [[rule]]: nobody could do anything"),
        ("[[rule]]\nallow = []", "rule 1: allow is empty: expected \"read\", \"write\" or both"),
        (
            "[[rule]]\nallow = ['read']\n\n[[rule]]\nallow = ['read']\nchannel = '('",
            "rule 2: channel = \"(\" is not a regular expression: unclosed group",
        ),
        ("[[rule]]\nallow = ['read']\nclient = ')|('", "rule 1: client = \")|(\" is not a regular expression"),
        ("[[rule]]\nallow = ['look']", "line 2: unknown variant `look`, expected `read` or `write`"),
        (
            "[[rule]]\nallow = ['read']\nresources = ['topics']",
            "line 3: unknown variant `topics`, expected one of `events`",
        ),
        ("[[rule]]\nallow = ['read']\nchanel = 'x'", "line 3: unknown field `chanel`"),
        ("[[rule]]\nchannel = 'x'", "missing field `allow`"),
        ("rule", "line 1: "),
    ] {
        let error = with_rules(text).await.unwrap_err().to_string();
        assert!(error.contains("rules.toml: ") && error.contains(sentence), "{text:?}: {error}");
    }
    let missing = Broker::builder().listen("127.0.0.1:0").rules("/nowhere/rules.toml").start().await.unwrap_err();
    assert!(missing.to_string().starts_with("/nowhere/rules.toml: the rules cannot be read: "), "{missing}");
}
