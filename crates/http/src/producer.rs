//! Sends messages as requests; the answer is the confirmation.

use std::{cmp::Reverse, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures_util::future::join_all;
use http::{HeaderValue, Method, header};
use http_body_util::Full;
use polymq_core::{
    Address, ChannelKind, Completion, Error, ErrorKind, Message, ProduceOptions, Producer, Receipt, Result, Retry,
    Tally,
};
use url::Url;

use crate::{
    NAME,
    client::{Answered, Link, Outbound, limit},
    config,
    lanes::{Job, Lanes},
    place::Place,
};

/// The producer of one channel: one place for a queue, one or more for a topic.
#[derive(Debug)]
pub(crate) struct HttpProducer {
    link: Arc<Link>,
    kind: ChannelKind,
    places: Vec<Arc<Place>>,
    method: Method,
    content_type: Option<HeaderValue>,
    timeout: Duration,
    /// Those of its requests that are on their way.
    tally: Tally,
    lanes: Lanes,
    closed: std::sync::atomic::AtomicBool,
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
        let places = targets.into_iter().map(|url| Place::new(&link, url).map(Arc::new)).collect::<Result<_>>()?;
        Ok(Self {
            kind: address.kind(),
            places,
            method,
            content_type,
            timeout: options.timeout,
            tally: Tally::default(),
            lanes: Lanes::new(&link),
            closed: false.into(),
            link,
        })
    }

    fn to(&self, place: &Arc<Place>, message: &Message) -> Result<Outbound> {
        let mut outbound = place.request(&self.link, self.method.clone(), limit(self.timeout))?;
        let headers = outbound.request.headers_mut();
        crate::convert::to_headers(message, headers)?;
        if let Some(content_type) = &self.content_type
            && message.content_type().is_none()
        {
            headers.insert(header::CONTENT_TYPE, content_type.clone());
        }
        *outbound.request.body_mut() = Full::new(message.payload().clone());
        Ok(outbound)
    }

    fn check(&self) -> Result<()> {
        if self.closed.load(std::sync::atomic::Ordering::Acquire) {
            return Err(Error::closed("send").with_backend(NAME));
        }
        self.link.check_open("send")
    }

    /// Hands over what is to be done: it goes on whatever becomes of the completion.
    fn hand_over<T: Send + 'static>(&self, sending: impl Future<Output = Result<T>> + Send + 'static) -> Completion<T> {
        let (completer, completion) = Completion::queued();
        let place = self.tally.ticket();
        let task = async move {
            let _place = place;
            if completer.hand_over() {
                completer.complete(sending.await);
            }
        };
        self.link.tasks.spawn_on(task, &self.link.runtime);
        completion
    }

    fn send_to_one(&self, place: &Arc<Place>, message: &Message) -> Result<Completion<Receipt>> {
        let outbound = self.to(place, message)?;
        let (completer, completion) = Completion::queued();
        let id = message.id().cloned().unwrap_or_default();
        let places = (self.tally.ticket(), self.link.tasks.token());
        self.lanes.make(Job { outbound, id, completer, places });
        Ok(completion)
    }

    fn send_to_all(&self, message: &Message) -> Result<Completion<Receipt>> {
        let requests: Vec<_> = self.places.iter().map(|place| self.to(place, message)).collect::<Result<_>>()?;
        let (id, link) = (message.id().cloned().unwrap_or_default(), Arc::clone(&self.link));
        let sending = async move {
            let answers = join_all(requests.into_iter().map(|request| link.exchange(request))).await;
            all_of(answers).map(|()| Receipt { id, broker_id: None })
        };
        Ok(self.hand_over(sending))
    }
}

/// One place has answered, or all have: what that means for the one message.
fn all_of(answers: Vec<Result<Answered>>) -> Result<()> {
    let count = answers.len();
    let mut failures: Vec<Error> = answers.into_iter().filter_map(Result::err).collect();
    let failed = failures.len();
    // Sending again reaches all of them, so the one that bears it least speaks for the others. Of equals the first.
    failures.sort_by_key(|error| Reverse(caution(error.retry())));
    let Some(first) = failures.into_iter().next() else { return Ok(()) };
    if failed == count {
        // Nobody has it: as with one place.
        return Err(first);
    }
    let sentence = format!("{failed} of {count} endpoints did not take the message: {}", first.message());
    // Sending again reaches those once more that have it.
    Err(Error::new(first.kind(), sentence)
        .with_retry(if first.retry() == Retry::Never { Retry::Never } else { Retry::UnknownOutcome })
        .with_backend(NAME)
        .with_source(first))
}

/// How much speaks against sending again.
fn caution(retry: Retry) -> (u8, Duration) {
    match retry {
        Retry::Now => (0, Duration::ZERO),
        Retry::After(wait) => (1, wait),
        Retry::Never => (2, Duration::ZERO),
        // May have had its effect, which "never" does not say.
        Retry::UnknownOutcome => (3, Duration::ZERO),
    }
}

#[async_trait]
impl Producer for HttpProducer {
    fn send(&self, message: Message) -> Completion<Receipt> {
        let sending = self.check().and_then(|()| match self.places.as_slice() {
            [only] => self.send_to_one(only, &message),
            _ => self.send_to_all(&message),
        });
        sending.unwrap_or_else(|error| Completion::ready(Err(error)))
    }

    fn request(&self, message: Message) -> Completion<Message> {
        // A queue has one place.
        let (ChannelKind::Queue, Some(place)) = (self.kind, self.places.first()) else {
            return Completion::ready(Err(Error::unsupported(NAME, "a request to a topic, which has many answers")));
        };
        match self.check().and_then(|()| self.to(place, &message)) {
            Ok(request) => {
                let link = Arc::clone(&self.link);
                self.hand_over(async move { link.exchange(request).await?.message() })
            }
            Err(error) => Completion::ready(Err(error)),
        }
    }

    async fn flush(&self) -> Result<()> {
        self.tally.flush().await;
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        self.closed.store(true, std::sync::atomic::Ordering::Release);
        self.lanes.close();
        self.flush().await
    }
}

#[cold]
pub(crate) fn unknown_option(name: &str, known: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("unknown option {name:?}; this backend knows: {known}"))
        .with_backend(NAME)
        .with_hint("remove it, or select the backend that it is for")
}
