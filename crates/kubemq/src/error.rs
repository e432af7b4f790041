//! Errors of the protocol, in polymq's words.
//!
//! A refusal is a status with the code INTERNAL, or a text in an answer that is otherwise fine, and begins with
//! "Error NNN: " where KubeMQ has a number for it. What else fails is the connection's fault.

use std::time::Duration;

use polymq_core::{Error, ErrorKind};
use tonic::{Code, Status};

use crate::{NAME, dial::ENDED};

/// Whether repeating a request could have a second effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It may be repeated: receiving, declaring, looking.
    Idempotent,
    /// It may not: sending.
    Once,
}

/// The error of a call.
#[cold]
pub(crate) fn native(operation: &'static str, effect: Effect, status: Status) -> Error {
    let text = text(&status);
    let kind = match status.code() {
        Code::Unauthenticated => ErrorKind::Unauthenticated,
        Code::PermissionDenied => ErrorKind::PermissionDenied,
        Code::Unimplemented => ErrorKind::Unsupported,
        Code::NotFound => ErrorKind::NotFound,
        Code::ResourceExhausted => ErrorKind::Busy,
        Code::OutOfRange => ErrorKind::TooLarge,
        Code::InvalidArgument => ErrorKind::InvalidInput,
        Code::Internal if number(&text).is_some() || std::error::Error::source(&status).is_none() => of_text(&text),
        _ if is_of_connecting(&status) || effect == Effect::Idempotent => ErrorKind::Disconnected,
        _ => ErrorKind::UnknownOutcome,
    };
    hinted(Error::new(kind, text)).with_operation(operation).with_source(status)
}

/// The error of one message, or of an answer, that says in words that it was refused.
#[cold]
pub(crate) fn refused(operation: &'static str, text: &str) -> Error {
    hinted(Error::new(of_text(text), text.trim().to_owned())).with_operation(operation)
}

fn hinted(error: Error) -> Error {
    let hint = match error.kind() {
        ErrorKind::Unauthenticated => "check the token",
        ErrorKind::PermissionDenied => "allow this client to use the channel, in the rules of the broker",
        ErrorKind::Unsupported => "this server does not know the call; KubeMQ has all of them from version 2.2 on",
        _ => return error.with_backend(NAME),
    };
    error.with_backend(NAME).with_hint(hint)
}

fn text(status: &Status) -> String {
    let mut source = std::error::Error::source(status);
    let mut last = None;
    while let Some(error) = source {
        last = Some(error.to_string());
        source = error.source();
    }
    match last {
        Some(last) if !status.message().contains(&last) => format!("{}: {last}", status.message()),
        _ if status.message().is_empty() => format!("{:?}", status.code()),
        _ => status.message().trim().to_owned(),
    }
}

/// In what polymq's broker says when it has no room at present, or when the channel is just being deleted.
const NOT_NOW: [&str; 5] = [
    "the disk is full",
    "the store has reached its limit",
    "the most this broker allows",
    "wait already",
    "the channel was deleted",
];

/// KubeMQ's number of an error.
fn number(text: &str) -> Option<u32> {
    text.trim().strip_prefix("Error ")?.split(':').next()?.parse().ok()
}

fn of_text(text: &str) -> ErrorKind {
    match number(text) {
        Some(412) => ErrorKind::PermissionDenied,
        Some(421) => ErrorKind::Unauthenticated,
        // The responder may have done what it was asked for.
        Some(301) => ErrorKind::UnknownOutcome,
        Some(302 | 409) => ErrorKind::Busy,
        // Its visibility time is over.
        Some(129) => ErrorKind::Stale,
        Some(101..=138 | 206 | 207) => ErrorKind::InvalidInput,
        _ if text.contains("not found") => ErrorKind::NotFound,
        _ if text.contains("already registered") => ErrorKind::Conflict,
        _ if text.contains("bytes, this broker takes") => ErrorKind::TooLarge,
        // What was written may be on disk, and nobody can know.
        _ if text.contains("cannot be synced") => ErrorKind::UnknownOutcome,
        // There is room again when somebody has received, settled or made some.
        _ if NOT_NOW.iter().any(|part| text.contains(part)) => ErrorKind::Busy,
        _ => ErrorKind::Refused,
    }
}

/// A subscription has ended with its channel. What is read under that name from now on is another one, from its beginning.
pub(crate) fn is_of_deleting(error: &Error) -> bool {
    error.message().contains("the channel was deleted")
}

/// Nobody was reached, or the connection had ended before the call, so nothing was written.
fn is_of_connecting(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let text = error.to_string();
        if text.contains("tcp connect")
            || text.contains("dns error")
            || text.contains("Connection refused")
            || text.contains(ENDED)
        {
            return true;
        }
        source = error.source();
    }
    status.message().contains("not ready to accept requests")
}

/// There is no connection, and nothing was sent.
#[cold]
pub(crate) fn disconnected(operation: &'static str, reason: &str) -> Error {
    Error::new(ErrorKind::Disconnected, format!("no connection: {reason}")).with_backend(NAME).with_operation(operation)
}

/// No answer came to what may have had its effect.
#[cold]
pub(crate) fn lost(operation: &'static str, effect: Effect, reason: &str) -> Error {
    match effect {
        Effect::Idempotent => disconnected(operation, reason),
        Effect::Once => Error::new(ErrorKind::UnknownOutcome, format!("no answer: {reason}"))
            .with_backend(NAME)
            .with_operation(operation),
    }
}

/// The delivery belongs to a connection that has ended.
#[cold]
pub(crate) fn stale() -> Error {
    Error::new(ErrorKind::Stale, "the connection of this delivery has ended; the broker delivers the message again")
        .with_backend(NAME)
        .with_operation("settle")
}

/// Closed by this program.
#[cold]
pub(crate) fn closed(operation: &'static str) -> Error {
    Error::closed(operation).with_backend(NAME)
}

/// An operation did not finish in its time.
#[cold]
pub(crate) fn not_in_time(operation: &'static str, time: Duration) -> Error {
    Error::new(ErrorKind::Timeout, format!("not everything was answered within {time:?}"))
        .with_backend(NAME)
        .with_operation(operation)
}

/// The channel is not there, and may not be made.
#[cold]
pub(crate) fn not_found(operation: &'static str, what: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::NotFound, format!("{what} does not exist"))
        .with_backend(NAME)
        .with_operation(operation)
        .with_hint("declare it first, or check its name")
}

/// The caller's input does not fit the protocol.
#[cold]
pub(crate) fn invalid(sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidInput, sentence).with_backend(NAME)
}

/// A setting or option that is not valid.
#[cold]
pub(crate) fn config(sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, sentence).with_backend(NAME)
}

/// An error for a second reader.
#[cold]
pub(crate) fn copy(error: &Error) -> Error {
    let copy = Error::new(error.kind(), error.message().to_owned()).with_backend(NAME).with_retry(error.retry());
    match error.hint() {
        Some(hint) => copy.with_hint(hint.to_owned()),
        None => copy,
    }
}

/// Errors of a connection that is lost, or counts as lost.
pub(crate) fn is_of_connection(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Disconnected | ErrorKind::Unauthenticated | ErrorKind::UnknownOutcome)
}

/// Errors that trying again does not mend.
pub(crate) fn is_final(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotFound
            | ErrorKind::PermissionDenied
            | ErrorKind::Closed
            | ErrorKind::Unsupported
            | ErrorKind::InvalidInput
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_become_kinds() {
        use ErrorKind as Kind;
        for (text, expected) in [
            ("Error 101: invalid clientID value, cannot be empty", Kind::InvalidInput),
            ("Error 301: timeout for request message", Kind::UnknownOutcome),
            ("Error 412: access denied to resource", Kind::PermissionDenied),
            ("Error 421: authentication verification failed, expired", Kind::Unauthenticated),
            ("Error 129: current visibility timer expired", Kind::Stale),
            ("channel not found", Kind::NotFound),
            ("stan: clientID already registered", Kind::Conflict),
            ("the message has 11 bytes, this broker takes 10 at most: send less, or raise the limit", Kind::TooLarge),
            (
                "queue \"q\" has 5 messages, the most this broker allows: receive some first, or raise the limit",
                Kind::Busy,
            ),
            ("this stream holds 5 messages of 9 bytes, the most this broker allows: settle some first", Kind::Busy),
            ("1000 polls of this stream wait already: wait for their answers first", Kind::Busy),
            ("the disk is full: free space in the data directory; nothing was stored", Kind::Busy),
            ("the store has reached its limit of 9 bytes: receive messages, or raise the limit", Kind::Busy),
            ("the channel was deleted meanwhile; who sends to it makes it anew", Kind::Busy),
            ("cannot store in x: the log beside it cannot be synced: Input/output error", Kind::UnknownOutcome),
            ("something new", Kind::Refused),
        ] {
            assert_eq!(refused("send", text).kind(), expected, "{text}");
            assert_eq!(native("send", Effect::Once, Status::internal(text)).kind(), expected, "{text}");
        }
    }

    #[test]
    fn what_the_connection_did_is_not_a_refusal() {
        let lost = || Status::unavailable("keepalive");
        assert_eq!(native("send", Effect::Once, lost()).kind(), ErrorKind::UnknownOutcome);
        assert_eq!(native("receive", Effect::Idempotent, lost()).kind(), ErrorKind::Disconnected);
        let starting = Status::unavailable("grpc server is not ready to accept requests");
        assert_eq!(native("send", Effect::Once, starting).kind(), ErrorKind::Disconnected);
    }
}
