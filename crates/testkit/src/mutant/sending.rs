//! Mutants that send something else, elsewhere, more often, or not at all.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use polymq_core::{
    Address, ChannelKind, Completion, Connection, Error, ErrorKind, Headers, Message, MessageId, Producer, Receipt,
    Result, Settings,
};
use tokio::task::JoinHandle;

use super::{Mutant, mutant};
use crate::{
    cx::lock,
    twist::{Sending, Twist},
};

pub(super) const MUTANTS: &[Mutant] = &[
    mutant(
        "appends_a_byte",
        || Changes::all(|message| body(message, |body| [body, b"\0"].concat())),
        &["B1_empty_body"],
    ),
    mutant("cuts_the_last_byte", || Changes::all(cut_last), &["B1_one_byte"]),
    mutant("cuts_large_bodies", || Changes::all(cut_large), &["B1_64_kib"]),
    mutant("makes_bodies_text", || Changes::all(make_text), &["B1_invalid_utf8"]),
    mutant("reformats_json", || Changes::all(reformat), &["B1_json_untouched"]),
    mutant(
        "reduces_headers_to_ascii",
        || Changes::all(|message| headers(message, ascii)),
        &["B2_header_values", "B2_random_messages"],
    ),
    mutant(
        "mixes_correlation_ids_up",
        || Changes::all(|m| m.with_correlation_id("other")),
        &["B2_attributes", "T6_reply"],
    ),
    mutant(
        "trims_header_values",
        || Changes::all(|message| headers(message, |value| value.trim().to_owned())),
        &["B2_every_ascii_character"],
    ),
    mutant("shortens_header_values", || Changes::all(|message| headers(message, short)), &["B2_refused_shapes"]),
    mutant("carries_ten_headers", || Changes::all(ten_headers), &["B2_count_limits"]),
    mutant("loses_a_header", || Changes::all(lose_tenant), &["R8_replay", "R3_exhausted_once"]),
    mutant("forgets_expiry", || Changes::all(Message::without_expires_at), &["R6_expired"]),
    mutant("sends_at_once", || Changes::all(Message::without_deliver_at), &["D1_delayed_send"]),
    mutant("labels_everything", || Changes::all(label), &["R6_undecodable", "B1_every_format"]),
    mutant(
        "cuts_bodies_to_fit",
        || Changes::all(|message| body(message, |body| body[..body.len().min(9)].into())),
        &["R6_oversize"],
    ),
    mutant(
        "knows_one_kind",
        || Changes::all(|message| message.with_kind("order")),
        &["R6_unknown_kind", "T1_attributes_reach_topics"],
    ),
    mutant(
        "loses_signatures",
        || Changes::all(lose_signature),
        &["R6_wrong_signature", "X5_changed_messages", "X5_replayed_messages", "X5_keys_are_rotated"],
    ),
    mutant("envelopes_bodies", || Changes::all(envelope), &["B9_bare_client_reads_ours"]),
    mutant("gives_one_id_to_all", || Changes::all(|message| message.with_id("one")), &["B3_one_id_each"]),
    mutant("adds_a_header", || Changes::all(|message| message.with_header("x-sent-by", "me")), &["B9_golden"]),
    mutant("gives_copies_new_ids", || Changes::letters(|m| m.with_id(MessageId::new())), &["R5_crash_before_ack"]),
    mutant("refuses_the_largest", || Arc::new(RefusesTheLargest), &["B1_max_size"]),
    mutant("sends_some_twice", || Arc::new(SendsTwice(AtomicUsize::new(0))), TWICE),
    mutant("sends_letters_twice", || Arc::new(SendsLettersTwice), &["R3_exhausted_once"]),
    mutant("loses_dead_letters", || Arc::new(LosesLetters), LETTERS),
    mutant(
        "swallows_errors",
        || Arc::new(SwallowsErrors),
        &["R4_dead_letters_down", "B8_unroutable_is_an_error", "X3_sent_equals_the_truth"],
    ),
    mutant(
        "answers_early",
        || Arc::new(AnswersEarly::default()),
        &["L3_close_flushes", "B7_confirmed_survives_kill", "F2_kill", "F13_alarm", "F13_broker_does_not_read"],
    ),
    mutant("has_one_queue", || Arc::new(Renames(one_queue)), ONE),
    mutant(
        "has_no_topics",
        || Arc::new(Renames(no_topics)),
        &["B4_queue_and_topic_of_one_name", "T1_topic_reaches_everyone"],
    ),
    mutant("names_in_ascii", || Arc::new(Renames(ascii_name)), &["B4_awkward_names", "B4_names_of_topics"]),
    mutant("names_without_dots", || Arc::new(Renames(no_dots)), &["B4_prefix_collisions", "B4_names_of_topics"]),
];

const ONE: &[&str] = &["B4_isolation", "B4_many_queues_at_once", "B4_isolation_of_topics"];
const TWICE: &[&str] = &[
    "X3_counters_equal_the_truth",
    "X3_sent_equals_the_truth",
    "B3_strict_multiset",
    "B3_stream_of_messages",
    "B3_results_of_a_batch",
    "L8_cancelled_sends",
];
const LETTERS: &[&str] = &[
    "F19_poison_flood",
    "S1_reject",
    "R1_in_place_schedule",
    "R2_permanent_goes_at_once",
    "R3_exhausted_once",
    "R6_undecodable",
];

/// Changes messages on their way out.
#[derive(Debug)]
struct Changes {
    change: fn(Message) -> Message,
    only_letters: bool,
}

impl Changes {
    fn all(change: fn(Message) -> Message) -> Arc<dyn Twist> {
        Arc::new(Self { change, only_letters: false })
    }

    fn letters(change: fn(Message) -> Message) -> Arc<dyn Twist> {
        Arc::new(Self { change, only_letters: true })
    }
}

fn is_letters(address: &Address) -> bool {
    address.name().ends_with(".dlq")
}

impl Twist for Changes {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        let changed = if self.only_letters && !is_letters(&at.address) { message } else { (self.change)(message) };
        at.producer.send(changed)
    }
}

fn body(message: Message, change: impl FnOnce(&[u8]) -> Vec<u8>) -> Message {
    let body = Bytes::from(change(message.payload()));
    message.with_payload(body)
}

fn cut_last(message: Message) -> Message {
    body(message, |body| body[..body.len().saturating_sub(1)].into())
}

fn cut_large(message: Message) -> Message {
    body(message, |body| body[..body.len().min(65_535)].into())
}

fn make_text(message: Message) -> Message {
    body(message, |body| String::from_utf8_lossy(body).into_owned().into_bytes())
}

fn reformat(message: Message) -> Message {
    body(message, |body| body.iter().copied().filter(|byte| !byte.is_ascii_whitespace()).collect())
}

fn envelope(message: Message) -> Message {
    body(message, |body| [b"{\"body\": ", body, b"}"].concat())
}

fn headers(message: Message, change: fn(&str) -> String) -> Message {
    let changed: Headers = message.headers().iter().map(|(name, value)| (name.to_owned(), change(value))).collect();
    message.with_headers(changed)
}

fn ascii(value: &str) -> String {
    value.chars().filter(char::is_ascii).collect()
}

fn short(value: &str) -> String {
    value.chars().take(1024).collect()
}

fn ten_headers(message: Message) -> Message {
    let few: Headers =
        message.headers().iter().take(10).map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    message.with_headers(few)
}

fn without(message: Message, name: &str) -> Message {
    let mut headers = message.headers().clone();
    headers.remove(name);
    message.with_headers(headers)
}

fn lose_tenant(message: Message) -> Message {
    without(message, "tenant")
}

fn lose_signature(message: Message) -> Message {
    without(message, "signature")
}

fn label(message: Message) -> Message {
    message.with_content_type("application/json")
}

#[derive(Debug)]
struct RefusesTheLargest;

impl Twist for RefusesTheLargest {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if message.payload().len() >= 16 * 1024 * 1024 {
            return Completion::ready(Err(Error::new(ErrorKind::TooLarge, "off by one")));
        }
        at.producer.send(message)
    }
}

#[derive(Debug)]
struct SendsTwice(AtomicUsize);

impl Twist for SendsTwice {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if self.0.fetch_add(1, Ordering::Relaxed) % 20 == 19 {
            drop(at.producer.send(message.clone()));
        }
        at.producer.send(message)
    }
}

#[derive(Debug)]
struct SendsLettersTwice;

impl Twist for SendsLettersTwice {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if is_letters(&at.address) {
            drop(at.producer.send(message.clone()));
        }
        at.producer.send(message)
    }
}

fn pretended(message: &Message) -> Completion<Receipt> {
    Completion::ready(Ok(Receipt { id: message.id().cloned().unwrap_or_default(), broker_id: None }))
}

#[derive(Debug)]
struct LosesLetters;

impl Twist for LosesLetters {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        if is_letters(&at.address) { pretended(&message) } else { at.producer.send(message) }
    }
}

#[derive(Debug)]
struct SwallowsErrors;

impl Twist for SwallowsErrors {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        let sent = at.producer.send(message.clone());
        Completion::future(async move {
            drop(sent.await);
            pretended(&message).await
        })
    }
}

/// Confirms at once and sends later: what is not sent yet when the connection ends is lost.
#[derive(Debug, Default)]
struct AnswersEarly(Mutex<Vec<JoinHandle<()>>>);

#[async_trait]
impl Twist for AnswersEarly {
    fn send(&self, at: &Sending, message: Message) -> Completion<Receipt> {
        let answer = pretended(&message);
        let producer: Arc<dyn Producer> = Arc::clone(&at.producer);
        lock(&self.0).push(tokio::spawn(async move {
            // Longer than a busy machine takes to kill a broker.
            tokio::time::sleep(Duration::from_secs(30)).await;
            drop(producer.send(message).await);
        }));
        answer
    }

    async fn flush(&self, _: &Sending) -> Result<()> {
        Ok(())
    }

    async fn close(&self, connection: &dyn Connection) -> Result<()> {
        lock(&self.0).drain(..).for_each(|task| task.abort());
        connection.close().await
    }
}

#[derive(Debug)]
struct Renames(fn(&str, ChannelKind) -> Address);

#[async_trait]
impl Twist for Renames {
    fn address(&self, address: &Address) -> Address {
        (self.0)(address.name(), address.kind())
    }

    fn check(&self, backend: &dyn polymq_core::Backend, settings: &Settings) -> Result<()> {
        backend.check(settings)
    }
}

fn named(name: String, kind: ChannelKind) -> Address {
    match kind {
        ChannelKind::Queue => Address::queue(name),
        ChannelKind::Topic => Address::topic(name),
    }
}

fn one_queue(name: &str, kind: ChannelKind) -> Address {
    named(name.split('-').take(2).collect::<Vec<_>>().join("-"), kind)
}

fn no_topics(name: &str, _: ChannelKind) -> Address {
    Address::queue(name)
}

fn ascii_name(name: &str, kind: ChannelKind) -> Address {
    named(name.chars().map(|c| if c.is_ascii() { c } else { '?' }).collect(), kind)
}

fn no_dots(name: &str, kind: ChannelKind) -> Address {
    named(name.replace('.', "_"), kind)
}
