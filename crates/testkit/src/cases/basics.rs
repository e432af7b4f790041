//! B1 to B4: what is sent arrives, as it was sent, once, and where it was sent.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use polymq_core::{
    Address, ConsumeOptions, ConsumerFactory, Delivery, ErrorKind, Headers, Message, State, serializers::Serializers,
};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::{
    Case, Cx, Ledger, PATIENCE,
    case::run,
    drive::{
        Log, bodies, in_order, next, publish, quiet, refused, start, subscribe, subscribe_with, take, take_acked, text,
    },
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
    Case::new("B2_header_values", run!(header_values)),
    Case::new("B2_every_ascii_character", run!(every_ascii_character)),
    Case::new("B2_attributes", run!(attributes)),
    Case::new("B2_random_messages", run!(random_messages)),
    Case::new("B2_refused_shapes", run!(refused_shapes)),
    Case::new("B2_count_limits", run!(count_limits)),
    Case::new("B3_strict_multiset", run!(strict_multiset)),
    Case::new("B3_stream_of_messages", run!(stream_of_messages)),
    Case::new("B3_results_of_a_batch", run!(results_of_a_batch)),
    Case::new("B4_isolation", run!(isolation)),
    Case::new("B4_queue_and_topic_of_one_name", run!(queue_and_topic)).when(
        "topics, kinds_apart",
        |c| c.topics && c.kinds_apart,
        run!(queue_and_topic_refused),
    ),
    Case::new("B4_awkward_names", run!(awkward_names)),
    Case::new("B4_prefix_collisions", run!(prefix_collisions)),
];

async fn round_trip(cx: &Cx, message: Message) -> Delivery {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    queue.send_message(message).await.expect("send");
    let mut subscription = subscribe(&queue).await;
    let delivery = next(&mut subscription).await;
    quiet(&mut subscription).await;
    delivery
}

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

/// Each of the 128 ASCII characters in a header's value, and in its name, is carried or refused before sending,
/// alike on every backend: values without control characters, names of letters, digits and three marks.
pub async fn every_ascii_character(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    let mut carried = Vec::new();
    for c in (0..128_u8).map(char::from) {
        let value = Message::new("x").with_header("h", format!("{c}{c}"));
        let name = Message::new("x").with_header(format!("h{c}"), "v");
        let names = c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        for (message, allowed) in [(value, !c.is_ascii_control()), (name, names)] {
            if allowed {
                let (name, value) = message.headers().iter().next().expect("one header");
                let name = if name == "h" { format!("value-of-{}", u32::from(c)) } else { name.to_owned() };
                carried.push((name, value.to_owned()));
            } else {
                refused(queue.send_message(message).await, &[ErrorKind::InvalidInput]);
            }
        }
    }
    // Upper and lower case of a name collide; ten headers a message, as brokers with few allow.
    let mut seen = std::collections::BTreeSet::new();
    carried.retain(|(name, _)| seen.insert(name.to_ascii_lowercase()));
    assert_eq!(carried.len(), 95 + 26 + 10 + 3, "printable characters in values, and characters of names");
    for ten in carried.chunks(10) {
        let headers: Headers = ten.iter().cloned().collect();
        queue.send_message(Message::new("carried").with_headers(headers.clone())).await.expect("send");
        let delivery = next(&mut subscription).await;
        for (name, value) in ten {
            assert_eq!(delivery.message().headers().get(name), Some(value.as_str()), "header {name}");
        }
        delivery.ack().await.expect("ack");
    }
    quiet(&mut subscription).await;
}

/// Hostile texts as header values arrive unchanged, under names of every allowed character.
pub async fn header_values(cx: Cx) {
    let values = [
        "",
        " ",
        " leading and trailing ",
        "/",
        "..",
        "../../etc/passwd",
        "\\",
        "\"",
        "'",
        "`",
        "a=b&c=d",
        "%00%0a",
        "${x}",
        "<script>",
        "; DROP TABLE",
        "é",
        "日本語",
        "🦀",
        "\u{202e}rtl",
        "\u{feff}bom",
        "e\u{301}",
        "{\"a\":1}",
        "null",
        "true",
        "-1",
        "1e9",
        "0x10",
        "a,b;c|d",
        "*?[]",
        "text/plain; q=\"1\"",
    ];
    let mut headers = Headers::new();
    for (at, value) in values.into_iter().enumerate() {
        headers.insert(format!("x-{at}"), value);
    }
    headers.insert("abcdefghijklmnopqrstuvwxyz-ABCDEFGHIJKLMNOPQRSTUVWXYZ_0123456789.", "name");
    headers.insert("content-type-of-mine", "near a reserved one");
    let delivery = round_trip(&cx, Message::new("body").with_headers(headers.clone())).await;
    for (name, value) in headers.iter() {
        assert_eq!(delivery.message().headers().get(name), Some(value), "header {name}");
    }
    assert_eq!(delivery.message().headers().len(), headers.len(), "no header is added");
    delivery.ack().await.expect("ack");
}

/// Every attribute arrives as it was set; what was not set arrives as not set, but for id and time.
pub async fn attributes(cx: Cx) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
    let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(4_000_000_000);
    let sent = Message::new("body")
        .with_id("order-7/α")
        .with_content_type("application/x-α; v=\"1\"")
        .with_kind("order.created")
        .with_version(7)
        .with_time(time)
        .with_key("customer-7 é")
        .with_correlation_id("saga-1")
        .with_reply_to("replies-1")
        .with_expires_at(expires)
        .with_header("tenant", "acme");
    let delivery = round_trip(&cx, sent.clone()).await;
    let got = delivery.message();
    assert_eq!(got.id(), sent.id(), "id");
    assert_eq!(got.content_type(), sent.content_type(), "content type");
    assert_eq!((got.kind(), got.version()), (sent.kind(), sent.version()), "kind and version");
    assert_eq!(got.time(), sent.time(), "time");
    assert_eq!(got.key(), sent.key(), "key");
    assert_eq!(got.correlation_id(), sent.correlation_id(), "correlation id");
    assert_eq!(got.reply_to(), sent.reply_to(), "reply to");
    let expiry = got.expires_at().expect("expiry");
    // Brokers that carry a time to live instead of a point in time may move it by the time on the way.
    let off = expiry.duration_since(expires).or_else(|_| expires.duration_since(expiry)).expect("one is later");
    assert!(off < Duration::from_secs(5), "expiry is off by {off:?}");
    assert_eq!(got.headers(), sent.headers(), "headers");
    delivery.ack().await.expect("ack");

    let delivery = round_trip(&cx, Message::new("bare")).await;
    let got = delivery.message();
    assert!(got.id().is_some() && got.time().is_some(), "sending gives an id and a time");
    let unset = (got.content_type(), got.kind(), got.version(), got.key(), got.correlation_id(), got.reply_to());
    assert_eq!(unset, (None, None, None, None, None, None));
    assert!(got.expires_at().is_none() && got.deliver_at().is_none() && got.headers().is_empty());
    delivery.ack().await.expect("ack");
}

/// A random text of what headers and attributes may hold.
fn random_text(random: &mut fastrand::Rng, max: usize) -> String {
    let char = |random: &mut fastrand::Rng| loop {
        let range = [' '..='~', '\u{a1}'..='\u{24f}', '\u{400}'..='\u{4ff}', '\u{4e00}'..='\u{9fff}', '😀'..='😼'];
        let at = random.usize(..range.len());
        let c = random.char(range[at].clone());
        if !c.is_control() {
            return c;
        }
    };
    (0..random.usize(1..=max)).map(|_| char(random)).collect()
}

fn random_message(random: &mut fastrand::Rng, n: usize) -> Message {
    let mut body = vec![0; random.usize(..2000)];
    random.fill(&mut body);
    let mut message = Message::new(body).with_id(format!("{n}"));
    if random.bool() {
        message = message.with_key(random_text(random, 20)).with_correlation_id(random_text(random, 20));
    }
    if random.bool() {
        message = message.with_kind(random_text(random, 20)).with_version(random.u32(..));
    }
    if random.bool() {
        message = message.with_content_type("application/x-random");
    }
    for at in 0..random.usize(..12) {
        let name: String = (0..random.usize(1..20)).map(|_| random.alphanumeric()).collect();
        message = message.with_header(format!("h{at}-{name}"), random_text(random, 100));
    }
    message
}

/// 200 messages with random bodies, headers and attributes come back identical (mission row B5).
pub async fn random_messages(cx: Cx) {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    let most = cx.capabilities().max_headers.unwrap_or(usize::MAX);
    let sent: Vec<Message> =
        (0..200).map(|n| random_message(&mut random, n)).filter(|m| m.headers().len() <= most).collect();
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    for result in queue.send_all(sent.clone()).await {
        result.unwrap_or_else(|error| panic!("seed {seed}: {error:?}"));
    }
    let mut subscription = subscribe(&queue).await;
    for delivery in take(&mut subscription, sent.len()).await {
        let got = delivery.message();
        let id = got.id().expect("an id").to_string();
        let sent =
            sent.iter().find(|sent| sent.id().is_some_and(|known| known.to_string() == id)).expect("one of ours");
        assert_eq!(got.payload(), sent.payload(), "seed {seed}, message {id}");
        let attributes = |m: &Message| {
            let text = |text: Option<&str>| text.map(str::to_owned);
            (text(m.key()), text(m.correlation_id()), text(m.kind()), m.version(), text(m.content_type()))
        };
        assert_eq!(attributes(got), attributes(sent), "seed {seed}, message {id}");
        let pairs = |m: &Message| -> std::collections::BTreeMap<String, String> {
            m.headers().iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
        };
        assert_eq!(pairs(got), pairs(sent), "seed {seed}, message {id}");
        delivery.ack().await.expect("ack");
    }
}

/// 10 000 messages are sent with a window of 128: each is answered, no more are unanswered at a time, each arrives
/// once (mission row B8).
pub async fn stream_of_messages(cx: Cx) {
    const COUNT: usize = 10_000;
    const WINDOW: usize = 128;
    let bus = cx.bus().await;
    let queue = cx.queue(&bus).with_window(WINDOW, polymq_core::WhenFull::Wait);
    let mut answers = Vec::with_capacity(COUNT);
    for body in bodies(COUNT) {
        answers.push(queue.enqueue(Message::new(body)).await.expect("enqueue"));
        assert!(queue.in_flight() <= WINDOW, "{} are unanswered", queue.in_flight());
    }
    queue.flush().await.expect("flush");
    for answer in answers {
        answer.await.expect("accepted");
    }
    let mut ledger = Ledger::sent(bodies(COUNT));
    let mut subscription = subscribe_with(&queue, ConsumeOptions { prefetch: 1000, ..ConsumeOptions::default() }).await;
    let mut seen = 0;
    while seen < COUNT {
        let batch = subscription.receive(500, crate::PATIENCE).await.expect("receive");
        assert!(!batch.is_empty(), "{seen} of {COUNT} arrived");
        seen += batch.len();
        for delivery in batch {
            ledger.see(text(&delivery));
            delivery.ack().await.expect("ack");
        }
    }
    quiet(&mut subscription).await;
    ledger.assert_exact();
}

/// Of 25 messages sent together, the one that is invalid is named, and the other 24 arrive (mission row B7).
pub async fn results_of_a_batch(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let message = |(n, body): (usize, String)| {
        let message = Message::new(body);
        if n == 13 { message.with_header("no\nheader", "x") } else { message }
    };
    let results = queue.send_all(bodies(25).enumerate().map(message)).await;
    assert_eq!(results.len(), 25, "one answer each");
    for (n, result) in results.into_iter().enumerate() {
        match (n, result) {
            (13, result) => drop(refused(result, &[ErrorKind::InvalidInput])),
            (n, result) => drop(result.unwrap_or_else(|error| panic!("message {n}: {error:?}"))),
        }
    }
    let mut subscription = subscribe(&queue).await;
    let expected: Vec<_> = bodies(25).filter(|body| body != "m-000013").collect();
    assert_eq!(in_order(&cx, take_acked(&mut subscription, 24).await), expected);
    quiet(&mut subscription).await;
}

/// Shapes that some broker cannot carry are refused before anything is sent; the largest allowed shape is carried.
pub async fn refused_shapes(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    let long = "n".repeat(129);
    let names =
        ["", " ", "a b", "ä", "a\0b", "a:b", "a/b", "a\"b", "polymq-x", "POLYMQ-X", "ce-id", "CE_id", "cloudEvents:id"];
    for name in names.into_iter().chain([long.as_str()]) {
        let message = Message::new("x").with_header(name.to_owned(), "v");
        refused(queue.send_message(message).await, &[ErrorKind::InvalidInput]);
    }
    for value in ["\0", "a\nb", "a\rb", "\u{7f}", "\u{85}", &"v".repeat(4097)] {
        let message = Message::new("x").with_header("h", value.to_owned());
        refused(queue.send_message(message).await, &[ErrorKind::InvalidInput]);
    }
    let message = Message::new("x").with_header("tenant", "a").with_header("Tenant", "b");
    refused(queue.send_message(message).await, &[ErrorKind::InvalidInput]);
    quiet(&mut subscription).await;

    let (name, value) = ("n".repeat(128), "v".repeat(4096));
    let largest =
        Message::new("y").with_header(name.clone(), value.clone()).with_header("twice", "1").with_header("twice", "2");
    queue.send_message(largest).await.expect("the largest allowed shape is sent");
    let delivery = next(&mut subscription).await;
    assert_eq!(delivery.message().headers().get(&name), Some(value.as_str()), "the largest allowed header");
    assert_eq!(delivery.message().headers().get("twice"), Some("2"), "the second value replaces the first");
    delivery.ack().await.expect("ack");
}

/// As many headers as are declared arrive, in their order; one more is refused, and so are too many bytes.
pub async fn count_limits(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut subscription = subscribe(&queue).await;
    let max = bus.capabilities().max_headers.unwrap_or(usize::MAX).min(polymq_core::MAX_HEADERS);
    let many =
        |count: usize| (0..count).map(|n| (format!("h-{:02}", count - n), format!("value {n}"))).collect::<Headers>();
    queue.send_message(Message::new("most").with_headers(many(max))).await.expect("the most headers are sent");
    let delivery = next(&mut subscription).await;
    let (got, sent) = (delivery.message().headers(), many(max));
    assert_eq!(got.len(), max, "all of them arrive");
    sent.iter().for_each(|(name, value)| assert_eq!(got.get(name), Some(value), "header {name}"));
    delivery.ack().await.expect("ack");

    let kinds = [ErrorKind::InvalidInput, ErrorKind::Unsupported];
    refused(queue.send_message(Message::new("x").with_headers(many(max + 1))).await, &kinds);
    let heavy: Headers = (0..5).map(|n| (format!("h-{n}"), "v".repeat(4096))).collect();
    refused(queue.send_message(Message::new("x").with_headers(heavy)).await, &[ErrorKind::InvalidInput]);
    quiet(&mut subscription).await;
}

/// 1000 messages of four senders reach four consumers: each once, none twice, none foreign.
pub async fn strict_multiset(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let mut consumers = Vec::new();
    for _ in 0..4 {
        consumers.push(subscribe_with(&queue, ConsumeOptions { prefetch: 50, ..ConsumeOptions::default() }).await);
    }
    let senders: Vec<_> = (0..4)
        .map(|sender| {
            let queue = queue.clone();
            tokio::spawn(async move { publish(&queue, bodies(250).map(|body| format!("{sender}/{body}"))).await })
        })
        .collect();
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Ledger::sent(
        (0..4).flat_map(|sender| bodies(250).map(move |body| format!("{sender}/{body}"))),
    )));
    let takers: Vec<_> = consumers
        .into_iter()
        .map(|mut consumer| {
            let seen = std::sync::Arc::clone(&seen);
            tokio::spawn(async move {
                // Ends when nothing has come for a while after all was there: what comes twice comes then. Slow
                // brokers have pauses before.
                let began = Instant::now();
                loop {
                    let batch = consumer.receive(20, Duration::from_secs(2)).await.expect("receive");
                    let is_over = crate::cx::lock(&seen).is_complete() || began.elapsed() > PATIENCE * 4;
                    if batch.is_empty() && is_over {
                        return;
                    }
                    for delivery in batch {
                        crate::cx::lock(&seen).see(text(&delivery));
                        delivery.ack().await.expect("ack");
                    }
                }
            })
        })
        .collect();
    for task in senders.into_iter().chain(takers) {
        task.await.expect("a sender or consumer");
    }
    let seen = crate::cx::lock(&seen);
    cx.note(format_args!("duplicate ratio {:.4}", seen.duplicate_ratio()));
    seen.assert_exact();
}

/// Two queues do not mix.
pub async fn isolation(cx: Cx) {
    let bus = cx.bus().await;
    let (one, two) = (cx.queue(&bus), cx.queue(&bus));
    let (mut from_one, mut from_two) = (subscribe(&one).await, subscribe(&two).await);
    // By turns, so that two names of one queue cannot look like two queues.
    for body in bodies(20) {
        publish(&one, [format!("one/{body}")]).await;
        publish(&two, [format!("two/{body}")]).await;
    }
    let (seen_two, seen_one) = (take_acked(&mut from_two, 20).await, take_acked(&mut from_one, 20).await);
    assert!(seen_one.iter().all(|body| body.starts_with("one/")), "{seen_one:?}");
    assert!(seen_two.iter().all(|body| body.starts_with("two/")), "{seen_two:?}");
    quiet(&mut from_one).await;
    quiet(&mut from_two).await;
}

/// A queue and a topic of one name do not mix.
pub async fn queue_and_topic(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    let topic = bus.topic(queue.address().name());
    cx.clean_up(topic.address().clone(), None);
    let (mut from_queue, mut from_topic) = (subscribe(&queue).await, subscribe(&topic).await);
    publish(&topic, ["to the topic".to_owned()]).await;
    publish(&queue, ["to the queue".to_owned()]).await;
    assert_eq!(take_acked(&mut from_queue, 1).await, ["to the queue"]);
    assert_eq!(take_acked(&mut from_topic, 1).await, ["to the topic"]);
    quiet(&mut from_topic).await;
    quiet(&mut from_queue).await;
}

/// Without topics, one is refused; where the two would mix, the second of them is.
pub async fn queue_and_topic_refused(cx: Cx) {
    let bus = cx.bus().await;
    let queue = cx.queue(&bus);
    publish(&queue, ["to the queue".to_owned()]).await;
    let topic = bus.topic(queue.address().name());
    let expected = [if cx.capabilities().topics { ErrorKind::Conflict } else { ErrorKind::Unsupported }];
    refused(topic.subscribe(ConsumeOptions::default()).await, &expected);
}

/// Without topics, one is refused.
pub async fn topics_refused(cx: Cx) {
    let bus = cx.bus().await;
    let topic = bus.topic(cx.topic_name(&[]));
    refused(topic.subscribe(ConsumeOptions::default()).await, &[ErrorKind::Unsupported]);
}

/// Each name either carries messages of its own, or is refused alike by sending and by subscribing, before any I/O.
async fn names_are_apart(cx: &Cx, names: &[&str]) {
    let bus = cx.bus().await;
    let prefix = cx.name();
    let mut open = Vec::new();
    for name in names {
        let address = Address::queue(format!("{prefix}{name}"));
        cx.clean_up(address.clone(), None);
        let queue = bus.channel(address);
        let sent = queue.send_message(Message::new((*name).to_owned())).await;
        match sent {
            Ok(_) => open.push((*name, subscribe(&queue).await)),
            Err(error) => {
                let kinds = [ErrorKind::InvalidInput, ErrorKind::Unsupported];
                refused::<()>(Err(error), &kinds);
                refused(queue.subscribe(ConsumeOptions::default()).await, &kinds);
                cx.note(format_args!("the name {name:?} is refused"));
            }
        }
    }
    assert!(!open.is_empty(), "every name was refused");
    for (name, subscription) in &mut open {
        let deliveries = take(subscription, 1).await;
        assert_eq!(text(&deliveries[0]), *name, "the queue of this name");
        quiet(subscription).await;
        for delivery in deliveries {
            delivery.ack().await.expect("ack");
        }
    }
}

/// Awkward names work untouched or are refused with a typed error; two of them are never the same queue.
pub async fn awkward_names(cx: Cx) {
    let names = [
        "a b",
        "ä",
        "a\u{308}",
        "日本語",
        "🦀",
        "a'b\"c",
        "a`b;c",
        "%2e",
        "a=b&c",
        "a,b",
        "a:b",
        "a@b",
        "(a)",
        "[a]",
        "{a}",
        "a~b",
        "a|b",
        "a^b",
        "a!b",
        "$a",
        // Some brokers know letters and digits only.
        "plain",
    ];
    names_are_apart(&cx, &names).await;
    let bus = cx.bus().await;
    for name in ["", " ", "a\nb", "a\0b", &"n".repeat(201)] {
        refused(bus.queue(name).send_message(Message::new("x")).await, &[ErrorKind::InvalidInput]);
        refused(bus.queue(name).subscribe(ConsumeOptions::default()).await, &[ErrorKind::InvalidInput]);
    }
}

/// Names that a careless mapping would make equal are different queues.
pub async fn prefix_collisions(cx: Cx) {
    let names = [
        "", ".a.b", ".a_b", ".a-b", ".A.b", ".a.b.c", ".a", ".a.", "_a_b", "-a-b", "_a.b", "/a/b", ".a+b", ".a#b",
        ".a*b", ".a>b",
    ];
    names_are_apart(&cx, &names).await;
}
