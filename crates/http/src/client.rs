//! The sending side that the producers of a connection share.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use polymq_core::{Error, ErrorKind, HealthReporter, Message, Result};
use reqwest::{Client, Request, redirect::Policy};
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;

use crate::{
    NAME,
    body::{self, Limits},
    config::{Http2, HttpConfig, refuse},
    convert, error,
    token::Shown,
};

/// The client with its pool of connections, the state of the connection, and what both sides of it need.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) client: Client,
    pub(crate) config: HttpConfig,
    pub(crate) health: HealthReporter,
    /// Where the connection was made: the caller's may end soon.
    pub(crate) runtime: Handle,
    /// Requests on their way.
    pub(crate) tasks: TaskTracker,
    token: Shown,
    closed: AtomicBool,
}

impl Link {
    pub(crate) fn new(config: HttpConfig) -> Result<Self> {
        let runtime = Handle::try_current().map_err(|error| {
            refuse("the connection is made outside of a Tokio runtime")
                .with_hint("make it where async code runs")
                .with_source(error)
        })?;
        let health = HealthReporter::new();
        // There is no connection that could be up or down before it is used.
        health.up();
        let (client, token) = (client(&config)?, Shown::new(&config)?);
        let tasks = TaskTracker::new();
        Ok(Self { client, config, health, runtime, tasks, token, closed: AtomicBool::new(false) })
    }

    /// Takes no more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Waits until every request has been answered, or its time has passed.
    pub(crate) async fn flush(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    pub(crate) fn check_open(&self, operation: &'static str) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::closed(operation).with_backend(NAME));
        }
        Ok(())
    }

    fn limits(&self, bytes: usize) -> Limits {
        Limits { bytes, idle: self.config.idle_timeout, whole: self.config.body_timeout }
    }

    /// The token, for a place that it is [meant for](HttpConfig::shows_token_to).
    pub(crate) fn show_token(&self, headers: &mut HeaderMap) -> Result<()> {
        if let Some(token) = self.token.header()? {
            headers.insert(header::AUTHORIZATION, token);
        }
        Ok(())
    }

    /// Sends one request and reads the answer, within its limits. `Err` tells what a status other than 2xx means.
    pub(crate) async fn exchange(&self, request: Request) -> Result<Answered> {
        let mut response = match self.client.execute(request).await {
            Ok(response) => response,
            Err(problem) => {
                let problem = error::native(problem);
                if matches!(problem.kind(), ErrorKind::Disconnected | ErrorKind::Timeout | ErrorKind::UnknownOutcome) {
                    self.health.down(&problem);
                }
                return Err(problem);
            }
        };
        let status = response.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::PROXY_AUTHENTICATION_REQUIRED) {
            // Somebody answers, but nothing that is sent gets through.
            self.health.down(format_args!("the server refuses the credentials ({status})"));
        } else {
            self.health.up();
        }
        if status.is_success() && response.content_length() == Some(0) {
            // Most answers: there is nothing to read.
            return Ok(Answered { headers: std::mem::take(response.headers_mut()), body: Bytes::new() });
        }
        let response: http::Response<reqwest::Body> = response.into();
        let (parts, body) = response.into_parts();
        if !status.is_success() {
            // Only its first words are of interest.
            let (read, _) = body::read(body, self.limits(64 * 1024), None).await.unwrap_or_default();
            return Err(error::Refusal::new(status, &parts.headers, &read).into_error());
        }
        let read = body::read(body, self.limits(self.config.max_reply), None).await;
        let (body, _) = read.map_err(|unread| unreadable(status, unread))?;
        Ok(Answered { headers: parts.headers, body })
    }
}

/// A success, read to its end. What it says is of interest only to those who asked.
#[derive(Debug)]
pub(crate) struct Answered {
    headers: HeaderMap,
    body: Bytes,
}

impl Answered {
    pub(crate) fn message(self) -> Result<Message> {
        convert::message(&self.headers, self.body).map_err(|why| {
            Error::new(ErrorKind::Decode, format!("the server took the message, but its answer cannot be read: {why}"))
                .with_backend(NAME)
        })
    }
}

#[cold]
fn unreadable(status: StatusCode, unread: body::Unread) -> Error {
    let kind =
        if unread.status == StatusCode::PAYLOAD_TOO_LARGE { ErrorKind::TooLarge } else { ErrorKind::UnknownOutcome };
    Error::new(kind, format!("the server answered {status}, but not with an answer that can be read: {}", unread.why))
        .with_backend(NAME)
        .with_operation("send")
        .with_hint("raise max_reply, or ask for less")
}

fn client(config: &HttpConfig) -> Result<Client> {
    let target = config.target()?;
    let builder = Client::builder()
        .user_agent(concat!("polymq/", env!("CARGO_PKG_VERSION")))
        // A message belongs to the place that it was sent to: another place may be anybody's.
        .redirect(Policy::none())
        .timeout(limit(LIKELY_TIMEOUT))
        .connect_timeout(config.connect_timeout)
        .pool_idle_timeout(config.idle_timeout)
        .tcp_nodelay(true)
        .tcp_keepalive(config.heartbeat)
        .http2_keep_alive_interval(config.heartbeat)
        .http2_keep_alive_timeout(config.heartbeat)
        .http2_adaptive_window(true);
    let builder = if target.is_local() { builder.no_proxy() } else { builder };
    let builder = match config.http2 {
        Http2::Auto => builder,
        Http2::Only => builder.http2_prior_knowledge(),
        Http2::Off => builder.http1_only(),
    };
    #[cfg(feature = "tls")]
    let builder = builder.tls_backend_preconfigured(crate::tls::client(config)?);
    builder.build().map_err(|error| refuse("the HTTP client cannot be made").with_source(error))
}

/// That of producers which are not told otherwise: the client's own, so that their requests need not say it.
pub(crate) const LIKELY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long one request may take in all.
pub(crate) fn limit(timeout: Duration) -> Duration {
    // Longer than the handle waits, which tells its own story when the time has passed.
    timeout + Duration::from_millis(100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn most_requests_need_no_time_limit_of_their_own() {
        assert_eq!(LIKELY_TIMEOUT, polymq_core::ProduceOptions::default().timeout);
    }
}
