//! Errors of the client library and of the service, in polymq's words.

use std::{error::Error as StdError, time::Duration};

use aws_sdk_sns::operation::publish_batch::PublishBatchError;
use aws_sdk_sqs::operation::send_message_batch::SendMessageBatchError;
use aws_smithy_runtime_api::client::{orchestrator::HttpResponse, result::SdkError};
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use polymq_core::{Error, ErrorKind, Retry};

use crate::NAME;

/// Whether repeating a request could have a second effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It may be repeated: receiving, deleting, declaring, changing visibility.
    Idempotent,
    /// It may not: sending.
    Once,
    /// Sending to a FIFO queue or topic, which takes an id once in five minutes.
    Deduplicated,
}

/// How long a name cannot be used again after its queue was deleted.
const DELETED_RECENTLY: Duration = Duration::from_secs(60);

/// The error of a request.
#[cold]
pub(crate) fn native<E>(operation: &'static str, effect: Effect, error: SdkError<E, HttpResponse>) -> Error
where
    E: StdError + ProvideErrorMetadata + Send + Sync + 'static,
{
    let kind = kind(&error, effect);
    // It may go on with all that was signed, the session's token among it.
    let tells_secrets = kind == ErrorKind::Unauthenticated && error.as_service_error().is_some();
    let text = match error.as_service_error() {
        Some(service) => {
            let text = service.message().or(service.code()).unwrap_or("refused without a reason");
            let shown = if tells_secrets { text.lines().next().unwrap_or_default() } else { text };
            shown.to_owned()
        }
        None => chain(&error),
    };
    let retry = match error.as_service_error().and_then(ProvideErrorMetadata::code) {
        Some(code) if code.contains("QueueDeletedRecently") => Some(Retry::After(DELETED_RECENTLY)),
        _ => None,
    };
    let mapped = Error::new(kind, text).with_backend(NAME).with_operation(operation);
    let mapped = match hint(kind) {
        Some(hint) => mapped.with_hint(hint),
        None => mapped,
    };
    let mapped = match retry {
        Some(retry) => mapped.with_retry(retry),
        None => mapped,
    };
    if tells_secrets { mapped } else { mapped.with_source(error) }
}

fn kind<E: StdError + ProvideErrorMetadata + 'static>(error: &SdkError<E, HttpResponse>, effect: Effect) -> ErrorKind {
    let lost = if effect == Effect::Idempotent { ErrorKind::Disconnected } else { ErrorKind::UnknownOutcome };
    match error {
        SdkError::ServiceError(context) => {
            let status = context.raw().status().as_u16();
            match of_code(context.err().code().unwrap_or_default(), context.err().message().unwrap_or_default()) {
                ErrorKind::Other if status == 429 => ErrorKind::Busy,
                ErrorKind::Other if status == 503 && effect == Effect::Deduplicated => ErrorKind::Busy,
                // It is there, and has trouble, or somebody before it has: a send may have had its effect, the rest is asked
                // again later. Throttling has names of its own.
                ErrorKind::Other if status >= 500 && effect != Effect::Idempotent => ErrorKind::UnknownOutcome,
                ErrorKind::Other if status >= 500 => ErrorKind::Busy,
                ErrorKind::Other if status == 403 => ErrorKind::PermissionDenied,
                kind => kind,
            }
        }
        SdkError::ConstructionFailure(_) => ErrorKind::Other,
        SdkError::DispatchFailure(_) if is_about_credentials(error) => ErrorKind::Unauthenticated,
        // Nobody was reached, so nothing was written.
        SdkError::DispatchFailure(_) if is_of_connecting(error) => ErrorKind::Disconnected,
        SdkError::DispatchFailure(failure) if failure.is_user() => ErrorKind::Other,
        _ => lost,
    }
}

/// Whether the service itself has answered a send so, whose outcome nobody knows: then it is there.
pub(crate) fn is_answered(error: &Error) -> bool {
    fn is<E: StdError + 'static>(source: &(dyn StdError + 'static)) -> bool {
        matches!(source.downcast_ref::<SdkError<E, HttpResponse>>(), Some(SdkError::ServiceError(_)))
    }
    error.source().is_some_and(|source| is::<SendMessageBatchError>(source) || is::<PublishBatchError>(source))
}

/// The kind of an error code, of a request or of one entry of a batch. Unknown ones are [`ErrorKind::Other`].
pub(crate) fn of_code(code: &str, message: &str) -> ErrorKind {
    let code = code.rsplit(['#', '.']).next().unwrap_or(code);
    match code {
        "QueueDoesNotExist" | "NonExistentQueue" | "NotFound" | "NotFoundException" | "ResourceNotFoundException" => {
            ErrorKind::NotFound
        }
        "QueueNameExists" | "QueueAlreadyExists" | "InvalidAttributeValue" => ErrorKind::Conflict,
        "AccessDenied"
        | "AccessDeniedException"
        | "AuthorizationError"
        | "AuthorizationErrorException"
        | "KmsAccessDenied"
        | "KMSAccessDenied" => ErrorKind::PermissionDenied,
        "InvalidClientTokenId"
        | "UnrecognizedClientException"
        | "SignatureDoesNotMatch"
        | "InvalidSignature"
        | "InvalidSignatureException"
        | "InvalidAccessKeyId"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException"
        | "IncompleteSignature"
        | "IncompleteSignatureException"
        | "ExpiredToken"
        | "ExpiredTokenException"
        | "InvalidSecurity"
        | "AuthFailure" => ErrorKind::Unauthenticated,
        "RequestThrottled"
        | "Throttling"
        | "ThrottlingException"
        | "Throttled"
        | "ThrottledException"
        | "TooManyRequestsException"
        | "OverLimit"
        | "KmsThrottled"
        | "SlowDown"
        | "QueueDeletedRecently" => ErrorKind::Busy,
        "BatchRequestTooLong" => ErrorKind::TooLarge,
        "InvalidMessageContents" => ErrorKind::InvalidInput,
        "InvalidParameterValue"
        | "InvalidParameter"
        | "InvalidParameterException"
        | "InvalidParameterValueException" => {
            let message = message.to_ascii_lowercase();
            let tells = |words: &[&str]| words.iter().any(|word| message.contains(word));
            if tells(&["not available for visibility"]) {
                // The loan was over by SQS's clock, which no input is to blame for.
                ErrorKind::Stale
            } else if tells(&["too long", "too large", "shorter than", "message size"]) {
                ErrorKind::TooLarge
            } else {
                ErrorKind::InvalidInput
            }
        }
        "ReceiptHandleIsInvalid" | "MessageNotInflight" => ErrorKind::Stale,
        "UnsupportedOperation" => ErrorKind::Unsupported,
        _ => ErrorKind::Other,
    }
}

/// The error of one entry of a batch, which certainly had no effect.
#[cold]
pub(crate) fn of_entry(operation: &'static str, code: &str, message: Option<&str>, sender_fault: bool) -> Error {
    let text = message.filter(|text| !text.is_empty()).unwrap_or(code);
    let kind = match of_code(code, text) {
        ErrorKind::Other if !sender_fault => ErrorKind::Busy,
        ErrorKind::Other => ErrorKind::Refused,
        kind => kind,
    };
    Error::new(kind, text.to_owned()).with_backend(NAME).with_operation(operation)
}

fn sources<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| (*error).source())
}

fn chain(error: &(dyn StdError + 'static)) -> String {
    let last = sources(error).last().map(ToString::to_string).unwrap_or_default();
    format!("{error}: {last}")
}

/// The connector of the client library says it in words only.
fn is_of_connecting(error: &(dyn StdError + 'static)) -> bool {
    sources(error).any(|source| {
        let text = source.to_string();
        text.contains("(Connect)") || text.contains("tcp connect") || text.contains("dns error")
    })
}

fn is_about_credentials(error: &(dyn StdError + 'static)) -> bool {
    sources(error).any(|source| source.is::<aws_credential_types::provider::error::CredentialsError>())
}

fn hint(kind: ErrorKind) -> Option<&'static str> {
    Some(match kind {
        ErrorKind::Unauthenticated => "check the access key, its secret and the region",
        ErrorKind::PermissionDenied => "allow the action for this user or role in IAM, and in the queue's policy",
        ErrorKind::NotFound => "declare it, or check its name, region and account",
        ErrorKind::Conflict => "it exists with other attributes: delete it, or use it as it is with declare=passive",
        _ => return None,
    })
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
        Effect::Once | Effect::Deduplicated => Error::new(ErrorKind::UnknownOutcome, format!("no answer: {reason}"))
            .with_backend(NAME)
            .with_operation(operation),
    }
}

/// The loan is over.
#[cold]
pub(crate) fn stale() -> Error {
    Error::new(ErrorKind::Stale, "the loan of this message is over; SQS delivers it again")
        .with_backend(NAME)
        .with_operation("settle")
}

/// The loan cannot be any longer.
#[cold]
pub(crate) fn capped(cap: std::time::Duration) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("this message was held for {cap:?}, the longest time; its loan ends soon"),
    )
    .with_backend(NAME)
    .with_operation("settle")
    .with_hint("raise lease_cap, and the longest loan of the consumer, for handlers that take longer")
}

/// Closed by this program.
#[cold]
pub(crate) fn closed(operation: &'static str) -> Error {
    Error::closed(operation).with_backend(NAME)
}

/// The caller's input does not fit the service.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_become_kinds() {
        use ErrorKind as Kind;
        for (code, expected) in [
            ("AWS.SimpleQueueService.NonExistentQueue", Kind::NotFound),
            ("com.amazonaws.sqs#QueueDoesNotExist", Kind::NotFound),
            ("NotFound", Kind::NotFound),
            ("QueueAlreadyExists", Kind::Conflict),
            ("AWS.SimpleQueueService.QueueDeletedRecently", Kind::Busy),
            ("AccessDenied", Kind::PermissionDenied),
            ("InvalidClientTokenId", Kind::Unauthenticated),
            ("ExpiredToken", Kind::Unauthenticated),
            ("com.amazon.coral.service#InvalidSignatureException", Kind::Unauthenticated),
            ("RequestThrottled", Kind::Busy),
            ("AWS.SimpleQueueService.BatchRequestTooLong", Kind::TooLarge),
            ("InvalidMessageContents", Kind::InvalidInput),
            ("ReceiptHandleIsInvalid", Kind::Stale),
            ("SomethingNew", Kind::Other),
        ] {
            assert_eq!(of_code(code, ""), expected, "{code}");
        }
        let long = "One or more parameters are invalid. Reason: Message must be shorter than 1048576 bytes.";
        assert_eq!(of_code("InvalidParameterValue", long), Kind::TooLarge);
        let over = "Value AQEB for parameter ReceiptHandle is invalid. Reason: Message does not exist or is not available for \
            visibility timeout change.";
        assert_eq!(of_code("InvalidParameterValue", over), Kind::Stale);
        let beyond = "Value 43200 for parameter VisibilityTimeout is invalid. Reason: Total VisibilityTimeout for the message is \
            beyond the limit [43200 seconds].";
        assert_eq!(of_code("InvalidParameterValue", beyond), Kind::InvalidInput);
    }

    #[test]
    fn a_failed_entry_had_no_effect() {
        assert_eq!(of_entry("send", "InternalError", None, false).retry(), Retry::Now);
        assert_eq!(of_entry("send", "ServiceUnavailable", None, false).retry(), Retry::Now);
        assert_eq!(of_entry("send", "Strange", Some("no"), true).kind(), ErrorKind::Refused);
    }
}
