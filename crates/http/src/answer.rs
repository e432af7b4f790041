//! What a sender is told: the response that each settlement, and each refusal, becomes.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use polymq_core::{ATTEMPT, Message};

use crate::convert;

/// The precise form of `Retry-After`, in milliseconds.
pub(crate) const RETRY_AFTER_MS: &str = "polymq-retry-after-ms";
const PROBLEM: HeaderValue = HeaderValue::from_static("application/problem+json");

/// How a delivery was settled.
#[derive(Debug)]
pub(crate) enum Answer {
    /// Acknowledged.
    Done,
    /// Acknowledged, with the handler's value.
    Reply(Box<Message>),
    /// Another attempt, no earlier than this. What polymq knows about the message goes along, for a sender that brings
    /// it again.
    Again { message: Box<Message>, attempt: u32, after: Duration },
    /// Given back untried: the consumer ends, or the delivery was dropped.
    Released,
    /// Given up, with the reason.
    Rejected(String),
}

impl Answer {
    pub(crate) fn into_response(self, busy_retry: Duration) -> Response<Bytes> {
        match self {
            Self::Done => empty(StatusCode::NO_CONTENT),
            Self::Reply(message) => reply(&message),
            Self::Again { message, attempt, after } => {
                let mut response = come_again("the message was not handled; send it again", after);
                let headers = response.headers_mut();
                for (name, value) in message.system_headers().iter() {
                    // Names of polymq's own are names of headers, and values are encoded.
                    if let (Ok(name), Ok(value)) = (http::HeaderName::try_from(name), convert::encoded(value)) {
                        headers.insert(name, value);
                    }
                }
                headers.insert(ATTEMPT, HeaderValue::from(attempt));
                response
            }
            Self::Released => come_again("the message was given back untried; send it again", busy_retry),
            Self::Rejected(reason) => problem(StatusCode::UNPROCESSABLE_ENTITY, &reason),
        }
    }
}

fn reply(message: &Message) -> Response<Bytes> {
    let mut response = Response::new(message.payload().clone());
    match convert::to_headers(message, response.headers_mut()) {
        Ok(()) => response,
        Err(error) => problem(StatusCode::INTERNAL_SERVER_ERROR, &format!("the answer cannot be carried: {error}")),
    }
}

fn empty(status: StatusCode) -> Response<Bytes> {
    let mut response = Response::default();
    *response.status_mut() = status;
    response
}

/// A status with its reason: problem details of RFC 9457.
pub(crate) fn problem(status: StatusCode, detail: &str) -> Response<Bytes> {
    let title = status.canonical_reason().unwrap_or_default();
    let body = serde_json::json!({ "title": title, "status": status.as_u16(), "detail": detail });
    let mut response = Response::new(Bytes::from(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, PROBLEM);
    response
}

/// 408 for a request that was not read to its end. Its sender is told that nobody saw it: others say 408 when they are tired of
/// waiting for an answer.
pub(crate) fn unread(detail: &str) -> Response<Bytes> {
    let mut response = problem(StatusCode::REQUEST_TIMEOUT, detail);
    response.headers_mut().insert(RETRY_AFTER_MS, HeaderValue::from(0));
    response
}

/// 503 with the time after which the same request is welcome.
pub(crate) fn come_again(detail: &str, after: Duration) -> Response<Bytes> {
    let mut response = problem(StatusCode::SERVICE_UNAVAILABLE, detail);
    let headers = response.headers_mut();
    // Whole seconds, and never too early.
    headers.insert(
        header::RETRY_AFTER,
        HeaderValue::from(after.as_secs().saturating_add((after.subsec_nanos() > 0).into())),
    );
    headers.insert(RETRY_AFTER_MS, HeaderValue::from(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_settlement_has_its_response() {
        let busy = Duration::from_secs(1);
        assert_eq!(Answer::Done.into_response(busy).status(), 204);
        assert_eq!(Answer::Reply(Box::new(Message::new("x"))).into_response(busy).status(), 200);
        assert_eq!(Answer::Rejected("no".into()).into_response(busy).status(), 422);
        let mut message = Message::new("");
        message.set_system_header(polymq_core::dead_letter::FIRST_ERROR, "é");
        let after = Duration::from_millis(1500);
        let again = Answer::Again { message: Box::new(message), attempt: 3, after }.into_response(busy);
        let header = |name: &str| again.headers()[name].to_str().expect("ASCII").to_owned();
        assert_eq!(
            (again.status(), header("retry-after"), header(RETRY_AFTER_MS)),
            (StatusCode::SERVICE_UNAVAILABLE, "2".into(), "1500".into())
        );
        assert_eq!((header(ATTEMPT), header("polymq-first-error")), ("3".into(), "%C3%A9".into()));
        assert!(!Answer::Released.into_response(busy).headers().contains_key(ATTEMPT));
    }
}
