//! Dead letters: the copy that is sent to the dead-letter queue, and sending it back.
//!
//! The copy keeps id, body, headers and attributes of the original. What is known about the failure is in system headers.

use std::time::Duration;

use crate::{Address, Bus, ChannelKind, ConsumeOptions, Delivery, Error, Message, Result, clock};

/// System header: why the message is here.
pub const REASON: &str = "polymq-reason";
/// System header: the channel that it comes from, as `queue orders` or `topic orders`.
pub const SOURCE: &str = "polymq-source";
/// System header: the group of the topic that it comes from.
pub const SOURCE_GROUP: &str = "polymq-source-group";
/// System header: how often it was tried.
pub const ATTEMPTS: &str = "polymq-attempts";
/// System header: the error of its first failed attempt.
pub const FIRST_ERROR: &str = "polymq-first-error";
/// System header: the error of its last attempt.
pub const LAST_ERROR: &str = "polymq-last-error";
/// System header: when it was given up, RFC 3339.
pub const DEAD_AT: &str = "polymq-dead-at";
/// System header: when it was sent back from the dead letters, RFC 3339.
pub const REPLAYED_AT: &str = "polymq-replayed-at";

/// What is known about a message that was given up.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Obituary<'a> {
    pub(crate) reason: &'a str,
    pub(crate) source: &'a Address,
    pub(crate) group: Option<&'a str>,
    pub(crate) attempts: u32,
    pub(crate) errors: Errors<'a>,
}

/// What the first and the last of the attempts here failed with.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Errors<'a> {
    pub(crate) first: Option<&'a str>,
    pub(crate) last: Option<&'a str>,
}

/// The copy for the dead-letter queue.
pub(crate) fn dead_letter(original: &Message, obituary: Obituary<'_>) -> Message {
    // Its time must not run out while it waits for a person to look at it.
    let mut copy = original.clone().without_expires_at().without_deliver_at();
    let Errors { first, last } = obituary.errors;
    let first = original.system_headers().get(FIRST_ERROR).or(first).or(last).map(str::to_owned);
    copy.clear_system_headers();
    copy.set_system_header(REASON, header_text(obituary.reason));
    copy.set_system_header(SOURCE, obituary.source.to_string());
    if let Some(group) = obituary.group {
        copy.set_system_header(SOURCE_GROUP, group.to_owned());
    }
    copy.set_system_header(ATTEMPTS, obituary.attempts.to_string());
    if let Some(first) = first {
        copy.set_system_header(FIRST_ERROR, header_text(&first));
    }
    if let Some(last) = last {
        copy.set_system_header(LAST_ERROR, header_text(last));
    }
    copy.set_system_header(DEAD_AT, humantime::format_rfc3339_millis(clock::now()).to_string());
    copy
}

/// The copy with as little as can be said of it.
pub(crate) fn brief_dead_letter(original: &Message, reason: &str, source: &Address) -> Message {
    let mut copy = original.clone().without_expires_at().without_deliver_at();
    copy.clear_system_headers();
    copy.set_system_header(REASON, cut(reason, 100));
    copy.set_system_header(SOURCE, source.to_string());
    copy
}

/// The text as a header value: control characters become spaces and it is cut to 1 KiB, so that an error's
/// text can never make the dead letter itself impossible to send.
pub(crate) fn header_text(text: &str) -> String {
    cut(text, 1024)
}

fn cut(text: &str, max: usize) -> String {
    let mut cut = String::with_capacity(text.len().min(max));
    for c in text.chars() {
        if cut.len() + c.len_utf8() > max {
            break;
        }
        cut.push(if c.is_control() { ' ' } else { c });
    }
    cut
}

/// Letters of other channels that may lie before those that are to be replayed.
const FOREIGN: usize = 16;

/// Sends up to `max` dead letters back to the queue they came from and says how many.
///
/// Each goes back with its original id, headers and body and starts with attempt 1; it leaves the
/// dead-letter queue only when the source has accepted it. Letters of another channel stay where they are. Ends when nothing has come
/// for `patience`.
///
/// # Errors
/// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for the dead letters of a topic's group, because sending to the topic would reach
/// the other groups too: consume the dead-letter queue itself instead. [`ErrorKind::NotFound`](crate::ErrorKind::NotFound) where it does not exist.
/// Otherwise the errors of receiving and sending, with a hint how many were sent back before: they stay so.
pub async fn replay_dead_letters(bus: &Bus, source: &Address, max: usize, patience: Duration) -> Result<usize> {
    if source.kind() == ChannelKind::Topic {
        return Err(Error::unsupported(bus.backend(), "replaying the dead letters of a topic's group")
            .with_hint("consume the dead-letter queue itself"));
    }
    // Without the queue there is nothing to send back.
    let options =
        ConsumeOptions { prefetch: max.saturating_add(FOREIGN).min(64), declare: false, ..ConsumeOptions::default() };
    let mut letters = bus.channel(source.dead_letters(None)).subscribe(options).await?;
    let target = bus.channel(source.clone());
    let (mut replayed, mut foreign) = (0, Vec::new());
    let outcome = async {
        while replayed < max {
            let mut batch = letters.receive((max - replayed).min(64), patience).await?;
            if batch.is_empty() {
                break;
            }
            for letter in batch.drain(..) {
                let mut message = letter.message().clone();
                if message.system_headers().get(SOURCE).is_some_and(|from| from != source.to_string()) {
                    // Kept until the end, or it would be the next one again.
                    foreign.push(letter);
                    continue;
                }
                message.clear_system_headers();
                // A broker that drops repetitions must not take it for the message that failed.
                message.set_system_header(REPLAYED_AT, humantime::format_rfc3339_millis(clock::now()).to_string());
                target.pass_on(message).await?;
                letter.ack().await?;
                replayed += 1;
            }
        }
        Ok(())
    }
    .await;
    if !foreign.is_empty() {
        tracing::warn!(%source, count = foreign.len(), "dead letters of other channels stay where they are");
        foreign.into_iter().for_each(Delivery::release);
    }
    let closed = letters.close().await;
    match outcome.and(closed) {
        Err(error) if replayed > 0 => Err(error.with_hint(format!("{replayed} were sent back before, and stay so"))),
        ended => ended.map(|()| replayed),
    }
}
