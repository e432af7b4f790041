//! B2: headers and attributes arrive as they were set, or are refused before anything is sent.

use std::time::{Duration, SystemTime};

use polymq_core::{ErrorKind, Headers, Message};

use crate::{
    Case, Cx,
    case::run,
    drive::{next, quiet, refused, round_trip, subscribe},
};

pub(super) const CASES: &[Case] = &[
    Case::new("B2_header_values", run!(header_values)),
    Case::new("B2_every_ascii_character", run!(every_ascii_character)),
    Case::new("B2_attributes", run!(attributes)),
    Case::new("B2_random_messages", run!(random_messages)),
    Case::new("B2_refused_shapes", run!(refused_shapes)),
    Case::new("B2_count_limits", run!(count_limits)),
];

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
    assert!(off < Duration::from_secs(60), "expiry is off by {off:?}");
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
    let mut seen = std::collections::BTreeSet::new();
    // One at a time: two may have one key, and where a key's order is kept the second one comes after the first is done with.
    for _ in 0..sent.len() {
        let delivery = next(&mut subscription).await;
        let got = delivery.message();
        let id = got.id().expect("an id").to_string();
        assert!(seen.insert(id.clone()), "seed {seed}, message {id} came again");
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
