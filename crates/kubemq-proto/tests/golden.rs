//! Mission row G24: requests of every type are on the wire as an official SDK writes them (`golden.py` made `golden.txt`).

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Debug,
};

use polymq_kubemq_proto::{
    AckAllQueueMessagesRequest, Empty, Event, QueueMessage, QueueMessageAttributes, QueueMessagePolicy,
    QueueMessagesBatchRequest, QueuesDownstreamRequest, QueuesInfoRequest, QueuesUpstreamRequest,
    ReceiveQueueMessagesRequest, Request, Response, StreamQueueMessagesRequest, Subscribe,
};
use prost::Message;

const NANOS: i64 = 1_700_000_000_000_000_000;

/// Lines that were not looked at yet, by name.
struct Golden(BTreeMap<String, (String, Vec<u8>)>);

impl Golden {
    fn read() -> Self {
        let line = |line: &str| {
            let [name, kind, hex] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("three words: {line}") };
            let digits = hex.trim_matches('-').as_bytes();
            let byte = |two: &[u8]| u8::from_str_radix(str::from_utf8(two).unwrap(), 16).unwrap();
            (name.to_owned(), (kind.to_owned(), digits.chunks(2).map(byte).collect()))
        };
        Self(include_str!("golden.txt").lines().map(line).collect())
    }

    /// This message has these bytes, and these bytes are this message.
    fn is<M: Message + PartialEq + Default + Debug>(&mut self, name: &str, message: M) {
        let (kind, bytes) = self.0.remove(name).unwrap_or_else(|| panic!("no line {name}"));
        assert!(std::any::type_name::<M>().ends_with(&format!("::{kind}")), "{name} is a {kind}");
        assert_eq!(message.encode_to_vec(), bytes, "{name}, encoded");
        assert_eq!(M::decode(&*bytes).expect(name), message, "{name}, decoded");
    }
}

fn tags() -> HashMap<String, String> {
    HashMap::from([("tenant".to_owned(), "acme".to_owned())])
}

fn body() -> bytes::Bytes {
    bytes::Bytes::from_static(&[0, 255, 7])
}

fn message() -> QueueMessage {
    QueueMessage {
        message_id: "m-1".into(),
        client_id: "c".into(),
        channel: "orders".into(),
        metadata: "meta".into(),
        body: body(),
        tags: tags(),
        ..QueueMessage::default()
    }
}

#[test]
fn g24_requests_of_every_type_are_as_an_official_sdk_writes_them() {
    let mut golden = Golden::read();
    golden.is("ping", Empty {});
    events(&mut golden);
    requests(&mut golden);
    queues(&mut golden);
    streams(&mut golden);
    golden.is("queues_info", QueuesInfoRequest { request_id: "r-1".into(), queue_name: "orders".into() });
    assert!(golden.0.is_empty(), "nobody looked at {:?}", golden.0.keys());
}

fn events(golden: &mut Golden) {
    let event = Event {
        event_id: "e-1".into(),
        client_id: "c".into(),
        channel: "news".into(),
        metadata: "meta".into(),
        body: body(),
        store: false,
        tags: tags(),
    };
    golden.is("event", event.clone());
    golden.is("stored_event", Event { store: true, ..event });
    let subscribe = |kind: i32, channel: &str| Subscribe {
        subscribe_type_data: kind,
        client_id: "c".into(),
        channel: channel.into(),
        group: "g".into(),
        ..Subscribe::default()
    };
    golden.is("events", subscribe(1, "news.>"));
    for (start, value) in [(1, 0), (2, 0), (3, 0), (4, 7), (5, NANOS), (6, 3600)] {
        let stored =
            Subscribe { events_store_type_data: start, events_store_type_value: value, ..subscribe(2, "news") };
        golden.is(&format!("events_store_{start}"), stored);
    }
    golden.is("commands", subscribe(3, "ask"));
    golden.is("queries", subscribe(4, "ask"));
}

fn requests(golden: &mut Golden) {
    let command = Request {
        request_id: "r-1".into(),
        request_type_data: 1,
        client_id: "c".into(),
        channel: "ask".into(),
        metadata: "meta".into(),
        body: body(),
        timeout: 2500,
        tags: tags(),
        ..Request::default()
    };
    golden.is("command", command.clone());
    let query = Request {
        request_type_data: 2,
        reply_channel: "_INBOX.1".into(),
        cache_key: "key".into(),
        cache_ttl: 60,
        span: "span".into(),
        ..command
    };
    golden.is("query", query);
    let response = Response {
        client_id: "c".into(),
        request_id: "r-1".into(),
        reply_channel: "_INBOX.1".into(),
        metadata: "meta".into(),
        body: body(),
        cache_hit: true,
        timestamp: NANOS,
        executed: true,
        error: "none".into(),
        span: "span".into(),
        tags: tags(),
    };
    golden.is("response", response);
}

fn queues(golden: &mut Golden) {
    let policy = QueueMessagePolicy {
        expiration_seconds: 60,
        delay_seconds: 5,
        max_receive_count: 3,
        max_receive_queue: "orders.dlq".into(),
    };
    golden.is("queue_message", QueueMessage { policy: Some(policy), ..message() });
    let attributes = QueueMessageAttributes {
        timestamp: NANOS,
        sequence: 9,
        md5_of_body: "0123456789abcdef0123456789abcdef".into(),
        receive_count: 2,
        re_routed: true,
        re_routed_from_queue: "old".into(),
        expiration_at: NANOS + 60_000_000_000,
        delayed_to: NANOS + 5_000_000_000,
    };
    golden.is("received_message", QueueMessage { attributes: Some(attributes), ..message() });
    golden.is("batch", QueueMessagesBatchRequest { batch_id: "b-1".into(), messages: vec![message(), message()] });
    let receive = ReceiveQueueMessagesRequest {
        request_id: "r-1".into(),
        client_id: "c".into(),
        channel: "orders".into(),
        max_number_of_messages: 32,
        wait_time_seconds: 5,
        is_peak: true,
    };
    golden.is("receive", receive);
    let all = AckAllQueueMessagesRequest {
        request_id: "r-1".into(),
        client_id: "c".into(),
        channel: "orders".into(),
        wait_time_seconds: 1,
    };
    golden.is("ack_all", all);
}

fn streams(golden: &mut Golden) {
    for kind in 1..=6 {
        let request = StreamQueueMessagesRequest {
            request_id: "r-1".into(),
            client_id: "c".into(),
            stream_request_type_data: kind,
            channel: "orders".into(),
            visibility_seconds: 30,
            wait_time_seconds: 5,
            ref_sequence: 9,
            modified_message: Some(message()),
        };
        golden.is(&format!("transaction_{kind}"), request);
    }
    golden.is("upstream", QueuesUpstreamRequest { request_id: "r-1".into(), messages: vec![message()] });
    for kind in 1..=11 {
        let request = QueuesDownstreamRequest {
            request_id: "r-1".into(),
            client_id: "c".into(),
            request_type_data: kind,
            channel: "orders".into(),
            max_items: 100,
            wait_timeout: 1500,
            auto_ack: true,
            re_queue_channel: "other".into(),
            sequence_range: vec![3, 300, 70_000],
            ref_transaction_id: "t-1".into(),
            metadata: tags(),
        };
        golden.is(&format!("downstream_{kind}"), request);
    }
}
