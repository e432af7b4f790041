//! Errors of the client library and of the broker, in polymq's words.

use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use polymq_core::{Error, ErrorKind};

use crate::NAME;

/// What was going on: the broker uses one code for a refused login and for a refused operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Login,
    Operation,
}

/// The kind of a native error. Unknown ones are [`ErrorKind::Other`], which is never retried.
pub(crate) fn kind(error: &lapin::Error, stage: Stage) -> ErrorKind {
    use lapin::ErrorKind as Native;
    match error.kind() {
        Native::IOError(_)
        | Native::RuntimeShutdownError(_)
        | Native::MissingHeartbeatError
        | Native::InvalidConnectionState(_)
        | Native::InvalidChannelState(..)
        | Native::InvalidChannel(_) => ErrorKind::Disconnected,
        // Whoever answers there speaks another protocol, TLS for one.
        Native::ParsingError(_) if stage == Stage::Login => ErrorKind::Disconnected,
        Native::ChannelsLimitReached => ErrorKind::Busy,
        Native::SerialisationError(_) => ErrorKind::InvalidInput,
        Native::AuthProviderError(_) => ErrorKind::Unauthenticated,
        Native::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(soft) => match soft {
                AMQPSoftError::ACCESSREFUSED if stage == Stage::Login => ErrorKind::Unauthenticated,
                AMQPSoftError::ACCESSREFUSED => ErrorKind::PermissionDenied,
                AMQPSoftError::NOTFOUND => ErrorKind::NotFound,
                AMQPSoftError::PRECONDITIONFAILED if is_too_large(error.get_message().as_str()) => ErrorKind::TooLarge,
                AMQPSoftError::PRECONDITIONFAILED | AMQPSoftError::RESOURCELOCKED => ErrorKind::Conflict,
                AMQPSoftError::CONTENTTOOLARGE => ErrorKind::TooLarge,
                AMQPSoftError::NOROUTE | AMQPSoftError::NOCONSUMERS => ErrorKind::Unroutable,
            },
            AMQPErrorKind::Hard(hard) => match hard {
                // Internal errors end the connection; the next one is expected to be sound.
                AMQPHardError::CONNECTIONFORCED | AMQPHardError::INTERNALERROR => ErrorKind::Disconnected,
                AMQPHardError::INVALIDPATH | AMQPHardError::NOTALLOWED => ErrorKind::PermissionDenied,
                AMQPHardError::RESOURCEERROR => ErrorKind::Busy,
                AMQPHardError::NOTIMPLEMENTED => ErrorKind::Unsupported,
                AMQPHardError::FRAMEERROR
                | AMQPHardError::SYNTAXERROR
                | AMQPHardError::COMMANDINVALID
                | AMQPHardError::CHANNELERROR
                | AMQPHardError::UNEXPECTEDFRAME => ErrorKind::Other,
            },
        },
        _ => ErrorKind::Other,
    }
}

/// The error of an operation, with a hint where there is something to do about it.
#[cold]
pub(crate) fn native(operation: &'static str, error: lapin::Error, stage: Stage) -> Error {
    let kind = kind(&error, stage);
    let mapped = Error::new(kind, text(&error)).with_backend(NAME).with_operation(operation);
    let mapped = match hint(kind, stage) {
        Some(hint) => mapped.with_hint(hint),
        None => mapped,
    };
    mapped.with_source(error)
}

/// The sentence of a native error; the broker's own words where it sent some.
pub(crate) fn text(error: &lapin::Error) -> String {
    match error.kind() {
        lapin::ErrorKind::ProtocolError(error) if !error.get_message().as_str().is_empty() => {
            error.get_message().to_string()
        }
        lapin::ErrorKind::IOError(error) => error.to_string(),
        lapin::ErrorKind::MissingHeartbeatError => "no heartbeat from the broker for twice its interval".into(),
        _ => error.to_string(),
    }
}

fn hint(kind: ErrorKind, stage: Stage) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::Unauthenticated => "check user and password",
        ErrorKind::PermissionDenied if stage == Stage::Login => {
            "check that the virtual host exists and that the user may use it"
        }
        ErrorKind::PermissionDenied => "give the user the permission (rabbitmqctl set_permissions)",
        ErrorKind::Conflict => "it exists with other properties: delete it, or use it as it is with declare=passive",
        ErrorKind::NotFound => "declare it, or check its name",
        ErrorKind::Disconnected if stage == Stage::Login => "check that the broker runs there, and TLS against plain",
        _ => return None,
    })
}

/// Whether the error ended one channel and left the connection alone.
pub(crate) fn is_channel_only(error: &lapin::Error) -> bool {
    error.is_amqp_soft_error()
}

/// Whether the broker has ended a channel because a delivery on it was not settled in time.
pub(crate) fn is_overdue(error: &lapin::Error) -> bool {
    let text = text(error);
    is_channel_only(error) && text.contains("delivery acknowledgement") && text.contains("timed out")
}

fn is_too_large(text: &str) -> bool {
    text.contains("larger than")
}

/// There is no connection, and nothing was sent.
#[cold]
pub(crate) fn disconnected(operation: &'static str, reason: &str) -> Error {
    Error::new(ErrorKind::Disconnected, format!("no connection: {reason}")).with_backend(NAME).with_operation(operation)
}

/// The connection ended between the write and the answer.
#[cold]
pub(crate) fn unknown(operation: &'static str, reason: &str) -> Error {
    Error::new(ErrorKind::UnknownOutcome, format!("no answer from the broker: {reason}"))
        .with_backend(NAME)
        .with_operation(operation)
}

/// The delivery belongs to a connection that has ended.
#[cold]
pub(crate) fn stale() -> Error {
    Error::new(ErrorKind::Stale, "the connection of this delivery has ended; the broker delivers the message again")
        .with_backend(NAME)
        .with_operation("settle")
}

/// An operation did not finish in its time.
#[cold]
pub(crate) fn timeout(operation: &'static str) -> Error {
    Error::new(ErrorKind::Timeout, "the broker did not answer in time").with_backend(NAME).with_operation(operation)
}

/// Closed by this program.
#[cold]
pub(crate) fn closed(operation: &'static str) -> Error {
    Error::closed(operation).with_backend(NAME)
}

/// The caller's input does not fit the protocol.
#[cold]
pub(crate) fn invalid(sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidInput, sentence).with_backend(NAME)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapin::protocol::AMQPError;

    fn protocol(kind: impl Into<AMQPErrorKind>, text: &str) -> lapin::Error {
        lapin::ErrorKind::ProtocolError(AMQPError::new(kind.into(), text.into())).into()
    }

    #[test]
    fn native_errors_become_kinds() {
        use {AMQPHardError as Hard, AMQPSoftError as Soft, ErrorKind as Kind, Stage::*};
        let io = || lapin::Error::from(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
        let state = || lapin::Error::from(lapin::ErrorKind::InvalidChannelState(lapin::ChannelState::Closed, "x"));
        for (error, stage, expected) in [
            (io(), Login, Kind::Disconnected),
            (lapin::ErrorKind::MissingHeartbeatError.into(), Operation, Kind::Disconnected),
            (state(), Operation, Kind::Disconnected),
            (lapin::ErrorKind::ChannelsLimitReached.into(), Operation, Kind::Busy),
            (protocol(Soft::ACCESSREFUSED, "Login was refused"), Login, Kind::Unauthenticated),
            (protocol(Soft::ACCESSREFUSED, "access to queue refused"), Operation, Kind::PermissionDenied),
            (protocol(Hard::NOTALLOWED, "vhost x not found"), Login, Kind::PermissionDenied),
            (protocol(Soft::NOTFOUND, "no queue 'x'"), Operation, Kind::NotFound),
            (protocol(Soft::PRECONDITIONFAILED, "inequivalent arg 'durable'"), Operation, Kind::Conflict),
            (protocol(Soft::PRECONDITIONFAILED, "message size 9 is larger than 8"), Operation, Kind::TooLarge),
            (protocol(Soft::RESOURCELOCKED, "exclusive"), Operation, Kind::Conflict),
            (protocol(Soft::NOROUTE, "NO_ROUTE"), Operation, Kind::Unroutable),
            (protocol(Hard::CONNECTIONFORCED, "broker forced"), Operation, Kind::Disconnected),
            (protocol(Hard::RESOURCEERROR, "too many"), Operation, Kind::Busy),
            (protocol(Hard::NOTIMPLEMENTED, "prefetch size"), Operation, Kind::Unsupported),
            (protocol(Hard::UNEXPECTEDFRAME, "?"), Operation, Kind::Other),
            (lapin::ErrorKind::FutureCompleted.into(), Operation, Kind::Other),
        ] {
            let mapped = native("send", error, stage);
            assert_eq!(mapped.kind(), expected, "{mapped}");
            assert!(std::error::Error::source(&mapped).is_some());
        }
    }

    #[test]
    fn an_overdue_delivery_is_told_from_other_failures() {
        let rabbitmq = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out. Timeout value used: 1800000 ms. \
                        This timeout value can be configured, see consumers doc guide to learn more";
        assert!(is_overdue(&protocol(AMQPSoftError::PRECONDITIONFAILED, rabbitmq)));
        let unknown_tag = "PRECONDITION_FAILED - unknown delivery tag 7";
        assert!(!is_overdue(&protocol(AMQPSoftError::PRECONDITIONFAILED, unknown_tag)));
        assert!(!is_overdue(&lapin::ErrorKind::MissingHeartbeatError.into()));
    }
}
