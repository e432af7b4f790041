//! From reason codes and native errors to kinds: one table for each.

use polymq_core::{Error, ErrorKind};
use rumqttc::v5::mqttbytes::{
    QoS,
    v5::{ConnectReturnCode, DisconnectReasonCode, PubAckReason, SubscribeReasonCode},
};

use crate::NAME;

/// An error of this backend.
#[cold]
pub(crate) fn error(kind: ErrorKind, sentence: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(kind, sentence).with_backend(NAME)
}

/// There is no broker, or none that speaks with us.
#[cold]
pub(crate) fn unreachable(endpoint: &impl std::fmt::Display, reason: &impl std::fmt::Display) -> Error {
    error(ErrorKind::Disconnected, format!("cannot connect to {endpoint}: {reason}"))
        .with_hint("check that the broker runs there, and mqtts:// against mqtt://")
}

/// What a refused CONNECT of this user means.
#[cold]
pub(crate) fn refused_connect(code: ConnectReturnCode, user: Option<&str>) -> Error {
    use ConnectReturnCode as C;
    let (kind, hint) = match code {
        C::BadUserNamePassword | C::BadAuthenticationMethod => (ErrorKind::Unauthenticated, "check user and password"),
        // MQTT 3.1.1 brokers, and mosquitto under MQTT 5 too, answer "not authorized" to a wrong password.
        C::NotAuthorized | C::Banned => {
            (ErrorKind::Unauthenticated, "check user, password and the broker's access list")
        }
        C::UnsupportedProtocolVersion | C::RefusedProtocolVersion => (ErrorKind::Unsupported, "set protocol=3.1.1"),
        C::ClientIdentifierNotValid | C::BadClientId => (ErrorKind::Refused, "choose another client_id or session"),
        C::ServerUnavailable | C::ServiceUnavailable | C::ServerBusy | C::ConnectionRateExceeded => {
            (ErrorKind::Disconnected, "try again later")
        }
        C::QuotaExceeded => (ErrorKind::Busy, "the broker allows no more connections"),
        C::UseAnotherServer | C::ServerMoved => (ErrorKind::Refused, "the broker has moved"),
        _ => (ErrorKind::Refused, "see the broker's log"),
    };
    let sentence = match (kind, user) {
        (ErrorKind::Unauthenticated, Some(user)) => format!("the broker refused the user {user:?} ({code:?})"),
        (ErrorKind::Unauthenticated, None) => format!("the broker refused a connection without a user ({code:?})"),
        _ => format!("the broker refused the connection: {code:?}"),
    };
    error(kind, sentence).with_hint(hint)
}

/// What the answer to a PUBLISH means; `None` when the broker has taken responsibility.
pub(crate) fn refused_publish(reason: PubAckReason, must_be_held: bool) -> Option<Error> {
    use PubAckReason as R;
    let (kind, sentence) = match reason {
        R::Success => return None,
        R::NoMatchingSubscribers if !must_be_held => return None,
        R::NoMatchingSubscribers => (ErrorKind::Unroutable, "no session holds messages of this queue"),
        R::NotAuthorized => (ErrorKind::PermissionDenied, "the broker does not allow this topic to this user"),
        R::QuotaExceeded => (ErrorKind::Busy, "a quota of the broker is used up"),
        R::TopicNameInvalid => (ErrorKind::InvalidInput, "the broker refuses this topic name"),
        R::PayloadFormatInvalid => (ErrorKind::InvalidInput, "the broker refuses this body as text"),
        R::UnspecifiedError | R::ImplementationSpecificError => (ErrorKind::Refused, "the broker refused the message"),
        // Our packet ids are free again only after their answer: the session's state is broken.
        R::PacketIdentifierInUse => (ErrorKind::UnknownOutcome, "the broker knows this packet id already"),
    };
    let refused = error(kind, sentence).with_operation("send");
    Some(match kind {
        ErrorKind::Unroutable => refused.with_hint("declare the queue, or send to a topic if nobody need be there"),
        ErrorKind::PermissionDenied => refused.with_hint("give the user write access in the broker's access list"),
        _ => refused,
    })
}

/// What the answer to a SUBSCRIBE of this quality means; `None` when it was granted.
pub(crate) fn refused_subscribe(reason: SubscribeReasonCode, asked: QoS) -> Option<Error> {
    use SubscribeReasonCode as R;
    let (kind, sentence) = match reason {
        R::Success(granted) if granted as u8 >= asked as u8 => return None,
        R::Success(QoS::AtMostOnce) => {
            (ErrorKind::Unsupported, "the broker delivers at most once (quality of service 0), which loses messages")
        }
        R::Success(_) => (ErrorKind::Unsupported, "the broker grants a lower quality of service than was asked for"),
        R::NotAuthorized => (ErrorKind::PermissionDenied, "the broker does not allow this subscription to this user"),
        // All that MQTT 3.1.1 says; an access list is by far the most likely reason.
        R::Failure => (ErrorKind::PermissionDenied, "the broker refused the subscription"),
        R::TopicFilterInvalid => (ErrorKind::InvalidInput, "the broker refuses this topic filter"),
        R::QuotaExceeded => (ErrorKind::Busy, "a quota of the broker is used up"),
        R::SharedSubscriptionsNotSupported => (ErrorKind::Unsupported, "the broker has no shared subscriptions"),
        R::WildcardSubscriptionsNotSupported => (ErrorKind::Unsupported, "the broker has no wildcards"),
        R::Unspecified | R::ImplementationSpecific | R::PkidInUse | R::SubscriptionIdNotSupported => {
            (ErrorKind::Refused, "the broker refused the subscription")
        }
    };
    let refused = error(kind, sentence);
    Some(match kind {
        ErrorKind::PermissionDenied => refused.with_hint("give the user read access in the broker's access list"),
        _ => refused,
    })
}

/// Whether the broker has refused a SUBSCRIBE. One whose answer is late or lost may be in force.
pub(crate) fn is_refusal(cause: &Error) -> bool {
    use ErrorKind as K;
    matches!(cause.kind(), K::PermissionDenied | K::InvalidInput | K::Busy | K::Unsupported | K::Refused)
}

/// What was written and not answered may have had its effect.
#[cold]
pub(crate) fn unanswered(cause: Error) -> Error {
    match cause.kind() {
        ErrorKind::Timeout | ErrorKind::Disconnected | ErrorKind::Closed => cause.with_kind(ErrorKind::UnknownOutcome),
        _ => cause,
    }
}

/// What a DISCONNECT of the broker says, for the health of the connection.
pub(crate) fn disconnect_reason(reason: DisconnectReasonCode) -> String {
    format!("the broker closed the connection: {reason:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_to_a_publish() {
        use PubAckReason as R;
        for (reason, queue, topic) in [
            (R::Success, None, None),
            (R::NoMatchingSubscribers, Some(ErrorKind::Unroutable), None),
            (R::NotAuthorized, Some(ErrorKind::PermissionDenied), Some(ErrorKind::PermissionDenied)),
            (R::QuotaExceeded, Some(ErrorKind::Busy), Some(ErrorKind::Busy)),
            (R::TopicNameInvalid, Some(ErrorKind::InvalidInput), Some(ErrorKind::InvalidInput)),
            (R::PayloadFormatInvalid, Some(ErrorKind::InvalidInput), Some(ErrorKind::InvalidInput)),
            (R::UnspecifiedError, Some(ErrorKind::Refused), Some(ErrorKind::Refused)),
            (R::ImplementationSpecificError, Some(ErrorKind::Refused), Some(ErrorKind::Refused)),
            (R::PacketIdentifierInUse, Some(ErrorKind::UnknownOutcome), Some(ErrorKind::UnknownOutcome)),
        ] {
            assert_eq!(refused_publish(reason, true).map(|error| error.kind()), queue, "{reason:?} of a queue");
            assert_eq!(refused_publish(reason, false).map(|error| error.kind()), topic, "{reason:?} of a topic");
        }
    }

    #[test]
    fn answers_to_a_connect() {
        use ConnectReturnCode as C;
        for (code, kind) in [
            (C::BadUserNamePassword, ErrorKind::Unauthenticated),
            (C::NotAuthorized, ErrorKind::Unauthenticated),
            (C::UnsupportedProtocolVersion, ErrorKind::Unsupported),
            (C::ServerBusy, ErrorKind::Disconnected),
            (C::QuotaExceeded, ErrorKind::Busy),
            (C::ClientIdentifierNotValid, ErrorKind::Refused),
            (C::UnspecifiedError, ErrorKind::Refused),
        ] {
            assert_eq!(refused_connect(code, None).kind(), kind, "{code:?}");
        }
    }

    #[test]
    fn answers_to_a_subscribe() {
        use SubscribeReasonCode as R;
        for (reason, kind) in [
            (R::Success(QoS::ExactlyOnce), None),
            (R::Success(QoS::AtLeastOnce), None),
            (R::Success(QoS::AtMostOnce), Some(ErrorKind::Unsupported)),
            (R::NotAuthorized, Some(ErrorKind::PermissionDenied)),
            (R::Failure, Some(ErrorKind::PermissionDenied)),
            (R::TopicFilterInvalid, Some(ErrorKind::InvalidInput)),
            (R::SharedSubscriptionsNotSupported, Some(ErrorKind::Unsupported)),
            (R::QuotaExceeded, Some(ErrorKind::Busy)),
            (R::Unspecified, Some(ErrorKind::Refused)),
        ] {
            let refused = refused_subscribe(reason, QoS::AtLeastOnce);
            assert_eq!(refused.as_ref().map(Error::kind), kind, "{reason:?}");
            assert!(refused.as_ref().is_none_or(is_refusal), "{reason:?}");
        }
        for kind in [ErrorKind::Timeout, ErrorKind::Disconnected, ErrorKind::Closed, ErrorKind::UnknownOutcome] {
            assert!(!is_refusal(&error(kind, "nobody knows")), "{kind:?}");
        }
    }
}
