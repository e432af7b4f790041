//! The sending side that the producers of a connection share.

use std::{
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper_util::{
    client::{legacy, proxy::matcher::Matcher},
    rt::{TokioExecutor, TokioTimer},
};
use polymq_core::{Error, ErrorKind, HealthReporter, Message, Result, Retry};
use tokio::{
    runtime::Handle,
    sync::watch,
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;

use crate::{
    NAME,
    body::{self, Limits},
    config::{Http2, HttpConfig, refuse},
    connect::{self, Client, Connector},
    convert, error,
    place::Place,
    recovery,
    token::Shown,
};

/// How often a request is made again that an HTTP/2 server has not looked at.
const UNTAKEN: usize = 2;

/// A request that is to be made.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) request: Request<Full<Bytes>>,
    /// How long it may take until it is answered.
    pub(crate) limit: Duration,
    /// Where it goes.
    pub(crate) place: Arc<Place>,
    /// It may travel over HTTP/2, where a server can say that it has not looked at it (RFC 9113, section 8.7). A copy is kept then.
    pub(crate) is_kept: bool,
}

/// The client with its pool of connections, the state of the connection, and what both sides of it need.
#[derive(Debug)]
pub(crate) struct Link {
    /// `None` once it is closed: with the client its kept connections end.
    client: RwLock<Option<Client>>,
    pub(crate) config: HttpConfig,
    pub(crate) health: HealthReporter,
    /// Where the connection was made: the caller's may end soon.
    pub(crate) runtime: Handle,
    /// Requests on their way.
    pub(crate) tasks: TaskTracker,
    token: Shown,
    proxies: Arc<Matcher>,
    closed: AtomicBool,
    /// Closed, for those who wait for that.
    pub(crate) ended: watch::Sender<bool>,
    /// Somebody looks whether a place answers again.
    pub(crate) looks: AtomicBool,
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
        let proxies = connect::proxies();
        let (client, token) = (client(&config, Arc::clone(&proxies))?, Shown::new(&config)?);
        let tasks = TaskTracker::new();
        let client = RwLock::new(Some(client));
        let (closed, looks, ended) = (AtomicBool::new(false), AtomicBool::new(false), watch::Sender::new(false));
        Ok(Self { client, config, health, runtime, tasks, token, proxies, closed, ended, looks })
    }

    /// Takes no more.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.ended.send_replace(true);
    }

    /// Ends the connections that are kept; requests that are on their way still are answered.
    pub(crate) fn hang_up(&self) {
        self.client.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Does something with the client behind the producers.
    pub(crate) fn with_client<T>(&self, act: impl FnOnce(&Client) -> T) -> Result<T> {
        let client = self.client.read().unwrap_or_else(PoisonError::into_inner);
        client.as_ref().map(act).ok_or_else(|| Error::closed("send").with_backend(NAME))
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
        // A file may be read while it is being written: nothing was sent, and the next attempt reads it again.
        if let Some(token) = self.token.header().map_err(|error| error.with_retry(Retry::Now))? {
            headers.insert(header::AUTHORIZATION, token);
        }
        Ok(())
    }

    /// What a proxy is shown with each request to this place.
    pub(crate) fn shown_to_proxy(&self, server: &Uri) -> Option<HeaderValue> {
        connect::shown_to_proxy(&self.proxies, server)
    }

    /// Sends one request and reads the answer, within its limits. `Err` tells what a status other than 2xx means.
    pub(crate) async fn exchange(self: &Arc<Self>, outbound: Outbound) -> Result<Answered> {
        let (limit, begun) = (outbound.limit, Instant::now());
        // All of it has one time.
        let left = |bytes| {
            let limits = self.limits(bytes);
            Limits { whole: limits.whole.min(limit.saturating_sub(begun.elapsed())), ..limits }
        };
        let place = Arc::clone(&outbound.place);
        let answer = timeout(limit, self.answer(outbound)).await;
        let response = match answer.unwrap_or_else(|_| Err(error::unanswered(limit))) {
            Ok(response) => response,
            Err(problem) => {
                // No answer of the server's, whatever the reason.
                self.health.down(&problem);
                recovery::look(self, place);
                return Err(problem);
            }
        };
        let status = response.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::PROXY_AUTHENTICATION_REQUIRED) {
            // Somebody answers, but nothing that is sent gets through.
            self.health.down(format_args!("the server refuses the credentials ({status})"));
            recovery::look(self, place);
        } else {
            self.health.up();
        }
        let (parts, body) = response.into_parts();
        if status.is_success() && body.is_end_stream() {
            // Most answers: there is nothing to read.
            return Ok(Answered { headers: parts.headers, body: Bytes::new() });
        }
        if !status.is_success() {
            // Only its first words are of interest.
            let (read, _) = body::read(body, left(64 * 1024), None).await.unwrap_or_default();
            return Err(error::Refusal::new(status, &parts.headers, &read).into_error());
        }
        let read = body::read(body, left(self.config.max_reply), None).await;
        let (body, _) = read.map_err(|unread| unreadable(status, unread))?;
        Ok(Answered { headers: parts.headers, body })
    }

    /// The head of the answer.
    async fn answer(&self, outbound: Outbound) -> Result<Response<Incoming>> {
        let Outbound { request, is_kept, .. } = outbound;
        let copy = is_kept.then(|| request.clone());
        let mut answer = self.with_client(|client| client.request(request))?.await;
        for _ in 0..UNTAKEN {
            match (&answer, &copy) {
                (Err(problem), Some(copy)) if error::is_untaken(problem) => {
                    answer = self.with_client(|client| client.request(copy.clone()))?.await;
                }
                _ => break,
            }
        }
        answer.map_err(error::native)
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
        let message = match body::is_coded(&self.headers) {
            true => Err("it is compressed, which nobody has asked for".to_owned()),
            false => convert::message(&self.headers, self.body),
        };
        message.map_err(|why| {
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

fn client(config: &HttpConfig, proxies: Arc<Matcher>) -> Result<Client> {
    let mut builder = legacy::Client::builder(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(config.idle_timeout)
        .http2_keep_alive_interval(config.heartbeat)
        .http2_keep_alive_timeout(config.heartbeat)
        .http2_adaptive_window(true)
        .http2_only(config.http2 == Http2::Only);
    Ok(builder.build(Connector::new(config, proxies)?))
}

/// How long one request may take in all.
pub(crate) fn limit(timeout: Duration) -> Duration {
    // Longer than the handle waits, which tells its own story when the time has passed.
    timeout.saturating_add(Duration::from_millis(100))
}
