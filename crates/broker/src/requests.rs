//! Commands and queries: a request goes to responders, the first answer goes back.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use polymq_kubemq_proto::{Request, Response, request::RequestType};
use prost::Message as _;
use tokio::{
    sync::oneshot,
    time::{Instant, timeout},
};

use crate::{counts::Count, events::Listeners, limits::Limits, names, refusal::Refusal};

/// Answers of queries that are kept at most; then new ones are not kept.
const CACHED: usize = 100_000;

#[derive(Debug)]
pub(crate) struct Requests {
    pub(crate) commands: Listeners<Request>,
    pub(crate) queries: Listeners<Request>,
    waiting: Mutex<HashMap<String, oneshot::Sender<Response>>>,
    cache: Mutex<Cache>,
    limits: Limits,
}

#[derive(Debug, Default)]
struct Cache {
    answers: HashMap<(String, String), (Instant, Response)>,
    bytes: usize,
}

impl Cache {
    fn size(key: &(String, String), response: &Response) -> usize {
        key.0.len() + key.1.len() + response.encoded_len()
    }

    fn remove(&mut self, key: &(String, String)) {
        if let Some((_, response)) = self.answers.remove(key) {
            self.bytes -= Self::size(key, &response);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who waits for an answer; gone when nobody does any more.
struct Waits<'a>(&'a Requests, String);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        lock(&self.0.waiting).remove(&self.1);
    }
}

impl Requests {
    pub(crate) fn new(limits: &Limits, lost: &Count) -> Self {
        Self {
            commands: Listeners::new(limits.waiting, lost.clone()),
            queries: Listeners::new(limits.waiting, lost.clone()),
            waiting: Mutex::default(),
            cache: Mutex::default(),
            limits: limits.clone(),
        }
    }

    /// Checks a request in the protocol's order.
    fn check(&self, request: &Request) -> Result<RequestType, Refusal> {
        let kind = request.request_type_data();
        if kind == RequestType::Unknown {
            return Err(Refusal::request_type());
        }
        if request.client_id.is_empty() {
            return Err(Refusal::no_client());
        }
        names::check(&request.channel)?;
        if request.timeout <= 0 {
            return Err(Refusal::no_timeout());
        }
        if request.metadata.is_empty() && request.body.is_empty() {
            return Err(Refusal::empty_request());
        }
        self.limits.check_size(&request.metadata, &request.body, &request.tags)?;
        if !request.cache_key.is_empty() && request.cache_ttl <= 0 {
            return Err(Refusal::cache_ttl());
        }
        Ok(kind)
    }

    /// Waits for the first answer; without one in time, or without a responder, the time-out is the answer.
    pub(crate) async fn ask(&self, mut request: Request) -> Result<Response, Refusal> {
        let kind = self.check(&request)?;
        if request.request_id.is_empty() {
            request.request_id = uuid::Uuid::new_v4().to_string();
        }
        let cached = (kind == RequestType::Query && !request.cache_key.is_empty())
            .then(|| (request.channel.clone(), request.cache_key.clone()));
        if let Some(hit) = cached.as_ref().and_then(|key| self.cached(key)) {
            return Ok(Response { request_id: request.request_id, cache_hit: true, ..hit });
        }
        let (sender, answer) = oneshot::channel();
        let address = format!("_INBOX.{}", uuid::Uuid::new_v4().simple());
        lock(&self.waiting).insert(address.clone(), sender);
        let _waits = Waits(self, address.clone());
        let ttl = Duration::from_secs(request.cache_ttl.max(0).unsigned_abs().into());
        let patience = Duration::from_millis(request.timeout.unsigned_abs().into());
        request.reply_channel = address;
        let responders = if kind == RequestType::Command { &self.commands } else { &self.queries };
        responders.tell(&request.channel, &request, request.encoded_len());
        let answer = timeout(patience, answer).await;
        let mut response = answer.ok().and_then(std::result::Result::ok).ok_or_else(Refusal::timeout)?;
        response.reply_channel = String::new();
        response.cache_hit = false;
        if kind == RequestType::Command {
            response.metadata = String::new();
            response.body = bytes::Bytes::new();
        }
        if let Some(key) = cached.filter(|_| response.executed) {
            self.keep(key, ttl, &response);
        }
        Ok(response)
    }

    /// A responder's answer. One that comes late or twice is nobody's.
    pub(crate) fn answer(&self, response: Response) -> Result<(), Refusal> {
        if response.client_id.is_empty() {
            return Err(Refusal::no_client());
        }
        names::check(&response.reply_channel)?;
        if response.request_id.is_empty() {
            return Err(Refusal::no_request_id());
        }
        if let Some(waits) = lock(&self.waiting).remove(&response.reply_channel) {
            let _ = waits.send(response);
        }
        Ok(())
    }

    fn cached(&self, key: &(String, String)) -> Option<Response> {
        let mut cache = lock(&self.cache);
        let (until, response) = cache.answers.get(key)?;
        if *until > Instant::now() {
            return Some(response.clone());
        }
        cache.remove(key);
        None
    }

    fn keep(&self, key: (String, String), ttl: Duration, response: &Response) {
        let mut cache = lock(&self.cache);
        cache.remove(&key);
        let (now, size) = (Instant::now(), Cache::size(&key, response));
        let full = |cache: &Cache| cache.answers.len() >= CACHED || cache.bytes + size > self.limits.cache;
        if full(&cache) {
            cache.answers.retain(|_, (until, _)| *until > now);
            cache.bytes = cache.answers.iter().map(|(key, (_, response))| Cache::size(key, response)).sum();
        }
        if !full(&cache) {
            cache.bytes += size;
            cache.answers.insert(key, (now + ttl, response.clone()));
        }
    }
}
