//! X6: shapes that some server refuses. Memory that stands for a backend (`memory://?like=…`) must refuse whatever that
//! backend's server, or the backend before it, refuses.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use polymq::{Address, Channel, ConsumeOptions, Error, Start, prelude::*};

/// How long a send may take: a server that has taken it has answered by then.
const LIMIT: Duration = Duration::from_secs(120);
/// An error that has taken so long is no refusal of a server, which is quick.
const REFUSED_WITHIN: Duration = Duration::from_secs(30);
/// What is told of a shape that a server has said nothing about.
pub(crate) const NO_ANSWER: &str = "no answer";

const NAMES: [&str; 30] = [
    "plain",
    "a.b",
    "a_b",
    "a-b",
    "A.b",
    "a..b",
    ".a",
    "a.",
    "a b",
    "ä",
    "日本語",
    "a/b",
    "/a",
    "a//b",
    "a+b",
    "a#b",
    "a*b",
    "a>b",
    "a:b",
    "a@b",
    "a%2eb",
    "a=b&c",
    "$a",
    "a.fifo",
    "a\"b",
    "-",
    "_",
    "..",
    "a.-b",
    "a--b",
];

/// What became of each shape: `taken`, the kind of the error, or [`NO_ANSWER`].
pub(crate) async fn try_all(bus: &Bus) -> BTreeMap<String, String> {
    let mut told = BTreeMap::new();
    let mut asked = Instant::now();
    let mut tell = |shape: String, outcome: Result<(), Error>| {
        let late = asked.elapsed() >= REFUSED_WITHIN;
        asked = Instant::now();
        let outcome = match outcome {
            Ok(()) => "taken".to_owned(),
            Err(_) if late => NO_ANSWER.to_owned(),
            Err(error) => format!("{:?}", error.kind()),
        };
        told.insert(shape, outcome);
    };
    let long = [80, 81, 120, 200, 201, 250, 256].map(|length| "n".repeat(length));
    for name in NAMES.into_iter().map(str::to_owned).chain(long) {
        for address in [Address::queue(format!("x6{name}")), Address::topic(format!("x6-t{name}"))] {
            let shape = format!("{address} ({} bytes)", address.name().len());
            tell(shape, send(&bus.channel(address), Message::new("x")).await);
        }
    }
    for name in ["", " ", "a\nb", "a\0b"] {
        tell(format!("queue {name:?}"), send(&bus.queue(name), Message::new("x")).await);
    }
    let queue = bus.queue("x6-shapes");
    for count in [0, 10, 11, 64, 65] {
        let message = (0..count).fold(Message::new("x"), |message, n| message.with_header(format!("h-{n}"), "v"));
        tell(format!("{count} headers"), send(&queue, message).await);
    }
    for (name, value) in [
        ("h", String::new()),
        ("h", "é".into()),
        ("h", "a\tb".into()),
        ("h", "v".repeat(4096)),
        ("h", "v".repeat(4097)),
        ("polymq-attempt", "1".into()),
        ("ce-id", "1".into()),
        ("a b", "v".into()),
        ("", "v".into()),
        ("content-type", "v".into()),
        ("host", "v".into()),
        ("AWS.x", "v".into()),
    ] {
        let shape = format!("header {name:?} of {} bytes", value.len());
        tell(shape, send(&queue, Message::new("x").with_header(name, value)).await);
    }
    // Around the bounds that servers have: 256 KiB, 1 MiB, 16 MiB.
    for kib in [255, 257, 1023, 1025, 16 * 1024 - 1, 16 * 1024 + 1] {
        tell(format!("{kib} KiB"), send(&queue, Message::new(vec![b'x'; kib * 1024])).await);
    }
    for minutes in [1, 14, 16, 13 * 60, 25 * 60, 60 * 24 * 60] {
        let message = Message::new("x").deliver_in(Duration::from_secs(minutes * 60));
        tell(format!("delayed by {minutes} minutes"), send(&queue, message).await);
    }
    let options = ConsumeOptions::default();
    for (shape, channel, options) in [
        ("a topic", bus.topic("x6-topic"), options.clone()),
        ("a group", bus.topic("x6-topic"), ConsumeOptions { group: Some("g".into()), ..options.clone() }),
        ("a group of a queue", bus.queue("x6-q"), ConsumeOptions { group: Some("g".into()), ..options.clone() }),
        ("order by key", bus.queue("x6-q"), ConsumeOptions { ordered_by_key: true, ..options.clone() }),
        (
            "from the beginning",
            bus.topic("x6-topic"),
            ConsumeOptions { group: Some("h".into()), start: Start::Earliest, ..options.clone() },
        ),
        (
            "some kinds",
            bus.topic("x6-topic"),
            ConsumeOptions { group: Some("k".into()), kinds: vec!["one".into()], ..options.clone() },
        ),
        ("no prefetch", bus.queue("x6-q"), ConsumeOptions { prefetch: 0, ..options.clone() }),
        ("an unknown option", bus.queue("x6-q"), ConsumeOptions { extra: vec![("no".into(), "1".into())], ..options }),
    ] {
        let subscribed = tokio::time::timeout(LIMIT, channel.subscribe(options)).await.expect("an answer in time");
        tell(format!("consuming: {shape}"), subscribed.map(drop));
    }
    tell("stats".into(), bus.queue("x6-q").stats(None).await.map(drop));
    tell("purge".into(), bus.queue("x6-q").purge().await.map(drop));
    tell("exists".into(), bus.queue("x6-q").exists(None).await.map(drop));
    tell("peek".into(), bus.queue("x6-q").peek(None, 1).await.map(drop));
    tell("list".into(), bus.list().await.map(drop));
    tell("bind".into(), bus.queue("x6-q").bind(&bus.topic("x6-bound")).await);
    told
}

async fn send(channel: &Channel, message: Message) -> Result<(), Error> {
    channel.with_timeout(LIMIT).send_message(message).await.map(drop)
}
