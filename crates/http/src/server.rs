//! What becomes of a request: a message for the consumer of its path, and the answer to its sender.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use percent_encoding::percent_decode_str;
use polymq_core::{Address, ChannelKind, Error, ErrorKind, Message, Result, Ticket};
use tokio::sync::{Semaphore, oneshot};

use crate::{
    NAME,
    answer::{self, Answer, come_again, problem},
    body::{self, Limits},
    convert,
    settle::{Share, Told},
    token::Asked,
};

/// The paths that are consumed, and the limits of requests.
#[derive(Debug)]
pub(crate) struct Server {
    routes: Mutex<Routes>,
    requests: Semaphore,
    /// Bytes of bodies that there is room for.
    room: Semaphore,
    body: Limits,
    busy_retry: Duration,
    token: Asked,
    /// When the first path was added.
    begun: OnceLock<Instant>,
}

#[derive(Debug, Default)]
struct Routes {
    of: HashMap<String, Route>,
    /// There will be no more consumers.
    ended: bool,
}

#[derive(Debug)]
struct Route {
    method: Method,
    kind: ChannelKind,
    shares: Vec<Arc<Share>>,
    /// Whose turn it is.
    next: usize,
}

impl Server {
    pub(crate) fn new(config: &crate::config::HttpConfig) -> Result<Self> {
        Ok(Self {
            routes: Mutex::default(),
            requests: Semaphore::new(config.max_requests),
            room: Semaphore::new(config.max_buffered.min(Semaphore::MAX_PERMITS)),
            body: Limits { bytes: config.max_payload, idle: config.idle_timeout, whole: config.body_timeout },
            busy_retry: config.busy_retry,
            token: Asked::new(config)?,
            begun: OnceLock::new(),
        })
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a consumer of a path; none after the [end](Self::end).
    pub(crate) fn add(&self, path: String, address: &Address, method: Method, share: Arc<Share>) -> Result<()> {
        let mut routes = self.routes();
        if routes.ended {
            return Err(Error::closed("consume").with_backend(NAME));
        }
        let route = routes.of.entry(path).or_insert_with(|| Route {
            method: method.clone(),
            kind: address.kind(),
            shares: Vec::new(),
            next: 0,
        });
        route.shares.retain(|share| !share.is_closed());
        if route.shares.is_empty() {
            (route.method, route.kind) = (method.clone(), address.kind());
        }
        let conflict = |why: &str| {
            Err(Error::new(ErrorKind::Conflict, why.to_owned())
                .with_backend(NAME)
                .with_operation("consume")
                .with_channel(address.name()))
        };
        if route.kind != address.kind() || (route.kind == ChannelKind::Topic && !route.shares.is_empty()) {
            return conflict("this path has a subscriber already, and each endpoint of a topic is one subscriber");
        }
        if route.method != method {
            return conflict("another consumer of this path takes another method");
        }
        route.shares.push(share);
        drop(routes);
        self.begun.get_or_init(Instant::now);
        Ok(())
    }

    /// Whether other consumers of the service may be about to start, so that a path without one is no mistake yet.
    fn is_starting(&self) -> bool {
        self.begun.get().is_none_or(|begun| begun.elapsed() < self.busy_retry)
    }

    /// Tells every sender that waits to come again.
    pub(crate) fn end(&self) {
        let mut routes = self.routes();
        routes.ended = true;
        routes.of.values().flat_map(|route| &route.shares).for_each(|share| share.end());
    }

    /// Answers one request. The ticket is dropped when the answer is written: its consumer may wait for that.
    pub(crate) async fn serve(&self, request: Request<Incoming>) -> (Response<Bytes>, Option<Ticket>) {
        match self.handle(request).await {
            Ok(Told { answer, ticket }) => (answer.into_response(self.busy_retry), ticket),
            Err(refusal) => (*refusal, None),
        }
    }

    async fn handle(&self, request: Request<Incoming>) -> Result<Told, Box<Response<Bytes>>> {
        let refuse = |status, why: &str| Box::new(problem(status, why));
        let Ok(_place) = self.requests.try_acquire() else {
            return Err(Box::new(come_again("too many requests are being served", self.busy_retry)));
        };
        let (parts, body) = request.into_parts();
        self.authenticate(parts.headers.get(header::AUTHORIZATION))?;
        let path = match percent_decode_str(parts.uri.path()).decode_utf8() {
            Ok(path) => path.trim_end_matches('/').to_owned(),
            Err(_) => return Err(refuse(StatusCode::BAD_REQUEST, "the path is no percent-encoded UTF-8")),
        };
        self.check_route(&path, &parts.method)?;
        if body::is_coded(&parts.headers) {
            // RFC 9110, section 15.5.16.
            let mut response = problem(StatusCode::UNSUPPORTED_MEDIA_TYPE, "the body is coded; send it as it is");
            response.headers_mut().insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
            return Err(Box::new(response));
        }
        let body = body::read(body, self.body, Some(&self.room)).await;
        // Its room is free again when it has been answered.
        let (body, _room) = body.map_err(|unread| match unread.status {
            StatusCode::SERVICE_UNAVAILABLE => Box::new(come_again(&unread.why, self.busy_retry)),
            StatusCode::REQUEST_TIMEOUT => Box::new(answer::unread(&unread.why)),
            status => refuse(status, &unread.why),
        })?;
        let message = convert::message(&parts.headers, body);
        let message = message.map_err(|why| refuse(StatusCode::BAD_REQUEST, &why))?;
        let answered = self.offer(&path, message)?;
        // Dropped when the sender goes away, and then settling says so.
        Ok(answered.await.unwrap_or(Told { answer: Answer::Released, ticket: None }))
    }

    fn authenticate(&self, given: Option<&HeaderValue>) -> Result<(), Box<Response<Bytes>>> {
        match self.token.admits(given) {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => {
                // Not the sender's fault, and nobody comes in meanwhile.
                tracing::error!(%error, "senders cannot be recognised");
                return Err(Box::new(come_again("senders cannot be recognised at present", self.busy_retry)));
            }
        }
        let mut response = problem(StatusCode::UNAUTHORIZED, "a bearer token is needed");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        Err(Box::new(response))
    }

    /// Before the body is read: whether anybody takes it.
    fn check_route(&self, path: &str, method: &Method) -> Result<(), Box<Response<Bytes>>> {
        let routes = self.routes();
        let Some(route) = routes.of.get(path) else {
            let why = "no queue is consumed under this path";
            return Err(Box::new(if self.is_starting() {
                come_again(&format!("{why} yet"), self.busy_retry)
            } else {
                problem(StatusCode::NOT_FOUND, why)
            }));
        };
        if route.method == *method {
            return Ok(());
        }
        let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, "this path takes another method");
        if let Ok(allowed) = HeaderValue::from_str(route.method.as_str()) {
            response.headers_mut().insert(header::ALLOW, allowed);
        }
        Err(Box::new(response))
    }

    /// Gives the message to the next consumer of the path that has room.
    fn offer(&self, path: &str, mut message: Message) -> Result<oneshot::Receiver<Told>, Box<Response<Bytes>>> {
        let mut routes = self.routes();
        let mut why = "its consumer has ended";
        if let Some(route) = routes.of.get_mut(path) {
            for _ in 0..route.shares.len() {
                route.next = (route.next + 1) % route.shares.len();
                match route.shares[route.next].offer(message) {
                    Ok(answered) => return Ok(answered),
                    Err(back) => (message, why) = (back.message, back.why),
                }
            }
        }
        Err(Box::new(come_again(why, self.busy_retry)))
    }
}
