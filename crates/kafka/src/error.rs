//! Errors of the client library and of the broker, in polymq's words.

use polymq_core::{Error, ErrorKind, Retry};
use rdkafka::{error::KafkaError, types::RDKafkaErrorCode as Code};

use crate::NAME;

/// The kind of a native error of any operation but sending. Unknown ones are [`ErrorKind::Other`], never retried.
pub(crate) fn kind(code: Code) -> ErrorKind {
    match code {
        Code::BrokerTransportFailure
        | Code::AllBrokersDown
        | Code::Resolve
        | Code::NetworkException
        | Code::BrokerNotAvailable
        | Code::LeaderNotAvailable
        | Code::NotLeaderForPartition
        | Code::NotController
        | Code::WaitingForCoordinator
        | Code::CoordinatorNotAvailable
        | Code::CoordinatorLoadInProgress
        | Code::NotCoordinator
        | Code::SSL
        | Code::BrokerDestroy
        | Code::DestroyBroker => ErrorKind::Disconnected,
        Code::OperationTimedOut | Code::TimedOutQueue | Code::RequestTimedOut => ErrorKind::Timeout,
        Code::MessageTimedOut
        | Code::PurgeInflight
        // What was sent once and put back is among it.
        | Code::PurgeQueue
        | Code::NotEnoughReplicasAfterAppend
        | Code::Fatal
        | Code::GaplessGuarantee
        | Code::OutOfOrderSequenceNumber
        | Code::UnknownProducerId
        | Code::InvalidProducerEpoch
        | Code::InvalidProducerIdMapping => ErrorKind::UnknownOutcome,
        Code::UnknownTopic
        | Code::UnknownPartition
        | Code::UnknownTopicOrPartition
        | Code::UnknownTopicId
        | Code::GroupIdNotFound
        | Code::UnknownGroup => ErrorKind::NotFound,
        Code::TopicAlreadyExists | Code::NonEmptyGroup | Code::InconsistentGroupProtocol => ErrorKind::Conflict,
        Code::Authentication
        | Code::SaslAuthenticationFailed
        | Code::UnsupportedSASLMechanism
        | Code::IllegalSASLState => ErrorKind::Unauthenticated,
        Code::TopicAuthorizationFailed
        | Code::GroupAuthorizationFailed
        | Code::ClusterAuthorizationFailed
        | Code::TransactionalIdAuthorizationFailed => ErrorKind::PermissionDenied,
        Code::MessageSizeTooLarge | Code::MessageBatchTooLarge | Code::InvalidMessageSize => ErrorKind::TooLarge,
        Code::NotEnoughReplicas
        | Code::QueueFull
        | Code::ThrottlingQuotaExceeded
        | Code::KafkaStorageError
        // Nothing is wrong with it: another one of its batch was refused, and none of them was taken.
        | Code::InvalidDifferentRecord => ErrorKind::Busy,
        Code::InvalidTopic
        | Code::InvalidPartitions
        | Code::InvalidReplicationFactor
        | Code::InvalidConfig
        | Code::InvalidArgument
        | Code::InvalidGroupId
        | Code::InvalidSessionTimeout => ErrorKind::InvalidInput,
        Code::PolicyViolation | Code::InvalidRecord | Code::InvalidTimestamp | Code::InvalidMessage => {
            ErrorKind::Refused
        }
        Code::UnsupportedFeature | Code::UnsupportedVersion | Code::NotImplemented => ErrorKind::Unsupported,
        _ => ErrorKind::Other,
    }
}

/// The same for a message: an answer that is missing leaves open whether the broker has it.
fn sending_kind(code: Code) -> ErrorKind {
    match kind(code) {
        ErrorKind::Disconnected | ErrorKind::Timeout => ErrorKind::UnknownOutcome,
        kind => kind,
    }
}

/// The error of an operation, with a hint where there is something to do about it.
#[cold]
pub(crate) fn native(operation: &'static str, error: KafkaError) -> Error {
    let kind = code(&error).map_or(ErrorKind::Other, kind);
    let mapped = Error::new(kind, text(&error)).with_backend(NAME).with_operation(operation);
    let mapped = match hint(kind) {
        Some(hint) => mapped.with_hint(hint),
        None => mapped,
    };
    mapped.with_source(error)
}

/// The same for another one who waits for it.
#[cold]
pub(crate) fn copy(error: &Error) -> Error {
    Error::new(error.kind(), error.message().to_owned()).with_backend(NAME).with_operation("settle")
}

/// The same for one code, such as the one of a single topic.
#[cold]
pub(crate) fn of_code(operation: &'static str, code: Code) -> Error {
    native(operation, KafkaError::Global(code))
}

/// The error of a message that the client library or the broker refused.
#[cold]
pub(crate) fn sending(error: KafkaError) -> Error {
    if code(&error) == Some(Code::BrokerDestroy) {
        return topic_gone(error);
    }
    let kind = code(&error).map_or(ErrorKind::Other, sending_kind);
    native("send", error).with_kind(kind)
}

/// librdkafka has taken a partition apart with the message in it, because its topic was deleted: of a client that ends, all
/// messages were withdrawn before. Most were never sent; one may have been, and was put back when no answer came.
#[cold]
fn topic_gone(error: KafkaError) -> Error {
    native("send", KafkaError::MessageProduction(Code::UnknownTopicOrPartition))
        .with_retry(Retry::UnknownOutcome)
        .with_source(error)
}

pub(crate) fn code(error: &KafkaError) -> Option<Code> {
    match error {
        KafkaError::Transaction(error) => Some(error.code()),
        KafkaError::AdminOp(code)
        | KafkaError::ConsumerCommit(code)
        | KafkaError::ConsumerQueueClose(code)
        | KafkaError::Flush(code)
        | KafkaError::Global(code)
        | KafkaError::GroupListFetch(code)
        | KafkaError::MessageConsumption(code)
        | KafkaError::MessageConsumptionFatal(code)
        | KafkaError::MessageProduction(code)
        | KafkaError::MetadataFetch(code)
        | KafkaError::OffsetFetch(code)
        | KafkaError::Rebalance(code)
        | KafkaError::SetPartitionOffset(code)
        | KafkaError::StoreOffset(code) => Some(*code),
        _ => None,
    }
}

/// The sentence of a native error, without the client library's decoration.
pub(crate) fn text(error: &KafkaError) -> String {
    // It tells more than its code.
    if let KafkaError::Transaction(error) = error {
        return error.string();
    }
    match code(error) {
        Some(code) => {
            let text = code.to_string();
            // "MessageTimedOut (Local: Message timed out)"
            match text.split_once(" (") {
                Some((_, inner)) => inner.trim_end_matches(')').to_owned(),
                None => text,
            }
        }
        None => error.to_string(),
    }
}

fn hint(kind: ErrorKind) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::Unauthenticated => "check user, password and mechanism",
        ErrorKind::PermissionDenied => "give the user the permission (kafka-acls)",
        ErrorKind::NotFound => "declare it, or check its name",
        ErrorKind::TooLarge => "raise max_payload and the topic's max.message.bytes",
        _ => return None,
    })
}

/// There is no connection, and nothing was sent.
#[cold]
pub(crate) fn disconnected(operation: &'static str, reason: &str) -> Error {
    Error::new(ErrorKind::Disconnected, format!("no connection: {reason}")).with_backend(NAME).with_operation(operation)
}

/// The delivery is another consumer's now.
#[cold]
pub(crate) fn stale() -> Error {
    Error::new(
        ErrorKind::Stale,
        "the partition of this delivery has gone to another consumer, which gets the message again",
    )
    .with_backend(NAME)
    .with_operation("settle")
}

/// An operation did not finish in its time.
#[cold]
pub(crate) fn timeout(operation: &'static str) -> Error {
    Error::new(ErrorKind::Timeout, "the broker did not answer in time").with_backend(NAME).with_operation(operation)
}

/// Something that should never happen, such as a panic of the client library. What it ended may be begun anew.
#[cold]
pub(crate) fn panicked(operation: &'static str) -> Error {
    Error::new(ErrorKind::Other, "the polling thread has panicked").with_backend(NAME).with_operation(operation)
}

/// Closed by this program.
#[cold]
pub(crate) fn closed(operation: &'static str) -> Error {
    Error::closed(operation).with_backend(NAME)
}

/// The caller's input does not fit Kafka.
#[cold]
pub(crate) fn invalid(sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidInput, sentence).with_backend(NAME)
}

/// A setting or an option is not valid.
#[cold]
pub(crate) fn config(sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Config, sentence).with_backend(NAME)
}

/// The settings were right when the connection was made, so what makes them useless now passes: a file that is being replaced,
/// a machine without memory or descriptors for another client.
pub(crate) fn for_now(error: Error) -> Error {
    if error.kind() == ErrorKind::Config { error.with_kind(ErrorKind::Disconnected) } else { error }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn native_errors_become_kinds() {
        use ErrorKind as Kind;
        for (code, expected, when_sending) in [
            (Code::BrokerTransportFailure, Kind::Disconnected, Kind::UnknownOutcome),
            (Code::RequestTimedOut, Kind::Timeout, Kind::UnknownOutcome),
            (Code::MessageTimedOut, Kind::UnknownOutcome, Kind::UnknownOutcome),
            (Code::PurgeQueue, Kind::UnknownOutcome, Kind::UnknownOutcome),
            (Code::PurgeInflight, Kind::UnknownOutcome, Kind::UnknownOutcome),
            (Code::UnknownTopicOrPartition, Kind::NotFound, Kind::NotFound),
            (Code::UnknownTopic, Kind::NotFound, Kind::NotFound),
            (Code::BrokerDestroy, Kind::Disconnected, Kind::NotFound),
            (Code::DestroyBroker, Kind::Disconnected, Kind::UnknownOutcome),
            (Code::TopicAuthorizationFailed, Kind::PermissionDenied, Kind::PermissionDenied),
            (Code::Authentication, Kind::Unauthenticated, Kind::Unauthenticated),
            (Code::MessageSizeTooLarge, Kind::TooLarge, Kind::TooLarge),
            (Code::NotEnoughReplicas, Kind::Busy, Kind::Busy),
            (Code::InvalidTopic, Kind::InvalidInput, Kind::InvalidInput),
            (Code::InvalidReplicationFactor, Kind::InvalidInput, Kind::InvalidInput),
            (Code::PolicyViolation, Kind::Refused, Kind::Refused),
            (Code::InvalidRecord, Kind::Refused, Kind::Refused),
            (Code::InvalidDifferentRecord, Kind::Busy, Kind::Busy),
            (Code::Underflow, Kind::Other, Kind::Other),
        ] {
            let mapped = of_code("declare", code);
            assert_eq!(mapped.kind(), expected, "{mapped}");
            assert!(std::error::Error::source(&mapped).is_some());
            assert_eq!(sending(KafkaError::MessageProduction(code)).kind(), when_sending);
        }
    }

    #[test]
    fn a_message_whose_topic_goes_may_have_been_written() {
        let error = sending(KafkaError::MessageProduction(Code::BrokerDestroy));
        assert_eq!((error.kind(), error.retry()), (ErrorKind::NotFound, Retry::UnknownOutcome));
        assert!(error.to_string().contains("Unknown topic or partition"), "{error}");
        let source = std::error::Error::source(&error).expect("what the client library has said").to_string();
        assert!(source.contains("BrokerDestroy"), "{source}");
    }

    #[test]
    fn sentences_are_the_brokers_own() {
        let error = of_code("send", Code::UnknownTopicOrPartition);
        assert_eq!(error.to_string(), "kafka: send: Broker: Unknown topic or partition; declare it, or check its name");
    }
}
