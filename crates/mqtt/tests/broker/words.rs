//! Short words for what these tests do often.

use std::collections::BTreeMap;

use polymq_core::{Address, Completion, Connection, ConsumeOptions, Message, ProduceOptions, Receipt};

pub(crate) fn consume() -> ConsumeOptions {
    ConsumeOptions::default()
}

pub(crate) fn group(name: &str) -> ConsumeOptions {
    ConsumeOptions { group: Some(name.into()), ..consume() }
}

pub(crate) fn produce() -> ProduceOptions {
    ProduceOptions::default()
}

pub(crate) fn with(extra: &[(&str, &str)]) -> ProduceOptions {
    let extra = extra.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    ProduceOptions { extra, ..produce() }
}

/// Sends bodies `prefix0`, `prefix1`, and so on, all at once, and waits for every answer.
pub(crate) async fn send_many(bus: &dyn Connection, queue: &Address, prefix: &str, count: usize) {
    let producer = bus.producer(queue, &produce()).await.expect("producer");
    let sends: Vec<Completion<Receipt>> =
        (0..count).map(|n| producer.send(Message::new(format!("{prefix}{n}")))).collect();
    for send in sends {
        send.await.expect("sent");
    }
}

pub(crate) fn counts(bodies: impl IntoIterator<Item = String>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for body in bodies {
        *counts.entry(body).or_default() += 1;
    }
    counts
}

pub(crate) fn each_once(bodies: impl IntoIterator<Item = String>, prefix: &str, count: usize) {
    let counts = counts(bodies);
    let expected: Vec<_> = (0..count).map(|n| format!("{prefix}{n}")).collect();
    let missing: Vec<_> = expected.iter().filter(|body| !counts.contains_key(*body)).collect();
    let twice: Vec<_> = counts.iter().filter(|(_, times)| **times > 1).map(|(body, _)| body).collect();
    assert!(missing.is_empty() && twice.is_empty(), "missing {missing:?}, more than once {twice:?}");
    assert_eq!(counts.len(), count, "foreign messages among {counts:?}");
}
