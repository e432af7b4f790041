//! Queues, topics and subscriptions: what is declared, found and deleted.

use std::sync::Arc;

use aws_sdk_sqs::types::QueueAttributeName;
use polymq_core::{Error, ErrorKind, Result};
use serde_json::json;

use crate::{
    NAME,
    clients::Live,
    error::{self, Effect, native},
    names::{self, Name},
    policy,
};

/// Dead letters are kept as long as SQS keeps anything: fourteen days.
const LETTERS_KEPT: &str = "1209600";

/// What a consumer needs at the broker.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) queue: Name,
    pub(crate) topic: Option<Subscribed>,
    pub(crate) dead_letters: Option<Name>,
    pub(crate) redrive: u32,
    pub(crate) declare: bool,
    /// The queue is one consumer's own, and ends with it.
    pub(crate) own: bool,
}

/// How a queue gets a topic's messages.
#[derive(Debug, Clone)]
pub(crate) struct Subscribed {
    pub(crate) topic: Name,
    /// Whether the topic may be made.
    pub(crate) declare: bool,
    pub(crate) raw: bool,
    pub(crate) filter: Option<String>,
}

fn missing(what: &str, name: &str) -> Error {
    Error::new(ErrorKind::NotFound, format!("the {what} {name:?} does not exist"))
        .with_backend(NAME)
        .with_hint("declare it, or check its name, region and account")
}

/// Makes sure that all of it exists; the queue's URL.
pub(crate) async fn ensure(live: &Live, plan: &Plan) -> Result<Arc<str>> {
    let url = ensure_queue(live, &plan.queue, plan.declare, &[]).await?;
    if !plan.declare {
        check_redrive(live, &url, plan).await?;
        return Ok(url);
    }
    if let Some(letters) = &plan.dead_letters {
        let kept = [(QueueAttributeName::MessageRetentionPeriod, LETTERS_KEPT)];
        let letters = ensure_queue(live, letters, true, &kept).await?;
        if plan.redrive > 0 {
            let policy = json!({
                "deadLetterTargetArn": queue_arn(live, &letters).await?,
                "maxReceiveCount": plan.redrive.to_string(),
            });
            set(live, &url, QueueAttributeName::RedrivePolicy, &policy.to_string()).await?;
        }
    }
    if let Some(subscribed) = &plan.topic {
        let (topic, queue) = places(live, &url, subscribed).await?;
        // Nobody else sends to this queue.
        policy::allow(live, &url, &queue, &topic).await?;
        subscribe(live, &topic, &queue, subscribed).await?;
    }
    Ok(url)
}

/// What is not declared must be there.
async fn check_redrive(live: &Live, url: &str, plan: &Plan) -> Result<()> {
    if plan.redrive == 0 || attribute(live, url, QueueAttributeName::RedrivePolicy).await?.is_some() {
        return Ok(());
    }
    let sentence = format!("the queue {:?} has no redrive policy, and none is declared", plan.queue.text);
    Err(error::config(sentence).with_hint("give it one, let it be declared, or set redrive=0"))
}

/// Gives a topic's messages to a queue, beside all others that it gets. Both exist afterwards, where they may be made.
pub(crate) async fn bind(live: &Live, plan: &Plan) -> Result<()> {
    let url = ensure_queue(live, &plan.queue, plan.declare, &[]).await?;
    let Some(subscribed) = &plan.topic else { return Ok(()) };
    let (topic, queue) = places(live, &url, subscribed).await?;
    policy::allow_beside(live, &url, &queue, &topic).await?;
    subscribe(live, &topic, &queue, subscribed).await
}

/// The ARNs of a topic, which is made where it may be, and of a queue.
async fn places(live: &Live, url: &str, subscribed: &Subscribed) -> Result<(Arc<str>, String)> {
    let topic = ensure_topic(live, &subscribed.topic, subscribed.declare).await?;
    Ok((topic, queue_arn(live, url).await?))
}

/// The URL of a queue, which is made where it may be.
pub(crate) async fn ensure_queue(
    live: &Live,
    name: &Name,
    declare: bool,
    attributes: &[(QueueAttributeName, &str)],
) -> Result<Arc<str>> {
    // Asked first: whoever may use a queue may not always make one, and it is taken as it is.
    if let Some(url) = find_queue(live, name).await? {
        return Ok(url);
    }
    if !declare {
        return Err(missing("queue", &name.text));
    }
    let mut request = live.sqs.create_queue().queue_name(&name.text);
    if name.fifo {
        request = request.attributes(QueueAttributeName::FifoQueue, "true");
    }
    for (key, value) in attributes {
        request = request.attributes(key.clone(), *value);
    }
    let made = request.send().await.map_err(|error| native("declare", Effect::Idempotent, error))?;
    made.queue_url.map(Arc::from).ok_or_else(|| missing("queue", &name.text))
}

/// The URL of a queue, if there is one.
pub(crate) async fn find_queue(live: &Live, name: &Name) -> Result<Option<Arc<str>>> {
    match live.sqs.get_queue_url().queue_name(&name.text).send().await {
        Ok(found) => Ok(found.queue_url.map(Arc::from)),
        Err(error) => match native("declare", Effect::Idempotent, error) {
            error if error.kind() == ErrorKind::NotFound => Ok(None),
            error => Err(error),
        },
    }
}

/// The ARN of a topic, which is made where it may be.
pub(crate) async fn ensure_topic(live: &Live, name: &Name, declare: bool) -> Result<Arc<str>> {
    if !declare {
        return find_topic(live, name).await?.ok_or_else(|| missing("topic", &name.text));
    }
    let mut request = live.sns.create_topic().name(&name.text);
    if name.fifo {
        request = request.attributes("FifoTopic", "true");
    }
    let made = request.send().await.map_err(|error| native("declare", Effect::Idempotent, error))?;
    made.topic_arn.map(Arc::from).ok_or_else(|| missing("topic", &name.text))
}

pub(crate) async fn find_topic(live: &Live, name: &Name) -> Result<Option<Arc<str>>> {
    let ending = format!(":{}", name.text);
    let mut pages = live.sns.list_topics().into_paginator().items().send();
    while let Some(topic) = pages.next().await {
        let topic = topic.map_err(|error| native("declare", Effect::Idempotent, error))?;
        if let Some(arn) = topic.topic_arn.filter(|arn| arn.ends_with(&ending)) {
            return Ok(Some(arn.into()));
        }
    }
    Ok(None)
}

pub(crate) async fn attribute(live: &Live, url: &str, name: QueueAttributeName) -> Result<Option<String>> {
    let request = live.sqs.get_queue_attributes().queue_url(url).attribute_names(name.clone());
    let mut found = request.send().await.map_err(|error| native("declare", Effect::Idempotent, error))?;
    Ok(found.attributes.as_mut().and_then(|attributes| attributes.remove(&name)))
}

pub(crate) async fn set(live: &Live, url: &str, name: QueueAttributeName, value: &str) -> Result<()> {
    let request = live.sqs.set_queue_attributes().queue_url(url).attributes(name, value);
    request.send().await.map(drop).map_err(|error| native("declare", Effect::Idempotent, error))
}

async fn queue_arn(live: &Live, url: &str) -> Result<String> {
    attribute(live, url, QueueAttributeName::QueueArn).await?.ok_or_else(|| missing("queue", url))
}

async fn subscribe(live: &Live, topic: &str, queue: &str, wanted: &Subscribed) -> Result<()> {
    let attributes = [
        ("RawMessageDelivery", Some(wanted.raw.to_string())),
        // An empty policy takes an earlier one away.
        ("FilterPolicy", Some(wanted.filter.clone().unwrap_or_else(|| "{}".into()))),
    ];
    if let Some(known) = find_subscription(live, topic, queue).await? {
        for (name, value) in attributes {
            let request = live.sns.set_subscription_attributes().subscription_arn(&known).attribute_name(name);
            let set = request.set_attribute_value(value).send().await;
            set.map_err(|error| native("declare", Effect::Idempotent, error))?;
        }
        return Ok(());
    }
    let mut request = live.sns.subscribe().topic_arn(topic).protocol("sqs").endpoint(queue);
    for (name, value) in attributes {
        if let Some(value) = value.filter(|value| value != "{}") {
            request = request.attributes(name, value);
        }
    }
    request.send().await.map(drop).map_err(|error| native("declare", Effect::Idempotent, error))
}

async fn find_subscription(live: &Live, topic: &str, queue: &str) -> Result<Option<String>> {
    let mut pages = live.sns.list_subscriptions_by_topic().topic_arn(topic).into_paginator().items().send();
    while let Some(found) = pages.next().await {
        let found = found.map_err(|error| native("declare", Effect::Idempotent, error))?;
        if found.endpoint.as_deref() == Some(queue) {
            return Ok(found.subscription_arn.filter(|arn| arn.starts_with("arn:")));
        }
    }
    Ok(None)
}

/// Deletes a queue; harmless when there is none.
pub(crate) async fn delete_queue(live: &Live, name: &Name) -> Result<()> {
    let Some(url) = find_queue(live, name).await? else { return Ok(()) };
    let deleted = live.sqs.delete_queue().queue_url(&*url).send().await;
    let deleted = deleted.map(drop).map_err(|error| native("delete", Effect::Idempotent, error));
    deleted.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Deletes a topic and its subscriptions; harmless when there is none.
pub(crate) async fn delete_topic(live: &Live, name: &Name) -> Result<()> {
    let Some(topic) = find_topic(live, name).await? else { return Ok(()) };
    let deleted = live.sns.delete_topic().topic_arn(&*topic).send().await;
    let deleted = deleted.map(drop).map_err(|error| native("delete", Effect::Idempotent, error));
    deleted.or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// Takes a queue from a topic and deletes it, and its policy with it.
pub(crate) async fn leave(live: &Live, topic: &Name, queue: &Name) -> Result<()> {
    unsubscribe(live, topic, queue).await?;
    delete_queue(live, queue).await
}

/// Takes a queue from a topic, which may send to it no more.
pub(crate) async fn unbind(live: &Live, topic: &Name, queue: &Name) -> Result<()> {
    match unsubscribe(live, topic, queue).await? {
        Some((url, topic, queue)) => policy::disallow(live, &url, &queue, &topic).await,
        None => Ok(()),
    }
}

/// The queue's URL and the ARNs of topic and queue, where both exist.
async fn unsubscribe(live: &Live, topic: &Name, queue: &Name) -> Result<Option<(Arc<str>, Arc<str>, String)>> {
    let (Some(url), Some(topic)) = (find_queue(live, queue).await?, find_topic(live, topic).await?) else {
        return Ok(None);
    };
    let queue = queue_arn(live, &url).await?;
    if let Some(subscription) = find_subscription(live, &topic, &queue).await? {
        let ended = live.sns.unsubscribe().subscription_arn(subscription).send().await;
        ended.map_err(|error| native("delete", Effect::Idempotent, error))?;
    }
    Ok(Some((url, topic, queue)))
}

/// Takes away what only one consumer used.
pub(crate) async fn abandon(live: &Live, plan: &Plan) {
    if let (true, Some(subscribed)) = (plan.own, &plan.topic) {
        let unsubscribed = unsubscribe(live, &subscribed.topic, &plan.queue).await;
        // Also while SNS is away: a subscription without its queue costs nobody anything.
        if let Err(error) = delete_queue(live, &plan.queue).await.and(unsubscribed.map(drop)) {
            tracing::warn!(queue = plan.queue.text, %error, "something of the queue of one consumer is left behind");
        }
    }
}

impl Plan {
    /// What the messages of a queue need.
    pub(crate) fn of_queue(queue: Name, declare: bool) -> Self {
        Self { queue, topic: None, dead_letters: None, redrive: 0, declare, own: false }
    }

    /// The queue of a topic for one consumer.
    pub(crate) fn own(topic: Subscribed) -> Self {
        let queue = names::own_queue(&topic.topic);
        Self { topic: Some(topic), own: true, ..Self::of_queue(queue, true) }
    }
}
