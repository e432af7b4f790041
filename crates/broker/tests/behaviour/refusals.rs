//! Bad requests over the wire: each is refused with the protocol's number and sentence, and disturbs nothing else.

use std::{fmt, result::Result};

use polymq_broker::{Broker, Limits};
use polymq_kubemq_proto::{Result as Sent, StreamRequestType as Kind, request::RequestType, subscribe::*, *};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::common::*;

/// What the protocol says to a number.
fn sentence(number: u32) -> String {
    let text = match number {
        101 => "invalid clientID value, cannot be empty",
        102 => "invalid channel value, cannot be empty",
        107 => "invalid channel value, no wildcards are allowed",
        108 => "invalid channel value, no white spaces are allowed",
        109 => "invalid set timeout value, cannot be 0 or negative",
        110 => "invalid message, cannot be empty",
        111 => "invalid subscription type, cannot be undefined or 0",
        112 => "invalid subscription type start at sequence value, cannot by 0 or negative",
        113 => "invalid subscription type start at time value, cannot by 0 or negative",
        114 => "invalid subscription type start at time delta value, cannot by 0 or negative",
        115 => "invalid request, cannot be empty",
        116 => "invalid cache ttl value, cannot be 0 or negative",
        117 => "invalid request id, cannot be empty",
        118 => "event store parameters were set but subscribe type is not event store",
        119 => "invalid channel value, cannot end with `.`",
        120 => "invalid queue name value, cannot be empty, contains wildcards ,white spaces and end with dot",
        124 => "no active message to ack",
        125 => "ack sequence cannot be 0 or negative",
        126 => "no active message to send",
        127 => "invalid visibility time, cannot be negative or exceed setting in kubemq config",
        128 => "subscription to queue is already active",
        130 => "error during send message to queue",
        131 => "invalid queue message",
        132 => "invalid stream queue messages request type",
        136 => {
            "invalid wait timeout, value cannot be negative or exceed max wait timeout seconds setting in kubemq config"
        }
        137 => "no active message to reject",
        206 => "invalid request type",
        207 => "invalid subscribe type",
        other => panic!("no sentence for {other}"),
    };
    format!("Error {number}: {text}")
}

fn refused<T>(result: Result<T, Status>, number: u32, case: &impl fmt::Debug) {
    let Err(status) = result else { panic!("not refused: {case:?}") };
    assert_eq!((status.code(), status.message()), (Code::Internal, &*sentence(number)), "{case:?}");
}

async fn start() -> (Broker, Client) {
    let broker = Broker::builder().listen("127.0.0.1:0").start().await.unwrap();
    let client = client(&broker).await;
    (broker, client)
}

/// The broker goes on.
async fn goes_on(broker: Broker, mut caller: Client) {
    assert!(!send(&mut caller, message("good", "x")).await.is_error);
    assert_eq!(receive(&mut caller, "good", 1).await, ["x"]);
    drop(caller);
    broker.stop().await;
}

fn bad_events() -> Vec<(u32, Event)> {
    let mut bad = vec![(120, event("a..b", "x", true))];
    for store in [false, true] {
        for (number, channel) in [(102, ""), (107, "a.*"), (108, "a b"), (119, "a.")] {
            bad.push((number, event(channel, "x", store)));
        }
        bad.push((101, Event { client_id: String::new(), ..event("a", "x", store) }));
        bad.push((110, event("a", "", store)));
    }
    bad
}

#[tokio::test]
async fn events() {
    let (broker, mut caller) = start().await;
    for (number, event) in bad_events() {
        refused(caller.send_event(event.clone()).await, number, &event);
    }
    goes_on(broker, caller).await;
}

/// On a stream a refusal is an answer, of a plain event too, and the stream goes on.
#[tokio::test]
async fn events_of_a_stream() {
    let (broker, mut caller) = start().await;
    let listening = subscribe(SubscribeType::Events, "good", EventsStoreType::Undefined);
    let mut listener = caller.subscribe_to_events(listening).await.unwrap().into_inner();
    let (events, stream) = mpsc::channel(1);
    let mut answers = caller.send_events_stream(ReceiverStream::new(stream)).await.unwrap().into_inner();
    for (at, (number, bad)) in bad_events().into_iter().enumerate() {
        let id = format!("bad {at}");
        events.send(Event { event_id: id.clone(), ..bad }).await.unwrap();
        let expected = Sent { event_id: id, sent: false, error: sentence(number) };
        assert_eq!(answers.message().await.unwrap().unwrap(), expected);
    }
    events.send(event("good", "plain", false)).await.unwrap();
    assert_eq!(&*next(&mut listener).await.body, b"plain");
    events.send(Event { event_id: "stored".into(), ..event("good", "x", true) }).await.unwrap();
    let expected = Sent { event_id: "stored".into(), sent: true, error: String::new() };
    assert_eq!(answers.message().await.unwrap().unwrap(), expected, "and none for a plain one that was taken");
    drop(events);
    assert_eq!(answers.message().await.unwrap(), None, "the end of the stream");
    drop(listener);
    goes_on(broker, caller).await;
}

fn request() -> Request {
    Request {
        request_type_data: RequestType::Query.into(),
        client_id: "test".into(),
        channel: "ask".into(),
        body: "?".into(),
        timeout: 60_000,
        ..Request::default()
    }
}

#[tokio::test]
async fn subscriptions() {
    use EventsStoreType::*;
    let (broker, mut caller) = start().await;
    let events = |start: EventsStoreType| subscribe(SubscribeType::Events, "log", start);
    let stored = |start: i32, value: i64| Subscribe {
        events_store_type_data: start,
        events_store_type_value: value,
        ..subscribe(SubscribeType::EventsStore, "log", Undefined)
    };
    let other = |kind: i32| Subscribe { subscribe_type_data: kind, ..events(Undefined) };
    let mut bad = vec![
        (118, events(StartNewOnly)),
        (111, stored(0, 0)),
        (111, stored(7, 1)),
        (101, Subscribe { client_id: String::new(), ..stored(StartNewOnly.into(), 0) }),
        (107, Subscribe { channel: "log.>".into(), ..stored(StartNewOnly.into(), 0) }),
        (120, Subscribe { channel: "a..b".into(), ..stored(StartNewOnly.into(), 0) }),
        (207, other(SubscribeType::Undefined.into())),
        (207, other(SubscribeType::Queries.into())),
        (207, other(9)),
    ];
    for (number, start) in [(112, StartAtSequence), (113, StartAtTime), (114, StartAtTimeDelta)] {
        bad.extend([0, -1].map(|value| (number, stored(start.into(), value))));
    }
    for (number, channel) in [(102, ""), (108, "a b"), (119, "a.")] {
        bad.push((number, Subscribe { channel: channel.into(), ..events(Undefined) }));
    }
    for (number, subscribe) in bad {
        refused(caller.subscribe_to_events(subscribe.clone()).await, number, &subscribe);
    }
    let requests = |channel: &str| subscribe(SubscribeType::Commands, channel, Undefined);
    for (number, subscribe) in [
        (207, events(Undefined)),
        (207, other(SubscribeType::Undefined.into())),
        (101, Subscribe { client_id: String::new(), ..requests("ask") }),
        (102, requests("")),
        (107, requests("ask.*")),
        (108, requests("a b")),
        (119, requests("ask.")),
    ] {
        refused(caller.subscribe_to_requests(subscribe.clone()).await, number, &subscribe);
    }
    let list = Request {
        channel: "kubemq.cluster.internal.requests".into(),
        metadata: "list-channels".into(),
        tags: [("channel_type".to_owned(), "events_store".to_owned())].into(),
        ..request()
    };
    let list = caller.send_request(list).await.unwrap().into_inner();
    assert_eq!(&*list.body, b"[]", "what was refused makes no channel");
    goes_on(broker, caller).await;
}

#[tokio::test]
async fn requests_and_answers() {
    let (broker, mut caller) = start().await;
    let mut bad = vec![
        (206, Request { request_type_data: 0, ..request() }),
        (206, Request { request_type_data: 9, ..request() }),
        (101, Request { client_id: String::new(), ..request() }),
        (115, Request { body: "".into(), ..request() }),
    ];
    for value in [0, -1] {
        bad.push((109, Request { timeout: value, ..request() }));
        bad.push((116, Request { cache_key: "k".into(), cache_ttl: value, ..request() }));
    }
    let names = [(102, ""), (107, "ask.>"), (108, "a b"), (119, "ask.")];
    bad.extend(names.map(|(number, channel)| (number, Request { channel: channel.into(), ..request() })));
    for (number, request) in bad {
        refused(caller.send_request(request.clone()).await, number, &request);
    }

    let listening = subscribe(SubscribeType::Queries, "ask", EventsStoreType::Undefined);
    let mut responder = caller.subscribe_to_requests(listening).await.unwrap().into_inner();
    let mut asking = caller.clone();
    let asked = tokio::spawn(async move { asking.send_request(request()).await.unwrap().into_inner() });
    let got = responder.message().await.unwrap().unwrap();
    let good = Response {
        client_id: "responder".into(),
        request_id: got.request_id,
        reply_channel: got.reply_channel,
        body: "!".into(),
        executed: true,
        ..Response::default()
    };
    let names = names.map(|(number, channel)| (number, Response { reply_channel: channel.into(), ..good.clone() }));
    let mut bad = names.to_vec();
    bad.push((101, Response { client_id: String::new(), ..good.clone() }));
    bad.push((117, Response { request_id: String::new(), ..good.clone() }));
    for (number, response) in bad {
        refused(caller.send_response(response.clone()).await, number, &response);
    }
    caller.send_response(good).await.unwrap();
    assert_eq!(&*asked.await.unwrap().body, b"!", "who asks still waits");
    drop(responder);
    goes_on(broker, caller).await;
}

/// A wait that is negative or too long.
#[tokio::test]
async fn waits() {
    let (broker, mut caller) = start().await;
    for wait in [-1, 3601] {
        let request = ReceiveQueueMessagesRequest { wait_time_seconds: wait, ..receiving("good", 1) };
        let answer = caller.receive_queue_messages(request).await.unwrap().into_inner();
        assert_eq!((answer.is_error, answer.error), (true, sentence(136)), "{wait}");
        let request = AckAllQueueMessagesRequest {
            client_id: "test".into(),
            channel: "good".into(),
            wait_time_seconds: wait,
            ..AckAllQueueMessagesRequest::default()
        };
        let answer = caller.ack_all_queue_messages(request).await.unwrap().into_inner();
        assert_eq!((answer.is_error, answer.error), (true, sentence(136)), "{wait}");
    }
    let (requests, stream) = mpsc::channel(1);
    let mut answers = caller.queues_downstream(ReceiverStream::new(stream)).await.unwrap().into_inner();
    for (wait, error) in [(-1, sentence(136)), (3_600_001, sentence(136)), (0, String::new())] {
        let get = QueuesDownstreamRequest {
            request_type_data: QueuesDownstreamRequestType::Get.into(),
            client_id: "test".into(),
            channel: "good".into(),
            wait_timeout: wait,
            ..QueuesDownstreamRequest::default()
        };
        requests.send(get).await.unwrap();
        let answer = answers.message().await.unwrap().unwrap();
        assert_eq!((answer.is_error, answer.error), (!error.is_empty(), error), "{wait}: the stream goes on");
    }
    drop((requests, answers));
    goes_on(broker, caller).await;
}

/// A stream of the older transactions.
struct Transaction(mpsc::Sender<StreamQueueMessagesRequest>, Streaming<StreamQueueMessagesResponse>);

impl Transaction {
    async fn open(caller: &mut Client) -> Self {
        let (requests, stream) = mpsc::channel(1);
        Self(requests, caller.stream_queue_message(ReceiverStream::new(stream)).await.unwrap().into_inner())
    }

    async fn ask(&mut self, request: StreamQueueMessagesRequest) -> StreamQueueMessagesResponse {
        let kind = request.stream_request_type_data();
        self.0.send(StreamQueueMessagesRequest { request_id: "id".into(), ..request }).await.unwrap();
        let answer = self.1.message().await.unwrap().unwrap();
        assert_eq!((&*answer.request_id, answer.stream_request_type_data()), ("id", kind));
        answer
    }

    async fn refuses(&mut self, number: u32, request: StreamQueueMessagesRequest) {
        let answer = self.ask(request.clone()).await;
        assert_eq!((answer.is_error, answer.error), (true, sentence(number)), "{request:?}");
    }
}

fn asking(kind: Kind) -> StreamQueueMessagesRequest {
    StreamQueueMessagesRequest {
        client_id: "test".into(),
        channel: "orders".into(),
        stream_request_type_data: kind.into(),
        visibility_seconds: 60,
        wait_time_seconds: 5,
        ..StreamQueueMessagesRequest::default()
    }
}

/// After each refusal the stream is as it was, with what it holds.
#[tokio::test]
async fn transactions() {
    let (broker, mut caller) = start().await;
    send(&mut caller, message("orders", "one")).await;
    let mut stream = Transaction::open(&mut caller).await;
    for (number, kind) in [
        (124, Kind::AckMessage),
        (137, Kind::RejectMessage),
        (124, Kind::ModifyVisibility),
        (126, Kind::ResendMessage),
        (124, Kind::SendModifiedMessage),
        (132, Kind::Unknown),
    ] {
        stream.refuses(number, asking(kind)).await;
    }
    let receive = || asking(Kind::ReceiveMessage);
    stream.refuses(132, StreamQueueMessagesRequest { stream_request_type_data: 9, ..receive() }).await;
    stream.refuses(101, StreamQueueMessagesRequest { client_id: String::new(), ..receive() }).await;
    stream.refuses(120, StreamQueueMessagesRequest { channel: "a b".into(), ..receive() }).await;
    for seconds in [-1, 43_201] {
        stream.refuses(127, StreamQueueMessagesRequest { visibility_seconds: seconds, ..receive() }).await;
        stream.refuses(136, StreamQueueMessagesRequest { wait_time_seconds: seconds, ..receive() }).await;
    }
    let held = stream.ask(receive()).await.message.unwrap();
    let sequence = held.attributes.unwrap().sequence;
    stream.refuses(128, receive()).await;
    stream.refuses(132, asking(Kind::Unknown)).await;
    for kind in [Kind::AckMessage, Kind::RejectMessage] {
        for wrong in [0, sequence + 1] {
            stream.refuses(125, StreamQueueMessagesRequest { ref_sequence: wrong, ..asking(kind) }).await;
        }
    }
    for seconds in [-1, 43_201] {
        let modify = asking(Kind::ModifyVisibility);
        stream.refuses(127, StreamQueueMessagesRequest { visibility_seconds: seconds, ..modify }).await;
    }
    stream.refuses(120, StreamQueueMessagesRequest { channel: "a.*".into(), ..asking(Kind::ResendMessage) }).await;
    stream.refuses(131, asking(Kind::SendModifiedMessage)).await;
    let right = StreamQueueMessagesRequest { ref_sequence: sequence, ..asking(Kind::AckMessage) };
    let done = stream.ask(right).await;
    assert!(!done.is_error, "{done:?}");
    assert_eq!(stream.1.message().await.unwrap(), None, "the end of the stream");
    assert!(crate::common::receive(&mut caller, "orders", 1).await.is_empty(), "it is done");
    drop(stream);
    goes_on(broker, caller).await;
}

/// A message that cannot be resent stays held.
#[tokio::test]
async fn a_resend_to_one_queue_too_many() {
    let limits = Limits { channels: 1, ..Limits::default() };
    let broker = Broker::builder().listen("127.0.0.1:0").limits(limits).start().await.unwrap();
    let mut caller = client(&broker).await;
    send(&mut caller, message("good", "one")).await;
    let mut stream = Transaction::open(&mut caller).await;
    let receive = StreamQueueMessagesRequest { channel: "good".into(), ..asking(Kind::ReceiveMessage) };
    assert!(stream.ask(receive).await.message.is_some());
    let resend = StreamQueueMessagesRequest { channel: "other".into(), ..asking(Kind::ResendMessage) };
    stream.refuses(130, resend).await;
    let resend = StreamQueueMessagesRequest { channel: "good".into(), ..asking(Kind::ResendMessage) };
    assert!(!stream.ask(resend).await.is_error, "it is held still");
    drop(stream);
    assert_eq!(crate::common::receive(&mut caller, "good", 2).await, ["one"]);
    goes_on(broker, caller).await;
}
