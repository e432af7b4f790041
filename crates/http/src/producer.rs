//! Sends messages as requests; the answer is the confirmation.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Method, header};
use polymq_core::{
    Address, ChannelKind, Completion, Error, ErrorKind, Message, ProduceOptions, Producer, Receipt, Result, Retry,
};
use reqwest::Request;
use tokio::{runtime::Handle, sync::watch};
use url::Url;

use crate::{
    NAME,
    client::{Answered, Link, limit},
    config,
};

/// The producer of one channel: one place for a queue, one or more for a topic.
#[derive(Debug)]
pub(crate) struct HttpProducer {
    link: Arc<Link>,
    runtime: Handle,
    kind: ChannelKind,
    targets: Vec<Target>,
    method: Method,
    content_type: Option<HeaderValue>,
    timeout: Duration,
    /// How many are on their way; `None` once closed.
    open: watch::Sender<usize>,
    closed: std::sync::atomic::AtomicBool,
}

/// Where requests go, and the headers that each of them has.
#[derive(Debug)]
struct Target {
    url: Url,
    headers: HeaderMap,
}

impl Target {
    /// Credentials in the URL become a header, as a browser does it.
    fn new(link: &Link, method: &Method, url: Url) -> Result<Self> {
        let request = link.client.request(method.clone(), url).build().map_err(crate::error::native)?;
        Ok(Self { url: request.url().clone(), headers: request.headers().clone() })
    }
}

impl HttpProducer {
    pub(crate) fn new(link: Arc<Link>, address: &Address, options: &ProduceOptions) -> Result<Self> {
        let settings = &link.config;
        let (mut method, mut content_type) = (settings.method.as_str(), settings.content_type.as_deref());
        let mut targets: Vec<Url> = match address.kind() {
            ChannelKind::Queue => vec![settings.target()?.of(address)],
            ChannelKind::Topic => settings.topic_targets()?.iter().map(|target| target.of(address)).collect(),
        };
        for (key, value) in &options.extra {
            match key.as_str() {
                "method" => method = value,
                "content_type" => content_type = Some(value),
                "endpoint" => targets = vec![settings.target()?.endpoint(value, settings)?],
                "endpoints" => {
                    let target = settings.target()?;
                    let listed = value.split(',').map(|text| target.endpoint(text.trim(), settings));
                    targets = listed.collect::<Result<_>>()?;
                }
                _ => return Err(unknown_option(key, "method, endpoint, endpoints, content_type")),
            }
        }
        if address.kind() == ChannelKind::Queue && targets.len() != 1 {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "a queue with several endpoints; each message has one consumer",
            )
            .with_backend(NAME)
            .with_hint("use a topic, or one endpoint"));
        }
        let method = config::method(method)?;
        let content_type = content_type.map(HeaderValue::from_str).transpose().map_err(|_| {
            Error::new(ErrorKind::InvalidInput, "the option \"content_type\" is no media type").with_backend(NAME)
        })?;
        let targets = targets.into_iter().map(|url| Target::new(&link, &method, url)).collect::<Result<_>>()?;
        Ok(Self {
            runtime: Handle::current(),
            kind: address.kind(),
            targets,
            method,
            content_type,
            timeout: options.timeout,
            open: watch::Sender::new(0),
            closed: false.into(),
            link,
        })
    }

    fn requests(&self, message: &Message) -> Result<Vec<Request>> {
        self.targets.iter().map(|target| self.to(target, message)).collect()
    }

    fn to(&self, target: &Target, message: &Message) -> Result<Request> {
        let mut request = Request::new(self.method.clone(), target.url.clone());
        request.headers_mut().clone_from(&target.headers);
        *request.timeout_mut() = Some(limit(self.timeout));
        let headers = request.headers_mut();
        crate::convert::to_headers(message, headers)?;
        if let Some(content_type) = &self.content_type
            && message.content_type().is_none()
        {
            headers.insert(header::CONTENT_TYPE, content_type.clone());
        }
        *request.body_mut() = Some(message.payload().clone().into());
        Ok(request)
    }

    fn check(&self) -> Result<()> {
        if self.closed.load(std::sync::atomic::Ordering::Acquire) {
            return Err(Error::closed("send").with_backend(NAME));
        }
        self.link.check_open("send")
    }

    /// Hands requests over: they go on whatever becomes of the completion.
    fn hand_over<T: Send + 'static>(
        &self,
        requests: Vec<Request>,
        finish: impl FnOnce(Vec<Result<Answered>>) -> Result<T> + Send + 'static,
    ) -> Completion<T> {
        let (completer, completion) = Completion::queued();
        let (link, place) = (Arc::clone(&self.link), Place::taken(&self.open));
        let sending = async move {
            let _place = place;
            if !completer.hand_over() {
                return;
            }
            let answers = match <[Request; 1]>::try_from(requests) {
                Ok([only]) => vec![link.exchange(only).await],
                Err(several) => join_all(several.into_iter().map(|request| link.exchange(request))).await,
            };
            completer.complete(finish(answers));
        };
        self.link.tasks.spawn_on(sending, &self.runtime);
        completion
    }
}

/// One place has answered, or all have: what that means for the one message.
fn all_of(answers: Vec<Result<Answered>>) -> Result<()> {
    let count = answers.len();
    let mut failures: Vec<Error> = answers.into_iter().filter_map(Result::err).collect();
    match failures.len() {
        0 => Ok(()),
        // Nobody has it, and all say the same: as with one place.
        failed if failed == count => Err(failures.swap_remove(0)),
        failed => {
            let first = failures.swap_remove(0);
            let sentence = format!("{failed} of {count} endpoints did not take the message: {}", first.message());
            // Sending again reaches those once more that have it.
            Err(Error::new(first.kind(), sentence)
                .with_retry(if first.retry() == Retry::Never { Retry::Never } else { Retry::UnknownOutcome })
                .with_backend(NAME)
                .with_source(first))
        }
    }
}

#[async_trait]
impl Producer for HttpProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        match self.check().and_then(|()| self.requests(&message)) {
            Ok(requests) => {
                let id = message.id().cloned().unwrap_or_default();
                self.hand_over(requests, move |answers| all_of(answers).map(|()| Receipt { id, broker_id: None }))
            }
            Err(error) => Completion::ready(Err(error)),
        }
    }

    fn request(&self, message: Message) -> Completion<Message> {
        if self.kind == ChannelKind::Topic {
            return Completion::ready(Err(Error::unsupported(NAME, "a request to a topic, which has many answers")));
        }
        match self.check().and_then(|()| self.requests(&message)) {
            Ok(requests) => self.hand_over(requests, |mut answers| {
                // A queue has one place.
                answers.pop().unwrap_or_else(|| Err(Error::new(ErrorKind::Other, "no endpoint")))?.message()
            }),
            Err(error) => Completion::ready(Err(error)),
        }
    }

    async fn flush(&self) -> Result<()> {
        // The sender is ours: waiting cannot fail.
        let _ = self.open.subscribe().wait_for(|open| *open == 0).await;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, std::sync::atomic::Ordering::Release);
        self.flush().await
    }
}

/// A request on its way.
struct Place(watch::Sender<usize>);

impl Place {
    fn taken(open: &watch::Sender<usize>) -> Self {
        open.send_modify(|open| *open += 1);
        Self(open.clone())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}

#[cold]
pub(crate) fn unknown_option(name: &str, known: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("unknown option {name:?}; this backend knows: {known}"))
        .with_backend(NAME)
        .with_hint("remove it, or select the backend that it is for")
}
