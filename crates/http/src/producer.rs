//! Sends messages as requests; the answer is the confirmation.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::future::{BoxFuture, join_all};
use http::{HeaderMap, HeaderValue, Method, header};
use polymq_core::{
    Address, ChannelKind, Completion, Error, ErrorKind, Message, ProduceOptions, Producer, Receipt, Result, Retry,
};
use reqwest::Request;
use tokio::runtime::Handle;
use tokio_util::task::TaskTracker;
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
    /// Those of its requests that are on their way.
    tasks: TaskTracker,
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
        let tasks = TaskTracker::new();
        // It may be waited for at any time.
        tasks.close();
        Ok(Self {
            runtime: Handle::current(),
            kind: address.kind(),
            targets,
            method,
            content_type,
            timeout: options.timeout,
            tasks,
            closed: false.into(),
            link,
        })
    }

    fn to(&self, target: &Target, message: &Message) -> Result<Request> {
        let mut request = Request::new(self.method.clone(), target.url.clone());
        if !target.headers.is_empty() {
            request.headers_mut().clone_from(&target.headers);
        }
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

    /// Hands over what is to be done: it goes on whatever becomes of the completion.
    fn hand_over<T: Send + 'static>(&self, sending: BoxFuture<'static, Result<T>>) -> Completion<T> {
        let (completer, completion) = Completion::queued();
        let place = self.tasks.token();
        let task = async move {
            let _place = place;
            if completer.hand_over() {
                completer.complete(sending.await);
            }
        };
        self.link.tasks.spawn_on(task, &self.runtime);
        completion
    }

    fn send_to_one(&self, target: &Target, message: &Message) -> Result<Completion<Receipt>> {
        let (request, link) = (self.to(target, message)?, Arc::clone(&self.link));
        let id = message.id().cloned().unwrap_or_default();
        let sending = async move { link.exchange(request).await.map(|_| Receipt { id, broker_id: None }) };
        Ok(self.hand_over(Box::pin(sending)))
    }

    fn send_to_all(&self, message: &Message) -> Result<Completion<Receipt>> {
        let requests: Vec<_> = self.targets.iter().map(|target| self.to(target, message)).collect::<Result<_>>()?;
        let (id, link) = (message.id().cloned().unwrap_or_default(), Arc::clone(&self.link));
        let sending = async move {
            let answers = join_all(requests.into_iter().map(|request| link.exchange(request))).await;
            all_of(answers).map(|()| Receipt { id, broker_id: None })
        };
        Ok(self.hand_over(Box::pin(sending)))
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
        let sending = self.check().and_then(|()| match self.targets.as_slice() {
            [only] => self.send_to_one(only, &message),
            _ => self.send_to_all(&message),
        });
        sending.unwrap_or_else(|error| Completion::ready(Err(error)))
    }

    fn request(&self, message: Message) -> Completion<Message> {
        // A queue has one place.
        let (ChannelKind::Queue, Some(target)) = (self.kind, self.targets.first()) else {
            return Completion::ready(Err(Error::unsupported(NAME, "a request to a topic, which has many answers")));
        };
        match self.check().and_then(|()| self.to(target, &message)) {
            Ok(request) => {
                let link = Arc::clone(&self.link);
                self.hand_over(Box::pin(async move { link.exchange(request).await?.message() }))
            }
            Err(error) => Completion::ready(Err(error)),
        }
    }

    async fn flush(&self) -> Result<()> {
        self.tasks.wait().await;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, std::sync::atomic::Ordering::Release);
        self.flush().await
    }
}

#[cold]
pub(crate) fn unknown_option(name: &str, known: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("unknown option {name:?}; this backend knows: {known}"))
        .with_backend(NAME)
        .with_hint("remove it, or select the backend that it is for")
}
