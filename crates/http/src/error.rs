//! One table from statuses and native errors to kinds and retry answers.

use std::{error::Error as StdError, fmt, io, iter::successors, time::Duration};

use http::{HeaderMap, StatusCode, header};
use hyper_util::client::legacy;
use polymq_core::{ATTEMPT, Error, ErrorKind, Headers, Retry, SYSTEM_PREFIX};

use crate::{NAME, answer::RETRY_AFTER_MS, connect::NoTunnel, convert::decoded};

/// The longest wait that a server can ask for: who obeys may hold a message, and those behind it, for so long. It is asked again
/// then, and may say the same.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

/// What a server answered instead of 2xx; the source of the [`Error`] that a send ends with.
#[derive(Debug, Clone)]
pub struct Refusal {
    status: StatusCode,
    retry_after: Option<Duration>,
    detail: String,
    headers: Headers,
}

impl Refusal {
    /// The status.
    #[must_use]
    pub fn status(&self) -> u16 {
        self.status.as_u16()
    }

    /// When the server wants the request again, if it says so.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Why, in the server's words.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.detail
    }

    /// The number that the next attempt has, when a consumer of polymq has counted this one. `None`: it was not tried.
    #[must_use]
    pub fn next_attempt(&self) -> Option<u32> {
        self.headers.get(ATTEMPT)?.parse().ok()
    }

    /// What a consumer of polymq knows about the message; a sender that brings it again may bring these headers along.
    #[must_use]
    pub fn system_headers(&self) -> &Headers {
        &self.headers
    }

    pub(crate) fn new(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Self {
        let system = headers
            .iter()
            .filter(|(name, _)| name.as_str().starts_with(SYSTEM_PREFIX) && *name != RETRY_AFTER_MS)
            .filter_map(|(name, value)| Some((name.to_string(), decoded(name.as_str(), value.to_str().ok()?).ok()?)))
            .collect();
        Self { status, retry_after: retry_after(headers), detail: detail(headers, body), headers: system }
    }

    /// The error of a send that ended like this.
    pub(crate) fn into_error(self) -> Error {
        let (kind, retry) = classify(self.status, self.retry_after);
        let status = self.status;
        let sentence = match self.detail.as_str() {
            "" => format!("the server answered {status}"),
            detail => format!("the server answered {status}: {detail}"),
        };
        let error = Error::new(kind, sentence).with_backend(NAME).with_operation("send");
        let error = match retry {
            Some(retry) => error.with_retry(retry),
            None => error,
        };
        let error = match status.as_u16() {
            300..=399 => error
                .with_hint("redirects are not followed; set the url, or the channel's endpoint, to the place itself"),
            401 => error.with_hint("set a token, or user and password in the url"),
            404 | 410 => error.with_hint("start its consumer, or check url and name"),
            405 | 501 => error.with_hint("set the method that the server takes"),
            _ => error,
        };
        error.with_source(self)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.status)
    }
}

impl StdError for Refusal {}

/// The kind, and the retry answer where it is not the kind's own.
fn classify(status: StatusCode, after: Option<Duration>) -> (ErrorKind, Option<Retry>) {
    use ErrorKind::{Busy, Conflict, Handler, NotFound, Other, PermissionDenied, Refused, Timeout, TooLarge};
    // A server that says when to come again has done nothing. Without that word, whoever is busy or tired of waiting may stand
    // before a server that has.
    let unknown = (ErrorKind::UnknownOutcome, None);
    let again = Some(match after {
        Some(after) if !after.is_zero() => Retry::After(after.min(LONGEST_WAIT)),
        _ => Retry::Now,
    });
    match status.as_u16() {
        300..=399 => (ErrorKind::Unroutable, None),
        401 | 407 => (ErrorKind::Unauthenticated, None),
        403 => (PermissionDenied, None),
        404 | 410 => (NotFound, None),
        405 | 501 | 505 => (ErrorKind::Unsupported, None),
        408 | 503 if after.is_none() => unknown,
        408 => (Timeout, again),
        409 => (Conflict, None),
        413 | 431 => (TooLarge, None),
        425 | 429 | 503 => (Busy, again),
        400..=499 => (Refused, None),
        // The handler may have been at work when it broke, or a gateway when it lost its server.
        502 | 504 => unknown,
        500..=599 => (Handler, Some(Retry::UnknownOutcome)),
        _ => (Other, None),
    }
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = |name: &str| headers.get(name)?.to_str().ok();
    if let Some(millis) = text(RETRY_AFTER_MS).and_then(|text| text.parse().ok()) {
        return Some(Duration::from_millis(millis));
    }
    let value = text(header::RETRY_AFTER.as_str())?.trim();
    match value.parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => Some(polymq_core::until(httpdate::parse_http_date(value).ok()?)),
    }
}

/// The server's own words, short and on one line.
fn detail(headers: &HeaderMap, body: &[u8]) -> String {
    const MAX: usize = 500;
    let kind = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let text = if kind.starts_with("application/problem+json") {
        let problem: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
        let field = |name: &str| problem.get(name).and_then(|value| value.as_str()).map(str::to_owned);
        field("detail").or_else(|| field("title")).unwrap_or_default()
    } else if kind.starts_with("text/plain") {
        String::from_utf8_lossy(body).into_owned()
    } else {
        // A page for people, or what may be anybody's data.
        String::new()
    };
    text.chars().filter(|c| !c.is_control()).take(MAX).collect()
}

/// The error of a request that got no response.
#[cold]
pub(crate) fn native(error: legacy::Error) -> Error {
    let no_tunnel = chain(&error).find_map(|cause| cause.downcast_ref::<NoTunnel>());
    let (kind, sentence) = if let Some(NoTunnel(status)) = no_tunnel {
        no_way(*status)
    } else if error.is_connect() && chain(&error).any(is_late) {
        (ErrorKind::Timeout, "no connection was made in time")
    } else if error.is_connect() || is_untaken(&error) {
        (ErrorKind::Disconnected, "there is no connection to the server")
    } else {
        (ErrorKind::UnknownOutcome, "the connection ended before the server answered")
    };
    let innermost = chain(&error).last().map(|cause| format!(": {cause}")).unwrap_or_default();
    let problem = unsettled(kind, format!("{sentence}{innermost}"));
    let problem = if error.is_connect() { problem.with_operation("connect") } else { problem };
    problem.with_source(error)
}

/// What the status means with which a proxy opens no way to a server: nothing was sent.
fn no_way(status: StatusCode) -> (ErrorKind, &'static str) {
    match status.as_u16() {
        401 | 407 => (ErrorKind::Unauthenticated, "the proxy before the server refuses the credentials"),
        // It has trouble with the server, or too much to do.
        408 | 429 | 500 | 502..=504 => (ErrorKind::Disconnected, "there is no connection to the server"),
        _ => (ErrorKind::PermissionDenied, "the proxy does not connect anybody to the server"),
    }
}

/// The error of a request that was not answered in its time.
#[cold]
pub(crate) fn unanswered(limit: Duration) -> Error {
    unsettled(ErrorKind::UnknownOutcome, format!("the server did not answer in time ({limit:?})"))
}

fn unsettled(kind: ErrorKind, sentence: String) -> Error {
    Error::new(kind, sentence).with_backend(NAME).with_operation("send")
}

/// Whether the protocol itself says that the request was not looked at: it was never written, or an HTTP/2 server that
/// ends, or that has enough to do, has sent it back (RFC 9113, section 8.7).
pub(crate) fn is_untaken(error: &legacy::Error) -> bool {
    chain(error).any(|cause| {
        cause.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_canceled)
            || cause.downcast_ref::<h2::Error>().is_some_and(|cause| {
                let reason = cause.reason();
                cause.is_remote()
                    && (cause.is_go_away() && reason == Some(h2::Reason::NO_ERROR)
                        || cause.is_reset() && reason == Some(h2::Reason::REFUSED_STREAM))
            })
    })
}

fn is_late(cause: &(dyn StdError + 'static)) -> bool {
    cause.downcast_ref::<io::Error>().is_some_and(|cause| cause.kind() == io::ErrorKind::TimedOut)
}

/// What has caused an error, from the outermost to the innermost.
fn chain(error: &legacy::Error) -> impl Iterator<Item = &(dyn StdError + 'static)> {
    successors(error.source(), |cause: &&(dyn StdError + 'static)| (*cause).source())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    fn error(status: u16, pairs: &[(&'static str, &'static str)], body: &str) -> Error {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, HeaderValue::from_static(value));
        }
        Refusal::new(StatusCode::from_u16(status).expect("a status"), &headers, body.as_bytes()).into_error()
    }

    #[test]
    fn statuses_become_kinds_and_retry_answers() {
        use ErrorKind as Kind;
        use Retry::{After, Never, Now, UnknownOutcome};
        for (status, kind, retry) in [
            (302, Kind::Unroutable, Never),
            (400, Kind::Refused, Never),
            (401, Kind::Unauthenticated, Never),
            (403, Kind::PermissionDenied, Never),
            (404, Kind::NotFound, Never),
            (405, Kind::Unsupported, Never),
            (408, Kind::UnknownOutcome, UnknownOutcome),
            (409, Kind::Conflict, Never),
            (410, Kind::NotFound, Never),
            (413, Kind::TooLarge, Never),
            (415, Kind::Refused, Never),
            (422, Kind::Refused, Never),
            (429, Kind::Busy, Now),
            (500, Kind::Handler, UnknownOutcome),
            (502, Kind::UnknownOutcome, UnknownOutcome),
            (503, Kind::UnknownOutcome, UnknownOutcome),
            (599, Kind::Handler, UnknownOutcome),
        ] {
            let error = error(status, &[], "");
            assert_eq!((error.kind(), error.retry()), (kind, retry), "{error}");
            assert_eq!(
                error.source().and_then(|source| source.downcast_ref::<Refusal>()).map(Refusal::status),
                Some(status)
            );
        }
        assert_eq!(error(429, &[("retry-after", "7")], "").retry(), After(Duration::from_secs(7)));
        let huge = [("retry-after", "18446744073709551615")];
        assert_eq!(error(503, &huge, "").retry(), After(LONGEST_WAIT), "nothing is held for ever");
        let precise = [("retry-after", "1"), (RETRY_AFTER_MS, "250")];
        assert_eq!(error(503, &precise, "").retry(), After(Duration::from_millis(250)));
        assert_eq!(error(503, &[("retry-after", "Sun, 06 Nov 1994 08:49:37 GMT")], "").retry(), Now);
        assert_eq!(error(503, &[("retry-after", "soon")], "").retry(), UnknownOutcome, "what it says cannot be read");
        let unread = error(408, &[(RETRY_AFTER_MS, "0")], "");
        assert_eq!((unread.kind(), unread.retry()), (Kind::Timeout, Now), "polymq's own");
    }

    #[test]
    fn the_servers_words_are_kept_short_and_pages_are_not_shown() {
        let problem = [("content-type", "application/problem+json")];
        let sentence = error(422, &problem, r#"{"title": "t", "detail": "no such\ncustomer"}"#).to_string();
        assert!(sentence.ends_with("422 Unprocessable Entity: no suchcustomer"), "{sentence}");
        assert!(
            error(500, &[("content-type", "text/html")], "<h1>secret").to_string().ends_with("Internal Server Error")
        );
        assert!(error(500, &[("content-type", "text/plain")], &"x".repeat(9000)).to_string().len() < 700);
    }
}
