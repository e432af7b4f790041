//! B1: a body arrives byte for byte.

use bytes::Bytes;
use polymq_core::{ConsumerFactory, ErrorKind, Message, State, serializers::Serializers};
use serde::{Deserialize, Serialize};

use crate::{
    Case, Cx,
    case::run,
    drive::{Log, quiet, refused, round_trip, start, subscribe, text},
};

pub(super) const CASES: &[Case] = &[
    Case::new("B1_empty_body", run!(empty_body)),
    Case::new("B1_one_byte", run!(one_byte)),
    Case::new("B1_64_kib", run!(large_body)),
    Case::new("B1_max_size", run!(max_size)),
    Case::new("B1_oversize", run!(oversize)).when("max_payload", |c| c.max_payload.is_some(), run!(no_bound_of_size)),
    Case::new("B1_invalid_utf8", run!(invalid_utf8)),
    Case::new("B1_json_untouched", run!(json_untouched)),
    Case::new("B1_every_format", run!(every_format)),
];

async fn body_comes_back(cx: &Cx, body: Bytes) {
    let delivery = round_trip(cx, Message::new(body.clone())).await;
    let got = delivery.message().payload();
    assert!(*got == body, "{} bytes came back for {}, not the same ones", got.len(), body.len());
    delivery.ack().await.expect("ack");
}

fn noise(bytes: usize) -> Bytes {
    let mut body = vec![0; bytes];
    fastrand::Rng::with_seed(bytes as u64).fill(&mut body);
    body.into()
}

/// An empty body arrives as an empty body.
pub async fn empty_body(cx: Cx) {
    body_comes_back(&cx, Bytes::new()).await;
}

/// A body of one byte arrives, whatever the byte is.
pub async fn one_byte(cx: Cx) {
    for byte in [0, b'\n', 0xff] {
        body_comes_back(&cx, Bytes::copy_from_slice(&[byte])).await;
    }
}

/// 64 KiB of noise arrive byte for byte.
pub async fn large_body(cx: Cx) {
    body_comes_back(&cx, noise(64 * 1024)).await;
}

/// A body of exactly the declared maximum arrives (16 MiB where more, or no bound, is declared).
pub async fn max_size(cx: Cx) {
    let max = cx.capabilities().max_payload.unwrap_or(usize::MAX).min(16 * 1024 * 1024);
    body_comes_back(&cx, noise(max)).await;
}

/// One byte more than the maximum is refused before it is sent, with both sizes in the error.
pub async fn oversize(cx: Cx) {
    let bus = cx.bus().await;
    let max = bus.capabilities().max_payload.expect("declared");
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    let error = refused(queue.send_message(Message::new(vec![b'x'; max + 1])).await, &[ErrorKind::TooLarge]);
    let sentence = error.to_string();
    assert!(sentence.contains(&max.to_string()) && sentence.contains(&(max + 1).to_string()), "{sentence}");
    assert_eq!(cx.capabilities().max_payload, Some(max), "the backend and its connection declare the same");
    quiet(&mut subscription).await;
}

/// Without a declared bound, a large body is simply carried.
pub async fn no_bound_of_size(cx: Cx) {
    body_comes_back(&cx, noise(4 * 1024 * 1024)).await;
}

/// A body that is no UTF-8 arrives byte for byte, even when it is labelled as text.
pub async fn invalid_utf8(cx: Cx) {
    let body = Bytes::from_static(b"\xc3\x28 \xf0\x28\x8c\xbc \x00 \xed\xa0\x80 \xff\xfe");
    let delivery = round_trip(&cx, Message::new(body.clone()).with_content_type("text/plain; charset=utf-8")).await;
    assert_eq!(*delivery.message().payload(), body);
    delivery.ack().await.expect("ack");
}

/// JSON is carried as it is: white space, order of keys, large numbers and escapes stay.
pub async fn json_untouched(cx: Cx) {
    let body = "{ \"b\" : 1.0,\t\"a\":[ 9007199254740993 ,1e400],\n \"\\u00e9\":\"\\/\" }\n";
    let delivery = round_trip(&cx, Message::new(body).with_content_type("application/json")).await;
    assert_eq!(text(&delivery), body);
    assert_eq!(delivery.message().content_type(), Some("application/json"));
    delivery.ack().await.expect("ack");
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Structured {
    id: u64,
    note: String,
    parts: Vec<Option<f64>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Packed(Structured);

/// Values of each built-in format reach their handlers as they were, labelled with the format (mission row E5).
pub async fn every_format(cx: Cx) {
    async fn seen<T: std::fmt::Debug>(value: T, log: State<Log>) {
        log.add(&Message::new(format!("{value:?}")), 1);
    }
    let mut serializers = Serializers::builtin();
    serializers.bind::<Packed>("msgpack").expect("built in");
    serializers.bind::<String>("text").expect("built in");
    serializers.bind::<Vec<u8>>("bytes").expect("built in");
    let bus = cx.builder().serializers(serializers).connect().await.expect("connect");
    let structured = Structured { id: u64::MAX, note: "é \"quoted\"\n".into(), parts: vec![None, Some(-0.5)] };
    let (packed, words, raw) = (Packed(structured.clone()), "naïve 🦀".to_owned(), vec![0_u8, 0xff, b'\n']);
    let queues: Vec<_> = (0..4).map(|_| cx.queue(&bus)).collect();
    let log = Log::default();
    let mut consumers = ConsumerFactory::new(&bus);
    consumers.state(log.clone());
    consumers.route(queues[0].address().name(), seen::<Structured>);
    consumers.route(queues[1].address().name(), seen::<Packed>);
    consumers.route(queues[2].address().name(), seen::<String>);
    consumers.route(queues[3].address().name(), seen::<Vec<u8>>);
    let labels = [
        queues[0].message(&structured).expect("encode"),
        queues[1].message(&packed).expect("encode"),
        queues[2].message(&words).expect("encode"),
        queues[3].message(&raw).expect("encode"),
    ]
    .map(|message| message.content_type().unwrap_or_default().to_owned());
    let expected =
        ["application/json", "application/vnd.msgpack", "text/plain; charset=utf-8", "application/octet-stream"];
    assert_eq!(labels, expected);
    let running = start(consumers).await;
    queues[0].send(&structured).await.expect("send");
    queues[1].send(&packed).await.expect("send");
    queues[2].send(&words).await.expect("send");
    queues[3].send(&raw).await.expect("send");
    log.reaches(4).await;
    running.stop().await.expect("stop");
    let mut expected = [format!("{structured:?}"), format!("{packed:?}"), format!("{words:?}"), format!("{raw:?}")];
    let mut bodies = log.bodies();
    expected.sort();
    bodies.sort();
    assert_eq!(bodies, expected);
}
